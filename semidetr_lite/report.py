"""One page about one or several runs: how accurate, how they got there, what the teacher taught, where they still err.

`write_report` reads run folders (config.json, log.jsonl, pseudo_boxes.jsonl, weights) and writes a single HTML file
that needs nothing else: pictures and style lie inside, nothing is fetched. What a run does not have is left out, with a
sentence that says so. A figure on the page is either recorded (it stands in the log of the run) or live (measured while
the page was written); the foot of the page says which, and where each run came from.
"""

import base64
import io
import json
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

import semidetr_lite
from semidetr_lite.errors import UserError
from semidetr_lite.evaluate import evaluate
from semidetr_lite.training import presets
from semidetr_lite.visualize import (
    count_hits,
    hit_sentence,
    plot_curves,
    plot_losses,
    plot_pseudo_quality,
    png,
    pseudo_sentence,
    show_hits,
    show_pseudo_boxes,
    show_targets,
    unbroken,
)

FIGURES = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "small", "AP_medium": "medium", "AP_large": "large"}
FRAMES = 6  # steps of the pseudo-box timeline
POOL = 200  # test images among which the largest differences are looked for
BATCH = 50  # images a detector gets at once
UNITS = (
    "All figures in %, on the test split; small, medium and large by the area of the object (32 x 32, 96 x 96 pixels). "
    "The teacher holds the averaged weights of the student. A small number is the difference to the first run. "
    "Steps and time include the burn-in."
)
MEANING = (
    "Unlabelled images as they are, not augmented. Kept boxes scored over the cut and are training targets; boxes that "
    "were only mined (a low matching cost) feed the consistency loss alone; dropped boxes are not used."
)
CSS = """
:root { color-scheme: light dark; --back: #fff; --ink: #1d1d1f; --soft: #6b6b70; --line: #dcdce0; --card: #f5f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --back: #17181a; --ink: #e8e8ea; --soft: #a0a0a8; --line: #3a3b40; --card: #222327; }
}
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 1rem 1.25rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: .85rem; font-weight: 600; color: var(--soft); margin: 0 0 .3rem; }
p { max-width: 75ch; margin: .4rem 0; }
code { font-size: .85em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
th:nth-child(n+3), td:nth-child(n+3) { text-align: right; }
tr.student td { color: var(--soft); }
@media (max-width: 600px) { th, td { padding: .3rem .45rem; } }
td small { display: block; font-size: .75rem; color: var(--soft); }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; margin: .6rem 0; }
.plots > *, .plots img { max-width: min(100%, 600px); }
.plots > img:only-child { max-width: min(100%, 900px); }
figure { margin: 0; }
figcaption { font-size: .78rem; line-height: 1.35; color: var(--soft); margin-top: .25rem; }
figcaption b { color: var(--ink); }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { background: var(--card); border-radius: 8px; padding: .6rem; max-width: 100%; box-sizing: border-box; }
.card > div { display: flex; gap: .6rem; overflow-x: auto; }
.card figure { flex: 0 0 190px; }
.card.large figure { flex-basis: 360px; }
.card img, .timeline img { width: 100%; }
.timeline { display: grid; gap: .8rem; overflow-x: auto; }
.timeline { grid-template-columns: repeat(var(--columns), minmax(160px, 210px)); }
.timeline b { display: block; }
.timeline.single { grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); }
.slider input { width: min(24rem, 60%); vertical-align: middle; }
.legend span { margin-right: 1.2rem; font-size: .85rem; white-space: nowrap; }
.legend i { display: inline-block; width: 22px; height: 12px; box-sizing: border-box; }
.legend i { margin-right: .4rem; vertical-align: -1px; }
i.truth { border: 2px solid #fff; outline: 1px solid #000; box-shadow: inset 0 0 0 1px #000; }
i.hit { border: 2px solid #56b4e9; }
i.kept { border: 3px solid #56b4e9; }
i.mined { border: 2px dashed #56b4e9; }
i.dropped { border: 1.5px dotted #8a8a8a; }
i.missed { border: 3px solid #e3001b; }
i.false_alarm { border: 2px solid #e69f00; }
i.false_alarm { background: repeating-linear-gradient(135deg, #e69f00 0 2px, transparent 2px 6px); }
footer { font-size: .85rem; color: var(--soft); }
footer b { color: var(--ink); }
"""
# Without scripts every frame stays on the page; with them a slider shows one step at a time.
SCRIPT = """
for (const bar of document.querySelectorAll(".slider")) {
  const input = bar.querySelector("input"), grid = bar.nextElementSibling, names = input.dataset.names.split("|");
  bar.hidden = false;
  input.oninput = () => {
    const frame = Number(input.value);
    bar.querySelector("output").textContent = frame ? names[frame - 1] : "all steps";
    grid.classList.toggle("single", frame > 0);
    for (const cell of grid.children) cell.hidden = frame > 0 && Number(cell.dataset.frame) !== frame;
  };
}
"""


@dataclass(frozen=True)
class Record:
    """What a run folder holds, as read from disk. Steps and seconds count the burn-in, if there was one."""

    folder: Path
    name: str  # of the folder, with its parents where that is ambiguous, and the method where it is not mentioned
    config: dict
    log: list[dict]
    pseudo_lines: list[dict]
    weights: tuple[str, ...]  # of "teacher" and "student", those whose file exists
    before: int  # steps of the burn-in


def write_report(runs, out, images: int = 8, score: float = 0.3) -> Path:
    """Write `out`/report.html about the run folders `runs` and return its path.

    `images` test images are shown (the first ones that hold an object), and as many where the runs differ most; boxes
    that score less than `score` are not drawn and not counted there. AP on the test split is the recorded one; without
    a record it is measured.
    Raises UserError for a folder that is no run, a file that cannot be read, or runs on different data.
    """
    runs = _told_apart([read_run(folder) for folder in runs])
    if not runs:
        raise UserError("no run to report on: give at least one run folder")
    _check_same_data(runs)
    splits = _splits(runs[0])
    detections: dict = {}
    figures = {run.folder: _test_figures(run, splits, detections) for run in runs}
    sections = [
        _accuracy_section(runs, figures),
        _curve_section(runs),
        *_timeline_sections(runs, splits),
        _gallery_section(runs, splits, detections, images, score),
        _footer(runs, figures),
    ]
    path = Path(out) / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_page(runs, "\n".join(sections)), encoding="utf-8")
    except OSError as problem:
        raise UserError(f"{path}: the report cannot be written: {problem.strerror}") from None
    return path


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_run(folder) -> Record:
    """The run in a folder. Raises UserError where there is none, or where one of its files is damaged."""
    folder = Path(folder)
    config = _read_config(folder)
    steps, seconds = _burn_in(folder, config)
    log = [_later(line, steps, seconds) for line in _lines(folder / "log.jsonl")]
    pseudo_lines = [_later(line, steps, seconds) for line in _lines(folder / "pseudo_boxes.jsonl")]
    weights = tuple(which for which in ("teacher", "student") if (folder / f"{which}.safetensors").is_file())
    return Record(folder, _name(folder, config, 1), config, log, pseudo_lines, weights, steps)


def _name(folder: Path, config: dict, parts: int) -> str:
    """The last parts of a folder's path, and the method if they do not mention it."""
    method, name = str(config.get("method", "")), "/".join(folder.resolve().parts[-parts:])
    return name if method in name else f"{name} ({method})"


def _told_apart(runs: list[Record]) -> list[Record]:
    """The runs under names that differ: as much of each path as that needs."""
    folders = [run.folder.resolve() for run in runs]
    twice = [run.folder for run, folder in zip(runs, folders) if folders.count(folder) > 1]
    if twice:
        raise UserError(f"{twice[0]}: given twice; give every run folder once")
    for parts in range(1, 1 + max((len(folder.parts) for folder in folders), default=0)):
        names = [_name(run.folder, run.config, parts) for run in runs]
        if len(set(names)) == len(runs):
            return [replace(run, name=name) for run, name in zip(runs, names)]
    return [replace(run, name=str(folder)) for run, folder in zip(runs, folders)]


def _read_config(folder: Path) -> dict:
    """The settings of the run in a folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no config.json, so this is no run folder; give a folder that a training run wrote")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object; the run folder is damaged")
    return config


def _burn_in(folder: Path, config: dict) -> tuple[int, float]:
    """Steps and seconds of the run that this one started from, with those before it; nothing if it is not on disk."""
    earlier = config.get("burn_in")
    if not earlier:
        return 0, 0.0
    for place in (Path(earlier), folder.parent / Path(earlier).name):
        if (place / "config.json").is_file():
            steps, seconds = _burn_in(place, _read_config(place))
            log = _lines(place / "log.jsonl")
            return steps + (_last(log, "step") or 0), seconds + (_last(log, "seconds") or 0.0)
    return 0, 0.0


def _later(line: dict, steps: int, seconds: float) -> dict:
    """A line of a log, counted from an earlier start."""
    moved = {"step": steps, "seconds": seconds}
    return {key: value + moved[key] if key in moved and value is not None else value for key, value in line.items()}


def _lines(path: Path) -> list[dict]:
    """The lines of a JSON-lines file, none if it does not exist; a last line cut short by a killed run is left out."""
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    found = []
    for number, row in enumerate(rows, 1):
        try:
            line = json.loads(row)
        except ValueError:
            line = None
        if isinstance(line, dict):
            found.append(line)
        elif number < len(rows):
            raise UserError(f"{path}: line {number} is not a JSON object; delete that line to go on")
    return found


def _check_same_data(runs: list[Record]) -> None:
    """Figures of different data must not stand side by side."""
    for run in runs[1:]:
        for key in ("data", "validation", "categories"):
            if run.config.get(key) != runs[0].config.get(key):
                both = f"{run.folder} and {runs[0].folder}"
                raise UserError(f'{both} differ in "{key}" of config.json; compare runs on the same data')


def _splits(run: Record):
    """The data a run was trained and tested on."""
    try:
        return presets.load_splits(run.config)
    except KeyError as missing:
        raise UserError(f"{run.folder / 'config.json'}: no {missing}; the run folder is damaged") from None


def _test_figures(run: Record, splits, detections: dict) -> dict:
    """{"student": COCO's figures, "teacher": ..., "origin": "recorded" or "live"} on the test split, or {}."""
    recorded = [line["test"] for line in run.log if line.get("test")]
    if recorded:
        return {**recorded[-1], "origin": "recorded"}
    if not run.weights:
        return {}
    truths = [splits.test[index][1] for index in range(len(splits.test))]
    measured = {which: evaluate(_detect(run, which, splits, detections, len(truths)), truths) for which in run.weights}
    return {**measured, "origin": "live"}


def _detect(run: Record, weights: str, splits, detections: dict, count: int) -> list[dict]:
    """What a run finds on the first `count` test images; `detections` keeps what was computed before."""
    known = detections.setdefault((run.folder, weights), [])
    if len(known) < count:
        detector = semidetr_lite.load_detector(run.folder, weights=weights)
        for start in range(len(known), count, BATCH):
            batch = [splits.test[index][0] for index in range(start, min(start + BATCH, count))]
            known.extend(detector.detect(batch, score=0.0))
    return known[:count]


# ---- the sections ----------------------------------------------------------------------------------------------------


def _accuracy_section(runs: list[Record], figures: dict) -> str:
    """The table: a line for the teacher and one for the student of each run, with the difference to the first run's."""
    lines = []
    for run in runs:
        for which in ("teacher", "student"):
            if which in figures[run.folder]:
                base = {} if run is runs[0] else figures[runs[0].folder].get(which, {})
                lines.append(_table_line(run, which, figures[run.folder][which], base))
    names = ("run", "weights", *FIGURES.values(), "labels", "steps", "time")
    head = "".join(f"<th>{name}</th>" for name in names)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    without = [run.name for run in runs if not figures[run.folder]]
    notes = [f"{name}: neither a recorded test figure nor weights, so nothing to show." for name in without]
    body = table + _paragraphs([UNITS]) if lines else ""
    return _section(_accuracy_finding(runs, figures), body + _paragraphs(notes))


def _table_line(run: Record, which: str, values: dict, base: dict) -> str:
    """One line of the table; `base` holds the figures it is compared with."""
    numbers = []
    for key in FIGURES:
        value, other, change = values.get(key), base.get(key), ""
        if _measured(value) and _measured(other):
            change = f"<small>{round(100 * (value - other), 1) + 0.0:+.1f}</small>"  # + 0.0 turns -0.0 into 0.0
        numbers.append(f"{_percent(value)}{change}")
    numbers += [_labels(run.config), _count(_last(run.log, "step")), _duration(_last(run.log, "seconds"))]
    cells = f"<td>{escape(run.name)}</td><td>{which}</td>" + "".join(f"<td>{number}</td>" for number in numbers)
    return f'<tr class="{which}">{cells}</tr>'


def _accuracy_finding(runs: list[Record], figures: dict) -> str:
    """The heading of the table: the best run, and how far ahead of the first one."""
    best = []
    for run in runs:
        values = figures[run.folder].get("teacher") or figures[run.folder].get("student") or {}
        if _measured(values.get("AP")):
            best.append((100 * values["AP"], run.name))
    if not best:
        return "No accuracy on the test split yet"
    top, (first, first_name) = max(best), best[0]
    text = f"{top[1]} reaches {top[0]:.1f} AP on the test split"
    return text if top[1] == first_name else f"{text}, {top[0] - first:.1f} more than {first_name}"


def _curve_section(runs: list[Record]) -> str:
    """AP over steps and over minutes, and the losses of each run, folded."""
    heading, logs = "How they got there", {run.name: run.log for run in runs if run.log}
    notes = [f"{run.name}: no log.jsonl, so no curve." for run in runs if not run.log]
    body = ""
    if any("AP_teacher" in line or "AP_student" in line for log in logs.values() for line in log):
        by_minute = plot_curves(logs, x="minutes", title="The same over the time spent on training")
        pictures = _picture(plot_curves(logs), "AP over steps") + _picture(by_minute, "AP over minutes")
        body = f'<div class="plots">{pictures}</div>'
    elif logs:
        notes.append("No accuracy was logged during training.")
    losses = [_figure(_picture(plot_losses(log), f"losses of {name}"), name) for name, log in logs.items()]
    if losses:
        body += f'<details><summary>Losses</summary><div class="plots">{"".join(losses)}</div></details>'
    return _section(heading, body + _paragraphs(notes))


def _timeline_sections(runs: list[Record], splits) -> list[str]:
    """A timeline for every run that recorded pseudo-boxes, and a sentence about the others."""
    taught = [run for run in runs if run.pseudo_lines]
    sections = [_timeline_section(run, splits if run is runs[0] else _splits(run)) for run in taught]
    others = [f"{run.name}: no pseudo-box was recorded, so no timeline." for run in runs if run not in taught]
    return [*sections, _paragraphs(others)]


def _timeline_section(run: Record, splits) -> str:
    """The watched unlabelled images over training: a row per image, a column per step."""
    heading = f"What the teacher of {run.name} taught"
    steps = sorted({line["step"] for line in run.pseudo_lines})
    steps = [steps[place] for place in np.unique(np.linspace(0, len(steps) - 1, FRAMES).round().astype(int))]
    by_place = {(line["image_id"], line["step"]): line for line in run.pseudo_lines}
    ids = list(dict.fromkeys(line["image_id"] for line in run.pseudo_lines))
    found = _watched(splits, ids)
    cells = []
    for image_id in (image_id for image_id in ids if image_id in found):
        for frame, step in enumerate(steps, 1):
            line = by_place.get((image_id, step))
            cells.append(_timeline_cell(frame, step, *found[image_id], line, splits.categories))
    quality = ""
    if any("pseudo_per_image" in line for line in run.log):
        quality = _picture(plot_pseudo_quality(run.log), "quality of the pseudo-boxes")
    notes = [MEANING, *(f"Image {image_id} is not in the data any more." for image_id in ids if image_id not in found)]
    names = "|".join(f"step {step:,}" for step in steps)
    slider = f'<input type="range" min="0" max="{len(steps)}" value="0" data-names="{names}" aria-label="step">'
    slider = f'<p class="slider" hidden>{slider} <output>all steps</output></p>'
    grid = f'<div class="timeline" style="--columns:{len(steps)}">{"".join(cells)}</div>'
    legend = _legend("truth", "kept", "mined", "dropped")
    return _section(heading, f'<div class="plots">{quality}</div>{_paragraphs(notes)}{legend}{slider}{grid}')


def _timeline_cell(frame: int, step: int, image, truth, line: dict | None, categories) -> str:
    """One image at one step."""
    if line is None:
        return _figure("", "not recorded", f"step {step:,}", frame)
    said = pseudo_sentence(line, truth)
    drawn = show_pseudo_boxes(image, line, truth, categories, title="", legend=False)
    return _figure(_picture(drawn, f"step {step:,}: {said}"), said, f"step {step:,}", frame)


def _watched(splits, ids: list) -> dict:
    """{image id: (image, its truth or None)} for some images of the unlabelled split; it stops when it has all."""
    found: dict = {}
    for index in range(len(splits.unlabelled)):
        if len(found) == len(ids):
            break
        image, target = splits.unlabelled[index]
        if target.get("image_id") in ids:
            found[target["image_id"]] = (image, target.get("truth"))
    return found


def _gallery_section(runs: list[Record], splits, detections: dict, images: int, score: float) -> str:
    """The same test images as truth and as each run sees them: the first ones, and those where the runs differ most."""
    seeing, heading = [run for run in runs if run.weights], "What they see"
    notes = [f"{run.name}: no weights, so no detections." for run in runs if not run.weights]
    count = min(POOL, len(splits.test))
    if not seeing or not count:
        return _section(heading, _paragraphs(notes or ["The test split holds no image."]))
    found = [_detect(run, run.weights[0], splits, detections, count) for run in seeing]
    truths = [splits.test[index][1] for index in range(count)]
    errors = [[count_hits(*pair, score) for pair in zip(mine, truths)] for mine in found]
    first = [index for index, truth in enumerate(truths) if len(truth["boxes"])][:images]
    totals = "; ".join(f"{run.name} {hit_sentence(*mine)}" for run, mine in zip(seeing, errors))
    note = f"Boxes that score at least {score:g}; a hit has the right class and an IoU of at least 0.5. "
    notes.insert(0, note + f"On the first {count} test images: {totals}.")
    legend = _legend("truth", "hit", "false_alarm", "missed")
    cards = [_card(index, splits, seeing, found, errors, score) for index in first]
    section = _section(f"{heading}: the first test images with an object", _paragraphs(notes) + legend + _cards(cards))
    if len(seeing) == 1:
        return section
    chosen, note = _differences(seeing, errors, images)
    cards = [_card(index, splits, seeing, found, errors, score) for index in chosen]
    return section + _section("Where they differ most", _paragraphs([note]) + (legend + _cards(cards) if cards else ""))


def _differences(runs: list[Record], errors, images: int) -> tuple[list[int], str]:
    """The test images with the largest difference in errors, and a sentence on how often which run errs least."""
    counts = [[len(error["misses"]) + len(error["false_alarms"]) for error in mine] for mine in errors]
    wrong = np.array(counts)  # (runs, images)
    spread, least = wrong.max(0) - wrong.min(0), wrong == wrong.min(0)
    chosen = [int(index) for index in np.argsort(-spread, kind="stable")[:images] if spread[index] > 0]
    if not chosen:
        return [], "They make equally many errors on every image."
    alone = (least & (least.sum(0) == 1)).sum(1)
    said = ", ".join(f"{run.name} alone errs least on {count}" for run, count in zip(runs, alone))
    ties = wrong.shape[1] - alone.sum()
    return chosen, f"Chosen for their difference, so not typical. Of {wrong.shape[1]} images, {said}; {ties} are ties."


def _card(index: int, splits, runs: list[Record], found, errors, score: float) -> str:
    """One test image: its truth, then each run."""
    image, truth = splits.test[index]
    objects = len(truth["boxes"])
    picture = _picture(show_targets([image], [truth], splits.categories, title=""), f"truth of test image {index}")
    cells = [_figure(picture, f"{objects} {'object' if objects == 1 else 'objects'}", "truth")]
    for run, mine, wrong in zip(runs, found, errors):
        said, setting = hit_sentence(wrong[index]), {"titles": [""], "title": "", "legend": False}
        drawn = show_hits([image], [mine[index]], [truth], splits.categories, score, **setting)
        cells.append(_figure(_picture(drawn, f"{run.name} on test image {index}: {said}"), said, run.name))
    kind = "card large" if max(image.shape[-2:]) > 160 else "card"
    return f'<article class="{kind}"><h3>test image {index}</h3><div>{"".join(cells)}</div></article>'


def _footer(runs: list[Record], figures: dict) -> str:
    """Where every number came from."""
    origins = {"recorded": "recorded in that log", "live": "live, measured while this page was written"}
    rows = []
    for run in runs:
        config, origin = run.config, figures[run.folder].get("origin")
        facts = [f"log <code>{escape(str(run.folder / 'log.jsonl'))}</code>" if run.log else "no log"]
        command = config.get("command")
        facts.append(f"command <code>{escape(str(command))}</code>" if command else "command not recorded")
        facts += [
            f"{key} {escape(str(config[key]))}" for key in ("seed", "machine", "commit") if config.get(key) is not None
        ]
        facts.append(f"test figures {origins.get(origin, 'missing')}")
        rows.append(f"<li><b>{escape(run.name)}</b>: {'; '.join(facts)}.</li>")
    note = "Curves, steps, times and pseudo-boxes are recorded. The detections in the galleries are live: "
    note += "the weights of the teacher, or of the student where there is no teacher, run while this page was written."
    return f"<footer><h2>Where the numbers come from</h2><ul>{''.join(rows)}</ul>{_paragraphs([note])}</footer>"


# ---- HTML ------------------------------------------------------------------------------------------------------------


def _page(runs: list[Record], body: str) -> str:
    """The whole file."""
    title = "Runs side by side: " + ", ".join(run.name for run in runs) if len(runs) > 1 else f"The run {runs[0].name}"
    lead = _paragraphs(_trained(run) for run in runs)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{CSS}</style>"
    content = f"<main><h1>{escape(title)}</h1>{lead}{body}</main><script>{SCRIPT}</script>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{content}\n</body></html>\n'


def _trained(run: Record) -> str:
    """What was trained, in a sentence."""
    config = run.config
    data = config.get("data") or config.get("preset") or "unnamed data"
    text = f"{run.name}: {config.get('detector', 'a detector')} on {data}"
    if config.get("percent") is not None:
        text += f", {_labels(config)} of the labels (fold {config.get('fold', '–')})"
    steps = config.get("steps")
    text += f", {steps:,} steps" if isinstance(steps, int) else ""
    return text + (f" after {run.before:,} steps of burn-in ({config['burn_in']})" if run.before else "") + "."


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def _paragraphs(texts) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _cards(cards: list[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>'


def _figure(picture: str, text: str, name: str = "", frame: int | None = None) -> str:
    """A picture over its caption; `frame` is its place on the timeline."""
    mark = "" if frame is None else f' data-frame="{frame}"'
    text = unbroken(text)
    return f"<figure{mark}>{picture}<figcaption><b>{escape(name)}</b> {escape(text)}</figcaption></figure>"


def _picture(figure, text: str) -> str:
    """A figure as an image inside the page, with its description for those who do not see it."""
    drawn = Image.open(io.BytesIO(png(figure, dpi=160))).convert("RGB")
    packed = io.BytesIO()
    drawn.quantize(256).save(packed, "PNG")  # a third of the size, no difference to be seen
    code = base64.b64encode(packed.getvalue()).decode("ascii")
    return f'<img src="data:image/png;base64,{code}" alt="{escape(text)}">'


def _legend(*keys: str) -> str:
    """What the line styles mean."""
    names = {"false_alarm": "false alarm", "mined": "mined only"}
    return (
        '<p class="legend">'
        + "".join(f'<span><i class="{key}"></i>{names.get(key, key)}</span>' for key in keys)
        + "</p>"
    )


def _labels(config: dict) -> str:
    percent = config.get("percent")
    return f"{percent:g} %" if isinstance(percent, int | float) else "–"


def _last(log: list[dict], key: str):
    """The last value a log has for a key, None if it has none."""
    return next((line[key] for line in reversed(log) if line.get(key) is not None), None)


def _count(number) -> str:
    return "–" if number is None else f"{number:,}"


def _duration(seconds) -> str:
    if seconds is None:
        return "–"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _measured(value) -> bool:
    """Whether a figure exists: COCO marks a class of objects that does not occur by nan or -1."""
    return value is not None and value >= 0


def _percent(value) -> str:
    return f"{100 * value:.1f}" if _measured(value) else "–"
