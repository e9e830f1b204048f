"""Any data in COCO's format: a json with the boxes, a folder with the images, perhaps a folder of unlabelled images.

    {"images": [{"id", "file_name", "width", "height"}],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height], "area", "iscrowd"}],
     "categories": [{"id", "name"}]}

Category ids may have gaps; the labels 0..C-1 follow them in ascending order. A crowd region (`iscrowd` 1) stays among
the boxes and is marked in "crowd"; an image may have no box at all. Boxes refer to the pixels as they are stored, so a
rotation noted in an image's EXIF data is not applied, here as in COCO.

Real files are not spotless: COCO's own training set holds two boxes of no height. A box that reaches over the edge of
its image is cut there; one that is empty or wholly outside is dropped; one line on stderr counts both. Where more than
one box in a hundred would be dropped, the whole file is in doubt and is refused.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from semidetr_lite.data.splits import Joined, Splits, Subset, Unlabelled, labelled_indices
from semidetr_lite.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
DROPPED_AT_MOST = 0.01  # of the boxes of a file


def load(data, images=None, unlabelled=None, percent: float = 10, fold: int = 1, validation=None) -> Splits:
    """The splits of a COCO-format data set.

    `data` is a json, its images in the folder `images`; or a folder with instances_train*.json and perhaps
    instances_val*.json in it or in its annotations/, and the images in train2017/ and val2017/ (named as the jsons
    are), in images/ or in the folder itself. Of the training images `percent` % are labelled, drawn by `fold`; the
    others are unlabelled, and so is every image in the folder `unlabelled` that the jsons do not list. The json
    `validation`, given or found, is both tune and test. Where there is none, a fifth of the training images, always
    the same, is set aside for it, and a line on stderr says so. Raises UserError for what cannot be used.
    """
    annotations, found = _find_annotations(Path(data))
    validation = found if validation is None else Path(validation)
    if images and not Path(images).is_dir():
        raise UserError(f"{images}: no such folder of images")
    near = [] if images else [annotations]
    train = whole = CocoDataset(annotations, _image_folders(annotations, images, around=near))
    opened = [whole]
    if validation is None:
        train, held_out = _set_aside(whole, annotations)
    else:
        held_out = CocoDataset(validation, _image_folders(validation, images, around=[validation, annotations]))
        _check_same_categories(held_out, whole)
        opened.append(held_out)

    chosen = labelled_indices(len(train), percent, fold)
    pool = Unlabelled(train, sorted(set(range(len(train))) - set(chosen)))
    if unlabelled is not None:
        first_id = max(image_id for dataset in opened for image_id in dataset.image_ids) + 1
        listed = {path for dataset in opened for path in dataset.paths()}
        pool = Joined([pool, ImageFolder(unlabelled, first_id=first_id, listed=listed)])
    return Splits(Subset(train, chosen), pool, held_out, held_out, whole.categories, flip=True)


class CocoDataset:
    """The images of one COCO json: `ds[i] -> (image uint8 (3, H, W), target)`, the targets with boxes in pixels, xyxy.

    `annotations` is the json, `images` a folder, or a list of them: the first that holds the json's first image is
    taken. `.categories` [{"id", "name"}] in the order of the labels; `.sizes` [(H, W)] and `.image_ids` [int] in the
    order of the json. Raises UserError: at opening for a fault of the json or a missing image, at reading for an image
    that cannot be decoded or has another size than the json says.
    """

    def __init__(self, annotations, images):
        self.annotations = Path(annotations)
        document = read_coco(self.annotations)
        listed = document["images"]
        _check_images(self.annotations, listed)
        _check_names(self.annotations, document["categories"])
        self.image_ids = [image["id"] for image in listed]
        self.sizes = [(image["height"], image["width"]) for image in listed]
        by_id = sorted(document["categories"], key=lambda row: row["id"])
        self.categories = [{"id": row["id"], "name": row["name"]} for row in by_id]
        self.names = [image["file_name"] for image in listed]
        folders = images if isinstance(images, list) else [images]
        self.folder = _folder_with_images([Path(folder) for folder in folders], self.names, self.annotations)
        self._keep_boxes(document["annotations"])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        target = self.target(index)
        path = self.folder / self.names[index]
        image = read_image(path)
        height, width = image.shape[1:]
        if (height, width) != target["size"]:
            raise UserError(
                f"{path}: the image is {width} x {height} pixels, but {self.annotations} says "
                f"{target['size'][1]} x {target['size'][0]}; use the images the boxes were drawn on"
            )
        return image, target

    def target(self, index: int) -> dict:
        """The target of one image, without decoding the image."""
        index = range(len(self))[index]  # -1 is the last one
        rows = slice(self._starts[index], self._starts[index + 1])
        fields = {name: torch.tensor(values[rows]) for name, values in self._rows.items()}
        return {**fields, "size": self.sizes[index], "image_id": self.image_ids[index]}

    def paths(self) -> list[str]:
        """Where the images lie, links of the folder resolved, so that two ways to the same file compare equal."""
        folder = os.path.realpath(self.folder)
        return [os.path.normpath(os.path.join(folder, name)) for name in self.names]

    def _keep_boxes(self, rows: list[dict]) -> None:
        """Store the boxes as flat arrays, image after image: a few large objects, which worker processes can share."""
        place = {image_id: index for index, image_id in enumerate(self.image_ids)}
        label = {category["id"]: index for index, category in enumerate(self.categories)}
        owner = np.array([place[row["image_id"]] for row in rows], dtype=np.int64)
        xywh = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        sizes = np.array(self.sizes, dtype=np.float64).reshape(-1, 2)[owner]
        boxes, usable, cut = _boxes_in_image(xywh, sizes)
        _report_boxes(self.annotations, rows, ~usable, cut)

        own_area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        area = np.array([row.get("area", np.nan) for row in rows], dtype=np.float32)
        fields = {
            "boxes": boxes,
            "labels": np.array([label[row["category_id"]] for row in rows], dtype=np.int64),
            "crowd": np.array([bool(row.get("iscrowd", 0)) for row in rows], dtype=bool),
            "area": np.where(np.isfinite(area), area, own_area),
        }
        order = np.flatnonzero(usable)
        order = order[owner[order].argsort(kind="stable")]
        self._rows = {name: values[order] for name, values in fields.items()}
        self._starts = np.searchsorted(owner[order], np.arange(len(self.names) + 1))


class ImageFolder:
    """The images in a folder and below it, sorted by path, without labels: `ds[i] -> (image, {"size", "image_id"})`.

    Image ids count from `first_id`. Files among `listed` (paths as `CocoDataset.paths` gives them) are passed over: an
    image that is labelled or measured on is not unlabelled as well. Opening reads the headers alone, for `.sizes`.
    Raises UserError for a missing folder, one without any image, and an image that cannot be read.
    """

    def __init__(self, folder, first_id: int = 0, listed=frozenset()):
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of images")
        real = os.path.realpath(folder)
        found = sorted(path for path in folder.rglob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES)
        self.paths = [path for path in found if os.path.join(real, path.relative_to(folder)) not in listed]
        if not found:
            raise UserError(f"{folder}: no image in this folder or below ({' '.join(IMAGE_SUFFIXES)})")
        if not self.paths:
            raise UserError(f"{folder}: the annotations list every image of this folder; none is left as unlabelled")
        if len(self.paths) < len(found):
            count = f"{len(found) - len(self.paths)} of its {len(found)} images"
            print(f"{folder}: {count} are in the annotations and not taken as unlabelled", file=sys.stderr)
        self.first_id = first_id
        self.sizes = [_header_size(path) for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        index = range(len(self))[index]  # -1 is the last one
        return read_image(self.paths[index]), {"size": self.sizes[index], "image_id": self.first_id + index}


def read_image(path) -> torch.Tensor:
    """An image file as RGB uint8 (3, H, W), rotation by EXIF data not applied. Raises UserError naming the file."""
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are of mode {file.mode}; save it with 8 bits per channel")
            pixels = np.array(file.convert("RGB"))
    except Exception as problem:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more, by format
        raise _unreadable(path, problem) from problem
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # (H, W, 3) -> (3, H, W)


def read_json(path):
    """The content of a json file. Raises UserError naming the file and where it stops being json."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as problem:
        raise UserError(f"{path}: cannot be read: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path}: not valid json: {problem}") from problem


def read_coco(path) -> dict:
    """The content of a COCO json, its ids checked: there, unique and known. Raises UserError naming the file."""
    document = read_json(path)
    parts = ("images", "annotations", "categories")
    if not isinstance(document, dict):
        raise UserError(f"{path}: not COCO's format: it holds no object with {', '.join(parts)}")
    for part in parts:
        rows = document.get(part)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f'{path}: not COCO\'s format: it has no list of objects "{part}"')
        if not rows and part != "annotations":
            raise UserError(f'{path}: its list "{part}" is empty')
        if part != "annotations":
            _check_ids(path, part, rows)
    _check_annotations(path, document)
    return document


def is_numbers(values, count: int) -> bool:
    """Whether `values`, read from json, is a list of `count` numbers."""
    return isinstance(values, list) and len(values) == count and all(type(value) in (int, float) for value in values)


def _check_ids(path, part: str, rows: list[dict]) -> None:
    seen = set()
    for place, row in enumerate(rows, 1):
        number = row.get("id")
        if type(number) is not int:
            raise UserError(f'{path}: number {place} of the {part} has no whole number as "id"')
        if number in seen:
            raise UserError(f"{path}: two of the {part} have the id {number}; ids must be unique")
        seen.add(number)


def _check_images(path, rows: list[dict]) -> None:
    for row in rows:
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise UserError(f'{path}: image {row["id"]} has no "file_name"')
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] in (os.pardir, os.curdir):
            raise UserError(f"{path}: image {row['id']} has the file_name {name!r}, which leaves the folder of images")
        if not all(type(row.get(side)) is int and row[side] > 0 for side in ("width", "height")):
            raise UserError(f'{path}: image {row["id"]} needs "width" and "height", whole numbers of pixels over 0')


def _check_names(path, categories: list[dict]) -> None:
    for row in categories:
        if not isinstance(row.get("name"), str):
            raise UserError(f'{path}: category {row["id"]} has no "name"')


def _check_annotations(path, document: dict) -> None:
    images = {row["id"] for row in document["images"]}
    categories = {row["id"] for row in document["categories"]}
    for place, row in enumerate(document["annotations"], 1):
        name = f"annotation {row['id']}" if "id" in row else f"annotation number {place}"
        if not is_numbers(row.get("bbox"), 4):
            raise UserError(f'{path}: {name} needs a "bbox" of 4 numbers, [x, y, width, height]')
        for key, known, part in (("image_id", images, "images"), ("category_id", categories, "categories")):
            if type(row.get(key)) is not int or row[key] not in known:
                raise UserError(f"{path}: {name} has the {key} {row.get(key)!r}, which is not among the {part}")
        if not is_numbers([row.get("area", 0)], 1) or row.get("iscrowd", 0) not in (0, 1):
            raise UserError(f'{path}: {name} needs a number as "area" and 0 or 1 as "iscrowd"')


def _boxes_in_image(xywh: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut boxes (A, 4) xywh to their images' sizes (A, 2), H and W.

    Returns float32 xyxy (A, 4), usable (A,) bool, and cut (A,) bool: usable and shortened by more than a pixel.
    """
    xywh = np.where(np.isfinite(xywh).all(1, keepdims=True), xywh, 0)  # what is not finite becomes empty
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    boxes = np.clip(xyxy, 0, sizes[:, [1, 0, 1, 0]]).astype(np.float32)
    usable = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes, usable, usable & (np.abs(xyxy - boxes).max(1, initial=0) > 1)


def _report_boxes(path, rows: list[dict], dropped: np.ndarray, cut: np.ndarray) -> None:
    """One line on stderr about boxes dropped or cut; a UserError where too many would have to be dropped."""

    def first(chosen: np.ndarray) -> str:
        place = int(chosen.argmax())
        return f"first: annotation {rows[place].get('id', f'number {place + 1}')}"

    if dropped.sum() > DROPPED_AT_MOST * len(rows):
        raise UserError(
            f"{path}: {dropped.sum()} of {len(rows)} boxes are empty or outside their image ({first(dropped)}); "
            "correct or remove them (COCO's bbox is [x, y, width, height] in pixels)"
        )
    notes = []
    if dropped.any():
        notes.append(f"{dropped.sum()} boxes empty or outside their image are dropped ({first(dropped)})")
    if cut.any():
        notes.append(f"{cut.sum()} boxes that reach out of their image are cut at its edge ({first(cut)})")
    if notes:
        print(f"warning: {path}: {'; '.join(notes)}", file=sys.stderr)


def _folder_with_images(folders: list[Path], names: list[str], annotations: Path) -> Path:
    """The first folder that holds the first image; the others are then looked up in its listing."""
    there = [folder for folder in folders if folder.is_dir()]
    if not there:
        raise UserError(f"{folders[0]}: no such folder of images (for {annotations}); name it with --images")
    folder = next((folder for folder in there if (folder / names[0]).is_file()), None)
    if folder is None:
        tried = " and ".join(str(folder) for folder in there)
        raise UserError(f"{annotations}: its image {names[0]} is not in {tried}; name the folder with --images")
    listings: dict[str, set] = {}
    for name in names:
        parent, base = os.path.split(name)
        if parent not in listings:
            listings[parent] = set(os.listdir(folder / parent)) if (folder / parent).is_dir() else set()
        # A disk that ignores case may list another spelling of a file that is there.
        if base not in listings[parent] and not (folder / name).is_file():
            raise UserError(f"{folder / name}: the image is missing, though {annotations} lists it")
    return folder


def _find_annotations(data: Path) -> tuple[Path, Path | None]:
    """The training json and, in a folder, the validation json beside it."""
    if not data.is_dir():
        return data, None
    found = {}
    for part in ("train", "val"):
        jsons = sorted([*data.glob(f"instances_{part}*.json"), *data.glob(f"annotations/instances_{part}*.json")])
        if len(jsons) > 1:
            names = ", ".join(str(path.relative_to(data)) for path in jsons)
            raise UserError(f"{data}: several instances_{part}*.json ({names}); give the path of the one you mean")
        found[part] = jsons[0] if jsons else None
    if found["train"] is None:
        raise UserError(f"{data}: no instances_train*.json in this folder or in its annotations/; give its path")
    return found["train"], found["val"]


def _image_folders(annotations: Path, images, around: list[Path]) -> list[Path]:
    """Where the images of a json may lie: in the folder given or around these jsons; folders of its name come first."""
    part = annotations.stem.removeprefix("instances_")  # as in train2017
    bases = [Path(images)] if images else []
    bases += [path.parent.parent if path.parent.name == "annotations" else path.parent for path in around]
    named = [folder for base in bases for folder in (base / part, base / "images" / part)]
    return named + [folder for base in bases for folder in (base, base / "images")]


def _set_aside(whole: CocoDataset, annotations: Path) -> tuple[Subset, Subset]:
    """Without a validation json, hold out a fifth of the images, the same in every run: (train, held out)."""
    if len(whole) < 2:
        raise UserError(f"{annotations}: one image cannot be trained on and measured on; give a validation json")
    held_out = labelled_indices(len(whole), percent=20, fold=0)
    rest = sorted(set(range(len(whole))) - set(held_out))
    share = f"{len(held_out)} of its {len(whole)} images"
    print(f"{annotations}: no validation json, so {share} are set aside to measure on", file=sys.stderr)
    return Subset(whole, rest), Subset(whole, held_out)


def _check_same_categories(one: CocoDataset, other: CocoDataset) -> None:
    """Labels mean the same in both jsons, or UserError about the first category that differs."""
    ours, theirs = ({row["id"]: row["name"] for row in dataset.categories} for dataset in (one, other))
    for category in sorted(ours.keys() | theirs.keys()):
        if ours.get(category) != theirs.get(category):
            here, there = (repr(names[category]) if category in names else "missing" for names in (ours, theirs))
            raise UserError(
                f"{one.annotations}: category {category} is {here}, but {there} in {other.annotations}; make them agree"
            )


def _header_size(path) -> tuple[int, int]:
    """(H, W) of an image file from its header alone."""
    try:
        with Image.open(path) as file:
            return file.height, file.width
    except Exception as problem:  # as in read_image
        raise _unreadable(path, problem) from problem


def _unreadable(path, problem: Exception) -> UserError:
    reason = getattr(problem, "strerror", None) or " ".join(str(problem).split()) or type(problem).__name__
    return UserError(f"{path}: not a readable image: {reason}")
