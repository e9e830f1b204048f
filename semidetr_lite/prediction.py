"""`semidetr predict`: which images are read, and the files that are written about them.

| format | files in the output folder | for |
|---|---|---|
| coco | `annotations.json`, a complete COCO json | labelling tools |
| | `detections.json`, COCO's results | `semidetr evaluate` |
| voc | `Annotations/NAME.xml` | labelling tools |
| yolo | `labels/NAME.txt` and `classes.txt` | labelling tools |
| csv | `detections.csv` | spreadsheets |

An image is called by its path below the folder given. Boxes are in pixels of the upright image, or
of the image as the truth counts it.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from PIL import Image
from tqdm import tqdm

from semidetr_lite.contracts import Target
from semidetr_lite.data.coco import read_coco
from semidetr_lite.data.images import (
    IMAGE_SUFFIXES,
    QUARTER_TURNS,
    images_below,
    orientation_of,
    stored_boxes,
)
from semidetr_lite.data.views import resized
from semidetr_lite.detection_files import match_names
from semidetr_lite.detectors.detector import Detector, load_image
from semidetr_lite.errors import UserError
from semidetr_lite.evaluate import to_coco_json
from semidetr_lite.files import write_atomic
from semidetr_lite.visualize import png, show_targets

DEFAULT_SCORE = 0.3  # of boxes that are drawn and written for labelling tools
MAX_ASPECT = 4  # of a picture; a narrower image gets white beside it


class ImageFile(NamedTuple):
    """An image to detect in."""

    path: Path
    name: str  # below the folder given, with slashes


class Prediction(NamedTuple):
    """What was found in an image."""

    image: ImageFile
    image_id: int
    size: tuple[int, int]  # (H, W) of the pixels that boxes count
    detection: Target  # of every score
    turned: bool  # whether the upright image is not the stored one, and no truth says which counts


class Truth(NamedTuple):
    """Ids that predictions take over from a COCO json."""

    path: Path
    images: dict[str, dict]  # rows by file name
    category_ids: dict[str, int]  # by class name


# ---- images --------------------------------------------------------------------------------------


def find_images(paths: Sequence[Path], out: Path) -> list[ImageFile]:
    """The images given, each once: files, and all images in folders and below them.

    Folders are read as in training: hidden files are left out and links followed. What lies in the
    output folder is no input.

    Raises UserError for a path that is not there, and a folder without images.
    """
    found: dict[str, ImageFile] = {}
    own = os.path.realpath(out)
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such image or folder")
        if path.is_file():
            found.setdefault(os.path.realpath(path), ImageFile(path, path.name))
            continue
        if os.path.realpath(path) == own:
            raise UserError(f"--out {out} is the folder of the images; choose another")
        below = images_below(path)
        for real, image_path in below.items():
            is_output = _is_below(real, own) and not _is_below(os.path.realpath(path), own)
            if not is_output:
                name = Path(os.path.relpath(image_path, path)).as_posix()
                found.setdefault(real, ImageFile(Path(image_path), name))
        if not below:
            raise UserError(f"{path}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    images = list(found.values())
    names = [image.name for image in images]
    if len(set(names)) == len(names):
        return images
    # images of several folders have the same name: their whole paths tell them apart
    return [image._replace(name=image.path.as_posix()) for image in images]


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def printable(text: str) -> str:
    """A file name without the bytes that are no text."""
    return os.fsencode(text).decode("utf-8", "replace")


def _orientation(path: Path) -> int:
    """The EXIF orientation of an image, 1 for one that is stored upright."""
    with Image.open(path) as image:
        return orientation_of(image)


# ---- truth ---------------------------------------------------------------------------------------


def read_truth(path: Path, categories: list[dict]) -> Truth:
    """The ids of a COCO json. Raises UserError for one without file names or with other classes."""
    document = read_coco(path)
    images = {
        row["file_name"]: row for row in document["images"] if isinstance(row.get("file_name"), str)
    }
    ids = {
        row["name"]: row["id"] for row in document["categories"] if isinstance(row.get("name"), str)
    }
    missing = [row["name"] for row in categories if row["name"] not in ids]
    if not images:
        raise UserError(f"{path}: its images have no file_name, so none can be found")
    if missing:
        known = ", ".join(map(str, list(ids)[:5]))
        fault = f"the detector's class {missing[0]!r} is not among its classes ({known})"
        raise UserError(f"{path}: {fault}; make the names of the classes agree")
    return Truth(path, images, {row["name"]: ids[row["name"]] for row in categories})


def _in_truth_pixels(prediction: Prediction, row: dict, stored: bool) -> Prediction:
    """The prediction in the pixels that the truth counts.

    Args:
        prediction: in pixels of the upright image.
        row: of the image in the truth.
        stored: whether the truth counts stored pixels where its sizes leave it open.

    Raises UserError for an image of another size than the truth says.
    """
    prediction = prediction._replace(image_id=row["id"])
    said: tuple[Any, Any] = (row.get("height"), row.get("width"))
    has_size = all(type(side) in (int, float) and side > 0 for side in said)
    orientation = _orientation(prediction.image.path)
    upright = prediction.size
    as_stored = upright[::-1] if orientation in QUARTER_TURNS else upright
    if has_size and said not in (upright, as_stored):
        ours = f"{upright[1]} x {upright[0]} pixels"
        theirs = f"{said[1]:g} x {said[0]:g}"
        fault = f"has {ours}, but the truth says {theirs}"
        raise UserError(f"{prediction.image.path}: {fault}; give the images it was made for")
    if has_size and as_stored != upright:
        stored = said == as_stored
    if stored and orientation != 1:
        boxes = stored_boxes(prediction.detection["boxes"], as_stored, orientation)
        detection = prediction.detection.copy()
        detection["boxes"], detection["size"] = boxes, as_stored
        prediction = prediction._replace(size=as_stored, detection=detection)
    return prediction._replace(turned=False)


def _counts_stored_pixels(images: dict[str, ImageFile], truth: Truth) -> bool:
    """Whether boxes of the truth count stored pixels: unless a size in it is of an upright image.

    Args:
        images: by the truth's names.
    """
    for name, image in images.items():
        with Image.open(image.path) as file:
            orientation = orientation_of(file)
            width, height = file.size
        said = (truth.images[name].get("height"), truth.images[name].get("width"))
        if orientation in QUARTER_TURNS and width != height and said == (width, height):
            return False
    return True


# ---- detection -----------------------------------------------------------------------------------


class Predictor:
    """Detects in image files, one after the other.

    Args:
        detector: with `.categories`.
        out: folder that pictures go to; None for no pictures.
        score: least score of what is drawn.
        nms: see Detector.detect.

    Attributes:
        unread: the UserError of each image that cannot be read.
        far: names and sizes of images whose size is far from that of training.
    """

    def __init__(
        self, detector: Detector, out: Path | None, score: float, nms: float | None = None
    ):
        self.detector, self.out, self.score, self.nms = detector, out, score, nms
        self.unread: list[UserError] = []
        self.far: list[str] = []

    def predict(self, images: list[ImageFile]) -> list[Prediction]:
        """What is found in the images that can be read, numbered from 1."""
        predictions = []
        for number, image in enumerate(tqdm(images, desc="predict", disable=len(images) < 20), 1):
            try:
                pixels = load_image(image.path)
                turned = _orientation(image.path) != 1
            except UserError as problem:
                self.unread.append(problem)
                continue
            detection = self.detector.detect([pixels], nms=self.nms)[0]
            size = (pixels.shape[1], pixels.shape[2])
            if is_far_from_training(self.detector, size):
                self.far.append(f"{printable(image.name)}, {size[1]} x {size[0]}")
            predictions.append(Prediction(image, number, size, detection, turned))
            if self.out is not None:
                name = printable(image.path.stem)[:80]
                drawn = above(detection, self.score)
                picture = draw(pixels, drawn, self.detector.categories, printable(image.name))
                write_atomic(self.out / f"{number - 1:05d}_{name}.png", picture)
        return predictions


def above(detection: Target, score: float) -> Target:
    """The boxes of at least this score."""
    keep = detection["scores"] >= score
    kept = detection.copy()
    kept["boxes"], kept["labels"] = detection["boxes"][keep], detection["labels"][keep]
    kept["scores"] = detection["scores"][keep]
    return kept


def is_far_from_training(detector: Detector, size: tuple[int, int]) -> bool:
    """Whether an image (H, W) looks other than those of training by its size alone.

    Images that are resized: enlarged more than twice, or shrunk more than eight times. Others: over
    twice as long as the longest of training, or under half as long as the shortest.
    """
    if detector.test_size is not None:
        scale = resized(size, *detector.test_size)[0] / size[0]
        return not 1 / 8 <= scale <= 2
    if detector.train_sides is None:
        return False
    shortest, longest = detector.train_sides
    return max(size) > 2 * longest or 2 * max(size) < shortest


def draw(image: torch.Tensor, detection: Target, categories: list[dict], title: str) -> bytes:
    """A PNG of an image (3, H, W) with what was found.

    At its own size, but 320 pixels wide at least and 2,000 at most. A very narrow image has white
    beside it.
    """
    height, width = image.shape[-2:]
    right = max(0, -(-height // MAX_ASPECT) - width)
    below = max(0, -(-width // MAX_ASPECT) - height)
    white = 255 if image.dtype == torch.uint8 else 1.0
    image = torch.nn.functional.pad(image, (0, right, 0, below), value=white)
    width = image.shape[-1]
    cell = min(max(width / 80, 4.0), 8.8)  # inches
    figure = show_targets(
        [image], [detection], categories, [title], columns=1, style="prediction", cell=cell
    )
    return png(figure, dpi=round(min(max(width, 80 * cell), 2000) / cell))


def with_truth(predictions: list[Prediction], truth: Truth) -> tuple[list[Prediction], int, int]:
    """Predictions with the ids and the pixels of a truth.

    Returns:
        Those whose image the truth names; how many it does not name; how many of its images are
        not among them.

    Raises UserError where no image is in the truth, or one has another size there.
    """
    matched = match_names([one.image.name for one in predictions], truth.images)
    names = {one.image.name: matched[one.image.name] for one in predictions}
    listed = [one for one in predictions if names[one.image.name] is not None]
    if predictions and not listed:
        first = printable(predictions[0].image.name)
        raise UserError(f"{truth.path}: lists none of these images, such as {first}")
    files = {str(names[one.image.name]): one.image for one in listed}
    stored = _counts_stored_pixels(files, truth)
    mapped = [
        _in_truth_pixels(one, truth.images[str(names[one.image.name])], stored) for one in listed
    ]
    return mapped, len(predictions) - len(listed), len(truth.images) - len(files)


# ---- files ---------------------------------------------------------------------------------------


def write_predictions(
    predictions: list[Prediction],
    categories: list[dict],
    out: Path,
    format: str,
    score: float,
    results_score: float = 0.0,
) -> str:
    """Write predictions in a format of this module's table; returns what was written, in words.

    Args:
        predictions: of all images.
        categories: [{"id", "name"}] in the order of the labels.
        out: the folder.
        format: "coco", "voc", "yolo" or "csv".
        score: least score of a box that is written.
        results_score: the same for COCO's results, which are scored: an AP counts all boxes.
    """
    shown = [one._replace(detection=above(one.detection, score)) for one in predictions]
    boxes = sum(len(one.detection["boxes"]) for one in shown)
    what = f"{boxes} boxes of at least {score:g}"
    if format == "coco":
        write_atomic(out / "annotations.json", json.dumps(coco_document(shown, categories)))
        scored = [
            one._replace(detection=above(one.detection, results_score)) for one in predictions
        ]
        rows = coco_results(scored, categories)
        write_atomic(out / "detections.json", json.dumps(rows))
        return f"{what} in annotations.json, {len(rows)} in detections.json to evaluate"
    if format == "csv":
        write_atomic(out / "detections.csv", csv_text(shown, categories))
        return f"{what} in detections.csv"
    folder, suffix, text = (
        ("Annotations", "xml", voc_xml) if format == "voc" else ("labels", "txt", yolo_text)
    )
    for one, file in zip(shown, _label_files(shown, out / folder, suffix)):
        write_atomic(file, text(one, categories))
    if format == "yolo":
        names = "".join(f"{row['name']}\n" for row in categories)
        write_atomic(out / "classes.txt", names)
    return f"{what} in {folder}/*.{suffix}"


def _label_files(predictions: list[Prediction], folder: Path, suffix: str) -> list[Path]:
    """A file for each image, at its path below the folder given. Raises UserError for two alike."""
    images: dict[Path, str] = {}
    for one in predictions:
        parts = PurePosixPath(one.image.name).with_suffix(f".{suffix}").parts
        file = folder.joinpath(*(part for part in parts if part not in ("/", "..")))
        if file in images:
            pair = f"{images[file]} and {one.image.name}"
            raise UserError(f"{pair} would have the same label file, {file}; predict them apart")
        images[file] = one.image.name
    return list(images)


def coco_results(predictions: list[Prediction], categories: list[dict]) -> list[dict]:
    """Rows of COCO's results that also name image and class, see detection_files.py."""
    detections = [one.detection for one in predictions]
    rows = to_coco_json(detections, [one.image_id for one in predictions], categories)
    by_id = {one.image_id: one for one in predictions}
    names = {row["id"]: row["name"] for row in categories}
    for row in rows:
        one = by_id[row["image_id"]]
        row["file_name"] = one.image.name
        row["height"], row["width"] = one.size
        row["category_name"] = names[row["category_id"]]
        if one.turned:
            row["turned"] = 1
    return rows


def coco_document(predictions: list[Prediction], categories: list[dict]) -> dict:
    """A complete COCO json: images, categories, and annotations with ids and scores."""
    detections = [one.detection for one in predictions]
    rows = to_coco_json(detections, [one.image_id for one in predictions], categories)
    annotations = []
    for number, row in enumerate(rows, 1):
        area = round(row["bbox"][2] * row["bbox"][3], 3)
        annotations.append({"id": number, **row, "area": area, "iscrowd": 0})
    images = []
    for one in predictions:
        height, width = one.size
        size = {"width": width, "height": height}
        images.append({"id": one.image_id, "file_name": one.image.name, **size})
    return {"images": images, "categories": categories, "annotations": annotations}


def _boxes_and_names(one: Prediction, categories: list[dict]) -> list[tuple]:
    """(class name, score, x1, y1, x2, y2) of each box of a prediction."""
    detection = one.detection
    return [
        (categories[label]["name"], round(score, 6), *(round(value, 3) for value in box))
        for label, score, box in zip(
            detection["labels"].tolist(), detection["scores"].tolist(), detection["boxes"].tolist()
        )
    ]


def csv_text(predictions: list[Prediction], categories: list[dict]) -> str:
    """A table with a line per box."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "width", "height", "class", "score", "x1", "y1", "x2", "y2"])
    for one in predictions:
        height, width = one.size
        for row in _boxes_and_names(one, categories):
            table.writerow([printable(one.image.name), width, height, *row])
    return text.getvalue()


def voc_xml(one: Prediction, categories: list[dict]) -> str:
    """Pascal VOC's XML. Its corners are pixels counted from 1, and both belong to the box."""
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, **texts) -> None:
        for name, text in texts.items():
            ElementTree.SubElement(parent, name).text = str(text)

    height, width = one.size
    add(root, filename=printable(PurePosixPath(one.image.name).name))
    add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    for name, score, x1, y1, x2, y2 in _boxes_and_names(one, categories):
        entry = ElementTree.SubElement(root, "object")
        add(entry, name=name, score=score, difficult=0)
        left, top = (min(round(low) + 1, side) for low, side in ((x1, width), (y1, height)))
        right, bottom = max(round(x2), left), max(round(y2), top)
        corners = {"xmin": left, "ymin": top, "xmax": right, "ymax": bottom}
        add(ElementTree.SubElement(entry, "bndbox"), **corners)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def yolo_text(one: Prediction, categories: list[dict]) -> str:
    """YOLO's lines: class counted from 0, centre and size in fractions of the image."""
    height, width = one.size
    lines = []
    for label, (x1, y1, x2, y2) in zip(
        one.detection["labels"].tolist(), one.detection["boxes"].tolist()
    ):
        centre = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
        numbers = (*centre, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(" ".join([str(label), *(f"{number:.6f}" for number in numbers)]) + "\n")
    return "".join(lines)
