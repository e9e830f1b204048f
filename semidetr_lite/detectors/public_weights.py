"""Weights that others published, under our names.

    facebookresearch/detr · fundamentalvision/Deformable-DETR (plain, box refinement, two-stage) ·
    IDEA-Research/DINO (4 and 5 scales) · JCZ404/Semi-DETR (whole, or its supervised detector) ·
    Hugging Face's DETR and Deformable DETR, as saved by versions 4 and 5

Their names become ours by the replacements in public_weights.txt: those that many share, then those of the family. Two
things are more than a name: Hugging Face keeps the three projections of an attention apart (`@q`, `@k`, `@v`: rows of
one matrix here), and Deformable DETR keeps position and content of its queries in one matrix (`a|b`: its left and
right half). Published heads that are shared by all layers appear under many names; any of them will do.
"""

import argparse
import pickle
import re
from configparser import RawConfigParser
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from semidetr_lite.data.coco import COCO_IDS
from semidetr_lite.detectors.deformable_detr import DeformableDETR
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.errors import UserError, as_user_error

# Published detectors have a class row for each of 0..90; ours for 80 classes have those of COCO_IDS.
CLASS_ROWS = ("class_head", "proposal_class", "denoising.labels")  # our entries with a row for each class


class Family(NamedTuple):
    """A kind of published file."""

    title: str
    detector: type[Detector]
    form: dict  # arguments of the detector that the file asks for
    marker: str  # a name that tells the file from the others
    names: str  # parts of public_weights.txt, after "shared"
    settings: dict = {}  # attributes of the detector


class Report(NamedTuple):
    """What became of every entry of a file."""

    title: str
    mapped: dict[str, str]  # their name -> our name
    ignored: list[str]  # counters, the other network of Semi-DETR, its projector
    unmapped: list[str]  # names of something that this detector does not have


NAMES = RawConfigParser(delimiters=["->"], comment_prefixes=["# "])
NAMES.optionxform = str  # capitals stay
NAMES.read_string(resources.files("semidetr_lite.detectors").joinpath("public_weights.txt").read_text("utf-8"))

FAMILIES = [  # those first whose markers others have too
    Family("Semi-DETR (JCZ404)", DINO, {}, "bbox_head.fc_cls.0.weight", "pyramid dino", {"eps": 1e-5}),
    Family("DINO (IDEA-Research)", DINO, {}, "label_enc.weight", "pyramid dino", {"eps": 1e-3}),
    Family("DETR (Hugging Face)", DETR, {}, "class_labels_classifier.weight", "detr"),
    Family("DETR (facebookresearch)", DETR, {}, "class_embed.weight", "detr"),
    *(
        Family(f"Deformable DETR{title} ({who})", DeformableDETR, form, where + marker, f"pyramid {names}")
        for who, where in (("fundamentalvision", "transformer."), ("Hugging Face", "model."))
        for title, form, marker, names in (
            (", two-stage", {"with_box_refine": True, "two_stage": True}, "pos_trans.weight", "refine"),
            (" with box refinement", {"with_box_refine": True}, "decoder.bbox_embed.0.layers.0.weight", "refine"),
            ("", {}, "reference_points.weight", "refine plain"),
        )
    ),
]

# ---- loading ---------------------------------------------------------------------------------------------------------


def load_public_weights(detector: Detector, path, part: str = "teacher") -> Report:
    """Fill a detector with published weights, in place.

    Args:
        detector: DETR, DeformableDETR or DINO of the file's size. Built for 80 classes it takes COCO's 80 rows of a
            file with 91; with softmax scores the file's unused classes are then left out of the sum.
        path: a .pth, .bin or .safetensors file.
        part: of a whole Semi-DETR file, "teacher" (what its authors evaluate) or "student".

    Raises:
        UserError: no such file, none of the known kinds, or one of another detector, form or size. The detector is
            then as it was.
    """
    tensors, ignored = _open(Path(path), part)
    family = recognise(tensors, path)
    form = {name: getattr(detector, name, False) for name in ("with_box_refine", "two_stage")}
    if type(detector) is not family.detector or form != dict.fromkeys(form, False) | family.form:
        raise UserError(f"{path}: weights of {family.title}; build {_call(family)} for them")
    own = detector.state_dict()
    mapped, values = _translate(tensors, family, own)
    unmapped = [key for key in tensors if key not in mapped]
    counters = [key for key in unmapped if key.endswith("num_batches_tracked")]
    for key in own.keys() - values.keys():  # Hugging Face writes tied class heads once
        first = re.sub(r"^class_heads\.\d+", "class_heads.0", key)
        values |= {key: values[first]} if first in values else {}
    values = {key: _class_rows(key, value, own[key]) if key in own else value for key, value in values.items()}
    shapes, wanted = ({key: tuple(entry[key].shape) for key in entry} for entry in (values, own))
    for key in [*wanted, *shapes]:
        theirs, ours = shapes.get(key, "nothing"), wanted.get(key, "nothing")
        if theirs != ours:
            raise UserError(
                f"{path}: weights of {family.title}, but of another size than this detector: {key} is {theirs} there "
                f"and {ours} here; `semidetr doctor --weights` shows the file's sizes"
            )
    detector.load_state_dict(values)
    for name, value in family.settings.items():
        setattr(detector, name, value)
    return Report(family.title, mapped, ignored + counters, [key for key in unmapped if key not in counters])


def recognise(tensors: dict, path) -> Family:
    """The kind of a file by its names."""
    for family in FAMILIES:
        if family.marker in tensors:
            return family
    raise UserError(
        f"{path}: none of the published detectors this reads (DETR, Deformable DETR, DINO, Semi-DETR; their authors' "
        f"files or Hugging Face's); its first entry is {next(iter(tensors), 'none')!r}"
    )


def describe(path, part: str = "teacher") -> list[str]:
    """Lines about a published file: what it is, its sizes, and the detector to build for it."""
    tensors, _ = _open(Path(path), part)
    family = recognise(tensors, path)
    with as_user_error(path, f"entries of {family.title} are missing"), torch.device("meta"):
        mapped, values = _translate(tensors, family, family.detector(num_classes=1, **family.form).state_dict())
        call = _call(family, sizes(values, family))
    return [
        f"{path}: {family.title}, {len(tensors)} entries, {len(tensors) - len(mapped)} without a place here",
        f"build: {call}",
        "then:  load_public_weights(detector, path)",
    ]


def sizes(values: dict, family: Family) -> dict:
    """Arguments of the detector, read off the shapes; heads (8) and points (4) cannot be."""

    def layers(below: str) -> int:
        return len({key.removeprefix(below).split(".")[0] for key in values if key.startswith(below)})

    head = values.get("class_head.weight", values.get("class_heads.0.weight"))
    learned = values.get("content.weight", values.get("positions.weight"))
    blocks = layers("backbone.layers.2.")
    found = {"num_classes": len(head) - (family.detector is DETR)}
    found |= {"num_queries": len(learned)} if learned is not None else {}
    found |= {"levels": len(values["level_embedding"])} if "level_embedding" in values else {}
    found |= {"hidden": len(values["encoder.0.feed_forward.linear1.weight"]), "dim": head.shape[1]}
    found |= {"encoder_layers": layers("encoder."), "decoder_layers": layers("decoder.")}
    resnet = {6: "resnet50", 23: "resnet101"}.get(blocks, f"a ResNet with {blocks} blocks in layer 3")
    return found | {"backbone": resnet}


def _call(family: Family, arguments: dict | None = None) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in ((arguments or {}) | family.form).items())
    return f"{family.detector.__name__}({given})" if given else family.detector.__name__


def _open(path: Path, part: str) -> tuple[dict, list[str]]:
    """The tensors of a file under their names, outer wrappings taken off, and the names left out."""
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # options of a training, in some files
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of weights") from None
    except (pickle.UnpicklingError, EOFError):
        reason = "not a file of tensors alone, as torch.save writes it"
        raise UserError(f"{path}: cannot be read as weights: {reason}") from None
    except Exception as problem:  # damaged pickles raise almost anything
        reason = (str(problem).splitlines() or [type(problem).__name__])[0][:100]
        advice = "give the published .pth or .safetensors"
        raise UserError(f"{path}: cannot be read as weights ({reason}); {advice}") from None
    content = content if isinstance(content, dict) else {}
    wrappings = (content.get(name) for name in ("model", "state_dict", "ema_model", "inited_model"))
    content = next((inner for inner in wrappings if isinstance(inner, dict)), content)
    tensors = {key.removeprefix("module."): value for key, value in content.items() if torch.is_tensor(value)}
    if any(key.startswith("teacher.") for key in tensors):  # Semi-DETR, both networks and the projector
        if part not in ("teacher", "student"):
            raise UserError(f"{path}: holds a teacher and a student; part must be one of them, got {part!r}")
        chosen = {key: value for key, value in tensors.items() if key.startswith(f"{part}.")}
        ignored = [key for key in tensors if key not in chosen]
        return {key.removeprefix(f"{part}."): value for key, value in chosen.items()}, ignored
    return tensors, []


def _translate(tensors: dict, family: Family, own: dict) -> tuple[dict, dict]:
    """their name -> our name of all that has a place among `own`, whatever its number; the tensors under our names."""
    layers = [int(found[1]) for key in tensors if (found := re.search(r"decoder\.layers\.(\d+)\.", key))]
    special = {".": r"\.", "#": r"\d+", "LAST": str(max(layers, default=-1) + 1)}
    rules = [
        (re.compile(re.sub(r"\.|#|LAST", lambda found: special[found[0]], theirs)), ours)
        for part in ["shared", *family.names.split()]
        for theirs, ours in NAMES.items(part)
    ]
    known = {re.sub(r"\d+", "#", key) for key in own}
    mapped, values = {}, {}
    for key, value in tensors.items():
        name = key
        for rule, ours in rules:
            name = rule.sub(ours, name)
        names = name.split("|")
        if re.sub(r"\d+", "#", names[0].split("@")[0]) in known:
            mapped[key] = name
            values |= zip(names, value.chunk(len(names), dim=-1) if names[1:] else [value])
    for name in [key.removesuffix("@q") for key in values if key.endswith("@q")]:
        parts = [values.pop(f"{name}@{part}", None) for part in "qkv"]
        values |= {name: torch.cat(parts)} if all(part is not None for part in parts) else {}
    return mapped, values


def _class_rows(key: str, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """COCO's 80 rows of 91 (or more), and the rows behind the classes, where our detector has those alone."""
    if not key.startswith(CLASS_ROWS) or len(value) == len(own):
        return value
    if len(value) in (91, 92) and len(own) in (80, 81):
        return value[COCO_IDS + [91] * (len(own) - 80)]
    return value[: len(own)] if key.startswith("denoising") else value
