"""The demo: runs side by side end as they would alone, and a stop or a failure of one loses
nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from semidetr_lite import cli, gallery
from semidetr_lite.errors import UserError
from semidetr_lite.files import read_jsonl
from semidetr_lite.training import demo
from semidetr_lite.training.checkpoint import load_state
from semidetr_lite.training.demo import train_demo_run, train_side_by_side
from tests.test_cli import coco_folder
from tests.test_train import SMALL

NAMES = ["control", "semi-detr"]


@pytest.fixture(scope="module")
def changes(tmp_path_factory) -> dict:
    """Settings of tiny runs on eight images."""
    data = coco_folder(tmp_path_factory.mktemp("data"))
    return {**SMALL, "data": str(data), "percent": 50.0, "steps": 4}


def state(folder) -> dict:
    return load_state(folder / "last.pt")["method"]


def test_runs_side_by_side_are_those_that_each_would_be_alone(changes, tmp_path):
    train_demo_run("supervised", tmp_path, 3, quiet=True, **changes)
    folders = train_side_by_side(NAMES, tmp_path, 3, **changes)
    assert folders == [tmp_path / name for name in NAMES]
    for name in NAMES:
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["runtime"]["threads"] == 1 and config["burn_in"] == str(
            tmp_path / "supervised"
        )
        alone = train_demo_run(
            name, tmp_path, 3, folder=f"{name} alone", quiet=True, threads=1, **changes
        )
        ours, theirs = state(tmp_path / name), state(alone)
        assert all(torch.equal(ours[key], theirs[key]) or ours[key].isnan().any() for key in ours)
        assert "test" in read_jsonl(tmp_path / name / "log.jsonl")[-1]


def test_the_message_of_a_run_that_fails_arrives(changes, tmp_path):
    train_demo_run("supervised", tmp_path, 3, quiet=True, **changes)
    train_demo_run("semi-detr", tmp_path, 4, quiet=True, threads=1, **changes)  # with another seed
    with pytest.raises(UserError, match="semi-detr: holds a run with another seed"):
        train_side_by_side(NAMES, tmp_path, 3, **changes)


STOPPED = """
import sys
from pathlib import Path
from semidetr_lite.errors import Stopped
from semidetr_lite.training.settings import DetectorKwargs
from semidetr_lite.training.demo import train_side_by_side
if __name__ == "__main__":
    try:
        train_side_by_side(["control", "semi-detr"], Path(sys.argv[1]), 3, **eval(sys.argv[2]))
    except Stopped as stop:
        sys.exit(stop.args[1])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stop_is_passed_on_and_both_save(changes, tmp_path, number):
    train_demo_run("supervised", tmp_path, 3, quiet=True, **changes)
    (tmp_path / "program.py").write_text(STOPPED)
    long = {**changes, "steps": 100_000, "log_every": 1, "evaluate_every": 100_000}
    words = [sys.executable, tmp_path / "program.py", tmp_path, repr(long)]
    program = subprocess.Popen(
        words, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    logs = [tmp_path / name / "log.jsonl" for name in NAMES]
    saved = [
        tmp_path / name / "last.pt" for name in NAMES
    ]  # a line is logged before its step is saved
    wait_until(lambda: all(file.exists() and file.stat().st_size for file in [*logs, *saved]))
    program.send_signal(number)
    assert program.wait(120) == (128 + number if number != signal.SIGKILL else -number)
    steps = [load_state(tmp_path / name / "last.pt")["step"] for name in NAMES]
    time.sleep(0 if number != signal.SIGKILL else 30)
    sizes = [log.stat().st_size for log in logs]
    time.sleep(2)
    assert [log.stat().st_size for log in logs] == sizes, "a run goes on though its program is gone"
    assert all(step > 0 for step in steps)


def wait_until(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def test_the_plan_names_what_will_be_trained():
    said = cli._plan(["control", "semi-detr"], quick=False)
    assert "1,250 steps" in said and "500 steps" in said and "mean teacher" not in said


def test_the_control_takes_the_time_of_semi_detr():
    """2.5 supervised steps take as long as one of Semi-DETR."""
    runs = demo.DEMO_RUNS
    assert (
        runs["control"].steps == 2.5 * runs["semi-detr"].steps
        and runs["control"].burn_in == "supervised"
    )


def test_the_gallery_needs_a_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(gallery, "CHECKPOINTS", tmp_path)
    with pytest.raises(
        UserError, match="supervised_same_time.safetensors are not here; run it in a clone"
    ):
        gallery.detect_scenes(1)


def test_the_gallery_draws_and_counts_every_object(tmp_path):
    picture, found = gallery.write_gallery(tmp_path, scenes=2, score=0.3)
    assert picture.stat().st_size > 10_000
    objects = sum(len(truth["boxes"]) for truth in found.truths)
    counts = found.counts(0.3)
    assert set(counts) == {"supervised", "Semi-DETR"} and objects > 100
    assert all(hits + misses == objects for hits, _, misses in counts.values())
    assert all(hits == alarms == 0 for hits, alarms, _ in found.counts(1.0).values())
