"""A COCO json as the tools of the world write it: its rows, checked and in one spelling.

    {"images": [{"id", "file_name", "width", "height"}],
     "annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height],
                      "area", "iscrowd", "difficult"}],
     "categories": [{"id", "name"}]}

Harmless spellings become the usual one: ids such as "7" or 1.0, sizes such as 96.0, numeric class
names, backslashes in file names, an area that is null or a list. A size that is missing (or -1) is
left out of the row: it stands in the image file. A box that is missing is that of the outline. What
cannot be used becomes a line: of an image or a category in `problems`, of an annotation in
`left_out`.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from semidetr_lite.data.formats import Annotations
from semidetr_lite.errors import UserError
from semidetr_lite.files import json_problems

TABLES = ("images", "annotations", "categories")


def read_coco(path) -> dict:
    """The content of a COCO json whose ids are checked: unique, and referring to each other.

    Raises UserError naming the file and its first problem.
    """
    document, problems, left_out, _ = validate_coco(path, read_coco_json(path), with_files=False)
    for problem in (*problems, *left_out):
        raise UserError(problem)
    return document


def read_annotations(path, image_dirs: list[Path]) -> Annotations:
    """A COCO json and where its images may lie; a file that is none has one problem and no rows."""
    try:
        document, problems, left_out, notes = validate_coco(path, read_coco_json(path))
    except UserError as problem:
        document = {"images": [], "annotations": [], "categories": []}
        problems, left_out, notes = [str(problem)], [], []
    return Annotations(
        Path(path), document, problems, image_dirs, left_out=tuple(left_out), notes=tuple(notes)
    )


# ---- reading -------------------------------------------------------------------------------------


def read_coco_json(path):
    """The content of a json without outlines. Raises UserError as `files.read_json` does.

    Outlines, the "segmentation" of an annotation, are cut from the text before it is parsed: they
    are two thirds of COCO's files, and boxes do without them. A file in which an annotation has an
    outline and no box is read again, whole.
    """
    with json_problems(path), open(path, "rb") as file:
        document = json.loads(b"".join(_without_outlines(file)).decode("utf-8-sig"))
    rows = document.get("annotations") if isinstance(document, dict) else None
    if isinstance(rows, list) and any(_needs_outline(row) for row in rows):
        with json_problems(path):
            document = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    return document


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


def _needs_outline(row) -> bool:
    return isinstance(row, dict) and not row.get("bbox") and "segmentation" in row


# ---- checking ------------------------------------------------------------------------------------


def validate_coco(
    path, document, with_files: bool = True
) -> tuple[dict, list[str], list[str], list[str]]:
    """Check every row of a COCO json and bring it into the usual spelling.

    Args:
        path: of the json, for messages.
        document: its content.
        with_files: whether images need names, and categories names.

    Returns:
        The document with the usable rows; one line about each image or category that is not usable;
        one about each annotation that is not; remarks on what was left out or read another way.

    Raises UserError for content that is not in COCO's format at all.
    """
    _check_lists(path, document)
    problems: list[str] = []
    valid = dict(document)
    ids: dict[str, set] = {}  # of all rows, also of those that cannot be used
    for table, check in (("images", _usual_image), ("categories", _usual_category)):
        valid[table] = []
        ids[table] = set()
        for number, row in enumerate(document[table], 1):
            row = {**row, "id": whole_number(row.get("id"))}
            problem = _id_problem(table, number, row["id"], ids[table])
            if problem is None and with_files:
                problem = check(row)
            if problem is None:
                valid[table].append(row)
            else:
                problems.append(f"{path}: {problem}")
    annotations, left_out, without_box = _usual_annotations(path, document["annotations"], ids)
    image_ids, category_ids = ({row["id"] for row in valid[t]} for t in ("images", "categories"))
    valid["annotations"] = [
        row
        for row in annotations
        if row["image_id"] in image_ids and row["category_id"] in category_ids
    ]
    notes = []
    if without_box:
        notes.append(f"{path}: {without_box} annotations without a box are left out")
    headings = _headings(valid)
    if headings and with_files:
        valid["categories"] = [row for row in valid["categories"] if row["id"] not in headings]
        names = ", ".join(repr(name) for name in headings.values())
        notes.append(
            f"{path}: {names} is the heading of the other classes and has no box: no class"
        )
    return valid, problems, left_out, notes


def _check_lists(path, document) -> None:
    """Raise UserError unless the document holds COCO's lists of objects.

    A json of images alone may lack annotations and categories: they are added, empty.
    """
    if not isinstance(document, dict):
        raise UserError(f"{path}: not COCO's format: it holds no object with {', '.join(TABLES)}")
    if not document.get("annotations"):
        if "images" in document and document.get("annotations") is None:
            document["annotations"] = []
        if "images" in document and document.get("categories") is None:
            document["categories"] = []
    for table in TABLES:
        rows = document.get(table)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f'{path}: not COCO\'s format: it has no list of objects "{table}"')
        needed = table == "images" or table == "categories" and document["annotations"]
        if not rows and needed:
            raise UserError(f'{path}: its list "{table}" is empty')


def whole_number(value) -> int | None:
    """An id or a size as an int: 7, 7.0, "7" and "7.0" are one number. None for anything else."""
    if type(value) is int:
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}(\.0*)?\s*", value):
        value = float(value) if "." in value else int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value if type(value) is int else None


def is_numbers(values, count: int) -> bool:
    """Whether `values`, read from json, is a list of `count` numbers."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) in (int, float) for value in values)
    )


def _id_problem(table: str, number: int, row_id, earlier: set) -> str | None:
    """What is wrong with the id of a row, or None; a good id is added to the `earlier` ones."""
    if row_id is None:
        return f'number {number} of the {table} has no whole number as "id"'
    if row_id in earlier:
        return f"two of the {table} have the id {row_id}; ids must be unique"
    earlier.add(row_id)
    return None


def _usual_image(row: dict) -> str | None:
    """Bring a row of an image into the usual spelling; what is wrong with it, or None."""
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip(" ./\\") or "\0" in name:
        return f'image {row["id"]} has no "file_name"'
    row["file_name"] = name.replace("\\", "/")
    size = [whole_number(row.pop(side, None)) for side in ("width", "height")]
    if all(side is not None and side > 0 for side in size):
        row["width"], row["height"] = size
    return None


def _usual_category(row: dict) -> str | None:
    """The same for a category."""
    name = row.get("name")
    if type(name) in (int, float):
        row["name"] = name = f"{name:g}" if isinstance(name, float) else str(name)
    return None if isinstance(name, str) and name.strip() else f'category {row["id"]} has no "name"'


def _headings(document: dict) -> dict[int, str]:
    """{id: name} of categories that only name the group of the others, as Roboflow writes them."""
    parents = {row.get("supercategory") for row in document["categories"] if isinstance(row, dict)
               and isinstance(row.get("supercategory"), str)}  # fmt: skip
    used = {row["category_id"] for row in document["annotations"]}
    headings = {
        row["id"]: row["name"]
        for row in document["categories"]
        if row["id"] not in used
        and row.get("name") in parents
        and row.get("supercategory") in (None, "", "none")
    }
    return headings if len(headings) < len(document["categories"]) else {}


# ---- annotations ---------------------------------------------------------------------------------


def _usual_annotations(path, rows: list[dict], ids: dict[str, set]) -> tuple[list, list[str], int]:
    """The usable annotations, a line about each of the others, the number of those without a box.

    An annotation without box and outline is a placeholder: some tools write one for every image.
    """
    usable: list[dict] = []
    left_out: list[str] = []
    placeholders = 0
    for number, row in enumerate(rows, 1):
        if not _is_usual(row):
            row = _respelled(row)
        if row["bbox"] is None and not row.get("segmentation"):
            placeholders += 1
            continue
        problem = _annotation_problem(row, ids["images"], ids["categories"])
        if problem is None:
            usable.append(row)
            continue
        name = f"annotation {row['id']}" if "id" in row else f"annotation number {number}"
        left_out.append(f"{path}: {name} {problem}")
    return usable, left_out, placeholders


def _is_usual(row: dict) -> bool:
    """Whether an annotation needs no respelling: the quick way for the 860,000 of COCO."""
    return (
        type(row.get("image_id")) is int
        and type(row.get("category_id")) is int
        and is_numbers(row.get("bbox"), 4)
        and type(row.get("area", 0)) in (int, float)
        and row.get("iscrowd", 0) in (0, 1)
        and row.get("difficult", 0) in (0, 1)
    )


def _respelled(row: dict) -> dict:
    """A copy of an annotation in the usual spelling; "bbox" is None where there is none."""
    row = dict(row)
    for key in ("image_id", "category_id"):
        number = whole_number(row.get(key))
        row[key] = row.get(key) if number is None else number
    bbox = row.get("bbox") or None
    if isinstance(bbox, list):
        numbers = [_number(value) for value in bbox]
        bbox = bbox if None in numbers else numbers
    row["bbox"] = box_of_outline(row.get("segmentation")) if bbox is None else bbox
    area = row.get("area")
    area = _number(area[0] if isinstance(area, list) and len(area) == 1 else area)
    row["area"] = math.nan if area is None else area  # then that of the box is taken
    for key in ("iscrowd", "difficult"):
        mark = row.pop(key, None)
        if mark is not None:
            number = whole_number(mark) if type(mark) is not bool else int(mark)
            row[key] = mark if number is None else number
    return row


def _number(value) -> float | int | None:
    """A number, also one written as text; None for anything else."""
    if type(value) in (int, float):
        return value
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return None


def _annotation_problem(row: dict, image_ids: set, category_ids: set) -> str | None:
    if not is_numbers(row["bbox"], 4):
        return 'needs a "bbox" of 4 numbers, [x, y, width, height]'
    for key, ids, table in (
        ("image_id", image_ids, "images"),
        ("category_id", category_ids, "categories"),
    ):
        if type(row.get(key)) is not int or row[key] not in ids:
            return f"has the {key} {row.get(key)!r}, which is not among the {table}"
    if row.get("iscrowd", 0) not in (0, 1) or row.get("difficult", 0) not in (0, 1):
        return 'needs 0 or 1 as "iscrowd" (and as "difficult", if it is there)'
    return None


# ---- boxes of outlines ---------------------------------------------------------------------------


def box_of_outline(outline) -> list[float] | None:
    """[x, y, width, height] around a "segmentation": polygons, or a mask as run lengths.

    None for anything else, and for an empty mask.
    """
    if isinstance(outline, dict):
        return _box_of_runs(outline)
    if not isinstance(outline, list) or not outline:
        return None
    polygons = outline if all(isinstance(polygon, list) for polygon in outline) else [outline]
    values = [value for polygon in polygons for value in polygon]
    in_pairs = all(len(polygon) % 2 == 0 for polygon in polygons)
    if not values or not in_pairs or not is_numbers(values, len(values)):
        return None
    xs = [x for polygon in polygons for x in polygon[0::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _box_of_runs(mask: dict) -> list[float] | None:
    """The box of a mask {"size": [H, W], "counts"}, whose runs go down the columns."""
    size, counts = mask.get("size"), mask.get("counts")
    if (
        not isinstance(size, list)
        or not is_numbers(size, 2)
        or not all(0 < side < 1e6 for side in size)
    ):
        return None
    height = int(size[0])
    if isinstance(counts, str):
        counts = _decoded_runs(counts)
    if not isinstance(counts, list) or not all(type(n) is int and 0 <= n < 1e12 for n in counts):
        return None
    ends = np.cumsum(counts, dtype=np.int64)
    lengths = np.array(counts[1::2], dtype=np.int64)
    last = ends[1::2][: len(lengths)][lengths > 0] - 1
    first = last + 1 - lengths[lengths > 0]
    if not len(first):
        return None
    x1, x2 = int(first.min() // height), int(last.max() // height) + 1
    within = first // height == last // height  # a run over several columns fills them
    tops = np.where(within, first % height, 0)
    bottoms = np.where(within, last % height, height - 1)
    y1, y2 = int(tops.min()), int(bottoms.max()) + 1
    return [float(x1), float(y1), float(x2 - x1), float(y2 - y1)]


def _decoded_runs(text: str) -> list[int]:
    """The run lengths that COCO's masks store as text: 5 bits a letter, later runs as differences.

    The first bit of a letter's six says whether the number goes on; from the fourth run on a number
    is the difference to the run before the last one.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20 and shift < 60:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
