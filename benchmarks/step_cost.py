"""What a step costs: the methods in turn, and the share of matching and losses.

    python benchmarks/step_cost.py [--steps 20] [--threads 2]

Each step loads its batch in this process, so that data loading and views are counted. Prints
medians, the ratio of each pair's median, and seconds spent in matching, costs and losses (forward)
inside a step.
"""

import argparse
import platform
import statistics
import time
from contextlib import contextmanager

import torch

from semidetr_lite.data.batches import Batches
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


@contextmanager
def counted(total: dict):
    """Add up the time spent in matching and loss functions, outermost calls only."""
    depth, kept = [0], []

    def wrap(function):
        def timed(*args, **kwargs):
            depth[0] += 1
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                if depth[0] == 0:
                    total["seconds"] += time.perf_counter() - began

        return timed

    for module in (supervised, mean_teacher, semi_detr):
        for name in TIMED:
            if hasattr(module, name):
                kept.append((module, name, getattr(module, name)))
                setattr(module, name, wrap(getattr(module, name)))
    yield
    for module, name, function in kept:
        setattr(module, name, function)


def main() -> None:
    """Time both methods in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stages = {
        "supervised": ("supervised", {}),
        "one-to-many": ("semi-detr", {"one_to_many_share": 1.0}),
        "one-to-one": ("semi-detr", {"one_to_many_share": 0.0}),
        "mean-teacher": ("mean-teacher", {}),
        "soft-teacher": ("soft-teacher", {"detector": "faster-rcnn"}),
        "dense-teacher": ("dense-teacher", {"detector": "fcos"}),
    }
    runs, loaders, times, shares = {}, {}, {}, {}
    for name, (method, changes) in stages.items():
        runs[name] = Run(
            new_config(method=method, steps=10_000, score_threshold=0.05, **changes),
            "unused",
            quiet=True,
            workers=0,
        )
        config = runs[name].config
        loaders[name] = Batches(
            runs[name].splits,
            config.optimizer.batch_size,
            0 if method == "supervised" else config.optimizer.unlabelled_batch_size,
            config.views,
            0,
        )
        times[name], shares[name] = [], []
    for step in range(options.steps + 3):
        for name, run in runs.items():
            spent = {"seconds": 0.0}
            began = time.perf_counter()
            with counted(spent):
                run.train_step(loaders[name][step])
            run.step += 1
            if step >= 3:
                times[name].append(time.perf_counter() - began)
                shares[name].append(spent["seconds"] / times[name][-1])
    print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, "
        f"{options.steps} steps in turn"
    )
    base = statistics.median(times["supervised"])
    for name in stages:
        ratio = statistics.median(
            [a / b for a, b in zip(times[name], times["supervised"], strict=True)]
        )
        print(
            f"{name:<12} {statistics.median(times[name]):.3f} s a step, {ratio:.2f} x supervised, "
            f"matching and loss {100 * statistics.median(shares[name]):.1f} %"
        )
    print(
        f"pseudo-boxes per image: {runs['one-to-many'].method.stats} "
        f"(supervised median {base:.3f} s)"
    )


if __name__ == "__main__":
    main()
