"""Files of detections that are scored against a truth: COCO results, or a COCO json with scores.

    [{"image_id", "category_id", "bbox" [x, y, width, height], "score"}]
    {"images": [...], "categories": [...], "annotations": [the same rows]}

Rows of `semidetr predict` also name their image ("file_name", "width", "height") and their class
("category_name"). Where they do, or where the document lists its images and categories, images and
classes are those of the same name in the truth, whatever their ids. So detections are never scored
on a neighbouring image, nor in pixels of another size.
"""

import math
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from semidetr_lite.errors import UserError

NUMBERS = ("image_id", "category_id", "score")


def match_names(names: Iterable[str], known: Iterable[str]) -> dict[str, str | None]:
    """Which of the `known` file names each name means, None for none.

    Names are equal, or else their ends are: "val/a.jpg" means "a.jpg". Backslashes separate
    folders as slashes do.

    Raises UserError for a name that fits several.
    """
    by_base: dict[str, list[str]] = {}
    for name in known:
        by_base.setdefault(_parts(name)[-1], []).append(name)
    found: dict[str, str | None] = {}
    for name in names:
        alike = by_base.get(_parts(name)[-1], [])
        if len(alike) > 1:
            shared = [_shared_end(name, other) for other in alike]
            alike = [other for other, count in zip(alike, shared) if count == max(shared)]
        if len(alike) > 1:
            fault = f"{name} may be {alike[0]} or {alike[1]}"
            raise UserError(f"{fault}: give the images by the folders that the truth names")
        found[name] = alike[0] if alike else None
    return found


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name.replace("\\", "/")).parts or ("",)


def _shared_end(name: str, other: str) -> int:
    """How many parts of two paths agree, from the last one up."""
    count = 0
    for one, two in zip(reversed(_parts(name)), reversed(_parts(other))):
        if one != two:
            break
        count += 1
    return count


def detection_rows(path, content, truth: dict) -> list[dict]:
    """The rows of a file of detections, with the truth's ids: image_id, category_id, bbox, score.

    Rows on images without truth may stay: they are not used.

    Args:
        path: of the file, for messages.
        content: of the file: a list of rows, or a document with "annotations".
        truth: the COCO ground truth.

    Raises UserError for content that holds no detections, none on an image of the truth, or some
    that cannot be compared with it.
    """
    rows = _listed_rows(path, content)
    rows = [_checked_row(f"{path}: detection number {n}", row) for n, row in enumerate(rows, 1)]
    if rows and all(isinstance(row.get("file_name"), str) for row in rows):
        _use_ids_of_names(path, rows, truth)
    if rows and all(isinstance(row.get("category_name"), str) for row in rows):
        _use_classes_of_names(path, rows, truth)
    category_ids = {category["id"] for category in truth["categories"]}
    for number, row in enumerate(rows, 1):
        if row["category_id"] not in category_ids:
            fault = f"{path}: detection number {number} has a category_id unknown to the truth"
            raise UserError(f"{fault}, {row['category_id']}")
    image_ids = {image["id"] for image in truth["images"]}
    if rows and not any(row["image_id"] in image_ids for row in rows):
        fault = f"none of its {len(rows):,} detections is on an image of the truth"
        raise UserError(f"{path}: {fault}; another data set?")
    keys = ("image_id", "category_id", "bbox", "score")
    return [{key: row[key] for key in keys} for row in rows]


def _listed_rows(path, content) -> list:
    """The rows of both forms; those of a document get the names that it lists."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise UserError(f"{path}: not a COCO results file: it holds no list of detections")
    images, categories = (
        {row["id"]: row for row in _rows_of(content, table) if _is_named(row, name)}
        for table, name in (("images", "file_name"), ("categories", "name"))
    )
    rows = []
    for row in content["annotations"]:
        if isinstance(row, dict):
            image = images.get(_hashable(row.get("image_id")), {})
            category = categories.get(_hashable(row.get("category_id")), {})
            named = {key: image[key] for key in ("file_name", "width", "height") if key in image}
            named |= {"category_name": category["name"]} if category else {}
            row = {**named, **row}
        rows.append(row)
    return rows


def _rows_of(content: dict, table: str) -> list:
    rows = content.get(table)
    return rows if isinstance(rows, list) else []


def _is_named(row, name: str) -> bool:
    return isinstance(row, dict) and isinstance(row.get(name), str) and type(row.get("id")) is int


def _hashable(value):
    return value if isinstance(value, int | float | str) else None


def _checked_row(here: str, row) -> dict:
    """A row with a box and numbers; text that is a number counts as one. Raises UserError."""
    box = row.get("bbox") if isinstance(row, dict) else None
    given = [_number(row.get(key)) for key in NUMBERS] if isinstance(row, dict) else [None]
    numbers = [value for value in given if value is not None]
    is_box = isinstance(box, list) and len(box) == 4
    is_box = is_box and all(type(value) in (int, float) for value in box or [])
    if not is_box or len(numbers) < len(given):
        raise UserError(f'{here} needs a "bbox" of 4 numbers and numbers as {NUMBERS}')
    if not math.isfinite(numbers[2]):
        raise UserError(f"{here} has the score {numbers[2]}; scores are finite numbers")
    return {**row, **dict(zip(NUMBERS, numbers))}


def _number(value) -> int | float | None:
    """A number, or a text that is one; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if type(value) not in (int, float):
        return None
    return int(value) if math.isfinite(value) and value == int(value) else value


def _use_ids_of_names(path, rows: list[dict], truth: dict) -> None:
    """Give rows the ids of the truth's images of the same name. Raises UserError where none is."""
    images = {row["file_name"]: row for row in truth["images"] if _is_named(row, "file_name")}
    if not images:  # a truth without names, whose ids must do
        return
    matched = match_names({row["file_name"] for row in rows}, images)
    if not any(matched.values()):
        fault = f"its images, such as {rows[0]['file_name']!r}, are not in the truth"
        raise UserError(f"{path}: {fault}; another data set?")
    for row in rows:
        name = matched[row["file_name"]]
        row["image_id"] = None if name is None else images[name]["id"]
        if name is not None:
            _check_pixels(path, row, images[name])


def _check_pixels(path, row: dict, image: dict) -> None:
    """Raises UserError where boxes and truth count other pixels of the same image."""
    sizes: list[tuple[Any, Any]] = [(one.get("width"), one.get("height")) for one in (row, image)]
    known = all(type(side) in (int, float) and side > 0 for size in sizes for side in size)
    name, advice = row["file_name"], "give --truth to `semidetr predict`, which then writes those"
    if known and sizes[0] != sizes[1]:
        ours, theirs = (f"{width:g} x {height:g} pixels" for width, height in sizes)
        raise UserError(f"{path}: {name} has {ours} here, but {theirs} in the truth; {advice}")
    if row.get("turned"):
        fault = f"{name} is turned by its EXIF data, and the truth may count stored pixels"
        raise UserError(f"{path}: {fault}; {advice}")


def _use_classes_of_names(path, rows: list[dict], truth: dict) -> None:
    """Give rows the ids of the truth's classes of the same name; others are left out of the score.

    Raises UserError where no class has such a name.
    """
    ids = {row["name"]: row["id"] for row in truth["categories"] if _is_named(row, "name")}
    if not ids:
        return
    names = sorted({row["category_name"] for row in rows})
    if not ids.keys() & set(names):
        fault = f"its classes ({', '.join(names[:3])}) are none of the truth's"
        raise UserError(f"{path}: {fault} ({', '.join(sorted(ids)[:3])})")
    unknown = [name for name in names if name not in ids]
    if unknown:
        fault = f"its class {unknown[0]!r} is not in the truth"
        raise UserError(f"{path}: {fault}; make the names of the classes agree")
    for row in rows:
        row["category_id"] = ids[row["category_name"]]
