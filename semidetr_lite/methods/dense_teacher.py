"""Dense Teacher (Zhou et al., ECCV 2022): FCOS learns from the raw maps of its EMA.

There are no boxes in between.

    teacher(weak pixels, strong geometry) -> scores, boxes, centerness of all cells
                                          -> targets of the same cells of student(strong view)

Pseudo-boxes need a score threshold and NMS, and both lose what the teacher is unsure about. Here
what the teacher predicts in a cell is the target of the same cell (the paper's dense
pseudo-labels). Of all cells, with class scores p (C,), the fraction `ratio` of highest max_c p_c
(the feature richness score) is selected; elsewhere the target is 0 (the paper's region selection).
With s the student's scores and y the targets,

    L_class = sum_cells |y - s|^2 BCE(s, y) / sum_selected max_c p_c        (quality focal loss)
    L_box   = mean_selected (1 - GIoU)           L_centerness = mean_selected BCE

with weights 4, 1 and 1. Normalizers and weights are the released ones
(github.com/Megvii-BaseDetection/DenseTeacher), and as there the cells are selected over the whole
batch.

Differences from the released code: there both views have one geometry. Our strong view is moved,
and cells only correspond in one geometry, so the teacher sees the pixels of the weak view in the
geometry of the strong view. The box loss is not weighted by the teacher's centerness logit;
centerness stands where the release predicts the IoU; the unlabelled weight does not rise at first,
a burn-in run stands for that.

Shapes: B images, N cells, C classes.
"""

import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.ops import generalized_box_iou_loss

from semidetr_lite.contracts import Batch
from semidetr_lite.data.views import warp
from semidetr_lite.detectors.pyramid import FCOS, FCOSOutputs
from semidetr_lite.losses import LossWeights, add_prefix, quality_focal_loss
from semidetr_lite.methods.mean_teacher import (
    RNG_LABELLED,
    TeacherStudent,
    weak_to_strong,
)


def select_regions(scores: torch.Tensor, inside: torch.Tensor, ratio: float) -> torch.Tensor:
    """The cells of a batch with the highest richness: (B, N) bool.

    Args:
        scores: (B, N, C) the teacher's.
        inside: (B, N) bool, False in the padding.
        ratio: the fraction of the cells inside an image that is selected, at least one cell.
    """
    richness = scores.amax(-1).masked_fill(~inside, -1.0)
    num_selected = max(1, int(ratio * int(inside.sum())))
    indices = richness.flatten().topk(num_selected).indices
    selected = torch.zeros_like(inside).flatten().index_fill_(0, indices, True)
    return selected.view_as(inside)


def dense_losses(
    student: FCOSOutputs, teacher: FCOSOutputs, ratio: float
) -> dict[str, torch.Tensor]:
    """The student's maps against the teacher's: "class", "giou", "centerness", without weights.

    Args:
        student, teacher: their outputs for the same images, in one geometry.
        ratio: see select_regions.
    """
    centres = (teacher.anchors[:, :2] + teacher.anchors[:, 2:]) / 2
    image_sizes = centres.new_tensor(teacher.image_sizes).flip(-1)  # (B, 2) (W, H)
    inside = (centres < image_sizes[:, None]).all(-1)
    scores = teacher.outputs["cls_logits"].sigmoid()
    selected = select_regions(scores, inside, ratio)
    target_scores = scores * selected[..., None]
    logits = student.outputs["cls_logits"]
    class_loss = quality_focal_loss(logits.flatten(0, 1), target_scores.flatten(0, 1))
    boxes, target_boxes = _decode(student)[selected], _decode(teacher)[selected]
    centerness = student.outputs["bbox_ctrness"][..., 0][selected]
    target_centerness = teacher.outputs["bbox_ctrness"][..., 0][selected].sigmoid()
    return {
        "class": class_loss / target_scores.amax(-1).sum(),
        "giou": generalized_box_iou_loss(boxes, target_boxes, reduction="mean"),
        "centerness": F.binary_cross_entropy_with_logits(centerness, target_centerness),
    }


def _decode(cells: FCOSOutputs) -> torch.Tensor:
    """The boxes (B, N, 4) xyxy pixels of all cells."""
    return BoxLinearCoder().decode(cells.outputs["bbox_regression"], cells.anchors)


class DenseTeacher(TeacherStudent):
    """Dense Teacher; the defaults are the released ones for COCO.

    Args:
        student: an FCOS.
        ratio: fraction of the cells that are selected.
        unlabelled_weight: of the class loss on unlabelled images.
        unlabelled_box_weight: extra factor of their box and centerness losses.
        score_threshold, max_pseudo_boxes: boxes of at least this score, at most so many per image,
            are measured against the truth; nothing learns from them.
        ema_decay, seed, loss_weights: see TeacherStudent; FCOS's losses have no weights.
    """

    student: FCOS
    teacher: FCOS

    def __init__(
        self,
        student: FCOS,
        ratio: float = 0.01,
        unlabelled_weight: float = 4.0,
        unlabelled_box_weight: float = 0.25,
        score_threshold: float = 0.4,
        max_pseudo_boxes: int = 100,
        ema_decay: float = 0.999,
        seed: int = 0,
        loss_weights: LossWeights = LossWeights(),
    ):
        super().__init__(student, ema_decay, seed, loss_weights)
        self.ratio = ratio
        self.score_threshold, self.max_pseudo_boxes = score_threshold, max_pseudo_boxes
        self.class_weight = unlabelled_weight
        self.box_weight = unlabelled_weight * unlabelled_box_weight

    def forward(self, batch: Batch, step: int, prepared: None = None) -> dict[str, torch.Tensor]:
        """The weighted losses of a batch; see TeacherStudent.forward."""
        images, truths = batch["labelled"]
        labelled_losses = self.student.losses(images, truths, self.step_seed(step, RNG_LABELLED))
        losses = add_prefix("labelled", labelled_losses)
        (weak_images, weak_views), (strong_images, strong_views) = batch["weak"], batch["strong"]

        # 1. Dense pseudo-labels: the teacher sees the weak pixels in the strong geometry
        device = self.student.mean.device
        matrices = weak_to_strong(weak_views, strong_views)
        teacher_views = [
            warp(image.to(device), matrix, view["size"])
            for image, matrix, view in zip(weak_images, matrices, strong_views, strict=True)
        ]
        teacher = self.teacher
        with torch.no_grad():
            features = teacher.extract(teacher_views)
            teacher_cells = teacher.head_outputs(features)
            # boxes for the log alone
            detections = teacher.predict(
                features, self.score_threshold, self.max_pseudo_boxes, teacher.nms
            )
        labels = torch.cat([detection["labels"] for detection in detections])
        self.update_pseudo_box_stats(labels, torch.ones_like(labels), len(detections))
        self.stats = {"pseudo_per_image": len(labels) / len(detections)}

        # 2. Losses of the student on the strong views, cell by cell
        student_cells = self.student.head_outputs(self.student.extract(strong_images))
        for name, loss in dense_losses(student_cells, teacher_cells, self.ratio).items():
            weight = self.class_weight if name == "class" else self.box_weight
            losses[f"pseudo/{name}"] = loss * weight
        return losses
