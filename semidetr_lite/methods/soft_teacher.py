"""Soft Teacher (Xu et al., ICCV 2021): Faster R-CNN learns from the boxes of its EMA.

Each loss has its own measure of reliability.

    teacher(weak view) -> confident boxes    -> targets of the class losses of student(strong view)
                       -> box-reliable boxes -> targets of its box loss

A pseudo-box of high score is mostly right, but there are few of them: much of what they leave to
the background is a missed object. So the teacher also scores each box that the student learns from
(section 3.2; Eq. 4 and 5): with r_j its background score of proposal j that has no pseudo-box,

    L_class = (sum_i l(foreground i) + sum_j r_j l(background j)) / (N_fg + sum_k r_k).

Nor does a high score say that a box is tight. A tight one is found again wherever the search begins
(section 3.3; Eq. 6 to 8). So each box is jittered several times and refined by the teacher; its
four coordinates then have standard deviations s_k, and its box regression variance is
mean_k s_k / (0.5 (height + width)). Boxes of a variance below a threshold are box-reliable: they
are the targets of the box loss. (Equation numbers are from memory.)

As in the released code (github.com/microsoft/SoftTeacher), the class loss is divided as a whole.
(The paper adds the mean over the foreground to that of the background with
w_j = r_j / sum_k r_k, so that the few foreground boxes weigh as much as all others; on the digits
AP does not rise with that.) As there, the box loss is divided by the number of all sampled boxes
(Eq. 9: of the foreground), proposals are learned from the confident boxes, and the constants are
thresholds of 0.9, 0.5 and 0.02, ten jitters of 6 % and weight 4.

Differences from it: its jitter is normal (here uniform, to our memory the paper's), and it divides
a standard deviation by the width or height of the mean refined box.

Shapes: T boxes of an image, J jitters, N sampled boxes, C classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import fastrcnn_loss

from semidetr_lite.contracts import Batch, Target
from semidetr_lite.data.views import map_boxes, map_target
from semidetr_lite.detectors.pyramid import FasterRCNN, FeatureMaps, seeded
from semidetr_lite.losses import LossWeights, add_prefix
from semidetr_lite.methods.mean_teacher import (
    RNG_LABELLED,
    RNG_UNLABELLED,
    TeacherStudent,
    weak_to_strong,
)


def soft_class_loss(
    logits: torch.Tensor, labels: torch.Tensor, background: torch.Tensor
) -> torch.Tensor:
    """The class loss on unlabelled images, a scalar (Eq. 4).

    Args:
        logits: (N, 1 + C) of the student, background first.
        labels: (N,), 0 where a box has no pseudo-box.
        background: (N,) the teacher's background scores r of the same boxes.
    """
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    weights = torch.where(labels > 0, 1.0, background)
    return (cross_entropy * weights).sum() / weights.sum().clamp(min=1)


def box_regression_variance(refined: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """How far the refinements of each box lie apart (Eq. 7 and 8): (T,).

    The unit is half of the box's height plus width.

    Args:
        refined: (J, T, 4) xyxy, the boxes after each of J jitters and refinements.
        boxes: (T, 4) xyxy, before them.
    """
    variance = (refined - refined.mean(0)).square().sum(0) / (len(refined) - 1)
    half_perimeter = (boxes[:, 2:] - boxes[:, :2]).sum(-1)
    return variance.sqrt().mean(-1) / (0.5 * half_perimeter).clamp(min=1e-6)


def select_boxes(detection: Target, keep: torch.Tensor) -> Target:
    """The boxes of a detection where `keep` (T,) is True: "boxes", "labels", "scores"."""
    return {
        "boxes": detection["boxes"][keep],
        "labels": detection["labels"][keep],
        "scores": detection["scores"][keep],
    }


class SoftTeacher(TeacherStudent):
    """Soft Teacher; the defaults are the paper's for COCO.

    Args:
        student: a Faster R-CNN.
        score_threshold: pseudo-boxes of at least this score are confident: they are targets of the
            class losses and of the proposals.
        box_score_threshold: pseudo-boxes of at least this score are jittered.
        variance_threshold: those of a box regression variance below it are targets of the box loss.
        num_jitters: J.
        jitter_scale: how far a side moves at most, as a fraction of the box's width or height.
        unlabelled_weight: factor of all losses on unlabelled images.
        unlabelled_box_weight: extra factor of their box losses.
        max_pseudo_boxes: the teacher's boxes per image at most.
        ema_decay, seed, loss_weights: see TeacherStudent; Faster R-CNN's losses have no weights.
    """

    student: FasterRCNN
    teacher: FasterRCNN

    def __init__(
        self,
        student: FasterRCNN,
        score_threshold: float = 0.9,
        box_score_threshold: float = 0.5,
        variance_threshold: float = 0.02,
        num_jitters: int = 10,
        jitter_scale: float = 0.06,
        unlabelled_weight: float = 4.0,
        unlabelled_box_weight: float = 1.0,
        max_pseudo_boxes: int = 100,
        ema_decay: float = 0.999,
        seed: int = 0,
        loss_weights: LossWeights = LossWeights(),
    ):
        super().__init__(student, ema_decay, seed, loss_weights)
        self.score_threshold = score_threshold
        self.box_score_threshold = box_score_threshold
        self.variance_threshold = variance_threshold
        self.num_jitters, self.jitter_scale = num_jitters, jitter_scale
        self.max_pseudo_boxes = max_pseudo_boxes
        self.class_weight = unlabelled_weight
        self.box_weight = unlabelled_weight * unlabelled_box_weight

    def forward(self, batch: Batch, step: int, prepared: None = None) -> dict[str, torch.Tensor]:
        """The weighted losses of a batch; see TeacherStudent.forward."""
        images, truths = batch["labelled"]
        labelled_losses = self.student.losses(images, truths, self.step_seed(step, RNG_LABELLED))
        losses = add_prefix("labelled", labelled_losses)
        (weak_images, weak_views), (strong_images, strong_views) = batch["weak"], batch["strong"]

        # 1. Pseudo-labels: the teacher's boxes on the weak views, mapped to the strong views
        matrices = weak_to_strong(weak_views, strong_views)
        with torch.no_grad():
            teacher_features = self.teacher.extract(weak_images)
            confident, reliable = self.predict_pseudo_boxes(teacher_features, step, weak_views)
        confident = map_detections(confident, matrices, strong_views)
        reliable = map_detections(reliable, matrices, strong_views)
        labels = torch.cat([detection["labels"] for detection in confident])
        self.update_pseudo_box_stats(labels, torch.ones_like(labels), len(weak_views))
        self.stats = {
            "pseudo_per_image": len(labels) / len(confident),
            "box_reliable_per_image": sum(len(d["labels"]) for d in reliable) / len(reliable),
        }

        # 2. Losses of the student on the strong views
        pseudo_losses = self.pseudo_losses(
            self.student.extract(strong_images),
            confident,
            reliable,
            teacher_features,
            matrices,
            self.step_seed(step, RNG_UNLABELLED),
        )
        for name, loss in pseudo_losses.items():
            of_boxes = name in ("proposals", "boxes")
            losses[f"pseudo/{name}"] = loss * (self.box_weight if of_boxes else self.class_weight)
        return losses

    def predict_pseudo_boxes(
        self, teacher_features: FeatureMaps, step: int, weak_views: list[Target]
    ) -> tuple[list[Target], list[Target]]:
        """The teacher's confident boxes and its box-reliable ones, in pixels of the weak views."""
        teacher = self.teacher
        score = min(self.score_threshold, self.box_score_threshold)
        detections = teacher.predict(teacher_features, score, self.max_pseudo_boxes, teacher.nms)
        confident = [select_boxes(d, d["scores"] >= self.score_threshold) for d in detections]
        candidates = [select_boxes(d, d["scores"] >= self.box_score_threshold) for d in detections]

        generators = self.image_generators(step, RNG_UNLABELLED, weak_views)
        jittered = [
            self.jitter(candidate["boxes"], generator)
            for candidate, generator in zip(candidates, generators, strict=True)
        ]
        codes = teacher.classify(teacher_features, jittered)[1]
        refined = teacher.net.roi_heads.box_coder.decode(codes, jittered)
        # (all jittered boxes, 1 + C, 4), also where there is no box at all
        refined = refined.reshape(-1, teacher.num_classes + 1, 4)

        reliable = []
        refined = refined.split([len(boxes) for boxes in jittered])
        for candidate, boxes in zip(candidates, refined, strict=True):
            labels = (candidate["labels"] + teacher.label_offset).repeat(self.num_jitters)
            of_label = boxes.gather(1, labels[:, None, None].expand(-1, 1, 4))
            of_label = of_label.view(self.num_jitters, -1, 4)
            variance = box_regression_variance(of_label, candidate["boxes"])
            reliable.append(select_boxes(candidate, variance < self.variance_threshold))
        return confident, reliable

    def jitter(self, boxes: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """Boxes (T, 4) xyxy moved at random J times: (J * T, 4)."""
        shape = (self.num_jitters, *boxes.shape)
        shift = boxes.new_tensor(generator.uniform(-self.jitter_scale, self.jitter_scale, shape))
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        return (boxes + shift * sides).flatten(0, 1)

    def pseudo_losses(
        self,
        student_features: FeatureMaps,
        confident: list[Target],
        reliable: list[Target],
        teacher_features: FeatureMaps,
        matrices: list[torch.Tensor],
        seed: int,
    ) -> dict[str, torch.Tensor]:
        """The losses of the student on the strong views, without weights.

        Args:
            student_features: of the strong views.
            confident, reliable: per image the targets of class and box losses, in pixels of the
                strong views.
            teacher_features: of the weak views.
            matrices: (3, 3) per image, from the weak to the strong view.
            seed: of the sampling of proposals.
        """
        student = self.student
        confident = student.to_torchvision_targets(confident)
        reliable = student.to_torchvision_targets(reliable)
        with seeded(seed, student.mean.device):
            proposals, losses = student.propose(student_features, confident)
            boxes, labels, _ = student.sample(proposals, confident)
            reliable_boxes, *regression_targets = student.sample(proposals, reliable)
        with torch.no_grad():
            entries = zip(boxes, matrices, teacher_features.image_sizes, strict=True)
            weak_boxes = [
                map_boxes(strong_boxes, torch.linalg.inv(matrix), size)[0]
                for strong_boxes, matrix, size in entries
            ]
            teacher_logits = self.teacher.classify(teacher_features, weak_boxes)[0]
            background = teacher_logits.softmax(-1)[:, 0]
        logits = student.classify(student_features, boxes)[0]
        losses["class"] = soft_class_loss(logits, torch.cat(labels), background)
        predictions = student.classify(student_features, reliable_boxes)
        losses["boxes"] = fastrcnn_loss(*predictions, *regression_targets)[1]
        return losses


def map_detections(
    detections: list[Target], matrices: list[torch.Tensor], views: list[Target]
) -> list[Target]:
    """Detections of each image in another view: boxes mapped, those out of view dropped."""
    entries = zip(detections, matrices, views, strict=True)
    return [map_target(detection, matrix, view["size"]) for detection, matrix, view in entries]
