"""From pairs to losses: class, L1 and GIoU, for every decoder layer, the encoder's proposals and the denoising groups.

One-to-one (DINO; released code: dino_detr_ssod_head.py:751-804): focal loss, weighted 2, over the number of pairs; L1
(5) and GIoU (2) of the pairs over the same. One-to-many (paper section 3.2; released code:
dino_detr_ssod_head.py:665-749): quality focal loss, weighted 2, over the sum of the soft targets; L1 and GIoU
weighted by the soft targets, over the same sum. Every normaliser is that of the whole batch, also where processes or
parts of a step share it (Count), and at least 1. For one-to-many it is a part's, in all processes: the soft targets of
the next part are not known yet.

DETR's scores by softmax over C classes and "no object" (detr.py) have cross-entropy instead, one-to-one only, in which
"no object" weighs a tenth and the mean is over the weights; class cost and class loss count once there, not twice.

Difference from the released code: L1 counts once (there a key meant for the log doubles it; the COCO presets pass
l1_weight=10). Proposals of the encoder are trained class-agnostically, on channel 0, as there.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert

from semidetr_lite import distributed
from semidetr_lite.boxes import overlaps
from semidetr_lite.detectors.denoising import Answers
from semidetr_lite.device import to_device, to_host
from semidetr_lite.matching import PaddedTargets, assign_one_to_many, assign_one_to_one, batched_cost, pad_targets


def quality_focal_loss(logits: torch.Tensor, quality: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """The sum of |y - p|^gamma * BCE(p, y): p = sigmoid(logits) (N, C), soft targets y = quality (N, C) in [0, 1]."""
    return _focal(logits, quality, gamma).sum()


def _focal(logits, quality, gamma: float = 2.0, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    """The quality focal loss of each entry; with hard targets and a weight it is the focal loss."""
    logits = logits.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return weight * (quality - logits.sigmoid()).abs() ** gamma * cross_entropy


NO_OBJECT_WEIGHT = 0.1  # of the cross-entropy of queries that should answer "no object" (DETR)


class Count(NamedTuple):
    """The images and boxes of a whole step, in all its parts and processes."""

    images: int
    pairs: int  # of one-to-one matching
    boxes: int
    most: int  # columns of targets that the image with most needs
    shares: int  # parts times processes

    def each(self, total: float) -> float:
        """What a share divides by, so that the mean of all shares is their sum over `total`, at least 1."""
        return max(total, 1.0) / self.shares


def count_boxes(parts: list[np.ndarray], queries: int) -> Count:
    """Counts of the valid targets, bool (B, T) on the host, of this process's parts and all others'; Q queries."""
    rows = [
        (len(p), np.minimum(p.sum(1), queries).sum(), p.sum(), (p.any(0) * np.arange(1, p.shape[1] + 1)).max(initial=0))
        for p in parts
    ]
    found = np.array(distributed.gather(rows), dtype=np.int64).reshape(-1, 4)
    return Count(*found[:, :3].sum(0).tolist(), int(found[:, 3].max()), len(found))


def _cross_entropy(logits, labels, assigned, count: Count | None) -> torch.Tensor:
    """Weighted mean per layer: logits (..., B, Q, C + 1), labels (..., B, Q) of the targets, assigned (..., B, Q)."""
    nothing = assigned < 0
    labels = torch.where(nothing, logits.shape[-1] - 1, labels)
    each = -logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    weight = torch.where(nothing, NO_OBJECT_WEIGHT, 1.0)
    if count is None:
        return (each * weight).sum((-2, -1)) / weight.sum((-2, -1))
    rest = count.images * assigned.shape[-1] - count.pairs
    return (each * weight).sum((-2, -1)) / count.each(count.pairs + NO_OBJECT_WEIGHT * rest)


class LossWeights(NamedTuple):
    """Of the three losses. The matching cost keeps 2 / 5 / 2."""

    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0

    def times(self, factor: float, boxes: float = 1.0) -> "LossWeights":
        """All of them times `factor`, those of boxes also times `boxes`."""
        of_class, *of_boxes = (weight * factor for weight in self)
        return LossWeights(of_class, *(weight * boxes for weight in of_boxes))


def layer_loss(
    logits, pred_boxes, targets: list[dict], stage: str, candidates: int = 13, weights: LossWeights = LossWeights()
) -> dict:
    """The loss of one layer: {"class", "l1", "giou"}, weighted and normalised over the batch.

    Args:
        logits, pred_boxes: (B, Q, C) and (B, Q, 4) cxcywh in [0, 1].
        targets: B target dicts; crowd regions are left out.
        stage: "one_to_many" or "one_to_one".
        candidates: of the one-to-many matching.
    """
    layers, padded = Layers(logits[None], pred_boxes[None], encoder=False), pad_targets(targets, logits.device)
    costs = to_host(layer_costs(layers, padded)) if stage == "one_to_one" else None
    return detection_loss(layers, padded, stage, costs, to_host(padded.valid), candidates, weights)


def dense_loss(
    logits, pred_boxes, targets: PaddedTargets, assigned, quality, stage: str, weights: LossWeights = LossWeights(),
    seen=None, no_object: bool = False, count: Count | None = None, copies: int = 0,
) -> dict:  # fmt: skip
    """Losses of finished assignments, without leaving the device.

    Args:
        logits, pred_boxes: (B, Q, C), (B, Q, 4); or (L, B, Q, ...) for several layers, each normalised by itself and
            then summed.
        assigned: (..., B, Q) index of the target, -1 for none.
        quality: (..., B, Q) soft class target, 0 where unassigned.
        seen: (B, Q) bool, queries that count at all; None for all.
        no_object: whether the last logit is "no object" of a softmax; one-to-one only.
        count: what one-to-one losses are divided by; None for this batch's own pairs.
        copies: how often each box was asked for, if these are questions of denoising.
    """
    index = assigned.clamp(min=0)
    if targets.valid.shape[1]:
        labels = targets.labels.expand(*assigned.shape[:-2], -1, -1).gather(-1, index)
        boxes = targets.boxes.expand(*assigned.shape[:-2], -1, -1, -1)
        boxes = boxes.gather(-2, index[..., None].expand(*index.shape, 4))
    else:
        labels, boxes = index, torch.full_like(pred_boxes, 0.5, dtype=torch.float32)
    norm = quality.float().sum((-2, -1))  # one per layer
    if count is None:
        norm = norm.clamp(min=1.0)
    elif stage == "one_to_many":
        norm = (distributed.mean(norm) * distributed.world()).clamp(min=1.0) / distributed.world()
    else:
        norm = torch.full_like(norm, count.each(copies * count.boxes if copies else count.pairs))
    if no_object:
        classes = weights.class_weight / 2 * _cross_entropy(logits, labels, assigned, count)
    else:
        chosen = quality[..., None].float()
        wanted = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, labels[..., None], chosen)
        each = _focal(logits, wanted, weight=1.0 if stage == "one_to_many" else torch.where(wanted > 0, 0.25, 0.75))
        each = each if seen is None else each * seen[..., None]
        classes = weights.class_weight * each.sum((-3, -2, -1)) / norm
    l1 = (pred_boxes.float() - boxes).abs().sum(-1)
    giou = 1 - overlaps(box_convert(pred_boxes.float(), "cxcywh", "xyxy"), box_convert(boxes, "cxcywh", "xyxy"))[1]
    return {
        "class": classes.sum(),
        "l1": (weights.l1_weight * (l1 * quality).sum((-2, -1)) / norm).sum(),
        "giou": (weights.giou_weight * (giou * quality).sum((-2, -1)) / norm).sum(),
    }


class Layers(NamedTuple):
    """All layers of an outputs dict: the decoder's, first to last, then the encoder's proposals if there are any."""

    logits: torch.Tensor  # (L, B, Q, C)
    boxes: torch.Tensor  # (L, B, Q, 4)
    encoder: bool  # whether the last entry is the encoder's
    no_object: bool = False  # whether the last logit is "no object" of a softmax

    def rows(self, rows: slice) -> "Layers":
        """The same layers for some images of the batch."""
        return self._replace(logits=self.logits[:, rows], boxes=self.boxes[:, rows])


def stack_layers(outputs: dict) -> Layers:
    """outputs -> Layers."""
    layers = [*outputs["aux_outputs"], outputs, *([outputs["encoder"]] if outputs.get("encoder") else [])]
    stacked = (torch.stack([layer[key] for layer in layers]) for key in ("pred_logits", "pred_boxes"))
    return Layers(*stacked, bool(outputs.get("encoder")), bool(outputs.get("no_object")))


def layer_costs(layers: Layers, targets: PaddedTargets) -> torch.Tensor:
    """Matching costs (L, B, Q, T) of all layers; the encoder's proposals are priced as class 0."""
    kind = {"class_cost": "softmax", "class_weight": 1.0} if layers.no_object else {}
    labels = _layer_labels(layers, targets)
    return batched_cost(layers.logits.detach(), layers.boxes.detach(), targets.boxes, labels, **kind)


def _layer_labels(layers: Layers, targets: PaddedTargets) -> torch.Tensor:
    """(L, B, T) labels as each layer sees them."""
    labels = targets.labels.expand(len(layers.logits), -1, -1)
    if layers.encoder:
        labels = torch.cat([labels[:-1], torch.zeros_like(labels[-1:])])
    return labels


def detection_loss(
    layers: Layers, targets: PaddedTargets, stage: str, costs=None, valid=None, candidates=13, weights=LossWeights(),
    count: Count | None = None,
) -> dict:  # fmt: skip
    """The sum over all layers of {"class", "l1", "giou"}.

    Args:
        layers, targets: of the same images.
        stage: "one_to_many" or "one_to_one".
        costs, valid: for one-to-one, on the host: numpy (L, B, Q, T) from `layer_costs`, and `targets.valid`.
        candidates: for one-to-many.
        count: see dense_loss.
    """
    targets = targets._replace(labels=_layer_labels(layers, targets))
    if stage == "one_to_many":
        assigned, quality = assign_one_to_many(layers.logits, layers.boxes, targets, candidates=candidates)
    else:
        assigned = to_device(torch.from_numpy(assign_one_to_one(costs, valid)), layers.logits.device)
        quality = (assigned >= 0).float()
    kind = {"weights": weights, "no_object": layers.no_object, "count": count}
    return dense_loss(layers.logits, layers.boxes, targets, assigned, quality, stage, **kind)


def denoising_loss(group: dict, answers: Answers, targets: PaddedTargets, weights=LossWeights(), count=None) -> dict:
    """One-to-one losses of a denoising group whose answers are known, over the number of its positive questions."""
    copies = answers.valid.shape[1] // (2 * targets.valid.shape[1])
    layers = stack_layers(group)
    assigned = answers.targets.expand(len(layers.logits), -1, -1)
    quality = (assigned >= 0).float()
    how = {"seen": answers.valid, "count": count, "copies": copies}
    return dense_loss(layers.logits, layers.boxes, targets, assigned, quality, "one_to_one", weights, **how)
