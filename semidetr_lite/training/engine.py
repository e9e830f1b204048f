"""How a step is run, whatever the method: in micro-batches, in several processes, in a precision.

None of this changes what is learned: in any number of micro-batches and processes the losses are
those of the whole step, up to rounding (normalizers.py). Where the losses of a micro-batch depend
on what is matched or mined in the others, the student runs ahead on all of them, without gradient
(`SemiDETR.run_ahead`). Three things are those of a micro-batch: what is mined in a step without
consistency loss, where it is only logged, and the baselines: Faster R-CNN and FCOS divide their
losses in each micro-batch and process, and what Faster R-CNN samples depends on the images beside.
The third is the padding of mixed sizes, to multiples of `pad_to_multiple_of`: it is masked, but a
ResNet has seen it (docs/detectors.md).

In bfloat16 are the backbone and the insides of encoder and decoder layers, but not the sampling
locations of attention; heads, boxes, matching and losses are float32.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import cast, get_args

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from semidetr_lite.contracts import Batch, Views
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.transformer import Memory
from semidetr_lite.distributed import all_reduce_mean, world_size
from semidetr_lite.errors import UserError
from semidetr_lite.methods.mean_teacher import TeacherStudent
from semidetr_lite.training.settings import Precision, Runtime


def check_micro_batches(kind: str, images: int, count: int) -> None:
    """Raises UserError where a step has fewer images of a kind than micro-batches."""
    if images < count:
        fault = f"{images} {kind} images a step cannot be run in {count} micro-batches"
        raise UserError(f"{fault}; lower accumulate")


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """A batch in `count` parts with the same mix of labelled and unlabelled images.

    Their sizes are equal, or differ by one image.
    """
    pieces: dict[str, list] = {}
    views: Mapping[str, Views] = cast(dict, batch)
    for name, (images, targets) in views.items():
        check_micro_batches(name, len(images), count)
        edges = [len(images) * number // count for number in range(count + 1)]
        pairs = zip(edges, edges[1:], strict=False)
        pieces[name] = [(images[start:end], targets[start:end]) for start, end in pairs]
    parts = [{name: cut[number] for name, cut in pieces.items()} for number in range(count)]
    return cast(list[Batch], parts)


def choose_precision(precision: str, device: torch.device) -> Precision:
    """What "auto" means on a device; every other name as it is.

    That is bfloat16 on a GPU that has it, else float32.

    Raises UserError for a precision that there is not.
    """
    names = get_args(Precision)
    if precision not in names:
        raise UserError(f"no precision called {precision!r}: choose from {', '.join(names)}")
    if precision != "auto":
        return cast(Precision, precision)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


def apply_runtime_options(
    detector: Detector, runtime: Runtime, precision: str, trained: bool
) -> None:
    """Make a detector run as the options say; its weights and their names stay as they are."""
    backbone = detector.backbone
    detector.pad_to_multiple_of = runtime.pad_to_multiple_of
    if runtime.channels_last:
        backbone.to(memory_format=torch.channels_last)
    stages = getattr(backbone, "stages", getattr(backbone, "layers", ()))
    encoder, decoder = getattr(detector, "encoder", ()), getattr(detector, "decoder", ())
    for module in (*stages, *encoder, *decoder):
        run = module.forward
        run = torch.compile(run) if runtime.compile else run
        run = in_bfloat16(run) if precision == "bfloat16" else run
        module.forward = checkpointed(run) if runtime.checkpointing and trained else run
    if precision == "bfloat16":
        project = in_bfloat16(detector._project)
        detector._project = project  # type: ignore[method-assign]


def in_bfloat16(function: Callable) -> Callable:
    """The function under autocast; where it returns a list of maps, they come back as float32."""

    @functools.wraps(function)
    def run(x, *others):
        device = (x.tokens if isinstance(x, Memory) else x).device.type
        with torch.autocast(device, torch.bfloat16):
            outputs = function(x, *others)
        return [level.float() for level in outputs] if isinstance(outputs, list) else outputs

    return run


def checkpointed(function: Callable) -> Callable:
    """The function, run again in the backward pass instead of keeping what it computed."""

    @functools.wraps(function)
    def run(*inputs):
        if not torch.is_grad_enabled():
            return function(*inputs)
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    return run


class Engine:
    """Runs the steps of a method that lies on its device already.

    Args:
        method: what to train.
        runtime: how; its micro-batches are shared among the processes, one each if there are no
            fewer processes than micro-batches.
        batch_size: labelled images of a step; each micro-batch has one at least.

    Raises UserError for a precision that there is not.
    """

    def __init__(self, method: TeacherStudent, runtime: Runtime, batch_size: int = 16):
        self.method, self.runtime = method, runtime
        self.device = next(method.parameters()).device
        self.precision = choose_precision(runtime.precision, self.device)
        if self.device.type == "cuda":
            allowed = self.precision != "float32"
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        apply_runtime_options(method.student, runtime, self.precision, trained=True)
        apply_runtime_options(method.teacher, runtime, self.precision, trained=False)
        self.batch_size = batch_size
        self.wrapped: TeacherStudent | DistributedDataParallel = method
        self.set_micro_batches(cast(int, runtime.accumulate))  # "auto" was resolved before
        if world_size() > 1:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", FutureWarning
                )  # broadcast_buffers gets another name
                # All start from the weights of the first; buffers are the same in all anyway.
                self.wrapped = DistributedDataParallel(
                    method, broadcast_buffers=False, find_unused_parameters=True
                )

    def set_micro_batches(self, accumulate: int) -> None:
        """Run the next steps in so many micro-batches, shared among the processes."""
        wanted = -(-accumulate // world_size())  # rounded up
        at_most = self.batch_size // world_size() if world_size() > 1 else wanted
        self.num_micro_batches = min(wanted, at_most)

    def losses(
        self, batch: Batch, step: int
    ) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """The losses of a step, one micro-batch after the other.

        Yields, per micro-batch, {name: loss} to be propagated back before the next is asked for,
        and a tensor (losses,) of their means over the processes, in the same order, on the device.
        """
        parts = micro_batches(batch, self.num_micro_batches)
        weight = 1 / len(parts)
        prepared: list = self.method.prepare(parts, step) if len(parts) > 1 else [None]
        while parts:  # a micro-batch that is done with is dropped
            context: contextlib.AbstractContextManager = contextlib.nullcontext()
            if isinstance(self.wrapped, DistributedDataParallel) and len(parts) > 1:
                context = self.wrapped.no_sync()  # gradients are reduced after the last
            with context:
                losses = self.wrapped(parts.pop(0), step, prepared.pop(0))
                losses = {name: loss * weight for name, loss in losses.items()}
                means = torch.stack([loss.detach() for loss in losses.values()])
                yield losses, all_reduce_mean(means)
