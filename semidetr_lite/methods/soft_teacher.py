"""Soft Teacher (Xu et al., ICCV 2021): Faster R-CNN learns from the boxes of its average, each loss with its own trust.

    teacher(weak view) -> boxes over the score cut  -> targets of the class losses of student(strong view)
                       -> boxes steady under jitter -> targets of its box loss

A pseudo-box of high score is mostly right, but there are few of them: much of what they leave to the background is a
missed object. So the teacher also judges each box that the student learns from (section 3.2; Eq. 4 and 5): with r_j its
background score of proposal j that has no pseudo-box,

    L_class = (sum_i l(foreground i) + sum_j r_j l(background j)) / (N_fg + sum_k r_k).

Nor does a high score say that a box is tight. A tight one is found again wherever the search begins (section 3.3; Eq. 6
to 8): jittered several times and refined by the teacher, its four coordinates have standard deviations s_k; boxes with
mean_k s_k / (0.5 (height + width)) under a cut are the targets of the box loss. (Equation numbers are from memory.)

As in the released code (github.com/microsoft/SoftTeacher), the class loss is divided as a whole. (The paper adds the
mean over the foreground to the background's with w_j = r_j / sum_k r_k, so that the few foreground boxes weigh as much
as all others; on the digits AP does not rise with that.) As there, the box loss is divided by the number of all sampled
boxes (Eq. 9: of the foreground), proposals are learned from the boxes over the score cut, and the constants are cuts of
0.9, 0.5 and 0.02, ten jitters of 6 % and weight 4.

Differences from it: its jitter is normal (here uniform, to our memory the paper's), and it divides a deviation by the
width or height of the mean refined box.
"""

import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import fastrcnn_loss

from semidetr_lite.data.views import map_boxes, map_target
from semidetr_lite.detectors.pyramid import FasterRCNN, Seen, drawn
from semidetr_lite.methods.mean_teacher import LABELLED, UNLABELLED, Averaged, named


def soft_class_loss(logits: torch.Tensor, labels: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """The class loss on unlabelled images, a scalar.

    logits: (N, 1 + C) of the student, background first; labels: (N,), 0 where a box has no pseudo-box; background: (N,)
        the teacher's background scores r of the same boxes.
    """
    each = F.cross_entropy(logits, labels, reduction="none")
    weights = torch.where(labels > 0, 1.0, background)
    return (each * weights).sum() / weights.sum().clamp(min=1)


def box_spread(refined: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """How far the refinements of a box lie apart (Eq. 7 and 8), in halves of its height plus width: (T,).

    refined: (J, T, 4) xyxy, what became of the boxes (T, 4) after each of J jitters.
    """
    deviations = ((refined - refined.mean(0)).square().sum(0) / (len(refined) - 1)).sqrt()
    return deviations.mean(-1) / (0.5 * (boxes[:, 2:] - boxes[:, :2]).sum(-1)).clamp(min=1e-6)


def chosen(found: dict, keep: torch.Tensor) -> dict:
    """The boxes of a detection where `keep` (T,) is True."""
    return {key: found[key][keep] for key in ("boxes", "labels", "scores")}


class SoftTeacher(Averaged):
    """The method; the defaults are the paper's for COCO.

    Args:
        student: a Faster R-CNN.
        score_cut: pseudo-boxes of at least this score are targets of the class losses and of the proposals.
        box_score_cut: pseudo-boxes of at least this score are jittered.
        spread_cut: those that spread less are targets of the box loss.
        jitters, jitter: how often, and how far a side moves at most, of the box's width or height.
        unlabelled_weight, unlabelled_box_weight, most: see MeanTeacher.
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
        self.class_weight, self.box_weight = unlabelled_weight, unlabelled_weight * unlabelled_box_weight

    def forward(self, batch: dict, step: int) -> dict[str, torch.Tensor]:
        """A batch with "labelled", "weak" and "strong" -> weighted losses."""
        losses = named("labelled", self.student.losses(*batch["labelled"], self.draw(step, LABELLED)))
        (weak_images, weak), (images, strong) = batch["weak"], batch["strong"]
        matrices = [s["matrix"] @ torch.linalg.inv(w["matrix"]) for w, s in zip(weak, strong, strict=True)]
        with torch.no_grad():
            judge = self.teacher.see(weak_images)
            confident, steady = (
                [map_target(one, matrix, s["size"]) for one, matrix, s in zip(found, matrices, strong, strict=True)]
                for found in self.pseudo_boxes(judge, step, weak)
            )
        labels = torch.cat([one["labels"] for one in confident])
        self.count_pseudo(labels, torch.ones_like(labels), len(weak))
        counts = ([len(one["labels"]) for one in found] for found in (confident, steady))
        self.stats = dict(zip(("pseudo_per_image", "steady_per_image"), (sum(n) / len(n) for n in counts)))
        seen, seed = self.student.see(images), self.draw(step, UNLABELLED)
        for name, loss in self.pseudo_losses(seen, confident, steady, judge, matrices, seed).items():
            losses[f"pseudo/{name}"] = loss * (self.box_weight if name in ("proposals", "boxes") else self.class_weight)
        return losses

    def pseudo_boxes(self, judge: Seen, step: int, weak: list[dict]) -> tuple[list[dict], list[dict]]:
        """The teacher's boxes over the score cut, and those steady under jitter, in pixels of the weak views."""
        teacher = self.teacher
        found = teacher.found(judge, min(self.score_cut, self.box_score_cut), self.most, teacher.nms)
        candidates = [chosen(one, one["scores"] >= self.box_score_cut) for one in found]
        jittered = []
        for one, rng in zip(candidates, self.rngs(step, UNLABELLED, weak), strict=True):
            boxes = one["boxes"]
            moves = boxes.new_tensor(rng.uniform(-self.jitter, self.jitter, (self.jitters, *boxes.shape)))
            jittered.append((boxes + moves * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)).flatten(0, 1))
        codes = teacher.classify(judge, jittered)[1]
        refined = teacher.net.roi_heads.box_coder.decode(codes, jittered)  # (all jitters, 1 + C, 4)
        refined = refined.reshape(-1, teacher.num_classes + 1, 4)  # also of no box at all
        steady = []
        for one, boxes in zip(candidates, refined.split([len(boxes) for boxes in jittered]), strict=True):
            rows = (one["labels"] + teacher.first_label).repeat(self.jitters)[:, None, None].expand(-1, 1, 4)
            own = boxes.gather(1, rows).view(self.jitters, -1, 4)
            steady.append(chosen(one, box_spread(own, one["boxes"]) < self.spread_cut))
        return [chosen(one, one["scores"] >= self.score_cut) for one in found], steady

    def pseudo_losses(self, seen: Seen, confident, steady, judge: Seen, matrices, seed: int) -> dict[str, torch.Tensor]:
        """Losses of the student on the strong views, without weights; targets in their pixels.

        judge: the weak views as the teacher sees them; matrices: from them to the strong views.
        """
        student = self.student
        confident, steady = student.ready(confident), student.ready(steady)
        with drawn(seed, student.mean.device):
            proposals, losses = student.propose(seen, confident)
            boxes, labels, _ = student.sample(proposals, confident)
            of_steady, *wanted = student.sample(proposals, steady)
        with torch.no_grad():
            views = zip(boxes, matrices, judge.image_sizes, strict=True)
            back = [map_boxes(one, torch.linalg.inv(matrix), size)[0] for one, matrix, size in views]
            background = self.teacher.classify(judge, back)[0].softmax(-1)[:, 0]
        losses["class"] = soft_class_loss(student.classify(seen, boxes)[0], torch.cat(labels), background)
        losses["boxes"] = fastrcnn_loss(*student.classify(seen, of_steady), *wanted)[1]
        return losses
