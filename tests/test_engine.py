"""How a step is run: every option gives the losses and gradients of the plain step, and says what
it must.
"""

import functools

import pytest
import torch
from test_methods import KINDS, make, some_batch
from test_train import small

from semidetr_lite import cli
from semidetr_lite.detectors import deformable
from semidetr_lite.detectors.backbone import Backbone
from semidetr_lite.errors import UserError
from semidetr_lite.methods import mean_teacher
from semidetr_lite.training import loop
from semidetr_lite.training.engine import Engine
from semidetr_lite.training.loop import Run
from semidetr_lite.training.memory import memory_dry_run, raise_if_out_of_memory
from semidetr_lite.training.settings import Runtime, new_config

BATCH = {"counts": (3, 2), "sizes": ((64, 64),) * 2, "weak_sizes": ((64, 64),) * 2}


def engine(kind: str, **options) -> tuple[Engine, int]:
    method, step = make(kind)
    return Engine(method, Runtime(**options)), step


def run(kind: str, **options) -> tuple[dict, dict]:
    """Losses and gradients of a step."""
    runner, step = engine(kind, **options)
    (losses, values), *more = runner.losses(some_batch(**BATCH), step)
    sum(losses.values()).backward()
    assert not more
    return dict(zip(losses, values.tolist(), strict=True)), {
        name: p.grad for name, p in runner.method.named_parameters() if p.grad is not None
    }


def assert_close(ours, theirs, rel: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=rel)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        scale = gradient.abs().max().item()
        assert (ours[1][name] - gradient).abs().max() <= rel * scale + 1e-7, name


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients_and_runs_layers_twice(kind, monkeypatch):
    calls, real = [], deformable.FeedForward.forward
    monkeypatch.setattr(
        deformable.FeedForward, "forward", lambda self, x: calls.append(self) or real(self, x)
    )
    plain, first = run(kind), len(calls)
    assert_close(run(kind, checkpointing=True), plain, 1e-5)
    assert first < len(calls) - first <= 2 * first


@pytest.mark.parametrize(
    "options", [{"channels_last": True}, {"compile": True}, {"precision": "tf32"}]
)
@pytest.mark.parametrize("kind", ["supervised", "stage one"])
def test_other_options_change_only_the_rounding(kind, options, monkeypatch):
    compiled = []
    real = functools.partial(torch.compile, backend="eager")  # without a compiler of C++
    monkeypatch.setattr(
        torch, "compile", lambda function: compiled.append(function) or real(function)
    )
    assert_close(run(kind, **options), run(kind), 1e-3)
    assert bool(compiled) == ("compile" in options)
    if "channels_last" in options:
        runner, _ = engine(kind, **options)
        weight = runner.method.student.backbone.stages[1][0].weight
        assert (
            weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        )


class Patches(Backbone):
    """Cells that see their own pixels alone, so that none of the image sees the padding."""

    pad_before_backbone = True
    channels = (16, 16, 16)

    def __init__(self):
        super().__init__()
        self.stages = torch.nn.ModuleList(torch.nn.Conv2d(3, 16, s, s) for s in (8, 16, 32))

    def forward(self, images):
        return [stage(images) for stage in self.stages]


def step_padded_to(multiple: int, kind: str, monkeypatch) -> tuple[dict, set]:
    """Losses of a step of mixed sizes, and the shapes that the backbone saw."""
    method, step = make(kind)
    torch.manual_seed(3)
    patches = Patches()
    for detector in (method.student, method.teacher):
        detector.backbone = patches
        for projection in detector.projections:
            projection[1] = torch.nn.Identity()  # GroupNorm sees the padding
    shapes, forward = set(), Patches.forward
    monkeypatch.setattr(
        patches, "forward", lambda x: shapes.add(tuple(x.shape[-2:])) or forward(patches, x)
    )
    runner = Engine(method, Runtime(pad_to_multiple_of=multiple))
    mixed = ((64, 96), (96, 64))
    batch = some_batch(sizes=mixed, weak_sizes=mixed, strong_sizes=((32, 96), (96, 64)))
    (losses, values), *_ = runner.losses(batch, step)
    return dict(zip(losses, values.tolist(), strict=True)), shapes


@pytest.mark.parametrize("kind", KINDS)
def test_coarser_padding_changes_the_shapes_and_not_the_losses(kind, monkeypatch):
    plain, plain_shapes = step_padded_to(32, kind, monkeypatch)
    coarse, coarse_shapes = step_padded_to(128, kind, monkeypatch)
    assert plain_shapes == {(96, 96)} and coarse_shapes == {(128, 128)}
    assert coarse == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert sum(plain.values()) > 1


@pytest.mark.parametrize("wrong", [0, 16, 48, 2048])
def test_padding_goes_to_multiples_of_32(wrong):
    with pytest.raises(UserError, match="--pad-to-multiple-of: input should be"):
        new_config("coco-10pct", pad_to_multiple_of=wrong)
    assert new_config("coco-10pct", pad_to_multiple_of=96).runtime.pad_to_multiple_of == 96


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close_and_keeps_costs_losses_and_places_in_full_precision(kind, monkeypatch):
    stacked, sampled = [], []
    real_stack, real_read = mean_teacher.stack_layers, deformable.deformable_attention

    def stack(outputs):
        stacked.append(real_stack(outputs))
        return stacked[-1]

    def read(value, shapes, locations, weights):
        sampled.append((value.dtype, locations.dtype, weights.dtype))
        return real_read(value, shapes, locations, weights)

    for module in ("mean_teacher", "semi_detr", "supervised"):
        monkeypatch.setattr(f"semidetr_lite.methods.{module}.stack_layers", stack)
    monkeypatch.setattr(deformable, "deformable_attention", read)
    linear_dtypes, real_linear = set(), torch.nn.Linear.forward

    def linear(self, x):  # 2 heads, 3 levels, 2 points
        outputs = real_linear(self, x)
        linear_dtypes.update([outputs.dtype] if self.out_features in (12, 24) else [])
        return outputs

    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    plain = run(kind)
    assert {kinds[0] for kinds in sampled} == {torch.float32}
    stacked.clear(), sampled.clear()
    values, gradients = run(kind, precision="bfloat16")
    assert set(sampled) == {(torch.bfloat16, torch.float32, torch.float32)} and linear_dtypes == {
        torch.float32
    }
    assert stacked and all(
        layers.logits.dtype == layers.boxes.dtype == torch.float32 for layers in stacked
    )
    # pseudo-boxes of a random teacher lie near the cut, so that rounding decides which are kept
    steady = [
        name for name in values if kind == "supervised" or name.startswith("labelled denoising")
    ]
    assert values != plain[0]
    assert [values[name] for name in steady] == pytest.approx(
        [plain[0][name] for name in steady], rel=0.1
    )
    if kind == "supervised":
        ours, theirs = (
            torch.cat([g[name].flatten() for name in plain[1]]) for g in (gradients, plain[1])
        )
        assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.95
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_on_a_cpu_bfloat16_has_to_be_asked_for():
    assert engine("supervised")[0].precision == "float32"
    assert engine("supervised", precision="bfloat16")[0].precision == "bfloat16"
    with pytest.raises(
        UserError, match="no precision called 'half': choose from auto, float32, tf32, bfloat16"
    ):
        engine("supervised", precision="half")


def test_a_state_is_the_same_with_every_option():
    plain, _ = engine("stage one")
    dressed, _ = engine(
        "stage one", checkpointing=True, precision="bfloat16", channels_last=True, compile=True
    )
    dressed.method.load_state_dict(plain.method.state_dict())
    assert dressed.method.state_dict().keys() == plain.method.state_dict().keys()


# The largest step first


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", ["supervised", "mean teacher", "stage one"])
def test_the_rehearsal_has_the_most_of_everything_and_changes_nothing(kind, parts):
    runner, _ = engine(kind, accumulate=parts)
    before = {key: value.clone() for key, value in runner.method.state_dict().items()}
    calls, real = [], runner.method.forward

    def forward(batch, step, prepared=None):
        losses = real(batch, step, prepared)
        calls.append((batch, set(losses), dict(runner.method.stats)))
        return losses

    runner.method.forward = forward
    memory_dry_run(runner, (64, 96), 2, 0 if kind == "supervised" else 4, max_boxes=9)
    assert len(calls) == 2 * parts
    for batch, losses, stats in calls:
        assert all(
            image.shape == (3, 64, 96)
            for images, _ in (batch[name] for name in ("labelled",))
            for image in images
        )
        assert (
            all(len(target["boxes"]) == 9 for target in batch["labelled"][1])
            and "labelled denoising/l1" in losses
        )
        assert (
            kind == "supervised" or stats["pseudo_per_image"] == 12
        )  # `max_pseudo_boxes` of the method
    names = set.union(*(losses for _, losses, _ in calls))
    assert kind != "stage one" or {"consistency", "pseudo denoising/l1"} <= names  # both stages
    after = runner.method.state_dict()
    assert all(
        torch.equal(after[key].nan_to_num(), value.nan_to_num()) for key, value in before.items()
    )
    assert runner.method.stats == {} and "predict_pseudo_labels" not in vars(runner.method)
    assert all(parameter.grad is None for parameter in runner.method.parameters())


def test_the_dry_run_of_a_run_has_the_largest_size_of_its_views(tmp_path, monkeypatch):
    rehearsals = []
    monkeypatch.setattr(loop, "memory_dry_run", lambda engine, *how: rehearsals.append(how))
    Run(small("supervised"), tmp_path / "a", workers=0).memory_dry_run()
    sized = small("mean-teacher", short_sides=(48, 64), long_side=80)
    Run(sized, tmp_path / "b", workers=0).memory_dry_run()
    assert [how[0] for how in rehearsals] in ([(96, 128), (64, 80)], [(128, 96), (64, 80)])
    assert [how[1:] for how in rehearsals] == [(2, 0, 8), (2, 2, 8)]


@pytest.mark.parametrize(("options", "named"), [
    ({}, ["raise --accumulate (now 1)", "add --checkpointing", "use --precision bfloat16"]),
    ({"checkpointing": True, "precision": "bfloat16", "accumulate": 2}, ["raise --accumulate (now 2)"]),
])  # fmt: skip
def test_out_of_memory_names_what_to_turn(options, named):
    runner, _ = engine("supervised", **options)
    with pytest.raises(UserError) as caught:
        problem = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        raise_if_out_of_memory(problem, runner.runtime, runner.precision)
    assert str(caught.value) == f"out of memory in the largest steps: {', or '.join(named)}"
    raise_if_out_of_memory(RuntimeError("another"), runner.runtime, runner.precision)


def test_a_run_without_memory_ends_with_a_line(tmp_path, monkeypatch):
    def full(self, *how):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(Engine, "losses", full)
    with pytest.raises(UserError, match="out of memory in the largest steps: raise --accumulate"):
        Run(small("supervised"), tmp_path / "run", workers=0, quiet=True).run()


def test_the_options_of_the_command_reach_the_run(tmp_path, monkeypatch):
    configs = []

    class Stop(Exception):
        pass

    def run(config, *_, **__):
        configs.append(config)
        raise Stop

    monkeypatch.setattr(loop, "Run", run)
    options = ["--accumulate", "4", "--precision", "tf32", "--checkpointing", "--queries", "77"]
    for words in ([], options):
        start = ["train", "--out", str(tmp_path / "run"), "--preset", "coco-10pct"]
        with pytest.raises(Stop):
            cli.run_command(start + words, cli.COMMANDS)
    runtimes = [config.runtime for config in configs]
    assert [runtime.accumulate for runtime in runtimes] == [8, 4]
    assert [runtime.precision for runtime in runtimes] == ["auto", "tf32"]
    assert [runtime.checkpointing for runtime in runtimes] == [False, True]
    assert [config.detector_kwargs.num_queries for config in configs] == [None, 77]
