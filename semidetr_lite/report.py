"""One page about one or several runs: who is how accurate, what they detect, how they learned it.

`write_report` reads run folders (config.json, log.jsonl, pseudo_boxes.jsonl, weights) or weights files and fills
report.html, a Jinja template (torch brings Jinja): a single file that needs nothing else. `headline` is its first
sentence. What a run does not have is left out. A figure is either recorded (it stands in the log of the run) or live
(measured while the page was written); the foot of the page says which, and where each run came from.
"""

import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
from jinja2 import Template

import semidetr_lite
from semidetr_lite import svg, visualize
from semidetr_lite.data import digits
from semidetr_lite.data.images import ImageFolder
from semidetr_lite.data.splits import Joined, Splits, Subset
from semidetr_lite.errors import UserError, reading
from semidetr_lite.training import presets
from semidetr_lite.training.checkpoint import read_config, read_lines, write_whole
from semidetr_lite.training.measure import measure

FRAMES = 6  # steps of the pseudo-box timeline
POOL = 200  # test images among which the largest differences are looked for
BATCH = 50  # images that a detector gets in one call
PLOT_DPI = 160  # of plots, twice what a page of 1,280 pixels shows
PAGE, NARROW = 1200, 190  # CSS pixels of a row of pictures, and of a picture of the timeline
SAME_TIME = 2  # supervised steps that take no longer than one semi-supervised step
METHODS = {
    "supervised": "supervised",
    "mean-teacher": "mean teacher",
    "semi-detr": "Semi-DETR",
    "soft-teacher": "Soft Teacher",
    "dense-teacher": "Dense Teacher",
}
DETECTORS = {
    "dino": "DINO",
    "deformable-detr": "Deformable DETR",
    "detr": "DETR",
    "faster-rcnn": "Faster R-CNN",
    "fcos": "FCOS",
}
DIGITS = {"data": "digits", "percent": 10, "fold": 1, "recipe": {}}  # to load the embedded data
DATA_KEYS = ("data", "validation", "categories")  # in which the runs of a page agree
SIZES = {"AP_small": "small", "AP_medium": "medium", "AP_large": "large"}
DIFFERENT = {"detector": "detector", "percent": "labels", "seed": "seed"}  # columns where runs differ


@dataclass
class Record:
    """What a run folder or a weights file holds, as read from disk, and what was measured on it.

    Steps and seconds of `log` and `pseudo_lines` count the burn-in.
    """

    path: Path  # the run folder, or the weights file
    config: dict
    log: list[dict]
    pseudo_lines: list[dict]
    weights: list[str]  # of "teacher" and "student", those whose file exists
    burn_in: list[dict] = field(default_factory=list)  # the log of the run it went on from, with those before
    burn_in_name: str = ""
    data: dict = field(default_factory=dict)  # settings of the data it is tested on
    name: str = ""
    figures: dict = field(default_factory=dict)  # {"student": COCO's on the test split, "teacher": ...}
    live: bool = False  # whether the figures were measured here, not recorded
    found: list[dict] = field(default_factory=list)  # detections on the first POOL test images
    errors: list[dict] = field(default_factory=list)  # count_hits of each

    @property
    def method(self) -> str:
        return str(self.config.get("method") or "")

    @property
    def main(self) -> dict:
        """The figures of the EMA teacher, or of the student where there is no teacher."""
        return self.figures.get("teacher") or self.figures.get("student") or {}

    @property
    def ap(self) -> float | None:
        value = self.main.get("AP")
        return 100 * value if _measured(value) else None


def write_report(runs, out, images: int = 8, score: float = 0.3, names: dict | None = None) -> Path:
    """Write `out`/report.html about `runs` and return its path.

    `runs` are run folders or .safetensors files; the first is what the others are compared with. `images` test images
    are shown (the first ones that hold an object), and as many where the runs differ most; boxes that score less than
    `score` are not drawn and not counted there. `names` maps the name of a folder or file to what the page calls it.
    AP on the test split is the recorded one; without a record it is measured.
    Raises UserError for a folder that is no run, a file that cannot be read, or runs on different data.
    """
    path, runs = Path(out) / "report.html", _read_runs(runs, names)
    with reading(", ".join(str(run.path) for run in runs), "its config or logs cannot be shown"):
        page = _page(runs, images, score)
    write_whole(path, page)
    return path


def headline(runs, names: dict | None = None) -> str:
    """The first sentence of the page about `runs`: the highest AP on the test split, and how far it is from the first.

    Takes what `write_report` takes, and raises the same. A run without a recorded AP is measured.
    """
    runs = _read_runs(runs, names)
    with reading(", ".join(str(run.path) for run in runs), "its config or logs cannot be shown"):
        for run in runs:
            _fill_figures(run)
        return _headline(runs)


def _page(runs: list[Record], images: int, score: float) -> str:
    splits = _splits(runs[0])
    truths = [splits.test[index][1] for index in range(min(POOL, len(splits.test)))]
    for run in runs:
        _fill_figures(run, splits)
        _detect(run, splits.test, len(truths))
        run.errors = [visualize.count_hits(*pair, score) for pair in zip(run.found, truths)]
    seeing = [run for run in runs if run.weights] if truths else []
    first = [index for index, truth in enumerate(truths) if len(truth["boxes"])][:images] if seeing else []
    different, compared = _differences(seeing, images)
    pictures: dict = {}  # every image of the page, by its key
    cards = {index: _card(index, splits, seeing, score, pictures) for index in {*first, *different}}
    timelines = [_timeline(run, splits if run is runs[0] else _splits(run), pictures) for run in runs]
    page = resources.files("semidetr_lite").joinpath("report.html").read_text(encoding="utf-8")
    return Template(page, autoescape=True, trim_blocks=True, lstrip_blocks=True).render(
        runs=runs,
        headline=_headline(runs),
        sentence=_sentence(runs, splits),
        with_semi_detr=any(run.method == "semi-detr" for run in runs),
        columns=_columns(runs),
        rows=[_row(run, which, runs) for run in runs for which in _order(run)],
        base=runs[0].name,
        test_images=len(splits.test),
        plots=_plots(runs),
        losses={run.name: _plot(visualize.plot_losses(run.log)) for run in runs if run.log},
        seeing=seeing,
        totals=[f"{run.name} {visualize.hit_sentence(*run.errors)}" for run in seeing],
        score=score,
        looked_at=len(truths),
        first=[cards[index] for index in first],
        different=[cards[index] for index in different],
        compared=compared,
        timelines=[timeline for timeline in timelines if timeline],
        best_dropped=visualize.BEST_DROPPED,
        css=svg.css(),
        definitions=svg.definitions(pictures),
        swatch=svg.swatch,
        style_names=visualize.NAMES,
    )


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_run(path) -> Record:
    """The run in a folder, or a weights file. Raises UserError where there is none, or where a file is damaged."""
    path = Path(path)
    if path.is_file() or path.suffix == ".safetensors":
        return _read_weights(path)
    config = read_config(path)
    with reading(path / "config.json", "its burn-in cannot be followed"):
        burn_in_name, burn_in = _burn_in(path, config)
    log, pseudo_lines = (_lines(path / name, burn_in) for name in ("log.jsonl", "pseudo_boxes.jsonl"))
    weights = [which for which in ("teacher", "student") if (path / f"{which}.safetensors").is_file()]
    return Record(path, config, log, pseudo_lines, weights, burn_in, burn_in_name, data=config)


def _read_weights(path: Path) -> Record:
    """A weights file as a run without a log; a method's name in the name of the file is believed."""
    detector = semidetr_lite.load_detector(path, weights="teacher")
    kinds = {kind: name for name, kind in presets.DETECTORS.items()}
    method = path.stem.lower().replace("_", "-")
    config = {
        "method": method if method in METHODS else None,
        "detector": kinds.get(type(detector)),
        "categories": detector.categories,
    }
    return Record(path, config, [], [], ["teacher"])


def _read_runs(paths, names: dict | None) -> list[Record]:
    """The runs, checked to be on the same data, with their names."""
    runs = [read_run(path) for path in paths]
    if not runs:
        raise UserError("no run to report on: give at least one run folder")
    places = [run.path.resolve() for run in runs]
    folders = [run for run in runs if run.data]
    for position, run in enumerate(runs):
        if places[position] in places[:position]:
            raise UserError(f"{run.path}: given twice; give every run once")
        first = folders[0] if folders else runs[0]
        for key in DATA_KEYS if run.data else ("categories",):
            if run.config.get(key) != first.config.get(key):
                both, where = f"{run.path} and {first.path}", "of config.json" if run.data else "of the weights"
                raise UserError(f'{both} differ in "{key}" {where}; compare runs on the same data')
        if not run.data and not folders and run.config["categories"] != digits.CATEGORIES:
            fault = "a weights file does not say on which images to measure it"
            raise UserError(f"{run.path}: {fault}; give a run folder trained on the same data with it")
        run.data = run.data or (folders[0].data if folders else DIGITS)
    _name_runs(runs, names or {})
    return runs


def _name_runs(runs: list[Record], names: dict) -> None:
    """Names as given, else by method; with the folder's name where two are equal, or with what paths do not share."""
    paths = [run.path.resolve().parts for run in runs]
    alike = len({path[-1] for path in paths}) < len(paths)
    shared = len(os.path.commonprefix([path[:-1] for path in paths])) if alike else -1  # -1: all but the last
    for run in runs:
        place = run.path.resolve()
        given = [names[key] for key in (place.name, place.stem) if key in names]
        run.name = str(given[0]) if given else _default_name(run, runs)
    known = [run.name for run in runs]
    for run, path in zip(runs, paths):
        if known.count(run.name) > 1:
            run.name += f" ({'/'.join(path[shared:])})"


def _default_name(run: Record, runs: list[Record]) -> str:
    place = run.path.resolve()
    if place.stem in ("teacher", "student") and place.is_file():  # one of a run folder's
        return f"{place.parent.name} {place.stem}"
    name = METHODS.get(run.method, run.method or place.stem.replace("_", " "))
    return f"{name}, same time" if _same_time(run, runs) else name


def _same_time(run: Record, runs: list[Record]) -> bool:
    """Whether a supervised run trains about as long as the semi-supervised ones, from the same burn-in on.

    A semi-supervised step takes at least SAME_TIME supervised ones.
    """
    start, steps = run.config.get("burn_in"), run.config.get("steps")
    others = [other.config for other in runs if other.method not in ("", "supervised")]
    others = [other for other in others if other.get("burn_in") == start and isinstance(other.get("steps"), int)]
    if run.method != "supervised" or not (start and others) or not isinstance(steps, int):
        return False
    return all(steps >= SAME_TIME * other["steps"] for other in others)


def _burn_in(folder: Path, config: dict) -> tuple[str, list[dict]]:
    """Name and log of the run that this one went on from, with those before it; nothing if it is not on disk."""
    named = Path(config.get("burn_in") or folder)
    for place in (named, folder.parent / named.name):
        if config.get("burn_in") and (place / "config.json").is_file():
            own = read_config(place)
            _, before = _burn_in(place, own)
            method = str(own.get("method", ""))
            return f"{METHODS.get(method, method)} burn-in", before + _lines(place / "log.jsonl", before)
    return "", []


def _lines(path: Path, before: list[dict]) -> list[dict]:
    """The lines of a log, counted from the end of the log before it."""
    lines = read_lines(path, unfinished=True)
    start = {"step": _last(before, "step") or 0, "seconds": _last(before, "seconds") or 0.0}
    with reading(path, "not the log of a run"):
        return [line | {key: line[key] + start[key] for key in start if line.get(key) is not None} for line in lines]


def _splits(run: Record) -> Splits:
    """The data a run was trained and tested on."""
    return presets.load_splits(run.data, run.path / "config.json")


def _detectors(run: Record) -> dict:
    return {which: semidetr_lite.load_detector(run.path, weights=which) for which in run.weights}


def _fill_figures(run: Record, splits: Splits | None = None) -> None:
    """Fill in a run's figures on the test split, recorded or measured."""
    recorded = [line["test"] for line in run.log if line.get("test")]
    if recorded:
        run.figures = recorded[-1]
    elif run.weights:
        test = (splits or _splits(run)).test
        run.live = len(test) > 0
        if run.live:
            run.figures = {which: measure(detector, test) for which, detector in _detectors(run).items()}


def _detect(run: Record, test, count: int) -> None:
    """Fill in what a run's teacher (or student, if alone) finds on the first `count` test images."""
    if not run.weights:
        return
    detector = semidetr_lite.load_detector(run.path, weights=run.weights[0])
    for start in range(0, count, BATCH):
        batch = [test[index][0] for index in range(start, min(start + BATCH, count))]
        run.found += detector.detect(batch, score=0.0)


# ---- words -----------------------------------------------------------------------------------------------------------


def _headline(runs: list[Record]) -> str:
    """Who has the highest AP, and how much it is above the first run, or above the best of the others."""
    base, known = runs[0], [run for run in runs if run.ap is not None]
    if not known:
        return "No AP on the test split yet"
    best = max(known, key=lambda run: run.ap)
    top = f"{best.ap:.1f} AP on the test split"
    if len(known) == 1:
        return _capital(f"{_as_training(best, runs)}: {top}")
    if base.ap is not None and f"{best.ap:.1f}" == f"{base.ap:.1f}":
        others = [run for run in known if run is not base]
        rival = max(others, key=lambda run: run.ap)
        if f"{rival.ap:.1f}" == f"{base.ap:.1f}":
            return f"A tie: {rival.name} and {_as_training(base, runs)} both reach {top}"
        ahead = f"{base.ap - rival.ap:.1f} AP more than {rival.name}"
        more = ", the best of the others" if len(others) > 1 else ""
        return _capital(f"{_as_training(base, runs)} wins: {top}, {ahead}{more}")
    equal = [run.name for run in known if f"{run.ap:.1f}" == f"{best.ap:.1f}"]
    who = _capital(_listed(equal)) + (", equal" if len(equal) > 1 else "")
    if base.ap is None:
        return f"{who}: {top} ({_as_training(base, runs)} has none yet)"
    return f"{who}: {top}, +{best.ap - base.ap:.1f} AP over {_as_training(base, runs)}"


def _as_training(run: Record, runs: list[Record]) -> str:
    """A run in a sentence: "supervised training of the same time" rather than the name of a row."""
    if run.name != _default_name(run, runs) or run.method != "supervised" or run.path.is_file():
        return run.name
    return "supervised training" + " of the same time" * _same_time(run, runs)


def _sentence(runs: list[Record], splits: Splits) -> str:
    """What was compared: the runs, the detector, the data with its labels, the common start."""

    def common(key: str):
        values = [run.config.get(key) for run in runs]
        return values[0] if all(value == values[0] for value in values) else None

    who = _listed([_as_training(run, runs) for run in runs])
    detector = DETECTORS.get(common("detector"), common("detector"))
    how = f"with the detector {detector} " if detector else ""
    data = runs[0].data.get("data") or runs[0].config.get("preset") or "unnamed data"
    where = "handwritten digits in photographs" if data == "digits" else Path(str(data)).name
    said = f"{'Compared: ' if len(runs) > 1 else 'Shown: '}{who}, {how}on {where}"
    percent = common("percent")
    if isinstance(percent, int | float):
        said += f" with {percent:g} % of the labels ({len(splits.labelled):,} images"
        if any(run.method not in ("", "supervised") for run in runs):
            said += f"; semi-supervised training also sees {len(splits.unlabelled):,} without labels"
        said += ")"
    before = {_last(run.burn_in, "step") for run in runs}
    if len(before) == 1 and None not in before:
        start = f"{before.pop():,} steps of {runs[0].burn_in_name}"
        said += f", all after the same {start}" if len(runs) > 1 else f", after {start}"
    return said + "."


def _listed(words: list[str]) -> str:
    """Words as a list in a sentence; those that hold a comma stand in brackets where it would mislead."""
    words = [f"{word.replace(', ', ' (', 1)})" if ", " in word and "(" not in word else word for word in words]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


# ---- the table -------------------------------------------------------------------------------------------------------


def _columns(runs: list[Record]) -> list[tuple[str, str]]:
    """(key, title) of the columns in which a cell is filled; sizes and settings only where they tell anything apart."""
    known = {key for run in runs for found in run.figures.values() for key, value in found.items() if _measured(value)}
    sizes = {key: title for key, title in SIZES.items() if key in known}
    columns = [(key, key) for key in ("AP", "AP50", "AP75") if key in known]
    columns += list(sizes.items()) if len(sizes) > 1 else []
    for key, title in DIFFERENT.items():
        if len({str(run.config.get(key)) for run in runs}) > 1:
            columns.append((key, title))
    return columns + [(key, title) for key, title in (("step", "steps"), ("seconds", "time")) if _logged(runs, key)]


def _logged(runs: list[Record], key: str) -> bool:
    return any(_last(run.log, key) is not None for run in runs)


def _order(run: Record) -> list[str]:
    """Whose figures a run has, those of the main row first."""
    return [which for which in ("teacher", "student") if run.figures.get(which)]


def _row(run: Record, which: str, runs: list[Record]) -> dict:
    """A line of the table: {"name", "student": bool, "best": bool, "cells": [(text, difference to the first run)]}."""
    main = which == _order(run)[0]
    base = {} if run is runs[0] else runs[0].main if main else runs[0].figures.get(which, {})
    found, cells = run.figures[which], []
    for key, _ in _columns(runs):
        if key.startswith("AP"):
            cells.append(_change(found.get(key), base.get(key)))
        else:
            cells.append((_setting(run, key), ""))
    top = max((other.ap for other in runs if other.ap is not None), default=None)
    best = main and len(runs) > 1 and run.ap is not None and run.ap == top
    return {"name": run.name, "student": not main, "best": best, "cells": cells}


def _setting(run: Record, key: str) -> str:
    """A cell that is no AP."""
    value = _last(run.log, key) if key in ("step", "seconds") else run.config.get(key)
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


def _last(log: list[dict], key: str):
    """The last value a log has for a key, None if it has none."""
    return next((line[key] for line in reversed(log) if line.get(key) is not None), None)


# ---- pictures --------------------------------------------------------------------------------------------------------


def _plot(figure, text: str = "") -> str:
    return visualize.image_tag(figure, text, PLOT_DPI)


def _plots(runs: list[Record]) -> list[str]:
    """AP over steps and over minutes, if any was logged; the common burn-in first."""
    logs = {run.name: run.log for run in runs if run.log}
    if not any(line.get("AP_teacher") is not None for log in logs.values() for line in log):
        return []
    burn_ins = {run.name: (run.burn_in_name, run.burn_in) for run in runs}
    titles = {"step": "AP during training, on the tune split", "minutes": "The same over the time of training"}
    return [_plot(visualize.plot_curves(logs, x, title, burn_ins)) for x, title in titles.items()]


def image_name(dataset, index: int) -> str | None:
    """The file name of an image of a data set; None where images have no files."""
    if isinstance(dataset, Subset):
        return image_name(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, Joined):
        for part in dataset.datasets:
            if index < len(part):
                return image_name(part, index)
            index -= len(part)
    if isinstance(dataset, ImageFolder):
        return Path(dataset.paths[index]).name
    names = getattr(dataset, "names", None)
    return Path(names[index]).name if names else None


def _called(dataset, index: int, number: int, split: str, data: str) -> str:
    """What an image is called on the page: by its file, else by its number."""
    return image_name(dataset, index) or f"{split} {'scene' if data == 'digits' else 'image'} {number}"


def _card(index: int, splits: Splits, runs: list[Record], score: float, pictures: dict) -> dict:
    """One test image: its truth, then each run."""
    image, truth = splits.test[index]
    name, key = _called(splits.test, index, index, "test", runs[0].data.get("data", "")), f"test-{index}"
    pictures[key] = image
    objects = len(truth["boxes"])
    said = f"{objects} {'object' if objects == 1 else 'objects'}"
    size, width = image.shape[-2:], PAGE // (len(runs) + 1)
    rows = _box_rows(truth, range(objects), "truth", splits.categories)
    cells = [(svg.picture(key, size, rows, f"truth of {name}: {said}", width), "truth", said, 0)]
    for run in runs:
        errors, found = run.errors[index], run.found[index]
        said = visualize.hit_sentence(errors)
        rows = _box_rows(truth, errors["misses"].tolist(), "missed", splits.categories)
        for style, which in (("false_alarm", "false_alarms"), ("hit", "hits")):
            rows += _box_rows(found, errors[which].tolist(), style, splits.categories)
        alt = f"{run.name} on {name}: {said}"
        cells.append((svg.picture(key, size, rows, alt, width), run.name, said, 0))
    return {"name": name, "cells": cells}


def _box_rows(target: dict, places, style: str, categories) -> list[tuple]:
    """Some boxes of a target as rows of a picture: (style, box, "class .score")."""
    rows = []
    for place in places:
        score = float(target["scores"][place]) if "scores" in target else None
        text = visualize.label_text(int(target["labels"][place]), categories, score)
        rows.append((style, [float(side) for side in target["boxes"][place]], text))
    return rows


def _differences(runs: list[Record], images: int) -> tuple[list[int], str]:
    """The test images with the largest difference in errors, and a sentence on how often which run errs least."""
    if len(runs) < 2:
        return [], ""
    wrong = np.array([[len(one["misses"]) + len(one["false_alarms"]) for one in run.errors] for run in runs])
    spread, least = wrong.max(0) - wrong.min(0), wrong == wrong.min(0)  # (images,), (runs, images)
    chosen = [int(index) for index in np.argsort(-spread, kind="stable")[:images] if spread[index] > 0]
    alone = (least & (least.sum(0) == 1)).sum(1)
    said = "; ".join(f"{run.name} alone on {count}" for run, count in zip(runs, alone))
    note = f"Chosen for their difference, so not typical. Fewest errors on {wrong.shape[1]} images: {said}"
    return chosen, f"{note}; equal on {wrong.shape[1] - alone.sum()}."


def _timeline(run: Record, splits: Splits, pictures: dict) -> dict | None:
    """The watched unlabelled images over training: a row per image, a column per step."""
    steps = sorted({line["step"] for line in run.pseudo_lines})
    if not steps:
        return None
    steps = [steps[place] for place in np.unique(np.linspace(0, len(steps) - 1, FRAMES).round().astype(int))]
    by_place = {(line["image_id"], line["step"]): line for line in run.pseudo_lines}
    ids = list(dict.fromkeys(line["image_id"] for line in run.pseudo_lines))
    watched, cells, styles, more = _watched(splits.unlabelled, ids, run.data.get("data", "")), [], set(), False
    for image_id in [image_id for image_id in ids if image_id in watched]:
        name, image, truth = watched[image_id]
        pictures[f"unlabelled-{image_id}"] = image
        for frame, step in enumerate(steps, 1):
            line, drawn, said = by_place.get((image_id, step)), "", "not recorded"
            if line is not None:
                said = visualize.pseudo_sentence(line, truth)
                rows, hidden = _pseudo_rows(line, truth, splits.categories)
                alt = f"{name}, step {step:,}: {said}"
                key, size = f"unlabelled-{image_id}", image.shape[-2:]
                drawn = svg.picture(key, size, rows, alt, NARROW, hidden)
                styles, more = styles | {row[0] for row in rows}, more or bool(hidden)
            cells.append((drawn, f"{name}, step {step:,}", said, frame))
    known = any("pseudo_per_image" in line for line in run.log)
    return {
        "name": run.name,
        "quality": _plot(visualize.plot_pseudo_quality(run.log)) if known else "",
        "steps": [f"step {step:,}" for step in steps],
        "cells": cells,
        "styles": [style for style in visualize.STYLES if style in styles],
        "more": more,
        "lost": [image_id for image_id in ids if image_id not in watched],
    }


def _pseudo_rows(line: dict, truth: dict | None, categories) -> tuple[list[tuple], set[int]]:
    """A line of pseudo_boxes.jsonl as rows of a picture, over the truth; and the places of those first hidden."""
    styles = visualize.pseudo_styles(line, truth)
    hidden = visualize.drop_most(line["scores"], styles)
    rows = [("truth", [float(side) for side in box], "") for box in truth["boxes"]] if truth is not None else []
    first = len(rows)
    for place, style in enumerate(styles):
        rows += _box_rows(line, [place], style, categories)
        if style == "dropped":
            rows[-1] = (*rows[-1][:2], "")
    return rows, {first + place for place in hidden}


def _watched(unlabelled, ids: list, data: str) -> dict:
    """{image id: (name, image, its truth or None)} of some unlabelled images; it stops when it has all."""
    found: dict = {}
    for index in range(len(unlabelled)):
        if len(found) == len(ids):
            break
        image, target = unlabelled[index]
        if target.get("image_id") in ids:
            name = _called(unlabelled, index, target["image_id"], "unlabelled", data)
            found[target["image_id"]] = (name, image, target.get("truth"))
    return found
