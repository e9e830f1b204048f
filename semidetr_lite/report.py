"""One page about one or several runs: how accurate, how they got there, what the teacher taught, where they still err.

`write_report` reads run folders (config.json, log.jsonl, pseudo_boxes.jsonl, weights) and fills report.html: a single
file that needs nothing else. What a run does not have is left out, with a sentence that says so. A figure on it is
either recorded (it stands in the log of the run) or live (measured while the page was written); the foot of the page
says which, and where each run came from.
"""

import json
import os
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np

import semidetr_lite
from semidetr_lite.errors import UserError
from semidetr_lite.training import presets
from semidetr_lite.training.measure import measure
from semidetr_lite.visualize import (
    count_hits,
    hit_sentence,
    image_tag,
    plot_curves,
    plot_losses,
    plot_pseudo_quality,
    pseudo_sentence,
    show_hits,
    show_pseudo_boxes,
    show_targets,
)

FIGURES = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "small", "AP_medium": "medium", "AP_large": "large"}
FRAMES = 6  # steps of the pseudo-box timeline
POOL = 200  # test images among which the largest differences are looked for
BATCH = 50  # images a detector gets at once
SHARPNESS = 130  # pixels an inch, for screens with small pixels


@dataclass
class Record:
    """What a run folder holds, as read from disk, and what was measured on it. Steps and seconds count the burn-in."""

    folder: Path
    config: dict
    log: list[dict]
    pseudo_lines: list[dict]
    weights: list[str]  # of "teacher" and "student", those whose file exists
    before: int  # steps of the burn-in
    name: str = ""
    figures: dict = field(default_factory=dict)  # {"student": COCO's figures on the test split, "teacher": ...}
    live: bool = False  # whether the figures were measured here, not recorded
    found: list[dict] = field(default_factory=list)  # detections on the first POOL test images
    errors: list[dict] = field(default_factory=list)  # count_hits of each


def write_report(runs, out, images: int = 8, score: float = 0.3) -> Path:
    """Write `out`/report.html about the run folders `runs` and return its path.

    `images` test images are shown (the first ones that hold an object), and as many where the runs differ most; boxes
    that score less than `score` are not drawn and not counted there. AP on the test split is the recorded one; without
    a record it is measured.
    Raises UserError for a folder that is no run, a file that cannot be read, or runs on different data.
    """
    runs = _read_runs(runs)
    splits = _splits(runs[0])
    truths = [splits.test[index][1] for index in range(min(POOL, len(splits.test)))]
    for run in runs:
        _look(run, splits.test, len(truths))
        run.errors = [count_hits(*pair, score) for pair in zip(run.found, truths)]
    title = "Runs side by side: " if len(runs) > 1 else "The run "
    parts = {
        "title": escape(title + ", ".join(run.name for run in runs)),
        "trained": _paragraphs(_trained(run) for run in runs),
        **_accuracy(runs),
        **_curves(runs),
        **_gallery(runs, splits, truths, images, score),
        "timelines": "".join(_timeline(run, splits if run is runs[0] else _splits(run)) for run in runs),
        "origins": "".join(f"<li><b>{escape(run.name)}</b>: {_origin(run)}.</li>" for run in runs),
    }
    page = resources.files("semidetr_lite").joinpath("report.html").read_text(encoding="utf-8")
    path = Path(out) / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(page).substitute(parts), encoding="utf-8")
    except OSError as problem:
        raise UserError(f"{path}: the report cannot be written: {problem.strerror}") from None
    return path


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_run(folder) -> Record:
    """The run in a folder. Raises UserError where there is none, or where one of its files is damaged."""
    folder = Path(folder)
    config = _read_config(folder)
    start = _burn_in(folder, config)
    log, pseudo_lines = (_lines(folder / name, **start) for name in ("log.jsonl", "pseudo_boxes.jsonl"))
    weights = [which for which in ("teacher", "student") if (folder / f"{which}.safetensors").is_file()]
    return Record(folder, config, log, pseudo_lines, weights, start["step"])


def _read_runs(folders) -> list[Record]:
    """The runs in folders, under names that differ: what their paths do not share, and the method where it is not said.

    Figures of different data must not stand side by side.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise UserError("no run to report on: give at least one run folder")
    paths = [run.folder.resolve().parts for run in runs]
    shared = len(os.path.commonprefix([path[:-1] for path in paths]))
    for place, (run, path) in enumerate(zip(runs, paths)):
        if path in paths[:place]:
            raise UserError(f"{run.folder}: given twice; give every run folder once")
        for key in ("data", "validation", "categories"):
            if run.config.get(key) != runs[0].config.get(key):
                both = f"{run.folder} and {runs[0].folder}"
                raise UserError(f'{both} differ in "{key}" of config.json; compare runs on the same data')
        name, method = "/".join(path[shared:]), str(run.config.get("method", ""))
        run.name = name if method in name else f"{name} ({method})"
    return runs


def _read_config(folder: Path) -> dict:
    """The settings of the run in a folder."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no config.json, so this is no run folder; give a folder that a training run wrote")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")).items())
    except (ValueError, AttributeError):
        raise UserError(f"{file}: not a JSON object; the run folder is damaged") from None


def _burn_in(folder: Path, config: dict) -> dict:
    """Steps and seconds of the run that this one started from, with those before it; nothing if it is not on disk."""
    earlier = Path(config.get("burn_in") or folder)
    for place in (earlier, folder.parent / earlier.name):
        if config.get("burn_in") and (place / "config.json").is_file():
            log = _lines(place / "log.jsonl", **_burn_in(place, _read_config(place)))
            return {"step": _last(log, "step") or 0, "seconds": _last(log, "seconds") or 0.0}
    return {"step": 0, "seconds": 0.0}


def _lines(path: Path, **start) -> list[dict]:
    """The lines of a JSON-lines file, counted from an earlier start; none if there is no file.

    A last line cut short by a killed run is left out.
    """
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    found = []
    for number, row in enumerate(rows, 1):
        try:
            line = dict(json.loads(row).items())
        except (ValueError, AttributeError):
            if number == len(rows):
                break
            raise UserError(f"{path}: line {number} is not a JSON object; delete that line to go on") from None
        moved = {key: line[key] + start[key] for key in start if line.get(key) is not None}
        found.append({**line, **moved})
    return found


def _splits(run: Record):
    """The data a run was trained and tested on."""
    try:
        return presets.load_splits(run.config)
    except KeyError as missing:
        raise UserError(f"{run.folder / 'config.json'}: no {missing}; the run folder is damaged") from None


def _look(run: Record, test, count: int) -> None:
    """Fill in a run's figures, recorded or measured, and what it finds on the first `count` test images."""
    detectors = {which: semidetr_lite.load_detector(run.folder, weights=which) for which in run.weights}
    recorded = [line["test"] for line in run.log if line.get("test")]
    run.live = bool(detectors and not recorded and len(test))
    if run.live:
        run.figures = {which: measure(detector, test) for which, detector in detectors.items()}
    elif recorded:
        run.figures = recorded[-1]
    for start in range(0, count if detectors else 0, BATCH):
        batch = [test[index][0] for index in range(start, min(start + BATCH, count))]
        run.found += detectors[run.weights[0]].detect(batch, score=0.0)


# ---- the sections ----------------------------------------------------------------------------------------------------


def _accuracy(runs: list[Record]) -> dict:
    """The table: a line for the teacher and one for the student of each run, with the difference to the first run's."""
    lines, best = [], []
    for run in runs:
        for which in [which for which in ("teacher", "student") if which in run.figures]:
            base = {} if run is runs[0] else runs[0].figures.get(which, {})
            cells = [_change(run.figures[which].get(key), base.get(key)) for key in FIGURES]
            cells += [_labels(run.config), _count(_last(run.log, "step")), _duration(_last(run.log, "seconds"))]
            lines.append(f'<tr class="{which}">{_cells("td", [escape(run.name), which, *cells])}</tr>')
        value = (run.figures.get("teacher") or run.figures.get("student") or {}).get("AP")
        best += [(100 * value, run.name)] if _measured(value) else []
    finding = "No accuracy on the test split yet"
    if best:
        top, name = max(best)
        finding = f"{name} reaches {top:.1f} AP on the test split"
        finding += f", {top - best[0][0]:.1f} more than {best[0][1]}" if name != best[0][1] else ""
    head = _cells("th", ["run", "weights", *FIGURES.values(), "labels", "steps", "time"])
    return {
        "finding": escape(finding),
        "table": f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>" if lines else "",
        "without_figures": _without(runs, "figures", "neither a recorded test figure nor weights, so nothing to show."),
    }


def _curves(runs: list[Record]) -> dict:
    """AP over steps and over minutes, and the losses of each run."""
    logs, curves, notes = (
        {run.name: run.log for run in runs if run.log},
        [],
        _without(runs, "log", "no log.jsonl, so no curve."),
    )
    if any("AP_teacher" in line or "AP_student" in line for log in logs.values() for line in log):
        by_minute = plot_curves(logs, x="minutes", title="The same over the time spent on training")
        curves = [plot_curves(logs), by_minute]
    elif logs:
        notes += _paragraphs(["No accuracy was logged during training."])
    losses = [_figure(image_tag(plot_losses(log), dpi=SHARPNESS), "", name) for name, log in logs.items()]
    curves = "".join(image_tag(curve, dpi=SHARPNESS) for curve in curves)
    return {"curves": curves, "losses": "".join(losses), "without_curves": notes}


def _timeline(run: Record, splits) -> str:
    """The watched unlabelled images over training: a row per image, a column per step."""
    if not run.pseudo_lines:
        return _paragraphs([f"{run.name}: no pseudo-box was recorded, so no timeline."])
    steps = sorted({line["step"] for line in run.pseudo_lines})
    steps = [steps[place] for place in np.unique(np.linspace(0, len(steps) - 1, FRAMES).round().astype(int))]
    by_place = {(line["image_id"], line["step"]): line for line in run.pseudo_lines}
    ids = list(dict.fromkeys(line["image_id"] for line in run.pseudo_lines))
    watched, cells = _watched(splits.unlabelled, ids), []
    for image_id in [image_id for image_id in ids if image_id in watched]:
        image, truth = watched[image_id]
        for frame, step in enumerate(steps, 1):
            line, picture, said = by_place.get((image_id, step)), "", "not recorded"
            if line is not None:
                said = pseudo_sentence(line, truth)
                drawn = show_pseudo_boxes(image, line, truth, splits.categories, title="")
                picture = image_tag(drawn, f"step {step:,}: {said}", SHARPNESS)
            cells.append(_figure(picture, said, f"step {step:,}", frame))
    names = "|".join(f"step {step:,}" for step in steps)
    grid = f'<div class="timeline" style="--columns:{len(steps)}" data-names="{names}">{"".join(cells)}</div>'
    quality = ""
    if any("pseudo_per_image" in line for line in run.log):
        quality = f'<div class="plots wide">{image_tag(plot_pseudo_quality(run.log), dpi=SHARPNESS)}</div>'
    lost = _paragraphs(f"Image {image_id} is not in the data any more." for image_id in ids if image_id not in watched)
    return f"<h2>The teacher of {escape(run.name)}</h2>{quality}{lost}{grid}"


def _watched(unlabelled, ids: list) -> dict:
    """{image id: (image, its truth or None)} for some images of the unlabelled split; it stops when it has all."""
    found: dict = {}
    for index in range(len(unlabelled)):
        if len(found) == len(ids):
            break
        image, target = unlabelled[index]
        if target.get("image_id") in ids:
            found[target["image_id"]] = (image, target.get("truth"))
    return found


def _gallery(runs: list[Record], splits, truths: list[dict], images: int, score: float) -> dict:
    """The same test images as truth and as each run sees them: the first ones, and those where the runs differ most."""
    seeing = [run for run in runs if run.weights] if truths else []
    seen, compared = _without(runs, "weights", "no weights, so no detections."), ["Two runs with weights are needed."]
    first, different = [index for index, truth in enumerate(truths) if len(truth["boxes"])][:images], []
    if not truths:
        seen += _paragraphs(["The test split holds no image."])
    if seeing:
        note = f"Boxes that score at least {score:g}; a hit has the right class and an IoU of at least 0.5. "
        totals = "; ".join(f"{run.name} {hit_sentence(*run.errors)}" for run in seeing)
        seen = _paragraphs([f"{note}On the first {len(truths)} test images: {totals}."]) + seen
    if len(seeing) > 1:
        different, compared = _differences(seeing, images)
    cards = {index: _card(index, splits, seeing, score) for index in {*first, *different} if seeing}
    first, different = ("".join(cards.get(index, "") for index in part) for part in (first, different))
    return {"seen": seen, "first": first, "compared": _paragraphs(compared), "different": different}


def _differences(runs: list[Record], images: int) -> tuple[list[int], list[str]]:
    """The test images with the largest difference in errors, and a sentence on how often which run errs least."""
    wrong = np.array([[len(one["misses"]) + len(one["false_alarms"]) for one in run.errors] for run in runs])
    spread, least = wrong.max(0) - wrong.min(0), wrong == wrong.min(0)  # (images,), (runs, images)
    chosen = [int(index) for index in np.argsort(-spread, kind="stable")[:images] if spread[index] > 0]
    if not chosen:
        return [], ["They make equally many errors on every image."]
    alone = (least & (least.sum(0) == 1)).sum(1)
    said = ", ".join(f"{run.name} alone errs least on {count}" for run, count in zip(runs, alone))
    note = f"Chosen for their difference, so not typical. Of {wrong.shape[1]} images, {said}"
    return chosen, [f"{note}; {wrong.shape[1] - alone.sum()} are ties."]


def _card(index: int, splits, runs: list[Record], score: float) -> str:
    """One test image: its truth, then each run."""
    image, truth = splits.test[index]
    objects = len(truth["boxes"])
    drawn = show_targets([image], [truth], splits.categories, title="")
    said = f"{objects} {'object' if objects == 1 else 'objects'}"
    cells = [_figure(image_tag(drawn, f"truth of test image {index}: {said}", SHARPNESS), said, "truth")]
    for run in runs:
        said = hit_sentence(run.errors[index])
        drawn = show_hits([image], [run.found[index]], [truth], splits.categories, score, title="")
        cells.append(_figure(image_tag(drawn, f"{run.name} on test image {index}: {said}", SHARPNESS), said, run.name))
    kind, columns = "card large" if max(image.shape[-2:]) > 160 else "card", f"--columns:{len(cells)}"
    return f'<article class="{kind}"><h3>test image {index}</h3><div style="{columns}">{"".join(cells)}</div></article>'


def _trained(run: Record) -> str:
    """What was trained, in a sentence."""
    config, steps = run.config, run.config.get("steps")
    data = config.get("data") or config.get("preset") or "unnamed data"
    text = f"{run.name}: {config.get('detector', 'a detector')} on {data}"
    if config.get("percent") is not None:
        text += f", {_labels(config)} of the labels (fold {config.get('fold', '–')})"
    text += f", {steps:,} steps" if isinstance(steps, int) else ""
    return text + (f" after {run.before:,} steps of burn-in ({config['burn_in']})" if run.before else "") + "."


def _origin(run: Record) -> str:
    """Where the numbers of a run came from."""
    command, source = run.config.get("command"), "missing"
    if run.figures:
        source = "live, measured while this page was written" if run.live else "recorded in that log"
    known = [key for key in ("seed", "machine", "commit") if run.config.get(key) is not None]
    facts = [
        f"log <code>{escape(str(run.folder / 'log.jsonl'))}</code>" if run.log else "no log",
        f"command <code>{escape(str(command))}</code>" if command else "command not recorded",
        *(f"{key} {escape(str(run.config[key]))}" for key in known),
        f"test figures {source}",
    ]
    return "; ".join(facts)


# ---- HTML ------------------------------------------------------------------------------------------------------------


def _paragraphs(texts) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _without(runs: list[Record], what: str, text: str) -> str:
    """A sentence about each run that lacks something."""
    return _paragraphs(f"{run.name}: {text}" for run in runs if not getattr(run, what))


def _cells(tag: str, texts: list[str]) -> str:
    return "".join(f"<{tag}>{text}</{tag}>" for text in texts)


def _figure(picture: str, text: str, name: str, frame: int = 0) -> str:
    """A picture over its caption; `frame` is its place on the timeline."""
    return (
        f'<figure data-frame="{frame}">{picture}<figcaption><b>{escape(name)}</b> {escape(text)}</figcaption></figure>'
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
    size, unit = next(pair for pair in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * pair[0] or pair[0] == 1)
    return f"{seconds / size:.{0 if size == 1 else 1}f} {unit}"


def _measured(value) -> bool:
    """Whether a figure exists: COCO marks a class of objects that does not occur by nan or -1."""
    return value is not None and value >= 0


def _change(value, base) -> str:
    """A figure in %, and how much more it is than another one."""
    if not _measured(value):
        return "–"
    change = f"<small>{round(100 * (value - base), 1) + 0.0:+.1f}</small>" if _measured(base) else ""
    return f"{100 * value:.1f}{change}"  # + 0.0 turns -0.0 into 0.0
