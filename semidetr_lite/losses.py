"""From assignments to losses: class, L1 and GIoU.

For every decoder layer, the encoder's proposals and the denoising queries.

One-to-one (DINO; released code: dino_detr_ssod_head.py:751-804): focal loss, weighted 2, over the
number of matched pairs; L1 (5) and GIoU (2) of the pairs over the same number.

One-to-many (paper, section 3.2; released code: dino_detr_ssod_head.py:665-749): quality focal loss,
weighted 2, over the sum of the soft class targets; L1 and GIoU weighted by the soft targets, over
the same sum.

The numbers that losses are divided by are at least 1. Those of a step count all its micro-batches
and processes: see normalizers.py.

DETR scores by a softmax over C classes and "no object" (see detr.py). It has cross-entropy instead
of the focal loss, for one-to-one matching only: "no object" weighs a tenth, and the mean is over
the weights. Class cost and class loss have the weight 1 there, not 2.

The encoder's proposals are trained class-agnostically, on channel 0, as in the released code.

Differences from the released code: docs/paper_vs_code.md. L1 counts once here; there, a key meant
for the log doubles it, and the COCO presets pass l1_weight=10.

Shapes: L layers, B images, Q queries, T targets, C classes.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert

from semidetr_lite.boxes import overlaps
from semidetr_lite.contracts import Outputs, Target
from semidetr_lite.detectors.denoising import DenoisingTargets
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.transformer import Layers, QueryGroup, slice_batch, stack_layers
from semidetr_lite.device import copy_to_host, to_device, to_host
from semidetr_lite.loss_weights import LossWeights
from semidetr_lite.matching import (
    Assignment,
    PaddedTargets,
    layer_costs,
    match_layers,
    pad_targets,
)
from semidetr_lite.normalizer_settings import NormalizerSettings
from semidetr_lite.normalizers import Normalizers, count_boxes

NO_OBJECT_WEIGHT = 0.1  # of queries without an object, in DETR's cross-entropy
NEVER_MATCHED = 1e6  # the cost of a token that takes no part


class TargetSet(NamedTuple):
    """The targets of one kind of images, and what turns them into losses."""

    name: str  # "labelled" or "pseudo", the prefix of the losses' names
    images: slice  # the images' rows among those that the student sees
    targets: PaddedTargets  # in model coordinates of the views that the student sees
    valid: np.ndarray  # (B, T) bool, `targets.valid` on the CPU
    normalizers: Normalizers
    loss_weights: LossWeights


class DenoisingQueries(NamedTuple):
    """The denoising queries of one kind of images, and what they are trained towards."""

    name: str  # of the TargetSet that they were made from
    group: QueryGroup  # for all images that the student sees, valid in those of this kind alone
    boxes: PaddedTargets  # that they were made from
    targets: DenoisingTargets
    copies: list[int]  # positive queries per box, in each normalizer group of the step


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
    settings: NormalizerSettings = NormalizerSettings(),
    expected_per_image: float = 0.0,
) -> list[TargetSet]:
    """The targets of one kind of images, of all micro-batches of a step, counted and padded.

    Args:
        name: "labelled" or "pseudo".
        targets: one per micro-batch.
        valid_masks: (B, T) bool, `valid` of each of these on the CPU.
        first_images: the row of their first image among those that the student sees.
        student: whose device the targets are moved to, and whose Q queries they are matched to.
        loss_weights: factors of their losses.
        settings, expected_per_image: see count_boxes.
    """
    device = student.mean.device
    counted = count_boxes(valid_masks, student.num_queries, settings, expected_per_image)
    target_sets = []
    parts = zip(targets, valid_masks, first_images, counted, strict=True)
    for padded, valid, first, normalizers in parts:
        images = slice(first, first + len(valid))
        padded = pad_to(padded, normalizers.step.max_per_image)
        padded = PaddedTargets(*(to_device(entry, device) for entry in padded))
        valid = valid[:, : normalizers.step.max_per_image]
        target_sets.append(TargetSet(name, images, padded, valid, normalizers, loss_weights))
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
    logits: torch.Tensor,
    labels: torch.Tensor,
    assigned: torch.Tensor,
    normalizers: Normalizers | None,
) -> torch.Tensor:
    """DETR's class loss, the weighted mean of each layer: (...).

    Args:
        logits: (..., B, Q, C + 1).
        labels: (..., B, Q) of the assigned targets.
        assigned: (..., B, Q) index of the target, -1 for none.
        normalizers: of the whole step; None for a mean over these entries alone.
    """
    no_object = assigned < 0
    labels = torch.where(no_object, logits.shape[-1] - 1, labels)
    cross_entropy = -logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    weight = torch.where(no_object, NO_OBJECT_WEIGHT, 1.0)
    total = (cross_entropy * weight).sum((-2, -1))
    if normalizers is None:
        return total / weight.sum((-2, -1))
    step = normalizers.step
    num_no_object = step.images * assigned.shape[-1] - step.matched
    return total / normalizers.of_step(step.matched + NO_OBJECT_WEIGHT * num_no_object)


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
    normalizers: Normalizers | None = None,
    copies: list[int] | None = None,
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
        normalizers: of the whole step; None to divide by this batch's own pairs.
        copies: of denoising, see DenoisingQueries; None for matching queries.
    """
    assigned, quality = assignment
    labels, boxes = _assigned_targets(targets, assigned, pred_boxes)
    of_classes, of_boxes = _divisors(quality.float().sum((-2, -1)), stage, normalizers, copies)
    if no_object:
        factor = loss_weights.class_weight / 2
        class_loss = factor * _cross_entropy(logits, labels, assigned, normalizers)
    else:
        target_scores = torch.zeros_like(logits, dtype=torch.float32)
        target_scores = target_scores.scatter_(-1, labels[..., None], quality[..., None].float())
        weight = 1.0 if stage == "one_to_many" else torch.where(target_scores > 0, 0.25, 0.75)
        focal = _focal(logits, target_scores, weight=weight)
        focal = focal if query_mask is None else focal * query_mask[..., None]
        parts = [
            loss_weights.class_weight * focal[..., images, :, :].sum((-3, -2, -1)) / divisor
            for images, divisor in of_classes
        ]
        class_loss = torch.stack(parts).sum(0)
    l1 = (pred_boxes.float() - boxes).abs().sum(-1)
    giou = overlaps(_xyxy(pred_boxes.float()), _xyxy(boxes))[1]
    l1_loss = loss_weights.l1_weight * (l1 * quality).sum((-2, -1)) / of_boxes
    giou_loss = loss_weights.giou_weight * ((1 - giou) * quality).sum((-2, -1)) / of_boxes
    return {"class": class_loss.sum(), "l1": l1_loss.sum(), "giou": giou_loss.sum()}


def _divisors(
    soft_targets: torch.Tensor,
    stage: str,
    normalizers: Normalizers | None,
    copies: list[int] | None,
) -> tuple[list[tuple[slice, torch.Tensor]], torch.Tensor]:
    """What class losses are divided by, of some rows of images each, and what box losses are.

    Args:
        soft_targets: (L) or (), their sum in each layer.
        stage, normalizers, copies: see loss_from_assignment.
    """
    if normalizers is None:
        alone = soft_targets.clamp(min=1.0)
        return [(slice(None), alone)], alone
    if stage == "one_to_many":
        class_divisor, box_divisor = normalizers.soft(soft_targets)
        return [(slice(None), class_divisor)], box_divisor
    if copies is None:
        total = normalizers.step.matched
        shares = [normalizers.classes_of_group(number) for number in normalizers.rows]
    else:
        pairs = [n * group.boxes for n, group in zip(copies, normalizers.groups, strict=True)]
        total = sum(pairs)
        shares = [normalizers.of_group(pairs[number]) for number in normalizers.rows]
    entries = zip(normalizers.rows.values(), shares, strict=True)
    of_classes = [(rows, torch.full_like(soft_targets, share)) for rows, share in entries]
    return of_classes, torch.full_like(soft_targets, normalizers.of_step(total))


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
    normalizers: Normalizers | None = None,
    query_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """{"class", "l1", "giou"}, each the sum over all layers.

    Args:
        layers, targets: of the same images.
        assignment: (L, B, Q), from match_layers.
        stage: "one_to_many" or "one_to_one".
        loss_weights, normalizers, query_mask: see loss_from_assignment.
    """
    return loss_from_assignment(
        layers.logits,
        layers.boxes,
        targets._replace(labels=layers.labels(targets.labels)),
        assignment,
        stage,
        loss_weights,
        query_mask=query_mask,
        no_object=layers.no_object,
        normalizers=normalizers,
    )


def denoising_loss(
    outputs: Outputs,
    denoising_targets: DenoisingTargets,
    targets: PaddedTargets,
    loss_weights: LossWeights = LossWeights(),
    normalizers: Normalizers | None = None,
    copies: list[int] | None = None,
) -> dict[str, torch.Tensor]:
    """One-to-one losses of denoising queries, over the number of the positive ones.

    Args:
        outputs: of the denoising queries alone, an outputs dict.
        denoising_targets: what each denoising query is trained towards.
        targets: the boxes that the queries were made from.
        loss_weights, normalizers, copies: see loss_from_assignment.
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
        normalizers=normalizers,
        copies=copies,
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
            target_set.normalizers,
        )
        losses |= add_prefix(target_set.name, loss)
    return losses


def token_losses(outputs: Outputs, target_sets: list[TargetSet]) -> dict[str, torch.Tensor]:
    """The encoder's losses over all tokens: {"labelled tokens/class", ...}; mostly there are none.

    Deformable DETR (deformable_detr.py:157, 185) trains every token to say whether it is an object
    (class 0) and where, matched one-to-one in both stages of Semi-DETR. Tokens in the padding or
    without room for an anchor take no part.

    Args:
        outputs: of all images that the student sees.
        target_sets: of each kind of images.
    """
    encoder = outputs.get("encoder")
    if not encoder or "tokens" not in encoder:
        return {}
    tokens = encoder["tokens"]
    layers = Layers(tokens["pred_logits"][None], tokens["pred_boxes"][None], encoder=True)
    of_kinds = [layers.of_images(target_set.images) for target_set in target_sets]
    usable = [tokens["usable"][target_set.images] for target_set in target_sets]
    costs = copy_to_host(
        *(
            layer_costs(own, target_set.targets).masked_fill(~counts[..., None], NEVER_MATCHED)
            for own, target_set, counts in zip(of_kinds, target_sets, usable, strict=True)
        )
    )
    losses: dict[str, torch.Tensor] = {}
    for target_set, own, counts, its_costs in zip(
        target_sets, of_kinds, usable, costs, strict=True
    ):
        assignment = match_layers(
            own, target_set.targets, "one_to_one", costs=its_costs, valid=target_set.valid
        )
        loss = detection_loss(
            own,
            target_set.targets,
            assignment,
            "one_to_one",
            target_set.loss_weights,
            target_set.normalizers,
            query_mask=counts,
        )
        losses |= add_prefix(f"{target_set.name} tokens", loss)
    return losses


def denoising_losses(
    group_outputs: list[Outputs], denoising: list[DenoisingQueries], target_sets: list[TargetSet]
) -> dict[str, torch.Tensor]:
    """The denoising losses of each kind of images: {"labelled denoising/class", ...}.

    Args:
        group_outputs: an outputs dict per group, for all images that the student sees.
        denoising: the groups, in the same order.
        target_sets: of each kind of images with denoising: rows, weights and normalizers.
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
            target_set.normalizers,
            queries.copies,
        )
        losses |= add_prefix(f"{target_set.name} denoising", loss)
    return losses
