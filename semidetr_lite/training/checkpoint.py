"""Files of a run: written whole or not at all, read without running anything in them.

Weights are safetensors with what is needed to build the detector in their header; `last.pt` holds
everything a resume needs; logs are JSON lines.
"""

import json
import os
import random
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from semidetr_lite.detectors.detector import Detector
from semidetr_lite.errors import UserError, reading
from semidetr_lite.training.presets import make_detector

ADVICE = "free some space or choose another --out, then use --resume"


def write_whole(path: Path, content) -> None:
    """Put text, bytes or what `content(temporary path)` writes in place of a file.

    A UserError leaves the old one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{random.randrange(10**6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:
        raise UserError(
            f"{path}: cannot be written ({str(problem).splitlines()[0]}); {ADVICE}"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_weights(
    path: Path,
    detector: Detector,
    name: str,
    arguments: dict,
    categories: list[dict],
    dtype: torch.dtype | None = None,
) -> None:
    """A detector as safetensors, with its name, arguments, categories and NMS in the header.

    `dtype`: of the numbers in the file, for instance torch.float16 for one half the size; they are
    read as float32.
    """
    header = {"detector": name, "arguments": arguments, "categories": categories}
    header |= {"nms": detector.nms, "test_size": detector.test_size}
    tensors = {
        key: value.detach().to("cpu", dtype).contiguous()
        for key, value in detector.state_dict().items()
    }
    write_whole(path, save(tensors, {"semidetr_lite": json.dumps(header)}))


def load_detector(path, weights: str = "teacher") -> Detector:
    """A trained detector, in eval mode, with `.categories` [{"id", "name"}].

    `path` is a .safetensors file, or a run folder with `weights` "student" or "teacher" (its EMA).
    Raises UserError for a file that is not there or does not hold weights of this package.
    """
    path = Path(path)
    if weights not in ("student", "teacher"):
        raise UserError(f"weights must be 'student' or 'teacher', got {weights!r}")
    file = path / f"{weights}.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{file}: no such weights; "
            "give a run folder made by `semidetr train` or a .safetensors file"
        )
    with reading(file, "not a weights file"), safe_open(file, framework="pt") as opened:
        header = json.loads((opened.metadata() or {}).get("semidetr_lite", "null"))
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    if header is None:
        raise UserError(
            f"{file}: weights of another program; only files written by semidetr-lite can be read"
        )
    with reading(file, "its header is damaged"):
        arguments = {**header["arguments"], "backbone_weights": None}
        detector = make_detector(header["detector"], len(header["categories"]), arguments)
        load_state_strict(detector, tensors, file)
        detector.categories = [
            {"id": int(row["id"]), "name": str(row["name"])} for row in header["categories"]
        ]
        nms, size = header["nms"], header["test_size"]
        detector.nms = None if nms is None else float(nms)
        detector.test_size = None if size is None else (int(size[0]), int(size[1]))
    return detector.eval()


def load_state_strict(module: torch.nn.Module, tensors: dict, file: Path) -> None:
    """Load a state dict, whole; one line if it belongs to another model."""
    own = module.state_dict()
    wrong = [key for key in own if key not in tensors or tensors[key].shape != own[key].shape]
    wrong += [key for key in tensors if key not in own]
    if wrong:
        raise UserError(
            f"{file}: weights of another model ({len(wrong)} entries differ, first {wrong[0]!r})"
        )
    module.load_state_dict(tensors)


def load_state(file: Path) -> dict:
    """What `last.pt` holds; nothing in it is executed."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no checkpoint there; start without --resume")
    with reading(file, "not a checkpoint of semidetr-lite"):
        return dict(torch.load(file, map_location="cpu", weights_only=True))


def read_config(run) -> dict:
    """The settings in a run folder."""
    file = Path(run) / "config.json"
    if not file.is_file():
        raise UserError(
            f"{run}: no config.json, so this is no run folder; "
            "give a folder that `semidetr train` wrote"
        )
    with reading(file, "not a JSON object; the run folder is damaged"):
        return dict(json.loads(file.read_text(encoding="utf-8")).items())


def read_lines(path, unfinished: bool = False) -> list[dict]:
    """The lines of a JSON-lines file, none if there is no file.

    A last one cut short is left out if `unfinished`.
    """
    path = Path(path)
    rows, found = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else [],
        [],
    )
    for number, row in enumerate(rows, 1):
        try:
            found.append(dict(json.loads(row).items()))
        except (ValueError, AttributeError, RecursionError):
            if not unfinished or number < len(rows):
                fault = f"line {number} is not a JSON object, so these are not JSON lines"
                raise UserError(f"{path}: {fault}; mend or delete that line to go on") from None
    return found


def append_lines(path: Path, lines: list[dict]) -> None:
    """Add lines to a JSON-lines file, on the disk when it returns.

    A full disk is a UserError and no half line.
    """
    text = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                while text:  # a nearly full disk takes a part
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
    except OSError as problem:
        raise UserError(f"{path}: cannot be written ({problem.strerror}); {ADVICE}") from None
