"""From splits to batches: which images a step sees, and their views, as pure functions of (seed, step, position).

A batch is {"labelled": (images, targets), "weak": (images, targets), "strong": (images, targets)}. The same step
always gives the same batch, whatever the number of worker processes and wherever a run was resumed. All images of a
step come from one shape group (square, wide or tall), so that little or nothing is padded. Of several processes each
loads its share of the step; "position" in a target is the image's place in the whole of it.

An unlabelled image that cannot be read is replaced by another one of its shape group, drawn by (seed, step, position)
like everything else, and counted on stderr; a labelled one ends the run with its name, unless told otherwise.
"""

import sys
from dataclasses import replace

import numpy as np
import torch

from semidetr_lite import distributed
from semidetr_lite.data.splits import Dataset, Splits
from semidetr_lite.data.views import ViewSettings, labelled_view, strong_view, weak_view
from semidetr_lite.errors import UserError

LABELLED, WEAK, STRONG, ORDER, GROUPS, SPARE = range(6)  # separate streams of random numbers
TRIES = 20  # images tried for one that can be read


class Sampler:
    """Endless reshuffled passes over the images of each shape group.

    Args:
        sizes: (H, W) of every image; (0, 0), for one that cannot be read, is in no group.
        batch: images a step.
        seed: of the shuffles.
    """

    def __init__(self, sizes: list[tuple[int, int]], batch: int, seed: int):
        self.batch, self.seed = batch, seed
        heights, widths = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
        shapes, known = np.sign(widths - heights), heights > 0
        self.groups = {shape: np.flatnonzero((shapes == shape) & known) for shape in np.unique(shapes[known]).tolist()}

    def pool(self, shape: int) -> np.ndarray:
        """The indices of a shape group; of all images if the group is unknown here."""
        return self.groups[shape] if shape in self.groups else np.concatenate(list(self.groups.values()))

    def draw(self, shape: int, turn: int) -> list[int]:
        """The indices of the turn-th batch of a shape group."""
        pool = self.pool(shape)
        places = np.arange(turn * self.batch, (turn + 1) * self.batch)
        drawn = []
        for number in np.unique(places // len(pool)).tolist():
            order = np.random.default_rng([self.seed, ORDER, shape + 1, number]).permutation(pool)
            drawn += order[places[places // len(pool) == number] % len(pool)].tolist()
        return drawn


class Batches(torch.utils.data.Dataset):
    """`batches[step]` is the batch of a step, or this process's share of it.

    Args:
        splits: where the images come from.
        labelled, unlabelled: images of each kind a step, in all processes together; `unlabelled` may be 0, as for
            supervised training.
        views: how far the views may go; mirrored only where the data allow it too.
        seed: of everything random here.
        skip_unreadable: whether a labelled image that cannot be read is replaced too, and not a UserError.
    """

    cycle = 100  # steps over which the shape groups appear in their exact proportions

    def __init__(
        self, splits: Splits, labelled: int, unlabelled: int, views: ViewSettings, seed: int, skip_unreadable=False
    ):
        if unlabelled and not len(splits.unlabelled):
            raise UserError("no unlabelled image: give a folder of them (--unlabelled), or label less than 100 percent")
        if distributed.world_size() > min(labelled, unlabelled or labelled):
            raise UserError(f"{distributed.world_size()} processes for {labelled} labelled images a step: start fewer")
        self.shares = {LABELLED: distributed.shard(labelled), WEAK: distributed.shard(unlabelled)}
        self.splits, self.seed = splits, seed
        self.skip_unreadable, self.skipped = skip_unreadable, set()
        self.views = replace(views, flip=views.flip and splits.flip)
        self.labelled = Sampler(splits.labelled.sizes, labelled, seed)
        self.unlabelled = Sampler(splits.unlabelled.sizes, unlabelled, seed + 1) if unlabelled else None
        sizes = [*splits.labelled.sizes, *splits.unlabelled.sizes]  # both, so that every method sees the same schedule
        everything = Sampler(sizes, 1, seed).groups
        count = sum(len(pool) for pool in everything.values())
        self.schedule = [
            shape for shape, pool in everything.items() for _ in range(max(1, round(self.cycle * len(pool) / count)))
        ]

    def shape_and_turn(self, step: int) -> tuple[int, int]:
        """The shape group of a step, and how many steps before it had the same."""
        cycle, place = divmod(step, len(self.schedule))
        order = np.random.default_rng([self.seed, GROUPS, cycle]).permutation(self.schedule)
        shape = int(order[place])
        return shape, cycle * self.schedule.count(shape) + int((order[:place] == shape).sum())

    def __getitem__(self, step: int) -> dict:
        shape, turn = self.shape_and_turn(step)
        chosen = self._read(self.splits.labelled, self.labelled, shape, turn, step, LABELLED)
        batch = {"labelled": self._views(chosen, labelled_view, step, LABELLED)}
        if self.unlabelled is not None:
            chosen = self._read(self.splits.unlabelled, self.unlabelled, shape, turn, step, WEAK)  # once for both views
            batch["weak"] = self._views(chosen, weak_view, step, WEAK)
            batch["strong"] = self._views(chosen, strong_view, step, STRONG)
        return batch

    def _read(self, dataset: Dataset, sampler: Sampler, shape: int, turn: int, step: int, stream: int) -> list[tuple]:
        """The images and targets of a step, those that cannot be read replaced."""
        read, drawn = [], sampler.draw(shape, turn)
        for position in self.shares[stream]:
            index = drawn[position]
            for attempt in range(TRIES):
                try:
                    read.append(dataset[index])
                    break
                except UserError as problem:
                    if attempt == TRIES - 1 or (stream == LABELLED and not self.skip_unreadable):
                        raise
                    self._count(str(problem))
                    rng = np.random.default_rng([self.seed, SPARE, stream, step, position, attempt])
                    index = int(rng.choice(sampler.pool(shape)))
        return read

    def _count(self, problem: str) -> None:
        """Say on stderr what is skipped: the first, the second, the fourth, the eighth ... image of this process."""
        known = len(self.skipped)
        self.skipped.add(problem)
        if len(self.skipped) > known and known & (known + 1) == 0:
            count = f"{known + 1} unreadable {'image' if known == 0 else 'images'} skipped so far"
            print(f"warning: {count} by this process, the last: {problem}", file=sys.stderr)

    def _views(self, read: list[tuple], view, step: int, stream: int) -> tuple[list[torch.Tensor], list[dict]]:
        made = []
        for position, (image, target) in zip(self.shares[LABELLED if stream == LABELLED else WEAK], read, strict=True):
            made.append(view(image, target, np.random.default_rng([self.seed, stream, step, position]), self.views))
            made[-1][1]["position"] = position
        return [image for image, _ in made], [target for _, target in made]
