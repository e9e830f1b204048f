"""What a run would cost on this machine, from a few steps: `semidetr train ... --dry-run`."""

import itertools
import statistics
import sys
import tempfile
import time

import torch

from semidetr_lite.training.loop import Run
from semidetr_lite.training.memory import gpu_memory_of
from semidetr_lite.training.settings import Config

TIMED_STEPS = 4  # in each stage, after one that is not timed


def describe_cost(config: Config, workers: int = 1) -> list[str]:
    """Seconds and memory of a step, and the hours of the run, in lines to print.

    The steps are real ones, with their loading, of a run in a temporary folder that is deleted.

    Args:
        config: of the run.
        workers: processes that load data.

    Raises UserError for settings that cannot be, and where memory is short.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, folder, workers=workers, quiet=True)
        run.choose_micro_batches()
        memory = _memory_of_largest_step(run) if run.device.type == "cuda" else None
        seconds = {name: _seconds_per_step(run, step) for name, step in _stages(run).items()}
        return _lines(run, seconds, _peak_resident() if memory is None else memory)


def _stages(run: Run) -> dict[str, int]:
    """The stages of the run, and a step at which each can be measured."""
    share = run.config.semi_detr.one_to_many_share
    if run.config.method != "semi-detr" or share == 0:
        return {"": 0}
    if share == 1:
        return {"one-to-many": 0}
    last = max(run.config.steps - TIMED_STEPS - 1, 0)
    return {"one-to-many": 0, "one-to-one": last}


def _seconds_per_step(run: Run, step: int) -> float:
    """The median of a few steps from a step on."""
    run.step, seconds = step, []
    batches = iter(run._loader())
    began = time.perf_counter()
    for batch in itertools.islice(batches, TIMED_STEPS + 1):
        run.train_step(batch)
        run.step += 1
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    return statistics.median(seconds[1:] or seconds)


def _memory_of_largest_step(run: Run) -> int:
    """Bytes of the GPU in use in the largest step of the run, weights and optimizer included."""
    before = torch.cuda.memory_allocated()
    taken, _ = gpu_memory_of(run.memory_dry_run)
    return before + taken


def _peak_resident() -> int | None:
    """The most bytes of memory that this process has had; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _lines(run: Run, seconds: dict[str, float], memory: int | None) -> list[str]:
    """The figures as text."""
    config, runtime = run.config, run.config.runtime
    share = config.semi_detr.one_to_many_share
    mean = statistics.mean(seconds.values())
    if len(seconds) == 2:
        mean = share * seconds["one-to-many"] + (1 - share) * seconds["one-to-one"]
    device = f"{runtime.threads} CPU threads"
    if run.device.type == "cuda":
        device = torch.cuda.get_device_name()
    images = config.optimizer.batch_size + run.unlabelled
    lines = [f"{device}, {run.engine.precision}, {images} images a step, micro-batches: "
             f"{runtime.accumulate}"]  # fmt: skip
    lines += [f"a step: {mean:.2f} s"]
    if len(seconds) == 2:
        parts = [f"{value:.2f} s with {name} matching" for name, value in seconds.items()]
        lines[-1] += f" ({', '.join(parts)})"
    if memory is not None:
        where = "of the GPU in the largest step" if run.device.type == "cuda" else "at most"
        lines += [f"memory: {memory / 1e9:.1f} GB {where}"]
    lines += [f"{config.steps:,} steps: {_duration(mean * config.steps)}, measuring not counted"]
    return lines


def _duration(seconds: float) -> str:
    """As a person would say it."""
    if seconds < 5400:
        return f"{max(seconds / 60, 0.1):.1f} minutes"
    return f"{seconds / 3600:.1f} hours"
