"""The weights and the state of a run.

Weights are safetensors files; their header holds what is needed to build the detector. `last.pt`
holds everything a resume needs. Nothing in either is executed when it is read.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from semidetr_lite.detectors.detector import Detector
from semidetr_lite.errors import UserError, as_user_error
from semidetr_lite.files import write_atomic
from semidetr_lite.training.presets import make_detector


def save_weights(
    path: Path,
    detector: Detector,
    name: str,
    arguments: dict,
    categories: list[dict],
    dtype: torch.dtype | None = None,
    measured: dict | None = None,
    nms: float | None = None,
) -> None:
    """Write a detector as a safetensors file.

    Args:
        path: the file.
        detector: its weights, `.nms`, `.test_size` and `.train_sides` are written.
        name: of the detector in the commands, such as "dino".
        arguments: keyword arguments it was built with.
        categories: [{"id", "name"}] in the order of the labels.
        dtype: of the numbers in the file; torch.float16 halves its size. They are read as float32.
        measured: what was measured of them, for the header: {"AP", "weights", "step"}.
        nms: IoU of non-maximum suppression that `detect` shall use; the detector's own if None.

    Raises UserError where the file cannot be written.
    """
    header: dict[str, Any] = {
        "detector": name,
        "arguments": arguments,
        "categories": categories,
        "nms": detector.nms if nms is None else nms,
        "test_size": detector.test_size,
    }
    if detector.train_sides is not None:
        header["train_sides"] = detector.train_sides
    if measured is not None:
        header["measured"] = measured
    tensors = {
        key: value.detach().to("cpu", dtype).contiguous()
        for key, value in detector.state_dict().items()
    }
    write_atomic(path, save(tensors, {"semidetr_lite": json.dumps(header)}))


def is_own_file(file: Path) -> bool:
    """Whether a file is one of weights that this package wrote."""
    if file.suffix != ".safetensors":
        return False
    with as_user_error(file, "not a weights file"), safe_open(file, framework="pt") as opened:
        return "semidetr_lite" in (opened.metadata() or {})


def load_detector(path, weights: str = "teacher") -> Detector:
    """A trained detector in eval mode, with `.categories` [{"id", "name"}].

    Args:
        path: a .safetensors file, or a run folder.
        weights: which file of a run folder to read: "student", "teacher" (EMA weights), or "best"
            (those with the highest AP on the tune split at any measuring; the teacher's in a folder
            that has none).

    Raises UserError for a file that is missing or does not hold weights of this package.
    """
    path = Path(path)
    if weights not in ("best", "student", "teacher"):
        raise UserError(f"weights must be 'best', 'student' or 'teacher', got {weights!r}")
    if weights == "best" and not (path / "best.safetensors").is_file():
        weights = "teacher"
    file = path / f"{weights}.safetensors" if path.is_dir() else path
    if not file.is_file():
        advice = "give a run folder made by `semidetr train` or a .safetensors file"
        raise UserError(f"{file}: no such weights; {advice}")
    with as_user_error(file, "not a weights file"), safe_open(file, framework="pt") as opened:
        header = json.loads((opened.metadata() or {}).get("semidetr_lite", "null"))
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    if header is None:
        advice = "only files written by semidetr-lite can be read"
        raise UserError(f"{file}: weights of another program; {advice}")
    with as_user_error(file, "its header is damaged"):
        arguments = {**header["arguments"], "backbone_weights": None}
        detector = make_detector(header["detector"], len(header["categories"]), arguments)
        load_state_strict(detector, tensors, file)
        detector.categories = [
            {"id": int(row["id"]), "name": str(row["name"])} for row in header["categories"]
        ]
        nms = header["nms"]
        detector.nms = None if nms is None else float(nms)
        size = header["test_size"]
        detector.test_size = None if size is None else (int(size[0]), int(size[1]))
        sides = header.get("train_sides")
        detector.train_sides = None if sides is None else (int(sides[0]), int(sides[1]))
    return detector.eval()


def load_state_strict(module: torch.nn.Module, tensors: dict, file: Path) -> None:
    """Load a whole state dict into a module.

    Raises UserError, naming `file`, where an entry is missing, unknown or of another shape.
    """
    expected = module.state_dict()
    mismatched = [
        key
        for key, value in expected.items()
        if key not in tensors or tensors[key].shape != value.shape
    ]
    mismatched += [key for key in tensors if key not in expected]
    if mismatched:
        problem = f"{len(mismatched)} entries differ, first {mismatched[0]!r}"
        raise UserError(f"{file}: weights of another model ({problem})")
    module.load_state_dict(tensors)


def load_state(file: Path) -> dict:
    """The content of `last.pt`. Raises UserError for a file that is missing or no checkpoint."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no checkpoint there; start without --resume")
    with as_user_error(file, "not a checkpoint of semidetr-lite"):
        return dict(torch.load(file, map_location="cpu", weights_only=True))


def read_config(run) -> dict:
    """The settings in the config.json of a run folder. Raises UserError where there is none."""
    file = Path(run) / "config.json"
    if not file.is_file():
        advice = "give a folder that `semidetr train` wrote"
        raise UserError(f"{run}: no config.json, so this is no run folder; {advice}")
    with as_user_error(file, "not a JSON object; the run folder is damaged"):
        return dict(json.loads(file.read_text(encoding="utf-8")).items())
