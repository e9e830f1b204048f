"""From splits to batches: which images a step sees, and their views, as pure functions of (seed, step, position).

A batch is {"labelled": (images, targets), "weak": (images, targets), "strong": (images, targets)}. The same step
always gives the same batch, whatever the number of worker processes and wherever a run was resumed. All images of a
step come from one shape group (square, wide or tall), so that little or nothing is padded.
"""

from dataclasses import replace

import numpy as np
import torch

from semidetr_lite.data.splits import Dataset, Splits
from semidetr_lite.data.views import ViewSettings, labelled_view, strong_view, weak_view

LABELLED, WEAK, STRONG, ORDER, GROUPS = range(5)  # separate streams of random numbers


class Sampler:
    """Endless reshuffled passes over the images of each shape group.

    Args:
        sizes: (H, W) of every image.
        batch: images a step.
        seed: of the shuffles.
    """

    def __init__(self, sizes: list[tuple[int, int]], batch: int, seed: int):
        self.batch, self.seed = batch, seed
        self.groups: dict[int, np.ndarray] = {}
        shapes = np.array([int(np.sign(width - height)) for height, width in sizes])
        for shape in np.unique(shapes):
            self.groups[int(shape)] = np.nonzero(shapes == shape)[0]

    def draw(self, shape: int, turn: int) -> list[int]:
        """The indices of the turn-th batch of a shape group (all images if the group is unknown here)."""
        pool = self.groups.get(shape)
        if pool is None:
            pool = np.concatenate(list(self.groups.values()))
        places = np.arange(turn * self.batch, (turn + 1) * self.batch)
        passes = {
            int(p): np.random.default_rng([self.seed, ORDER, shape + 1, int(p)]).permutation(pool)
            for p in set(places // len(pool))
        }
        return [int(passes[int(place // len(pool))][place % len(pool)]) for place in places]


class Batches(torch.utils.data.Dataset):
    """`batches[step]` is the batch of a step.

    Args:
        splits: where the images come from.
        labelled, unlabelled: images of each kind a step; `unlabelled` may be 0, as for supervised training.
        views: how far the views may go; mirrored only where the data allow it too.
        seed: of everything random here.
    """

    cycle = 100  # steps over which the shape groups appear in their exact proportions

    def __init__(self, splits: Splits, labelled: int, unlabelled: int, views: ViewSettings, seed: int):
        self.splits, self.seed = splits, seed
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
        batch = {
            "labelled": self._views(
                self.splits.labelled, self.labelled.draw(shape, turn), labelled_view, step, LABELLED
            )
        }
        if self.unlabelled is not None:
            chosen = self.unlabelled.draw(shape, turn)
            batch["weak"] = self._views(self.splits.unlabelled, chosen, weak_view, step, WEAK)
            batch["strong"] = self._views(self.splits.unlabelled, chosen, strong_view, step, STRONG)
        return batch

    def _views(
        self, dataset: Dataset, indices: list[int], view, step: int, stream: int
    ) -> tuple[list[torch.Tensor], list[dict]]:
        made = []
        for position, index in enumerate(indices):
            image, target = dataset[index]
            made.append(view(image, target, np.random.default_rng([self.seed, stream, step, position]), self.views))
        return [image for image, _ in made], [target for _, target in made]
