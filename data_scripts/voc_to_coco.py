"""Pascal VOC to COCO's format: one json of boxes for each set of images, the photographs stay where they are.

    python data_scripts/voc_to_coco.py data/voc/VOCdevkit
        writes VOCdevkit/annotations/instances_train.json (VOC07 trainval, labelled), instances_val.json (VOC07 test)
        and image_info_unlabeled.json (VOC12 trainval, no boxes): the setting of the paper. Then
        semidetr train --data data/voc/VOCdevkit --percent 100 ...
    python data_scripts/voc_to_coco.py data/voc/VOCdevkit --train VOC2007/trainval --train VOC2012/trainval
    python data_scripts/voc_to_coco.py FOLDER --classes found
        your own XML files, in FOLDER/Annotations or FOLDER, their images in FOLDER/JPEGImages or FOLDER

A set is [FOLDER/]NAME, listed in FOLDER/ImageSets/Main/NAME.txt, or FOLDER/all for every XML file. Without a --val, a
fifth of the images is set aside in training.

Boxes. VOC's corners are pixels counted from 1, and both belong to the box: in the official evaluation a box has
xmax - xmin + 1 columns. So bbox is [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]: the box from the left edge
of its first pixel to the right edge of its last one, and every IoU is the official one, in COCO's AP as in VOC's.
(Released code of Semi-DETR and mmdetection subtracts 1 from all four corners, so its boxes are a pixel smaller.)

Difficult objects have "difficult": 1 and also "iscrowd": 1, as in the released code. They are then neither trained on
nor missed: pycocotools knows no other way to leave a box out of AP (its own "ignore" it overwrites with "iscrowd").
COCO's AP is lenient with such a box: any number of detections that lie in it go uncounted. VOC's AP
(semidetr_lite.evaluate.evaluate_voc) follows the official rule for difficult boxes.

Only <object> right below <annotation> is an object; the <part> of one (head, hand, foot) is not. Where <size> is
missing or 0, the image is opened for it. Categories have the ids 1..20 in alphabetical order. An image's id is the
digits of its name (2007_000027: 2007000027) where all names allow that, else its place in the list.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from _script import run, write_json

from semidetr_lite.data.coco import DROPPED_AT_MOST
from semidetr_lite.data.formats import voc_annotation
from semidetr_lite.data.images import IMAGE_SUFFIXES, header_size
from semidetr_lite.errors import UserError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
PAPER = {"train": ["VOC2007/trainval"], "val": ["VOC2007/test"], "unlabelled": ["VOC2012/trainval"]}
FILES = {"train": "instances_train.json", "val": "instances_val.json", "unlabelled": "image_info_unlabeled.json"}


def main(argv=None) -> int:
    """Write the jsons; the exit status is 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the VOCdevkit folder, or a folder of XML files and images")
    for part in FILES:
        parser.add_argument(f"--{part}", action="append", metavar="SET", help="may be repeated: the sets are joined")
    parser.add_argument("--classes", help='names with commas between, or "found" for those in the files (default: VOC)')
    parser.add_argument("--out", type=Path, help="folder of the jsons (default: DATA/annotations)")
    return run(_work, parser.parse_args(argv))


def _work(options) -> None:
    data = options.data
    if not data.is_dir():
        raise UserError(f"{data}: no such folder")
    sets = {part: getattr(options, part) for part in FILES}
    if not any(sets.values()):
        sets = PAPER if (data / "VOC2007").is_dir() else {"train": ["all"], "val": None, "unlabelled": None}
    listed = {part: [item for name in names for item in images_of(data, name)] for part, names in sets.items() if names}
    check_apart(listed)
    read = {
        part: [read_image(*item, data, with_boxes=part != "unlabelled") for item in listed[part]] for part in listed
    }
    categories = choose_classes(options.classes, read)
    ids = image_ids([path for part in read.values() for path, *_ in part])
    for part, images in read.items():
        path = (options.out or data / "annotations") / FILES[part]
        document = as_coco(images, categories, ids, path)
        write_json(path, document)
        difficult = sum(row["difficult"] for row in document["annotations"])
        boxes = f", {len(document['annotations'])} boxes, {difficult} of them difficult" if part != "unlabelled" else ""
        print(f"{path}: {len(images)} images{boxes}")


def images_of(data: Path, name: str) -> list[tuple[Path, str]]:
    """[(folder, name without suffix)] of the images of a set, [FOLDER/]NAME. Raises UserError for one without any."""
    below, _, name = name.rpartition("/")
    folder = data / below
    if name == "all":
        stems = sorted(path.stem for path in _xml_folder(folder).glob("[!.]*.xml"))
        if not stems:
            raise UserError(f"{_xml_folder(folder)}: no XML file in this folder")
        return [(folder, stem) for stem in stems]
    listing = folder / "ImageSets" / "Main" / f"{name}.txt"
    if not listing.is_file():
        raise UserError(
            f"{listing}: no such list of images; a set is FOLDER/NAME as in VOC2007/trainval, or FOLDER/all"
        )
    lines = listing.read_text(encoding="utf-8").split("\n")
    stems = [line.split()[0] for line in lines if line.strip()]  # a second column would say which class is there
    for stem, count in Counter(stems).items():
        if count > 1 or "/" in stem or "\\" in stem:
            raise UserError(f"{listing}: {stem!r} is {'listed twice' if count > 1 else 'not a plain name'}")
    if not stems:
        raise UserError(f"{listing}: the list is empty")
    return [(folder, stem) for stem in stems]


def _xml_folder(folder: Path) -> Path:
    return folder / "Annotations" if (folder / "Annotations").is_dir() else folder


def check_apart(listed: dict[str, list]) -> None:
    """Raise UserError where an image is in two sets, or twice in one: a validation image must not be trained on."""
    seen = {}
    for part, items in listed.items():
        for folder, stem in items:
            if (folder, stem) in seen:
                raise UserError(f"{folder / stem}: is in the sets --{seen[folder, stem]} and --{part}; leave one out")
            seen[folder, stem] = part


def read_image(folder: Path, stem: str, data: Path, with_boxes: bool) -> tuple[Path, int, int, list, Path]:
    """(path below `data`, width, height, objects, XML file); an object is (class, [x, y, width, height], difficult).

    Without boxes an XML file need not exist, and its objects are not read. Raises UserError.
    """
    xml = _xml_folder(folder) / f"{stem}.xml"
    try:
        stated = ElementTree.parse(xml).getroot().findtext("filename") if with_boxes or xml.is_file() else None
        image = _image_file(folder, stem, stated)
        (height, width), objects = voc_annotation(xml, image) if with_boxes else (header_size(image), [])
    except FileNotFoundError:
        raise UserError(f"{xml}: is missing, though the set lists it") from None
    except ElementTree.ParseError as problem:
        raise UserError(f"{xml}: not valid XML: {problem}") from None
    except ValueError as problem:
        raise problem if isinstance(problem, UserError) else UserError(f"{xml}: {problem}") from None
    return image.relative_to(data), width, height, objects, xml


def _image_file(folder: Path, stem: str, stated: str | None) -> Path:
    """The image of that name, else the one its XML file states (its last part alone). Raises UserError."""
    folder = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder
    names = [stem + suffix for suffix in IMAGE_SUFFIXES] + [stem + suffix.upper() for suffix in IMAGE_SUFFIXES]
    names += [re.split(r"[/\\]", stated)[-1]] if stated else []
    for name in names:
        if (folder / name).is_file() and name.lower().endswith(IMAGE_SUFFIXES):
            return folder / name
    raise UserError(f"{folder / stem}.jpg: the image is missing")


def choose_classes(asked: str | None, read: dict[str, list]) -> list[dict]:
    """COCO's categories [{"id" from 1, "name"}]. Raises UserError for a name in the files that is not among them."""
    found = Counter(name for images in read.values() for *_, objects, _ in images for name, *_ in objects)
    if asked == "found":
        names = sorted(found)
    else:
        names = [name.strip() for name in asked.split(",")] if asked else CLASSES
    unknown = {name: count for name, count in found.items() if name not in names}
    if unknown:
        listed = ", ".join(f"{name} ({count} boxes)" for name, count in sorted(unknown.items())[:10])
        raise UserError(
            f"categories not among the {len(names)} known ones: {listed}; use --classes found, or name them"
        )
    if not names or len(set(names)) < len(names):
        raise UserError("--classes: no class, or one twice")
    return [{"id": number, "name": name} for number, name in enumerate(names, 1)]


def image_ids(paths: list[Path]) -> dict[Path, int]:
    """An id for each image: the digits of its name where every name has nothing else and all differ, else its place."""
    digits = [path.stem.replace("_", "") for path in paths]
    if all(re.fullmatch("[0-9]{1,15}", name) for name in digits) and len({int(name) for name in digits}) == len(paths):
        return {path: int(name) for path, name in zip(paths, digits)}
    return {path: place for place, path in enumerate(paths, 1)}


def as_coco(images: list, categories: list[dict], ids: dict[Path, int], path: Path) -> dict:
    """The COCO document of images as `read_image` gives them; `path` is where it goes, for messages."""
    known = {category["name"]: category["id"] for category in categories}
    rows, annotations, bad = [], [], []
    for file, width, height, objects, xml in images:
        rows.append({"id": ids[file], "file_name": file.as_posix(), "width": width, "height": height})
        for name, bbox, difficult in objects:
            if not (bbox[2] > 0 and bbox[3] > 0 and all(abs(value) < 1e9 for value in bbox)):
                bad.append(xml)
                continue
            row = {"id": len(annotations) + 1, "image_id": ids[file], "category_id": known[name], "bbox": bbox}
            row |= {"area": bbox[2] * bbox[3], "iscrowd": difficult, "difficult": difficult}
            annotations.append(row)
    total = len(annotations) + len(bad)
    if len(bad) > DROPPED_AT_MOST * total:
        raise UserError(
            f"{bad[0]}: {len(bad)} of {total} boxes have xmax < xmin or ymax < ymin, here first; correct them"
        )
    if bad:
        print(f"warning: {path}: {len(bad)} empty boxes are dropped (first: {bad[0]})", file=sys.stderr)
    return {"images": rows, "annotations": annotations, "categories": categories}


if __name__ == "__main__":
    sys.exit(main())
