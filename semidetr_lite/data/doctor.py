"""What is in a data set, and everything that is wrong with it: `semidetr doctor --data ...`.

Loading stops at the first fault; the doctor goes through every row, decodes every image and lists all faults, each
with its file. Two images are duplicates when their decoded pixels are equal, whatever their names and metadata.
"""

import hashlib

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from semidetr_lite.data.coco import CocoDataset, category_faults, find_labels
from semidetr_lite.data.images import ImageFolder
from semidetr_lite.errors import UserError

IMAGE_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096)  # of the histograms, in pixels; the last bin is open
BOX_EDGES = (0, 4, 8, 16, 32, 64, 128, 256, 512)


def doctor_data(data, images=None, unlabelled=None, validation=None, workers=0) -> tuple[list[str], dict, int]:
    """Describe the data that `load` would take, and list its defects.

    `workers` processes decode the images; 0 decodes in this one. Returns (lines to print, summary, number of defects).
    The summary has an entry for each part there is, of "train", "validation" and "unlabelled": {"source", "images",
    "image_sides", and for labels "boxes", "crowd", "difficult", "empty" (images without a box), "classes" {name:
    boxes}, "box_sides"}; sides are {"edges", "counts"} in pixels, the longer one of an image, for a box the square root
    of its area.
    """
    datasets, defects = _open(data, images, unlabelled, validation)
    summary, first = {}, {}
    for name, dataset in datasets.items():
        summary[name] = _describe(dataset) if isinstance(dataset, CocoDataset) else {"source": str(dataset.folder)}
        loader = DataLoader(_Looks(dataset), batch_size=None, num_workers=workers)
        sides = []
        for digest, side, said in tqdm(loader, desc=f"{name} images", disable=len(dataset) < 500, leave=False):
            if digest is None:
                defects.append(said)
                continue
            sides.append(side)
            if digest in first:
                defects.append(f"{said}: the same picture as {first[digest]}")
            first.setdefault(digest, f"{said} ({name})")
        summary[name] |= {"images": len(dataset), "image_sides": _histogram(sides, IMAGE_EDGES)}
    return _lines(summary, defects), summary, len(defects)


def _open(data, images, unlabelled, validation) -> tuple[dict, list[str]]:
    """The data sets there are, and what is wrong with their labels."""
    datasets, defects = {}, []

    def attempt(make, *arguments, **others):
        try:
            return make(*arguments, **others)
        except UserError as problem:
            defects.append(str(problem))

    found = attempt(find_labels, data, images, validation) or (None, None)
    for name, labels in zip(("train", "validation"), found):
        if labels and labels.document["images"]:
            datasets[name] = attempt(CocoDataset, labels, faults=defects)
        elif labels:
            defects += labels.faults
    datasets = {name: dataset for name, dataset in datasets.items() if dataset is not None}
    if len(datasets) == 2:
        defects += category_faults(*found)
    if "train" in datasets:
        counts = _describe(datasets["train"])["classes"]
        defects += [f"{found[0].source}: class {name!r} has no labelled example" for name in counts if not counts[name]]
    if unlabelled is not None:
        listed = {path for dataset in datasets.values() for path in dataset.paths()}
        datasets["unlabelled"] = attempt(ImageFolder, unlabelled, listed=listed)
    return {name: dataset for name, dataset in datasets.items() if dataset is not None}, defects


class _Looks:
    """(digest of the pixels, longer side, path) of every image, or (None, 0, what is wrong with it)."""

    def __init__(self, dataset):
        self.dataset = dataset
        listed = isinstance(dataset, CocoDataset)
        self.paths = [dataset.folder / name for name in dataset.names] if listed else dataset.paths

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[str | None, int, str]:
        try:
            image = self.dataset[index][0].permute(1, 2, 0).contiguous().numpy()
        except UserError as problem:
            return None, 0, str(problem)
        shape = image.shape
        return hashlib.blake2b(image, digest_size=16).hexdigest() + str(shape), max(shape), str(self.paths[index])


def _describe(dataset: CocoDataset) -> dict:
    """The part of a summary that needs no image."""
    boxes, labels = dataset.fields["boxes"], dataset.fields["labels"]
    marks = {key: int(dataset.fields[key].sum()) if key in dataset.fields else 0 for key in ("crowd", "difficult")}
    per_class = np.bincount(labels, minlength=len(dataset.categories)).tolist()
    return {
        "source": str(dataset.annotations),
        "boxes": len(boxes),
        **marks,
        "empty": sum(len(dataset.target(index)["boxes"]) == 0 for index in range(len(dataset))),
        "classes": {row["name"]: count for row, count in zip(dataset.categories, per_class)},
        "box_sides": _histogram(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)), BOX_EDGES),
    }


def _histogram(values, edges) -> dict[str, list[int]]:
    return {"edges": list(edges), "counts": np.histogram(values, [*edges, np.inf])[0].tolist()}


def _lines(summary: dict, defects: list[str]) -> list[str]:
    """The summary and the defects for people."""
    lines = []
    for name, part in summary.items():
        lines.append(f"{name}: {part['images']:,} images ({part['source']})")
        if "classes" in part:
            marks = ("crowd", "difficult")[part["crowd"] == part["difficult"] :]  # VOC's are read as crowd
            marks = ", ".join(f"{part[key]:,} {key}" for key in marks if part[key])
            boxes = f"{part['boxes']:,} boxes{f' ({marks})' if marks else ''} of {len(part['classes'])} classes"
            lines.append(f"  {boxes}; {part['empty']:,} images without a box")
            lines += _bars("boxes of each class", sorted(part["classes"].items(), key=lambda item: -item[1]))
            lines += _bars("boxes by side (square root of the area, pixels)", bins(part["box_sides"]))
        lines += [*_bars("images by longer side (pixels)", bins(part["image_sides"])), ""]
    lines += [f"{len(defects) or 'no'} defect{'s' * (len(defects) != 1)}", *(f"  {defect}" for defect in defects)]
    return [line.encode("utf-8", "backslashreplace").decode() for line in lines]  # a file name need not be text


def bins(histogram: dict) -> list[tuple[str, int]]:
    """(name, count) of each bin of a summary's histogram, without the empty ones at both ends."""
    edges, counts = histogram["edges"], histogram["counts"]
    names = [*(f"{low} to {high}" for low, high in zip(edges, edges[1:])), f"over {edges[-1]}"]
    full = np.flatnonzero(counts)
    return list(zip(names, counts))[full[0] : full[-1] + 1] if len(full) else []


def _bars(title: str, rows: list[tuple[str, int]], most: int = 20) -> list[str]:
    """A histogram in letters, of at most so many bars; the sum of the others is told."""
    width, largest = max((len(name) for name, _ in rows), default=0), max((count for _, count in rows), default=0) or 1
    lines = [f"    {name:<{width}} {count:>9,} {'#' * round(40 * count / largest)}".rstrip() for name, count in rows]
    rest = [f"    and {len(rows) - most} more with {sum(count for _, count in rows[most:]):,}"] if rows[most:] else []
    return [f"  {title}", *lines[:most], *rest]
