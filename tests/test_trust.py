"""Trust: a run that is killed anywhere resumes to the same bits, and what is not finite or has
collapsed is told.
"""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import kill_test
from kill_test import differences, lines, same

from semidetr_lite.errors import Stopped, UserError
from semidetr_lite.matching import hungarian, matched_costs
from semidetr_lite.methods.cost_mining import reliable_threshold
from semidetr_lite.methods.mean_teacher import MeanTeacher, TeacherStudent
from semidetr_lite.methods.semi_detr import SemiDETR
from semidetr_lite.methods.supervised import Supervised
from semidetr_lite.training import checkpoint, loop, presets, run_folder
from semidetr_lite.training.loop import Run, replay
from semidetr_lite.training.measure import class_warning, objects_per_class
from semidetr_lite.training.settings import Config
from tests.test_train import go, small, splits  # noqa: F401  (a fixture)

STEPS = 6


def assert_same_run(one, other):
    """All that two runs leave is the same, times apart, and neither left anything half written."""
    assert differences(one, other) == []
    if (one / "pseudo_boxes.jsonl").exists():
        assert (one / "pseudo_boxes.jsonl").read_text() != ""


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture(scope="module")
def whole(splits, tmp_path_factory):
    """A run of each kind that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    for method in ("supervised", "semi-detr"):
        go(settings(method), folder / method, splits)
    return folder


def settings(method: str = "semi-detr", **changes) -> Config:
    return small(
        method,
        **{
            "steps": STEPS,
            "score_threshold": 0.0,
            "watch_every": 2,
            "cost_queue_size": 20,
            **changes,
        },
    )


def interrupt(monkeypatch, place, name: str, turn: int, act=None, after: bool = False):
    """Die (or `act`) at the turn-th call of `place.name`, before or after it did its work."""
    real, calls = getattr(place, name), iter(range(10**6))

    def dying(*arguments, **others):
        now = next(calls) == turn
        if now and not after:
            act() if act else die()
        result = real(*arguments, **others)
        if now and after:
            act() if act else die()
        return result

    monkeypatch.setattr(place, name, dying)


def die():
    raise Killed


PLACES = {
    "in a step": (Run, "train_step", 3, False),
    "before anything was saved": (Run, "train_step", 1, False),
    "between optimizer and average": (TeacherStudent, "after_step", 4, False),
    "before a log line": (run_folder, "append_jsonl", 2, False),
    "between the two logs": (run_folder, "append_jsonl", 3, False),
    "between log and checkpoint": (Run, "save", 2, False),
    "between the weights of two parts": (run_folder, "save_weights", 3, False),
    "before the checkpoint is in its place": (
        os,
        "replace",
        6,
        False,
    ),  # one of config.json, three a save
    "before it is measured": (Run, "save", 1, True),
    "while it is measured": (loop, "pseudo_quality", 0, False),
    "before the best weights are kept": (run_folder.RunFolder, "save_best", 0, False),
    "after the best weights are kept": (run_folder.RunFolder, "save_best", 0, True),
    "before the last step is measured": (Run, "save", 3, True),
    "between log and the last checkpoint": (Run, "save", 4, False),
    "after the last checkpoint": (Run, "save", 4, True),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_and_resumed_ends_in_the_same_bits(place, whole, splits, tmp_path, monkeypatch):
    owner, name, turn, after = PLACES[place]
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt(patch, owner, name, turn, after=after)
        go(settings(), folder, splits)
    (folder / ".last.pt.77.77.part").write_text("half a checkpoint of a process that was killed")
    run = Run(None, folder, resume=True, splits=splits, quiet=True, workers=0)
    assert run.finished == (place == "after the last checkpoint")
    run.run()
    assert_same_run(whole / "semi-detr", folder)


def test_real_kills_at_random_moments(tmp_path, monkeypatch, capsys):
    words = ["kill_test.py", "--kills", "2", "--steps", "12", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert kill_test.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kills"] >= 1 and found["differences"] == []
    weights = tmp_path / "killed" / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    log = tmp_path / "killed" / "log.jsonl"
    log.write_text(log.read_text().replace('"step": 2', '"step": 3'))
    assert differences(tmp_path / "whole", tmp_path / "killed") == [
        "student.safetensors",
        "log.jsonl",
    ]


def test_a_torn_last_line_is_written_again(whole, splits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt(patch, Run, "train_step", 4)
        go(settings(), tmp_path / "run", splits)
    for name in ("log.jsonl", "pseudo_boxes.jsonl"):
        with open(tmp_path / "run" / name, "a") as file:
            file.write('{"step": 5, "losses": {}}\n{"step": 5, "half a li')
    go(None, tmp_path / "run", splits, resume=True)
    assert_same_run(whole / "semi-detr", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    number, whole, splits, tmp_path, monkeypatch
):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        interrupt(patch, Run, "train_step", 2, act=lambda: os.kill(os.getpid(), number))
        go(settings(), tmp_path / "run", splits)
    assert stopped.value.args == (
        f"stopped; the last checkpoint is {tmp_path / 'run/last.pt'} (step 3)",
        128 + number,
    )
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 3
    go(None, tmp_path / "run", splits, resume=True)
    assert_same_run(whole / "semi-detr", tmp_path / "run")


def test_measuring_is_broken_off_at_once(whole, splits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=r"last\.pt \(step 4\)"):
        interrupt(patch, loop, "measure", 1, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
        go(settings(), tmp_path / "run", splits)
    go(None, tmp_path / "run", splits, resume=True)
    assert_same_run(whole / "semi-detr", tmp_path / "run")


def test_a_second_signal_does_not_wait(splits, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second Ctrl-C")

    interrupt(monkeypatch, Run, "train_step", 2, act=twice)
    with pytest.raises(Stopped, match=r"step 2\)"):
        go(settings(), tmp_path / "run", splits)


def test_a_dead_data_worker_is_one_clear_line(splits, tmp_path, monkeypatch):
    interrupt(
        monkeypatch,
        loop.Batches,
        "__getitem__",
        2,
        act=lambda: os.kill(os.getpid(), signal.SIGKILL),
    )
    with pytest.raises(
        UserError, match=r"a process that loads data died.*fewer --workers.*none yet"
    ):
        Run(settings("supervised"), tmp_path / "run", splits=splits, quiet=True, workers=1).run()
    # a loader that lives on complains about its dead worker whenever another process ends
    gc.collect()


def test_data_workers_leave_signals_to_the_run(splits, tmp_path, monkeypatch):
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # as Ctrl-C and a batch system send them, to all processes
        interrupt(
            monkeypatch,
            loop.Batches,
            "__getitem__",
            2,
            act=lambda number=number: os.kill(os.getpid(), number),
        )
    Run(settings("supervised"), tmp_path / "run", splits=splits, quiet=True, workers=1).run()


def test_a_run_that_fails_leaves_no_process_that_loads_data(splits, tmp_path, monkeypatch):
    """They ignore SIGTERM, so a program that keeps the error, as pytest and notebooks do, would
    wait for ever.
    """

    def unreadable():
        raise UserError("picture.jpg: cannot be read")

    interrupt(monkeypatch, loop.Batches, "__getitem__", 2, act=unreadable)
    gc.disable()
    try:
        with pytest.raises(UserError, match=r"picture\.jpg") as kept:
            Run(
                settings("supervised"), tmp_path / "run", splits=splits, quiet=True, workers=1
            ).run()
        assert kept.value.__traceback__ and not multiprocessing.active_children()
    finally:
        gc.enable()


# ---- full disks
# ------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(tmp_path):
    file = tmp_path / "last.pt"
    file.write_text("old")

    def full(where):
        where.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"last\.pt: cannot be written.*No space left"):
        checkpoint.write_atomic(file, full)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


FULL = """
import resource, sys, torch
from pathlib import Path
from semidetr_lite.errors import UserError
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.files import append_jsonl, write_atomic
from semidetr_lite.training.checkpoint import save_weights

class Large(Detector):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(100_000))

kind, place = sys.argv[1], Path(sys.argv[2])
# of a file; to write more fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    if kind == "log.jsonl":
        append_jsonl(place, [{"step": 2, "boxes": [0.5] * 20_000}])
    elif kind == "last.pt":
        write_atomic(place, lambda where: torch.save(torch.zeros(100_000), where))
    else:
        save_weights(place, Large(), "dino", {}, [])
except UserError as problem:
    print(problem)
    sys.exit(2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX's")
@pytest.mark.parametrize("kind", ["last.pt", "student.safetensors", "log.jsonl"])
def test_a_write_that_the_system_cuts_off(kind, tmp_path):
    (tmp_path / kind).write_text('{"step": 1}\n')
    found = subprocess.run(
        [sys.executable, "-c", FULL, kind, tmp_path / kind], capture_output=True, text=True
    )
    assert (
        found.returncode == 2
        and f"{kind}: cannot be written (" in found.stdout
        and not found.stderr
    )
    assert (tmp_path / kind).read_text() == '{"step": 1}\n' and len(list(tmp_path.iterdir())) == 1


# ---- what is not finite
# ----------------------------------------------------------------------------------------------


def spoil(monkeypatch, steps, what=torch.nan):
    """Losses of these steps that are not finite."""
    change_denoising(
        monkeypatch, steps, lambda losses: {name: value * what for name, value in losses.items()}
    )


def change_denoising(monkeypatch, steps, change):
    """The losses of a method's denoising queries in these steps, changed."""
    for method in (Supervised, MeanTeacher, SemiDETR):
        real = method.forward

        def forward(self, batch, step, prepared=None, real=real):
            losses = real(self, batch, step, prepared)
            ours = {name for name in losses if " denoising/" in name}
            changed = change({name: losses[name] for name in ours}) if step in steps else {}
            return {**losses, **changed}

        monkeypatch.setattr(method, "forward", forward)


def test_a_loss_that_is_not_finite_skips_the_step_and_can_be_replayed(
    splits, tmp_path, monkeypatch, capsys
):
    spoil(monkeypatch, [2], torch.inf)
    run = Run(
        settings(one_to_many_share=0.0), tmp_path / "run", splits=splits, quiet=True, workers=0
    )
    real, states = Run.train_step, []

    def watched(self, batch):
        found = real(self, batch)
        states.append({key: value.clone() for key, value in self.method.state_dict().items()})
        return found

    monkeypatch.setattr(Run, "train_step", watched)
    run.run()
    changed = [key for key in states[0] if not same(states[1][key], states[2][key])]
    assert set(changed) <= {"cost_queue", "pseudo_boxes_per_class", "objects_per_image"}, (
        "a skipped step changes no weights"
    )
    assert not same(states[2]["student.class_head.weight"], states[3]["student.class_head.weight"])
    said = capsys.readouterr().err
    assert (
        "warning: step 2: loss 'labelled denoising/class' is inf, so it is skipped" in said
        and "bad_step.pt" in said
    )
    assert len(lines(tmp_path / "run" / "log.jsonl")) == STEPS // 2
    monkeypatch.setattr(presets, "load_splits", lambda config, file: splits)
    found = replay(tmp_path / "run/bad_step.pt")
    assert found["labelled denoising/class"].isinf() and found["labelled/class"].isfinite()


def test_a_gradient_that_is_not_finite_skips_the_step(splits, tmp_path, monkeypatch, capsys):
    def spoiled(losses):
        name = "labelled denoising/class"
        zero = losses[name] * 0
        return {**losses, name: losses[name] + (zero.sqrt() - zero.sqrt().detach())}

    change_denoising(monkeypatch, [1], spoiled)
    go(settings("supervised"), tmp_path / "run", splits)
    assert "step 1: the gradient's norm is nan, so it is skipped" in capsys.readouterr().err
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)["method"]
    assert all(value.isfinite().all() for value in state.values())


def test_a_few_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(
    splits, tmp_path, monkeypatch
):
    spoil(monkeypatch, range(3, 99))
    good = r"step 5: loss 'labelled denoising/class' is nan; the 3th such .*bad_step\.pt.*last\.pt \(step 4\)"
    with pytest.raises(UserError, match=good):
        go(settings("supervised", steps=9), tmp_path / "run", splits)
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert state["step"] == 4 and state["skipped"] == 1
    assert all(value.isfinite().all() for value in state["method"].values())
    with pytest.raises(UserError, match="step 5: .*3th such"):  # the count is resumed too
        go(None, tmp_path / "run", splits, resume=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_never_reach_the_assignment(bad):
    costs = np.random.default_rng(0).random((1, 5, 3)).astype(np.float32)
    costs[0, 2] = costs[0, :, 1] = bad
    queries, targets = hungarian(costs[0])
    assert sorted(targets) == [0, 1, 2] and len(set(queries)) == 3
    assert dict(zip(targets, queries))[0] != 2 != dict(zip(targets, queries))[2]
    matched = matched_costs(costs, np.ones((1, 3), dtype=bool))
    assert not np.isfinite(matched[0, 1]) and np.isfinite(reliable_threshold(matched))
    everything = np.full((4, 2), bad)
    assert len(hungarian(everything)[0]) == 2
    huge = np.array([[3e38, np.nan], [1.0, 3e38]], dtype=np.float32)
    assert hungarian(huge)[0].tolist() == [0, 1]


@pytest.mark.parametrize("method", ["mean-teacher", "semi-detr"])
@pytest.mark.parametrize("part", ["teacher", "student"])
def test_a_network_that_says_nan_is_survived(method, part, splits, tmp_path):
    run = Run(settings(method), tmp_path / "run", splits=splits, quiet=True, workers=0)
    with torch.no_grad():
        getattr(run.method, part).class_head.weight.fill_(torch.nan)
    before = run.method.student.class_head.weight.clone()
    run.train_step(next(iter(run._loader())))
    after = run.method.student.class_head.weight
    assert same(before, after) if part == "student" else not same(before, after)


# ---- a teacher that collapses
# ----------------------------------------------------------------------------------------


def alarms(counts, method="mean-teacher", steps=400) -> str | None:
    """What is said after so many steps with this number of pseudo-boxes of each class in 2 images."""
    student = presets.make_detector("dino", len(counts), small().detector_kwargs)
    made = presets.make_method(method, student, small(), 10, 0, 0)
    labels = torch.tensor(
        [label for label, count in enumerate(counts) for _ in range(count)], dtype=torch.int64
    )
    for _ in range(steps):
        made.update_pseudo_box_stats(labels, torch.ones_like(labels), 2)
    return made.collapse_warning()


def test_the_alarm_tells_a_collapsed_teacher_from_others():
    assert "no pseudo-boxes for long" in alarms([0, 0, 0])
    assert "of one class (number 1)" in alarms([0, 3, 0])
    assert alarms([0, 30, 1]) is None and alarms([1]) is None
    assert alarms([0, 0, 0], steps=50) is None and alarms([0, 3, 0], steps=50) is None, (
        "not yet long"
    )


def test_the_alarm_names_a_class_that_the_teacher_loses():
    names, objects = ["red", "white", "platelet", "unseen"], [12.0, 1.0, 1.0, 0.0]
    assert class_warning([10.0, 0.9, 0.8, 0.0], objects, names) is None
    few = class_warning([10.0, 0.9, 0.01, 0.0], objects, names)
    assert "hardly any" in few and "'platelet' (0.01" in few and "red" not in few
    many = class_warning([10.0, 6.0, 0.8, 0.0], objects, names)
    assert "too many" in many and "'white'" in many and "platelet" not in many


def test_objects_per_class_are_those_of_the_labels(splits):
    counts = Counter(
        label
        for _, target in map(splits.labelled.__getitem__, range(len(splits.labelled)))
        for label in target["labels"].tolist()
    )
    expected = [counts[label] / len(splits.labelled) for label in range(10)]
    assert objects_per_class(splits.labelled, 10) == pytest.approx(expected)


def test_a_lost_class_is_told_in_the_log_and_on_the_screen(splits, tmp_path, capsys):
    run = Run(settings(), tmp_path / "run", splits=splits, workers=0)
    run.method.pseudo_boxes_per_class.fill_(1.0)
    run.labelled_per_class = [1.0] * 9 + [1e4]
    run.run()
    first, *_, last = lines(tmp_path / "run" / "log.jsonl")
    assert "hardly any pseudo-boxes of '9'" in first["alarm"]
    assert list(last["pseudo_per_class"]) == [str(digit) for digit in range(10)]
    assert "ALARM: hardly any" in capsys.readouterr().out


def test_the_alarm_is_a_line_in_the_log_and_on_the_screen(splits, tmp_path, monkeypatch, capsys):
    run = Run(settings(score_threshold=2.0), tmp_path / "run", splits=splits, workers=0)
    run.method.pseudo_boxes_per_class.fill_(1e-4)
    run.run()
    assert all(
        "no pseudo-boxes for long" in line["alarm"]
        for line in lines(tmp_path / "run" / "log.jsonl")
    )
    assert "ALARM: no pseudo-boxes for long" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["mean-teacher", "semi-detr"])
def test_the_pseudo_boxes_counted_are_those_learned_from(method, splits, tmp_path):
    run = Run(settings(method), tmp_path / "run", splits=splits, quiet=True, workers=0)
    run.method.pseudo_boxes_per_class.zero_()
    run.train_step(next(iter(run._loader())))
    count = float(run.method.pseudo_boxes_per_class.sum())
    assert count == pytest.approx(0.02 * 8, rel=0.3)  # `max_pseudo_boxes` per image, few lost
    run.method.score_threshold = 2.0
    run.train_step(next(iter(run._loader())))
    assert float(run.method.pseudo_boxes_per_class.sum()) < 0.02 * 8
