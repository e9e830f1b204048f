"""The folder of a run: settings, logs and checkpoints, and what becomes of them after a kill.

    config.json  log.jsonl  pseudo_boxes.jsonl
    last.pt  student.safetensors  teacher.safetensors    of the last step
    best.safetensors                                     of the best measurement

best.safetensors holds the weights of student or teacher, whichever had the highest AP on the tune
split at any measuring; its header says which, and of which step. `evaluate` and `predict` use it.
Where the tune split is also the test split, as with one's own validation images, an AP on it
flatters the best a little.

What a step does follows from its number and from `last.pt`. Lines that were logged after `last.pt`
are dropped and logged again.
"""

import json
import math
import os
from pathlib import Path

import torch

from semidetr_lite.contracts import Batch
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.errors import UserError, as_user_error
from semidetr_lite.files import append_jsonl, read_jsonl, write_atomic
from semidetr_lite.methods.mean_teacher import TeacherStudent
from semidetr_lite.training.checkpoint import load_state, read_config, save_weights
from semidetr_lite.training.settings import Config, config_json, read_settings

LOGS = ("log.jsonl", "pseudo_boxes.jsonl")


class RunFolder:
    """The files of a run.

    Args:
        path: the folder; it need not be there yet.

    Raises UserError for a file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.last = self.path / "last.pt"
        self.last_good = "none yet"  # the last checkpoint, in words
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; --out must be a folder")

    def open_new(self) -> None:
        """Raises UserError if there is a run already."""
        if self.last.exists():
            fault = f"{self.path}: holds a run already"
            raise UserError(f"{fault}; choose another --out, or go on with --resume")

    def open_stored(self) -> tuple[Config, dict | None]:
        """Settings and checkpoint of the run that is there; None for one that never saved.

        Raises UserError where there is no run, or a damaged one.
        """
        if (self.path / "config.json").exists() and not self.last.exists():
            return read_settings(read_config(self.path), self.path / "config.json"), None
        state = load_state(self.last)
        with as_user_error(self.last, "not a checkpoint of a run"):
            config = dict(json.loads(state["config"]))
        return read_settings(config, self.last), state

    def begin(self, config: Config, step: int) -> None:
        """Make the folder ready for the steps after `step`.

        Write the settings, drop what is left of a killed process.
        """
        for left in self.path.glob(".*.part"):  # half a file
            left.unlink(missing_ok=True)
        self._drop_lines_after(step)
        write_atomic(self.path / "config.json", config_json(config))

    def _drop_lines_after(self, step: int) -> None:
        """Lines of steps after the checkpoint, or of a run that never saved, are written again."""
        for name in LOGS:
            if os.path.lexists(self.path / name):  # a link is replaced, never followed to write
                lines = read_jsonl(self.path / name, unfinished=True)
                with as_user_error(self.path / name, "not the log of a run"):
                    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
                write_atomic(self.path / name, "".join(kept))

    def append_watched(self, lines: list[dict]) -> None:
        """Add lines to pseudo_boxes.jsonl."""
        append_jsonl(self.path / "pseudo_boxes.jsonl", lines)

    def append_log(self, line: dict) -> None:
        """Add a line to log.jsonl."""
        append_jsonl(self.path / "log.jsonl", [_without_nan(line)])

    def save(
        self, config: Config, method: TeacherStudent, state: dict, nms: dict[str, float]
    ) -> None:
        """Write weights, and everything a resume needs, each file whole or not at all.

        Args:
            config: the settings.
            method: its student and teacher are written as weights.
            state: of optimizer, steps and so on; method and settings are added to it.
            nms: {"student" or "teacher": IoU} where the weights are better with suppression.
        """
        for name, detector in (("student", method.student), ("teacher", method.teacher)):
            save_weights(
                self.path / f"{name}.safetensors",
                detector,
                config.detector,
                arguments=config.detector_kwargs.given(),
                categories=config.categories or [],
                nms=nms.get(name),
            )
        state = {
            "method": method.state_dict(),
            "nms": method.student.nms,
            "config": config_json(config),
            **state,
        }
        write_atomic(self.last, lambda path: torch.save(state, path))
        self.note_saved(state["step"])

    def save_best(self, config: Config, detector: Detector, measured: dict) -> None:
        """Write best.safetensors.

        Args:
            config: the settings.
            detector: its weights.
            measured: {"AP", "weights", "step"} for the header, and "nms" if they have the higher AP
                with non-maximum suppression.
        """
        save_weights(
            self.path / "best.safetensors",
            detector,
            config.detector,
            config.detector_kwargs.given(),
            config.categories or [],
            measured=measured,
            nms=measured.get("nms"),
        )

    def note_saved(self, step: int) -> None:
        """Remember that the checkpoint of a step is there."""
        self.last_good = f"{self.last} (step {step})"

    def save_bad_step(self, batch: Batch, step: int, method: TeacherStudent) -> Path:
        """Keep a step that was skipped for `replay`; returns its file."""
        file = self.path / "bad_step.pt"
        dump = {"batch": batch, "step": step, "method": method.state_dict()}
        write_atomic(file, lambda path: torch.save(dump, path))
        return file


def load_burn_in(folder: str | Path) -> tuple[dict, dict]:
    """The checkpoint of a run to start from, and the JSON object of its settings.

    Raises UserError for none.
    """
    file = Path(folder) / "last.pt"
    if not file.is_file():
        fault = f"{file.parent}: no run to start from, it has no last.pt"
        raise UserError(f"{fault}; give --burn-in a finished run")
    state = load_state(file)
    with as_user_error(file, "not a checkpoint of a run"):
        return state, dict(json.loads(state["config"]))


def _without_nan(line):
    """Numbers as JSON has them: None for one that is not finite."""
    if isinstance(line, dict):
        return {key: _without_nan(value) for key, value in line.items()}
    return None if isinstance(line, float) and not math.isfinite(line) else line
