"""A start that knows something: weights of another detector, as many as fit, for any classes.

A file that others published (public_weights.py), one of this package, or a run folder. Every entry
whose name and shape fit is taken. Of entries with one row per class, the rows of classes with equal
names are taken; those of the other classes stay as they are. Of more queries the first are taken.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from semidetr_lite.data.coco import COCO_IDS
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.public_weights import CLASS_ROWS, published_tensors
from semidetr_lite.errors import UserError, as_user_error

QUERY_ROWS = ("content.weight", "positions.weight")  # entries with a row per query
MIN_TAKEN = 0.1  # of the detector's numbers must be in a file that it starts from

COCO_NAMES = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant "
    "stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe "
    "backpack umbrella handbag tie suitcase frisbee skis snowboard sports_ball kite baseball_bat "
    "baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon bowl "
    "banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch "
    "potted_plant bed dining_table toilet tv laptop mouse remote keyboard cell_phone microwave "
    "oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"
).split()


class StartReport(NamedTuple):
    """What a detector took from a file."""

    title: str  # of the file's kind
    taken: list[str]  # entries, whole
    partly: list[str]  # entries of which some rows are taken
    left: list[str]  # entries of the detector that stay as they are
    classes: list[str]  # names whose rows are taken
    fraction: float  # of the detector's numbers that are taken

    def lines(self) -> list[str]:
        """The report in words."""
        entries = len(self.taken) + len(self.partly) + len(self.left)
        share = f"{100 * self.fraction:.0f} % of the numbers"
        count = f"{len(self.taken)} of {entries} entries, {share}"
        lines = [f"{self.title}: {count}, are taken"]
        named = ", ".join(self.classes[:20]) + (" ..." if len(self.classes) > 20 else "")
        if self.classes:
            lines.append(f"  class rows by name: {named}")
        else:
            lines.append("  no class row is taken: no class of the file has a name of these data")
        others = [key for key in self.left if not key.startswith(CLASS_ROWS)]
        if others:
            listed = ", ".join(others[:4]) + (" ..." if len(others) > 4 else "")
            lines.append(f"  {len(others)} entries stay random: {listed}")
        return lines


def start_from(detector: Detector, path: str | Path, categories: list[dict]) -> StartReport:
    """Take from a file what fits, in place.

    Args:
        detector: any; its own entries stay where the file has nothing that fits.
        path: a published file, a file of this package or a run folder (its EMA weights).
        categories: [{"id", "name"}] of the detector's classes, in the order of the labels.

    Raises:
        UserError: no such file, one of no known kind, or one that fits (nearly) nothing. The
            detector is then unchanged.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "teacher.safetensors"
    values, names, title = _read_start(path, detector)
    current = detector.state_dict()
    ours = [row["name"] for row in categories]
    rows = class_rows(names, ours)
    merged: dict[str, torch.Tensor] = {}
    partly = []
    for key, entry in current.items():
        value = values.get(key)
        if value is None or value.shape[1:] != entry.shape[1:] or value.dim() != entry.dim():
            continue
        if key.startswith(CLASS_ROWS):
            merged |= _with_rows(key, value, entry, rows, len(ours), len(names))
            partly += [key] if key in merged else []
        elif value.shape == entry.shape:
            merged[key] = value
        elif key in QUERY_ROWS:
            count = min(len(value), len(entry))
            merged[key] = torch.cat([value[:count].to(entry), entry[count:]])
            partly.append(key)
    body = [key for key in current if not key.startswith(CLASS_ROWS)]
    total = sum(current[key].numel() for key in body)
    fraction = sum(current[key].numel() for key in body if key in merged) / max(total, 1)
    if fraction < MIN_TAKEN:
        problem = f"{title}, but only {100 * fraction:.1f} % of this detector's numbers fit it"
        advice = "`semidetr doctor --weights` shows its sizes: take the same detector and sizes"
        raise UserError(f"{path}: {problem}; {advice}")
    detector.load_state_dict({**current, **merged})
    taken = [key for key in merged if key not in partly]
    left = [key for key in current if key not in merged]
    shared = [name for name in ours if name in rows]
    return StartReport(f"{path}: {title}", taken, partly, left, shared, fraction)


def class_rows(theirs: list[str], ours: list[str]) -> dict[str, tuple[int, int]]:
    """{name: (row there, row here)} of the classes with equal names, whatever case and spaces."""
    row_of = {_plain(name): row for row, name in enumerate(theirs)}
    return {
        name: (row_of[_plain(name)], row) for row, name in enumerate(ours) if _plain(name) in row_of
    }


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().lower())


def _with_rows(
    key: str,
    value: torch.Tensor,
    entry: torch.Tensor,
    rows: dict[str, tuple[int, int]],
    num_ours: int,
    num_theirs: int,
) -> dict[str, torch.Tensor]:
    """{key: our entry with the rows of the shared classes}; {} where none is shared.

    A further row, of "no object" or of the padding, is the last one of both.
    """
    pairs = list(rows.values())
    if not pairs or len(value) < num_theirs:
        return {}
    if len(value) > num_theirs and len(entry) > num_ours:
        pairs.append((len(value) - 1, len(entry) - 1))
    merged = entry.clone()
    for theirs, our in pairs:
        merged[our] = value[theirs].to(entry)
    return {key: merged}


def _read_start(path: Path, detector: Detector) -> tuple[dict[str, torch.Tensor], list[str], str]:
    """The entries of a file by our names, the names of its class rows, its kind in words."""
    if path.suffix == ".safetensors" and path.is_file():
        with as_user_error(path, "not a weights file"), safe_open(path, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get("semidetr_lite", "null"))
            if header is not None:
                names = [str(row["name"]) for row in header["categories"]]
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}
                return tensors, names, f"weights of {header['detector']}"
    title, values = published_tensors(path, detector)
    head = values.get("class_head.weight", values.get("class_heads.0.weight"))
    count = 0 if head is None else len(head)
    return values, _published_names(path, count), title


def _published_names(path: Path, count: int) -> list[str]:
    """The names of the class rows of a published file: its config.json's, else COCO's.

    Rows that no class has are called "". [] for classes that nothing names.
    """
    config = path.with_name("config.json")
    if config.is_file():
        with as_user_error(config, "not a model's config.json"):
            labels = json.loads(config.read_text(encoding="utf-8")).get("id2label")
        if isinstance(labels, dict):
            return [str(labels.get(str(row), "")) for row in range(min(count, len(labels)))]
    if count in (91, 92):
        names = [""] * 91
        for category_id, name in zip(COCO_IDS, COCO_NAMES, strict=True):
            names[category_id] = name.replace("_", " ")
        return names
    return [name.replace("_", " ") for name in COCO_NAMES] if count in (80, 81) else []


# ---- from one run to the next ----------------------------------------------------------------


def reorder_classes(
    tensors: dict[str, torch.Tensor], theirs: list[str], ours: list[str], source: str | Path
) -> dict[str, torch.Tensor]:
    """The entries of a detector with its class rows in the order of our classes.

    Args:
        tensors: a whole state dict, trained on the classes `theirs`.
        theirs, ours: class names in the order of the labels.
        source: of the entries, for messages.

    Raises:
        UserError: which names the classes, where the two do not have the same.
    """
    if theirs == ours:
        return tensors
    if sorted(theirs) != sorted(ours) or len(set(ours)) < len(ours):
        only_there = ", ".join(repr(name) for name in theirs if name not in ours)
        only_here = ", ".join(repr(name) for name in ours if name not in theirs)
        difference = f"it alone has {only_there or 'none'}, these data alone {only_here or 'none'}"
        advice = "start with --weights instead, which takes what fits"
        raise UserError(f"{source}: was trained on other classes: {difference}; {advice}")
    if not any(key.startswith(CLASS_ROWS) for key in tensors):
        problem = f"has the classes in another order ({', '.join(theirs[:20])})"
        raise UserError(f"{source}: {problem}; give the data the same order")
    order = torch.tensor([theirs.index(name) for name in ours])
    reordered = dict(tensors)
    for key, value in tensors.items():
        if key.startswith(CLASS_ROWS):
            reordered[key] = torch.cat([value[order], value[len(order) :]])
    return reordered
