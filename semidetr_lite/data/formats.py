"""Pascal VOC and YOLO folders, read into the rows of a COCO json in memory.

Both readers return (training annotations, validation annotations or None). What is wrong with one
file becomes a line in `problems`: a training run stops at the first line, the doctor lists all of
them.
"""

import os
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import yaml

from semidetr_lite.data.images import header_size, images_below
from semidetr_lite.errors import UserError, as_user_error

# folder names in a YOLO tree -> the split they mean
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Annotations(NamedTuple):
    """What a json or a folder says about its images, as the rows of a COCO json."""

    source: Path  # the json or the folder, for messages
    document: dict  # {"images", "annotations", "categories"}: the rows that can be used
    problems: list[str]  # one line about each row or file that cannot be used
    image_dirs: list[Path]  # where the images may lie
    upright: bool = False  # whether boxes refer to images turned as their EXIF data ask


class BoxObject(NamedTuple):
    """One object of an image."""

    name: str  # of its class
    bbox: list[float]  # [x, y, width, height], pixels
    difficult: int = (
        0  # 1 for an object that VOC's evaluation neither counts as found nor as missed
    )


class BoxImage(NamedTuple):
    """One image and its objects."""

    file_name: str  # below the folder of images
    height: int
    width: int
    objects: list[BoxObject]


def coco_rows(
    images: list[BoxImage], image_ids: list[int], category_ids: dict[str, int]
) -> tuple[list[dict], list[dict]]:
    """The "images" and the "annotations" of a COCO json; annotations are numbered from 1.

    A difficult object is also a crowd region, which is neither trained on nor missed in COCO's AP.
    Every class must be in `category_ids`.
    """
    rows: list[dict] = []
    annotations: list[dict] = []
    for image_id, image in zip(image_ids, images, strict=True):
        size = {"width": image.width, "height": image.height}
        rows.append({"id": image_id, "file_name": image.file_name, **size})
        for name, bbox, difficult in image.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[name],
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    "iscrowd": difficult,
                    "difficult": difficult,
                }
            )
    return rows, annotations


def _to_annotations(
    folder: Path,
    images: list[BoxImage],
    categories: list[dict],
    problems: list[str],
    image_dir: Path,
    upright: bool = False,
) -> Annotations:
    """Images numbered from 1 as Annotations; an object of an unknown class becomes a problem."""
    category_ids = {row["name"]: row["id"] for row in categories}
    problems = list(problems)
    usable = []
    for image in images:
        for name in {entry.name for entry in image.objects} - category_ids.keys():
            unknown = f"{image.file_name} has a {name!r}, which is not among the known classes"
            problems.append(f"{folder}: {unknown}")
        known = [entry for entry in image.objects if entry.name in category_ids]
        usable.append(image._replace(objects=known))
    if not images:
        problems.append(f"{folder}: no image with a label that can be read")
    if not categories:
        problems.append(f"{folder}: no object in any of its labels")
    rows, annotations = coco_rows(usable, list(range(1, len(usable) + 1)), category_ids)
    document = {"images": rows, "annotations": annotations, "categories": categories}
    return Annotations(folder, document, problems, [image_dir], upright)


# Pascal VOC


def read_voc(
    folder: Path, images=None, categories: list[dict] | None = None
) -> tuple[Annotations, Annotations | None]:
    """A VOC folder: Annotations/NAME.xml for JPEGImages/NAME.jpg.

    Of the lists in ImageSets/Main the first pair that is there and annotated is taken: trainval for
    training and test for validation, or train and val. Without a pair, trainval, train or all
    images are for training.

    Args:
        folder: of the XML files; see `read_voc_images`.
        images: the folder of the images, if it is not JPEGImages.
        categories: [{"id", "name"}]; if not given, the classes found, numbered from 1 in
            alphabetical order.
    """
    readable, problems = read_voc_images(folder, images=images)
    if categories is None:
        names = sorted({entry.name for image in readable.values() for entry in image.objects})
        categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    image_dir = Path(images) if images else voc_image_dir(folder)

    def annotations(stems: list[str]) -> Annotations:
        listed = [readable[stem] for stem in stems if stem in readable]
        missing = {stem: _missing_xml(folder, stem) for stem in stems}
        of_stems = [(missing | problems)[stem] for stem in stems if stem not in readable]
        return _to_annotations(folder, listed, categories, of_stems, image_dir)

    annotated = readable.keys() | problems.keys()
    lists = _voc_lists(folder, annotated)
    for train, validation in (("trainval", "test"), ("train", "val")):
        if train in lists and validation in lists:
            return annotations(lists[train]), annotations(lists[validation])
    return annotations(lists.get("trainval") or lists.get("train") or sorted(annotated)), None


def read_voc_images(
    folder: Path, stems: list[str] | None = None, images=None, with_objects: bool = True
) -> tuple[dict[str, BoxImage], dict[str, str]]:
    """The images of a VOC folder and their objects.

    The XML files lie in Annotations/ or in the folder itself, the images in JPEGImages/ or in the
    folder itself. An XML file has the name of its image.

    Args:
        folder: the VOC folder.
        stems: file names without suffix; if not given, those of all XML files.
        images: the folder of the images, if it is another one.
        with_objects: False reads no XML file, which then need not exist, and only the size of each
            image.

    Returns:
        {stem: image}, its file name relative to the folder of images; {stem: what is wrong with
        it}.
    """
    image_dir = Path(images) if images else voc_image_dir(folder)
    image_paths = {Path(path).stem: path for path in images_below(image_dir).values()}
    xml_paths = {path.stem: path for path in sorted(voc_xml_dir(folder).glob("[!.]*.xml"))}
    readable: dict[str, BoxImage] = {}
    problems: dict[str, str] = {}
    for stem in xml_paths if stems is None else stems:
        if with_objects and stem not in xml_paths:
            problems[stem] = _missing_xml(folder, stem)
            continue
        source = xml_paths.get(stem, voc_xml_dir(folder) / f"{stem}.xml")
        try:
            if stem not in image_paths:
                raise ValueError(f"its image {image_dir / stem}.jpg is missing")
            path = image_paths[stem]
            (height, width), objects = (
                voc_annotation(source, path) if with_objects else (header_size(path), [])
            )
        except (ElementTree.ParseError, OSError, ValueError) as problem:
            problems[stem] = f"{source}: cannot be used: {problem}"
        else:
            readable[stem] = BoxImage(os.path.relpath(path, image_dir), height, width, objects)
    return readable, problems


def voc_image_dir(folder: Path) -> Path:
    """Where the images of a VOC folder lie."""
    return folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder


def voc_xml_dir(folder: Path) -> Path:
    """Where the XML files of a VOC folder lie."""
    return folder / "Annotations" if (folder / "Annotations").is_dir() else folder


def _missing_xml(folder: Path, stem: str) -> str:
    return f"{voc_xml_dir(folder)}/{stem}.xml: is missing, though a list in ImageSets/Main names it"


def read_voc_list(path: Path) -> list[str]:
    """The image names in a list of ImageSets/Main: the first word of each line."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [line.split()[0] for line in lines if line.strip()]


def _voc_lists(folder: Path, annotated: set[str]) -> dict[str, list[str]]:
    """The lists of ImageSets/Main that name annotated images; VOC 2012's test list does not."""
    lists = {}
    for name in ("trainval", "train", "val", "test"):
        path = folder / "ImageSets" / "Main" / f"{name}.txt"
        stems = read_voc_list(path) if path.is_file() else []
        if annotated.intersection(stems):
            lists[name] = stems
    return lists


def voc_annotation(path: Path, image) -> tuple[tuple[int, int], list[BoxObject]]:
    """The image size (H, W) and the objects in a VOC XML file.

    VOC's corners are pixels counted from 1, and both belong to the box: xmin..xmax covers xmax -
    xmin + 1 columns, so the box is [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]. Its IoU
    is that of VOC's own evaluation. Only an object's own box is read, not those of its <part>
    entries. A size that is missing or 0 is read from the image file. Raises ValueError or
    ParseError for a file that cannot be used.
    """
    root = ElementTree.parse(path).getroot()
    height, width = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    objects = []
    for entry in root.findall("object"):
        name = (entry.findtext("name") or "").strip()
        corners = [entry.findtext(f"bndbox/{end}") for end in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = (float(corner or "") for corner in corners)
        except ValueError:
            name = ""
        if not name:
            numbers = ", ".join(map(str, corners))
            raise ValueError(f'an "object" lacks its "name" or a number of its "bndbox": {numbers}')
        difficult = (entry.findtext("difficult") or "").strip() == "1"
        bbox = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
        objects.append(BoxObject(name, bbox, int(difficult)))
    size = (height, width) if height > 0 and width > 0 else header_size(image)
    return size, objects


# YOLO


def read_yolo(folder: Path) -> tuple[Annotations, Annotations | None]:
    """A YOLO folder: an image below images/ has its text file at the same path below labels/.

    A line of the file is `class cx cy width height`: the class counted from 0, the box in 0..1 of
    the image turned upright. An image without a text file has no object. A folder on the way to an
    image that is called train, val (valid, validation) or test names its split. val, or else test,
    is for validation, everything else for training. The names of the classes stand in data.yaml (or
    the only .yaml file of the folder), or one per line in classes.txt. Raises UserError for a
    folder without them.
    """
    names = _yolo_names(folder)
    images: dict[str, list[BoxImage]] = {"train": [], "val": [], "test": []}
    problems: dict[str, list[str]] = {split: [] for split in images}
    label_files = {
        path
        for path in folder.rglob("*.txt")
        if "labels" in path.parts[:-1] and path.name != "classes.txt"
    }
    for path in images_below(folder).values():
        file_name = os.path.relpath(path, folder)
        label_file = _yolo_label_file(folder, file_name)
        if label_file is None:
            continue
        label_files.discard(label_file)
        split = _yolo_split(file_name)
        try:
            height, width = header_size(path, upright=True)
            has_objects = label_file.is_file()
            objects = _yolo_objects(label_file, names, height, width) if has_objects else []
            images[split].append(BoxImage(file_name, height, width, objects))
        except UserError as problem:
            problems[split].append(str(problem))
    problems["train"] += [
        f"{path}: its image is missing from the images/ beside labels/"
        for path in sorted(label_files)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]

    def annotations(split: str) -> Annotations:
        return _to_annotations(
            folder, images[split], categories, problems[split], image_dir=folder, upright=True
        )

    validation = next(
        (split for split in ("val", "test") if images[split] or problems[split]), None
    )
    return annotations("train"), annotations(validation) if validation else None


def _yolo_label_file(folder: Path, file_name: str) -> Path | None:
    """The text file of an image, below labels/; None for an image that is not below images/."""
    above = list(Path(file_name).parts[:-1])
    if "images" not in above:
        return None
    above[len(above) - 1 - above[::-1].index("images")] = "labels"
    return folder.joinpath(*above, Path(file_name).stem + ".txt")


def _yolo_split(file_name: str) -> str:
    """The split that a folder on the way to an image names; "train" if none does."""
    for name in Path(file_name).parts[:-1]:
        word = name.lower().rstrip("0123456789")  # train2017
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return "train"


def _yolo_objects(path: Path, names: list[str], height: int, width: int) -> list[BoxObject]:
    """The objects in a text file, boxes in pixels. Raises UserError naming file and line."""
    objects = []
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label, *box = map(float, line.split())
        except ValueError:
            box = []
        if len(box) != 4 or not all(-0.01 <= value <= 1.01 for value in box):
            problem = f"line {number} is not `class cx cy width height`, the last four in 0..1"
            raise UserError(f"{path}: {problem}")
        if label not in range(len(names)):
            problem = f"line {number} has the class {label:g}"
            raise UserError(f"{path}: {problem}; there are names for 0 to {len(names) - 1}")
        cx, cy, w, h = box
        bbox = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
        objects.append(BoxObject(names[int(label)], bbox))
    return objects


def _yolo_names(folder: Path) -> list[str]:
    """The names of the classes in the order of their numbers.

    Raises UserError where they are not found.
    """
    for path in (folder / "classes.txt", folder / "labels" / "classes.txt"):
        if path.is_file():
            lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
            return _different([line.strip() for line in lines if line.strip()], path)
    yamls = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    yamls = [path for path in yamls if path.stem == "data"] or yamls
    if len(yamls) != 1:
        needed = "data.yaml with `names:`, or classes.txt with one name per line"
        raise UserError(f"{folder}: a YOLO folder needs {needed}")
    return _different(names_in_yaml(yamls[0]), yamls[0])


def _different(names: list[str], path: Path) -> list[str]:
    """The names, if no two of them are the same. Raises UserError."""
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two classes are called {name!r}; give each a name of its own")
    return names


def names_in_yaml(path: Path) -> list[str]:
    """The `names:` of a data.yaml, a list or a map {number: name}, in the order of numbers.

    YAML's BaseLoader takes every value as text, so that classes called `no`, `007` or `1e3` keep
    their names. It builds lists, maps and text only: no tag of the file runs anything. Raises
    UserError for any other content.
    """
    with as_user_error(path, "not valid YAML; write classes.txt, one name per line, instead"):
        document = yaml.load(
            path.read_text(encoding="utf-8-sig", errors="replace"), yaml.BaseLoader
        )
        names = document.get("names") if isinstance(document, dict) else None
        if isinstance(names, dict):
            numbers = [str(number) for number in range(len(names))]
            names = [names.get(number) for number in numbers]
        if not isinstance(names, list) or not names:
            names = [None]
    if not all(isinstance(name, str) and name.strip() for name in names):
        advice = "write classes.txt, one name per line, instead"
        raise UserError(f"{path}: no `names:` of classes 0, 1, ... found; {advice}")
    return [name.strip() for name in names]
