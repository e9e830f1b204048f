"""What a step on the digits costs, in seconds of CPU time of this process.

    python benchmarks/step_cost.py methods    the methods in turn, and the share of matching
    python benchmarks/step_cost.py kernel     with the kernel of deformable attention and without
    python benchmarks/step_cost.py profile    which operations a step consists of

Options: --steps 20 --threads 1. Each step loads its batch in this process, so that data loading and
views are counted. Figures are medians of steps that take turns, ratios are medians of pairs;
matching, costs and losses are counted forward, not backward. The profile sorts the operations of
torch by name and counts those that take less than 20 microseconds: most of that is the way from
Python to the operation and back.
"""

import argparse
import platform
import statistics
import time
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import semidetr_lite  # noqa: F401  before torch: it sets how threads wait

# isort: split
import torch
from torch.profiler import ProfilerActivity, profile

from semidetr_lite.data.batches import Batches
from semidetr_lite.detectors import kernels
from semidetr_lite.methods import mean_teacher, semi_detr, supervised
from semidetr_lite.training.loop import Run
from semidetr_lite.training.settings import new_config

TIMED = (
    "stack_layers",
    "layer_costs",
    "copy_to_host",
    "matched_costs",
    "mine",
    "match_layers",
    "detection_losses",
    "denoising_losses",
)

STAGES = {
    "supervised": ("supervised", {}),
    "one-to-many": ("semi-detr", {"one_to_many_share": 1.0}),
    "one-to-one": ("semi-detr", {"one_to_many_share": 0.0}),
    "mean-teacher": ("mean-teacher", {}),
    "soft-teacher": ("soft-teacher", {"detector": "faster-rcnn"}),
    "dense-teacher": ("dense-teacher", {"detector": "fcos"}),
}
WARM_UP = 2  # steps
SMALL = 20  # microseconds
GROUPS = {  # of operations, by parts of their names; the first that fits
    "convolutions": ("conv",),
    "deformable attention": ("deformable_attention",),
    "matrix products": ("mm", "scaled_dot_product", "flash_attention"),
    "norms": ("group_norm", "layer_norm"),
    "optimizer, EMA, gradient norm": ("_fused_", "_foreach_"),
    "copies": ("copy_", "cat", "stack", "clone", "index", "gather", "scatter", "constant_pad"),
}


class Steps:
    """The steps of one method on the digits, one after the other."""

    def __init__(self, stage: str):
        method, changes = STAGES[stage]
        config = new_config(method=method, steps=10_000, score_threshold=0.05, **changes)
        self.run = Run(config, "unused", quiet=True, workers=0)
        self.loader = Batches(
            self.run.splits,
            config.optimizer.batch_size,
            0 if method == "supervised" else config.optimizer.unlabelled_batch_size,
            config.views,
            0,
        )

    def __call__(self) -> float:
        """Run a step; the seconds that it took."""
        began = time.process_time()
        self.run.train_step(self.loader[self.run.step])
        self.run.step += 1
        return time.process_time() - began


@contextmanager
def counted(total: dict):
    """Add up the time spent in matching and loss functions, outermost calls only."""
    depth, kept = [0], []

    def wrap(function):
        def timed(*args, **kwargs):
            depth[0] += 1
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                if depth[0] == 0:
                    total["seconds"] += time.process_time() - began

        return timed

    for module in (supervised, mean_teacher, semi_detr):
        for name in TIMED:
            if hasattr(module, name):
                kept.append((module, name, getattr(module, name)))
                setattr(module, name, wrap(getattr(module, name)))
    yield
    for module, name, function in kept:
        setattr(module, name, function)


def compare_methods(steps: int) -> None:
    """The methods in turn."""
    methods = {name: Steps(name) for name in STAGES}
    times, shares = {name: [] for name in STAGES}, {name: [] for name in STAGES}
    for number in range(steps + WARM_UP):
        for name, step in methods.items():
            spent = {"seconds": 0.0}
            with counted(spent):
                seconds = step()
            if number >= WARM_UP:
                times[name].append(seconds)
                shares[name].append(spent["seconds"] / seconds)
    for name in STAGES:
        pairs = zip(times[name], times["supervised"], strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
        print(
            f"{name:<14} {statistics.median(times[name]):.3f} s a step, {ratio:.2f} x supervised, "
            f"matching and loss {100 * statistics.median(shares[name]):.1f} %"
        )
    print(f"pseudo-boxes: {methods['one-to-many'].run.method.stats}")


def compare_kernels(steps: int) -> None:
    """A step with the CPU kernel of deformable attention and one without, in turn."""
    for stage in ("supervised", "one-to-many", "one-to-one"):
        step, pairs = Steps(stage), []
        for _ in range(steps + WARM_UP):
            with_kernel = step()
            with mock.patch.object(kernels, "can_compile", lambda device: False):
                pairs.append((with_kernel, step()))
        pairs = pairs[WARM_UP:]
        medians = [statistics.median(each) for each in zip(*pairs, strict=True)]
        ratios = sorted(without / with_kernel for with_kernel, without in pairs)
        print(
            f"{stage:<14} {medians[0]:.3f} s with the kernel, {medians[1]:.3f} s without, ratio "
            f"{statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def show_profile(steps: int) -> None:
    """Where the time of a step goes, by groups of operations."""
    for stage in ("supervised", "one-to-many"):
        step = Steps(stage)
        for _ in range(WARM_UP):
            step()
        seconds = statistics.median(step() for _ in range(steps))
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            began = time.perf_counter()
            for _ in range(steps):
                step()
            passed = (time.perf_counter() - began) / steps
        spent, small, calls = Counter(), 0.0, 0
        for event in recorded.events():
            own = event.self_cpu_time_total / 1e6 / steps
            spent[group_of(event.name)] += own
            calls += 1
            small += own * (own * steps * 1e6 < SMALL)
        whole = sum(spent.values())
        print(f"{stage}: {seconds:.3f} s a step; {calls / steps:.0f} operations")
        for name, own in spent.most_common():
            print(f"  {100 * own / whole:5.1f} %  {name}")
        print(f"  {100 * small / whole:5.1f} %  of these in operations of less than {SMALL} us")
        between = "between operations: data, Python, the profiler itself"
        print(f"  {100 * (1 - whole / passed):5.1f} %  of the time that passed was {between}")


def group_of(name: str) -> str:
    """The group of an operation of torch."""
    for group, parts in GROUPS.items():
        if any(part in name for part in parts):
            return group
    return "others"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shows = {"methods": compare_methods, "kernel": compare_kernels, "profile": show_profile}
    parser.add_argument("show", nargs="?", choices=shows, default="methods")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, "
        f"{options.steps} steps in turn, CPU seconds"
    )
    shows[options.show](options.steps)


if __name__ == "__main__":
    main()
