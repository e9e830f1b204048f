"""Pascal VOC and YOLO folders, read into the rows of a COCO json, in memory.

Both readers give (labels to train on, labels to measure on or None). What is wrong with a single file becomes a line
in `faults`, so that a reader of the data stops at the first and a doctor lists all.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from semidetr_lite.data.images import header_size, images_below
from semidetr_lite.errors import UserError

PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Labels(NamedTuple):
    """What a json or a folder says about its images, in the rows of a COCO json."""

    source: Path  # the json or the folder, for messages
    document: dict  # {"images": [...], "annotations": [...], "categories": [...]}: the rows that can be used
    faults: list[str]  # a line about each row or file that cannot
    folders: list[Path]  # where the images may lie
    upright: bool = False  # whether boxes refer to images turned as their EXIF data ask


def read_voc(folder: Path, images=None, categories: list[dict] | None = None) -> tuple[Labels, Labels | None]:
    """A VOC folder: Annotations/NAME.xml for JPEGImages/NAME.jpg (or for such an image in the folder `images`).

    Of the lists in ImageSets/Main the first pair that is there, with annotations, says what is trained and what is
    measured on: trainval and test, or train and val; else trainval, train or all images are trained on. Pixels count
    from 1 in the XML and a box includes its last one, so [xmin, xmax] becomes [xmin - 1, xmax] here, the box whose
    overlaps VOC's own evaluation computes. Only an object's own box is read, not those of its parts. A difficult object
    is also a crowd region, which is neither trained on nor missed in COCO's AP. A missing size is read from the image.
    Classes are numbered from 1 in alphabetical order, unless `categories` are given.
    """
    place = Path(images) if images else folder / "JPEGImages"
    files = {Path(path).stem: path for path in images_below(place).values()}
    read, faults = {}, {}
    for path in sorted((folder / "Annotations").glob("[!.]*.xml")):
        try:
            if path.stem not in files:
                raise ValueError(f"its image {place / path.stem}.jpg is missing")
            (height, width), objects = voc_annotation(path, files[path.stem])
            row = {"file_name": os.path.relpath(files[path.stem], place), "height": height, "width": width}
            read[path.stem] = row, objects
        except (ElementTree.ParseError, OSError, ValueError) as problem:
            faults[path.stem] = f"{path}: cannot be used: {problem}"
    if categories is None:
        names = sorted({name for _, objects in read.values() for name, _, _ in objects})
        categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]

    def part(stems: list[str]) -> Labels:
        absent = {stem: f"{folder}: a list in ImageSets/Main has {stem}, but Annotations has not" for stem in stems}
        own = [(absent | faults)[stem] for stem in stems if stem not in read]
        return _labels(folder, [read[stem] for stem in stems if stem in read], categories, own, place)

    lists = _voc_lists(folder, read.keys() | faults.keys())
    for train, measured in (("trainval", "test"), ("train", "val")):
        if train in lists and measured in lists:
            return part(lists[train]), part(lists[measured])
    return part(lists.get("trainval") or lists.get("train") or sorted(read.keys() | faults.keys())), None


def _voc_lists(folder: Path, annotated: set[str]) -> dict[str, list[str]]:
    """The lists of ImageSets/Main that name annotated images (the test list of VOC 2012 does not)."""
    lists = {}
    for name in ("trainval", "train", "val", "test"):
        path = folder / "ImageSets" / "Main" / f"{name}.txt"
        stems = [line.split()[0] for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
        if annotated.intersection(stems):
            lists[name] = stems
    return lists


def voc_annotation(path: Path, image) -> tuple[tuple[int, int], list[tuple[str, list[float], int]]]:
    """((H, W), [(class, [x, y, width, height], difficult)]) of an XML file and its image. Raises ValueError."""
    root = ElementTree.parse(path).getroot()
    height, width = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    objects = []
    for entry in root.findall("object"):
        name = (
            entry.findtext("name") or ""
        ).strip()  # of the object itself, as is the box; those of its parts lie deeper
        ends = [entry.findtext(f"bndbox/{end}") for end in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = map(float, ends)
        except (TypeError, ValueError):
            name = ""
        if not name:
            raise ValueError(f'an "object" lacks its "name", or a number of its "bndbox": {", ".join(map(str, ends))}')
        difficult = (entry.findtext("difficult") or "").strip() == "1"
        objects.append((name, [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], int(difficult)))
    return (height, width) if height > 0 and width > 0 else header_size(image), objects


def _labels(folder: Path, found, categories, faults: list[str], place: Path, upright=False) -> Labels:
    """COCO's rows from [(image row, [(class, xywh, difficult)])]."""
    number = {row["name"]: row["id"] for row in categories}
    images, annotations = [], []
    for image_id, (row, objects) in enumerate(found, 1):
        images.append({"id": image_id, **row})
        for name, box, difficult in objects:
            if name not in number:
                faults.append(f"{folder}: {row['file_name']} has a {name!r}, which is not among the classes known")
                continue
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": number[name], "bbox": box}
            annotations.append({**entry, "area": box[2] * box[3], "iscrowd": difficult, "difficult": difficult})
    if not images:
        faults.append(f"{folder}: no image with a label that can be read")
    if not categories:
        faults.append(f"{folder}: no object in any of its labels")
    document = {"images": images, "annotations": annotations, "categories": categories}
    return Labels(folder, document, faults, [place], upright)


def read_yolo(folder: Path) -> tuple[Labels, Labels | None]:
    """A YOLO folder: for each image below an images/ folder a text file at the same place below labels/.

    A line is `class cx cy width height`, the class counted from 0 and the box in 0..1 of the image turned upright; an
    image without a text file has no object. A folder named train, val (valid, validation) or test somewhere on the way
    to an image says what it is for; val, or else test, is measured on, and all others are trained on. The names of the
    classes stand in data.yaml (or the only .yaml file there), or one on each line of classes.txt.
    """
    names = _yolo_names(folder)
    found: dict[str, list] = {"train": [], "val": [], "test": []}
    faults: dict[str, list[str]] = {part: [] for part in found}
    texts = {path for path in folder.rglob("*.txt") if "labels" in path.parts[:-1] and path.name != "classes.txt"}
    for name in (os.path.relpath(path, folder) for path in images_below(folder).values()):
        above = list(Path(name).parts[:-1])
        if "images" not in above:
            continue
        known = [PARTS[one] for one in (one.lower().rstrip("0123456789") for one in above) if one in PARTS]
        part = known[0] if known else "train"
        above[len(above) - 1 - above[::-1].index("images")] = "labels"
        text = folder.joinpath(*above, Path(name).stem + ".txt")
        try:
            height, width = header_size(folder / name, upright=True)
            objects = _yolo_boxes(text, names, height, width) if text.is_file() else []
            found[part].append(({"file_name": name, "height": height, "width": width}, objects))
        except UserError as problem:
            faults[part].append(str(problem))
        texts.discard(text)
    faults["train"] += [f"{text}: its image is missing from the images/ beside labels/" for text in sorted(texts)]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    measured = next((part for part in ("val", "test") if found[part] or faults[part]), None)
    parts = [
        part and _labels(folder, found[part], categories, faults[part], folder, True) for part in ("train", measured)
    ]
    return parts[0], parts[1]


def _yolo_boxes(path: Path, names: list[str], height: int, width: int) -> list[tuple[str, list[float], int]]:
    """[(class, [x, y, width, height] in pixels, difficult)] of a text file. Raises UserError naming file and line."""
    objects = []
    for place, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            label, *box = map(float, line.split())
        except ValueError:
            box = []
        if len(box) != 4 or not all(-0.01 <= value <= 1.01 for value in box):
            raise UserError(f"{path}: line {place} is not `class cx cy width height`, the last four in 0..1")
        if label not in range(len(names)):
            raise UserError(f"{path}: line {place} has the class {label:g}; there are names for 0 to {len(names) - 1}")
        cx, cy, w, h = box
        objects.append((names[int(label)], [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height], 0))
    return objects


def _yolo_names(folder: Path) -> list[str]:
    """The names of the classes in the order of their numbers."""
    for path in (folder / "classes.txt", folder / "labels" / "classes.txt"):
        if path.is_file():
            lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            return [line.strip() for line in lines if line.strip()]
    yamls = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    yamls = [path for path in yamls if path.stem == "data"] or yamls
    if len(yamls) != 1:
        raise UserError(f"{folder}: a YOLO folder needs data.yaml with `names:`, or classes.txt with a name a line")
    names = _names_in_yaml(yamls[0].read_text(encoding="utf-8-sig", errors="replace"))
    if not names or sorted(names) != list(range(len(names))):
        raise UserError(
            f"{yamls[0]}: no `names:` of classes 0, 1, ... found; write classes.txt, a name a line, instead"
        )
    return [names[number] for number in range(len(names))]


def _names_in_yaml(text: str) -> dict[int, str]:
    """The `names:` of a data.yaml, a list or a map, on one line or on several; {} for any other way to write them."""
    text = re.sub(r"(^|\s)#.*", "", text)
    found = re.search(r"^names:\s*(\[[^\]]*\]|\{[^}]*\}|(?:\s*(?:-\s|\d+\s*:).*)+)", text, re.MULTILINE)
    entry = re.compile(r"""\s*(?:(\d+)\s*:|-\s)?\s*('[^']*'|"[^"]*"|[^,'"\n\[\]{}]+)""")
    names = {}
    for key, name in entry.findall(found[1]) if found else ():
        if name.strip():
            names[int(key) if key else len(names)] = name.strip().strip("'\"")
    return names
