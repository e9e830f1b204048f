"""Two processes are one: losses, gradients and runs; a process without boxes, and one that dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_methods import make, some_batch
from test_train import small

from semidetr_lite import distributed
from semidetr_lite.data import digits
from semidetr_lite.data.splits import Splits, Subset, WithoutLabels
from semidetr_lite.detectors.backbone import Tiny
from semidetr_lite.detectors.denoising import DenoisingTargets
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.errors import Stopped, UserError
from semidetr_lite.losses import denoising_loss
from semidetr_lite.matching import PaddedTargets
from semidetr_lite.methods.mean_teacher import MeanTeacher
from semidetr_lite.normalizer_settings import NormalizerSettings
from semidetr_lite.normalizers import Normalizers, NumBoxes
from semidetr_lite.training.engine import Engine
from semidetr_lite.training.loop import Run
from semidetr_lite.training.settings import Runtime

KINDS = ["supervised", "mean teacher", "stage one", "stage two", "detr"]
# labelled objects an image; how many pseudo-boxes: what the second process has nothing of
CASES = {
    "all": ((3, 1, 0, 2), 0.55),
    "no label there": ((3, 1, 0, 0), 0.55),
    "no box there": ((2, 4, 1, 3), None),
}
CASES["none at all"] = ((0, 0, 0, 0), 1.1)
# one normalizer group is the whole step; or each image is one, as on the released code's GPUs
GROUPS = {
    "one group": NormalizerSettings(),
    "four groups": NormalizerSettings(normalizer_groups=4, normalizer_bound=3.0),
}


def method_and_batch(kind: str, case: str):
    """A method, a step and a batch of 4 + 4 images, in which only the first unlabelled image may
    have pseudo-boxes.
    """
    counts, cut = CASES[case]
    if kind == "detr":
        torch.manual_seed(3)
        sizes = {
            "dim": 16,
            "heads": 2,
            "dim_feedforward": 16,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "level": 0,
        }
        student = DETR(4, 8, backbone=Tiny((8, 8, 16, 16, 16)), **sizes)
        method, step = MeanTeacher(student, score_threshold=(cut or 0.55) - 0.25).train(), 3
    else:
        method, step = make(
            kind, **({} if kind == "supervised" else {"score_threshold": cut or 0.55})
        )
    batch = some_batch(counts, sizes=((64, 64),) * 4, weak_sizes=((64, 64),) * 4)
    for _, targets in batch.values():
        for position, target in enumerate(targets):
            target["position"] = position
    if (
        cut is None and kind != "supervised"
    ):  # the views of the others show nothing of what the teacher saw
        for target in batch["strong"][1][1:]:
            target["matrix"] = target["matrix"] + torch.tensor(
                [[0, 0, 1e4], [0, 0, 1e4], [0, 0, 0]]
            )
    return method, step, batch


def step_of(
    kind: str, case: str, parts: int = 1, together: bool = True, groups: str = "one group"
) -> tuple[dict, dict]:
    """Losses and gradients of this process's share of a step, reduced over all."""
    method, step, batch = method_and_batch(kind, case)
    method.normalizers = GROUPS[groups]
    batch = {
        name: (
            [images[i] for i in distributed.shard(4)],
            [targets[i] for i in distributed.shard(4)],
        )
        for name, (images, targets) in batch.items()
    }
    if not together:
        prepare = method.prepare
        method.prepare = lambda parts, step: [prepare([part], step)[0] for part in parts]
    engine, values = (
        Engine(method, Runtime(accumulate=parts * distributed.world_size())),
        {},
    )
    for losses, found in engine.losses(batch, step):
        sum(losses.values()).backward()
        values = {
            name: values.get(name, 0) + value
            for name, value in zip(losses, found.tolist(), strict=True)
        }
    values |= {name: value for name, value in method.stats.items() if name == "cost_threshold"}
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return values, gradients


def few_digits() -> Splits:
    train = digits.DigitScenes("train", 12)
    few = Subset(digits.DigitScenes("test", 6), range(6))
    return Splits(
        Subset(train, range(4)),
        WithoutLabels(train, range(4, 12)),
        few,
        few,
        digits.CATEGORIES,
        flip=False,
    )


def run(out, **how) -> dict:
    return Run(
        small(steps=4, score_threshold=0.0, log_every=1),
        out,
        splits=few_digits(),
        quiet=True,
        workers=0,
        **how,
    ).run()


def skipping(rank: int, out: Path) -> tuple:
    """A loss of the second process alone is not finite in the second step: a loss of each, the
    weights' sum.
    """
    run = Run(
        small("supervised", steps=3, log_every=9), out, splits=few_digits(), quiet=True, workers=0
    )
    forward, train_step, losses_of_steps = run.method.forward, run.train_step, []

    def spoiled(batch, step, prepared=None):
        return {
            name: loss * (torch.nan if (step, rank) == (1, 1) else 1)
            for name, loss in forward(batch, step, prepared).items()
        }

    run.method.forward, run._measure = spoiled, dict
    run.train_step = lambda batch: losses_of_steps.append(train_step(batch)) or losses_of_steps[-1]
    run.run()
    return [losses["labelled/class"] for losses in losses_of_steps], sum(
        p.double().sum() for p in run.method.parameters()
    ).item()


def stopping(rank: int, out: Path) -> tuple:
    """The second process alone gets SIGTERM in the second step: the step at which each stops, and
    what it says.
    """
    run = Run(
        small("supervised", steps=9, log_every=9), out, splits=few_digits(), quiet=True, workers=0
    )
    real = run.train_step

    def train_step(batch):
        if (run.step, rank) == (1, 1):
            for _ in range(2):  # as torchrun passes on what the whole group has had already
                os.kill(os.getpid(), signal.SIGTERM)
        return real(batch)

    run.train_step = train_step
    try:
        run.run()
    except Stopped as said:
        return run.step, said.args[0]


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    found = {(kind, case): step_of(kind, case) for kind in KINDS for case in CASES}
    found["parts"] = {kind: step_of(kind, "all", parts=2) for kind in KINDS}
    found["groups"] = {
        (kind, parts): step_of(kind, "all", parts, groups="four groups")
        for kind in KINDS
        for parts in (1, 2)
    }
    try:
        distributed.assert_same_on_all_ranks("images", rank)
    except UserError as problem:
        found["other split"] = str(problem)
    run(folder / "two")
    found["skipped"], found["stopped"] = (
        skipping(rank, folder / "skipped"),
        stopping(rank, folder / "stopped"),
    )
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[list[dict], Path]:
    """What two processes found, and the folder of their run."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(process, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)], folder / "two"


def assert_same(ours: tuple, theirs: tuple) -> None:
    assert ours[0].keys() == theirs[0].keys() and ours[1].keys() == theirs[1].keys()
    for name, value in ours[0].items():
        assert value == pytest.approx(theirs[0][name], rel=1e-5, abs=1e-5), name
    for name, gradient in ours[1].items():
        scale = max(gradient.abs().max().item(), 1.0)
        assert (gradient - theirs[1][name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_find_the_losses_and_gradients_of_one(kind, case, both):
    expected = step_of(kind, case)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected[1].values())
    for found in both[0]:
        assert_same(found[kind, case], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_are_exact(kind, both):
    expected, apart = step_of(kind, "all"), step_of(kind, "all", parts=2, together=False)
    assert_same(step_of(kind, "all", parts=2), expected)
    assert_same(both[0][0]["parts"][kind], expected)  # 2 processes of 2 micro-batches
    name = next(name for name in expected[0] if name.endswith("l1"))
    assert apart[0][name] != pytest.approx(expected[0][name], rel=1e-3)  # each divided by its own


@pytest.mark.parametrize("kind", KINDS)
def test_normalizer_groups_give_the_same_losses_in_any_parts(kind, both):
    """One process with 1, 2 and 4 micro-batches, two processes with 1 and 2 each."""
    expected, whole = step_of(kind, "all", groups="four groups"), step_of(kind, "all")
    for parts in (2, 4):
        assert_same(step_of(kind, "all", parts, groups="four groups"), expected)
    for parts in (1, 2):
        assert_same(both[0][0]["groups"][kind, parts], expected)
    if kind != "detr":  # which has no class loss of groups
        ours, theirs = expected[0]["labelled denoising/class"], whole[0]["labelled denoising/class"]
        assert ours != pytest.approx(theirs, rel=1e-3)


def test_a_micro_batch_divides_its_denoising_loss_by_the_queries_of_the_whole_step():
    logits, boxes = torch.randn(1, 12, 4), torch.rand(1, 12, 4)
    outputs = {"pred_logits": logits, "pred_boxes": boxes, "aux_outputs": []}
    valid = torch.ones(1, 2, dtype=torch.bool)
    targets = PaddedTargets(torch.rand(1, 2, 4), torch.tensor([[0, 3]]), valid)
    assigned = torch.tensor([[0, 1, -1, -1] * 3])  # 3 groups of 2 boxes, positive and negative
    denoising_targets = DenoisingTargets(assigned, torch.ones(1, 12, dtype=torch.bool))
    whole_step = NumBoxes(images=4, matched=5, boxes=10, max_per_image=2)
    normalizers = Normalizers(whole_step, [whole_step], rows={0: slice(0, 1)}, num_shards=2)
    alone = denoising_loss(outputs, denoising_targets, targets)
    shared = denoising_loss(
        outputs, denoising_targets, targets, normalizers=normalizers, copies=[3]
    )
    for name, loss in alone.items():  # 6 of the 30 positive queries, which two shards divide by
        assert shared[name].item() == pytest.approx(loss.item() * 6 / (30 / 2), rel=1e-5)


def test_a_process_with_other_images_is_named(both):
    assert {found["other split"].split(":")[0] for found in both[0]} == {
        "process 1 has other images than process 0"
    }


def test_a_run_of_two_processes_is_that_of_one_and_goes_on_as_one(both, tmp_path):
    run(tmp_path / "one")
    lines = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
             for folder in (tmp_path / "one", both[1])]  # fmt: skip
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    for ours, theirs in zip(*lines, strict=True):
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-3, abs=1e-4)
        assert theirs["pseudo_per_image"] == ours["pseudo_per_image"] > 0
    assert lines[1][-1]["test"]["teacher"] == pytest.approx(
        lines[0][-1]["test"]["teacher"], abs=1e-3, nan_ok=True
    )
    assert sorted(path.name for path in both[1].iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


def test_a_loss_that_is_not_finite_in_one_process_is_skipped_by_all(both):
    (losses, weights), (others, other_weights) = (found["skipped"] for found in both[0])
    assert losses[0] == others[0] and losses[2] == others[2] and weights == other_weights
    assert losses[1] != losses[1] and others[1] != others[1]  # both saw that it is not a number
    assert torch.load(both[1].parent / "skipped/bad_step.pt", weights_only=True)["step"] == 1


def test_a_signal_to_one_process_stops_all_at_the_same_step_with_a_checkpoint(both):
    assert [found["stopped"][0] for found in both[0]] == [2, 2]
    assert torch.load(both[1].parent / "stopped/last.pt", weights_only=True)["step"] == 2
    assert all("last.pt (step 2)" in found["stopped"][1] for found in both[0])


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from semidetr_lite import cli, distributed
from semidetr_lite.training.loop import Run
from test_distributed import few_digits, small
real = Run.train_step
def train_step(self, batch):
    if self.step == 2 and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batch)
Run.train_step = train_step
def train():
    distributed.start()
    Run(small(steps=4, log_every=1, evaluate_every=9), sys.argv[1], splits=few_digits(), workers=0).run()
cli.run_command = lambda *_: train()
sys.exit(cli.main())
"""


def test_a_process_that_dies_ends_the_job_with_a_message_and_it_resumes_on_one(tmp_path):
    script, out = tmp_path / "train.py", tmp_path / "run"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        script,
        out,
    ]
    began = time.perf_counter()
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 1 and time.perf_counter() - began < 60
    assert f"Signal {signal.SIGKILL.value} (SIGKILL)" in ended.stderr
    resumed = Run(None, out, resume=True, splits=few_digits(), quiet=True, workers=0)
    assert resumed.step == 2
    assert resumed.run()["step"] == 4
