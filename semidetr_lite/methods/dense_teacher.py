"""Dense Teacher (Zhou et al., ECCV 2022): FCOS learns from the raw maps of its average, with no boxes in between.

    teacher(weak pixels, strong geometry) -> scores, boxes, centerness of all cells -> those of student(strong view)

Pseudo-boxes need a score cut and a suppression, and both lose what the teacher is unsure about. Here what the teacher
says in a cell is the target of the same cell (the paper's dense pseudo-labels). Of all cells, with class scores p (C,),
the share `ratio` richest in max_c p_c (its feature richness score) is selected; elsewhere the target is 0 (its region
selection). With s the student's scores and y the targets,

    L_class = sum_cells |y - s|^2 BCE(s, y) / sum_selected max_c p_c        (quality focal loss)
    L_box   = mean_selected (1 - GIoU)           L_centerness = mean_selected BCE

with weights 4, 1 and 1. Normalisers and weights are the released ones (github.com/Megvii-BaseDetection/DenseTeacher),
and as there the cells are selected over the whole batch.

Differences from the released code: there both views have one geometry. Ours is moved in the strong view, and cells only
correspond in one geometry, so the teacher reads the weak view's pixels carried into the strong view's geometry. The box
loss is not weighted by the teacher's centerness logit; centerness stands where the release predicts the IoU; the
unlabelled weight does not rise at first, a burn-in run stands for that.
"""

import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.ops import generalized_box_iou_loss

from semidetr_lite.data.views import warp
from semidetr_lite.detectors.pyramid import Cells
from semidetr_lite.losses import quality_focal_loss
from semidetr_lite.methods.mean_teacher import LABELLED, Averaged, named


def select_regions(scores: torch.Tensor, inside: torch.Tensor, ratio: float) -> torch.Tensor:
    """(B, N) bool, the richest cells of a batch: the share `ratio` of those inside an image, at least one.

    scores: (B, N, C) the teacher's; inside: (B, N) bool, False in the padding.
    """
    richness = scores.amax(-1).masked_fill(~inside, -1.0)
    best = richness.flatten().topk(max(1, int(ratio * int(inside.sum())))).indices
    return torch.zeros_like(inside).flatten().index_fill_(0, best, True).view_as(inside)


def dense_losses(student: Cells, teacher: Cells, ratio: float) -> dict[str, torch.Tensor]:
    """The student's maps against the teacher's: the three losses without their weights, each a scalar."""
    centres = (teacher.anchors[:, :2] + teacher.anchors[:, 2:]) / 2
    inside = (centres < centres.new_tensor(teacher.image_sizes).flip(-1)[:, None]).all(-1)
    scores = teacher.outputs["cls_logits"].sigmoid()
    selected = select_regions(scores, inside, ratio)
    logits, wanted = student.outputs["cls_logits"], scores * selected[..., None]
    decode = BoxLinearCoder().decode
    boxes, aims = (decode(cells.outputs["bbox_regression"], cells.anchors)[selected] for cells in (student, teacher))
    centerness, aim = (cells.outputs["bbox_ctrness"][..., 0][selected] for cells in (student, teacher))
    return {
        "class": quality_focal_loss(logits.flatten(0, 1), wanted.flatten(0, 1)) / wanted.amax(-1).sum(),
        "giou": generalized_box_iou_loss(boxes, aims, reduction="mean"),
        "centerness": F.binary_cross_entropy_with_logits(centerness, aim.sigmoid()),
    }


class DenseTeacher(Averaged):
    """The method; the defaults are the released ones for COCO.

    Args:
        student: an FCOS.
        ratio: share of the cells that are selected.
        unlabelled_weight: of the class loss on unlabelled images.
        unlabelled_box_weight: further factor of their box and centerness losses.
        score_cut, most: boxes of at least this score, at most so many an image, are measured against the truth; nothing
            learns from them.
        shared: ema_ceiling and seed, see Averaged.
    """

    def __init__(
        self, student, ratio=0.01, unlabelled_weight=4.0, unlabelled_box_weight=0.25, score_cut=0.4, most=100, **shared
    ):
        super().__init__(student, **shared)
        self.ratio, self.score_cut, self.most = ratio, score_cut, most
        self.class_weight, self.box_weight = unlabelled_weight, unlabelled_weight * unlabelled_box_weight

    def forward(self, batch: dict, step: int) -> dict[str, torch.Tensor]:
        """A batch with "labelled", "weak" and "strong" -> weighted losses."""
        losses = named("labelled", self.student.losses(*batch["labelled"], self.draw(step, LABELLED)))
        (weak_images, weak), (images, strong) = batch["weak"], batch["strong"]
        device = self.student.mean.device
        carried = [
            warp(image.to(device), s["matrix"] @ torch.linalg.inv(w["matrix"]), tuple(s["size"]))
            for image, w, s in zip(weak_images, weak, strong, strict=True)
        ]
        with torch.no_grad():
            seen = self.teacher.see(carried)
            boxes = self.teacher.found(seen, self.score_cut, self.most, self.teacher.nms)  # for the log alone
            dense = self.teacher.cells(seen)
        labels = torch.cat([one["labels"] for one in boxes])
        self.count_pseudo(labels, torch.ones_like(labels), len(boxes))
        self.stats = {"pseudo_per_image": len(labels) / len(boxes)}
        found = dense_losses(self.student.cells(self.student.see(images)), dense, self.ratio)
        for name, loss in found.items():
            losses[f"pseudo/{name}"] = loss * (self.class_weight if name == "class" else self.box_weight)
        return losses
