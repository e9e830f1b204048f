"""The benchmark of the COCO step, at toy size: its figures add up, and it leaves the method as it
was.
"""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import batch_shapes
import gpu_step

from semidetr_lite.detectors.detector import padded_side
from semidetr_lite.training import loop


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("bench") / "lines.jsonl"
    before = torch.Tensor.backward
    assert gpu_step.main(["--toy", "--pseudo", "3", "--out", str(out)]) == 0
    assert torch.Tensor.backward is before
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_setup_and_stage_has_its_figures(lines):
    assert [(line["setup"], line["stage"]) for line in lines] == [
        (setup, stage)
        for setup in ("float32:2", "float32:1:checkpointing")
        for stage in gpu_step.STAGES
    ]
    for line in lines:
        assert (
            line["toy"]
            and line["images"] == [2, 8]
            and "failed" not in line
            and line["memory_gb"] is None
        )
        assert 0 < line["pseudo_per_image"] <= 3 and 0 < line["wait"] < 1
        assert 0 < line["passes_alone"] and 0.3 < line["ratio"] < 20
        step, alone, encodings = line["operations"]
        assert 200 < encodings < alone < step < 10 * alone
        assert line["hours"] > line["seconds"] * 120_000 / 3600 / 2


def test_the_parts_are_those_of_a_step(lines):
    for line in lines:
        parts = line["parts"]
        names = {
            f"{who} {part}"
            for who in ("student", "teacher")
            for part in ("backbone", "encoder", "decoder")
        }
        names |= {
            "matching",
            "losses",
            "backward",
            "optimizer",
            "EMA",
            "gradient norm",
            "pseudo-boxes",
        }
        assert names <= set(parts) and ("teacher decoder, groups" in parts) == (
            line["stage"] == "one-to-many"
        )
        assert all(seconds > 0 for name, seconds in parts.items() if name in names)
        assert parts["everything else"] >= 0 and parts["backward"] > parts["EMA"]


def test_the_shapes_of_batches_are_those_of_the_detector(capsys):
    assert (
        batch_shapes.padded_to([(480, 641), (512, 600)], 32)
        == (512, padded_side(641, 32))
        == (512, 672)
    )
    assert batch_shapes.padded_to([(480, 641)] * 2, 32) == (480, 641)
    student, teacher = ("student", 5, 32, 32), ("teacher", 4, 32, 32)
    assert batch_shapes.known_shapes([teacher, student, teacher, student]) == 1.0
    many = [
        ("student", 5, side, side)
        for side in range(batch_shapes.KEPT // batch_shapes.PLANS["student"] + 1)
    ]
    assert batch_shapes.known_shapes([*many, *many]) == 0.0
    assert batch_shapes.main(["--parts", "2", "--steps", "40"]) == 0
    said = capsys.readouterr().out.splitlines()
    known = [float(line.split("batches, ")[1].split(" %")[0]) for line in said]
    assert len(said) == 3 and known == sorted(known) and "area 1.000" in said[0]


def test_a_clock_counts_inner_parts_once(monkeypatch):
    clock, now = gpu_step.Clock(torch.device("cpu")), iter([0, 10, 14, 20, 30, 31])
    monkeypatch.setattr(clock, "now", lambda: next(now))
    inner = clock.timed("inner", lambda: None)
    clock.timed("outer", lambda: inner())()
    inner()
    assert clock.total == {"inner": 4 + 1, "outer": 20 - 4}


def test_a_setup_that_does_not_fit_says_so_in_its_line(tmp_path, monkeypatch):
    def full(engine, *sizes):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "memory_dry_run", full)
    out = tmp_path / "lines.jsonl"
    assert (
        gpu_step.main(
            ["--toy", "--setups", "float32:1", "--stages", "one-to-one", "--out", str(out)]
        )
        == 0
    )
    assert json.loads(out.read_text())["failed"].startswith(
        "out of memory in the largest steps: raise --accumulate"
    )


def test_after_some_minutes_no_setup_is_begun(capsys):
    assert gpu_step.main(["--toy", "--minutes", "0", "--stages", "one-to-one"]) == 0
    said = capsys.readouterr()
    assert "seconds" not in said.out and said.err.splitlines()[-2:] == [
        "no time for float32:2 one-to-one",
        "no time for float32:1:checkpointing one-to-one",
    ]


def test_what_only_a_gpu_shows(monkeypatch):
    """A warning for each wait, and the kernels of a step; here a CPU plays the GPU."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work(batch):
        if modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        torch.mm(batch["matrix"], batch["matrix"])

    found = gpu_step.on_gpu(work, {"matrix": torch.rand(600, 600)}, DeviceType.CPU)
    assert modes == ["default", "warn", "default"]
    assert found["waits"] == 1 and 1 <= found["kernels"] <= 5 and 0 < found["gpu_seconds"] < 5


WITHOUT = """
import sys

MISSING = "numba pycocotools hotcoco matplotlib jinja2 transformers timm IPython ipywidgets onnx"
sys.modules |= dict.fromkeys(MISSING.split())  # None: as if they were not installed
sys.path.insert(0, sys.argv[1])
import gpu_step

stage = ["--setups", "tf32:1:pad_to_multiple_of=64", "--stages", "one-to-one"]
sys.exit(gpu_step.main(["--toy", *stage]))
"""


def test_it_needs_none_of_what_a_gpu_machine_may_lack():
    folder = Path(gpu_step.__file__).parent
    command = [sys.executable, "-c", WITHOUT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["operations"]
