"""One page about one or several runs: how accurate they are, what they detect, how they learned.

`write_report` reads run folders or weights files (runs.py) and fills report.html, a Jinja template
(torch brings Jinja): a single file that needs nothing else. `headline` is its first sentence. What
a run does not have is left out. A figure is either recorded (it stands in the log of the run) or
live (measured while the page was written); the foot of the page says which, and where each run
came from.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from jinja2 import Template

import semidetr_lite
from semidetr_lite import visualize
from semidetr_lite.contracts import Target, TargetLike
from semidetr_lite.data.images import ImageFolder
from semidetr_lite.data.splits import Concat, Splits, Subset
from semidetr_lite.errors import as_user_error
from semidetr_lite.files import write_atomic
from semidetr_lite.runs import (
    Record,
    as_training,
    best_sentence,
    fill_figures,
    is_measured,
    last,
    listed,
    read_runs,
    splits_of,
)
from semidetr_lite.visualize import svg

FRAMES = 6  # steps of the pseudo-box timeline
POOL = 200  # test images that the detectors run on
BATCH_SIZE = 50  # images per call of a detector
PLOT_DPI = 160  # of plots, twice what a page of 1,280 pixels shows
ROW_WIDTH, TIMELINE_WIDTH = 1200, 190  # CSS pixels of a row of pictures, and of a small one
DETECTORS = {
    "dino": "DINO",
    "deformable-detr": "Deformable DETR",
    "detr": "DETR",
    "faster-rcnn": "Faster R-CNN",
    "fcos": "FCOS",
}
SIZES = {"AP_small": "small", "AP_medium": "medium", "AP_large": "large"}
SETTINGS = {"detector": "detector", "percent": "labels", "seed": "seed"}  # columns if runs differ


def write_report(
    runs: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    images: int = 8,
    score: float = 0.3,
    names: dict[str, str] | None = None,
) -> Path:
    """Write `out`/report.html about runs and return its path.

    AP on the test split is the recorded one; without a record it is measured.

    Args:
        runs: run folders or .safetensors files; the others are compared with the first.
        out: a folder, made if it is not there.
        images: test images to show: the first ones with an object, and as many where the runs
            differ most.
        score: boxes that score less are neither drawn nor counted in these images.
        names: {name of a folder or file: what the page calls it}.

    Raises:
        UserError: a folder that is no run, a file that cannot be read, or runs on different data.
    """
    path = Path(out) / "report.html"
    records = read_runs(runs, names)
    with as_user_error(_paths(records), "its config or logs cannot be shown"):
        page = _render(records, images, score)
    write_atomic(path, page)
    return path


def headline(runs: Sequence[str | os.PathLike], names: dict[str, str] | None = None) -> str:
    """The page's first sentence: the highest AP on the test split, compared with the first run's.

    It takes what `write_report` takes, and raises the same. A run without a recorded AP is
    measured.
    """
    records = read_runs(runs, names)
    with as_user_error(_paths(records), "its config or logs cannot be shown"):
        for record in records:
            fill_figures(record)
        return best_sentence(records)


def _paths(runs: list[Record]) -> str:
    return ", ".join(str(run.path) for run in runs)


@dataclass
class DetectedRun:
    """A run with its detections on the first test images."""

    name: str
    detections: list[Target]  # of each image
    errors: list[dict]  # count_hits of each image


def _render(runs: list[Record], images: int, score: float) -> str:
    splits = splits_of(runs[0])
    truths = [splits.test[index][1] for index in range(min(POOL, len(splits.test)))]
    for run in runs:
        fill_figures(run, splits)
    detected = [_detect(run, splits.test, truths, score) for run in runs if run.weights and truths]
    with_object = [index for index, truth in enumerate(truths) if len(truth["boxes"])]
    first = with_object[:images] if detected else []
    different, compared = _differences(detected, images)
    different = different if len(truths) > images else []  # all of them are shown already
    pictures: dict = {}  # every image of the page, by its key
    names = _Names(runs[0].data.get("data") == "digits")
    cards = {
        index: _card(index, splits, detected, names, pictures) for index in {*first, *different}
    }
    timelines = []
    for run in [run for run in runs if run.pseudo_lines]:
        splits_of_run = splits if run is runs[0] else splits_of(run)
        timelines.append(_timeline(run, splits_of_run, names, pictures))
    page = resources.files("semidetr_lite").joinpath("report.html").read_text(encoding="utf-8")
    return Template(page, autoescape=True, trim_blocks=True, lstrip_blocks=True).render(
        runs=runs,
        headline=best_sentence(runs),
        sentence=_sentence(runs, splits),
        with_semi_detr=any(run.method == "semi-detr" for run in runs),
        columns=_columns(runs),
        rows=[_row(run, network, runs) for run in runs for network in _order(run)],
        test_images=len(splits.test),
        plots=_plots(runs),
        losses={run.name: _plot(visualize.plot_losses(run.log)) for run in runs if run.log},
        totals=[f"{run.name} {visualize.hit_sentence(*run.errors)}" for run in detected],
        score=score,
        looked_at=len(truths),
        first=[cards[index] for index in first],
        different=[cards[index] for index in different],
        compared=compared,
        timelines=timelines,
        best_dropped=visualize.BEST_DROPPED,
        css=svg.css(),
        definitions=svg.definitions(pictures),
        swatch=svg.swatch,
        style_names=visualize.STYLE_NAMES,
    )


def _sentence(runs: list[Record], splits: Splits) -> str:
    """What was compared: the runs, the detector, the data with its labels, the common start."""

    def common(key: str):
        values = [run.config.get(key) for run in runs]
        return values[0] if all(value == values[0] for value in values) else None

    compared = listed([as_training(run, runs) for run in runs])
    detector = DETECTORS.get(common("detector"), common("detector"))
    data = runs[0].data.get("data") or runs[0].config.get("preset") or "unnamed data"
    where = "handwritten digits in photographs" if data == "digits" else Path(str(data)).name
    sentence = f"{'Compared: ' if len(runs) > 1 else 'Shown: '}{compared}, "
    sentence += f"with the detector {detector} on {where}" if detector else f"on {where}"
    percent, unlabelled = common("percent"), f"{len(splits.unlabelled):,} without labels"
    if isinstance(percent, int | float):
        sentence += f" with {percent:g} % of the labels ({len(splits.labelled):,} images"
        if any(run.method not in ("", "supervised") for run in runs):
            sentence += f"; semi-supervised training also sees {unlabelled}"
        sentence += ")"
    burn_in_steps = {last(run.burn_in, "step") for run in runs}
    if len(burn_in_steps) == 1 and None not in burn_in_steps:
        start = f"{burn_in_steps.pop():,} steps of {runs[0].burn_in_name}"
        sentence += f", all after the same {start}" if len(runs) > 1 else f", after {start}"
    return sentence + "."


# ---- the table -------------------------------------------------------------------------------


def _columns(runs: list[Record]) -> list[tuple[str, str]]:
    """(key, title) of the columns that hold a value; sizes and settings only where they differ."""
    measured = set()
    for run in runs:
        for figures in run.figures.values():
            measured |= {key for key, value in figures.items() if is_measured(value)}
    columns = [(key, key) for key in ("AP", "AP50", "AP75") if key in measured]
    sizes = [(key, title) for key, title in SIZES.items() if key in measured]
    columns += sizes if len(sizes) > 1 else []  # a single size has the AP of all objects
    for key, title in SETTINGS.items():
        values = [run.config.get(key) for run in runs]
        if len({str(value) for value in values if value is not None}) > 1:
            columns.append((key, title))
    for key, title in (("step", "steps"), ("seconds", "time")):
        if any(last(run.log, key) is not None for run in runs):
            columns.append((key, title))
    return columns


def _order(run: Record) -> list[str]:
    """The networks of a run that have figures, that of the main row first."""
    return [network for network in ("teacher", "student") if run.figures.get(network)]


def _row(run: Record, network: str, runs: list[Record]) -> dict:
    """A line of the table; "cells" are [(text, difference to the same cell of the first run)]."""
    main = network == _order(run)[0]
    base = runs[0].main if main else runs[0].figures.get(network, {})
    base = {} if run is runs[0] else base
    figures, cells = run.figures[network], []
    for key, _ in _columns(runs):
        if key.startswith("AP"):
            cells.append(_change(figures.get(key), base.get(key)))
        else:
            cells.append((_setting(run, key), ""))
    top = max((other.ap for other in runs if other.ap is not None), default=None)
    best = main and len(runs) > 1 and run.ap is not None and f"{run.ap:.1f}" == f"{top:.1f}"
    return {"name": run.name, "student": not main, "best": best, "cells": cells}


def _setting(run: Record, key: str) -> str:
    """A cell that is no AP."""
    value = last(run.log, key) if key in ("step", "seconds") else run.config.get(key)
    if value is None:
        return "–"
    if key == "seconds":
        return _duration(value)
    if key == "percent" and isinstance(value, int | float):
        return f"{value:g} %"
    if key == "detector":
        return DETECTORS.get(value, str(value))
    return f"{value:,}" if key == "step" else str(value)


def _duration(seconds: float) -> str:
    """Seconds as hours, minutes or seconds, of which there are at least two."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _change(value: float | None, base: float | None) -> tuple[str, str]:
    """A figure in %, and its difference to the figure `base`; "–" and "" where there is none."""
    if not is_measured(value):
        return "–", ""
    if not is_measured(base):
        return f"{100 * value:.1f}", ""
    change = round(100 * (value - base), 1) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{100 * value:.1f}", f"{change:+.1f}"


# ---- plots -----------------------------------------------------------------------------------


def _plot(figure: visualize.Picture, text: str = "") -> str:
    """A figure as an image tag, sharp enough for the page."""
    return visualize.image_tag(figure, text, PLOT_DPI)


def _plots(runs: list[Record]) -> list[str]:
    """AP over steps and over minutes, if any was logged; the common burn-in first."""
    logs = {run.name: run.log for run in runs if run.log}
    if not any(line.get("AP_teacher") is not None for log in logs.values() for line in log):
        return []
    burn_ins = {run.name: (run.burn_in_name, run.burn_in) for run in runs}
    by_step = "AP during training, on the tune split"
    by_minute = "The same over the time of training"
    return [
        _plot(visualize.plot_curves(logs, "step", by_step, burn_ins)),
        _plot(visualize.plot_curves(logs, "minutes", by_minute, burn_ins)),
    ]


# ---- pictures --------------------------------------------------------------------------------


@dataclass
class _Names:
    """What images are called: by their files, else by numbers."""

    digits: bool  # the embedded scenes have no files

    def of(self, dataset, index: int, number: int, split: str) -> str:
        kind = "scene" if self.digits else "image"
        return image_name(dataset, index) or f"{split} {kind} {number}"


def image_name(dataset, index: int) -> str | None:
    """The file name of an image of a data set; None where images have no files."""
    if isinstance(dataset, Subset):
        return image_name(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, Concat):
        for part in dataset.datasets:
            if index < len(part):
                return image_name(part, index)
            index -= len(part)
    if isinstance(dataset, ImageFolder):
        return Path(dataset.paths[index]).name
    file_names = getattr(dataset, "names", None)
    return Path(file_names[index]).name if file_names else None


def _detect(run: Record, test, truths: list[Target], score: float) -> DetectedRun:
    """The detections of a run's teacher (or of its student, if alone) on the first test images."""
    detector = semidetr_lite.load_detector(run.path, weights=run.weights[0])
    detections: list[Target] = []
    for start in range(0, len(truths), BATCH_SIZE):
        batch = range(start, min(start + BATCH_SIZE, len(truths)))
        detections += detector.detect([test[index][0] for index in batch], score=0.0)
    errors = [visualize.count_hits(*pair, score) for pair in zip(detections, truths)]
    return DetectedRun(run.name, detections, errors)


def _differences(runs: list[DetectedRun], images: int) -> tuple[list[int], str]:
    """The test images whose numbers of errors differ most, and how often a run has the fewest."""
    if len(runs) < 2:
        return [], ""
    wrong = np.array(
        [
            [len(errors["misses"]) + len(errors["false_alarms"]) for errors in run.errors]
            for run in runs
        ]
    )  # (runs, images)
    spread = wrong.max(0) - wrong.min(0)
    ranked = np.argsort(-spread, kind="stable")[:images]
    different = [int(index) for index in ranked if spread[index] > 0]
    fewest = wrong == wrong.min(0)
    alone = (fewest & (fewest.sum(0) == 1)).sum(1)
    counts = "; ".join(f"{run.name} alone on {count}" for run, count in zip(runs, alone))
    total = wrong.shape[1]
    note = f"Chosen for their difference, so not typical. Fewest errors on {total} images: {counts}"
    return different, f"{note}; equal on {total - alone.sum()}."


def _card(
    index: int, splits: Splits, runs: list[DetectedRun], names: _Names, pictures: dict
) -> dict:
    """One test image: its truth, then each run. The image is added to `pictures`."""
    image, truth = splits.test[index]
    key = f"test-{index}"
    pictures[key] = image
    size, width = image.shape[-2:], ROW_WIDTH // (len(runs) + 1)
    name = names.of(splits.test, index, index, "test")
    objects = len(truth["boxes"])
    caption = f"{objects} {'object' if objects == 1 else 'objects'}"
    rows = _box_rows(truth, range(objects), "truth", splits.categories)
    drawing = svg.picture(key, size, rows, f"truth of {name}: {caption}", width)
    cells = [(drawing, "truth", caption, 0)]
    for run in runs:
        errors, detection = run.errors[index], run.detections[index]
        rows = _box_rows(truth, errors["misses"].tolist(), "missed", splits.categories)
        for style, kind in (("false_alarm", "false_alarms"), ("hit", "hits")):
            rows += _box_rows(detection, errors[kind].tolist(), style, splits.categories)
        caption = visualize.hit_sentence(errors)
        drawing = svg.picture(key, size, rows, f"{run.name} on {name}: {caption}", width)
        cells.append((drawing, run.name, caption, 0))
    return {"name": name, "cells": cells}


def _box_rows(
    target: TargetLike, indices: Iterable[int], style: str, categories: list[dict]
) -> list[tuple]:
    """Some boxes of a target as rows of a picture: (style, box, "class .score")."""
    rows = []
    for index in indices:
        score = float(target["scores"][index]) if "scores" in target else None
        text = visualize.label_text(int(target["labels"][index]), categories, score)
        rows.append((style, [float(side) for side in target["boxes"][index]], text))
    return rows


def _timeline(run: Record, splits: Splits, names: _Names, pictures: dict) -> dict:
    """The watched unlabelled images over training: one row per image, one column per step."""
    steps = sorted({line["step"] for line in run.pseudo_lines})
    frames = np.linspace(0, len(steps) - 1, FRAMES).round().astype(int)
    steps = [steps[index] for index in np.unique(frames)]
    lines = {(line["image_id"], line["step"]): line for line in run.pseudo_lines}
    ids = list(dict.fromkeys(line["image_id"] for line in run.pseudo_lines))
    watched = _watched(splits.unlabelled, ids, names)
    cells = []
    styles: set[str] = set()
    any_hidden = False
    for image_id in [image_id for image_id in ids if image_id in watched]:
        name, image, truth = watched[image_id]
        key = f"unlabelled-{image_id}"
        pictures[key] = image
        for frame, step in enumerate(steps, 1):
            line = lines.get((image_id, step))
            drawing, caption = "", "not recorded"
            if line is not None:
                caption = visualize.pseudo_sentence(line, truth)
                rows, hidden = _pseudo_rows(line, truth, splits.categories)
                alt = f"{name}, step {step:,}: {caption}"
                size = image.shape[-2:]
                drawing = svg.picture(key, size, rows, alt, TIMELINE_WIDTH, hidden)
                styles |= {style for style, _, _ in rows}
                any_hidden |= bool(hidden)
            cells.append((drawing, f"{name}, step {step:,}", caption, frame))
    has_quality = any("pseudo_per_image" in line for line in run.log)
    return {
        "name": run.name,
        "quality": _plot(visualize.plot_pseudo_quality(run.log)) if has_quality else "",
        "steps": [f"step {step:,}" for step in steps],
        "cells": cells,
        "styles": [style for style in visualize.STYLES if style in styles],
        "more": any_hidden,  # whether boxes are hidden at first
        "lost": [image_id for image_id in ids if image_id not in watched],
    }


def _pseudo_rows(
    line: dict, truth: Target | None, categories: list[dict]
) -> tuple[list[tuple], set[int]]:
    """A line of pseudo_boxes.jsonl as rows over the truth; and the indices of rows first hidden."""
    styles = visualize.pseudo_styles(line, truth)
    true_boxes = truth["boxes"].tolist() if truth is not None else []
    rows = [("truth", box, "") for box in true_boxes]
    hidden_boxes = visualize.hidden_dropped(line["scores"], styles)
    hidden_rows = {len(rows) + index for index in hidden_boxes}
    for index, style in enumerate(styles):
        [(_, box, text)] = _box_rows(line, [index], style, categories)
        rows.append((style, box, "" if style == "dropped" else text))
    return rows, hidden_rows


def _watched(unlabelled, ids: list, names: _Names) -> dict:
    """{image id: (name, image, truth or None)} of some unlabelled images."""
    images: dict = {}
    for index in range(len(unlabelled)):
        if len(images) == len(ids):  # all of them
            break
        image, target = unlabelled[index]
        image_id = target.get("image_id")
        if image_id in ids:
            name = names.of(unlabelled, index, image_id, "unlabelled")
            images[image_id] = (name, image, target.get("truth"))
    return images
