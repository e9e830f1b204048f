"""The projector's batch statistics: one normalizer group's, averaged into running ones once a step;
and the cosines that say whether contents and embeddings of different boxes stay apart.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_distributed import few_digits
from test_methods import make, some_batch
from test_train import small, splits  # noqa: F401  (a fixture)
from torch import nn
from torch.utils.checkpoint import checkpoint

from semidetr_lite import distributed
from semidetr_lite.errors import UserError
from semidetr_lite.methods.query_consistency import Projector, mean_cosines
from semidetr_lite.methods.step_norm import (
    StepBatchNorm,
    forget_step,
    update_running_statistics,
)
from semidetr_lite.training.engine import Engine
from semidetr_lite.training.loop import Run, make_optimizer, mean_stats
from semidetr_lite.training.presets import PRESETS, make_method
from semidetr_lite.training.settings import Runtime, change


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


def norms(module: nn.Module) -> list[StepBatchNorm]:
    return [one for one in module.modules() if isinstance(one, StepBatchNorm)]


def assert_equal(ours: dict, theirs: dict, atol: float = 0.0) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=atol, equal_nan=True), name


# ---- the norm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3, 3)])
def test_it_is_torchs_batch_norm_whose_running_statistics_move_after_the_step(shape):
    torchs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5)
    ours = StepBatchNorm(5)
    for norm in (torchs, ours):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    ours.load_state_dict({k: v for k, v in torchs.state_dict().items() if "num_batches" not in k})
    x = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    x[1].data.copy_(x[0])
    results = [norm(one) for norm, one in zip((torchs, ours), x, strict=True)]
    assert torch.equal(*results) and ours.running_mean.abs().sum() == 0
    for result in results:
        result.square().sum().backward()
    assert torch.equal(x[0].grad, x[1].grad)
    update_running_statistics([ours])
    assert torch.allclose(ours.running_mean, torchs.running_mean, atol=1e-6)
    assert torch.allclose(ours.running_var, torchs.running_var, atol=1e-6)
    torchs.eval(), ours.eval()
    assert torch.allclose(torchs(x[0]), ours(x[0]), atol=1e-5)


def test_a_step_counts_once_whatever_its_micro_batches_and_a_skipped_one_not_at_all():
    norm, parts = StepBatchNorm(3), [torch.randn(5, 3) + 2, torch.randn(8, 3) * 3]
    norm(torch.full((4, 3), torch.nan))  # a step that is skipped
    forget_step([norm])
    for part in parts:
        norm(part)
    update_running_statistics([norm])
    mean = sum(part.mean(0) for part in parts) / 2
    variance = sum(part.var(0) for part in parts) / 2
    assert torch.allclose(norm.running_mean, 0.1 * mean, atol=1e-6)
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * variance, atol=1e-6)
    before = buffers(norm)
    update_running_statistics([norm])  # a step without boxes
    assert_equal(buffers(norm), before)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_rows_take_the_running_statistics(count):
    norm = StepBatchNorm(3)
    norm.running_mean.fill_(2.0), norm.running_var.fill_(4.0)
    before, x = buffers(norm), torch.randn(count, 3, requires_grad=True)
    result = norm(x)
    assert torch.allclose(result, (x - 2) / 2, atol=1e-4)
    result.sum().backward()
    update_running_statistics([norm])
    assert_equal(buffers(norm), before)


def test_running_it_again_for_the_backward_pass_does_not_count_twice():
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        norm, x = StepBatchNorm(3), torch.randn(5, 3, requires_grad=True)
        (checkpoint(norm, x, use_reentrant=False) if again else norm(x)).square().sum().backward()
        update_running_statistics([norm])
        found.append(buffers(norm))
    assert_equal(*found)


# ---- in the method -------------------------------------------------------------------------------


def stage_one(**changes):
    return make("stage one", projector_norm="batch", **changes)


def test_the_setting_chooses_the_norm_and_detectors_have_no_live_batch_statistics():
    method, step = stage_one()
    assert [type(norm) for norm in norms(method)] == [StepBatchNorm] * 3
    assert not norms(method.student) and not norms(method.teacher)
    other, _ = make("stage one", projector_norm="group")
    assert not norms(other)
    losses = [one(some_batch(), step)["consistency"].item() for one in (method, other)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)
    with pytest.raises(UserError, match="no projector_norm called 'layer': choose from batch"):
        make("stage one", projector_norm="layer")


def test_coco_has_the_released_norm():
    for name, recipe in PRESETS.items():
        assert name.startswith("digits") or recipe.semi_detr.projector_norm == "batch"


def test_a_batch_norm_takes_out_what_all_boxes_share():
    """Boxes that differ by little of what they share: only over the batch is the rest visible."""
    torch.manual_seed(0)
    shared, own = torch.randn(1, 16, 8, 8) * 3, torch.randn(12, 16, 8, 8) * 0.3
    cosines = {}
    for norm in ("batch", "group"):
        torch.manual_seed(1)
        projector = Projector(16, hidden=32, norm=norm).train()
        boxes = torch.tensor([[0.0, 0, 63, 63]]).expand(12, 4)
        contents = projector([shared + own], [(8.0, 8.0)], torch.arange(12), boxes)
        cosines[norm] = float(mean_cosines(contents, contents, contents).content_cosine)
    assert cosines["batch"] < cosines["group"] - 0.2


@pytest.mark.parametrize("threshold", [1.1, None])
def test_a_step_with_no_box_or_one_is_finite_and_moves_nothing(threshold):
    method, step = stage_one(score_threshold=threshold or 0.0, mining="none")
    if threshold is None:
        method.max_pseudo_boxes = 1
    batch = some_batch()
    if threshold is None:  # one unlabelled image with one box
        batch = {**batch, **{n: (batch[n][0][:1], batch[n][1][:1]) for n in ("weak", "strong")}}
    before = buffers(method.projector)
    losses = method(batch, step)
    sum(losses.values()).backward()
    method.after_step(step)
    assert method.stats["pseudo_per_image"] == (threshold is None)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in method.projector.parameters())
    assert_equal(buffers(method.projector), before)
    assert torch.as_tensor(method.stats["different_cosine"]).isnan()


@pytest.mark.parametrize("options", [{"checkpointing": True}, {}])
def test_a_step_moves_the_running_statistics_once(options):
    found = []
    for runtime in (Runtime(), Runtime(**options)):
        method, step = stage_one()
        for losses, _ in Engine(method, runtime).losses(some_batch(), step):
            sum(losses.values()).backward()
        assert all(not norm.running_mean.any() for norm in norms(method))
        method.after_step(step)
        assert all(norm.running_mean.any() for norm in norms(method))
        found.append(buffers(method.projector))
    assert_equal(*found, atol=1e-6)


def test_measuring_moves_nothing():
    method, step = stage_one()
    method(some_batch(), step)
    with torch.no_grad():
        before = [len(norm.step_statistics) for norm in norms(method)]
        method.projector.layers[:3](torch.randn(4, method.student.dim, 7, 7))
    assert [len(norm.step_statistics) for norm in norms(method)] == before == [1, 1, 1]


FOUR = {"counts": (3, 1, 2, 2), "sizes": ((64, 64),) * 4, "weak_sizes": ((64, 64),) * 4}


def step_in_parts(parts: int) -> dict:
    """The projector's running statistics after a step of this process's images in `parts`."""
    method, step = stage_one()
    own = distributed.shard(4)
    batch = {
        name: ([images[i] for i in own], [{**targets[i], "position": i} for i in own])
        for name, (images, targets) in some_batch(**FOUR).items()
    }
    engine = Engine(method, Runtime(accumulate=parts * distributed.world_size()), 4)
    for losses, _ in engine.losses(batch, step):
        sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in method.projector.named_parameters()}
    method.after_step(step)
    return buffers(method.projector) | gradients


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    torch.save(step_in_parts(1), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_with_two_micro_batches(tmp_path):
    mp.spawn(process, (tmp_path,), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = step_in_parts(2)
    assert_equal(found[0], found[1])
    assert_equal(found[0], alone, atol=2e-5)
    whole = step_in_parts(1)
    name = "layers.8.running_var"
    assert not torch.allclose(whole[name], alone[name], atol=1e-6)  # each part has its own


def test_running_statistics_survive_a_resume_bit_for_bit(tmp_path):
    changes = {"projector_norm": "batch", "score_threshold": 0.0, "log_every": 1}
    config = small(steps=4, one_to_many_share=1.0, **changes)
    how = {"splits": few_digits(), "quiet": True, "workers": 0}
    Run(config, tmp_path / "whole", **how).run()
    cut = Run(config, tmp_path / "cut", **how)
    real = cut.train_step

    def train_step(batch):
        if cut.step == 2:
            raise RuntimeError("killed")
        return real(batch)

    cut.train_step = train_step
    with pytest.raises(RuntimeError, match="killed"):
        cut.run()
    Run(None, tmp_path / "cut", resume=True, **how).run()
    whole, resumed = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["method"]
        for name in ("whole", "cut")
    )
    assert_equal(whole, resumed)
    moved = [key for key in whole if key.startswith("projector.") and "running_mean" in key]
    assert len(moved) == 3 and all(whole[key].any() for key in moved)
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    for line in lines:
        assert {"same_cosine", "different_cosine", "content_cosine"} <= set(line)
        assert -1 <= line["different_cosine"] <= line["same_cosine"] + 1e-3


# ---- the projector's rate ------------------------------------------------------------------------


def test_the_projector_can_learn_at_a_rate_of_its_own():
    method, _ = stage_one()
    recipe = PRESETS["digits"]
    assert len(make_optimizer(method, recipe).param_groups) == 2
    optimizer = make_optimizer(method, change(recipe, projector_lr_factor=0.25))
    own = optimizer.param_groups[2]
    assert own["initial_lr"] == own["lr"] == 0.25 * recipe.optimizer.learning_rate
    assert {id(p) for p in own["params"]} == {id(p) for p in method.projector.parameters()}
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert sum(sizes) == sum(p.numel() for p in method.parameters() if p.requires_grad)
    made = make_method("semi-detr", method.student, change(recipe, projector_norm="batch"), 9, 0, 0)
    assert norms(made.projector)


# ---- the cosines ---------------------------------------------------------------------------------


def test_cosines_equal_loops():
    student, teacher, contents = torch.randn(3, 5, 6) + 1
    cosine = nn.functional.cosine_similarity
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    found = mean_cosines(student, teacher, contents)
    assert float(found.same_cosine) == pytest.approx(
        float(cosine(student, teacher).mean()), abs=1e-5
    )
    for value, (ours, theirs) in zip(
        found[1:], ((student, teacher), (contents, contents)), strict=True
    ):
        expected = sum(float(cosine(ours[i], theirs[j], dim=0)) for i, j in pairs) / len(pairs)
        assert float(value) == pytest.approx(expected, abs=1e-5)
    alone = mean_cosines(student[:1], teacher[:1], contents[:1])
    assert alone.same_cosine.isfinite()
    assert alone.different_cosine.isnan() and alone.content_cosine.isnan()


def test_a_figure_that_a_process_does_not_have_is_left_out_of_the_mean(monkeypatch):
    others = [
        {"same_cosine": 0.5, "x": float("nan")},
        {"same_cosine": float("nan"), "x": float("nan")},
    ]
    monkeypatch.setattr(distributed, "all_gather", lambda stats: [stats, *others])
    means = mean_stats({"same_cosine": torch.tensor(0.25), "x": float("nan")})
    assert means["same_cosine"] == 0.375 and means["x"] != means["x"]
