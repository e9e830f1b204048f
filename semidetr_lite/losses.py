"""From assignments to losses: class, L1 and GIoU.

For every decoder layer, the encoder's proposals and the denoising queries.

One-to-one (DINO; released code: dino_detr_ssod_head.py:751-804): focal loss, weighted 2, over the
number of matched pairs; L1 (5) and GIoU (2) of the pairs over the same number.

One-to-many (paper, section 3.2; released code: dino_detr_ssod_head.py:665-749): quality focal loss,
weighted 2, over the sum of the soft class targets; L1 and GIoU weighted by the soft targets, over
the same sum.

Every normalizer is at least 1 and counts the whole step, in all its micro-batches and processes
(see NumBoxes). One-to-many is the exception: its normalizer counts one micro-batch in all
processes, since the soft targets of the next micro-batch are not known yet.

DETR scores by a softmax over C classes and "no object" (see detr.py). It has cross-entropy instead
of the focal loss, for one-to-one matching only: "no object" weighs a tenth, and the mean is over
the weights. Class cost and class loss have the weight 1 there, not 2.

The encoder's proposals are trained class-agnostically, on channel 0, as in the released code.

Difference from the released code: L1 counts once. (There, a key meant for the log doubles it; the
COCO presets pass l1_weight=10.)

Shapes: L layers, B images, Q queries, T targets, C classes.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert

from semidetr_lite import distributed
from semidetr_lite.boxes import overlaps
from semidetr_lite.contracts import Outputs, Target
from semidetr_lite.detectors.denoising import DenoisingTargets
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.transformer import Layers, QueryGroup, slice_batch, stack_layers
from semidetr_lite.device import to_device, to_host
from semidetr_lite.loss_weights import LossWeights
from semidetr_lite.matching import (
    Assignment,
    PaddedTargets,
    layer_costs,
    match_layers,
    pad_targets,
)

NO_OBJECT_WEIGHT = 0.1  # of queries without an object, in DETR's cross-entropy


class NumBoxes(NamedTuple):
    """Numbers of images and target boxes of a whole step, in all micro-batches and processes."""

    images: int
    matched: int  # pairs of one-to-one matching
    boxes: int
    max_per_image: int  # columns of padded targets that the image with the most needs
    num_shards: int  # micro-batches times processes

    def normalizer(self, total: float) -> float:
        """What each shard divides by: max(total, 1) / num_shards.

        The mean of the shards' losses is then their sum over max(total, 1).
        """
        return max(total, 1.0) / self.num_shards


class TargetSet(NamedTuple):
    """The targets of one kind of images, and what turns them into losses."""

    name: str  # "labelled" or "pseudo", the prefix of the losses' names
    images: slice  # the images' rows among those that the student sees
    targets: PaddedTargets  # in model coordinates of the views that the student sees
    valid: np.ndarray  # (B, T) bool, `targets.valid` on the CPU
    num_boxes: NumBoxes
    loss_weights: LossWeights


class DenoisingQueries(NamedTuple):
    """The denoising queries of one kind of images, and what they are trained towards."""

    name: str  # of the TargetSet that they were made from
    group: QueryGroup  # for all images that the student sees, valid in those of this kind alone
    boxes: PaddedTargets  # that they were made from
    targets: DenoisingTargets


def reduce_num_boxes(valid_masks: list[np.ndarray], num_queries: int) -> NumBoxes:
    """Count the targets of all micro-batches and processes.

    Args:
        valid_masks: `PaddedTargets.valid` (B, T) of each of this process's micro-batches, on the
            CPU.
        num_queries: Q, which limits the pairs of one-to-one matching.
    """
    rows = []
    for valid in valid_masks:
        per_image = valid.sum(1)
        matched = np.minimum(per_image, num_queries).sum()
        last_column = (valid.any(0) * np.arange(1, valid.shape[1] + 1)).max(initial=0)
        rows.append((len(valid), matched, per_image.sum(), last_column))
    counts = np.array(distributed.all_gather(rows), dtype=np.int64).reshape(-1, 4)
    images, matched, boxes = counts[:, :3].sum(0).tolist()
    return NumBoxes(images, matched, boxes, int(counts[:, 3].max()), len(counts))


def pad_to(targets: PaddedTargets, max_targets: int) -> PaddedTargets:
    """The same targets with `max_targets` columns: padded, or cut behind them."""
    boxes, labels, valid = (entry[:, :max_targets] for entry in targets)
    missing = max_targets - valid.shape[1]
    return PaddedTargets(
        F.pad(boxes, (0, 0, 0, missing)), F.pad(labels, (0, missing)), F.pad(valid, (0, missing))
    )


def make_target_sets(
    name: str,
    targets: list[PaddedTargets],
    valid_masks: list[np.ndarray],
    first_images: list[int],
    student: Detector,
    loss_weights: LossWeights,
) -> list[TargetSet]:
    """The targets of one kind of images, of all micro-batches of a step, counted and padded.

    Args:
        name: "labelled" or "pseudo".
        targets: one per micro-batch.
        valid_masks: (B, T) bool, `valid` of each of these on the CPU.
        first_images: the row of their first image among those that the student sees.
        student: whose device the targets are moved to, and whose Q queries they are matched to.
        loss_weights: factors of their losses.
    """
    device = student.mean.device
    num_boxes = reduce_num_boxes(valid_masks, student.num_queries)
    target_sets = []
    for padded, valid, first in zip(targets, valid_masks, first_images, strict=True):
        images = slice(first, first + len(valid))
        padded = pad_to(padded, num_boxes.max_per_image)
        padded = PaddedTargets(*(to_device(entry, device) for entry in padded))
        valid = valid[:, : num_boxes.max_per_image]
        target_sets.append(TargetSet(name, images, padded, valid, num_boxes, loss_weights))
    return target_sets


def add_prefix(prefix: str, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{"class": x} -> {"prefix/class": x}."""
    return {f"{prefix}/{name}": value for name, value in losses.items()}


# ---- class losses --------------------------------------------------------------------------------


def quality_focal_loss(
    logits: torch.Tensor, quality: torch.Tensor, gamma: float = 2.0
) -> torch.Tensor:
    """The sum of |y - p|^gamma * BCE(p, y) over all entries, a scalar.

    Args:
        logits: (N, C), with p = sigmoid(logits).
        quality: (N, C) soft targets y in [0, 1].
        gamma: the exponent.
    """
    return _focal(logits, quality, gamma).sum()


def _focal(
    logits: torch.Tensor,
    quality: torch.Tensor,
    gamma: float = 2.0,
    weight: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """The quality focal loss of each entry; with hard targets and a weight, the focal loss."""
    logits = logits.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return weight * (quality - logits.sigmoid()).abs() ** gamma * cross_entropy


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, assigned: torch.Tensor, num_boxes: NumBoxes | None
) -> torch.Tensor:
    """DETR's class loss, the weighted mean of each layer: (...).

    Args:
        logits: (..., B, Q, C + 1).
        labels: (..., B, Q) of the assigned targets.
        assigned: (..., B, Q) index of the target, -1 for none.
        num_boxes: of the whole step; None for a mean over these entries alone.
    """
    no_object = assigned < 0
    labels = torch.where(no_object, logits.shape[-1] - 1, labels)
    cross_entropy = -logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    weight = torch.where(no_object, NO_OBJECT_WEIGHT, 1.0)
    total = (cross_entropy * weight).sum((-2, -1))
    if num_boxes is None:
        return total / weight.sum((-2, -1))
    num_no_object = num_boxes.images * assigned.shape[-1] - num_boxes.matched
    return total / num_boxes.normalizer(num_boxes.matched + NO_OBJECT_WEIGHT * num_no_object)


# ---- losses of finished assignments --------------------------------------------------------------


def loss_from_assignment(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    targets: PaddedTargets,
    assignment: Assignment,
    stage: str,
    loss_weights: LossWeights = LossWeights(),
    query_mask: torch.Tensor | None = None,
    no_object: bool = False,
    num_boxes: NumBoxes | None = None,
    num_groups: int = 0,
) -> dict[str, torch.Tensor]:
    """{"class", "l1", "giou"} of a finished assignment, weighted scalars; it does not synchronise.

    Args:
        logits, pred_boxes: (B, Q, C) and (B, Q, 4) cxcywh; or (L, B, Q, ...) for several layers,
            each of which is normalized by itself, and then summed.
        targets: labels (B, T), or (L, B, T) if they differ between layers.
        assignment: (..., B, Q).
        stage: "one_to_many" or "one_to_one".
        loss_weights: factors of the three losses.
        query_mask: (B, Q) bool, the queries that count; None for all.
        no_object: whether the last logit is "no object" of a softmax (one-to-one only).
        num_boxes: of the whole step; None to divide by this batch's own pairs.
        num_groups: of denoising, that is, positive queries per target; 0 for matching queries.
    """
    assigned, quality = assignment
    labels, boxes = _assigned_targets(targets, assigned, pred_boxes)
    normalizer = quality.float().sum((-2, -1))  # (L) or ()
    if num_boxes is None:
        normalizer = normalizer.clamp(min=1.0)
    elif stage == "one_to_many":
        world_size = distributed.world_size()
        total = distributed.all_reduce_mean(normalizer) * world_size
        normalizer = total.clamp(min=1.0) / world_size
    else:
        pairs = num_groups * num_boxes.boxes if num_groups else num_boxes.matched
        normalizer = torch.full_like(normalizer, num_boxes.normalizer(pairs))
    if no_object:
        factor = loss_weights.class_weight / 2
        class_loss = factor * _cross_entropy(logits, labels, assigned, num_boxes)
    else:
        target_scores = torch.zeros_like(logits, dtype=torch.float32)
        target_scores = target_scores.scatter_(-1, labels[..., None], quality[..., None].float())
        weight = 1.0 if stage == "one_to_many" else torch.where(target_scores > 0, 0.25, 0.75)
        focal = _focal(logits, target_scores, weight=weight)
        focal = focal if query_mask is None else focal * query_mask[..., None]
        class_loss = loss_weights.class_weight * focal.sum((-3, -2, -1)) / normalizer
    l1 = (pred_boxes.float() - boxes).abs().sum(-1)
    giou = overlaps(_xyxy(pred_boxes.float()), _xyxy(boxes))[1]
    l1_loss = loss_weights.l1_weight * (l1 * quality).sum((-2, -1)) / normalizer
    giou_loss = loss_weights.giou_weight * ((1 - giou) * quality).sum((-2, -1)) / normalizer
    return {"class": class_loss.sum(), "l1": l1_loss.sum(), "giou": giou_loss.sum()}


def _assigned_targets(
    targets: PaddedTargets, assigned: torch.Tensor, pred_boxes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (..., B, Q) and boxes (..., B, Q, 4) of each query's target; of none, any."""
    index = assigned.clamp(min=0)
    if targets.valid.shape[1] == 0:
        return index, torch.full_like(pred_boxes, 0.5, dtype=torch.float32)
    leading = assigned.shape[:-2]
    labels = targets.labels.expand(*leading, -1, -1).gather(-1, index)
    boxes = targets.boxes.expand(*leading, -1, -1, -1)
    return labels, boxes.gather(-2, index[..., None].expand(*index.shape, 4))


def _xyxy(boxes: torch.Tensor) -> torch.Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")


def layer_loss(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    targets: list[Target],
    stage: str,
    candidates: int = 13,
    loss_weights: LossWeights = LossWeights(),
) -> dict[str, torch.Tensor]:
    """The loss of one layer: {"class", "l1", "giou"}, weighted and normalized over the batch.

    Args:
        logits, pred_boxes: (B, Q, C) and (B, Q, 4) cxcywh in [0, 1].
        targets: B target dicts; crowd regions are left out.
        stage: "one_to_many" or "one_to_one".
        candidates: of one-to-many matching.
        loss_weights: factors of the three losses.
    """
    layers = Layers(logits[None], pred_boxes[None], encoder=False)
    padded = pad_targets(targets, logits.device)
    costs = to_host(layer_costs(layers, padded)) if stage == "one_to_one" else None
    assignment = match_layers(layers, padded, stage, candidates, costs, to_host(padded.valid))
    return detection_loss(layers, padded, assignment, stage, loss_weights)


def detection_loss(
    layers: Layers,
    targets: PaddedTargets,
    assignment: Assignment,
    stage: str,
    loss_weights: LossWeights = LossWeights(),
    num_boxes: NumBoxes | None = None,
) -> dict[str, torch.Tensor]:
    """{"class", "l1", "giou"}, each the sum over all layers.

    Args:
        layers, targets: of the same images.
        assignment: (L, B, Q), from match_layers.
        stage: "one_to_many" or "one_to_one".
        loss_weights, num_boxes: see loss_from_assignment.
    """
    return loss_from_assignment(
        layers.logits,
        layers.boxes,
        targets._replace(labels=layers.labels(targets.labels)),
        assignment,
        stage,
        loss_weights,
        no_object=layers.no_object,
        num_boxes=num_boxes,
    )


def denoising_loss(
    outputs: Outputs,
    denoising_targets: DenoisingTargets,
    targets: PaddedTargets,
    loss_weights: LossWeights = LossWeights(),
    num_boxes: NumBoxes | None = None,
) -> dict[str, torch.Tensor]:
    """One-to-one losses of denoising queries, over the number of the positive ones.

    Args:
        outputs: of the denoising queries alone, an outputs dict.
        denoising_targets: what each denoising query is trained towards.
        targets: the boxes that the queries were made from.
        loss_weights, num_boxes: see loss_from_assignment.
    """
    layers = stack_layers(outputs)
    assigned = denoising_targets.assigned.expand(len(layers.logits), -1, -1)
    return loss_from_assignment(
        layers.logits,
        layers.boxes,
        targets,
        Assignment(assigned, (assigned >= 0).float()),
        "one_to_one",
        loss_weights,
        query_mask=denoising_targets.valid,
        num_boxes=num_boxes,
        num_groups=denoising_targets.valid.shape[1] // (2 * targets.valid.shape[1]),
    )


# ---- losses of a step ----------------------------------------------------------------------------


def detection_losses(
    layers: Layers, target_sets: list[TargetSet], assignments: list[Assignment], stage: str
) -> dict[str, torch.Tensor]:
    """The detection losses of each kind of images: {"labelled/class", ..., "pseudo/giou"}."""
    losses: dict[str, torch.Tensor] = {}
    for target_set, assignment in zip(target_sets, assignments, strict=True):
        loss = detection_loss(
            layers.of_images(target_set.images),
            target_set.targets,
            assignment,
            stage,
            target_set.loss_weights,
            target_set.num_boxes,
        )
        losses |= add_prefix(target_set.name, loss)
    return losses


def denoising_losses(
    group_outputs: list[Outputs], denoising: list[DenoisingQueries], target_sets: list[TargetSet]
) -> dict[str, torch.Tensor]:
    """The denoising losses of each kind of images: {"labelled denoising/class", ...}.

    Args:
        group_outputs: an outputs dict per group, for all images that the student sees.
        denoising: the groups, in the same order.
        target_sets: of each kind of images with denoising: rows, weights and numbers of boxes.
    """
    by_name = {target_set.name: target_set for target_set in target_sets}
    losses: dict[str, torch.Tensor] = {}
    for outputs, queries in zip(group_outputs, denoising, strict=True):
        target_set = by_name[queries.name]
        loss = denoising_loss(
            slice_batch(outputs, target_set.images),
            queries.targets,
            queries.boxes,
            target_set.loss_weights,
            target_set.num_boxes,
        )
        losses |= add_prefix(f"{target_set.name} denoising", loss)
    return losses
