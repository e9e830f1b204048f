"""Soft Teacher (Xu et al., ICCV 2021): Faster R-CNN learns from the boxes of its average, each loss with its own trust.

    teacher(weak view) -> boxes -> score over the cut -> targets of the class losses of student(strong view)
                                -> steady under jitter -> targets of its box loss

A pseudo-box of high score is mostly right, but there are few of them, so that much of what they call background is a
missed object. Therefore the teacher also judges every box the student is trained on (section 3.2, Soft Teacher;
Eq. 4 and 5): with r_j the teacher's background score of the j-th proposal without a pseudo-box,

    L_class = 1 / N_fg * sum_i l(foreground proposal i) + sum_j w_j l(background proposal j),   w_j = r_j / sum_k r_k.

And a high score does not say that a box is tight. A tight one is found again from wherever the search begins (section
3.3, Box jittering; Eq. 6 to 8): jittered N times and refined by the teacher, its four coordinates have standard
deviations s_1 ... s_4; the boxes with mean_k s_k / (0.5 (height + width)) below a cut are the targets of the box loss.

Differences from the released code (github.com/microsoft/SoftTeacher): it divides the weighted class loss by
N_fg + sum_k r_k as a whole; it draws the jitter from a normal distribution (here uniform, as in the paper; from
memory) and divides by the sides of the mean refined box. As there: cuts 0.9, 0.5 and 0.02, ten jitters of 6 %, weight
4; region proposals learn from the boxes over the score cut; the box loss is the sum over the foreground divided by all
sampled proposals. Equation numbers are cited from memory.
"""

import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import fastrcnn_loss

from semidetr_lite.data.views import map_boxes, map_target
from semidetr_lite.detectors.pyramid import FasterRCNN, Seen, drawn
from semidetr_lite.methods.mean_teacher import LABELLED, UNLABELLED, Averaged, named


def soft_class_loss(logits: torch.Tensor, labels: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """The class loss of Eq. 4 and 5, a scalar.

    logits: (N, 1 + C) of the student, background first; labels: (N,), 0 where a proposal has no pseudo-box;
        background: (N,) the teacher's background scores r of the same proposals.
    """
    each = F.cross_entropy(logits, labels, reduction="none")
    foreground = labels > 0
    weight = torch.where(foreground, 0.0, background)
    return each[foreground].sum() / foreground.sum().clamp(min=1) + (each * weight).sum() / weight.sum().clamp(min=1e-6)


def box_spread(refined: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """How far refinements of one box lie apart (Eq. 7 and 8), in units of half its height plus width.

    refined: (J, T, 4) the boxes (T, 4) after each jitter, xyxy -> (T,) mean of the four standard deviations.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).sum(-1).clamp(min=1)
    return refined.std(0).mean(-1) / (0.5 * sides)


def chosen(target: dict, keep: torch.Tensor) -> dict:
    """The entries of a detection where `keep` (T,) is True."""
    return {**target, **{key: target[key][keep] for key in ("boxes", "labels", "scores")}}


class SoftTeacher(Averaged):
    """The method; the defaults are the paper's for COCO.

    Args:
        student: a Faster R-CNN.
        score_cut: pseudo-boxes of at least this score are targets of the class losses.
        box_score_cut: pseudo-boxes of at least this score are jittered.
        spread_cut: those whose spread is less are targets of the box loss.
        jitters: how often.
        jitter: how far a coordinate is moved at most, of the box's side.
        unlabelled_weight: of all losses on unlabelled images.
        unlabelled_box_weight: further factor of their box losses.
        most: pseudo-boxes looked at in an image.
        shared: ema_ceiling and seed, see Averaged.
    """

    def __init__(
        self,
        student: FasterRCNN,
        score_cut: float = 0.9,
        box_score_cut: float = 0.5,
        spread_cut: float = 0.02,
        jitters: int = 10,
        jitter: float = 0.06,
        unlabelled_weight: float = 4.0,
        unlabelled_box_weight: float = 1.0,
        most: int = 100,
        **shared,
    ):
        super().__init__(student, **shared)
        self.score_cut, self.box_score_cut, self.spread_cut = score_cut, box_score_cut, spread_cut
        self.jitters, self.jitter, self.most = jitters, jitter, most
        self.unlabelled_weight, self.unlabelled_box_weight = unlabelled_weight, unlabelled_box_weight

    def forward(self, batch: dict, step: int) -> dict[str, torch.Tensor]:
        """A batch with "labelled", "weak" and "strong" -> weighted losses."""
        (images, truths), (weak_images, weak), (strong_images, strong) = (
            batch[key] for key in ("labelled", "weak", "strong")
        )
        losses = named("labelled", self.student.losses(images, truths, self.draw(step, LABELLED)))
        with torch.no_grad():
            judge = self.teacher.see(weak_images)
            confident, steady = self.pseudo_targets(judge, step)
        matrices = [s["matrix"] @ torch.linalg.inv(w["matrix"]) for w, s in zip(weak, strong, strict=True)]
        confident, steady = (
            [map_target(one, m, s["size"]) for one, m, s in zip(found, matrices, strong, strict=True)]
            for found in (confident, steady)
        )
        self.stats = {
            name: sum(len(one["labels"]) for one in found) / len(strong)
            for name, found in (("pseudo_per_image", confident), ("steady_per_image", steady))
        }
        seed = self.draw(step, UNLABELLED)
        found = self.unlabelled_losses(self.student.see(strong_images), confident, steady, judge, matrices, seed)
        weights = {name: self.unlabelled_weight for name in found}
        for name in ("proposals", "boxes"):
            weights[name] *= self.unlabelled_box_weight
        return losses | named("pseudo", {name: loss * weights[name] for name, loss in found.items()})

    def pseudo_targets(self, judge: Seen, step: int) -> tuple[list[dict], list[dict]]:
        """The teacher's boxes over the score cut, and those steady under jitter, in pixels of the weak views."""
        least = min(self.score_cut, self.box_score_cut)
        found = self.teacher.found(judge, least, self.most, self.teacher.nms)
        candidates = [chosen(one, one["scores"] >= self.box_score_cut) for one in found]
        spreads = self.spreads(judge, candidates, step)
        steady = [chosen(one, spread < self.spread_cut) for one, spread in zip(candidates, spreads, strict=True)]
        return [chosen(one, one["scores"] >= self.score_cut) for one in found], steady

    def spreads(self, judge: Seen, found: list[dict], step: int) -> list[torch.Tensor]:
        """box_spread of each image's boxes, (T,)."""
        jittered = []
        for one, rng in zip(found, self.rngs(step, UNLABELLED, len(found)), strict=True):
            boxes = one["boxes"]
            sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
            moved = boxes.new_tensor(rng.uniform(-self.jitter, self.jitter, (self.jitters, *boxes.shape))) * sides
            jittered.append((boxes + moved).flatten(0, 1))
        _, codes = self.teacher.classify(judge, jittered)
        pieces = self.teacher.refined(codes, jittered).split([len(boxes) for boxes in jittered])
        spreads = []
        for one, refined in zip(found, pieces, strict=True):
            labels = one["labels"].repeat(self.jitters) + self.teacher.first_label
            refined = refined[torch.arange(len(labels), device=labels.device), labels]
            spreads.append(box_spread(refined.view(self.jitters, -1, 4), one["boxes"]))
        return spreads

    def unlabelled_losses(self, seen: Seen, confident, steady, judge: Seen, matrices, seed: int) -> dict:
        """Losses of the student on the strong views; targets in their pixels, matrices from the weak views to them."""
        student, ready = self.student, self.student._ready(confident)
        with drawn(seed, student.mean.device):
            proposals, losses = student.propose(seen, ready)
            sample = student.net.roi_heads.select_training_samples
            boxes, _, labels, _ = sample(proposals, ready)
            steady_boxes, _, steady_labels, codes = sample(proposals, student._ready(steady))
        with torch.no_grad():
            back = [
                map_boxes(one, torch.linalg.inv(matrix), size)[0]
                for one, matrix, size in zip(boxes, matrices, judge.sizes, strict=True)
            ]
            background = self.teacher.classify(judge, back)[0].softmax(-1)[:, 0]
        logits, _ = student.classify(seen, boxes)
        losses["class"] = soft_class_loss(logits, torch.cat(labels), background)
        losses["boxes"] = fastrcnn_loss(*student.classify(seen, steady_boxes), steady_labels, codes)[1]
        return losses
