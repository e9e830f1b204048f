"""Which query is trained towards which object: one-to-one (Hungarian) and one-to-many.

These are the two stages of Semi-DETR's hybrid matching (section 3.2). Both return pairs.

One-to-one: each target gets the one query that makes the total matching cost smallest.
One-to-many (released code: o2m_assigner.py): each target takes the `candidates` queries of highest
alignment metric

    m(q, t) = score(q, label_t)^alpha * IoU(q, t)^beta,

a query that is a candidate of several targets goes to the one it overlaps most, and the soft class
target of a pair is m, scaled so that the best query of a target gets the best IoU among that
target's queries.

The functions for one image are thin wrappers around the batched ones, which take any leading
dimensions (layers, images) and padded targets.

Shapes: L layers, B images, Q queries, T targets, C classes.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from semidetr_lite.boxes import pairwise_overlaps, to_model
from semidetr_lite.contracts import Target
from semidetr_lite.detectors.transformer import Layers
from semidetr_lite.device import to_device


class Match(NamedTuple):
    """The pairs of one image."""

    queries: torch.Tensor  # (N,) int64
    targets: torch.Tensor  # (N,) int64
    quality: torch.Tensor  # (N,) soft class target; 1 for one-to-one


class PaddedTargets(NamedTuple):
    """The targets of a batch in model coordinates, padded to the image with the most."""

    boxes: torch.Tensor  # (B, T, 4) cxcywh in [0, 1]
    labels: torch.Tensor  # (B, T) int64, 0 in the padding
    valid: torch.Tensor  # (B, T) bool, False in the padding


class Assignment(NamedTuple):
    """The target of each query, for a batch and often for several layers."""

    targets: torch.Tensor  # (..., B, Q) int64, index of the target, -1 for none
    quality: torch.Tensor  # (..., B, Q) soft class target, 0 where unassigned


def pad_targets(targets: list[Target], device: torch.device | str | None = None) -> PaddedTargets:
    """Target dicts (xyxy pixels) as PaddedTargets on a device.

    Crowd regions stand for many objects and are left out.
    """
    empty: Target = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "size": (1, 1),
    }
    rows = []
    for target in targets or [empty]:
        keep = ~target["crowd"] if "crowd" in target else slice(None)
        boxes = to_model(target["boxes"].float(), target["size"])[keep]
        labels = target["labels"][keep]
        rows.append((boxes, labels, torch.ones_like(labels, dtype=torch.bool)))
    padded = [pad_sequence(list(entries), batch_first=True) for entries in zip(*rows, strict=True)]
    return PaddedTargets(*(to_device(entry[: len(targets)], device) for entry in padded))


# ---- one image, as a learner reads it ------------------------------------------------------------


def matching_cost(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    target: Target,
    class_cost: str = "focal",
    class_weight: float = 2.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> torch.Tensor:
    """The matching cost of every (query, target) pair (DETR, section 3.1).

    Args:
        logits, pred_boxes: (Q, C) and (Q, 4) cxcywh in [0, 1].
        target: "boxes" (T, 4) xyxy pixels, "labels" (T,), "size" (H, W).
        class_cost: "focal" (sigmoid scores: Deformable DETR, DINO) or "softmax" (DETR).
        class_weight, l1_weight, giou_weight: factors of the three terms.

    Returns:
        (Q, T) class_weight * class cost + l1_weight * L1 of cxcywh - giou_weight * GIoU. There is
        no constant term, so it may be negative.

    Raises ValueError for another class_cost.
    """
    if class_cost not in ("focal", "softmax"):
        raise ValueError(f"class_cost must be 'focal' or 'softmax', got {class_cost!r}")
    boxes = to_model(target["boxes"].float(), target["size"]).to(pred_boxes.device)
    labels = target["labels"].to(logits.device)
    return batched_cost(
        logits, pred_boxes, boxes, labels, class_cost, class_weight, l1_weight, giou_weight
    )


def one_to_one(logits: torch.Tensor, pred_boxes: torch.Tensor, target: Target) -> Match:
    """The Hungarian assignment of `matching_cost`.

    Args:
        logits, pred_boxes: (Q, C) and (Q, 4) cxcywh in [0, 1].
        target: "boxes" (T, 4) xyxy pixels, "labels" (T,), "size" (H, W).

    Returns:
        min(Q, T) pairs of quality 1, sorted by query.
    """
    cost = matching_cost(logits, pred_boxes, target)
    queries, targets = hungarian(cost.detach().cpu().numpy())
    return Match(
        torch.as_tensor(queries, device=logits.device),
        torch.as_tensor(targets, device=logits.device),
        logits.new_ones(len(queries)),
    )


def one_to_many(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    target: Target,
    alpha: float = 1.0,
    beta: float = 6.0,
    candidates: int = 13,
) -> Match:
    """The one-to-many assignment of the module's docstring.

    Args:
        logits, pred_boxes: (Q, C) and (Q, 4) cxcywh in [0, 1].
        target: "boxes" (T, 4) xyxy pixels, "labels" (T,), "size" (H, W).
        alpha, beta: exponents of score and IoU in the alignment metric.
        candidates: queries that a target takes at most, clamped to Q.

    Returns:
        Pairs sorted by query. A target may get no query.
    """
    boxes = to_model(target["boxes"].float(), target["size"]).to(pred_boxes.device)
    labels = target["labels"].to(logits.device)
    padded = PaddedTargets(boxes, labels, torch.ones_like(labels, dtype=torch.bool))
    assignment = assign_one_to_many(logits, pred_boxes, padded, alpha, beta, candidates)
    queries = (assignment.targets >= 0).nonzero()[:, 0]
    return Match(queries, assignment.targets[queries], assignment.quality[queries])


def hungarian(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scipy's assignment of a cost (Q, T): the queries and the targets of min(Q, T) pairs.

    Entries that are not finite cost more than every finite one.
    """
    finite = np.isfinite(cost)
    if not finite.all():
        cost = cost.astype(np.float64)  # in which no sum of float32 is infinite
        cost = np.where(finite, cost, np.abs(cost[finite]).max(initial=0.0) * 2 + 1e3)
    return linear_sum_assignment(cost)


# ---- batched core --------------------------------------------------------------------------------


def batched_cost(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    class_cost: str = "focal",
    class_weight: float = 2.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> torch.Tensor:
    """`matching_cost` with leading dimensions.

    Args:
        logits, pred_boxes: (..., Q, C) and (..., Q, 4) cxcywh.
        boxes, labels: (..., T, 4) cxcywh and (..., T).
        class_cost, class_weight, l1_weight, giou_weight: see matching_cost.

    Returns:
        (..., Q, T).
    """
    logits, pred_boxes, boxes = logits.float(), pred_boxes.float(), boxes.float()
    if class_cost == "softmax":
        cost_of_class = -logits.softmax(-1)
    else:
        scores = logits.sigmoid()
        positive = 0.25 * (1 - scores) ** 2 * -(scores + 1e-8).log()
        negative = 0.75 * scores**2 * -(1 - scores + 1e-8).log()
        cost_of_class = positive - negative
    cost_of_label = _gather_labels(cost_of_class, labels)
    l1 = (pred_boxes.unsqueeze(-2) - boxes.unsqueeze(-3)).abs().sum(-1)
    giou = pairwise_overlaps(_xyxy(pred_boxes), _xyxy(boxes))[1]
    return class_weight * cost_of_label + l1_weight * l1 - giou_weight * giou


def assign_one_to_one(costs: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The Hungarian assignment of every layer and image.

    Args:
        costs: (..., B, Q, T).
        valid: (B, T) bool, the columns that are targets.

    Returns:
        (..., B, Q) int64, index of the target, -1 for none.
    """
    assigned = np.full(costs.shape[:-1], -1, dtype=np.int64)
    for index in np.ndindex(costs.shape[:-2]):
        columns = np.flatnonzero(valid[index[-1]])
        if len(columns):
            queries, targets = hungarian(costs[index][:, columns])
            assigned[index][queries] = columns[targets]
    return assigned


@torch.no_grad()
def assign_one_to_many(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    targets: PaddedTargets,
    alpha: float = 1.0,
    beta: float = 6.0,
    candidates: int = 13,
) -> Assignment:
    """The one-to-many assignment for any leading dimensions; it does not synchronise.

    Args:
        logits, pred_boxes: (..., Q, C) and (..., Q, 4) cxcywh.
        targets: with the same leading dimensions, or ones that broadcast.
        alpha, beta, candidates: see one_to_many.

    Returns:
        The target (..., Q) of each query, and its soft class target (..., Q).
    """
    leading = logits.shape[:-2]
    if targets.valid.shape[-1] == 0:
        unassigned = logits.new_full(logits.shape[:-1], -1, dtype=torch.int64)
        return Assignment(unassigned, logits.new_zeros(logits.shape[:-1]))
    iou = pairwise_overlaps(_xyxy(pred_boxes.float()), _xyxy(targets.boxes))[0]  # (..., Q, T)
    scores = _gather_labels(logits.float().sigmoid(), targets.labels.expand(*leading, -1))
    alignment = scores**alpha * iou**beta * targets.valid.unsqueeze(-2)
    # the candidates of each target
    best = alignment.topk(min(candidates, alignment.shape[-2]), dim=-2).indices
    candidate_mask = torch.zeros_like(alignment, dtype=torch.bool).scatter_(-2, best, True)
    candidate_mask = candidate_mask & (alignment > 0)
    # a query that is a candidate of several targets goes to the one it overlaps most
    candidate_iou = torch.where(candidate_mask, iou, -1.0)
    winner = candidate_iou.argmax(-1)  # of equal ones the first: the lowest target index
    positive = candidate_mask.any(-1)
    positive_mask = torch.zeros_like(candidate_mask)
    positive_mask = positive_mask.scatter_(-1, winner.unsqueeze(-1), positive.unsqueeze(-1))
    # the metric, scaled for each target to the best IoU of its queries
    best_alignment = torch.where(positive_mask, alignment, 0.0).amax(
        -2, keepdim=True
    )  # (..., 1, T)
    best_iou = torch.where(positive_mask, iou, 0.0).amax(-2, keepdim=True)
    scaled = torch.where(positive_mask, alignment, 0.0) / (best_alignment + 1e-7) * best_iou
    return Assignment(torch.where(positive, winner, -1), scaled.sum(-1))


def matched_costs(costs: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The cost of each target and its Hungarian partner.

    Args:
        costs: (B, Q, T).
        valid: (B, T) bool, the columns that are targets.

    Returns:
        (B, T), nan where a target has no partner.
    """
    matched = np.full(valid.shape, np.nan)
    for image in range(len(costs)):
        columns = np.flatnonzero(valid[image])
        if len(columns):
            queries, targets = hungarian(costs[image][:, columns])
            matched[image, columns[targets]] = costs[image][queries, columns[targets]]
    return matched


def _gather_labels(per_class: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The entries of (..., Q, C) at labels (..., T): (..., Q, T)."""
    index = labels.unsqueeze(-2).expand(*per_class.shape[:-1], labels.shape[-1])
    return per_class.gather(-1, index)


def _xyxy(boxes: torch.Tensor) -> torch.Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")


# ---- all layers of a detector --------------------------------------------------------------------


def layer_costs(layers: Layers, targets: PaddedTargets) -> torch.Tensor:
    """The matching costs (L, B, Q, T) of all layers, without gradient."""
    return batched_cost(
        layers.logits.detach(),
        layers.boxes.detach(),
        targets.boxes,
        layers.labels(targets.labels),
        class_cost="softmax" if layers.no_object else "focal",
        class_weight=1.0 if layers.no_object else 2.0,
    )


def match_layers(
    layers: Layers,
    targets: PaddedTargets,
    stage: str,
    candidates: int = 13,
    costs: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> Assignment:
    """Match the queries of every layer to the targets, as the stage says.

    Args:
        layers, targets: of the same images.
        stage: "one_to_many" or "one_to_one".
        candidates: of one-to-many matching.
        costs, valid: of one-to-one matching, on the CPU: `layer_costs` (L, B, Q, T), which may
            have fewer columns than the targets, and `targets.valid` for these columns.

    Returns:
        The assignment (L, B, Q).
    """
    if stage == "one_to_many":
        targets = targets._replace(labels=layers.labels(targets.labels))
        return assign_one_to_many(layers.logits, layers.boxes, targets, candidates=candidates)
    if costs is None or valid is None:
        raise ValueError("one-to-one matching needs the costs and their valid columns")
    assigned = to_device(torch.from_numpy(assign_one_to_one(costs, valid)), layers.logits.device)
    return Assignment(assigned, (assigned >= 0).float())
