"""Annotated images in COCO's format: a json with the boxes, perhaps a folder of unlabelled images.

    {"images": [{"id", "file_name", "width", "height"}],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height],
                      "area", "iscrowd", "difficult"}],
     "categories": [{"id", "name"}]}

A Pascal VOC or YOLO folder is read into the same rows (formats.py), so there is one data set class
for all. Category ids may have gaps; the labels 0..C-1 follow them in ascending order. A crowd
region (`iscrowd` 1) stays among the boxes and is marked in "crowd", a `difficult` object in
"difficult". An image may have no box at all. Boxes refer to the pixels as they are stored: a
rotation noted in an image's EXIF data is not applied, here as in COCO, unless the size that the
json declares is that of the rotated image.

Real files have defects: COCO's own training set holds two boxes of no height. A box that reaches
over the edge of its image is cut there. A box that is empty or wholly outside is dropped. One line
on stderr counts both. If more than one box in a hundred would be dropped, the file is refused.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch

from semidetr_lite.contracts import Target, View
from semidetr_lite.data.folds import labelled_in_manifest
from semidetr_lite.data.formats import Annotations, read_voc, read_yolo
from semidetr_lite.data.images import IMAGE_SUFFIXES, ImageFolder, read_image
from semidetr_lite.data.splits import (
    Concat,
    Dataset,
    Splits,
    Subset,
    WithoutLabels,
    labelled_indices,
)
from semidetr_lite.errors import UserError
from semidetr_lite.files import json_problems

__all__ = ["IMAGE_SUFFIXES", "CocoDataset", "ImageFolder", "load", "read_coco", "read_image"]
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
) -> Splits:
    """The splits of a data set on disk.

    Args:
        data, images, validation: as `find_annotations` takes them.
        unlabelled: a folder of images without labels, or a COCO json of such. Images that the
            annotations list are left out.
        percent: of the training images that are labelled. The others are unlabelled.
        fold: the number of the draw of labelled images, from 1.
        folds: a folder of folds with its manifest, to read the draw from.
        flip: whether a mirrored object is still the same.

    Returns:
        Splits whose tune and test split are both the validation images. If there are none, a fifth
        of the training images, always the same, is set aside, and one line on stderr says so.

    Raises UserError for data that cannot be used.
    """
    train_annotations, val_annotations = find_annotations(data, images, validation)
    whole = CocoDataset(train_annotations)
    datasets = [whole]
    train: Dataset = whole
    held_out: Dataset
    if val_annotations is None:
        train, held_out = _set_aside(whole)
    else:
        datasets.append(CocoDataset(val_annotations))
        held_out = datasets[1]
        for problem in category_problems(train_annotations, val_annotations):
            raise UserError(problem)
    if folds is None:
        labelled = labelled_indices(len(train), percent, fold)
    elif val_annotations is None:
        problem = "folds leave no image to evaluate on; give a json with --validation"
        raise UserError(f"{folds}: {problem}")
    else:
        labelled = labelled_in_manifest(folds, whole.image_ids, percent, fold)
    rest = sorted(set(range(len(train))) - set(labelled))
    pool: Dataset = WithoutLabels(train, rest)
    if unlabelled is not None:
        pool = Concat([pool, _unlabelled_images(unlabelled, datasets)])
    return Splits(
        labelled=Subset(train, labelled),
        unlabelled=pool,
        tune=held_out,
        test=held_out,
        categories=whole.categories,
        flip=flip,
    )


def _unlabelled_images(unlabelled, datasets: list["CocoDataset"]) -> ImageFolder:
    """The images of a folder, or of a json of images, that none of the data sets lists."""
    first_id = max(image_id for dataset in datasets for image_id in dataset.image_ids) + 1
    listed = {path for dataset in datasets for path in dataset.paths()}
    if Path(unlabelled).suffix != ".json":
        return ImageFolder(unlabelled, first_id, listed)
    image_dirs = _image_dirs(Path(unlabelled), None, [Path(unlabelled)])
    in_json = CocoDataset(unlabelled, image_dirs)
    return ImageFolder(in_json.image_dir, first_id, listed, in_json.paths())


def find_annotations(
    data, images=None, validation=None, categories: list[dict] | None = None
) -> tuple[Annotations, Annotations | None]:
    """The annotations to train on, and those to evaluate on or None.

    Args:
        data: a COCO json, its images in the folder `images`; or a folder of one of these kinds:

            COCO   instances_train*.json and perhaps instances_val*.json in it or in its
                   annotations/; the images in train2017/ and val2017/ (named as the jsons are),
                   in images/ or in the folder itself
            VOC    JPEGImages/, Annotations/*.xml and perhaps ImageSets/Main/*.txt; see `read_voc`
            YOLO   images/ and labels/ with data.yaml or classes.txt; see `read_yolo`

        images: the folder of the images.
        validation: a json or folder of the same kinds; it replaces what `data` has for validation.
        categories: [{"id", "name"}] that a VOC folder has to agree with.

    Raises UserError for what is not there.
    """
    data = Path(data)
    if images and not Path(images).is_dir():
        raise UserError(f"{images}: no such folder of images")
    train_json, val_json = _find_jsons(data)
    val = None
    if train_json is not None:
        around = [] if images else [train_json]
        train = read_annotations(train_json, _image_dirs(train_json, images, around))
        if val_json is not None and validation is None:
            val = read_annotations(val_json, _image_dirs(val_json, images, [val_json, train_json]))
    elif any(data.glob("Annotations/*.xml")):
        train, val = read_voc(data, images, categories)
    elif any(data.glob("labels/**/*.txt")) or any(data.glob("*/labels/*.txt")):
        train, val = read_yolo(data)
    else:
        coco = "no instances_train*.json in this folder or in its annotations/"
        advice = "give the path of a COCO json, or a COCO, VOC or YOLO folder"
        raise UserError(f"{data}: {coco}, no Annotations/*.xml, no labels/*.txt; {advice}")
    if validation is not None and Path(validation).is_dir():
        of_train, of_val = find_annotations(validation, categories=train.document["categories"])
        val = of_val or of_train
    elif validation is not None:
        around = [Path(validation), *filter(None, [train_json])]
        val = read_annotations(validation, _image_dirs(Path(validation), images, around))
    return train, val


class CocoDataset:
    """Labelled images: `dataset[i] -> (image uint8 (3, H, W), target)`, boxes in pixels, xyxy.

    Args:
        annotations: a json; or Annotations, which name their folders of images.
        images: for a json, its folder of images or a list of them. The first that holds an image of
            the json is taken.
        problems: a list that takes one line about each defect of the json; without it the first one
            is raised.

    Attributes:
        categories: [{"id", "name"}] in the order of the labels.
        sizes: [(H, W)] and `image_ids` [int], in the order of the json.
        fields: {"boxes" (A, 4) float32 xyxy, "labels", "crowd", "area", perhaps "difficult"},
            arrays over all boxes.

    Raises UserError: at opening for a defect of the json or a missing image, at reading for an
    image that cannot be decoded or has another size than the json says.
    """

    def __init__(self, annotations, images=(), problems: list[str] | None = None):
        image_dirs = [
            Path(folder) for folder in (images if isinstance(images, list | tuple) else [images])
        ]
        if not isinstance(annotations, Annotations):
            annotations = read_annotations(annotations, image_dirs)
        if problems is not None:
            problems += annotations.problems
        elif annotations.problems:
            raise UserError(annotations.problems[0])
        self.source = annotations.source
        self.upright = annotations.upright
        rows = annotations.document["images"]
        self.image_ids = [row["id"] for row in rows]
        self.sizes = [(row["height"], row["width"]) for row in rows]
        self.names = [row["file_name"] for row in rows]
        by_id = sorted(annotations.document["categories"], key=lambda row: row["id"])
        self.categories = [{"id": row["id"], "name": row["name"]} for row in by_id]
        self.image_dir = _dir_with_images(annotations, self.names)
        if problems is None:
            self._check_images_exist()
        self._store_boxes(annotations.document["annotations"], problems)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> View:
        target = self.target(index)
        path = self.image_dir / self.names[index]
        height, width = target["size"]
        image = read_image(path, self.upright)
        if image.shape[1:] == (width, height) and height != width:
            # the boxes may have been drawn on the image turned upright
            image = read_image(path, upright=True)
        if image.shape[1:] != (height, width):
            size = f"{image.shape[2]} x {image.shape[1]} pixels"
            raise UserError(
                f"{path}: the image is {size}, but {self.source} says {width} x {height}; "
                "use the images the boxes were drawn on"
            )
        return image, target

    def target(self, index: int) -> Target:
        """The target of one image, without decoding the image."""
        index = range(len(self))[index]  # -1 is the last one
        rows = slice(self._starts[index], self._starts[index + 1])
        fields = {name: torch.tensor(values[rows]) for name, values in self.fields.items()}
        size, image_id = self.sizes[index], self.image_ids[index]
        return cast(Target, {**fields, "size": size, "image_id": image_id})

    def paths(self) -> list[str]:
        """The image files, links resolved, so that two ways to one file compare equal."""
        return [os.path.realpath(os.path.join(self.image_dir, name)) for name in self.names]

    def _check_images_exist(self) -> None:
        folders = {os.path.dirname(name) for name in self.names}
        files_in = {
            folder: set(os.listdir(self.image_dir / folder))
            for folder in folders
            if (self.image_dir / folder).is_dir()
        }
        for name in self.names:
            folder, base = os.path.split(name)
            # A disk that ignores case may list another spelling of a file that is there.
            if base not in files_in.get(folder, ()) and not (self.image_dir / name).is_file():
                path = self.image_dir / name
                raise UserError(f"{path}: the image is missing, though {self.source} lists it")

    def _store_boxes(self, rows: list[dict], problems: list[str] | None) -> None:
        """Keep the boxes as flat arrays, image after image, which worker processes can share."""
        image_index = {image_id: index for index, image_id in enumerate(self.image_ids)}
        label_of = {category["id"]: label for label, category in enumerate(self.categories)}
        image_of = np.array([image_index[row["image_id"]] for row in rows], dtype=np.int64)
        xywh = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        sizes = np.array(self.sizes, dtype=np.float64).reshape(-1, 2)[image_of]
        boxes, usable, cut = _boxes_in_image(xywh, sizes)
        if problems is None:
            self._warn_about_boxes(rows, ~usable, cut)
        else:
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

    def _warn_about_boxes(self, rows: list[dict], dropped: np.ndarray, cut: np.ndarray) -> None:
        """One line on stderr that counts the boxes dropped and cut.

        Raises UserError for too many dropped.
        """
        if dropped.sum() > MAX_DROPPED_FRACTION * len(rows):
            defect = _count_and_first(
                rows, dropped, f"of {len(rows)} boxes are empty or outside their image"
            )
            advice = "correct or remove them (COCO's bbox is [x, y, width, height] in pixels)"
            raise UserError(f"{self.source}: {defect}; {advice}")
        notes = []
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


# Reading and checking a json


def read_coco(path) -> dict:
    """The content of a COCO json whose ids are checked: unique, and referring to each other.

    Raises UserError naming the file and its first problem.
    """
    document, problems = validate_coco(path, read_coco_json(path), with_files=False)
    for problem in problems:
        raise UserError(problem)
    return document


def read_annotations(path, image_dirs: list[Path]) -> Annotations:
    """A COCO json and where its images may lie; a file that is none has one problem and no rows."""
    try:
        document, problems = validate_coco(path, read_coco_json(path))
    except UserError as problem:
        document = {"images": [], "annotations": [], "categories": []}
        problems = [str(problem)]
    return Annotations(Path(path), document, problems, image_dirs)


def read_coco_json(path):
    """The content of a json without outlines. Raises UserError as `files.read_json` does.

    Outlines, the "segmentation" of an annotation, are cut from the text before it is parsed: they
    are two thirds of COCO's files, and nothing here uses them.
    """
    with json_problems(path), open(path, "rb") as file:
        return json.loads(b"".join(_without_outlines(file)).decode("utf-8-sig"))


OUTLINE = re.compile(rb'"segmentation"\s*:\s*\[[][\d\s.,eE+-]*\]')


def _without_outlines(file: BinaryIO) -> Iterator[bytes]:
    """The bytes of a json in large pieces, each outline replaced by an empty list."""
    rest = b""
    while block := file.read(1 << 24):
        whole, end, rest = (rest + block).rpartition(b"}")  # no outline holds a brace
        yield OUTLINE.sub(_empty_outline, whole) + end
    yield rest


def _empty_outline(outline: re.Match) -> bytes:
    newlines = b"\n" * outline[0].count(b"\n")  # so that an error names the right line
    return b'"segmentation":[' + newlines + b"]"


def validate_coco(path, document, with_files: bool = True) -> tuple[dict, list[str]]:
    """Check every row of a COCO json.

    Args:
        path: of the json, for messages.
        document: its content.
        with_files: whether images need names and sizes, and categories names.

    Returns:
        The document with the usable rows; one line about each row that is not.

    Raises UserError for content that is not in COCO's format at all.
    """
    _check_lists(path, document)
    problems: list[str] = []
    valid = dict(document)
    ids: dict[str, set] = {}  # of all rows, also of those that cannot be used
    for table, check in (("images", _image_problem), ("categories", _category_problem)):
        valid[table] = []
        ids[table] = set()
        for number, row in enumerate(document[table], 1):
            problem = _id_problem(table, number, row.get("id"), ids[table])
            if problem is None and with_files:
                problem = check(row)
            if problem is None:
                valid[table].append(row)
            else:
                problems.append(f"{path}: {problem}")
    valid_images = {row["id"] for row in valid["images"]}
    valid_categories = {row["id"] for row in valid["categories"]}
    valid["annotations"] = []
    for number, row in enumerate(document["annotations"], 1):
        problem = _annotation_problem(row, ids["images"], ids["categories"])
        if problem is not None:
            name = f"annotation {row['id']}" if "id" in row else f"annotation number {number}"
            problems.append(f"{path}: {name} {problem}")
        elif row["image_id"] in valid_images and row["category_id"] in valid_categories:
            valid["annotations"].append(row)
    return valid, problems


def _check_lists(path, document) -> None:
    """Raise UserError unless the document holds COCO's three lists of objects."""
    tables = ("images", "annotations", "categories")
    if not isinstance(document, dict):
        problem = f"it holds no object with {', '.join(tables)}"
        raise UserError(f"{path}: not COCO's format: {problem}")
    for table in tables:
        rows = document.get(table)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f'{path}: not COCO\'s format: it has no list of objects "{table}"')
        if not rows and table != "annotations":
            raise UserError(f'{path}: its list "{table}" is empty')


def is_numbers(values, count: int) -> bool:
    """Whether `values`, read from json, is a list of `count` numbers."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) for value in values)
    )


def _id_problem(table: str, number: int, row_id, earlier: set) -> str | None:
    """What is wrong with the id of a row, or None; a good id is added to the `earlier` ones."""
    if type(row_id) is not int:
        return f'number {number} of the {table} has no whole number as "id"'
    if row_id in earlier:
        return f"two of the {table} have the id {row_id}; ids must be unique"
    earlier.add(row_id)
    return None


def _image_problem(row: dict) -> str | None:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        return f'image {row["id"]} has no "file_name"'
    top = os.path.normpath(name).split(os.sep)[0]
    if os.path.isabs(name) or top in (os.pardir, os.curdir):
        return f"image {row['id']} has the file_name {name!r}, which leaves the folder of images"
    if not all(type(row.get(side)) is int and row[side] > 0 for side in ("width", "height")):
        return f'image {row["id"]} needs "width" and "height", whole numbers of pixels over 0'
    return None


def _category_problem(row: dict) -> str | None:
    return None if isinstance(row.get("name"), str) else f'category {row["id"]} has no "name"'


def _annotation_problem(row: dict, image_ids: set, category_ids: set) -> str | None:
    if not is_numbers(row.get("bbox"), 4):
        return 'needs a "bbox" of 4 numbers, [x, y, width, height]'
    for key, ids, table in (
        ("image_id", image_ids, "images"),
        ("category_id", category_ids, "categories"),
    ):
        if type(row.get(key)) is not int or row[key] not in ids:
            return f"has the {key} {row.get(key)!r}, which is not among the {table}"
    marks = row.get("iscrowd", 0) in (0, 1) and row.get("difficult", 0) in (0, 1)
    if not marks or not is_numbers([row.get("area", 0)], 1):
        return (
            'needs a number as "area" and 0 or 1 as "iscrowd" (and as "difficult", if it is there)'
        )
    return None


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


# Where things lie


def _dir_with_images(annotations: Annotations, names: list[str]) -> Path:
    """The first of the folders that holds the first image that is in any of them.

    Raises UserError for none.
    """
    source = annotations.source
    existing = [folder for folder in annotations.image_dirs if folder.is_dir()]
    if not existing:
        folder = annotations.image_dirs[0] if annotations.image_dirs else source.parent
        raise UserError(f"{folder}: no such folder of images (for {source}); name it with --images")
    for name in names:
        for folder in existing:
            if (folder / name).is_file():
                return folder
    tried = " and ".join(str(folder) for folder in existing)
    problem = f"its image {names[0]} is not in {tried}"
    raise UserError(f"{source}: {problem}; name the folder with --images")


def _find_jsons(data: Path) -> tuple[Path | None, Path | None]:
    """The training json and, in a folder, the validation json beside it; None for a missing one."""
    if not data.is_dir():
        return data, None
    jsons: list[Path | None] = []
    for split in ("train", "val"):
        pattern = f"instances_{split}*.json"
        matches = sorted([*data.glob(pattern), *data.glob(f"annotations/{pattern}")])
        if len(matches) > 1:
            names = ", ".join(str(path.relative_to(data)) for path in matches)
            advice = "give the path of the one you mean"
            raise UserError(f"{data}: several {pattern} ({names}); {advice}")
        jsons.append(matches[0] if matches else None)
    return jsons[0], jsons[1]


def _image_dirs(annotations: Path, images, around: list[Path]) -> list[Path]:
    """Where the images of a json may lie: in `images` or around these jsons; its name first."""
    split = annotations.stem.removeprefix("instances_").removeprefix("image_info_")  # train2017
    bases = [Path(images)] if images else []
    for json_path in around:
        folder = json_path.parent
        bases.append(folder.parent if folder.name == "annotations" else folder)
    named = [folder for base in bases for folder in (base / split, base / "images" / split)]
    return named + [folder for base in bases for folder in (base, base / "images")]


def _set_aside(whole: CocoDataset) -> tuple[Subset, Subset]:
    """Hold out a fifth of the images, the same in every run: (train, held out)."""
    if len(whole) < 2:
        problem = "one image cannot be trained on and evaluated on"
        raise UserError(f"{whole.source}: {problem}; give a validation json")
    held_out = labelled_indices(len(whole), percent=20, fold=0)
    rest = sorted(set(range(len(whole))) - set(held_out))
    count = f"{len(held_out)} of its {len(whole)} images"
    message = f"no validation images, so {count} are set aside to evaluate on"
    print(f"{whole.source}: {message}", file=sys.stderr)
    return Subset(whole, rest), Subset(whole, held_out)
