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
from semidetr_lite.detectors.denoising import Answers
from semidetr_lite.detectors.detector import Detector, best_boxes
from semidetr_lite.detectors.transformer import QueryGroup, batch_rows
from semidetr_lite.device import to_device, to_host
from semidetr_lite.losses import (
    Count,
    LossWeights,
    count_boxes,
    denoising_loss,
    detection_loss,
    layer_costs,
    stack_layers,
)
from semidetr_lite.matching import PaddedTargets, pad_targets

LABELLED, UNLABELLED = range(2)  # separate streams of random numbers
TOLD = {"labelled": ("labelled", LABELLED), "pseudo": ("strong", UNLABELLED)}  # boxes: their view, their stream


class Questions(NamedTuple):
    """Denoising of some images of a batch, asked beside its matching queries."""

    group: QueryGroup  # of all its images
    rows: slice  # the images asked about
    targets: PaddedTargets
    answers: Answers


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

    candidates = 13  # of one-to-many matching, which only Semi-DETR has

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

    def counted(self, batch: dict, step: int) -> dict:
        """A batch with "counts", its own if it has none yet."""
        return batch if "counts" in batch else self.look_ahead([batch], step)[0]

    def questions(self, boxes: dict[str, PaddedTargets], batch: dict, step: int) -> dict[str, Questions]:
        """Denoising of the "labelled" and the "pseudo" boxes, whichever are given; none of no box, or without a
        detector that has it. The boxes are filled up to the most of their Count.
        """
        asked, places = {}, places_of(batch)
        images = max(rows.stop for rows in places.values())
        for name, targets in boxes.items() if self.student.denoising else ():
            view, stream = TOLD[name]
            made = self.student.denoising(*targets, self.rngs(step, stream, batch[view][1]))
            if made:
                group, answers = made
                asked[name] = Questions(group.among(places[name], images), places[name], targets, answers)
        return asked

    def denoise(self, group: dict, questions: Questions, weights: LossWeights, count: Count) -> dict:
        """Losses of what the student answers, an outputs dict for all images, to the questions about some."""
        answered = batch_rows(group, questions.rows)
        return denoising_loss(answered, questions.answers, questions.targets, weights, count)

    def compare(self, batch: dict, student: tuple, boxes: dict, decided: dict, stage: str, asked: dict) -> dict:
        """Losses of what the student says, also in answer to what it was `asked` (see questions).

        Args:
            batch: with "counts".
            student: its outputs, and their layers.
            boxes: PaddedTargets of the "labelled" and the "pseudo" boxes.
            decided: for each, valid (B, T) bool on the host, which replaces theirs, and costs (see detection_loss).
        """
        outputs, layers = student
        groups, places, losses = dict(zip(asked, outputs["groups"], strict=True)), places_of(batch), {}
        for name, targets in boxes.items():
            (valid, costs), count, rows = decided[name], batch["counts"][name], places[name]
            weights = self.weights if name == "labelled" else self.pseudo_weights
            on_device = to_device(torch.from_numpy(valid), targets.boxes.device)
            targets = filled_up(targets._replace(valid=on_device), count.most)
            how = {"candidates": self.candidates, "weights": weights, "count": count}
            losses |= named(name, detection_loss(layers.rows(rows), targets, stage, costs, valid, **how))
            if name in asked:
                losses |= named(f"{name} denoising", self.denoise(groups[name], asked[name], weights, count))
        return losses


def places_of(batch: dict) -> dict[str, slice]:
    """Among the images the student sees, those of the "labelled" and of the "pseudo" boxes."""
    edge = len(batch["labelled"][0])
    unlabelled = {"pseudo": slice(edge, edge + len(batch["strong"][0]))} if "strong" in batch else {}
    return {"labelled": slice(0, edge)} | unlabelled


def named(prefix: str, losses: dict) -> dict:
    """{"class": x} -> {"prefix/class": x}."""
    return {f"{prefix}/{name}": value for name, value in losses.items()}


class PseudoBoxes(NamedTuple):
    """The teacher's boxes on the weak views, at most K an image, best first."""

    boxes: torch.Tensor  # (B, K, 4) xyxy pixels of the weak view
    scores: torch.Tensor  # (B, K)
    labels: torch.Tensor  # (B, K)
    valid: torch.Tensor  # (B, K) bool

    def over(self, cut: float) -> torch.Tensor:
        """(B, K) bool: those of at least this score."""
        return self.valid & (self.scores >= cut)

    def carried(self, weak: list[dict], strong: list[dict]) -> PaddedTargets:
        """The boxes in model coordinates of the strong views; those out of view are not valid."""
        matrices = torch.stack([s["matrix"] @ torch.linalg.inv(w["matrix"]) for w, s in zip(weak, strong, strict=True)])
        matrices, sizes = (to_device(entry, self.boxes.device) for entry in (matrices, target_sizes(strong)))
        boxes, keep = map_boxes(self.boxes, matrices, sizes)
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
        batch = self.counted(batch, step)
        (images, truths), (strong_images, _) = batch["labelled"], batch["strong"]
        pseudo, counts, confident = batch["look"].pseudo, batch["counts"], self.confident(batch["look"])
        self.count_pseudo(pseudo.labels, pseudo.over(self.score_cut), len(strong_images))
        boxes = {"labelled": pad_targets(truths, confident.boxes.device), "pseudo": confident}
        boxes = {name: filled_up(targets, counts[name].most) for name, targets in boxes.items()}
        asked = self.questions(boxes, batch, step)

        outputs = self.student([*images, *strong_images], [questions.group for questions in asked.values()])
        layers = stack_layers(outputs)
        found = [(layer_costs(layers.rows(places_of(batch)[name]), boxes[name]), boxes[name].valid) for name in boxes]
        costs, valid, pseudo_costs, pseudo_valid = one_transfer(*found[0], *found[1])
        self.stats = {"pseudo_per_image": float(pseudo_valid.sum() / len(strong_images))}
        decided = {"labelled": (valid, costs), "pseudo": (pseudo_valid, pseudo_costs)}
        return self.compare(batch, (outputs, layers), boxes, decided, "one_to_one", asked)

    def look(self, batch: dict, step: int) -> Look:
        """The teacher's boxes on the weak views of a batch."""
        (images, weak), (_, strong) = batch["weak"], batch["strong"]
        with torch.no_grad():
            pseudo = pseudo_boxes(self.teacher(images), target_sizes(weak), self.most, self.nms)
        return Look(pseudo, pseudo.carried(weak, strong), None, None)

    def minable(self, pseudo: PseudoBoxes) -> torch.Tensor:
        """(B, K) bool: the boxes that mining chooses from, none here."""
        return torch.zeros_like(pseudo.valid)

    def mined(self, matched: np.ndarray, threshold: float, minable: np.ndarray) -> np.ndarray:
        """(B, K) bool: the boxes mined, of Hungarian costs `matched` (nan: unmatched); without a rule all minable."""
        return minable

    def confident(self, look: Look) -> PaddedTargets:
        """In the strong views, the boxes over the score cut."""
        return look.carried._replace(valid=look.carried.valid & (look.pseudo.scores >= self.score_cut))

    def look_ahead(self, parts: list[dict], step: int) -> list[dict]:
        """See Averaged; also what the teacher sees, "look"."""
        looks = [self.look(part, step) for part in parts]
        confident = one_transfer(*(self.confident(look).valid for look in looks))
        truths = [pad_targets(part["labelled"][1]).valid.numpy() for part in parts]
        queries = self.student.num_queries
        counts = {"labelled": count_boxes(truths, queries), "pseudo": count_boxes(confident, queries)}
        return [{**part, "look": look, "counts": counts} for part, look in zip(parts, looks, strict=True)]


def one_transfer(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Several tensors to the host in one go, as numpy arrays of their own shapes; bools come back as bools."""
    flat = to_host(torch.cat([tensor.detach().float().flatten() for tensor in tensors]))
    pieces, start = [], 0
    for tensor in tensors:
        piece = flat[start : start + tensor.numel()].reshape(tensor.shape)
        pieces.append(piece > 0.5 if tensor.dtype == torch.bool else piece)
        start += tensor.numel()
    return pieces
