"""What a step of the COCO recipe costs: seconds, memory, the wait for data, and where the time
goes.

    python benchmarks/gpu_step.py --minutes 8 --workers 14 --out benchmarks/results/gpu_step.jsonl
    python benchmarks/gpu_step.py --setups bfloat16:8 bfloat16:4:checkpointing

What a CPU can hold, and every line of the script on a CPU with small images:

    python benchmarks/gpu_step.py --setups float32:1 --mix 1 4 --short-side 320 --steps 3
    python benchmarks/gpu_step.py --toy

8 labelled and 32 unlabelled images with the recipe's own resize draw, DINO with ResNet-50, 4 levels
and 900 queries, 80 classes, random weights; data are generated if none are given
(data_scripts/make_coco_sized.py). A setup is PRECISION:PARTS and any of checkpointing,
channels_last, compile, pad_to_multiple_of=64. A teacher of random weights is sure of nothing, so
`--pseudo` boxes of each image count, whatever their score. For each setup and stage one JSON line:

    seconds       a step, median, without the wait for data; "hours" are those of 120,000 such steps
                  with the wait
    wait          share of the time spent waiting for data, with --workers processes that load
    passes_alone  seconds of the forward and backward passes of the same images and nothing else;
                  "ratio": a step to it, median over --watched pairs in turn
    waits         how often a step waits for the GPU, in all parts
    memory_gb     the highest allocation of the device; rehearsal_gb that of the largest step there
                  can be
    kernels       that a step starts on the GPU; gpu_seconds of work they are, all together
    operations    on a CPU in their place: calls of a step that compute something, views left out;
                  of the passes alone; and of the passes through backbone and encoder alone. They
                  are about the kernels a GPU would start, whatever the size of the images;
                  deformable attention is one, as it is there
    parts         seconds of a step by part, each less those named inside it, measured in further
                  steps in which the device is waited for at every border; layers that
                  checkpointing runs again count as backward

A setup that does not fit into the memory says so in its line. One process. Beside torch and
torchvision it needs scipy, scikit-learn, pillow, tqdm, pyyaml, safetensors, pydantic and tyro.
"""

import argparse
import contextlib
import functools
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))

from semidetr_lite.detectors import deformable
from semidetr_lite.errors import UserError
from semidetr_lite.methods import mean_teacher, query_consistency, semi_detr
from semidetr_lite.training.engine import micro_batches
from semidetr_lite.training.loop import Run
from semidetr_lite.training.memory import raise_if_out_of_memory
from semidetr_lite.training.presets import load_splits
from semidetr_lite.training.settings import DetectorKwargs, new_config

SETUPS = [  # the most wanted first, in case the time is short
    "bfloat16:2",
    "bfloat16:4",
    "bfloat16:1",
    "tf32:2",
    "bfloat16:8",
    "bfloat16:2:compile",
]
STAGES = {"one-to-many": 1.0, "one-to-one": 0.0}
TOY = {
    "detector_kwargs": DetectorKwargs(
        num_queries=12,
        dim=16,
        heads=2,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=1,
        backbone="resnet18",
        test_size=(48, 80),
    ),
    "batch_size": 2,
    "unlabelled_batch_size": 8,
    "short_sides": (32, 40, 48),
    "long_side": 80,
}


class Clock:
    """Adds up the seconds spent in named parts; those of inner parts do not count in outer ones."""

    def __init__(self, device: torch.device):
        self.device, self.total, self.inner = device, {}, [0.0]

    def now(self) -> float:
        """The time when everything asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, function):
        """The function, its time added to `name`."""

        @functools.wraps(function)
        def run(*inputs, **named):
            began = self.now()
            self.inner.append(0.0)
            try:
                return function(*inputs, **named)
            finally:
                spent = self.now() - began
                self.total[name] = self.total.get(name, 0.0) + spent - self.inner.pop()
                self.inner[-1] += spent

        return run


class Operations(TorchDispatchMode):
    """Counts the calls that compute something: no views, no empty tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns, name = func._schema.returns, func._schema.name
        view = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
        self.count += not (
            view or "empty" in name or name in ("aten::_unsafe_view", "aten::_local_scalar_dense")
        )
        return func(*args, **(kwargs or {}))


class OneKernel(torch.autograd.Function):
    """Zeros of deformable attention's shape: counts one operation, as its kernel, and one for each
    gradient.
    """

    @staticmethod
    def forward(ctx, value, shapes, locations, weights):
        ctx.save_for_backward(value, locations, weights)
        return value.new_zeros(*locations.shape[:2], value[0, 0].numel())

    @staticmethod
    def backward(ctx, grad):
        value, *others = (torch.zeros_like(each) for each in ctx.saved_tensors)
        return value, None, *others


def operations(work, batch: dict) -> int:
    """How many operations `work(batch)` is; what it computes means nothing."""
    with (
        mock.patch.object(deformable, "select_kernel", lambda *_: OneKernel.apply),
        Operations() as counting,
    ):
        work(batch)
    return counting.count


@contextlib.contextmanager
def watched(run: Run, clock: Clock):
    """Inside, the clock sees every part of a step."""
    method = run.method
    places = [
        (torch.Tensor, "backward", "backward"),
        (run.optimizer, "step", "optimizer"),
        (method, "after_step", "EMA"),
    ]
    places += [(torch.nn.utils, "clip_grad_norm_", "gradient norm")]
    matching = ("layer_costs", "copy_to_host", "matched_costs", "mine", "match_layers")
    places += [(semi_detr, name, "matching") for name in matching]
    for who in ("student", "teacher"):
        detector = getattr(method, who)
        places += [
            (detector, "_project", f"{who} backbone"),
            (detector, "encode", f"{who} encoder"),
        ]
        places += [
            (detector, "decode", f"{who} decoder"),
            (detector, "decode_groups", f"{who} decoder, groups"),
        ]
    places += [(mean_teacher, "select_pseudo_boxes", "pseudo-boxes")]
    places += [(query_consistency, "consistency_loss", "losses")]
    places += [(semi_detr, name, "losses") for name in ("detection_losses", "denoising_losses")]
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, clock.timed(part, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, own in before:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def passes_alone(run: Run, batch: dict) -> None:
    """The forward and backward passes of a step, for a loss that costs nothing."""
    run.optimizer.zero_grad(set_to_none=True)
    for part in micro_batches(batch, run.engine.num_micro_batches):
        with torch.no_grad():
            run.method.teacher(part["weak"][0])
        outputs = run.method.student([*part["labelled"][0], *part["strong"][0]])
        layers = [outputs, *outputs["aux_outputs"], outputs["encoder"]]
        sum(layer["pred_logits"].mean() + layer["pred_boxes"].mean() for layer in layers).backward()


def encodings_alone(run: Run, batch: dict) -> None:
    """The part of `passes_alone` that is backbone and encoder, forward and backward."""
    run.optimizer.zero_grad(set_to_none=True)
    for part in micro_batches(batch, run.engine.num_micro_batches):
        with torch.no_grad():
            run.method.teacher.encode(part["weak"][0])
        memory = run.method.student.encode([*part["labelled"][0], *part["strong"][0]])
        memory.tokens.mean().backward()


def seconds_of(clock: Clock, work, batch: dict) -> float:
    """Seconds of `work(batch)`."""
    began = clock.now()
    work(batch)
    return clock.now() - began


def waits(work, batch: dict) -> int:
    """How often `work(batch)` waits for a GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work(batch)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(each.message) for each in said)


def kernels(work, batch: dict, device: DeviceType) -> tuple[int, float]:
    """How many kernels `work(batch)` starts on a kind of device, and the seconds they take."""
    activity = ProfilerActivity.CUDA if device == DeviceType.CUDA else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        work(batch)
        if device == DeviceType.CUDA:
            torch.cuda.synchronize()
    started = [event for event in recorded.events() if event.device_type == device]
    started = [event for event in started if not getattr(event, "is_user_annotation", False)]
    return len(started), sum(event.time_range.elapsed_us() for event in started) / 1e6


def on_gpu(work, batch: dict, device: DeviceType = DeviceType.CUDA) -> dict:
    """Waits, kernels and their seconds of `work(batch)`."""
    found = {"waits": waits(work, batch)}
    found["kernels"], seconds = kernels(work, batch, device)
    return found | {"gpu_seconds": round(seconds, 4)}


def measure(run: Run, options) -> dict:
    """The figures of one setup and stage; Run is not at its end yet, and its weights move."""
    clock, cuda, found = Clock(run.device), run.device.type == "cuda", {}

    def peak() -> float | None:
        return round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run.memory_dry_run()
    found["rehearsal_gb"] = peak()
    batches, data_waits, seconds, kept = iter(run._loader()), [], [], []
    for number in range(options.warm_up + options.steps):
        began = clock.now()
        batch = next(batches)
        loaded = clock.now()
        run.train_step(batch)
        if number == options.warm_up - 1 and cuda:
            torch.cuda.reset_peak_memory_stats()
        if number >= options.warm_up:
            data_waits.append(loaded - began)
            seconds.append(clock.now() - loaded)
            kept = [*kept, batch][-options.watched :]
        run.step += 1
    found["memory_gb"], found["seconds"] = peak(), round(statistics.median(seconds), 4)
    spent = sum(data_waits) + sum(seconds)
    found["wait"] = round(sum(data_waits) / spent, 3)
    found["hours"] = round(120_000 / 3600 * spent / len(seconds), 1)
    found["pseudo_per_image"] = run.method.stats["pseudo_per_image"]
    works = run.train_step, functools.partial(passes_alone, run)
    pairs = [
        [seconds_of(clock, work, batch) for work in works] for batch in kept
    ]  # the same images, in turn
    found["passes_alone"] = round(statistics.median(alone for _, alone in pairs), 4)
    found["ratio"] = round(statistics.median(step / alone for step, alone in pairs), 3)
    with watched(run, clock):
        began = clock.now()
        for batch in kept:
            run.train_step(batch)
        whole = clock.now() - began
    if cuda:
        found |= on_gpu(run.train_step, kept[-1])
    elif not run.config.runtime.compile:
        counted = *works, functools.partial(encodings_alone, run)
        found["operations"] = [operations(work, kept[-1]) for work in counted]
    rest = whole - sum(clock.total.values())
    parts = {
        **dict(sorted(clock.total.items(), key=lambda item: -item[1])),
        "everything else": rest,
    }
    return found | {"parts": {name: round(spent / len(kept), 4) for name, spent in parts.items()}}


def make_run(setup: str, stage: str, data: str, splits, options) -> Run:
    """A run of the recipe in one setup and stage."""
    precision, parts, *flags = setup.split(":")
    changes = {"precision": precision, "accumulate": int(parts), "one_to_many_share": STAGES[stage]}
    for flag in flags:
        name, _, number = flag.partition("=")
        changes[name] = int(number) if number else True
    changes |= {"score_threshold": 0.0, "max_pseudo_boxes": options.pseudo}
    if options.mix:
        changes |= {"batch_size": options.mix[0], "unlabelled_batch_size": options.mix[1]}
    if options.short_side:
        changes["short_sides"] = (options.short_side,)
    if options.toy:
        changes |= TOY
    else:
        changes["backbone_weights"] = None
    config = new_config("coco-10pct", data=data, steps=1000, **changes)
    return Run(
        config,
        Path(tempfile.gettempdir()) / "never-written",
        splits=splits,
        workers=options.workers,
        quiet=True,
    )


def main(argv=None) -> int:
    """Measure each setup in each stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a COCO tree; one is generated if not given")
    parser.add_argument("--images", type=int, default=300, help="how many to generate")
    parser.add_argument("--setups", nargs="+", default=None, help=f"by default {' '.join(SETUPS)}")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument(
        "--watched", type=int, default=2, help="of these steps, in which the parts are timed"
    )
    parser.add_argument("--pseudo", type=int, default=10, help="pseudo-boxes an image")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument(
        "--mix", type=int, nargs=2, help="labelled and unlabelled images a step, if not 8 and 32"
    )
    parser.add_argument(
        "--short-side", type=int, help="of all images, instead of the recipe's draw"
    )
    parser.add_argument("--out", type=Path, help="a JSON-lines file to append to")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="after these no other setup is begun"
    )
    parser.add_argument(
        "--toy", action="store_true", help="small images and a small model, three steps"
    )
    options, began = parser.parse_args(argv), time.monotonic()
    if options.toy:
        options.images, options.steps, options.warm_up, options.watched, options.workers = (
            100,
            2,
            1,
            1,
            0,
        )
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or str(generate(Path(folder) / "coco", options.images))
        splits = load_splits(new_config("coco-10pct", data=data))
        for setup in options.setups or (
            ["float32:2", "float32:1:checkpointing"] if options.toy else SETUPS
        ):
            for stage in options.stages:
                if time.monotonic() - began > 60 * options.minutes:
                    print(f"no time for {setup} {stage}", file=sys.stderr)
                    continue
                print(json.dumps(line := one_line(setup, stage, data, splits, options)), flush=True)
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    with open(options.out, "a") as file:
                        file.write(json.dumps(line) + "\n")
    return 0


def generate(folder: Path, images: int) -> Path:
    """Data of COCO's measures."""
    import make_coco_sized

    make_coco_sized.make(folder, {"train2017": images, "val2017": 4})
    return folder


def one_line(setup: str, stage: str, data: str, splits, options) -> dict:
    """The line of one setup and stage, with the machine it is measured on."""
    cuda = torch.cuda.is_available()
    machine = (
        torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    line = {
        "setup": setup,
        "stage": stage,
        "toy": options.toy,
        "machine": machine,
        "torch": torch.__version__,
    }
    line |= {"workers": options.workers, "steps": options.steps, "short_side": options.short_side}
    run = make_run(setup, stage, data, splits, options)
    try:
        line |= {
            "images": [run.config.optimizer.batch_size, run.unlabelled],
            **measure(run, options),
        }
    except torch.OutOfMemoryError as problem:
        try:
            raise_if_out_of_memory(problem, run.config.runtime, run.engine.precision)
        except UserError as said:
            line["failed"] = str(said)
    del run
    if cuda:
        torch.cuda.empty_cache()
    return line


if __name__ == "__main__":
    sys.exit(main())
