"""From splits to batches: which images a step trains on, and their views.

A batch is {"labelled": (images, targets), "weak": (images, targets), "strong": (images, targets)}.
It is a pure function of (seed, step): the same for any number of worker processes, and the same in
a run that was resumed. All images of a step come from one shape group (square, wide or tall), so
that little or nothing is padded. Of several processes each loads its shard of the step; "position"
in a target is the index of the image in the whole step.

An unlabelled image that cannot be read is replaced by another one of its shape group, drawn by
(seed, step, position) like everything else, and counted on stderr. A labelled image that cannot be
read ends the run, unless `skip_unreadable` is set.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from semidetr_lite import distributed
from semidetr_lite.contracts import Batch, Views
from semidetr_lite.data.mixing import check_blocks, mix_views
from semidetr_lite.data.splits import Dataset, Splits
from semidetr_lite.data.views import ViewSettings, labelled_view, strong_view, weak_view
from semidetr_lite.errors import UserError

# separate streams of random numbers; the next is MIXING_STREAM of mixing.py
RNG_LABELLED, RNG_WEAK, RNG_STRONG, RNG_ORDER, RNG_SHAPES, RNG_REPLACEMENT = range(6)
MAX_ATTEMPTS = 20  # images tried for one that can be read


class Sampler:
    """Endless reshuffled passes over the images of each shape group.

    Args:
        sizes: (H, W) of every image; (0, 0), for one that cannot be read, is in no group.
        batch: images per step.
        seed: of the shuffles.

    Attributes:
        groups: {shape: indices of its images}; a shape is -1 (tall), 0 (square) or 1 (wide).
    """

    def __init__(self, sizes: list[tuple[int, int]], batch: int, seed: int):
        self.batch = batch
        self.seed = seed
        heights, widths = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
        shapes = np.sign(widths - heights)
        readable = heights > 0
        self.groups = {
            shape: np.flatnonzero((shapes == shape) & readable)
            for shape in np.unique(shapes[readable]).tolist()
        }

    def pool(self, shape: int) -> np.ndarray:
        """The indices of a shape group; of all images if no image has this shape."""
        if shape in self.groups:
            return self.groups[shape]
        return np.concatenate(list(self.groups.values()))

    def draw(self, shape: int, draw_index: int) -> list[int]:
        """The image indices of batch number `draw_index` (from 0) of a shape group."""
        pool = self.pool(shape)
        positions = np.arange(draw_index * self.batch, (draw_index + 1) * self.batch)
        pass_of = positions // len(pool)
        indices = []
        for number in np.unique(pass_of).tolist():
            rng = np.random.default_rng([self.seed, RNG_ORDER, shape + 1, number])
            order = rng.permutation(pool)
            indices += order[positions[pass_of == number] % len(pool)].tolist()
        return indices


class Batches(torch.utils.data.Dataset):
    """`batches[step]` is the batch of a step, or this process's shard of it.

    Args:
        splits: where the images come from.
        labelled: labelled images per step, in all processes together.
        unlabelled: unlabelled images per step; 0 for supervised training.
        views: how far the views may go. They are mirrored only where the data allow it too.
        seed: of everything random here.
        skip_unreadable: whether a labelled image that cannot be read is replaced too.

    Raises UserError where images are missing or there are more processes than images per step.
    """

    cycle = 100  # steps over which the shape groups appear in their exact proportions

    def __init__(
        self,
        splits: Splits,
        labelled: int,
        unlabelled: int,
        views: ViewSettings,
        seed: int,
        skip_unreadable: bool = False,
    ):
        if unlabelled and not len(splits.unlabelled):
            advice = "give a folder of them (--unlabelled), or label less than 100 percent"
            raise UserError(f"no unlabelled image: {advice}")
        processes = distributed.world_size()
        if processes > min(labelled, unlabelled or labelled):
            problem = f"{processes} processes for {labelled} labelled images a step"
            raise UserError(f"{problem}: start fewer")
        check_blocks(views.mixing, unlabelled, processes)
        self.labelled_shard = distributed.shard(labelled)
        self.unlabelled_shard = distributed.shard(unlabelled)
        self.splits = splits
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        self.skipped: set[str] = set()
        self.views = replace(views, flip=views.flip and splits.flip)
        self.labelled = Sampler(splits.labelled.sizes, labelled, seed)
        self.unlabelled = None
        if unlabelled:
            self.unlabelled = Sampler(splits.unlabelled.sizes, unlabelled, seed + 1)
        self.schedule = self._shape_schedule()

    def _shape_schedule(self) -> list[int]:
        """The shapes of one cycle of steps, from all images: every method has the same schedule."""
        sizes = [*self.splits.labelled.sizes, *self.splits.unlabelled.sizes]
        groups = Sampler(sizes, batch=1, seed=self.seed).groups
        count = sum(len(pool) for pool in groups.values())
        schedule = []
        for shape, pool in groups.items():
            schedule += [shape] * max(1, round(self.cycle * len(pool) / count))
        return schedule

    def shape_and_draw_index(self, step: int) -> tuple[int, int]:
        """The shape group of a step, and the number of steps before it that had the same."""
        cycle, position = divmod(step, len(self.schedule))
        order = np.random.default_rng([self.seed, RNG_SHAPES, cycle]).permutation(self.schedule)
        shape = int(order[position])
        in_this_cycle = int((order[:position] == shape).sum())
        return shape, cycle * self.schedule.count(shape) + in_this_cycle

    def __getitem__(self, step: int) -> Batch:
        shape, draw_index = self.shape_and_draw_index(step)
        indices = self.labelled.draw(shape, draw_index)
        scenes = self._read(RNG_LABELLED, self.labelled, indices, shape, step)
        batch: Batch = {"labelled": self._views(scenes, labelled_view, step, RNG_LABELLED)}
        if self.unlabelled is not None:
            indices = self.unlabelled.draw(shape, draw_index)
            # once for both views
            scenes = self._read(RNG_WEAK, self.unlabelled, indices, shape, step)
            batch["weak"] = self._views(scenes, weak_view, step, RNG_WEAK)
            strong = zip(*self._views(scenes, strong_view, step, RNG_STRONG), strict=True)
            shard = self.unlabelled_shard
            mixed = mix_views(list(strong), shard, self.seed, step, self.views)
            batch["strong"] = ([image for image, _ in mixed], [target for _, target in mixed])
        return batch

    def _read(
        self, stream: int, sampler: Sampler, indices: list[int], shape: int, step: int
    ) -> list[tuple]:
        """This process's images and targets of a step; those that cannot be read are replaced.

        Args:
            stream: RNG_LABELLED or RNG_WEAK: which of the two data sets to read.
            sampler: of that data set, which draws replacements.
            indices: of the images of the whole step.
            shape: their shape group.
            step: the step.
        """
        labelled = stream == RNG_LABELLED
        dataset: Dataset = self.splits.labelled if labelled else self.splits.unlabelled
        may_skip = not labelled or self.skip_unreadable
        scenes = []
        for position in self._shard(stream):
            index = indices[position]
            for attempt in range(MAX_ATTEMPTS):
                try:
                    scenes.append(dataset[index])
                    break
                except UserError as problem:
                    if not may_skip:
                        advice = "--skip-unreadable (also with --resume) goes on without it"
                        raise UserError(f"{problem}; {advice}") from problem
                    if attempt == MAX_ATTEMPTS - 1:
                        raise
                    self._warn_about_skipped(str(problem))
                    key = [self.seed, RNG_REPLACEMENT, stream, step, position, attempt]
                    index = int(np.random.default_rng(key).choice(sampler.pool(shape)))
        return scenes

    def _shard(self, stream: int) -> range:
        return self.labelled_shard if stream == RNG_LABELLED else self.unlabelled_shard

    def _warn_about_skipped(self, problem: str) -> None:
        """One line on stderr for the first, second, fourth, eighth ...

        image that this process skips.
        """
        before = len(self.skipped)
        self.skipped.add(problem)
        is_power_of_two = before & (before + 1) == 0  # of the new count, before + 1
        if len(self.skipped) > before and is_power_of_two:
            count = f"{before + 1} unreadable {'image' if before == 0 else 'images'}"
            message = f"{count} skipped so far by this process, the last: {problem}"
            print(f"warning: {message}", file=sys.stderr)

    def _views(self, scenes: list[tuple], view: Callable, step: int, stream: int) -> Views:
        """(images, targets) of a view of this process's images."""
        images = []
        targets = []
        for position, (image, target) in zip(self._shard(stream), scenes, strict=True):
            rng = np.random.default_rng([self.seed, stream, step, position])
            image, target = view(image, target, rng, self.views)
            target["position"] = position
            images.append(image)
            targets.append(target)
        return images, targets
