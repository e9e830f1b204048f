"""What the losses of a step are divided by, into however many parts the step is cut.

The images of a step form normalizer groups: those that one GPU of the released code has, 1 labelled
and 4 unlabelled ones of the COCO recipe's 40 (8 groups). On the digits one group is the whole step.
With n the number of matched boxes (one-to-many: the sum of the soft targets, each layer by itself):

    class, one-to-one and denoising   mean over the groups of: sum of group / max(n of group, 1)
    class, one-to-many                sum of step / max(n of step, bound)
    L1 and GIoU                       sum of step / max(n of step, bound)

The released code divides by a mean over its GPUs which is at least 1, so its bound is the number of
GPUs (dino_detr_ssod_head.py:690, 725, 774), and it divides the class losses of one-to-one matching
and denoising on each GPU (lines 763-771, 839-846).

With "expected_objects" the bounds of the class losses on unlabelled images grow: n is at least what
labelled images lead one to expect, objects per labelled image times unlabelled images. Else few
pseudo-boxes mean that the background of all unlabelled images is divided by almost nothing, which
pushes the scores down, so that there are fewer pseudo-boxes still. Denoising queries exist for
boxes alone, so their class loss keeps its bound.

A step is cut into micro-batches and processes. The mean of their losses has to be the loss of the
step, so each divides by its share: the number above over the number of micro-batches of all
processes. A group may be cut, too.
"""

from typing import NamedTuple

import numpy as np
import torch

from semidetr_lite import distributed
from semidetr_lite.normalizer_settings import NormalizerSettings


class NumBoxes(NamedTuple):
    """Numbers of images and target boxes: of a step, or of one of its normalizer groups."""

    images: int
    matched: int  # pairs of one-to-one matching
    boxes: int
    max_per_image: int  # columns of padded targets that the image with the most needs


class Normalizers(NamedTuple):
    """What the losses on one kind of images are divided by, in one micro-batch of one process."""

    step: NumBoxes
    groups: list[NumBoxes]  # of every normalizer group of the step
    rows: dict[int, slice]  # the groups with images in this micro-batch: number -> their rows
    num_shards: int  # micro-batches of the step, in all processes
    bound: float = 1.0  # of the number of boxes of a step
    expected_per_image: float = 0.0  # objects in an image, the bound of its class losses
    # (L,) sums of the soft targets of one-to-many matching over the step; None where this
    # micro-batch is all that this process has of the step
    soft_targets: torch.Tensor | None = None

    def of_step(self, total: float) -> float:
        """The share of a loss that is divided by `total`, a number of the whole step."""
        return max(total, self.bound) / self.num_shards

    def of_group(self, total: float) -> float:
        """The share of a class loss that is divided by `total`, a number of one group."""
        return max(total, 1.0) * len(self.groups) / self.num_shards

    def classes_of_group(self, number: int) -> float:
        """The share of the class loss of one-to-one matching, of a group."""
        group = self.groups[number]
        return self.of_group(max(group.matched, self.expected_per_image * group.images))

    def soft(self, totals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The shares of class and box losses of one-to-many matching, (L,) each.

        totals: (L,) sums of the soft targets of this micro-batch.
        """
        if self.soft_targets is not None:
            totals = self.soft_targets
        else:
            totals = distributed.all_reduce_mean(totals) * distributed.world_size()
        class_bound = max(self.bound, self.expected_per_image * self.step.images)
        of_classes = totals.clamp(min=class_bound) / self.num_shards
        return of_classes, totals.clamp(min=self.bound) / self.num_shards

    def divide(self, totals: np.ndarray) -> list[tuple[slice, float]]:
        """Means per group: the rows of each group in this micro-batch, and the share to divide by.

        totals: (G,) a number of each group of the step.
        """
        return [(rows, self.of_group(float(totals[group]))) for group, rows in self.rows.items()]


def count_boxes(
    valid_masks: list[np.ndarray],
    num_queries: int,
    settings: NormalizerSettings = NormalizerSettings(),
    expected_per_image: float = 0.0,
) -> list[Normalizers]:
    """Count the targets of all micro-batches and processes.

    Args:
        valid_masks: `PaddedTargets.valid` (B, T) of each of this process's micro-batches, on the
            CPU.
        num_queries: Q, which limits the pairs of one-to-one matching.
        settings: groups and bound. A step of fewer images than groups has a group per image.
        expected_per_image: see Normalizers.

    Returns:
        The normalizers of each of these micro-batches.
    """
    own = [_count_images(valid, num_queries) for valid in valid_masks]
    gathered = distributed.all_gather(own)
    images = np.concatenate([counts for parts in gathered for counts in parts])  # (N, 3)
    num_groups = max(1, min(settings.normalizer_groups, len(images)))
    group_of = np.arange(len(images)) * num_groups // max(len(images), 1)
    groups = [_total(images[group_of == number]) for number in range(num_groups)]
    first = sum(len(counts) for parts in gathered[: distributed.rank()] for counts in parts)
    normalizers = []
    for counts in own:
        own_groups = group_of[first : first + len(counts)]
        first += len(counts)
        normalizers.append(
            Normalizers(
                _total(images),
                groups,
                rows=_rows(own_groups),
                num_shards=sum(map(len, gathered)),
                bound=settings.normalizer_bound,
                expected_per_image=expected_per_image,
            )
        )
    return normalizers


def _count_images(valid: np.ndarray, num_queries: int) -> np.ndarray:
    """(B, 3) of each image: pairs of one-to-one matching, boxes, the last column with a box."""
    boxes = valid.sum(1)
    columns = np.arange(1, valid.shape[1] + 1)
    last_column = (valid * columns).max(1, initial=0)
    return np.stack([np.minimum(boxes, num_queries), boxes, last_column], 1)


def _total(images: np.ndarray) -> NumBoxes:
    """The numbers of several images, from their rows (N, 3) of `_count_images`."""
    matched, boxes, _ = images.sum(0).tolist()
    return NumBoxes(len(images), matched, boxes, int(images[:, 2].max(initial=0)))


def _rows(groups: np.ndarray) -> dict[int, slice]:
    """Where each number stands in `groups`, which rise."""
    numbers, starts, counts = np.unique(groups, return_index=True, return_counts=True)
    entries = zip(numbers.tolist(), starts.tolist(), counts.tolist(), strict=True)
    return {number: slice(start, start + count) for number, start, count in entries}


def sum_per_group(normalizers: list[Normalizers], counts: list[np.ndarray]) -> np.ndarray:
    """The sums of a count of each image over the normalizer groups of the step: (G,).

    Args:
        normalizers: of each of this process's micro-batches.
        counts: (B,) of their images.
    """
    own = np.zeros(len(normalizers[0].groups))
    for parts, of_images in zip(normalizers, counts, strict=True):
        for number, rows in parts.rows.items():
            own[number] += of_images[rows].sum()
    return np.sum(distributed.all_gather(own), axis=0)
