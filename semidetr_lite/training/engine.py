"""How a step is run, whatever the method: in parts, in several processes, and within the memory of the device.

None of this changes what is learned. With parts and processes the losses stay those of the whole step (see `Count` in
losses.py): exactly for one-to-one matching and denoising; for one-to-many matching and consistency each part, over all
processes, is divided by its own.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.parallel import DistributedDataParallel

from semidetr_lite.distributed import mean, world
from semidetr_lite.errors import UserError
from semidetr_lite.methods.mean_teacher import Averaged
from semidetr_lite.training.presets import Recipe


def micro_batches(batch: dict, parts: int) -> list[dict]:
    """A batch in `parts` of equal size (or one less), the mix of labelled and unlabelled images kept in each."""
    cut = {}
    for name, (images, targets) in batch.items():
        if len(images) < parts:
            raise UserError(f"{len(images)} {name} images a step cannot be run in {parts} parts; lower accumulate")
        edges = [len(images) * part // parts for part in range(parts + 1)]
        cut[name] = [(images[a:b], targets[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    return [{name: pieces[part] for name, pieces in cut.items()} for part in range(parts)]


class Engine:
    """Runs the steps of a method that lies on its device already.

    Args:
        method: what to train.
        recipe: its precision, checkpointing, channels_last, compile and accumulate; the parts are shared among the
            processes, one each if there are no fewer processes than parts.
    """

    def __init__(self, method: Averaged, recipe: Recipe):
        self.method, self.recipe = method, recipe
        self.parts = -(-recipe.accumulate // world())
        self.wrapped = method
        if world() > 1:  # broadcasts the weights of the first process; buffers are the same in all of them anyway
            self.wrapped = DistributedDataParallel(method, broadcast_buffers=False, find_unused_parameters=True)

    def losses(self, batch: dict, step: int) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, float]]]:
        """For each part of a step its losses, to be propagated back before the next, and their means over processes."""
        parts = micro_batches(batch, self.parts)
        if len(parts) > 1:
            parts = self.method.look_ahead(parts, step)
        share = 1 / len(parts)
        while parts:
            waits = contextlib.nullcontext() if len(parts) == 1 or world() == 1 else self.wrapped.no_sync()
            with waits:
                losses = {name: loss * share for name, loss in self.wrapped(parts.pop(0), step).items()}
                values = mean(torch.stack([loss.detach() for loss in losses.values()])).tolist()
                yield losses, dict(zip(losses, values, strict=True))
