"""What is in a data set, and everything that is wrong with it: `semidetr doctor --data ...`.

Training stops at the first problem of its data. The doctor goes through every row, decodes every
image and lists all problems, each with its file. Beside these defects it makes remarks on what can
be read and still looks wrong. Two images are duplicates when their decoded pixels are equal,
whatever their names and metadata.
"""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from semidetr_lite.data.coco import (
    CocoDataset,
    category_problems,
    find_annotations,
    mapped_by_name,
    unlabelled_images,
)
from semidetr_lite.data.formats import Annotations
from semidetr_lite.data.images import ImageFolder, images_below
from semidetr_lite.data.splits import stratified_indices
from semidetr_lite.data.suspicions import (
    all_crowd,
    more_objects_than,
    named,
    repeated_boxes,
    tiny_boxes,
)
from semidetr_lite.errors import UserError

# edges of the histograms in pixels; the last bin is open
IMAGE_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096)
BOX_EDGES = (0, 4, 8, 16, 32, 64, 128, 256, 512)
SHOWN_OF_A_KIND = 3  # defects of one kind in the list that fits a screen
SHOWN_KINDS = 6
SHOWN_CLASSES = 12


class Diagnosis(NamedTuple):
    """What the doctor found."""

    summary: dict[str, dict]  # see `doctor_data`
    problems: list[str]  # one line about each defect
    remarks: list[str]  # one line about each thing that may be wrong
    datasets: dict[str, CocoDataset | ImageFolder]  # "train", "validation", "unlabelled"

    def lines(self) -> list[str]:
        """A screen of text: the counts, the remarks and, of each kind, the first defects."""
        return _printable([
            *_counts(self.summary),
            *(f"note: {remark}" for remark in self.remarks),
            _number_of_defects(self.problems),
            *_by_kind(self.problems),
        ])  # fmt: skip

    def all_problems(self) -> str:
        """Every defect and remark, a line each."""
        rows = [*self.problems, *(f"note: {remark}" for remark in self.remarks)]
        return "".join(f"{line}\n" for line in _printable(rows))

    def sample(self, count: int = 12) -> tuple[list[torch.Tensor], list[dict], list[str]]:
        """Images, targets and file names of training images with boxes, spread over the set."""
        dataset = self.datasets.get("train")
        if not isinstance(dataset, CocoDataset):
            return [], [], []
        with_boxes = np.flatnonzero(dataset.counts())
        chosen = with_boxes[
            np.linspace(0, len(with_boxes) - 1, min(count, len(with_boxes)), dtype=int)
        ]
        samples = []
        for index in chosen.tolist():
            try:
                samples.append((*dataset[index], Path(dataset.names[index]).name))
            except UserError:  # it is among the defects
                continue
        images, targets, names = zip(*samples) if samples else ((), (), ())
        return list(images), list(targets), list(names)


def doctor_data(
    data, images=None, unlabelled=None, validation=None, workers: int = 0
) -> tuple[list[str], dict, int]:
    """Describe the data that `load` would take, and list its problems.

    Args:
        data, images, unlabelled, validation: as `load` takes them.
        workers: processes that decode the images; 0 decodes in this one.

    Returns:
        The lines to print, with all defects; a summary; the number of defects. The summary has an
        entry for each of "train", "validation" and "unlabelled" that is there: {"source", "images",
        "image_sides"}, and with labels also "boxes", "crowd", "difficult", "empty" (images without
        a box), "classes" {name: boxes} and "box_sides"; of the training images "unlabelled", those
        without a label, "objects" per image (median, most) and "images_of_class" {name: images}.
        Sides are {"edges", "counts"} in pixels: the longer side of an image, the square root of the
        area of a box.
    """
    found = diagnose(data, images, unlabelled, validation, workers=workers)
    problems = [f"  {problem}" for problem in found.problems]
    lines = [*_bars_of(found.summary), _number_of_defects(found.problems), *problems]
    return _printable(lines), found.summary, len(found.problems)


def diagnose(
    data,
    images=None,
    unlabelled=None,
    validation=None,
    percent: float = 10,
    queries: int | None = None,
    workers: int = 0,
) -> Diagnosis:
    """Look at the data that `load` would take.

    Args:
        data, images, unlabelled, validation: as `load` takes them.
        percent: of the labelled images whose labels would be used.
        queries: of the detector, to compare with the objects per image.
        workers: processes that decode the images; 0 decodes in this one.
    """
    datasets, problems, remarks = _open(data, images, unlabelled, validation)
    summary: dict[str, dict] = {}
    first_with: dict[str, str] = {}  # digest of the pixels -> the first image that has them
    for split, dataset in datasets.items():
        loader = DataLoader(_ImageChecks(dataset), batch_size=None, num_workers=workers)
        few = len(dataset) < 500
        sides = []
        for digest, side, path in tqdm(loader, desc=f"{split} images", disable=few, leave=False):
            if digest is None:  # then `path` is the problem
                problems.append(path)
                continue
            sides.append(side)
            if digest in first_with:
                problems.append(f"{path}: the same picture as {first_with[digest]}")
            else:
                first_with[digest] = f"{path} ({split})"
        if isinstance(dataset, CocoDataset):
            summary[split] = _describe(dataset)
        else:
            summary[split] = {"source": str(dataset.folder)}
        summary[split]["images"] = len(dataset)
        summary[split]["image_sides"] = _histogram(sides, IMAGE_EDGES)
    train = datasets.get("train")
    if isinstance(train, CocoDataset):
        summary["train"] |= _describe_training(train, percent)
        remarks += _remarks_on_training(train, summary["train"], queries)
    remarks += _other_folders(data, datasets)
    return Diagnosis(summary, problems, remarks, datasets)


def _open(
    data, images, unlabelled, validation
) -> tuple[dict[str, CocoDataset | ImageFolder], list[str], list[str]]:
    """The data sets there are, what is wrong with their annotations, and remarks."""
    annotated: dict[str, CocoDataset] = {}
    problems: list[str] = []
    remarks: list[str] = []
    try:
        train, val = find_annotations(data, images, validation)
    except UserError as problem:
        problems.append(str(problem))
        train, val = None, None
    for split, annotations in (("train", train), ("validation", val)):
        if annotations is None:
            continue
        if not annotations.document["images"]:
            problems += annotations.problems
            continue
        try:
            annotated[split] = CocoDataset(annotations, problems=problems)
        except UserError as problem:
            problems.append(str(problem))
            continue
        remarks += annotations.notes
        remarks += _remarks_on_boxes(annotated[split])
    if train is not None and "train" in annotated:
        if val is not None and "validation" in annotated and not mapped_by_name(train, val):
            problems += category_problems(train, val)
        problems += _nothing_to_learn(train, annotated["train"])
    datasets: dict[str, CocoDataset | ImageFolder] = {**annotated}
    if unlabelled is not None:
        try:
            datasets["unlabelled"] = unlabelled_images(unlabelled, list(annotated.values()))
        except UserError as problem:
            problems.append(str(problem))
    return datasets, problems, remarks


def _nothing_to_learn(annotations: Annotations, dataset: CocoDataset) -> list[str]:
    """Boxes that are all crowd regions, and classes without any box."""
    problem = all_crowd(dataset.fields)
    if problem:
        return [f"{annotations.source}: nothing to learn: {problem}"]
    classes = _describe(dataset)["classes"]
    without = [name for name, count in classes.items() if count == 0]
    if len(without) > 5:
        count = f"{len(without)} of {len(classes)} classes have no labelled example"
        return [f"{annotations.source}: {count}: {named(without)}"]
    return [f"{annotations.source}: class {name!r} has no labelled example" for name in without]


def _remarks_on_boxes(dataset: CocoDataset) -> list[str]:
    counts = np.diff(dataset._starts)
    image_of = np.repeat(np.arange(len(dataset)), counts)
    found = (tiny_boxes(dataset.fields), repeated_boxes(dataset.fields, image_of))
    return [f"{dataset.source}: {line}" for line in found if line]


def _describe_training(dataset: CocoDataset, percent: float) -> dict:
    """The part of a summary that only training images have."""
    missing = set(dataset.without_labels)
    with_labels = [index for index in range(len(dataset)) if index not in missing]
    classes = [dataset.classes(index) for index in with_labels]
    drawn = stratified_indices(classes, percent, fold=1) if classes else []
    images = Counter(label for of_image in classes for label in of_image)
    labelled = Counter(label for index in drawn for label in classes[index])
    names = [row["name"] for row in dataset.categories]
    counts = dataset.counts()[with_labels] if with_labels else np.zeros(1, dtype=int)
    return {
        "unlabelled": len(missing),
        "objects": [int(np.median(counts)), int(counts.max())],
        "images_of_class": {name: images[label] for label, name in enumerate(names)},
        "labelled_of_class": {name: labelled[label] for label, name in enumerate(names)},
        "labelled": len(drawn),
        "percent": percent,
    }


def _remarks_on_training(dataset: CocoDataset, part: dict, queries: int | None) -> list[str]:
    remarks = []
    if part["unlabelled"]:
        kind = "no annotation" if dataset.labelled_ids is None else "no label file"
        count = f"{part['unlabelled']} of {len(dataset)} training images have {kind}"
        remarks.append(f"{count} and are unlabelled (--missing-labels background: no objects)")
    without = [
        name
        for name, count in part["labelled_of_class"].items()
        if count == 0 and part["images_of_class"][name]
    ]
    if without:
        share = f"{part['percent']:g} % ({part['labelled']} images)"
        remarks.append(f"at {share} no label is left of {len(without)} classes: {named(without)}")
    if queries is not None:
        remarks += filter(None, [more_objects_than(dataset.counts(), queries)])
    return remarks


def _other_folders(data, datasets: dict[str, CocoDataset | ImageFolder]) -> list[str]:
    """Folders below `data` with images that no data set takes."""
    if not Path(data).is_dir():
        return []
    used = {
        os.path.realpath(path)
        for dataset in datasets.values()
        for path in (dataset.paths() if isinstance(dataset, CocoDataset) else dataset.paths)
    }
    paths = [path for real, path in images_below(data).items() if real not in used]
    folders = Counter(os.path.relpath(os.path.dirname(path), data) for path in paths)
    counts = [f"{folder}/ ({count})" for folder, count in sorted(folders.items())]
    if not counts:
        return []
    more = f" and {len(counts) - 4} more folders" if len(counts) > 4 else ""
    return [f"images that are not looked at: {', '.join(counts[:4])}{more}"]


class _ImageChecks(Dataset):
    """(digest of the pixels, longer side, path) of an image, or (None, 0, what is wrong)."""

    def __init__(self, dataset: CocoDataset | ImageFolder):
        self.dataset = dataset
        if isinstance(dataset, CocoDataset):
            self.paths = [dataset.image_dir / name for name in dataset.names]
        else:
            self.paths = dataset.paths

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[str | None, int, str]:
        try:
            image = self.dataset[index][0]
        except UserError as problem:
            return None, 0, str(problem)
        pixels = image.permute(1, 2, 0).contiguous().numpy()  # (H, W, 3)
        digest = hashlib.blake2b(pixels.data, digest_size=16).hexdigest() + str(pixels.shape)
        return digest, max(pixels.shape), str(self.paths[index])


def _describe(dataset: CocoDataset) -> dict:
    """The part of a summary that needs no image."""
    boxes = dataset.fields["boxes"]
    per_class = np.bincount(dataset.fields["labels"], minlength=len(dataset.categories)).tolist()
    targets = (dataset.target(index) for index in range(len(dataset)))
    description = {
        "source": str(dataset.source),
        "boxes": len(boxes),
        "empty": sum(len(target["boxes"]) == 0 for target in targets),
        "classes": {row["name"]: count for row, count in zip(dataset.categories, per_class)},
        "box_sides": _histogram(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)), BOX_EDGES),
    }
    for mark in ("crowd", "difficult"):
        description[mark] = int(dataset.fields[mark].sum()) if mark in dataset.fields else 0
    return description


def _histogram(values, edges: tuple[int, ...]) -> dict[str, list[int]]:
    counts, _ = np.histogram(values, [*edges, np.inf])
    return {"edges": list(edges), "counts": counts.tolist()}


def _printable(lines: list[str]) -> list[str]:
    """The lines as valid text, which a file name need not be."""
    return [line.encode("utf-8", "backslashreplace").decode() for line in lines]


def _number_of_defects(problems: list[str]) -> str:
    return f"{len(problems) or 'no'} defect{'s' * (len(problems) != 1)}"


def _bars_of(summary: dict[str, dict]) -> list[str]:
    """The summary as histograms of letters."""
    lines = []
    for split, part in summary.items():
        lines.append(f"{split}: {part['images']:,} images ({part['source']})")
        if "classes" in part:
            lines.append(f"  {_box_counts(part)}; {part['empty']:,} images without a box")
            most_frequent_first = sorted(part["classes"].items(), key=lambda item: -item[1])
            lines += _bars("boxes of each class", most_frequent_first)
            lines += _bars(
                "boxes by side (square root of the area, pixels)", bins(part["box_sides"])
            )
        lines += _bars("images by longer side (pixels)", bins(part["image_sides"]))
        lines.append("")
    return lines


def _counts(summary: dict[str, dict]) -> list[str]:
    """The summary in a few lines for each split."""
    lines = []
    for split, part in summary.items():
        lines.append(f"{split}: {part['images']:,} images ({part['source']})")
        lines.append(f"  longer side: {_in_words(part['image_sides'], 'images')}")
        if "classes" in part:
            lines.append(f"  {_box_counts(part)}; {part['empty']:,} images without a box")
            lines.append(f"  box side: {_in_words(part['box_sides'], 'boxes')}")
        if "objects" in part:
            median, most = part["objects"]
            lines.append(
                f"  objects per labelled image: {median} in the middle, {most} at most "
                f"(--queries: {most} at least, {4 * most} for one-to-many matching)"
            )
            lines += _class_table(part)
    return lines


def _in_words(histogram: dict, what: str) -> str:
    filled = [f"{count:,} of {name}" for name, count in bins(histogram) if count]
    return f"{', '.join(filled) or 'none'} px ({what})"


def _class_table(part: dict) -> list[str]:
    """Boxes, images and labelled images of each class, the most frequent first."""
    ranked = sorted(part["classes"].items(), key=lambda item: -item[1])
    if len(ranked) > SHOWN_CLASSES:
        ranked = [*ranked[: SHOWN_CLASSES - 4], *ranked[-4:]]
    width = min(max((len(name) for name, _ in ranked), default=5), 40)
    share = f"labelled at {part['percent']:g} %"
    lines = [f"    {'class':<{width}} {'boxes':>8} {'images':>8} {share:>16}"]
    lines += [
        f"    {name[:width]:<{width}} {count:>8,} {part['images_of_class'][name]:>8,} "
        f"{part['labelled_of_class'][name]:>16,}"
        for name, count in ranked
    ]
    hidden = len(part["classes"]) - len(ranked)
    if hidden:
        lines.insert(-4, f"    ... {hidden} more classes ...")
    return lines


def _by_kind(problems: list[str]) -> list[str]:
    """The first problems of each kind, and how many more there are."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        words = problem.partition(": ")[2] or problem
        kind = re.sub(r"\S*[\d/'\"\[\]]\S*", "", words)[:60]
        kinds.setdefault(kind, []).append(problem)
    rarest_first = sorted(kinds.values(), key=len)  # the others may follow from it
    lines = []
    for same in rarest_first[:SHOWN_KINDS]:
        lines += [f"  {problem[:400]}" for problem in same[:SHOWN_OF_A_KIND]]
        if len(same) > SHOWN_OF_A_KIND:
            lines.append(f"    ... and {len(same) - SHOWN_OF_A_KIND:,} more like these")
    others = sum(len(same) for same in rarest_first[SHOWN_KINDS:])
    return lines + [f"  ... and {others:,} of other kinds"] * bool(others)


def _box_counts(part: dict) -> str:
    """'3 boxes (1 crowd) of 2 classes'."""
    marks = ["crowd", "difficult"]
    if part["crowd"] == part["difficult"]:  # VOC's difficult objects are read as crowd regions too
        marks = ["difficult"]
    counted = ", ".join(f"{part[mark]:,} {mark}" for mark in marks if part[mark])
    in_brackets = f" ({counted})" if counted else ""
    return f"{part['boxes']:,} boxes{in_brackets} of {len(part['classes'])} classes"


def bins(histogram: dict) -> list[tuple[str, int]]:
    """(name, count) of each bin of a summary's histogram, without the empty bins at both ends."""
    edges, counts = histogram["edges"], histogram["counts"]
    names = [f"{low} to {high}" for low, high in zip(edges, edges[1:])]
    names.append(f"over {edges[-1]}")
    filled = np.flatnonzero(counts)
    if not len(filled):
        return []
    return list(zip(names, counts))[filled[0] : filled[-1] + 1]


def _bars(title: str, rows: list[tuple[str, int]], max_rows: int = 20) -> list[str]:
    """A histogram in letters of at most `max_rows` bars; one more line sums up the others."""
    width = max((len(name) for name, _ in rows), default=0)
    largest = max((count for _, count in rows), default=0) or 1
    lines = [f"  {title}"]
    for name, count in rows[:max_rows]:
        bar = "#" * round(40 * count / largest)
        lines.append(f"    {name:<{width}} {count:>9,} {bar}".rstrip())
    others = rows[max_rows:]
    if others:
        lines.append(f"    and {len(others)} more with {sum(count for _, count in others):,}")
    return lines
