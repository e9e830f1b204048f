"""Published weights, loaded into the detectors of this package.

    facebookresearch/detr · fundamentalvision/Deformable-DETR (plain, box refinement, two-stage) ·
    IDEA-Research/DINO (4 and 5 scales) · JCZ404/Semi-DETR (whole, or its supervised detector) ·
    Hugging Face's DETR and Deformable DETR, as saved by versions 4 and 5

Published names become ours by the regular expressions in public_weights.txt: first those of the
section "shared", then those of the family. Two differences are more than a name:

* Hugging Face stores the three projections of an attention one by one; here they are the rows of
  one matrix (marked @q, @k, @v while names are translated).
* Deformable DETR stores position and content of its queries in one matrix; here they are two
  (marked a|b: the left and the right half).

Published heads that all layers share appear under many names; any one of them is used.
"""

import re
from collections.abc import Iterable
from configparser import RawConfigParser
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from semidetr_lite.data.coco import COCO_IDS
from semidetr_lite.detectors.deformable_detr import DeformableDETR
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.detectors.weight_files import read_tensors
from semidetr_lite.errors import UserError, as_user_error

# Published detectors have a class row for each of 0..90; ours for 80 classes those of COCO_IDS.
CLASS_ROWS = ("class_head", "proposal_class", "denoising.labels")  # entries with a row per class


class Family(NamedTuple):
    """A kind of published file."""

    title: str
    detector: type[DETR] | type[DeformableDETR] | type[DINO]
    form: dict[str, Any]  # keyword arguments of the detector that make it fit the file
    marker: str  # a published name by which the kind is recognised
    sections: str  # of public_weights.txt, after "shared"
    attributes: dict[str, float] = {}  # of the detector, set after loading


class Report(NamedTuple):
    """What became of the entries of a file."""

    title: str  # of the family
    mapped: dict[str, str]  # published name -> our name
    ignored: list[str]  # batch counters, the other network of Semi-DETR, its projector
    unmapped: list[str]  # names of something that this detector does not have


RENAMES = RawConfigParser(delimiters=["->"], comment_prefixes=["# "])
RENAMES.optionxform = str  # type: ignore[method-assign, assignment]  # case-sensitive names
RENAMES.read_string(
    resources.files("semidetr_lite.detectors").joinpath("public_weights.txt").read_text("utf-8")
)

REFINE = {"with_box_refine": True}
TWO_STAGE = {"with_box_refine": True, "two_stage": True}
REFINE_MARKER = "decoder.bbox_embed.0.layers.0.weight"

# The first family whose marker is in a file is taken: markers of later ones occur in earlier ones.
FAMILIES = [
    Family(
        "Semi-DETR (JCZ404)", DINO, {}, "bbox_head.fc_cls.0.weight", "pyramid dino", {"eps": 1e-5}
    ),
    Family("DINO (IDEA-Research)", DINO, {}, "label_enc.weight", "pyramid dino", {"eps": 1e-3}),
    Family("DETR (Hugging Face)", DETR, {}, "class_labels_classifier.weight", "detr"),
    Family("DETR (facebookresearch)", DETR, {}, "class_embed.weight", "detr"),
    Family(
        "Deformable DETR, two-stage (fundamentalvision)",
        DeformableDETR,
        TWO_STAGE,
        "transformer.pos_trans.weight",
        "pyramid refine",
    ),
    Family(
        "Deformable DETR with box refinement (fundamentalvision)",
        DeformableDETR,
        REFINE,
        f"transformer.{REFINE_MARKER}",
        "pyramid refine",
    ),
    Family(
        "Deformable DETR (fundamentalvision)",
        DeformableDETR,
        {},
        "transformer.reference_points.weight",
        "pyramid refine plain",
    ),
    Family(
        "Deformable DETR, two-stage (Hugging Face)",
        DeformableDETR,
        TWO_STAGE,
        "model.pos_trans.weight",
        "pyramid refine",
    ),
    Family(
        "Deformable DETR with box refinement (Hugging Face)",
        DeformableDETR,
        REFINE,
        f"model.{REFINE_MARKER}",
        "pyramid refine",
    ),
    Family(
        "Deformable DETR (Hugging Face)",
        DeformableDETR,
        {},
        "model.reference_points.weight",
        "pyramid refine plain",
    ),
]

# ---- loading -------------------------------------------------------------------------------------


def load_public_weights(detector: Detector, path: str | Path, network: str = "teacher") -> Report:
    """Load published weights into a detector, in place.

    Args:
        detector: DETR, DeformableDETR or DINO of the file's size. If it has 80 classes and the
            file has 91, it takes COCO's 80 rows; with softmax scores the unused classes of the
            file are then left out of the sum.
        path: a .pth, .bin or .safetensors file.
        network: of a whole Semi-DETR file "teacher" (which its authors evaluate) or "student".

    Raises:
        UserError: no such file, none of the known kinds, or one of another detector, form or size.
            The detector is then unchanged.
    """
    tensors, ignored = _read_tensors(Path(path), network)
    family = recognise(tensors, path)
    form = {name: getattr(detector, name, False) for name in TWO_STAGE}
    if type(detector) is not family.detector or form != dict.fromkeys(form, False) | family.form:
        call = _constructor_call(family, family.form)
        raise UserError(f"{path}: weights of {family.title}; build {call} for them")
    current = detector.state_dict()
    mapped, values = _translate(tensors, family, current)
    for key in current.keys() - values.keys():
        # Hugging Face stores class heads that are tied only once
        first = re.sub(r"^class_heads\.\d+", "class_heads.0", key)
        if first in values:
            values[key] = values[first]
    for key in values.keys() & current.keys():
        values[key] = _select_class_rows(key, values[key], current[key])
    _check_shapes(values, current, family, path)
    detector.load_state_dict(values)
    for name, value in family.attributes.items():
        setattr(detector, name, value)
    unmapped = [key for key in tensors if key not in mapped]
    counters = [key for key in unmapped if key.endswith("num_batches_tracked")]
    unmapped = [key for key in unmapped if key not in counters]
    return Report(family.title, mapped, ignored + counters, unmapped)


def build_public_detector(
    path: str | Path,
    num_classes: int,
    network: str = "teacher",
    test_size: tuple[int, int] | None = (800, 1333),
) -> Detector:
    """The detector of a published file, with its weights, in eval mode.

    Args:
        path, network: see load_public_weights.
        num_classes: of the data it is for. A file of COCO's 91 ids fits 80 classes.
        test_size: see Detector.

    Raises:
        UserError: see load_public_weights; or the file is for other classes.
    """
    tensors, _ = _read_tensors(Path(path), network)
    family = recognise(tensors, path)
    with as_user_error(path, f"entries of {family.title} are missing"):
        with torch.device("meta"):  # shapes without memory
            example = family.detector(num_classes=1, **family.form)
        arguments = sizes(_translate(tensors, family, example.state_dict())[1], family)
    theirs = arguments.pop("num_classes")
    if num_classes not in (theirs, len(COCO_IDS) if theirs == 91 else theirs):
        fault = f"weights for {theirs} classes, but the data have {num_classes}"
        raise UserError(f"{path}: {fault}; give the data that they were trained on")
    detector = family.detector(num_classes, **family.form, **arguments, test_size=test_size)
    load_public_weights(detector, path, network)
    return detector.eval()


def recognise(tensors: dict[str, torch.Tensor], path: str | Path) -> Family:
    """The kind of a file, by its names. Raises UserError for an unknown kind."""
    for family in FAMILIES:
        if family.marker in tensors:
            return family
    raise UserError(
        f"{path}: none of the published detectors this reads (DETR, Deformable DETR, DINO, "
        "Semi-DETR; their authors' files or Hugging Face's); its first entry is "
        f"{next(iter(tensors), 'none')!r}"
    )


def published_tensors(
    path: str | Path, detector: Detector, network: str = "teacher"
) -> tuple[str, dict[str, torch.Tensor]]:
    """The kind of a published file, and its tensors by the names of a detector's entries.

    The detector may be of another kind, size or number of classes: names that it does not have are
    left out. Raises UserError as `load_public_weights` does for a file.
    """
    tensors, _ = _read_tensors(Path(path), network)
    family = recognise(tensors, path)
    current = detector.state_dict()
    with as_user_error(path, f"entries of {family.title} cannot be read"):
        _, values = _translate(tensors, family, current)
    for key in current.keys() - values.keys():
        first = re.sub(r"^class_heads\.\d+", "class_heads.0", key)
        if first in values:
            values[key] = values[first]
    return family.title, values


def describe(path: str | Path, network: str = "teacher") -> list[str]:
    """Lines about a published file: what it is, its sizes, and the detector to build for it.

    Raises:
        UserError: see load_public_weights.
    """
    tensors, _ = _read_tensors(Path(path), network)
    family = recognise(tensors, path)
    with as_user_error(path, f"entries of {family.title} are missing"):
        with torch.device("meta"):  # shapes without memory
            example = family.detector(num_classes=1, **family.form)
        mapped, values = _translate(tensors, family, example.state_dict())
        call = _constructor_call(family, sizes(values, family) | family.form)
    unmapped = len(tensors) - len(mapped)
    return [
        f"{path}: {family.title}, {len(tensors)} entries, {unmapped} without a place here",
        f"build: {call}",
        "then:  load_public_weights(detector, path)",
    ]


def sizes(values: dict[str, torch.Tensor], family: Family) -> dict[str, Any]:
    """Keyword arguments of the detector that follow from the shapes of its tensors.

    Heads (8) and points (4) do not follow from them.
    """
    shared = "class_head.weight"  # by all layers, if there is one
    head = values[shared if shared in values else "class_heads.0.weight"]
    learned = values.get("content.weight", values.get("positions.weight"))
    no_object = family.detector is DETR
    arguments: dict[str, int | str] = {"num_classes": len(head) - no_object}
    if learned is not None:
        arguments["num_queries"] = len(learned)
    if "level_embedding" in values:
        arguments["levels"] = len(values["level_embedding"])
    arguments["dim_feedforward"] = len(values["encoder.0.feed_forward.linear1.weight"])
    arguments["dim"] = head.shape[1]
    arguments["encoder_layers"] = _count_layers(values, "encoder.")
    arguments["decoder_layers"] = _count_layers(values, "decoder.")
    blocks = _count_layers(values, "backbone.layers.2.")
    unknown = f"a ResNet with {blocks} blocks in layer 3"
    arguments["backbone"] = {6: "resnet50", 23: "resnet101"}.get(blocks, unknown)
    return arguments


def _count_layers(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow the prefix."""
    return len(
        {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
    )


def _constructor_call(family: Family, arguments: dict) -> str:
    """The call that builds the detector, as text."""
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"{family.detector.__name__}({text})" if text else family.detector.__name__


def _check_shapes(values: dict, current: dict, family: Family, path: str | Path) -> None:
    """Raise UserError for the first entry that is missing, superfluous or of another shape."""
    for key in [*current, *values]:
        theirs = tuple(values[key].shape) if key in values else "nothing"
        ours = tuple(current[key].shape) if key in current else "nothing"
        if theirs != ours:
            raise UserError(
                f"{path}: weights of {family.title}, but of another size than this detector: "
                f"{key} is {theirs} there and {ours} here; "
                "`semidetr doctor --weights` shows the file's sizes"
            )


# ---- reading -------------------------------------------------------------------------------------


def _read_tensors(path: Path, network: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of a file by name, without outer wrappings, and the names that are left out.

    Raises:
        UserError: the file cannot be read; or it is a whole Semi-DETR file and `network` is neither
            "teacher" nor "student".
    """
    tensors = read_tensors(path)
    if not any(key.startswith("teacher.") for key in tensors):
        return tensors, []
    # Semi-DETR: both networks and the projector
    if network not in ("teacher", "student"):
        raise UserError(
            f"{path}: holds a teacher and a student; network must be one of them, got {network!r}"
        )
    prefix = f"{network}."
    ignored = [key for key in tensors if not key.startswith(prefix)]
    tensors = {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }
    return tensors, ignored


# ---- names ---------------------------------------------------------------------------------------


def _translate(
    tensors: dict[str, torch.Tensor], family: Family, current: dict[str, torch.Tensor]
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Rename the entries of a file.

    Args:
        tensors: by published name.
        family: of the file.
        current: the detector's state dict. Layers in the names may have any number: a file with
            more layers is found out by its shapes.

    Returns:
        published name -> our name, of all entries that this detector has; the tensors by our name.
    """
    rules = _rename_rules(tensors, family)
    known = {re.sub(r"\d+", "#", key) for key in current}
    mapped, values = {}, {}
    for key, value in tensors.items():
        name = key
        for pattern, replacement in rules:
            name = pattern.sub(replacement, name)
        names = name.split("|")
        without_numbers = re.sub(r"\d+", "#", names[0].split("@")[0])
        if without_numbers not in known:
            continue
        mapped[key] = name
        if len(names) == 1:
            values[name] = value
        else:
            values |= zip(names, value.chunk(len(names), dim=-1))
    _join_projections(values)
    return mapped, values


def _rename_rules(tensors: dict[str, torch.Tensor], family: Family) -> list[tuple[re.Pattern, str]]:
    """(pattern, replacement) of each rule for a family; see the head of public_weights.txt."""
    matches = (re.search(r"decoder\.layers\.(\d+)\.", key) for key in tensors)
    last_layer = max((int(match[1]) for match in matches if match), default=-1)
    special = {".": r"\.", "#": r"\d+", "LAST": str(last_layer + 1)}
    rules = []
    for section in ["shared", *family.sections.split()]:
        for theirs, ours in RENAMES.items(section):
            pattern = re.sub(r"\.|#|LAST", lambda match: special[match[0]], theirs)
            rules.append((re.compile(pattern), ours))
    return rules


def _join_projections(values: dict[str, torch.Tensor]) -> None:
    """Join the query, key and value rows of each attention, where all three are there; in place."""
    for name in [key.removesuffix("@q") for key in values if key.endswith("@q")]:
        keys = [f"{name}@{projection}" for projection in "qkv"]
        parts = [values.pop(key) for key in keys if key in values]
        if len(parts) == len(keys):
            values[name] = torch.cat(parts)


def _select_class_rows(key: str, value: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """COCO's 80 rows of 91 or 92, and the row after the classes, if our entry has only those."""
    if not key.startswith(CLASS_ROWS) or len(value) == len(current):
        return value
    if len(value) in (91, 92) and len(current) in (80, 81):
        return value[COCO_IDS + [91] * (len(current) - 80)]
    return value[: len(current)] if key.startswith("denoising") else value
