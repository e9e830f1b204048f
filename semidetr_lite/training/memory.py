"""Memory: the largest steps are run once before the first, so that they do not fail hours later."""

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch

from semidetr_lite.contracts import Batch, Target
from semidetr_lite.data.splits import Splits
from semidetr_lite.detectors.detector import Detector, padded_side
from semidetr_lite.distributed import all_gather, shard, world_size
from semidetr_lite.errors import UserError
from semidetr_lite.methods.mean_teacher import MeanTeacher, PseudoLabels, TeacherStudent
from semidetr_lite.training.engine import Engine
from semidetr_lite.training.settings import Runtime, Settings

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

USABLE_MEMORY = 0.9  # of what is free; the rest is left to fragments and other programs
MAX_BOXES = 100  # more confident boxes in one image do not happen in practice
IMAGES_TO_MEASURE = 50  # that measuring runs together, of small ones


def largest_size(settings: Settings, splits: Splits, detector: Detector) -> tuple[int, int]:
    """(H, W) in pixels of the largest image that a step can have."""
    views = settings.views
    sizes = [size for part in (splits.labelled, splits.unlabelled) for size in part.sizes]
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    if views.short_sides:
        height, width = max(views.short_sides), views.long_side
    if getattr(detector.backbone, "pad_before_backbone", False):  # as among images of other sizes
        multiple = detector.pad_to_multiple_of
        height, width = padded_side(height, multiple), padded_side(width, multiple)
    return height, width


def memory_dry_run(
    engine: Engine,
    size: tuple[int, int],
    labelled: int,
    unlabelled: int,
    max_boxes: int = MAX_BOXES,
) -> None:
    """Run the largest steps there can be, in each stage, and measure; change nothing.

    Args:
        engine: runs the steps.
        size: (H, W) of the largest image, in pixels.
        labelled, unlabelled: images of a step, in all processes.
        max_boxes: objects in each image, labelled or not.
    """
    method = engine.method
    batch = _largest_batch(size, labelled, unlabelled, max_boxes, method.student.num_classes)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    # as large as the state that the optimizer will have
    state = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]
    if isinstance(method, MeanTeacher):
        predict = method.predict_pseudo_labels
        confident = functools.partial(_all_confident, predict)
        method.predict_pseudo_labels = confident  # type: ignore[method-assign]
    with nothing_changed(method):
        try:
            for step in (0, 2**31):  # the first stage, and the last
                _run_step(engine, batch, step)
            images = batch["labelled"][0][:1] * IMAGES_TO_MEASURE
            method.teacher.detect(images)
        finally:
            method.__dict__.pop("predict_pseudo_labels", None)
            del state


def time_of_step(
    engine: Engine, size: tuple[int, int], labelled: int, unlabelled: int, boxes: int = 10
) -> float:
    """Seconds of a step, of the second of two that are run here; changes nothing.

    Args:
        engine, size, labelled, unlabelled: see `memory_dry_run`.
        boxes: objects in each labelled image.
    """
    num_classes = engine.method.student.num_classes
    batch = _largest_batch(size, labelled, unlabelled, boxes, num_classes)
    seconds = 0.0
    with nothing_changed(engine.method):
        for step in (0, 1):
            start = time.perf_counter()
            _run_step(engine, batch, step)
            if engine.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    return seconds


def _run_step(engine: Engine, batch: Batch, step: int) -> None:
    """Forward and backward pass of a step, without the optimizer's."""
    for losses, _ in engine.losses(batch, step):
        cast(torch.Tensor, sum(losses.values())).backward()
    engine.method.zero_grad(set_to_none=True)


@contextmanager
def nothing_changed(method: TeacherStudent) -> Iterator[None]:
    """What is run inside leaves no trace: buffers, figures and random numbers are as before."""
    buffers = {name: value.clone() for name, value in method.named_buffers()}
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for name, value in buffers.items():
                owner, _, own_name = name.rpartition(".")
                setattr(method.get_submodule(owner), own_name, value)
            method.stats = {}


def possible_micro_batches(labelled: int, unlabelled: int) -> list[int]:
    """The numbers of micro-batches of equal size and mix, the highest first.

    Args:
        labelled, unlabelled: images of a step, in all processes.
    """
    processes = world_size()
    images = math.gcd(labelled, unlabelled)  # gcd(n, 0) is n
    if images % processes:
        return [images]
    own = images // processes  # of each process
    return [processes * count for count in range(own, 0, -1) if own % count == 0]


def choose_micro_batches(counts: list[int], largest_step: Callable[[int], tuple[int, int]]) -> int:
    """The fewest micro-batches that fit into the memory of the GPU.

    It starts with the most and takes fewer as long as the next largest step is sure to fit. So none
    runs out of memory, and all processes choose the same.

    Args:
        counts: to choose from, falling; each divides the one before.
        largest_step: runs the largest step in so many micro-batches; the bytes that it took beyond
            what was in use before, and the bytes that were free then.
    """
    for count, fewer in zip(counts, counts[1:], strict=False):
        taken, free = largest_step(count)
        expected = taken * count / fewer  # at most: gradients do not grow with the images
        if any(all_gather(expected > USABLE_MEMORY * free)):
            return count
    return counts[-1]


def gpu_memory_of(work: Callable[[], None]) -> tuple[int, int]:
    """The bytes of a GPU that `work()` took beyond those in use before, and the bytes free then."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before, free


def _largest_batch(
    size: tuple[int, int], labelled: int, unlabelled: int, max_boxes: int, num_classes: int
) -> Batch:
    """This process's images of a step, all of one size and full of boxes."""
    corners = torch.tensor([0.1, 0.1, 0.6, 0.6]) + torch.linspace(0, 0.3, max_boxes)[:, None]
    boxes = corners * torch.tensor(size).flip(0).repeat(2)
    target: Target = {"size": size, "matrix": torch.eye(3)}
    full: Target = {**target, "boxes": boxes, "labels": torch.arange(max_boxes) % num_classes}
    image = torch.zeros(3, *size, dtype=torch.uint8)
    count, unlabelled_count = len(shard(labelled)), len(shard(unlabelled))
    batch: Batch = {"labelled": ([image] * count, [full] * count)}
    if unlabelled_count:
        view = ([image] * unlabelled_count, [target] * unlabelled_count)
        batch["weak"] = batch["strong"] = view
    return batch


def _all_confident(predict, micro_batch: Batch, keep_teacher: bool) -> PseudoLabels:
    """A teacher's pseudo-labels, with a confident box in every column that there is."""
    labels = predict(micro_batch, keep_teacher)
    valid = torch.ones_like(labels.confident)
    weak = labels.weak._replace(scores=torch.ones_like(labels.weak.scores), valid=valid)
    strong = labels.strong._replace(valid=valid)
    return labels._replace(weak=weak, strong=strong, confident=valid, candidates=valid)


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used so far, in GB: of the GPU, or else of the machine.

    0 where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def raise_if_out_of_memory(problem: Exception, runtime: Runtime, precision: str) -> None:
    """Raises UserError, which names the options to change, if memory was short.

    Returns otherwise.
    """
    if not isinstance(problem, torch.OutOfMemoryError) and "allocate memory" not in str(problem):
        return
    ways = [f"raise --accumulate (now {runtime.accumulate})"]
    if not runtime.checkpointing:
        ways.append("add --checkpointing")
    if precision != "bfloat16":
        ways.append("use --precision bfloat16")
    raise UserError(f"out of memory in the largest steps: {', or '.join(ways)}") from None
