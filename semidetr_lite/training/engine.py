"""How a step is run, whatever the method: in parts, in several processes, and within the memory of the device.

None of this changes what is learned. With parts and processes the losses stay those of the whole step (see `NumBoxes`
in losses.py): exactly for one-to-one matching and denoising; for one-to-many matching and consistency each part, over
all processes, is divided by its own. The detectors of the baselines divide theirs in each part and process, and what
Faster R-CNN samples depends on the images beside. In bfloat16 are the backbone and the insides of encoder and decoder
layers, but not where attention looks; heads, boxes, matching and losses are float32.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.transformer import Memory
from semidetr_lite.distributed import all_reduce_mean, shard, world_size
from semidetr_lite.errors import UserError
from semidetr_lite.methods.mean_teacher import MeanTeacher, PseudoLabels, TeacherStudent
from semidetr_lite.training.presets import Recipe


def check_parts(kind: str, images: int, parts: int) -> None:
    """Raises UserError where a step has fewer images of a kind than parts."""
    if images < parts:
        raise UserError(f"{images} {kind} images a step cannot be run in {parts} parts; lower accumulate")


def micro_batches(batch: dict, parts: int) -> list[dict]:
    """A batch in `parts` of equal size (or one less), the mix of labelled and unlabelled images kept in each."""
    cut = {}
    for name, (images, targets) in batch.items():
        check_parts(name, len(images), parts)
        edges = [len(images) * part // parts for part in range(parts + 1)]
        cut[name] = [(images[a:b], targets[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    return [{name: pieces[part] for name, pieces in cut.items()} for part in range(parts)]


PRECISIONS = ("auto", "float32", "tf32", "bfloat16")
HOW = ("accumulate", "precision", "checkpointing", "channels_last", "compile")  # of a recipe; a resumed run may change


def choose_precision(precision: str, device: torch.device) -> str:
    """What "auto" means on a device: bfloat16 on a GPU that has it, else float32; every other name as it is.

    Raises UserError for a precision that there is not.
    """
    if precision not in PRECISIONS:
        raise UserError(f"no precision called {precision!r}: choose from {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"


def prepare(detector: Detector, recipe: Recipe, precision: str, trained: bool) -> None:
    """Make a detector run as the recipe says; its weights and their names stay as they are."""
    backbone = detector.backbone
    if recipe.channels_last:
        backbone.to(memory_format=torch.channels_last)
    stages = getattr(backbone, "stages", getattr(backbone, "layers", ()))
    layers = (*stages, *getattr(detector, "encoder", ()), *getattr(detector, "decoder", ()))
    for module in layers:
        run = module.forward
        run = torch.compile(run) if recipe.compile else run
        run = in_bfloat16(run) if precision == "bfloat16" else run
        module.forward = rerun(run) if recipe.checkpointing and trained else run
    if precision == "bfloat16":
        detector._project = in_bfloat16(detector._project)


def in_bfloat16(function):
    """The function under autocast; where it returns a list of maps, they come back as float32."""

    @functools.wraps(function)
    def run(x, *others):
        device = (x.tokens if isinstance(x, Memory) else x).device.type
        with torch.autocast(device, torch.bfloat16):
            found = function(x, *others)
        return [level.float() for level in found] if isinstance(found, list) else found

    return run


def rerun(function):
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
        recipe: its precision, checkpointing, channels_last, compile and accumulate; the parts are shared among the
            processes, one each if there are no fewer processes than parts.

    Raises UserError for a precision that there is not.
    """

    def __init__(self, method: TeacherStudent, recipe: Recipe):
        self.method, self.recipe, self.device = method, recipe, next(method.parameters()).device
        self.precision = choose_precision(recipe.precision, self.device)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.precision != "float32"
        prepare(method.student, recipe, self.precision, True)
        prepare(method.teacher, recipe, self.precision, False)
        self.parts, self.wrapped = recipe.accumulate, method
        processes = world_size()
        if processes > 1:  # all start from the weights of the first; buffers are the same in all of them anyway
            self.parts = min(-(-recipe.accumulate // processes), recipe.labelled_images // processes)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers gets another name
                self.wrapped = DistributedDataParallel(method, broadcast_buffers=False, find_unused_parameters=True)

    def losses(self, batch: dict, step: int) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """For each part of a step its losses, to be propagated back before the next, and their means over processes:
        (losses,) in the same order, on the device.
        """
        parts = micro_batches(batch, self.parts)
        weight = 1 / len(parts)
        prepared = self.method.prepare(parts, step) if len(parts) > 1 else [None]
        while parts:  # a part that is done with is dropped
            reduces = len(parts) == 1 or world_size() == 1  # gradients, after the last part
            with contextlib.nullcontext() if reduces else self.wrapped.no_sync():
                losses = self.wrapped(parts.pop(0), step, prepared.pop(0))
                losses = {name: loss * weight for name, loss in losses.items()}
                means = torch.stack([loss.detach() for loss in losses.values()])
                yield losses, all_reduce_mean(means)

    def rehearse(self, size: tuple[int, int], labelled: int, unlabelled: int, most: int = 100) -> None:
        """Run the dearest steps there can be, in each stage, and change nothing: no memory is wanted later than now.

        Args:
            size: (H, W) of the largest image.
            labelled, unlabelled: images a step, in all processes.
            most: objects in each image, labelled or not.
        """
        method = self.method
        kept = {name: value.clone() for name, value in method.named_buffers(recurse=False)}
        places = torch.tensor([0.1, 0.1, 0.6, 0.6]) + torch.linspace(0, 0.3, most)[:, None]
        boxes = places * torch.tensor(size).flip(0).repeat(2)
        target = {"size": size, "matrix": torch.eye(3)}
        full = {**target, "boxes": boxes, "labels": torch.arange(most) % method.student.num_classes}
        image = torch.zeros(3, *size, dtype=torch.uint8)
        ours, theirs = len(shard(labelled)), len(shard(unlabelled))
        batch = {"labelled": ([image] * ours, [full] * ours)}
        if theirs:
            batch |= dict.fromkeys(("weak", "strong"), ([image] * theirs, [target] * theirs))
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        state = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]  # as the optimizer will have
        if isinstance(method, MeanTeacher):
            method.predict_pseudo_labels = functools.partial(
                _all_confident, method.predict_pseudo_labels
            )
        try:
            for step in (0, 2**31):  # the last stage is that of the last step
                for losses, _ in self.losses(batch, step):
                    sum(losses.values()).backward()
                method.zero_grad(set_to_none=True)
        finally:
            method.__dict__.pop("predict_pseudo_labels", None)
            for name, value in kept.items():
                setattr(method, name, value)
            method.stats = {}
            del state

    def explain(self, problem: RuntimeError) -> None:
        """Raises UserError, which names the options to turn, if the problem is a want of memory."""
        if isinstance(problem, torch.OutOfMemoryError) or "allocate memory" in str(problem):
            ways = [f"raise --accumulate (now {self.recipe.accumulate})"]
            ways += ["add --checkpointing"] * (not self.recipe.checkpointing)
            ways += ["use --precision bfloat16"] * (self.precision != "bfloat16")
            raise UserError(f"out of memory in the largest steps: {', or '.join(ways)}") from None


def _all_confident(predict, micro_batch: dict, keep_teacher: bool) -> PseudoLabels:
    """A teacher's pseudo-labels, with a confident box in every column that there is."""
    labels = predict(micro_batch, keep_teacher)
    valid = torch.ones_like(labels.confident)
    weak = labels.weak._replace(scores=torch.ones_like(labels.weak.scores), valid=valid)
    strong = labels.strong._replace(valid=valid)
    return labels._replace(weak=weak, strong=strong, confident=valid, candidates=valid)
