"""One page about one or several runs: who is how accurate, what they detect, how they learned it.

`write_report` reads run folders or weights files (runs.py) and fills report.html, a Jinja template
(torch brings Jinja): a single file that needs nothing else. `headline` is its first sentence. What
a run does not have is left out. A figure is either recorded (it stands in the log of the run) or
live (measured while the page was written); the foot of the page says which, and where each run
came from.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from jinja2 import Template

import semidetr_lite
from semidetr_lite import visualize
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
POOL = 200  # test images among which the largest differences are looked for
BATCH = 50  # images that a detector gets in one call
PLOT_DPI = 160  # of plots, twice what a page of 1,280 pixels shows
PAGE, NARROW = 1200, 190  # CSS pixels of a row of pictures, and of a picture of the timeline
DETECTORS = {
    "dino": "DINO",
    "deformable-detr": "Deformable DETR",
    "detr": "DETR",
    "faster-rcnn": "Faster R-CNN",
    "fcos": "FCOS",
}
SIZES = {"AP_small": "small", "AP_medium": "medium", "AP_large": "large"}
SETTINGS = {"detector": "detector", "percent": "labels", "seed": "seed"}  # columns if runs differ


def write_report(runs, out, images: int = 8, score: float = 0.3, names: dict | None = None) -> Path:
    """Write `out`/report.html about `runs` and return its path.

    `runs` are run folders or .safetensors files; the first is what the others are compared with.
    `images` test images are shown (the first ones that hold an object), and as many where the runs
    differ most; boxes that score less than `score` are not drawn and not counted there. `names`
    maps the name of a folder or file to what the page calls it. AP on the test split is the
    recorded one; without a record it is measured.
    Raises UserError for a folder that is no run, a file that cannot be read, or runs on different
    data.
    """
    path, runs = Path(out) / "report.html", read_runs(runs, names)
    with as_user_error(_paths(runs), "its config or logs cannot be shown"):
        page = _page(runs, images, score)
    write_atomic(path, page)
    return path


def headline(runs, names: dict | None = None) -> str:
    """The page's first sentence: the highest AP on the test split, and how far the first run is.

    Takes what `write_report` takes, and raises the same. A run without a recorded AP is measured.
    """
    runs = read_runs(runs, names)
    with as_user_error(_paths(runs), "its config or logs cannot be shown"):
        for run in runs:
            fill_figures(run)
        return best_sentence(runs)


def _paths(runs: list[Record]) -> str:
    return ", ".join(str(run.path) for run in runs)


@dataclass
class Seen:
    """A run with what it detects on the first test images."""

    name: str
    found: list[dict]  # detections of each image
    errors: list[dict]  # count_hits of each image


def _page(runs: list[Record], images: int, score: float) -> str:
    splits = splits_of(runs[0])
    truths = [splits.test[index][1] for index in range(min(POOL, len(splits.test)))]
    for run in runs:
        fill_figures(run, splits)
    seen = [_detect(run, splits.test, truths, score) for run in runs if run.weights and truths]
    first = [index for index, truth in enumerate(truths) if seen and len(truth["boxes"])][:images]
    different, compared = _differences(seen, images)
    different = different if len(truths) > images else []  # all of them are shown already
    pictures: dict = {}  # every image of the page, by its key
    names = _Names(runs[0].data.get("data") == "digits")
    cards = {index: _card(index, splits, seen, names, pictures) for index in {*first, *different}}
    timelines = []
    for run in [run for run in runs if run.pseudo_lines]:
        own = splits if run is runs[0] else splits_of(run)
        timelines.append(_timeline(run, own, names, pictures))
    page = resources.files("semidetr_lite").joinpath("report.html").read_text(encoding="utf-8")
    return Template(page, autoescape=True, trim_blocks=True, lstrip_blocks=True).render(
        runs=runs,
        headline=best_sentence(runs),
        sentence=_sentence(runs, splits),
        with_semi_detr=any(run.method == "semi-detr" for run in runs),
        columns=_columns(runs),
        rows=[_row(run, which, runs) for run in runs for which in _order(run)],
        test_images=len(splits.test),
        plots=_plots(runs),
        losses={run.name: _plot(visualize.plot_losses(run.log)) for run in runs if run.log},
        totals=[f"{one.name} {visualize.hit_sentence(*one.errors)}" for one in seen],
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

    who = listed([as_training(run, runs) for run in runs])
    detector = DETECTORS.get(common("detector"), common("detector"))
    data = runs[0].data.get("data") or runs[0].config.get("preset") or "unnamed data"
    where = "handwritten digits in photographs" if data == "digits" else Path(str(data)).name
    said = f"{'Compared: ' if len(runs) > 1 else 'Shown: '}{who}, "
    said += f"with the detector {detector} on {where}" if detector else f"on {where}"
    percent, unlabelled = common("percent"), f"{len(splits.unlabelled):,} without labels"
    if isinstance(percent, int | float):
        said += f" with {percent:g} % of the labels ({len(splits.labelled):,} images"
        if any(run.method not in ("", "supervised") for run in runs):
            said += f"; semi-supervised training also sees {unlabelled}"
        said += ")"
    before = {last(run.burn_in, "step") for run in runs}
    if len(before) == 1 and None not in before:
        start = f"{before.pop():,} steps of {runs[0].burn_in_name}"
        said += f", all after the same {start}" if len(runs) > 1 else f", after {start}"
    return said + "."


# ---- the table -------------------------------------------------------------------------------


def _columns(runs: list[Record]) -> list[tuple[str, str]]:
    """(key, title) of the columns that hold a value; sizes and settings only where they differ."""
    found = [figure for run in runs for part in run.figures.values() for figure in part.items()]
    known = {key for key, value in found if is_measured(value)}
    columns = [(key, key) for key in ("AP", "AP50", "AP75") if key in known]
    sizes = [(key, title) for key, title in SIZES.items() if key in known]
    columns += sizes if len(sizes) > 1 else []  # the one size of all objects has the AP of all
    for key, title in SETTINGS.items():
        values = [run.config.get(key) for run in runs]
        if len({str(value) for value in values if value is not None}) > 1:
            columns.append((key, title))
    for key, title in (("step", "steps"), ("seconds", "time")):
        if any(last(run.log, key) is not None for run in runs):
            columns.append((key, title))
    return columns


def _order(run: Record) -> list[str]:
    """Whose figures a run has, those of the main row first."""
    return [which for which in ("teacher", "student") if run.figures.get(which)]


def _row(run: Record, which: str, runs: list[Record]) -> dict:
    """A line of the table; "cells" are [(text, difference to the same cell of the first run)]."""
    main = which == _order(run)[0]
    base = runs[0].main if main else runs[0].figures.get(which, {})
    base = {} if run is runs[0] else base
    found, cells = run.figures[which], []
    for key, _ in _columns(runs):
        if key.startswith("AP"):
            cells.append(_change(found.get(key), base.get(key)))
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
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _change(value, base) -> tuple[str, str]:
    """A figure in %, and how much more it is than another one."""
    if not is_measured(value):
        return "–", ""
    if not is_measured(base):
        return f"{100 * value:.1f}", ""
    change = round(100 * (value - base), 1) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{100 * value:.1f}", f"{change:+.1f}"


# ---- plots -----------------------------------------------------------------------------------


def _plot(figure, text: str = "") -> str:
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
    names = getattr(dataset, "names", None)
    return Path(names[index]).name if names else None


def _detect(run: Record, test, truths: list[dict], score: float) -> Seen:
    """What a run's teacher (or student, if alone) detects on the first test images."""
    detector = semidetr_lite.load_detector(run.path, weights=run.weights[0])
    found: list[dict] = []
    for start in range(0, len(truths), BATCH):
        batch = range(start, min(start + BATCH, len(truths)))
        found += detector.detect([test[index][0] for index in batch], score=0.0)
    errors = [visualize.count_hits(*pair, score) for pair in zip(found, truths)]
    return Seen(run.name, found, errors)


def _differences(seen: list[Seen], images: int) -> tuple[list[int], str]:
    """The test images whose numbers of errors differ most; and who errs least how often."""
    if len(seen) < 2:
        return [], ""
    counts = [[len(one["misses"]) + len(one["false_alarms"]) for one in run.errors] for run in seen]
    wrong = np.array(counts)  # (runs, images)
    spread, least = wrong.max(0) - wrong.min(0), wrong == wrong.min(0)
    ranked = np.argsort(-spread, kind="stable")[:images]
    chosen = [int(index) for index in ranked if spread[index] > 0]
    alone = (least & (least.sum(0) == 1)).sum(1)
    said = "; ".join(f"{run.name} alone on {count}" for run, count in zip(seen, alone))
    total = wrong.shape[1]
    note = f"Chosen for their difference, so not typical. Fewest errors on {total} images: {said}"
    return chosen, f"{note}; equal on {total - alone.sum()}."


def _card(index: int, splits: Splits, seen: list[Seen], names: _Names, pictures: dict) -> dict:
    """One test image: its truth, then each run."""
    image, truth = splits.test[index]
    key, size, width = f"test-{index}", image.shape[-2:], PAGE // (len(seen) + 1)
    name = names.of(splits.test, index, index, "test")
    pictures[key] = image
    objects = len(truth["boxes"])
    said = f"{objects} {'object' if objects == 1 else 'objects'}"
    rows = _box_rows(truth, range(objects), "truth", splits.categories)
    cells = [(svg.picture(key, size, rows, f"truth of {name}: {said}", width), "truth", said, 0)]
    for run in seen:
        errors, found = run.errors[index], run.found[index]
        said = visualize.hit_sentence(errors)
        rows = _box_rows(truth, errors["misses"].tolist(), "missed", splits.categories)
        for style, which in (("false_alarm", "false_alarms"), ("hit", "hits")):
            rows += _box_rows(found, errors[which].tolist(), style, splits.categories)
        drawn = svg.picture(key, size, rows, f"{run.name} on {name}: {said}", width)
        cells.append((drawn, run.name, said, 0))
    return {"name": name, "cells": cells}


def _box_rows(target: dict, places, style: str, categories) -> list[tuple]:
    """Some boxes of a target as rows of a picture: (style, box, "class .score")."""
    rows = []
    for place in places:
        score = float(target["scores"][place]) if "scores" in target else None
        text = visualize.label_text(int(target["labels"][place]), categories, score)
        rows.append((style, [float(side) for side in target["boxes"][place]], text))
    return rows


def _timeline(run: Record, splits: Splits, names: _Names, pictures: dict) -> dict:
    """The watched unlabelled images over training: a row per image, a column per step."""
    steps = sorted({line["step"] for line in run.pseudo_lines})
    places = np.linspace(0, len(steps) - 1, FRAMES).round().astype(int)
    steps = [steps[place] for place in np.unique(places)]
    lines = {(line["image_id"], line["step"]): line for line in run.pseudo_lines}
    ids = list(dict.fromkeys(line["image_id"] for line in run.pseudo_lines))
    watched, cells, styles, more = _watched(splits.unlabelled, ids, names), [], set(), False
    for image_id in [image_id for image_id in ids if image_id in watched]:
        name, image, truth = watched[image_id]
        key = f"unlabelled-{image_id}"
        pictures[key] = image
        for frame, step in enumerate(steps, 1):
            line, drawn, said = lines.get((image_id, step)), "", "not recorded"
            if line is not None:
                said = visualize.pseudo_sentence(line, truth)
                rows, hidden = _pseudo_rows(line, truth, splits.categories)
                alt = f"{name}, step {step:,}: {said}"
                drawn = svg.picture(key, image.shape[-2:], rows, alt, NARROW, hidden)
                styles, more = styles | {row[0] for row in rows}, more or bool(hidden)
            cells.append((drawn, f"{name}, step {step:,}", said, frame))
    known = any("pseudo_per_image" in line for line in run.log)
    return {
        "name": run.name,
        "quality": _plot(visualize.plot_pseudo_quality(run.log)) if known else "",
        "steps": [f"step {step:,}" for step in steps],
        "cells": cells,
        "styles": [style for style in visualize.STYLES if style in styles],
        "more": more,  # whether boxes are hidden at first
        "lost": [image_id for image_id in ids if image_id not in watched],
    }


def _pseudo_rows(line: dict, truth: dict | None, categories) -> tuple[list[tuple], set[int]]:
    """A line of pseudo_boxes.jsonl as rows over the truth; and the places of those first hidden."""
    styles = visualize.pseudo_styles(line, truth)
    true_boxes = truth["boxes"] if truth is not None else []
    rows = [("truth", [float(side) for side in box], "") for box in true_boxes]
    hidden = {len(rows) + place for place in visualize.hidden_dropped(line["scores"], styles)}
    for place, style in enumerate(styles):
        [(_, box, text)] = _box_rows(line, [place], style, categories)
        rows.append((style, box, "" if style == "dropped" else text))
    return rows, hidden


def _watched(unlabelled, ids: list, names: _Names) -> dict:
    """{image id: (name, image, truth or None)} of some unlabelled images."""
    found: dict = {}
    for index in range(len(unlabelled)):
        if len(found) == len(ids):  # all of them
            break
        image, target = unlabelled[index]
        if target.get("image_id") in ids:
            name = names.of(unlabelled, index, target["image_id"], "unlabelled")
            found[target["image_id"]] = (name, image, target.get("truth"))
    return found
