"""Annotated images as a data set, whatever tool wrote them, perhaps with a folder of further ones.

Every layout is read into the rows of a COCO json (layouts.py, coco_json.py, formats.py), so there
is one data set class for all. Category ids may have gaps; the labels 0..C-1 follow them in
ascending order. A crowd region (`iscrowd` 1) stays among the boxes and is marked in "crowd", a
`difficult` object in "difficult". An image may have no box at all.

Images are turned upright as their EXIF data ask, and boxes are in pixels of the upright image. Were
they drawn on the pixels as they are stored, they are turned too: a json or an XML file says which
by the size that it declares. Where the two sizes are equal, boxes of a json or XML file are those
of the stored pixels, as in COCO; YOLO's are those of the upright image.

Real files have defects: COCO's own training set holds two boxes of no height. A box that reaches
over the edge of its image is cut there. A box that is empty or wholly outside is dropped. One line
on stderr counts both. If more than one box in a hundred would be dropped, the file is refused.
"""

import os
import sys
from pathlib import Path
from typing import cast

import numpy as np
import torch

from semidetr_lite.contracts import Target, View
from semidetr_lite.data.coco_json import is_numbers, read_annotations, read_coco, read_coco_json
from semidetr_lite.data.folds import labelled_in_manifest
from semidetr_lite.data.formats import Annotations
from semidetr_lite.data.images import (
    IMAGE_SUFFIXES,
    QUARTER_TURNS,
    ImageFolder,
    header_size,
    images_below,
    read_image,
    read_upright,
    turn_boxes,
)
from semidetr_lite.data.layouts import find_annotations, image_dirs
from semidetr_lite.data.splits import (
    Concat,
    Dataset,
    NobodyLabelled,
    Splits,
    Subset,
    WithoutLabels,
    labelled_indices,
    stratified_indices,
)
from semidetr_lite.data.suspicions import all_crowd, looks_like_corners, looks_normalised, named
from semidetr_lite.errors import UserError

__all__ = [
    "IMAGE_SUFFIXES",
    "CocoDataset",
    "ImageFolder",
    "find_annotations",
    "is_numbers",
    "load",
    "read_coco",
    "read_coco_json",
    "read_image",
]
# ids between 1 and 90 that COCO gives to no class
COCO_ID_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = [number for number in range(1, 91) if number not in COCO_ID_GAPS]  # of the 80 classes
MAX_DROPPED_FRACTION = 0.01  # of the boxes of a file


def load(
    data,
    images=None,
    unlabelled=None,
    percent: float = 10,
    fold: int = 1,
    validation=None,
    folds=None,
    flip: bool = True,
    missing_labels: str = "unlabelled",
    stratified: bool = False,
    skip_unreadable: bool = False,
) -> Splits:
    """The splits of a data set on disk.

    Args:
        data, images, validation: as `find_annotations` takes them.
        unlabelled: a folder of images without labels, or a COCO json of such. Images that the
            annotations list are left out.
        percent: of the labelled training images, those whose labels are used. The others are
            unlabelled.
        fold: the number of the draw of labelled images, from 1.
        folds: a folder of folds with its manifest, to read the draw from. It also says which images
            are labelled at all.
        flip: whether a mirrored object is still the same.
        missing_labels: what a training image without a label file, in a json without an annotation,
            is: "unlabelled", or "background", an image without objects. A validation json always
            lists images that somebody looked at.
        stratified: whether every class gets its fraction of the labelled images.
        skip_unreadable: whether images and labels that cannot be read are left out, with a line
            that counts them; validation images are then decoded once to find out.

    Returns:
        Splits whose tune and test split are both the validation images. If there are none, a fifth
        of the labelled images, always the same, is set aside, and one line on stderr says so.

    Raises UserError for data that cannot be used.
    """
    train_annotations, val_annotations = find_annotations(data, images, validation)
    whole = CocoDataset(train_annotations, skip_unreadable=skip_unreadable)
    with_labels = _with_labels(whole, missing_labels if folds is None else "background")
    datasets = [whole]
    held_out: Dataset
    if val_annotations is None:
        with_labels, held_out = _set_aside(whole, with_labels)
    else:
        val_annotations = align_categories(train_annotations, val_annotations)
        val = CocoDataset(val_annotations, skip_unreadable=skip_unreadable)
        datasets.append(val)
        held_out = _validation_images(val, missing_labels, skip_unreadable)
    draw = (whole, with_labels, percent, fold)
    if folds is None:
        labelled = _draw(*draw, stratified)
    elif val_annotations is None:
        problem = "folds leave no image to evaluate on; give a json with --validation"
        raise UserError(f"{folds}: {problem}")
    else:
        labelled = labelled_in_manifest(folds, whole.image_ids, percent, fold)
    _warn_about_classes(whole, with_labels, labelled)
    rest = sorted(set(with_labels) - set(labelled))
    parts: list[Dataset] = [WithoutLabels(whole, rest)]
    nobody = [index for index in whole.without_labels if index not in set(with_labels)]
    if nobody:
        parts.append(NobodyLabelled(whole, nobody))
    if unlabelled is not None:
        parts.append(unlabelled_images(unlabelled, datasets))
    return Splits(
        labelled=Subset(whole, labelled),
        unlabelled=Concat(parts) if len(parts) > 1 else parts[0],
        tune=held_out,
        test=held_out,
        categories=whole.categories,
        flip=flip,
    )


def _with_labels(whole: "CocoDataset", missing_labels: str) -> list[int]:
    """The images to draw labelled ones from; one line on stderr counts those without labels.

    Raises UserError for nothing to learn from.
    """
    problem = all_crowd(whole.fields)
    if problem:
        raise UserError(f"{whole.source}: nothing to learn: {problem}")
    missing = whole.without_labels
    if len(missing) == len(whole) or not len(whole.fields["boxes"]):
        advice = "label some images, or name another file with --data"
        raise UserError(f"{whole.source}: nothing to learn: none of its images has a box; {advice}")
    if missing:
        kind = "no annotation" if whole.labelled_ids is None else "no label file"
        count = f"{len(missing)} of its {len(whole)} training images have {kind}"
        other = "--missing-labels background takes them as images without objects"
        meaning = f"and are unlabelled ({other})"
        if missing_labels == "background":
            meaning = "and are taken as images without objects (--missing-labels)"
        print(f"{whole.source}: {count} {meaning}", file=sys.stderr)
    if missing_labels == "background":
        return list(range(len(whole)))
    return sorted(set(range(len(whole))) - set(missing))


def _validation_images(val: "CocoDataset", missing_labels: str, skip_unreadable: bool) -> Dataset:
    """The images to measure on: those that somebody labelled and, if asked, that can be read.

    One line on stderr counts those left out, and one says that no AP can be measured. Raises
    UserError where none is left.
    """
    kept = list(range(len(val)))
    if val.labelled_ids is not None and missing_labels == "unlabelled":
        without_labels = set(val.without_labels)
        kept = [index for index in kept if index not in without_labels]
        if without_labels:
            count = f"{len(without_labels)} of its {len(val)} validation images"
            message = "have no label file and are not measured on"
            print(f"{val.source}: {count} {message}", file=sys.stderr)
    if skip_unreadable:
        kept = _readable(val, kept)
    if not kept:
        raise UserError(f"{val.source}: no validation image with labels is left")
    if not (~val.fields["crowd"]).any():
        message = "its validation images have no box, so AP cannot be measured (nan)"
        print(f"warning: {val.source}: {message}", file=sys.stderr)
    return val if len(kept) == len(val) else Subset(val, kept)


def _readable(dataset: "CocoDataset", indices: list[int]) -> list[int]:
    """The indices of the images that can be decoded; one line on stderr counts the others."""
    readable = []
    problems = []
    for index in indices:
        try:
            _ = dataset[index]
        except UserError as problem:
            problems.append(str(problem))
        else:
            readable.append(index)
    if problems:
        count = f"{len(problems)} of {len(indices)} validation images"
        message = f"{count} are left out (first: {problems[0]})"
        print(f"warning: {dataset.source}: {message}", file=sys.stderr)
    return readable


def _draw(
    whole: "CocoDataset", with_labels: list[int], percent: float, fold: int, stratified: bool
) -> list[int]:
    """The labelled images of a fold, drawn from those with labels."""
    if not stratified:
        drawn = labelled_indices(len(with_labels), percent, fold)
    else:
        drawn = stratified_indices([whole.classes(i) for i in with_labels], percent, fold)
    return [with_labels[index] for index in drawn]


def _warn_about_classes(whole: "CocoDataset", with_labels: list[int], labelled: list[int]) -> None:
    """One line on stderr that names the classes without a box in the labelled images."""
    there = set().union(*(whole.classes(index) for index in labelled))
    known = set().union(*(whole.classes(index) for index in with_labels))
    names = [category["name"] for category in whole.categories]
    groups = {
        f"in the {len(labelled)} labelled images": sorted(known - there),
        "in any training image": sorted(set(range(len(names))) - known - there),
    }
    for where, labels in groups.items():
        if labels:
            count = f"{len(labels)} of {len(names)} classes have no box {where}"
            listed = named([names[label] for label in labels])
            print(f"warning: {whole.source}: {count}: {listed}", file=sys.stderr)


def unlabelled_images(unlabelled, datasets: list["CocoDataset"]) -> ImageFolder:
    """The images of a folder, or of a json of images, that none of the data sets lists."""
    image_ids = (image_id for dataset in datasets for image_id in dataset.image_ids)
    first_id = max(image_ids, default=0) + 1
    listed = {path for dataset in datasets for path in dataset.paths()}
    path = Path(unlabelled)
    if path.suffix.lower() != ".json":
        return ImageFolder(unlabelled, first_id, listed)
    annotations = read_annotations(path, image_dirs(path, None, [path]))
    if annotations.problems:
        raise UserError(annotations.problems[0])
    image_dir, names = _locate_images(annotations)
    there = [os.path.join(image_dir, name) for name in names if name is not None]
    if len(there) < len(names):
        count = f"{len(names) - len(there)} of its {len(names)} images"
        print(f"warning: {path}: {count} are missing and left out", file=sys.stderr)
    return ImageFolder(image_dir, first_id, listed, there)


class CocoDataset:
    """Labelled images: `dataset[i] -> (image uint8 (3, H, W), target)`, boxes in pixels, xyxy.

    Args:
        annotations: a json; or Annotations, which name their folders of images.
        images: for a json, its folder of images or a list of them. The first that holds an image of
            the json is taken.
        problems: a list that takes one line about each defect of the json; without it the first one
            is raised.
        skip_unreadable: whether missing images and labels that cannot be read are left out, with
            one line on stderr that counts them.

    Attributes:
        categories: [{"id", "name"}] in the order of the labels.
        sizes: [(H, W)] as the json declares them, and `image_ids` [int], in the order of the json.
        fields: {"boxes" (A, 4) float32 xyxy, "labels", "crowd", "area", perhaps "difficult"},
            arrays over all boxes.
        without_labels: the indices of the images that nobody labelled: without a label file or, in
            a json, without an annotation that can be used.
        labelled_ids: ids of the images with a label file; None for a json.

    Raises UserError: at opening for a defect of the json or a missing image, at reading for an
    image that cannot be decoded or has another size than the json says.
    """

    def __init__(
        self, annotations, images=(), problems: list[str] | None = None, skip_unreadable=False
    ):
        folders = images if isinstance(images, list | tuple) else [images]
        if not isinstance(annotations, Annotations):
            annotations = read_annotations(annotations, [Path(folder) for folder in folders])
        self.source = annotations.source
        self.upright = annotations.upright
        self.labelled_ids = annotations.labelled_ids
        rows = self._usable_images(annotations, problems, skip_unreadable)
        self.image_ids = [row["id"] for row in rows]
        self.sizes = [(row["height"], row["width"]) for row in rows]
        self.names = [row["file_name"] for row in rows]
        by_id = sorted(annotations.document["categories"], key=lambda row: row["id"])
        self.categories = [{"id": row["id"], "name": row["name"]} for row in by_id]
        for note in annotations.notes if problems is None else ():
            print(note, file=sys.stderr)
        self._store_boxes(annotations, problems)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> View:
        target = self.target(index)
        path = self.image_dir / self.names[index]
        image, orientation = read_upright(path)
        declared, upright = target["size"], (image.shape[1], image.shape[2])
        stored = upright[::-1] if orientation in QUARTER_TURNS else upright
        if declared not in (stored, upright):
            size = f"{upright[1]} x {upright[0]} pixels"
            raise UserError(
                f"{path}: the image is {size}, but {self.source} says {declared[1]} x "
                f"{declared[0]}; use the images the boxes were drawn on"
            )
        drawn_upright = self.upright or declared != stored
        if orientation != 1 and not drawn_upright:
            target["boxes"] = turn_boxes(target["boxes"], stored, orientation)
        target["size"] = upright
        return image, target

    def target(self, index: int) -> Target:
        """The target of one image, without decoding the image: boxes as they are written."""
        index = range(len(self))[index]  # -1 is the last one
        rows = slice(self._starts[index], self._starts[index + 1])
        fields = {name: torch.tensor(values[rows]) for name, values in self.fields.items()}
        size, image_id = self.sizes[index], self.image_ids[index]
        return cast(Target, {**fields, "size": size, "image_id": image_id})

    def classes(self, index: int) -> set[int]:
        """The labels of an image's boxes, without those of crowd regions."""
        rows = slice(self._starts[index], self._starts[index + 1])
        return set(self.fields["labels"][rows][~self.fields["crowd"][rows]].tolist())

    def counts(self) -> np.ndarray:
        """(N,) the boxes of each image, without crowd regions."""
        image_of = np.repeat(np.arange(len(self)), np.diff(self._starts))
        return np.bincount(image_of[~self.fields["crowd"]], minlength=len(self))

    def paths(self) -> list[str]:
        """The image files, links resolved, so that two ways to one file compare equal."""
        return [os.path.realpath(os.path.join(self.image_dir, name)) for name in self.names]

    def _usable_images(
        self, annotations: Annotations, problems: list[str] | None, skip_unreadable: bool
    ) -> list[dict]:
        """The rows of the images that can be used, their file names below `image_dir`.

        Defects go to `problems`, or are counted, or the first is raised.
        """
        rows = annotations.document["images"]
        faults = list(annotations.problems)
        if not rows:
            raise UserError(faults[0] if faults else f'{self.source}: its list "images" is empty')
        self.image_dir, names = _locate_images(annotations)
        usable = []
        for row, name in zip(rows, names):
            path = self.image_dir / (name or row["file_name"])
            row = {**row, "file_name": name or row["file_name"]}
            if name is None and (problems is None or not _stays_inside(row["file_name"])):
                missing = f"the image is missing, though {self.source} lists it"
                faults.append(f"{path}: {missing} (--skip-unreadable leaves it out)")
                continue
            if "width" not in row:
                try:
                    row["height"], row["width"] = header_size(path, upright=True)
                except UserError as fault:
                    faults.append(str(fault))
                    continue
            usable.append(row)
        if problems is not None:
            problems += faults
        elif faults and not (skip_unreadable and usable):
            more = f" ({len(faults) - 1} more such lines: semidetr doctor)" if faults[1:] else ""
            raise UserError(f"{faults[0]}{more}")
        elif faults:
            count = f"{len(faults)} images or labels"
            message = f"{count} cannot be used and are left out (first: {faults[0]})"
            print(f"warning: {self.source}: {message}", file=sys.stderr)
        return usable

    def _store_boxes(self, annotations: Annotations, problems: list[str] | None) -> None:
        """Keep the boxes as flat arrays, image after image, which worker processes can share."""
        image_index = {image_id: index for index, image_id in enumerate(self.image_ids)}
        label_of = {category["id"]: label for label, category in enumerate(self.categories)}
        rows = annotations.document["annotations"]
        rows = [row for row in rows if row["image_id"] in image_index]
        image_of = np.array([image_index[row["image_id"]] for row in rows], dtype=np.int64)
        xywh = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        sizes = np.array(self.sizes, dtype=np.float64).reshape(-1, 2)[image_of]
        boxes, usable, cut = _boxes_in_image(xywh, sizes)
        for look in (looks_normalised, looks_like_corners):
            problem = look(xywh, sizes) if len(xywh) else None
            if problem is None:
                continue
            if problems is None:
                raise UserError(f"{self.source}: {problem}")
            problems.append(f"{self.source}: {problem}")
        if problems is None:
            self._warn_about_boxes(rows, ~usable, cut, annotations.left_out)
        else:
            problems += annotations.left_out
            problems += self._box_problems(rows, image_of, ~usable, cut)
        box_area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        area = np.array([row.get("area", np.nan) for row in rows], dtype=np.float32)
        fields = {
            "boxes": boxes,
            "labels": np.array([label_of[row["category_id"]] for row in rows], dtype=np.int64),
            "crowd": np.array([bool(row.get("iscrowd", 0)) for row in rows], dtype=bool),
            "area": np.where(np.isfinite(area), area, box_area),
        }
        if any("difficult" in row for row in rows):
            difficult = [bool(row.get("difficult", 0)) for row in rows]
            fields["difficult"] = np.array(difficult, dtype=bool)
        order = np.flatnonzero(usable)
        order = order[image_of[order].argsort(kind="stable")]
        self.fields = {name: values[order] for name, values in fields.items()}
        self._starts = np.searchsorted(image_of[order], np.arange(len(self.names) + 1))
        self.without_labels = self._images_without_labels(set(image_of[~usable].tolist()))

    def _images_without_labels(self, with_dropped: set[int]) -> list[int]:
        """See the class; `with_dropped` are images some of whose boxes were dropped."""
        return [
            index
            for index, count in enumerate(np.diff(self._starts))
            if count == 0
            and (
                self.labelled_ids is None
                or self.image_ids[index] not in self.labelled_ids
                or index in with_dropped
            )
        ]

    def _box_problems(
        self, rows: list[dict], image_of: np.ndarray, dropped: np.ndarray, cut: np.ndarray
    ) -> list[str]:
        """One line about each box that is dropped or cut."""
        problems = []
        for number in np.flatnonzero(dropped | cut):
            index = image_of[number]
            height, width = self.sizes[index]
            box = f"the box {rows[number]['bbox']} (annotation {rows[number].get('id')})"
            defect = "is empty or outside the image"
            if not dropped[number]:
                defect = "reaches out of the image"
            path = self.image_dir / self.names[index]
            problems.append(f"{path}: {box} {defect}, {width} x {height} pixels")
        return problems

    def _warn_about_boxes(
        self, rows: list[dict], dropped: np.ndarray, cut: np.ndarray, left_out: tuple[str, ...]
    ) -> None:
        """One line on stderr that counts the boxes left out, dropped and cut.

        Raises UserError for too many left out or dropped.
        """
        if left_out and len(left_out) > MAX_DROPPED_FRACTION * (len(rows) + len(left_out)):
            more = (
                f" ({len(left_out) - 1} more such lines: semidetr doctor)" if left_out[1:] else ""
            )
            raise UserError(f"{left_out[0]}{more}")
        if dropped.sum() > MAX_DROPPED_FRACTION * len(rows):
            defect = _count_and_first(
                rows, dropped, f"of {len(rows)} boxes are empty or outside their image"
            )
            advice = "correct or remove them (COCO's bbox is [x, y, width, height] in pixels)"
            raise UserError(f"{self.source}: {defect}; {advice}")
        notes = []
        if left_out:
            fault = left_out[0].removeprefix(f"{self.source}: ")
            notes.append(f"{len(left_out)} annotations cannot be used and are left out ({fault})")
        if dropped.any():
            defect = "boxes empty or outside their image are dropped"
            notes.append(_count_and_first(rows, dropped, defect))
        if cut.any():
            defect = "boxes that reach out of their image are cut at its edge"
            notes.append(_count_and_first(rows, cut, defect))
        if notes:
            print(f"warning: {self.source}: {'; '.join(notes)}", file=sys.stderr)


def _count_and_first(rows: list[dict], marked: np.ndarray, defect: str) -> str:
    """'3 boxes are ... (first: annotation 7)'; `marked` (A,) bool has at least one True."""
    first = int(np.flatnonzero(marked)[0])
    name = rows[first].get("id", f"number {first + 1}")
    return f"{marked.sum()} {defect} (first: annotation {name})"


def _boxes_in_image(
    xywh: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut boxes (A, 4) xywh to the sizes (A, 2), H and W, of their images.

    Returns:
        float32 xyxy (A, 4); usable (A,) bool; cut (A,) bool: usable and shortened by more than a
        pixel.
    """
    finite = np.isfinite(xywh).all(1, keepdims=True)
    xywh = np.where(finite, xywh, 0)  # a box that is not finite becomes an empty one
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    boxes = np.clip(xyxy, 0, sizes[:, [1, 0, 1, 0]]).astype(np.float32)
    usable = (boxes[:, 2:] > boxes[:, :2]).all(1)
    cut = usable & (np.abs(xyxy - boxes).max(1, initial=0) > 1)
    return boxes, usable, cut


# ---- categories ----------------------------------------------------------------------------------


def mapped_by_name(train: Annotations, validation: Annotations) -> bool:
    """Whether every validation class is one of the training classes by its name."""
    ours, theirs = (
        [row["name"] for row in annotations.document["categories"]]
        for annotations in (train, validation)
    )
    no_name_twice = len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    return no_name_twice and set(theirs) <= set(ours)


def align_categories(train: Annotations, validation: Annotations) -> Annotations:
    """The validation annotations with the category ids of the training ones, mapped by name.

    Classes that only the training data have are added. Raises UserError for classes that cannot be
    mapped and do not mean the same.
    """
    ours, theirs = train.document["categories"], validation.document["categories"]
    id_of = {row["name"]: row["id"] for row in ours}
    if not theirs and not validation.document["annotations"]:
        return validation._replace(document={**validation.document, "categories": ours})
    if not mapped_by_name(train, validation):
        for problem in category_problems(train, validation):
            raise UserError(problem)
        return validation
    new_id = {row["id"]: id_of[row["name"]] for row in theirs}
    rows = [
        {**row, "category_id": new_id[row["category_id"]]}
        for row in validation.document["annotations"]
    ]
    document = {**validation.document, "categories": ours, "annotations": rows}
    return validation._replace(document=document)


def category_problems(train: Annotations, validation: Annotations) -> list[str]:
    """One line about each category id that does not mean the same in both."""
    train_names, val_names = (
        {row["id"]: repr(row["name"]) for row in annotations.document["categories"]}
        for annotations in (train, validation)
    )
    problems = []
    for category_id in sorted(train_names.keys() | val_names.keys()):
        in_train = train_names.get(category_id, "missing")
        in_val = val_names.get(category_id, "missing")
        if in_train != in_val:
            difference = f"category {category_id} is {in_train}, but {in_val} in"
            problems.append(f"{train.source}: {difference} {validation.source}; make them agree")
    return problems


# ---- where things lie ----------------------------------------------------------------------------


def _locate_images(annotations: Annotations) -> tuple[Path, list[str | None]]:
    """The folder of the images, and for each image its path below it, None for a missing one.

    The folder is the first that holds the first image that is in any of them. An image that is not
    there is looked for by its name: labelling tools write paths of the machine they ran on.

    Raises UserError where there is no folder, or none of the images.
    """
    source = annotations.source
    names = [row["file_name"] for row in annotations.document["images"]]
    existing = [folder for folder in annotations.image_dirs if folder.is_dir()]
    if not existing:
        folder = annotations.image_dirs[0] if annotations.image_dirs else source.parent
        raise UserError(f"{folder}: no such folder of images (for {source}); name it with --images")
    inside = [name if _stays_inside(name) else None for name in names]
    holding = (
        folder for name in inside if name for folder in existing if (folder / name).is_file()
    )
    image_dir = next(holding, existing[0])
    listings: dict[str, set[str]] = {}
    found = [name if name and _is_there(image_dir, name, listings) else None for name in inside]
    if None in found:
        by_base = _images_by_base([image_dir] if any(found) else existing)
        for index, name in enumerate(names):
            path = _same_ending(name, by_base) if found[index] is None else None
            if path is not None:
                found[index] = os.path.relpath(path, image_dir)
    if not any(found):
        tried = " and ".join(str(folder) for folder in existing)
        problem = f"its image {names[0]} is not in {tried}"
        raise UserError(f"{source}: {problem}; name the folder with --images")
    return image_dir, found


def _stays_inside(name: str) -> bool:
    """Whether a file name is one below the folder of images."""
    top = os.path.normpath(name).split(os.sep)[0]
    return not os.path.isabs(name) and top not in (os.pardir, os.curdir)


def _is_there(image_dir: Path, name: str, listings: dict[str, set[str]]) -> bool:
    """Whether an image is a file; each folder is listed once, which is quick for many images."""
    folder, base = os.path.split(name)
    if folder not in listings:
        here = image_dir / folder
        listings[folder] = set(os.listdir(here)) if here.is_dir() else set()
    # a disk that ignores case may list another spelling of a file that is there
    return base in listings[folder] or (image_dir / name).is_file()


def _images_by_base(folders: list[Path]) -> dict[str, list[str]]:
    """The image files below the folders, by their name without folders."""
    by_base: dict[str, list[str]] = {}
    paths = {real: path for folder in folders for real, path in images_below(folder).items()}
    for path in paths.values():
        by_base.setdefault(os.path.basename(path), []).append(path)
    return by_base


def _same_ending(name: str, by_base: dict[str, list[str]]) -> str | None:
    """The one image file whose path ends as `name` does, by the most parts; None for no or two."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    candidates = by_base.get(parts[-1], []) if parts else []
    for length in range(len(parts), 0, -1):
        ending = parts[-length:]
        matching = [path for path in candidates if path.split(os.sep)[-length:] == ending]
        if matching:
            return matching[0] if len(matching) == 1 else None
    return None


def _set_aside(whole: CocoDataset, with_labels: list[int]) -> tuple[list[int], Subset]:
    """Hold out a fifth of the labelled images, the same in every run: (train, held out)."""
    if len(with_labels) < 2:
        problem = "one labelled image cannot be trained on and evaluated on"
        raise UserError(f"{whole.source}: {problem}; give a validation json")
    held_out = labelled_indices(len(with_labels), percent=20, fold=0)
    rest = sorted(set(range(len(with_labels))) - set(held_out))
    count = f"{len(held_out)} of its {len(with_labels)} images"
    message = f"no validation images, so {count} are set aside to evaluate on"
    print(f"{whole.source}: {message}", file=sys.stderr)
    return [with_labels[index] for index in rest], Subset(
        whole, [with_labels[index] for index in held_out]
    )
