"""Print the calls that take a pseudo-box from the teacher to the loss, and count how often the file
changes on the way.

    python benchmarks/trace_pseudo_box.py                one step of stage one
    python benchmarks/trace_pseudo_box.py --stage two

One step of Semi-DETR runs on two small random images with a small DINO. Every call of a function of
the package is printed in the order of the calls, indented where it is the first of another file. A
reader who follows a box opens the files in this order.

Left out are calls inside the detectors (they decode queries, whatever those stand for), one-line
helpers that the reader need not open (`boxes.py`, `device.py`, `distributed.py`: coordinates,
copies, reductions), and comprehensions, which are no functions.
"""

import argparse
import sys
from pathlib import Path
from types import FrameType

import torch

import semidetr_lite
from semidetr_lite.detectors.backbone import Tiny
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.methods.semi_detr import SemiDETR
from semidetr_lite.training.engine import Engine
from semidetr_lite.training.settings import Runtime

PACKAGE = Path(semidetr_lite.__file__).parent
HELPERS = ("boxes.py", "device.py", "distributed.py")
SIZE = (64, 64)


def small_step(stage: str) -> tuple[Engine, dict, int]:
    """An engine, a batch of one labelled and one unlabelled image, and a step of the stage."""
    torch.manual_seed(0)
    backbone = Tiny((8, 8, 16, 16, 16))
    sizes = {"dim": 16, "heads": 2, "levels": 3, "points": 2, "dim_feedforward": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "denoising_queries": 6}
    student = DINO(num_classes=4, num_queries=8, backbone=backbone, **sizes, **layers)
    method = SemiDETR(student, one_to_many_steps=10, score_threshold=0.0).train()
    image = torch.rand(3, *SIZE)
    boxes = torch.tensor([[8.0, 8, 40, 40], [20, 10, 50, 30]])
    truth = {"boxes": boxes, "labels": torch.tensor([0, 1]), "size": SIZE}
    view = {"size": SIZE, "matrix": torch.eye(3)}
    batch = {
        "labelled": ([image], [truth]),
        "weak": ([image], [view]),
        "strong": ([image], [view]),
    }
    return Engine(method, Runtime()), batch, 3 if stage == "one" else 12


def traced_calls(engine: Engine, batch: dict, step: int) -> list[tuple[str, str]]:
    """(file, function) of every call of the package in a step, in order."""
    calls = []

    def note(frame: FrameType, event: str, _) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE) and not inside_detectors(frame):
            calls.append((path.relative_to(PACKAGE).as_posix(), frame.f_code.co_qualname))

    losses = engine.losses(batch, step)
    sys.setprofile(note)
    try:
        next(losses)
    finally:
        sys.setprofile(None)
    return calls


def inside_detectors(frame: FrameType | None) -> bool:
    """Whether a frame, or one that called it, belongs to a detector."""
    while frame is not None:
        if Path(frame.f_code.co_filename).is_relative_to(PACKAGE / "detectors"):
            return True
        frame = frame.f_back
    return False


def is_read(call: tuple[str, str]) -> bool:
    """Whether a reader opens this function: no helper, no comprehension."""
    file, function = call
    return file not in HELPERS and not function.endswith("comp>") and "<genexpr>" not in function


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stage", choices=("one", "two"), default="one")
    stage = parser.parse_args().stage
    calls = [call for call in traced_calls(*small_step(stage)) if is_read(call)]
    switches, last = -1, None
    for file, function in calls:
        if file != last:
            switches += 1
            print(f"{switches:3d}  {file}")
        print(f"         {function}")
        last = file
    functions, files = len(set(calls)), len({file for file, _ in calls})
    print(
        f"{len(calls)} calls of {functions} functions in {files} files; {switches} switches of file"
    )
    return switches


if __name__ == "__main__":
    main()
