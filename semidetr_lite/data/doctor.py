"""What is in a data set, and everything that is wrong with it: `semidetr doctor --data ...`.

Training stops at the first problem of its data. The doctor goes through every row, decodes every
image and lists all problems, each with its file. Two images are duplicates when their decoded
pixels are equal, whatever their names and metadata.
"""

import hashlib

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from semidetr_lite.data.coco import CocoDataset, category_problems, find_annotations
from semidetr_lite.data.formats import Annotations
from semidetr_lite.data.images import ImageFolder
from semidetr_lite.errors import UserError

# edges of the histograms in pixels; the last bin is open
IMAGE_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096)
BOX_EDGES = (0, 4, 8, 16, 32, 64, 128, 256, 512)


def doctor_data(
    data, images=None, unlabelled=None, validation=None, workers: int = 0
) -> tuple[list[str], dict, int]:
    """Describe the data that `load` would take, and list its problems.

    Args:
        data, images, unlabelled, validation: as `load` takes them.
        workers: processes that decode the images; 0 decodes in this one.

    Returns:
        The lines to print; a summary; the number of problems. The summary has an entry for each of
        "train", "validation" and "unlabelled" that is there: {"source", "images", "image_sides"},
        and with labels also "boxes", "crowd", "difficult", "empty" (images without a box),
        "classes" {name: boxes} and "box_sides". Sides are {"edges", "counts"} in pixels: the longer
        side of an image, the square root of the area of a box.
    """
    datasets, problems = _open(data, images, unlabelled, validation)
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
    return _lines(summary, problems), summary, len(problems)


def _open(
    data, images, unlabelled, validation
) -> tuple[dict[str, CocoDataset | ImageFolder], list[str]]:
    """The data sets there are, and what is wrong with their annotations."""
    annotated: dict[str, CocoDataset] = {}
    problems: list[str] = []
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
    if train is not None and "train" in annotated:
        if val is not None and "validation" in annotated:
            problems += category_problems(train, val)
        problems += _classes_without_box(train, annotated["train"])
    datasets: dict[str, CocoDataset | ImageFolder] = {**annotated}
    if unlabelled is not None:
        listed = {path for dataset in annotated.values() for path in dataset.paths()}
        try:
            datasets["unlabelled"] = ImageFolder(unlabelled, listed=listed)
        except UserError as problem:
            problems.append(str(problem))
    return datasets, problems


def _classes_without_box(annotations: Annotations, dataset: CocoDataset) -> list[str]:
    classes = _describe(dataset)["classes"]
    return [
        f"{annotations.source}: class {name!r} has no labelled example"
        for name, count in classes.items()
        if count == 0
    ]


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


def _lines(summary: dict[str, dict], problems: list[str]) -> list[str]:
    """The summary and the problems as text."""
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
    lines.append(f"{len(problems) or 'no'} defect{'s' * (len(problems) != 1)}")
    lines += [f"  {problem}" for problem in problems]
    # a file name need not be valid text
    return [line.encode("utf-8", "backslashreplace").decode() for line in lines]


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
