"""What labelling tools write: one reader that recognises the layout of a data set.

    COCO      a json; or a folder with instances_train*.json [instances_val*.json] in it or in its
              annotations/, and the images in train2017/ (named as the json is), images/ or there
    Roboflow  train/_annotations.coco.json beside its images, valid/, test/
    CVAT      annotations/instances_default.json, images/default/
    Label Studio, FiftyOne and others: a folder with one json of COCO's form, whatever its name
    VOC       an XML file for each image, also beside the images (labelImg): see `read_voc`
    YOLO      images/ and labels/ with data.yaml or classes.txt: see `read_yolo`

Every layout becomes `Annotations`, the rows of a COCO json, and from there on is the same.
"""

import json
import os
from pathlib import Path

from semidetr_lite.data.coco_json import read_annotations
from semidetr_lite.data.formats import (
    SPLIT_NAMES,
    Annotations,
    find_class_names,
    read_voc,
    read_yolo,
)
from semidetr_lite.data.images import files_below
from semidetr_lite.errors import UserError

KINDS = "a COCO json, or a COCO, VOC or YOLO folder"
SNIFFED = 1 << 20  # bytes at each end of a json that are searched for COCO's "images"
# jsons that lie beside the instances of COCO and hold something else
OTHER_JSONS = ("image_info", "captions", "person_keypoints", "stuff", "panoptic", "unlabel")


def find_annotations(
    data, images=None, validation=None, categories: list[dict] | None = None
) -> tuple[Annotations, Annotations | None]:
    """The annotations to train on, and those to evaluate on or None.

    Args:
        data: a COCO json, its images in the folder `images`; or a folder in one of the layouts
            above; or the data.yaml of a YOLO folder.
        images: the folder of the images.
        validation: a json or folder of the same kinds; it replaces what `data` has for validation.
        categories: [{"id", "name"}] that a VOC folder has to agree with.

    Raises UserError for what is not there.
    """
    data = Path(data)
    if images and not Path(images).is_dir():
        raise UserError(f"{images}: no such folder of images")
    if data.suffix.lower() in (".yaml", ".yml") and data.is_file():
        data = data.parent
    train_json, val_json = find_jsons(data)
    val = None
    if train_json is not None:
        around = [] if images else [train_json]
        train = read_annotations(train_json, image_dirs(train_json, images, around))
        if val_json is not None and validation is None:
            val = read_annotations(val_json, image_dirs(val_json, images, [val_json, train_json]))
    elif next(files_below(data, ".xml"), None):
        train, val = read_voc(data, images, categories)
    elif _is_yolo(data):
        train, val = read_yolo(data)
    else:
        coco = "no instances_train*.json or other COCO json in this folder or in its annotations/"
        advice = f"give the path of {KINDS}"
        raise UserError(f"{data}: {coco}, no VOC .xml, no YOLO labels/*.txt; {advice}")
    if validation is not None and Path(validation).is_dir():
        of_train, of_val = find_annotations(validation, categories=train.document["categories"])
        val = of_val or of_train
    elif validation is not None:
        around = [Path(validation), *filter(None, [train_json])]
        val = read_annotations(validation, image_dirs(Path(validation), images, around))
    return train, val


def _is_yolo(folder: Path) -> bool:
    """Whether a folder has text files of labels: below labels/, or beside images with classes."""
    label_files = (
        path for path in map(Path, files_below(folder, ".txt")) if "labels" in path.parts[:-1]
    )
    return next(label_files, None) is not None or find_class_names(folder) is not None


def find_jsons(data: Path) -> tuple[Path | None, Path | None]:
    """The training json and, in a folder, the validation json; None for a missing one.

    Raises UserError where several may be meant.
    """
    if not data.is_dir():
        return data, None
    by_split: dict[str, list[Path]] = {"train": [], "val": [], "test": [], "all": []}
    for split in ("train", "val"):
        pattern = f"instances_{split}*.json"
        by_split[split] = sorted([*data.glob(pattern), *data.glob(f"annotations/{pattern}")])
    if not by_split["train"]:
        for path in _coco_jsons(data):
            by_split[_split_of_json(path, data)].append(path)
        by_split = {split: list(dict.fromkeys(paths)) for split, paths in by_split.items()}
    train = by_split["train"] or by_split["all"]
    val = by_split["val"] or by_split["test"]
    for paths in (train, val if train else []):
        if len(paths) > 1:
            names = ", ".join(str(path.relative_to(data)) for path in paths)
            problem = f"several jsons that may be meant ({names})"
            raise UserError(f"{data}: {problem}; give the path of the one you mean")
    return (train[0], val[0] if val else None) if train else (None, None)


def _coco_jsons(data: Path) -> list[Path]:
    """The jsons of COCO's form in a folder, its annotations/ and the folders of its splits."""
    folders = [data]
    for path in sorted(data.iterdir()):
        name = path.name.lower()
        is_split = name.rstrip("0123456789") in SPLIT_NAMES
        if path.is_dir() and (is_split or name in ("annotations", "labels", "json")):
            folders.append(path)
    jsons = [path for folder in folders for path in sorted(folder.glob("[!.]*.json"))]
    return [
        path
        for path in jsons
        if not any(word in path.name for word in OTHER_JSONS) and _looks_like_coco(path)
    ]


def _looks_like_coco(path: Path) -> bool:
    """Whether a json seems to have a list of images, without parsing a large one."""
    with open(path, "rb") as file:
        text = file.read(SNIFFED)
        size = os.fstat(file.fileno()).st_size
        if size > 2 * SNIFFED:
            file.seek(-SNIFFED, os.SEEK_END)
        text += file.read()
    if b'"images"' not in text:
        return False
    if size > 2 * SNIFFED:
        return True
    try:
        return isinstance(json.loads(text.decode("utf-8-sig")).get("images"), list)
    except (ValueError, AttributeError, RecursionError):
        return True  # a damaged one: reading it says what is wrong


def _split_of_json(path: Path, data: Path) -> str:
    """The split that the name of a json or its folder tells, or "all"."""
    words = "".join(letter if letter.isalpha() else " " for letter in path.stem.lower()).split()
    folders = path.relative_to(data).parts[:-1]
    for word in [*words, *(folder.lower().rstrip("0123456789") for folder in folders)]:
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return "all"


def image_dirs(annotations: Path, images, around: list[Path]) -> list[Path]:
    """Where the images of a json may lie: in `images` or around these jsons; its name first."""
    split = annotations.stem.removeprefix("instances_").removeprefix("image_info_")  # train2017
    bases = [Path(images)] if images else []
    for json_path in around:
        folder = json_path.parent
        above = folder.name.lower() in ("annotations", "labels", "json")
        bases.append(folder.parent if above else folder)
    named = [folder for base in bases for folder in (base / split, base / "images" / split)]
    return named + [folder for base in bases for folder in (base, base / "images")]
