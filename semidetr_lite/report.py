"""One page about one or several runs: how accurate, how they got there, what the teacher taught, where they still err.

`write_report` reads run folders (config.json, log.jsonl, pseudo_boxes.jsonl, weights) and fills report.html, a Jinja
template (torch brings Jinja): a single file that needs nothing else. What a run does not have is left out, with a
sentence that says so. A figure on it is either recorded (it stands in the log of the run) or live (measured while the
page was written); the foot of the page says which, and where each run came from.
"""

import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
from jinja2 import Template

import semidetr_lite
from semidetr_lite import visualize
from semidetr_lite.errors import UserError, as_user_error
from semidetr_lite.files import read_jsonl, write_atomic
from semidetr_lite.training import presets
from semidetr_lite.training.checkpoint import read_config
from semidetr_lite.training.measure import measure

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
    path, runs = Path(out) / "report.html", _read_runs(runs)
    with as_user_error(", ".join(str(run.folder) for run in runs), "its config or logs cannot be shown"):
        page = _page(runs, images, score)
    write_atomic(path, page)
    return path


def _page(runs: list[Record], images: int, score: float) -> str:
    splits = _splits(runs[0])
    truths = [splits.test[index][1] for index in range(min(POOL, len(splits.test)))]
    for run in runs:
        _look(run, splits.test, len(truths))
        run.errors = [visualize.count_hits(*pair, score) for pair in zip(run.found, truths)]
    seeing = [run for run in runs if run.weights] if truths else []
    first = [index for index, truth in enumerate(truths) if len(truth["boxes"])][:images]
    different, compared = _differences(seeing, images)
    cards = {index: _card(index, splits, seeing, score) for index in {*first, *different} if seeing}
    logs = {run.name: run.log for run in runs if run.log}
    page = resources.files("semidetr_lite").joinpath("report.html").read_text(encoding="utf-8")
    return Template(page, autoescape=True).render(
        runs=runs,
        finding=_finding(runs),
        last=_last,
        change=_change,
        duration=_duration,
        curves=_curves(logs),
        losses={name: _image(visualize.plot_losses(log)) for name, log in logs.items()},
        seeing=seeing,
        totals=[f"{run.name} {visualize.hit_sentence(*run.errors)}" for run in seeing],
        score=score,
        looked_at=len(truths),
        first=[cards[index] for index in first if seeing],
        different=[cards[index] for index in different],
        compared=compared,
        timelines=[_timeline(run, splits if run is runs[0] else _splits(run)) for run in runs if run.pseudo_lines],
    )


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_run(folder) -> Record:
    """The run in a folder. Raises UserError where there is none, or where one of its files is damaged."""
    folder = Path(folder)
    config = read_config(folder)
    with as_user_error(folder / "config.json", "its burn-in cannot be followed"):
        start = _burn_in(folder, config)
    log, pseudo_lines = (_lines(folder / name, **start) for name in ("log.jsonl", "pseudo_boxes.jsonl"))
    weights = [which for which in ("teacher", "student") if (folder / f"{which}.safetensors").is_file()]
    return Record(folder, config, log, pseudo_lines, weights, start["step"])


def _read_runs(folders) -> list[Record]:
    """The runs, named by folder or, where two are alike, by what the paths do not share; and method, if not said."""
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise UserError("no run to report on: give at least one run folder")
    paths = [run.folder.resolve().parts for run in runs]
    alike = len({path[-1] for path in paths}) < len(paths)
    shared = len(os.path.commonprefix([path[:-1] for path in paths])) if alike else -1  # -1: all but the folder's name
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


def _burn_in(folder: Path, config: dict) -> dict:
    """Steps and seconds of the run that this one started from, with those before it; nothing if it is not on disk."""
    earlier = Path(config.get("burn_in") or folder)
    for place in (earlier, folder.parent / earlier.name):
        if config.get("burn_in") and (place / "config.json").is_file():
            log = _lines(place / "log.jsonl", **_burn_in(place, read_config(place)))
            return {"step": _last(log, "step") or 0, "seconds": _last(log, "seconds") or 0.0}
    return {"step": 0, "seconds": 0.0}


def _lines(path: Path, **start) -> list[dict]:
    """The lines of a log, counted from an earlier start."""
    lines = read_jsonl(path, unfinished=True)
    with as_user_error(path, "not the log of a run"):
        return [line | {key: line[key] + start[key] for key in start if line.get(key) is not None} for line in lines]


def _splits(run: Record):
    """The data a run was trained and tested on."""
    return presets.load_splits(run.config, run.folder / "config.json")


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


def _image(figure, text: str = "") -> str:
    return visualize.image_tag(figure, text, SHARPNESS)


def _finding(runs: list[Record]) -> str:
    """Which run is the most accurate one, by its teacher if it has one."""
    figures = [run.figures.get("teacher") or run.figures.get("student") or {} for run in runs]
    best = [(100 * found["AP"], run.name) for run, found in zip(runs, figures) if _measured(found.get("AP"))]
    if not best:
        return "No accuracy on the test split yet"
    (top, name), (base, first) = max(best), best[0]
    more = f", {top - base:.1f} more than {first}" if name != first else ""
    return f"{name} reaches {top:.1f} AP on the test split{more}"


def _curves(logs: dict[str, list[dict]]) -> list[str]:
    """AP over steps and over minutes, if any was logged."""
    if not any("AP_teacher" in line or "AP_student" in line for log in logs.values() for line in log):
        return []
    by_minute = visualize.plot_curves(logs, x="minutes", title="The same over the time spent on training")
    return [_image(visualize.plot_curves(logs)), _image(by_minute)]


def _timeline(run: Record, splits) -> dict:
    """The watched unlabelled images over training: a row per image, a column per step."""
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
                said = visualize.pseudo_sentence(line, truth)
                drawn = visualize.show_pseudo_boxes(image, line, truth, splits.categories, title="")
                picture = _image(drawn, f"step {step:,}: {said}")
            cells.append((picture, f"step {step:,}", said, frame))
    known = any("pseudo_per_image" in line for line in run.log)
    return {
        "name": run.name,
        "quality": _image(visualize.plot_pseudo_quality(run.log)) if known else "",
        "steps": [f"step {step:,}" for step in steps],
        "cells": cells,
        "lost": [image_id for image_id in ids if image_id not in watched],
    }


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


def _differences(runs: list[Record], images: int) -> tuple[list[int], str]:
    """The test images with the largest difference in errors, and a sentence on how often which run errs least."""
    if len(runs) < 2:
        return [], "Two runs with weights are needed."
    wrong = np.array([[len(one["misses"]) + len(one["false_alarms"]) for one in run.errors] for run in runs])
    spread, least = wrong.max(0) - wrong.min(0), wrong == wrong.min(0)  # (images,), (runs, images)
    chosen = [int(index) for index in np.argsort(-spread, kind="stable")[:images] if spread[index] > 0]
    if not chosen:
        return [], "They make equally many errors on every image."
    alone = (least & (least.sum(0) == 1)).sum(1)
    said = ", ".join(f"{run.name} alone errs least on {count}" for run, count in zip(runs, alone))
    note = f"Chosen for their difference, so not typical. Of {wrong.shape[1]} images, {said}"
    return chosen, f"{note}; {wrong.shape[1] - alone.sum()} are ties."


def _card(index: int, splits, runs: list[Record], score: float) -> dict:
    """One test image: its truth, then each run."""
    image, truth = splits.test[index]
    objects = len(truth["boxes"])
    said = f"{objects} {'object' if objects == 1 else 'objects'}"
    drawn = visualize.show_targets([image], [truth], splits.categories, title="")
    cells = [(_image(drawn, f"truth of test image {index}: {said}"), "truth", said)]
    for run in runs:
        said = visualize.hit_sentence(run.errors[index])
        drawn = visualize.show_hits([image], [run.found[index]], [truth], splits.categories, score, title="")
        cells.append((_image(drawn, f"{run.name} on test image {index}: {said}"), run.name, said))
    return {"index": index, "cells": cells, "large": max(image.shape[-2:]) > 160}


def _last(log: list[dict], key: str):
    """The last value a log has for a key, None if it has none."""
    return next((line[key] for line in reversed(log) if line.get(key) is not None), None)


def _duration(seconds: float) -> str:
    size, unit = next(pair for pair in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * pair[0] or pair[0] == 1)
    return f"{seconds / size:.{0 if size == 1 else 1}f} {unit}"


def _measured(value) -> bool:
    """Whether a figure exists: COCO marks a class of objects that does not occur by nan or -1."""
    return value is not None and value >= 0


def _change(value, base) -> tuple[str, str]:
    """A figure in %, and how much more it is than another one."""
    if not _measured(value):
        return "–", ""
    change = f"{round(100 * (value - base), 1) + 0.0:+.1f}" if _measured(base) else ""  # + 0.0 turns -0.0 into 0.0
    return f"{100 * value:.1f}", change
