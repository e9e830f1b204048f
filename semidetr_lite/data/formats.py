"""Pascal VOC and YOLO folders, read into the rows of a COCO json in memory.

Both readers return (training annotations, validation annotations or None). What is wrong with one
file becomes a line in `problems`: a training run stops at the first line, the doctor lists all of
them. An image without a label file is listed without objects and is not among the `labelled_ids`;
one whose label file is empty is.
"""

import os
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import yaml

from semidetr_lite.data.images import files_below, header_size, images_below
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
    # ids of the images that somebody labelled, perhaps with no object; None: those with a box
    labelled_ids: frozenset[int] | None = None
    left_out: tuple[str, ...] = ()  # one line about each annotation that cannot be used
    notes: tuple[str, ...] = ()  # what was read another way than it is written


class BoxObject(NamedTuple):
    """One object of an image."""

    name: str  # of its class
    bbox: list[float]  # [x, y, width, height], pixels
    # 1 for an object that VOC's evaluation neither counts as found nor as missed
    difficult: int = 0


class BoxImage(NamedTuple):
    """One image and its objects."""

    file_name: str  # below the folder of images
    height: int
    width: int
    objects: list[BoxObject] | None  # None for an image without a label file


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
        for name, bbox, difficult in image.objects or ():
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


def split_of(file_name: str) -> str | None:
    """The split that a folder on the way to a file names ("train", "val", "test"), or None."""
    for name in Path(file_name).parts[:-1]:
        word = name.lower().rstrip("0123456789")  # train2017
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return None


def _to_annotations(
    folder: Path,
    images: list[BoxImage],
    categories: list[dict],
    problems: list[str],
    image_dir: Path,
    upright: bool = False,
    notes: tuple[str, ...] = (),
) -> Annotations:
    """Images numbered from 1 as Annotations; an object of an unknown class becomes a problem."""
    category_ids = {row["name"]: row["id"] for row in categories}
    problems = list(problems)
    usable = []
    labelled_ids = set()
    for number, image in enumerate(images, 1):
        objects = image.objects or []
        for name in sorted({entry.name for entry in objects} - category_ids.keys()):
            unknown = f"{image.file_name} has a {name!r}, which is not among the known classes"
            problems.append(f"{folder}: {unknown}")
        known = [entry for entry in objects if entry.name in category_ids]
        usable.append(image._replace(objects=known))
        if image.objects is not None:
            labelled_ids.add(number)
    if not labelled_ids:
        problems.append(f"{folder}: no image with a label that can be read")
    if not categories:
        problems.append(f"{folder}: no object in any of its labels")
    rows, annotations = coco_rows(usable, list(range(1, len(usable) + 1)), category_ids)
    document = {"images": rows, "annotations": annotations, "categories": categories}
    return Annotations(
        folder,
        document,
        problems,
        [image_dir],
        upright,
        labelled_ids=frozenset(labelled_ids),
        notes=notes,
    )


# Pascal VOC


def read_voc(
    folder: Path, images=None, categories: list[dict] | None = None
) -> tuple[Annotations, Annotations | None]:
    """A VOC folder: an XML file for each labelled image, with the name of the image.

    The XML files may lie anywhere below the folder: in Annotations/ as VOC has them, in annots/ or
    xmls/, beside their images as labelImg writes them, in train/ and valid/ as others do. An image
    without one is unlabelled.

    Of the lists in ImageSets/Main the first pair that is there and annotated is taken: trainval for
    training and test for validation, or train and val. Without a pair, trainval, train or all
    images are for training. Without any list, folders called train, val (valid, validation) and
    test tell the splits apart; val, or else test, is for validation.

    Args:
        folder: of the XML files.
        images: the folder of the images, if they lie outside.
        categories: [{"id", "name"}]; if not given, the classes found, numbered from 1 in
            alphabetical order.

    Raises UserError for a folder whose XML files are of another kind.
    """
    image_dir = Path(images) if images else folder
    readable, problems, swapped = _voc_images(folder, image_dir)
    if categories is None:
        names = {entry.name for image in readable.values() for entry in image.objects or ()}
        categories = [{"id": number, "name": name} for number, name in enumerate(sorted(names), 1)]
    swaps = f"{folder}: in {swapped} boxes the corners are swapped; they are put right"
    notes = (swaps,) if swapped else ()

    def annotations(keys: list[str], more: list[str]) -> Annotations:
        listed = [readable[key] for key in keys if key in readable]
        of_keys = [problems[key] for key in keys if key in problems]
        return _to_annotations(folder, listed, categories, of_keys + more, image_dir, notes=notes)

    labelled = [key for key, image in readable.items() if image.objects is not None]
    lists = _voc_lists(folder, {Path(key).name for key in (*labelled, *problems)})
    if lists:
        return _by_lists(folder, lists, [*readable, *problems], annotations)
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for key in sorted(readable.keys() | problems.keys()):
        splits[split_of(key) or "train"].append(key)
    if not splits["train"]:
        return annotations(sorted(readable.keys() | problems.keys()), []), None
    validation = splits["val"] or splits["test"]
    return annotations(splits["train"], []), annotations(validation, []) if validation else None


def _by_lists(folder: Path, lists: dict[str, list[str]], keys: list[str], annotations) -> tuple:
    """(train, validation) of the lists in ImageSets/Main; `annotations` builds each."""
    key_of = {Path(key).name: key for key in keys}

    def of_list(name: str) -> Annotations:
        missing = [stem for stem in lists[name] if stem not in key_of]
        problems = [
            f"{voc_xml_dir(folder)}/{stem}.xml: is missing, and so is its image, though "
            f"ImageSets/Main/{name}.txt names them"
            for stem in missing
        ]
        return annotations([key_of[stem] for stem in lists[name] if stem in key_of], problems)

    for train, validation in (("trainval", "test"), ("train", "val")):
        if train in lists and validation in lists:
            return of_list(train), of_list(validation)
    name = next((name for name in ("trainval", "train") if name in lists), None)
    return of_list(name) if name else annotations(sorted(keys), []), None


def _voc_images(folder: Path, image_dir: Path) -> tuple[dict[str, BoxImage], dict[str, str], int]:
    """Every image with its objects, by its path below `image_dir` without suffix.

    Returns:
        {key: image}; {key: what is wrong with its files}; the number of boxes whose corners are
        swapped. The images without an XML file that lie beside labelled ones come last, with None
        for their objects.
    """
    paths = list(images_below(image_dir).values())
    xml_paths = list(map(Path, files_below(folder, ".xml")))
    pairs = _pair_by_name(folder, xml_paths, image_dir, paths)
    readable: dict[str, BoxImage] = {}
    problems: dict[str, str] = {}
    swapped = other_kind = 0
    for xml_path in xml_paths:
        path = pairs.get(xml_path)
        key = _stem_below(path or xml_path, image_dir if path else folder)
        try:
            root = ElementTree.parse(xml_path).getroot()
            if root.tag != "annotation":
                other_kind += 1
                continue
            if path is None:
                expected = voc_image_dir(folder) / f"{xml_path.stem}.jpg"
                raise ValueError(f"its image {expected} is missing")
            (height, width), objects, swaps = _voc_content(root, path)
        except (ElementTree.ParseError, OSError, ValueError) as problem:
            problems[key] = f"{xml_path}: cannot be used: {problem}"
        else:
            swapped += swaps
            readable[key] = BoxImage(os.path.relpath(path, image_dir), height, width, objects)
    if other_kind == len(xml_paths):
        advice = 'VOC files have the root "annotation"; export as VOC, COCO or YOLO'
        raise UserError(f"{folder}: its XML files are of another kind ({xml_paths[0]}); {advice}")
    labelled = set(pairs.values())
    folders = {os.path.dirname(path) for path in labelled}
    for path in paths:
        key = _stem_below(path, image_dir)
        if path not in labelled and os.path.dirname(path) in folders and key not in readable:
            image = _without_labels(path, image_dir)
            readable |= {key: image} if image else {}
    return readable, problems, swapped


def _without_labels(path: str, image_dir: Path) -> BoxImage | None:
    """An image without a label file; None for one that cannot be read."""
    try:
        height, width = header_size(path, upright=True)
    except UserError:
        return None
    return BoxImage(os.path.relpath(path, image_dir), height, width, None)


def _stem_below(path, folder: Path) -> str:
    """The path below a folder, without suffix."""
    below = Path(os.path.relpath(path, folder))
    return (below.parent / below.stem).as_posix()


def _pair_by_name(
    folder: Path, xml_paths: list[Path], image_dir: Path, paths: list[str]
) -> dict[Path, str]:
    """The image of each XML file, where there is one.

    An image has the name of its XML file. Of several it is the one beside it, else that of the same
    split, else the first.
    """
    by_name: dict[str, list[str]] = {}
    for path in paths:
        name = Path(path)
        by_name.setdefault(name.stem, []).append(path)
        by_name.setdefault(name.name, []).append(path)  # for a.jpg.xml
    pairs = {}
    for xml_path in xml_paths:
        candidates = by_name.get(xml_path.stem, [])
        if len(candidates) > 1:
            split = split_of(os.path.relpath(xml_path, folder))
            candidates = sorted(
                candidates,
                key=lambda path: (
                    Path(path).parent != xml_path.parent,
                    split_of(os.path.relpath(path, image_dir)) != split,
                ),
            )
        if candidates:
            pairs[xml_path] = candidates[0]
    return pairs


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
    is that of VOC's own evaluation. Corners that are swapped are put right. Only an object's own
    box is read, not those of its <part> entries. A size that is missing or 0 is read from the image
    file. Raises ValueError or ParseError for a file that cannot be used.
    """
    size, objects, _ = _voc_content(ElementTree.parse(path).getroot(), image)
    return size, objects


def _voc_content(root, image) -> tuple[tuple[int, int], list[BoxObject], int]:
    """Size and objects in the root of a VOC XML file, and the number of swapped boxes."""
    sides = [root.findtext(f"size/{side}") for side in ("height", "width")]
    try:
        height, width = (int(float(side or 0)) for side in sides)
    except (ValueError, OverflowError):
        height = width = 0
    objects = []
    swapped = 0
    for entry in root.findall("object"):
        name = (entry.findtext("name") or "").strip()
        corners = [entry.findtext(f"bndbox/{end}") for end in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = (float(corner or "") for corner in corners)
        except ValueError:
            name = ""
        if not name:
            numbers = " ".join(", ".join(map(str, corners)).split())
            raise ValueError(f'an "object" lacks its "name" or a number of its "bndbox": {numbers}')
        difficult = (entry.findtext("difficult") or "").strip() == "1"
        swapped += x1 > x2 or y1 > y2
        (x1, x2), (y1, y2) = sorted((x1, x2)), sorted((y1, y2))
        bbox = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
        objects.append(BoxObject(name, bbox, int(difficult)))
    size = (height, width) if height > 0 and width > 0 else header_size(image, upright=True)
    return size, objects, swapped


# YOLO


def read_yolo(folder: Path) -> tuple[Annotations, Annotations | None]:
    """A YOLO folder: an image below images/ has its text file at the same path below labels/.

    The text file may also lie beside its image, or in a labels/ beside it. A line of the file is
    `class cx cy width height`: the class counted from 0, the box in 0..1 of the image turned
    upright. A sixth number, the score of a prediction, is passed over; a line of an even number of
    coordinates, six or more, is an outline `class x1 y1 x2 y2 x3 y3 ...`, whose box is taken. An
    image without a text file is unlabelled, one with an empty text file has no object.

    A folder on the way to an image that is called train, val (valid, validation) or test names its
    split. val, or else test, is for validation, everything else for training. The names of the
    classes stand in data.yaml (or the only .yaml file of the folder), or one per line in
    classes.txt or obj.names. Raises UserError for a folder without them.
    """
    names = _yolo_names(folder)
    images: dict[str, list[BoxImage]] = {"train": [], "val": [], "test": []}
    problems: dict[str, list[str]] = {split: [] for split in images}
    paths = images_below(folder).values()
    label_files = {path: _yolo_label_file(folder, os.path.relpath(path, folder)) for path in paths}
    folders = {os.path.dirname(path) for path, label_file in label_files.items() if label_file}
    remarks = {"outlines": 0, "scores": 0}
    for path, label_file in label_files.items():
        file_name = os.path.relpath(path, folder)
        split = split_of(file_name) or "train"
        if label_file is None:
            placed = "images" in Path(file_name).parts[:-1] or os.path.dirname(path) in folders
            image = _without_labels(path, folder) if placed else None
            images[split] += [image] if image else []
            continue
        try:
            height, width = header_size(path, upright=True)
            objects = _yolo_objects(label_file, names, height, width, remarks)
            images[split].append(BoxImage(file_name, height, width, objects))
        except UserError as problem:
            problems[split].append(str(problem))
    known = set(label_files.values())
    problems["train"] += [
        f"{path}: its image is missing from the images/ beside labels/"
        for path in map(Path, files_below(folder, ".txt"))
        if "labels" in path.parts[:-1] and path.name != "classes.txt" and path not in known
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    words = {
        "outlines": "lines are outlines; their boxes are taken",
        "scores": "lines have a sixth number, taken for a score and passed over",
    }
    notes = tuple(f"{folder}: {count} {words[name]}" for name, count in remarks.items() if count)

    def annotations(split: str, notes: tuple[str, ...] = ()) -> Annotations:
        return _to_annotations(
            folder, images[split], categories, problems[split], folder, upright=True, notes=notes
        )

    with_labels = (name for name in ("val", "test") if _has_labels(images[name]) or problems[name])
    validation = next(with_labels, None)
    return annotations("train", notes), annotations(validation) if validation else None


def _has_labels(images: list[BoxImage]) -> bool:
    return any(image.objects is not None for image in images)


def _yolo_label_file(folder: Path, file_name: str) -> Path | None:
    """The text file of an image, or None.

    It lies below labels/ where the image lies below images/, beside the image, or in a labels/
    beside it.
    """
    path = Path(file_name)
    above = list(path.parts[:-1])
    places = [path.parent, path.parent / "labels"]
    if "images" in above:
        above[len(above) - 1 - above[::-1].index("images")] = "labels"
        places.insert(0, Path(*above))
    files = [folder / place / f"{path.stem}.txt" for place in places]
    return next((file for file in files if file.name != "classes.txt" and file.is_file()), None)


def _yolo_objects(
    path: Path, names: list[str], height: int, width: int, remarks: dict[str, int]
) -> list[BoxObject]:
    """The objects in a text file, boxes in pixels; `remarks` counts outlines and scores.

    Raises UserError naming file and line.
    """
    objects = []
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label, *values = map(float, line.split())
        except ValueError:
            values = []
        is_outline = len(values) >= 6 and len(values) % 2 == 0
        if len(values) == 5:
            values.pop()
            remarks["scores"] += 1
        in_range = all(-0.01 <= value <= 1.01 for value in values)
        if not (is_outline or len(values) == 4) or not in_range:
            problem = f"line {number} is not `class cx cy width height`, the last four in 0..1"
            raise UserError(f"{path}: {problem}")
        if label not in range(len(names)):
            problem = f"line {number} has the class {label:g}"
            raise UserError(f"{path}: {problem}; there are names for 0 to {len(names) - 1}")
        if is_outline:
            remarks["outlines"] += 1
            x1, x2 = min(values[0::2]), max(values[0::2])
            y1, y2 = min(values[1::2]), max(values[1::2])
            bbox = [x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height]
        else:
            cx, cy, w, h = values
            bbox = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
        objects.append(BoxObject(names[int(label)], bbox))
    return objects


CLASS_LISTS = ("classes.txt", "labels/classes.txt", "obj.names", "_darknet.labels")


def find_class_names(folder: Path) -> Path | None:
    """The file that holds the class names of a YOLO folder, or None."""
    for name in CLASS_LISTS:
        if (folder / name).is_file():
            return folder / name
    for place in ("train", "labels/train", "images", "obj_train_data"):  # as labelImg leaves it
        if (folder / place / "classes.txt").is_file():
            return folder / place / "classes.txt"
    yamls = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    named = [path for path in yamls if path.stem in ("data", "dataset")] or yamls
    return named[0] if len(named) == 1 else None


def _yolo_names(folder: Path) -> list[str]:
    """The names of the classes in the order of their numbers.

    Raises UserError where they are not found.
    """
    path = find_class_names(folder)
    if path is None:
        needed = "data.yaml with `names:`, or classes.txt with one name per line"
        raise UserError(f"{folder}: a YOLO folder needs {needed}")
    if path.suffix in (".yaml", ".yml"):
        return _different(names_in_yaml(path), path)
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return _different([line.strip() for line in lines if line.strip()], path)


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
