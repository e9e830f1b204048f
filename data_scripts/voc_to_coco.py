"""Pascal VOC to COCO's format: one json of boxes for each set of images.

    python data_scripts/voc_to_coco.py data/voc/VOCdevkit
        writes VOCdevkit/annotations/instances_train.json (VOC07 trainval, labelled),
        instances_val.json (VOC07 test) and image_info_unlabeled.json (VOC12 trainval, no boxes):
        the setting of the paper. Then semidetr train --data data/voc/VOCdevkit --percent 100 ...
    python data_scripts/voc_to_coco.py data/voc/VOCdevkit \\
            --train VOC2007/trainval --train VOC2012/trainval
        sets of your choice
    python data_scripts/voc_to_coco.py FOLDER --classes found
        your own XML files, in FOLDER/Annotations or FOLDER, their images in FOLDER/JPEGImages or
        FOLDER

The photographs stay where they are.

A set is [FOLDER/]NAME, listed in FOLDER/ImageSets/Main/NAME.txt, or FOLDER/all for every XML file.
An XML file has the name of its image. Without a --val, a fifth of the images is set aside in
training.

XML files are read by `semidetr_lite.data.formats.read_voc_images`, which says what becomes of a
box. (The released code of Semi-DETR and mmdetection subtracts 1 from all four corners, so its boxes
are a pixel smaller.)

Difficult objects have "difficult": 1 and also "iscrowd": 1, as in the released code. They are then
neither trained on nor missed: pycocotools has no other way to leave a box out of AP (its own
"ignore" it overwrites with "iscrowd"). COCO's AP is lenient with such a box: any number of
detections that lie in it are not counted. VOC's AP (semidetr_lite.evaluate.evaluate_voc) follows
the official rule for difficult boxes.

Categories have the ids 1..20 in alphabetical order. The id of an image is the digits of its name
(2007_000027 is 2007000027) if the names of all images allow that, else its place in the list.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from _script import run

from semidetr_lite.data.coco import MAX_DROPPED_FRACTION
from semidetr_lite.data.formats import (
    BoxImage,
    coco_rows,
    read_voc_images,
    read_voc_list,
    voc_image_dir,
    voc_xml_dir,
)
from semidetr_lite.errors import UserError
from semidetr_lite.files import write_json

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person"),
    *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
PAPER = {
    "train": ["VOC2007/trainval"],
    "val": ["VOC2007/test"],
    "unlabelled": ["VOC2012/trainval"],
}
FILES = {
    "train": "instances_train.json",
    "val": "instances_val.json",
    "unlabelled": "image_info_unlabeled.json",
}


def main(argv=None) -> int:
    """Write the jsons; the exit status is 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", type=Path, help="the VOCdevkit folder, or a folder of XML files and images"
    )
    for split in FILES:
        parser.add_argument(
            f"--{split}", action="append", metavar="SET", help="repeat it to join several sets"
        )
    parser.add_argument(
        "--classes", help='names with commas between, or "found" for those in the files'
    )
    parser.add_argument("--out", type=Path, help="folder of the jsons (default: DATA/annotations)")
    options = parser.parse_args(argv)
    sets = {split: getattr(options, split) or [] for split in FILES}
    return run(convert, options.data, sets, options.classes, options.out)


def convert(
    data: Path, sets: dict[str, list[str]], classes: str | None = None, out: Path | None = None
) -> None:
    """Write a json for each split that has a set.

    Args:
        data: the folder of the VOC folders.
        sets: {"train", "val", "unlabelled"}: names of sets; without any, those of the paper or all
            images.
        classes: names with commas between, "found", or None for VOC's.
        out: the folder of the jsons, `data`/annotations if not given.

    Raises UserError for the first thing that cannot be used; then nothing is written.
    """
    if not data.is_dir():
        raise UserError(f"{data}: no such folder")
    if not any(sets.values()):
        sets = PAPER if (data / "VOC2007").is_dir() else {"train": ["all"]}
    sets = {split: names for split, names in sets.items() if names}
    images = {
        split: [
            image
            for name in names
            for image in read_set(data, name, with_objects=split != "unlabelled")
        ]
        for split, names in sets.items()
    }
    check_disjoint(images)
    categories = choose_classes(classes, [image for split in images.values() for image in split])
    category_ids = {category["name"]: category["id"] for category in categories}
    ids = image_ids([image.file_name for split in images.values() for image in split])
    folder = out or data / "annotations"
    usable = {
        split: without_empty_boxes(split_images, folder / FILES[split])
        for split, split_images in images.items()
    }
    for split, split_images in usable.items():
        of_split = [ids[image.file_name] for image in split_images]
        rows, annotations = coco_rows(split_images, of_split, category_ids)
        document = {"images": rows, "annotations": annotations, "categories": categories}
        write_json(folder / FILES[split], document)
        counts = f"{len(rows)} images"
        if split != "unlabelled":
            difficult = sum(row["difficult"] for row in annotations)
            counts += f", {len(annotations)} boxes, {difficult} of them difficult"
        print(f"{folder / FILES[split]}: {counts}")


def read_set(data: Path, name: str, with_objects: bool) -> list[BoxImage]:
    """The images of a set [FOLDER/]NAME, file names relative to `data`. Raises UserError."""
    below, _, list_name = name.rpartition("/")
    folder = data / below
    stems = None
    if list_name == "all":
        source = voc_xml_dir(folder)
    else:
        source = folder / "ImageSets" / "Main" / f"{list_name}.txt"
        if not source.is_file():
            advice = "a set is FOLDER/NAME as in VOC2007/trainval, or FOLDER/all"
            raise UserError(f"{source}: no such list of images; {advice}")
        stems = read_voc_list(source)
        for stem, count in Counter(stems).items():
            if count > 1:
                raise UserError(f"{source}: {stem!r} is listed twice")
    images, problems = read_voc_images(folder, stems, with_objects=with_objects)
    for problem in problems.values():
        raise UserError(problem)
    if not images:
        raise UserError(f"{source}: no image in this set")
    image_dir = voc_image_dir(folder).relative_to(data)
    return [
        image._replace(file_name=(image_dir / image.file_name).as_posix())
        for image in images.values()
    ]


def check_disjoint(images: dict[str, list[BoxImage]]) -> None:
    """Raise UserError where an image is in two sets: a validation image must not be trained on."""
    split_of: dict[str, str] = {}
    for split, split_images in images.items():
        for image in split_images:
            name = image.file_name
            if name in split_of:
                both = f"--{split_of[name]} and --{split}"
                raise UserError(f"{name}: is in the sets {both}; leave one out")
            split_of[name] = split


def choose_classes(wanted: str | None, images: list[BoxImage]) -> list[dict]:
    """COCO's categories [{"id" from 1, "name"}].

    Raises UserError for a class in the files that is not among them.
    """
    counts = Counter(entry.name for image in images for entry in image.objects)
    if wanted == "found":
        names = sorted(counts)
    elif wanted:
        names = [name.strip() for name in wanted.split(",")]
    else:
        names = list(CLASSES)
    unknown = {name: count for name, count in counts.items() if name not in names}
    if unknown:
        first_ten = sorted(unknown.items())[:10]
        listed = ", ".join(f"{name} ({count} boxes)" for name, count in first_ten)
        advice = "use --classes found, or name them"
        raise UserError(f"classes not among the {len(names)} known ones: {listed}; {advice}")
    if not names or len(set(names)) < len(names):
        raise UserError("--classes: no class, or one twice")
    return [{"id": number, "name": name} for number, name in enumerate(names, 1)]


def image_ids(file_names: list[str]) -> dict[str, int]:
    """An id for each image: the digits of its name if that works for all, else its place."""
    digits = [Path(name).stem.replace("_", "") for name in file_names]
    if all(re.fullmatch("[0-9]{1,15}", name) for name in digits):
        numbers = [int(name) for name in digits]
        if len(set(numbers)) == len(numbers):
            return dict(zip(file_names, numbers))
    return {name: place for place, name in enumerate(file_names, 1)}


def without_empty_boxes(images: list[BoxImage], path: Path) -> list[BoxImage]:
    """The images without their empty boxes, which one line on stderr counts; many are a UserError.

    `path` is the json they go to, for the message.
    """
    kept = []
    dropped_from = []
    for image in images:
        solid = [
            entry
            for entry in image.objects
            if min(entry.bbox[2:]) > 0 and all(abs(value) < 1e9 for value in entry.bbox)
        ]
        dropped_from += [image.file_name] * (len(image.objects) - len(solid))
        kept.append(image._replace(objects=solid))
    total = sum(len(image.objects) for image in images)
    if len(dropped_from) > MAX_DROPPED_FRACTION * total:
        counts = f"{len(dropped_from)} of {total} boxes are empty or not finite"
        raise UserError(f"{path}: {counts} (first: {dropped_from[0]}); correct them")
    if dropped_from:
        counts = f"{len(dropped_from)} empty boxes are dropped (first: {dropped_from[0]})"
        print(f"warning: {path}: {counts}", file=sys.stderr)
    return kept


if __name__ == "__main__":
    sys.exit(main())
