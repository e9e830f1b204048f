"""Mean teacher for detection transformers: a slow average of the student labels the images nobody labelled.

    teacher(weak view) -> boxes over the score cut -> the strong view by matrix -> targets of student(strong view)

This is the plain method of the comparison: one-to-one matching, no consistency, no mining ("DINO SSOD" in the paper's
tables).

Differences from the released code: buffers are averaged too, and the teacher stays in eval mode.
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from semidetr_lite import distributed
from semidetr_lite.boxes import to_model
from semidetr_lite.data.views import map_boxes
from semidetr_lite.detectors.detector import Detector, best_boxes
from semidetr_lite.detectors.transformer import output_rows
from semidetr_lite.losses import (
    Count,
    LossWeights,
    count_boxes,
    denoising_loss,
    detection_loss,
    layer_costs,
    stack_layers,
    to_host,
)
from semidetr_lite.matching import PaddedTargets, pad_targets

LABELLED, UNLABELLED = range(2)  # separate streams of random numbers


def ema_momentum(step: int, ceiling: float = 0.999) -> float:
    """How much of itself the teacher keeps before iteration `step` (released code: mean_teacher.py:37-50)."""
    return min(ceiling, 1 - 1 / (step + 1))


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student; buffers that are no floats are copied."""
    pairs = list(zip((*teacher.parameters(), *teacher.buffers()), (*student.parameters(), *student.buffers())))
    torch._foreach_lerp_(*map(list, zip(*(pair for pair in pairs if pair[0].is_floating_point()))), 1 - momentum)
    for buffer, source in pairs:
        if not buffer.is_floating_point():
            buffer.copy_(source)


class Averaged(nn.Module):
    """What all methods share: a student, its average (the teacher), and losses on labelled images.

    Args:
        student: the detector.
        ema_ceiling: the teacher's horizon is about 1 / (1 - ema_ceiling) steps.
        seed: of the denoising noise.
        weights: of the losses.
    """

    def __init__(self, student: Detector, ema_ceiling=0.999, seed: int = 0, weights: LossWeights = LossWeights()):
        super().__init__()
        self.student, self.teacher = student, copy.deepcopy(student).requires_grad_(False).eval()
        self.ema_ceiling, self.seed, self.weights = ema_ceiling, seed, weights
        self.stats: dict[str, float] = {}  # of the last step, for the log
        self.register_buffer("pseudo_counts", torch.ones(student.num_classes) / student.num_classes)

    def train(self, mode: bool = True):
        super().train(mode)
        self.teacher.eval()
        return self

    def after_step(self, step: int) -> None:
        """Move the teacher; call it after the optimizer's step number `step`."""
        ema_update(self.teacher, self.student, ema_momentum(step + 1, self.ema_ceiling))

    def count_pseudo(self, labels: torch.Tensor, keep: torch.Tensor, images: int) -> None:
        """Running mean over about 50 steps of the pseudo-boxes of each class in an image: those of `labels` to keep."""
        counts = torch.zeros_like(self.pseudo_counts).index_add_(0, labels.flatten(), keep.flatten().float())
        self.pseudo_counts.lerp_(distributed.mean(counts / images), 0.02)

    def alarm(self) -> str | None:
        """What has happened if the teacher has collapsed: hardly any pseudo-box for long, or all of one class."""
        counts = self.pseudo_counts.tolist()
        if sum(counts) < 0.01:
            return "no pseudo-boxes for long; lower the score cut or start from a longer burn-in"
        if len(counts) > 1 and max(counts) > 0.998 * sum(counts):
            return f"all pseudo-boxes are of one class (number {counts.index(max(counts))}) for long"
        return None

    def look_ahead(self, parts: list[dict], step: int) -> list[dict]:
        """The parts of a step with "counts" of all of them, {name: Count}; where no loss needs any, as they are."""
        return parts

    def rngs(self, step: int, stream: int, targets: list[dict]) -> list[np.random.Generator]:
        """A generator for each image, from (seed, step, position in the whole step) alone."""
        places = [target.get("position", place) for place, target in enumerate(targets)]
        return [np.random.default_rng([self.seed, 7, stream, step, place]) for place in places]

    def draw(self, step: int, stream: int) -> int:
        """A seed for what torch draws in a step."""
        return int(np.random.default_rng([self.seed, 8, stream, step]).integers(2**63))

    def denoise(self, memory, outputs: dict, boxes: PaddedTargets, weights, step, stream, views, count: Count) -> dict:
        """Denoising losses beside the kept matching queries, {} without any box or if the detector has no denoising.

        boxes: filled up to count.most; views: the target dicts of the same images.
        """
        if self.student.denoising is None:
            return {}
        made = self.student.denoising(*boxes, self.rngs(step, stream, views))
        if made is None:
            return {}
        group, answers = made
        return denoising_loss(self.student.decode_groups(memory, outputs, [group])[0], answers, boxes, weights, count)


def named(prefix: str, losses: dict) -> dict:
    """{"class": x} -> {"prefix/class": x}."""
    return {f"{prefix}/{name}": value for name, value in losses.items()}


class PseudoBoxes(NamedTuple):
    """The teacher's boxes on the weak views, at most K an image, best first."""

    boxes: torch.Tensor  # (B, K, 4) xyxy pixels of the weak view
    scores: torch.Tensor  # (B, K)
    labels: torch.Tensor  # (B, K)
    valid: torch.Tensor  # (B, K) bool

    def carried(self, weak: list[dict], strong: list[dict]) -> PaddedTargets:
        """The boxes in model coordinates of the strong views; those out of view are not valid."""
        device = self.boxes.device
        matrices = torch.stack([s["matrix"] @ torch.linalg.inv(w["matrix"]) for w, s in zip(weak, strong, strict=True)])
        sizes = torch.tensor([target["size"] for target in strong], device=device)
        boxes, keep = map_boxes(self.boxes, matrices.to(device), sizes)
        return PaddedTargets(to_model(boxes, sizes), self.labels, self.valid & keep)


def pseudo_boxes(outputs: dict, sizes: torch.Tensor, most: int, nms: float) -> PseudoBoxes:
    """Teacher's outputs -> its at most `most` best boxes after class-wise suppression, scores over 0.01.

    sizes: (B, 2) of the weak views. Suppressed in both stages (released code: dino_detr_ssod_head.py:1371-1395).
    """
    boxes, scores, labels, valid = best_boxes(outputs, sizes, 3 * most, 0.01, nms)
    # valid ones to the front, still by score
    first = valid.long().sort(dim=1, descending=True, stable=True).indices[:, :most]
    boxes = boxes.gather(1, first[..., None].expand(-1, -1, 4))
    return PseudoBoxes(boxes, scores.gather(1, first), labels.gather(1, first), valid.gather(1, first))


class Look(NamedTuple):
    """What the teacher sees in the weak views."""

    pseudo: PseudoBoxes
    carried: PaddedTargets  # the same in the strong views
    minable: torch.Tensor | None  # (B, K) bool, what Semi-DETR's mining chooses from
    teacher: tuple | None  # its memory and outputs, where the step needs them again


def filled_up(targets: PaddedTargets, most: int) -> PaddedTargets:
    """Targets with `most` columns: others filled up, or those behind left out."""
    boxes, labels, valid = (entry[:, :most] for entry in targets)
    more = most - valid.shape[1]
    return PaddedTargets(F.pad(boxes, (0, 0, 0, more)), F.pad(labels, (0, more)), F.pad(valid, (0, more)))


def target_sizes(targets: list[dict]) -> torch.Tensor:
    """(B, 2) (H, W) of each image."""
    return torch.tensor([target["size"] for target in targets])


class MeanTeacher(Averaged):
    """The method.

    Args:
        student, ema_ceiling, seed, weights: see Averaged.
        score_cut: pseudo-boxes of at least this score are targets.
        unlabelled_weight: of all losses on unlabelled images.
        unlabelled_box_weight: further factor of their box losses, since a pseudo-box may be right and yet loose.
        most: pseudo-boxes looked at in an image.
        nms: IoU of the suppression of pseudo-boxes.
    """

    candidates = 13  # of one-to-many matching, which only Semi-DETR has

    def __init__(
        self,
        student: Detector,
        score_cut: float = 0.4,
        unlabelled_weight: float = 4.0,
        unlabelled_box_weight: float = 1.0,
        most: int = 100,
        nms: float = 0.6,
        **shared,
    ):
        super().__init__(student, **shared)
        self.score_cut, self.unlabelled_weight, self.most, self.nms = score_cut, unlabelled_weight, most, nms
        self.pseudo_weights = self.weights.times(unlabelled_weight, unlabelled_box_weight)

    def forward(self, batch: dict, step: int) -> dict[str, torch.Tensor]:
        """A batch with "labelled", "weak" and "strong" -> weighted losses."""
        (images, truths), (strong_images, strong) = batch["labelled"], batch["strong"]
        pseudo, carried, *_ = batch.get("look") or self.look(batch, step)
        confident = carried._replace(valid=carried.valid & (pseudo.scores >= self.score_cut))
        self.count_pseudo(pseudo.labels, pseudo.valid & (pseudo.scores >= self.score_cut), len(strong))
        targets = pad_targets(truths, next(self.parameters()).device).join(confident)

        memory = self.student.encode([*images, *strong_images])
        outputs = self.student.decode(memory)
        layers = stack_layers(outputs)
        costs, valid = one_transfer(layer_costs(layers, targets), targets.valid)
        self.stats = {"pseudo_per_image": float(valid[len(images) :].sum() / len(strong))}

        rows = {"labelled": slice(0, len(images)), "pseudo": slice(len(images), None)}
        decided = {name: (valid[own], costs[:, own]) for name, own in rows.items()}
        boxes = {name: PaddedTargets(*(entry[own] for entry in targets)) for name, own in rows.items()}
        return self.compare(batch, (memory, outputs, layers), boxes, decided, "one_to_one", step)

    def look(self, batch: dict, step: int) -> Look:
        """The teacher's boxes on the weak views of a batch."""
        (images, weak), (_, strong) = batch["weak"], batch["strong"]
        with torch.no_grad():
            pseudo = pseudo_boxes(self.teacher(images), target_sizes(weak), self.most, self.nms)
        return Look(pseudo, pseudo.carried(weak, strong), None, None)

    def look_ahead(self, parts: list[dict], step: int) -> list[dict]:
        """See Averaged; also what the teacher sees, "look"."""
        looks = [self.look(part, step) for part in parts]
        confident = one_transfer(*(c.valid & (pseudo.scores >= self.score_cut) for pseudo, c, *_ in looks))
        truths = [pad_targets(part["labelled"][1]).valid.numpy() for part in parts]
        queries = self.student.num_queries
        counts = {"labelled": count_boxes(truths, queries), "pseudo": count_boxes(confident, queries)}
        return [{**part, "look": look, "counts": counts} for part, look in zip(parts, looks, strict=True)]

    def compare(self, batch: dict, student: tuple, boxes: dict, decided: dict, stage: str, step: int) -> dict:
        """Losses of what the student says, with denoising where boxes are matched one-to-one.

        Args:
            batch: with "counts", or they are those of this batch.
            student: its memory, outputs and layers: the labelled images, then the unlabelled ones.
            boxes: PaddedTargets of the "labelled" and the "pseudo" boxes; labelled ones are denoised in both stages.
            decided: for each, valid (B, T) bool on the host, which replaces theirs, and costs (see detection_loss).
        """
        memory, outputs, layers = student
        edge, queries = len(batch["labelled"][0]), layers.logits.shape[2]
        counts = batch.get("counts") or {name: count_boxes([decided[name][0]], queries) for name in boxes}
        losses = {}
        for name, rows, view, stream, weights in (
            ("labelled", slice(0, edge), "labelled", LABELLED, self.weights),
            ("pseudo", slice(edge, None), "strong", UNLABELLED, self.pseudo_weights),
        ):
            count, (valid, costs) = counts[name], decided[name]
            on_device = torch.from_numpy(valid).to(boxes[name].boxes.device)
            targets = filled_up(boxes[name]._replace(valid=on_device), count.most)
            how = {"candidates": self.candidates, "weights": weights, "count": count}
            losses |= named(name, detection_loss(layers.rows(rows), targets, stage, costs, valid, **how))
            if name == "labelled" or stage == "one_to_one":
                here = memory.rows(rows), output_rows(outputs, rows), targets
                noise = self.denoise(*here, weights, step, stream, batch[view][1], count)
                losses |= named(f"{name} denoising", noise)
        return losses


def one_transfer(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Several tensors to the host in one go, as numpy arrays of their own shapes; bools come back as bools."""
    flat = to_host(torch.cat([tensor.detach().float().flatten() for tensor in tensors]))
    pieces, start = [], 0
    for tensor in tensors:
        piece = flat[start : start + tensor.numel()].reshape(tensor.shape)
        pieces.append(piece > 0.5 if tensor.dtype == torch.bool else piece)
        start += tensor.numel()
    return pieces
