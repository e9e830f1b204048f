"""Contrastive denoising (DINO, section 3.3): extra queries with known targets.

They are decoded beside the matching queries. Every target box gives several pairs of them. The
positive query is the box, slightly shifted, with a label that may be wrong; its target is the box.
The negative query is shifted further; its target is "no object". The queries form groups that do
not see each other and that the matching queries do not see.

Shapes: B images, T targets, N denoising queries, D channels.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from semidetr_lite.detectors.transformer import QueryGroup
from semidetr_lite.device import to_device


class DenoisingTargets(NamedTuple):
    """What denoising queries are trained towards."""

    assigned: torch.Tensor  # (B, N) index of the target; -1 for a negative query and for padding
    valid: torch.Tensor  # (B, N) bool, False in the padding


def group_mask(sizes: list[int], queries: int) -> torch.Tensor:
    """The attention mask of denoising groups: (N, N) bool, True = blocked.

    The groups come first, then the matching queries. A group sees itself and the matching queries;
    the matching queries see only themselves.

    Args:
        sizes: the number of queries of each group.
        queries: the number of matching queries.
    """
    total = sum(sizes)
    blocked = torch.zeros(total + queries, total + queries, dtype=torch.bool)
    blocked[:, :total] = True
    start = 0
    for size in sizes:
        blocked[start : start + size, start : start + size] = False
        start += size
    return blocked


class Denoising(nn.Module):
    """Makes denoising queries from target boxes; its label embeddings are trained.

    Args:
        num_classes, dim: C and D of the detector.
        queries: about how many positive queries an image gets: there are
            max(1, queries // T) groups, T being the most targets of an image.
        label_noise: probability that a query has a random label (released code: 0.5 x 0.5).
        box_noise: the largest shift of a positive corner, as a fraction of half the box's side;
            negative corners shift by one to two times that.
        max_targets: of an image with more targets, so many are drawn and the others get no
            denoising query. It bounds the memory; no image of COCO has as many.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        queries: int = 100,
        label_noise: float = 0.25,
        box_noise: float = 0.4,
        max_targets: int = 500,
    ):
        super().__init__()
        self.labels = nn.Embedding(num_classes + 1, dim)  # the last row is that of the padding
        self.queries, self.label_noise, self.box_noise = queries, label_noise, box_noise
        self.max_targets = max_targets

    def num_copies(self, max_targets: int) -> int:
        """The groups, and so the positive queries of a box, where an image has T boxes at most."""
        return max(1, self.queries // min(max_targets, self.max_targets)) if max_targets else 0

    def forward(
        self,
        boxes: torch.Tensor,
        labels: torch.Tensor,
        valid: torch.Tensor,
        generators: list[np.random.Generator],
    ) -> tuple[QueryGroup, DenoisingTargets] | None:
        """The denoising queries of a batch and their targets, or None if T is 0.

        Args:
            boxes, labels, valid: (B, T, 4) cxcywh in [0, 1], (B, T), (B, T) bool.
            generators: of random numbers, one per image.
        """
        batch, max_targets = labels.shape
        if max_targets == 0:
            return None
        index = torch.arange(max_targets, device=boxes.device).expand(batch, -1)  # (B, T)
        if max_targets > self.max_targets:
            max_targets = self.max_targets
            drawn_targets = draw_targets(valid, max_targets, generators)
            index = to_device(torch.from_numpy(drawn_targets), boxes.device)
            boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
            labels, valid = labels.gather(1, index), valid.gather(1, index)
        groups = self.num_copies(max_targets)
        layout = (batch, groups, 2, max_targets)  # of N: group, positive or negative, target
        drawn = np.stack([rng.random((*layout[1:], 10), dtype=np.float32) for rng in generators])
        noise = to_device(torch.from_numpy(drawn), boxes.device)  # uniform in [0, 1)
        boxes = boxes[:, None, None].expand(*layout, 4)
        labels = labels[:, None, None].expand(layout)
        valid = valid[:, None, None].expand(layout)
        negative = torch.arange(2, device=boxes.device).bool().view(1, 1, 2, 1).expand(layout)
        noised_boxes = noise_boxes(boxes, negative, self.box_noise, noise[..., :8])
        num_classes = self.labels.num_embeddings - 1
        random_labels = (noise[..., 9] * num_classes).long().clamp(max=num_classes - 1)
        labels = torch.where(noise[..., 8] < self.label_noise, random_labels, labels)
        labels = torch.where(valid, labels, num_classes)
        index = index[:, None, None].expand(layout)
        assigned = torch.where(valid & ~negative, index, -1)
        targets = DenoisingTargets(assigned.flatten(1), valid.flatten(1))
        content = self.labels(labels.flatten(1))
        return QueryGroup(content, noised_boxes.flatten(1, 3), groups, targets.valid), targets

    def of_parts(
        self,
        boxes: torch.Tensor,
        labels: torch.Tensor,
        valid: torch.Tensor,
        generators: list[np.random.Generator],
        parts: list[tuple[slice, int]],
    ) -> tuple[QueryGroup, DenoisingTargets]:
        """The denoising queries of a batch whose parts have numbers of copies of their own.

        Args:
            boxes, labels, valid, generators: see forward.
            parts: the images of each part, in a row, and its most targets of an image.
        """
        made = []
        for images, most in parts:
            targets = (entry[images, :most] for entry in (boxes, labels, valid))
            queries = self(*targets, generators[images])
            made.append(queries or self._no_queries(labels[images]))
        return made[0] if len(made) == 1 else _join(made)

    def _no_queries(self, labels: torch.Tensor) -> tuple[QueryGroup, DenoisingTargets]:
        """What there is for images (B, T) without a box: no query."""
        none = labels[:, :0]
        content = self.labels(none)  # (B, 0, D)
        targets = DenoisingTargets(none, none.bool())
        return QueryGroup(content, content.new_zeros(len(none), 0, 4), 1, targets.valid), targets


def _join(
    parts: list[tuple[QueryGroup, DenoisingTargets]],
) -> tuple[QueryGroup, DenoisingTargets]:
    """The queries of several parts of a batch, padded to the longest, as those of the batch."""
    longest = max(group.valid.shape[1] for group, _ in parts)
    contents, boxes, valid, assigned, blocks = [], [], [], [], []
    for group, targets in parts:
        missing = longest - group.valid.shape[1]
        contents.append(F.pad(group.content, (0, 0, 0, missing), value=0.5))
        boxes.append(F.pad(group.boxes, (0, 0, 0, missing), value=0.5))
        valid.append(F.pad(group.valid, (0, missing)))
        assigned.append(F.pad(targets.assigned, (0, missing), value=-1))
        padding = (missing,) if missing else ()
        blocks += [sizes + padding for sizes in group.block_sizes()]
    targets = DenoisingTargets(torch.cat(assigned), torch.cat(valid))
    group = QueryGroup(torch.cat(contents), torch.cat(boxes), 1, targets.valid, tuple(blocks))
    return group, targets


def draw_targets(
    valid: torch.Tensor, number: int, generators: list[np.random.Generator]
) -> np.ndarray:
    """Indices (B, number) of targets drawn at random, the valid ones of each image first.

    Args:
        valid: (B, T) bool, with T > number.
        number: how many targets of an image.
        generators: of random numbers, one per image.
    """
    order = np.stack([rng.permutation(valid.shape[1]) for rng in generators])
    of_order = np.take_along_axis(valid.cpu().numpy(), order, axis=1)
    first = np.argsort(~of_order, axis=1, kind="stable")[:, :number]
    return np.take_along_axis(order, first, axis=1)


def noise_boxes(
    boxes: torch.Tensor, negative: torch.Tensor, amount: float, noise: torch.Tensor
) -> torch.Tensor:
    """Boxes with both corners shifted at random, clamped to the image: (..., 4) cxcywh in [0, 1].

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
        negative: (...) bool. The corners of these shift by `amount` to twice `amount`, in half
            sides of the box; all others by up to `amount`.
        amount: see above.
        noise: (..., 8) uniform in [0, 1): how far each of the four coordinates shifts, and in which
            direction.
    """
    half = boxes[..., 2:] / 2
    corners = torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)
    direction = torch.where(noise[..., 4:] < 0.5, -1.0, 1.0)
    shift = (noise[..., :4] + negative[..., None]) * direction
    corners = (corners + shift * amount * torch.cat([half, half], -1)).clamp(0, 1)
    first = torch.minimum(corners[..., :2], corners[..., 2:])
    second = torch.maximum(corners[..., :2], corners[..., 2:])
    return torch.cat([(first + second) / 2, second - first], -1)
