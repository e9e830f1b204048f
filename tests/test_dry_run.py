"""`semidetr train ... --dry-run`: what a step and a run cost, and nothing is left behind."""

import re

import pytest

from semidetr_lite import cli
from semidetr_lite.errors import UserError
from semidetr_lite.training import dry_run
from semidetr_lite.training.loop import Run
from tests.test_train import small, splits  # noqa: F401


@pytest.fixture
def steps_run(monkeypatch):
    """The numbers of the steps that are run, each of which takes 2 s, or 6 s from step 50 on."""
    clock, steps = [0.0], []

    def train_step(run, batch):
        assert batch["labelled"]
        steps.append(run.step)
        clock[0] += 2 if run.step < 50 else 6
        return {}

    monkeypatch.setattr(Run, "train_step", train_step)
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: clock[0])
    return steps


def test_both_stages_count_by_their_share(splits, monkeypatch, steps_run):
    load = Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda *how, **more: load(*how, **more, splits=splits))
    config = small(steps=900, one_to_many_share=0.25)
    text = "\n".join(dry_run.describe_cost(config, workers=0))
    assert steps_run == [0, 1, 2, 3, 4, 895, 896, 897, 898, 899]
    assert "a step: 5.00 s (2.00 s with one-to-many matching, 6.00 s with one-to-one" in text
    assert "900 steps: 75.0 minutes" in text  # 900 x (0.25 x 2 s + 0.75 x 6 s)
    assert re.search(r"memory: \d+\.\d GB", text)


@pytest.mark.parametrize(("seconds", "said"), [(3, "0.1 m"), (300, "5.0 m"), (86_400, "24.0 h")])
def test_durations(seconds, said):
    assert dry_run._duration(seconds).startswith(said)


def test_the_command_writes_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["train", "--out", str(out), "--method", "supervised", "--workers", "0", "--dry-run"]
    cli.run_command([*words, "--steps", "9", "--batch-size", "2"], cli.COMMANDS)
    said = capsys.readouterr().out
    assert "2 images a step" in said and "a step: " in said and "9 steps: " in said
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="leave out --resume"):
        cli.train(out, resume=True, dry_run=True)
