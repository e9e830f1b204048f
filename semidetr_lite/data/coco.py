"""Any labelled images as COCO has them: a json or folder with the boxes, and perhaps a folder of unlabelled images.

    {"images": [{"id", "file_name", "width", "height"}],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height], "area", "iscrowd", "difficult"}],
     "categories": [{"id", "name"}]}

A Pascal VOC or YOLO folder is read into the same rows (formats.py), so there is one data set class for all. Category
ids may have gaps; the labels 0..C-1 follow them in ascending order. A crowd region (`iscrowd` 1) stays among the boxes
and is marked in "crowd", a `difficult` object in "difficult"; an image may have no box at all. Boxes refer to the
pixels as they are stored, so a rotation noted in an image's EXIF data is not applied, here as in COCO; unless the size
the json declares is that of the rotated image.

Real files are not spotless: COCO's own training set holds two boxes of no height. A box that reaches over the edge of
its image is cut there; one that is empty or wholly outside is dropped; one line on stderr counts both. Where more than
one box in a hundred would be dropped, the whole file is in doubt and is refused.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from semidetr_lite.data.formats import Labels, read_voc, read_yolo
from semidetr_lite.data.images import IMAGE_SUFFIXES, ImageFolder, read_image
from semidetr_lite.data.splits import Joined, Splits, Subset, Unlabelled, labelled_indices
from semidetr_lite.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "CocoDataset", "ImageFolder", "load", "read_coco", "read_image"]
DROPPED_AT_MOST = 0.01  # of the boxes of a file


def load(
    data, images=None, unlabelled=None, percent: float = 10, fold: int = 1, validation=None, folds=None, flip=True
) -> Splits:
    """The splits of a data set on disk.

    `data`, `images` and `validation` are as `find_labels` takes them. Of the training images `percent` % are labelled,
    drawn by `fold` or read from `folds`, a folder of folds with its manifest. The others are unlabelled, and so is
    every image in and below the folder `unlabelled` (or in that json of images) that the labels do not list. `flip`
    says whether a mirrored object is still the same. The validation images are both tune and test. Where there are
    none, a fifth of the training images, always the same, is set aside, and a line on stderr says so. Raises UserError
    for what cannot be used.
    """
    labels, measured = find_labels(data, images, validation)
    whole = CocoDataset(labels)
    opened = [whole] if measured is None else [whole, CocoDataset(measured)]
    train, held_out = opened if measured else _set_aside(whole)
    for fault in category_faults(labels, measured) if measured else ():
        raise UserError(fault)
    if folds is None:
        chosen = labelled_indices(len(train), percent, fold)
    elif measured is None:
        raise UserError(f"{folds}: folds leave no image to measure on; give a json with --validation")
    else:
        from semidetr_lite.data.folds import labelled_in_manifest  # which reads jsons with this module

        chosen = labelled_in_manifest(folds, train.image_ids, percent, fold)
    pool = Unlabelled(train, sorted(set(range(len(train))) - set(chosen)))
    if unlabelled is not None:
        paths = None
        if Path(unlabelled).suffix == ".json":
            more = CocoDataset(unlabelled, _image_folders(Path(unlabelled), None, [Path(unlabelled)]))
            unlabelled, paths = more.folder, more.paths()
        first_id = max(image_id for dataset in opened for image_id in dataset.image_ids) + 1
        listed = {path for dataset in opened for path in dataset.paths()}
        pool = Joined([pool, ImageFolder(unlabelled, first_id, listed, paths)])
    return Splits(Subset(train, chosen), pool, held_out, held_out, whole.categories, flip=flip)


def find_labels(data, images=None, validation=None, categories=None) -> tuple[Labels, Labels | None]:
    """The labels to train on, and those to measure on or None.

    `data` is a COCO json, its images in the folder `images`; or a folder:

        COCO   instances_train*.json and perhaps instances_val*.json in it or in its annotations/, and the images in
               train2017/ and val2017/ (named as the jsons are), in images/ or in the folder itself
        VOC    JPEGImages/, Annotations/*.xml and perhaps ImageSets/Main/*.txt; see `read_voc`
        YOLO   images/ and labels/ with data.yaml or classes.txt; see `read_yolo`

    `validation` is a json or folder of the same kinds; it replaces what `data` has for validation. `categories`
    [{"id", "name"}] are those a VOC folder has to agree with. Raises UserError for what is not there.
    """
    data = Path(data)
    if images and not Path(images).is_dir():
        raise UserError(f"{images}: no such folder of images")
    train, measured = _find_annotations(data)
    if train is not None:
        labels = read_labels(train, _image_folders(train, images, around=[] if images else [train]))
        if measured is not None and validation is None:
            measured = read_labels(measured, _image_folders(measured, images, around=[measured, train]))
    elif any(data.glob("Annotations/*.xml")):
        labels, measured = read_voc(data, images, categories)
    elif any(data.glob("labels/**/*.txt")) or any(data.glob("*/labels/*.txt")):
        labels, measured = read_yolo(data)
    else:
        kinds = "no instances_train*.json in this folder or in its annotations/, no Annotations/*.xml, no labels/*.txt"
        raise UserError(f"{data}: {kinds}; give the path of a COCO json, or a COCO, VOC or YOLO folder")
    if validation is not None and Path(validation).is_dir():
        whole, part = find_labels(validation, categories=labels.document["categories"])
        measured = part or whole
    elif validation is not None:
        around = [Path(validation), *filter(None, [train])]
        measured = read_labels(validation, _image_folders(around[0], images, around))
    return labels, measured


class CocoDataset:
    """Labelled images: `ds[i] -> (image uint8 (3, H, W), target)`, the targets with boxes in pixels, xyxy.

    `annotations` is a json, `images` a folder, or a list of them: the first that holds an image of the json is taken;
    or `annotations` are Labels, which name their folders. `.categories` [{"id", "name"}] in the order of the labels;
    `.sizes` [(H, W)] and `.image_ids` [int] in the order of the json. Raises UserError: at opening for a fault of the
    json or a missing image, at reading for an image that cannot be decoded or has another size than the json says. A
    list `faults` takes a line about each fault of the json instead.
    """

    def __init__(self, annotations, images=(), faults: list[str] | None = None):
        folders = [Path(folder) for folder in (images if isinstance(images, list | tuple) else [images])]
        labels = annotations if isinstance(annotations, Labels) else read_labels(annotations, folders)
        if faults is not None:
            faults += labels.faults
        elif labels.faults:
            raise UserError(labels.faults[0])
        self.annotations, self.upright = labels.source, labels.upright
        listed = labels.document["images"]
        self.image_ids = [image["id"] for image in listed]
        self.sizes = [(image["height"], image["width"]) for image in listed]
        by_id = sorted(labels.document["categories"], key=lambda row: row["id"])
        self.categories = [{"id": row["id"], "name": row["name"]} for row in by_id]
        self.names = [image["file_name"] for image in listed]
        self.folder = _folder_with_images(labels, self.names)
        if faults is None:
            self._check_images_are_there()
        self._keep_boxes(labels.document["annotations"], faults)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        target = self.target(index)
        path, size = self.folder / self.names[index], target["size"]
        image = read_image(path, self.upright)
        if image.shape[1:] == size[::-1] != size:  # the boxes may have been drawn on the image turned upright
            image = read_image(path, upright=True)
        if image.shape[1:] != size:
            raise UserError(
                f"{path}: the image is {image.shape[2]} x {image.shape[1]} pixels, but {self.annotations} says "
                f"{size[1]} x {size[0]}; use the images the boxes were drawn on"
            )
        return image, target

    def target(self, index: int) -> dict:
        """The target of one image, without decoding the image."""
        index = range(len(self))[index]  # -1 is the last one
        rows = slice(self._starts[index], self._starts[index + 1])
        fields = {name: torch.tensor(values[rows]) for name, values in self.fields.items()}
        return {**fields, "size": self.sizes[index], "image_id": self.image_ids[index]}

    def paths(self) -> list[str]:
        """Where the images lie, links resolved, so that two ways to the same file compare equal."""
        return [os.path.realpath(os.path.join(self.folder, name)) for name in self.names]

    def _check_images_are_there(self) -> None:
        parents = {os.path.dirname(name) for name in self.names}
        there = {parent: set(os.listdir(self.folder / parent)) for parent in parents if (self.folder / parent).is_dir()}
        for name in self.names:
            parent, base = os.path.split(name)
            # A disk that ignores case may list another spelling of a file that is there.
            if base not in there.get(parent, ()) and not (self.folder / name).is_file():
                raise UserError(f"{self.folder / name}: the image is missing, though {self.annotations} lists it")

    def _keep_boxes(self, rows: list[dict], faults: list[str] | None) -> None:
        """Store the boxes as flat arrays, image after image: a few large objects, which worker processes can share."""
        place = {image_id: index for index, image_id in enumerate(self.image_ids)}
        label = {category["id"]: index for index, category in enumerate(self.categories)}
        owner = np.array([place[row["image_id"]] for row in rows], dtype=np.int64)
        xywh = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        sizes = np.array(self.sizes, dtype=np.float64).reshape(-1, 2)[owner]
        boxes, usable, cut = _boxes_in_image(xywh, sizes)
        self._report_boxes(rows, owner, ~usable, cut, faults)
        own_area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        area = np.array([row.get("area", np.nan) for row in rows], dtype=np.float32)
        fields = {
            "boxes": boxes,
            "labels": np.array([label[row["category_id"]] for row in rows], dtype=np.int64),
            "crowd": np.array([bool(row.get("iscrowd", 0)) for row in rows], dtype=bool),
            "area": np.where(np.isfinite(area), area, own_area),
        }
        if any("difficult" in row for row in rows):
            fields["difficult"] = np.array([bool(row.get("difficult", 0)) for row in rows], dtype=bool)
        order = np.flatnonzero(usable)
        order = order[owner[order].argsort(kind="stable")]
        self.fields = {name: values[order] for name, values in fields.items()}
        self._starts = np.searchsorted(owner[order], np.arange(len(self.names) + 1))

    def _report_boxes(self, rows: list[dict], owner, dropped, cut, faults: list[str] | None) -> None:
        """A line in `faults` about each box dropped or cut, else one on stderr; too many dropped are a UserError."""
        if faults is not None:
            for row in np.flatnonzero(dropped | cut):
                path, (height, width) = self.folder / self.names[owner[row]], self.sizes[owner[row]]
                what = "is empty or outside the image" if dropped[row] else "reaches out of the image"
                box = f"the box {rows[row]['bbox']} (annotation {rows[row].get('id')})"
                faults.append(f"{path}: {box} {what}, {width} x {height} pixels")
            return

        def said(chosen: np.ndarray, what: str) -> list[str]:
            first = [rows[place].get("id", f"number {place + 1}") for place in np.flatnonzero(chosen)[:1]]
            return [f"{chosen.sum()} {what} (first: annotation {name})" for name in first]

        if dropped.sum() > DROPPED_AT_MOST * len(rows):
            fault = said(dropped, f"of {len(rows)} boxes are empty or outside their image")[0]
            advice = "correct or remove them (COCO's bbox is [x, y, width, height] in pixels)"
            raise UserError(f"{self.annotations}: {fault}; {advice}")
        notes = said(dropped, "boxes empty or outside their image are dropped")
        notes += said(cut, "boxes that reach out of their image are cut at its edge")
        if notes:
            print(f"warning: {self.annotations}: {'; '.join(notes)}", file=sys.stderr)


def read_json(path):
    """The content of a json file. Raises UserError naming the file and where it stops being json.

    Outlines, the "segmentation" of an annotation, are cut out before json sees them: they are two thirds of COCO's
    files and nothing here uses them.
    """
    try:
        with open(path, "rb") as file:
            return json.loads(b"".join(_without_outlines(file)).decode("utf-8-sig"))
    except OSError as problem:
        raise UserError(f"{path}: cannot be read: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: not valid json: {problem}") from problem


OUTLINE = re.compile(rb'"segmentation"\s*:\s*\[[][\d\s.,eE+-]*\]')


def _without_outlines(file) -> Iterator[bytes]:
    """The bytes of a json in large pieces, each list of numbers called "segmentation" an empty one of as many lines."""
    rest = b""
    while block := file.read(1 << 24):
        whole, end, rest = (rest + block).rpartition(b"}")  # no outline holds a brace
        yield OUTLINE.sub(lambda found: b'"segmentation":[' + b"\n" * found[0].count(b"\n") + b"]", whole) + end
    yield rest


def read_coco(path) -> dict:
    """The content of a COCO json, its ids checked: there, unique and known. Raises UserError naming the file."""
    document, faults = sound_rows(path, read_json(path), files=False)
    for fault in faults:
        raise UserError(fault)
    return document


def read_labels(path, folders: list[Path]) -> Labels:
    """A COCO json and where its images may lie; where it is none, its one fault says so."""
    try:
        document, faults = sound_rows(path, read_json(path))
    except UserError as problem:
        document, faults = {"images": [], "annotations": [], "categories": []}, [str(problem)]
    return Labels(Path(path), document, faults, folders)


def sound_rows(path, document, files: bool = True) -> tuple[dict, list[str]]:
    """The rows of a COCO json that can be used, and a line about each that cannot.

    With `files` the images need names and sizes and the categories names. Raises UserError for other content.
    """
    parts = ("images", "annotations", "categories")
    if not isinstance(document, dict):
        raise UserError(f"{path}: not COCO's format: it holds no object with {', '.join(parts)}")
    for part in parts:
        rows = document.get(part)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f'{path}: not COCO\'s format: it has no list of objects "{part}"')
        if not rows and part != "annotations":
            raise UserError(f'{path}: its list "{part}" is empty')
    faults, sound, known = [], dict(document), {}
    for part, check in (("images", _image_fault), ("categories", _category_fault)):
        sound[part], known[part] = [], set()
        for place, row in enumerate(document[part], 1):
            fault = _id_fault(part, place, row.get("id"), known[part]) or (check(row) if files else None)
            faults.append(f"{path}: {fault}") if fault else sound[part].append(row)
    usable = {part: {row["id"] for row in sound[part]} for part in known}
    sound["annotations"] = []
    for place, row in enumerate(document["annotations"], 1):
        fault = _annotation_fault(row, known["images"], known["categories"])
        if fault:
            name = f"annotation {row['id']}" if "id" in row else f"annotation number {place}"
            faults.append(f"{path}: {name} {fault}")
        elif row["image_id"] in usable["images"] and row["category_id"] in usable["categories"]:
            sound["annotations"].append(row)
    return sound, faults


def is_numbers(values, count: int) -> bool:
    """Whether `values`, read from json, is a list of `count` numbers."""
    return isinstance(values, list) and len(values) == count and all(type(value) in (int, float) for value in values)


def _id_fault(part: str, place: int, number, seen: set) -> str | None:
    if type(number) is not int:
        return f'number {place} of the {part} has no whole number as "id"'
    if number in seen:
        return f"two of the {part} have the id {number}; ids must be unique"
    seen.add(number)
    return None


def _image_fault(row: dict) -> str | None:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        return f'image {row["id"]} has no "file_name"'
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] in (os.pardir, os.curdir):
        return f"image {row['id']} has the file_name {name!r}, which leaves the folder of images"
    if not all(type(row.get(side)) is int and row[side] > 0 for side in ("width", "height")):
        return f'image {row["id"]} needs "width" and "height", whole numbers of pixels over 0'
    return None


def _category_fault(row: dict) -> str | None:
    return None if isinstance(row.get("name"), str) else f'category {row["id"]} has no "name"'


def _annotation_fault(row: dict, images: set, categories: set) -> str | None:
    if not is_numbers(row.get("bbox"), 4):
        return 'needs a "bbox" of 4 numbers, [x, y, width, height]'
    for key, known, part in (("image_id", images, "images"), ("category_id", categories, "categories")):
        if type(row.get(key)) is not int or row[key] not in known:
            return f"has the {key} {row.get(key)!r}, which is not among the {part}"
    marks = row.get("iscrowd", 0) in (0, 1) and row.get("difficult", 0) in (0, 1)
    if not marks or not is_numbers([row.get("area", 0)], 1):
        return 'needs a number as "area" and 0 or 1 as "iscrowd" (and as "difficult", if it is there)'
    return None


def _boxes_in_image(xywh: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut boxes (A, 4) xywh to their images' sizes (A, 2), H and W.

    Returns float32 xyxy (A, 4), usable (A,) bool, and cut (A,) bool: usable and shortened by more than a pixel.
    """
    xywh = np.where(np.isfinite(xywh).all(1, keepdims=True), xywh, 0)  # what is not finite becomes empty
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    boxes = np.clip(xyxy, 0, sizes[:, [1, 0, 1, 0]]).astype(np.float32)
    usable = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes, usable, usable & (np.abs(xyxy - boxes).max(1, initial=0) > 1)


def _folder_with_images(labels: Labels, names: list[str]) -> Path:
    """The first of the folders that holds the first image that is in any of them."""
    there = [folder for folder in labels.folders if folder.is_dir()]
    if not there:
        folder = labels.folders[0] if labels.folders else labels.source.parent
        raise UserError(f"{folder}: no such folder of images (for {labels.source}); name it with --images")
    folder = next((folder for name in names for folder in there if (folder / name).is_file()), None)
    if folder is None:
        tried = " and ".join(str(folder) for folder in there)
        raise UserError(f"{labels.source}: its image {names[0]} is not in {tried}; name the folder with --images")
    return folder


def _find_annotations(data: Path) -> tuple[Path | None, Path | None]:
    """The training json and, in a folder, the validation json beside it; None for what a folder does not have."""
    if not data.is_dir():
        return data, None
    found = []
    for part in ("train", "val"):
        jsons = sorted([*data.glob(f"instances_{part}*.json"), *data.glob(f"annotations/instances_{part}*.json")])
        if len(jsons) > 1:
            names = ", ".join(str(path.relative_to(data)) for path in jsons)
            raise UserError(f"{data}: several instances_{part}*.json ({names}); give the path of the one you mean")
        found += jsons or [None]
    return found[0], found[1]


def _image_folders(annotations: Path, images, around: list[Path]) -> list[Path]:
    """Where the images of a json may lie: in the folder given or around these jsons; folders of its name come first."""
    part = annotations.stem.removeprefix("instances_").removeprefix("image_info_")  # as in train2017
    bases = [Path(images)] if images else []
    bases += [path.parent.parent if path.parent.name == "annotations" else path.parent for path in around]
    named = [folder for base in bases for folder in (base / part, base / "images" / part)]
    return named + [folder for base in bases for folder in (base, base / "images")]


def _set_aside(whole: CocoDataset) -> tuple[Subset, Subset]:
    """Without a validation json, hold out a fifth of the images, the same in every run: (train, held out)."""
    if len(whole) < 2:
        raise UserError(f"{whole.annotations}: one image cannot be trained on and measured on; give a validation json")
    held_out = labelled_indices(len(whole), percent=20, fold=0)
    rest = sorted(set(range(len(whole))) - set(held_out))
    share = f"{len(held_out)} of its {len(whole)} images"
    print(f"{whole.annotations}: no validation images, so {share} are set aside to measure on", file=sys.stderr)
    return Subset(whole, rest), Subset(whole, held_out)


def category_faults(one: Labels, other: Labels) -> list[str]:
    """A line about each category id that does not mean the same in both."""
    ours, theirs = ({row["id"]: repr(row["name"]) for row in labels.document["categories"]} for labels in (one, other))
    pairs = [(key, ours.get(key, "missing"), theirs.get(key, "missing")) for key in sorted(ours.keys() | theirs.keys())]
    return [
        f"{one.source}: category {key} is {here}, but {there} in {other.source}; make them agree"
        for key, here, there in pairs
        if here != there
    ]
