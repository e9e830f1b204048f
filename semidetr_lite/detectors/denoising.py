"""Contrastive denoising (DINO, section 3.3): easy questions whose answers are known, beside the matching queries.

Every true box is asked for several times: once lightly shifted, with a label that may be wrong (answer: the box), and
once shifted further (answer: nothing here). The questions form groups that neither see each
other nor are seen by the matching queries.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from semidetr_lite.detectors.transformer import QueryGroup
from semidetr_lite.device import to_device


class Answers(NamedTuple):
    """What a denoising group should say."""

    targets: torch.Tensor  # (B, N) index of the target asked for, -1 where the answer is "nothing"
    valid: torch.Tensor  # (B, N) bool, False = filled up to the longest image


def group_mask(sizes: list[int], queries: int) -> torch.Tensor:
    """Who may not see whom: (N, N) bool, True = blocked, the groups first, then the matching queries.

    A group copy sees itself and the matching queries; the matching queries see only themselves.
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
    """Makes denoising groups.

    Args:
        num_classes, dim: C and D of the detector.
        queries: about how many positive questions an image gets; copies = max(1, queries // most targets of an image).
        label_noise: chance that a question carries a random label (released code: 0.5 x 0.5).
        box_noise: largest shift of a corner, as a share of half the box's side, for positives; negatives shift by one
            to two times that.
    """

    def __init__(
        self, num_classes: int, dim: int, queries: int = 100, label_noise: float = 0.25, box_noise: float = 0.4
    ):
        super().__init__()
        self.labels = nn.Embedding(num_classes + 1, dim)  # the last row fills up
        self.queries, self.label_noise, self.box_noise = queries, label_noise, box_noise

    def forward(self, boxes, labels, valid, rngs: list[np.random.Generator]) -> tuple[QueryGroup, Answers] | None:
        """The questions for a batch, or None if it holds no box.

        Args:
            boxes, labels, valid: (B, T, 4) cxcywh in [0, 1], (B, T), (B, T) bool.
            rngs: a generator for each of the B images.
        """
        batch, most = labels.shape
        if most == 0:
            return None
        copies = max(1, self.queries // most)
        # (B, copies, positive | negative, T) -> (B, N)
        layout = (batch, copies, 2, most)
        chance = np.stack([rng.random((*layout[1:], 10), dtype=np.float32) for rng in rngs])
        chance = to_device(torch.from_numpy(chance), boxes.device)
        entries = (boxes, labels, valid)
        boxes, labels, valid = (entry[:, None, None].expand(*layout, *entry.shape[2:]) for entry in entries)
        negative = torch.arange(2, device=boxes.device).bool().view(1, 1, 2, 1).expand(layout)
        noised = noise_boxes(boxes, negative, self.box_noise, chance[..., :8])
        classes = self.labels.num_embeddings - 1
        random = (chance[..., 9] * classes).long().clamp(max=classes - 1)
        labels = torch.where(chance[..., 8] < self.label_noise, random, labels)
        labels = torch.where(valid, labels, classes)
        index = torch.arange(most, device=boxes.device).expand(layout)
        answers = Answers(torch.where(valid & ~negative, index, -1).flatten(1), valid.flatten(1))
        return QueryGroup(self.labels(labels.flatten(1)), noised.flatten(1, 3), copies, answers.valid), answers


def noise_boxes(boxes: torch.Tensor, negative: torch.Tensor, amount: float, chance: torch.Tensor) -> torch.Tensor:
    """Shift both corners of cxcywh boxes (..., 4) by up to `amount` half sides; by `amount` to twice that where
    `negative` (...).

    `chance` (..., 8) is uniform in [0, 1): how far each of the four coordinates moves, and in which direction.
    """
    half = boxes[..., 2:] / 2
    corners = torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)
    shift = (chance[..., :4] + negative[..., None]) * torch.where(chance[..., 4:] < 0.5, -1.0, 1.0)
    corners = (corners + shift * amount * torch.cat([half, half], -1)).clamp(0, 1)
    first, second = torch.minimum(corners[..., :2], corners[..., 2:]), torch.maximum(corners[..., :2], corners[..., 2:])
    return torch.cat([(first + second) / 2, second - first], -1)
