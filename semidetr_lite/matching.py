"""Which query answers for which object: one-to-one (Hungarian) and one-to-many (task-aligned).

They are the two stages of Semi-DETR. Both return pairs. One-to-one: each target gets the one query that makes the
total cost smallest. One-to-many (paper section 3.2; released code: o2m_assigner.py): each target takes the
`candidates` queries of highest

    m(q, t) = score(q, label_t)^alpha * IoU(q, t)^beta,

a query wanted by several targets goes to the one it overlaps most, and the pair's soft class target is m scaled so
that the best query of a target gets the best IoU of that target's queries.

The functions for one image are thin wrappers around the batched ones, which take any leading dimensions (layers,
images) and padded targets.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from semidetr_lite.boxes import pairwise_overlaps, to_model
from semidetr_lite.device import to_device


class Match(NamedTuple):
    """Pairs of one image."""

    queries: torch.Tensor  # (N,) int64
    targets: torch.Tensor  # (N,) int64
    quality: torch.Tensor  # (N,) soft class target; 1 for one-to-one


class PaddedTargets(NamedTuple):
    """The targets of a batch in model coordinates, filled up to the image with most."""

    boxes: torch.Tensor  # (B, T, 4) cxcywh in [0, 1]
    labels: torch.Tensor  # (B, T) int64, 0 where filled up
    valid: torch.Tensor  # (B, T) bool


def pad_targets(targets: list[dict], device=None) -> PaddedTargets:
    """Target dicts (xyxy pixels) -> PaddedTargets. Crowd regions stand for many objects and are nobody's target."""
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "size": (1, 1)}
    rows = []
    for target in targets or [nothing]:
        keep = ~target["crowd"] if "crowd" in target else slice(None)
        boxes, labels = to_model(target["boxes"].float(), target["size"])[keep], target["labels"][keep]
        rows.append((boxes, labels, torch.ones_like(labels, dtype=torch.bool)))
    padded = (pad_sequence(entries, batch_first=True)[: len(targets)] for entries in zip(*rows, strict=True))
    return PaddedTargets(*(to_device(entry, device) for entry in padded))


# ---- one image, as a learner reads it --------------------------------------------------------------------------------


def matching_cost(
    logits, pred_boxes, target, class_cost="focal", class_weight=2.0, l1_weight=5.0, giou_weight=2.0
) -> torch.Tensor:
    """The price of every (query, target) pair.

    Args:
        logits, pred_boxes: (Q, C) and (Q, 4) cxcywh in [0, 1].
        target: "boxes" (T, 4) xyxy pixels, "labels" (T,), "size".
        class_cost: "focal" (sigmoid scores, Deformable DETR and DINO) or "softmax" (DETR).

    Returns:
        (Q, T) class_weight * class cost + l1_weight * L1 of cxcywh - giou_weight * GIoU; may be negative. ValueError
        for another class_cost.
    """
    if class_cost not in ("focal", "softmax"):
        raise ValueError(f"class_cost must be 'focal' or 'softmax', got {class_cost!r}")
    boxes = to_model(target["boxes"].float(), target["size"]).to(pred_boxes.device)
    labels = target["labels"].to(logits.device)
    return batched_cost(logits, pred_boxes, boxes, labels, class_cost, class_weight, l1_weight, giou_weight)


def one_to_one(logits, pred_boxes, target) -> Match:
    """The Hungarian assignment of `matching_cost`.

    min(Q, T) pairs of quality 1, sorted by query. logits (Q, C), pred_boxes (Q, 4).
    """
    cost = matching_cost(logits, pred_boxes, target)
    queries, targets = hungarian(cost.detach().cpu().numpy())
    pairs = [torch.as_tensor(index, device=logits.device) for index in (queries, targets)]
    return Match(*pairs, logits.new_ones(len(queries)))


def one_to_many(logits, pred_boxes, target, alpha: float = 1.0, beta: float = 6.0, candidates: int = 13) -> Match:
    """The task-aligned assignment, sorted by query.

    Logits (Q, C), pred_boxes (Q, 4); `candidates` is clamped to Q. A target may get no query.
    """
    boxes = to_model(target["boxes"].float(), target["size"]).to(pred_boxes.device)
    labels = target["labels"].to(logits.device)
    padded = PaddedTargets(boxes, labels, torch.ones_like(labels, dtype=torch.bool))
    assigned, quality = assign_one_to_many(logits, pred_boxes, padded, alpha, beta, candidates)
    queries = (assigned >= 0).nonzero()[:, 0]
    return Match(queries, assigned[queries], quality[queries])


def hungarian(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scipy's assignment of a (Q, T) cost; entries that are not finite become dearer than every finite one."""
    finite = np.isfinite(cost)
    if not finite.all():
        cost = cost.astype(np.float64)  # in which no sum of float32 is infinite
        cost = np.where(finite, cost, np.abs(cost[finite]).max(initial=0.0) * 2 + 1e3)
    return linear_sum_assignment(cost)


# ---- batched core ----------------------------------------------------------------------------------------------------


def batched_cost(
    logits, pred_boxes, boxes, labels, class_cost="focal", class_weight=2.0, l1_weight=5.0, giou_weight=2.0
) -> torch.Tensor:
    """`matching_cost` with leading dimensions.

    Logits (..., Q, C), pred_boxes (..., Q, 4), boxes (..., T, 4) cxcywh, labels (..., T) -> (..., Q, T).
    """
    logits, pred_boxes, boxes = logits.float(), pred_boxes.float(), boxes.float()
    if class_cost == "softmax":
        prices = -logits.softmax(-1)
    else:
        scores = logits.sigmoid()
        positive = 0.25 * (1 - scores) ** 2 * -(scores + 1e-8).log()
        negative = 0.75 * scores**2 * -(1 - scores + 1e-8).log()
        prices = positive - negative
    l1 = (pred_boxes.unsqueeze(-2) - boxes.unsqueeze(-3)).abs().sum(-1)
    giou = pairwise_overlaps(_xyxy(pred_boxes), _xyxy(boxes))[1]
    return class_weight * _at_labels(prices, labels) + l1_weight * l1 - giou_weight * giou


def assign_one_to_one(costs: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """costs (..., B, Q, T) and valid (B, T), the columns that are targets -> (..., B, Q) index of the target, -1 for
    none.
    """
    assigned = np.full(costs.shape[:-1], -1, dtype=np.int64)
    for place in np.ndindex(costs.shape[:-2]):
        columns = np.flatnonzero(valid[place[-1]])
        if len(columns):
            queries, targets = hungarian(costs[place][:, columns])
            assigned[place][queries] = columns[targets]
    return assigned


def assign_one_to_many(
    logits, pred_boxes, targets: PaddedTargets, alpha: float = 1.0, beta: float = 6.0, candidates: int = 13
):
    """One-to-many for any leading dimensions; nothing leaves the device.

    Args:
        logits, pred_boxes: (..., Q, C) and (..., Q, 4) cxcywh.
        targets: PaddedTargets with the same leading dimensions (or ones that broadcast).

    Returns:
        assigned (..., Q) int64, the target's index or -1; quality (..., Q), the soft class target, 0 where unassigned.
    """
    lead = logits.shape[:-2]
    if targets.valid.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], -1, dtype=torch.int64), logits.new_zeros(logits.shape[:-1])
    with torch.no_grad():
        iou = pairwise_overlaps(_xyxy(pred_boxes.float()), _xyxy(targets.boxes))[0]  # (..., Q, T)
        scores = _at_labels(logits.float().sigmoid(), targets.labels.expand(*lead, -1))
        aligned = scores**alpha * iou**beta * targets.valid.unsqueeze(-2)
        count = min(candidates, aligned.shape[-2])
        best = aligned.topk(count, dim=-2).indices
        wanted = torch.zeros_like(aligned, dtype=torch.bool).scatter_(-2, best, True) & (aligned > 0)
        closest = torch.where(wanted, iou, -1.0)
        winner = closest.argmax(-1)  # the first of equals: the lowest target index
        positive = wanted.any(-1)
        owned = torch.zeros_like(wanted).scatter_(-1, winner.unsqueeze(-1), positive.unsqueeze(-1))
        top_aligned = torch.where(owned, aligned, 0.0).amax(-2, keepdim=True)  # (..., 1, T)
        top_iou = torch.where(owned, iou, 0.0).amax(-2, keepdim=True)
        quality = (torch.where(owned, aligned, 0.0) / (top_aligned + 1e-7) * top_iou).sum(-1)
        return torch.where(positive, winner, -1), quality


def _at_labels(prices: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(..., Q, C) read at labels (..., T) -> (..., Q, T)."""
    index = labels.unsqueeze(-2).expand(*prices.shape[:-1], labels.shape[-1])
    return prices.gather(-1, index)


def _xyxy(boxes: torch.Tensor) -> torch.Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")
