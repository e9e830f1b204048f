"""Cross-view query consistency (CQC, paper section 3.3).

The decoders of student and teacher should describe the same object alike, each in its own view.

The matching queries of student and teacher do not correspond, so extra queries are made that do.
The content of each comes from the teacher's features of a pseudo-box (RoIAlign and a small
network), its position is that box in the view at hand. Both decoders get the same content, and
after every layer their normalized embeddings are pulled together:

    L = sum over layers of mean (h_student / |h_student| - h_teacher / |h_teacher|)^2

Differences from the paper: both decoders get the teacher's content, and all layers are compared (as
in the released code).
Differences from the released code: padding is left out of the mean (there it is averaged in, at
quadratic memory); and one group of queries is decoded instead of five equal ones.

The norm of the projector matters. BatchNorm (as released) takes the mean over the boxes out of each
channel, so that contents of different boxes stay apart. GroupNorm and LayerNorm take it out of each
box alone: nothing then keeps the projector from giving every box the same content, which makes the
loss small and the queries useless. The cosines in the log tell: see `Cosines`.

Shapes: B images, K pseudo-boxes per image, R boxes in all, N consistency queries per image,
D channels.
"""

import math
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align

from semidetr_lite.boxes import to_model
from semidetr_lite.contracts import Outputs
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.transformer import Memory, QueryGroup, slice_outputs
from semidetr_lite.device import to_device
from semidetr_lite.methods.mean_teacher import PseudoLabels
from semidetr_lite.methods.step_norm import StepBatchNorm

PROJECTOR_NORMS = ("batch", "group")


class Projector(nn.Module):
    """The network from the features inside a box to a query's content.

    Args:
        dim: D.
        hidden: width of the middle layer.
        roi_size: cells of the RoIAlign grid, per side.
        norm: "batch", as in the released code; or "group", GroupNorm in the convolutions and
            LayerNorm behind the linear layer, where a box does not depend on the others.
    """

    def __init__(self, dim: int, hidden: int = 1024, roi_size: int = 7, norm: str = "group"):
        super().__init__()
        self.roi_size = roi_size
        groups = math.gcd(32, dim // 2)
        layers: list[nn.Module] = []
        for _ in range(2):
            layers.append(nn.Conv2d(dim, dim, 3, padding=1, bias=False))
            layers.append(StepBatchNorm(dim) if norm == "batch" else nn.GroupNorm(groups, dim))
            layers.append(nn.ReLU(inplace=True))
        layers += [nn.Flatten(), nn.Linear(dim * roi_size * roi_size, hidden)]
        layers += [StepBatchNorm(hidden) if norm == "batch" else nn.LayerNorm(hidden), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, dim), nn.ReLU())

    def forward(
        self,
        features: list[torch.Tensor],
        strides: list[tuple[float, float]],
        images: torch.Tensor,
        boxes: torch.Tensor,
    ) -> torch.Tensor:
        """The content (R, D) of the queries of some boxes; no gradient reaches the features.

        Args:
            features: maps (B, D, H, W), finest first.
            strides: pixels per cell (y, x) of each map.
            images: (R,) the image of each box.
            boxes: (R, 4) xyxy pixels.
        """
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt()
        level = (side / (7 * strides[0][0]) + 1e-6).log2().floor().clamp(0, len(features) - 1)
        scales = torch.tensor([[x, y, x, y] for y, x in strides])
        scales = to_device(scales, boxes.device).to(boxes)  # (levels, 4)
        roi_shape = (len(boxes), features[0].shape[1], self.roi_size, self.roi_size)
        roi_features = boxes.new_zeros(roi_shape)
        for number, (feature, scale) in enumerate(zip(features, scales, strict=True)):
            rois = torch.cat([images[:, None].to(boxes), boxes / scale], 1)
            pooled = roi_align(feature.detach().float(), rois, self.roi_size, aligned=True)
            on_level = (level == number)[:, None, None, None]
            roi_features = torch.where(on_level, pooled, roi_features)
        return self.layers(roi_features)


class DecodedView(NamedTuple):
    """A detector that has decoded its matching queries in a view."""

    detector: Detector
    memory: Memory
    outputs: Outputs

    def of_images(self, images: slice) -> "DecodedView":
        """The same for some images of the batch."""
        return DecodedView(
            self.detector, self.memory.slice(images), slice_outputs(self.outputs, images)
        )


class Cosines(NamedTuple):
    """How alike queries of the same and of different boxes are: scalars, means over a batch.

    Consistency works if the same box is more alike than different boxes, and is empty if all are
    alike. Nan where there are too few boxes.
    """

    same_cosine: torch.Tensor  # last embeddings of student and teacher, of the same box
    different_cosine: torch.Tensor  # last embeddings of student and teacher, of different boxes
    content_cosine: torch.Tensor  # contents of different boxes


def query_consistency(
    projector: Projector,
    student: DecodedView,
    teacher: DecodedView,
    labels: PseudoLabels,
    mask: np.ndarray,
    divisors: list[tuple[slice, float]] | None = None,
) -> torch.Tensor:
    """The consistency loss of some pseudo-boxes, without its weight: a scalar.

    Args:
        projector: makes the queries' content.
        student, teacher: of the strong and of the weak views of the same images.
        labels: the pseudo-boxes in both views.
        mask: (B, K) bool on the CPU, the boxes to compare.
        divisors: rows of images, and what the sum over their queries is divided by; None: the
            mean over all queries.
    """
    return consistency_and_cosines(projector, student, teacher, labels, mask, divisors)[0]


def consistency_and_cosines(
    projector: Projector,
    student: DecodedView,
    teacher: DecodedView,
    labels: PseudoLabels,
    mask: np.ndarray,
    divisors: list[tuple[slice, float]] | None = None,
) -> tuple[torch.Tensor, Cosines]:
    """The loss of `query_consistency`, and how alike the queries are."""
    divisors = divisors or [(slice(0, len(mask)), max(float(mask.sum()), 1.0))]
    if not mask.any():  # every process needs a gradient
        zeros = [parameter.sum() * 0.0 for parameter in projector.parameters()]
        loss = cast(torch.Tensor, sum(zeros))
        return loss, Cosines(*loss.new_full((3,), torch.nan))

    # the boxes of `mask`, in a row: their image and column, their slot in the student's group of
    # queries, and their image and slot in the teacher's
    device = labels.strong.boxes.device
    rows, columns = np.nonzero(mask)
    weak_rows = rows if labels.weak_rows is None else labels.weak_rows[rows, columns]
    indices = np.stack([rows, columns, slots_in(rows), weak_rows, slots_in(weak_rows)])
    max_queries = int(indices[[2, 4]].max()) + 1
    rows, columns, slots, weak_rows, weak_slots = to_device(torch.from_numpy(indices), device)
    strong_boxes = labels.strong.boxes[rows, columns]
    weak_boxes = labels.weak.boxes[rows, columns]

    features = teacher.memory.features
    strides = [(float(stride), float(stride)) for stride in teacher.detector.strides]
    contents = projector(features, strides, weak_rows, weak_boxes)

    weak_sizes = to_device(labels.weak_sizes, device)[weak_rows]
    weak_boxes = to_model(weak_boxes[:, None], weak_sizes)[:, 0]
    group_shape = (len(mask), max_queries)  # (B, N)
    student_group = make_group(contents, strong_boxes, rows, slots, group_shape)
    student_embeddings = decode_embeddings(student, student_group)
    with torch.no_grad():
        teacher_group = make_group(contents, weak_boxes, weak_rows, weak_slots, group_shape)
        teacher_embeddings = decode_embeddings(teacher, teacher_group)
    if labels.weak_rows is not None:  # in the order of the student's
        teacher_embeddings = [
            torch.zeros_like(layer).index_put((rows, slots), layer[weak_rows, weak_slots])
            for layer in teacher_embeddings
        ]
    valid = student_group.valid
    loss = valid.new_zeros((), dtype=torch.float32)
    for images, num_queries in divisors:
        ours = [layer[images] for layer in student_embeddings]
        theirs = [layer[images] for layer in teacher_embeddings]
        loss = loss + consistency_loss(ours, theirs, valid[images], num_queries)
    last_of_student = student_embeddings[-1][rows, slots]
    last_of_teacher = teacher_embeddings[-1][rows, slots]
    return loss, mean_cosines(last_of_student, last_of_teacher, contents)


@torch.no_grad()
def mean_cosines(student: torch.Tensor, teacher: torch.Tensor, contents: torch.Tensor) -> Cosines:
    """The mean cosines of R boxes: embeddings (R, D) of both decoders, contents (R, D)."""
    count = len(student)
    student, teacher, contents = (
        F.normalize(rows.detach().float(), dim=-1) for rows in (student, teacher, contents)
    )
    same = (student * teacher).sum(-1).mean()
    # the mean over all pairs of different boxes, from the sum over all pairs
    pairs = count * (count - 1) or torch.nan
    different = (student.sum(0) @ teacher.sum(0) - same * count) / pairs
    itself = contents.square().sum()  # less than the number of boxes if a content is zero
    content = (contents.sum(0).square().sum() - itself) / pairs
    return Cosines(same, different, content)


def slots_in(rows: np.ndarray) -> np.ndarray:
    """The place of each of R boxes among those of its row: (R,)."""
    order = np.argsort(rows, kind="stable")
    slots = np.empty_like(rows)
    slots[order] = np.concatenate([np.arange(count) for count in np.bincount(rows)])
    return slots


def make_group(
    contents: torch.Tensor,
    boxes: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    shape: tuple[int, int],
) -> QueryGroup:
    """The consistency queries of a view, padded.

    Args:
        contents, boxes: (R, D) and (R, 4) cxcywh in the view.
        rows, slots: (R,) the image of each box, and its place among those of the image.
        shape: (B, N).
    """
    valid = torch.zeros(shape, dtype=torch.bool, device=boxes.device)
    valid[rows, slots] = True
    content = contents.new_zeros(*shape, contents.shape[1]).index_put((rows, slots), contents)
    positions = boxes.new_full((*shape, 4), 0.5).index_put((rows, slots), boxes)
    return QueryGroup(content, positions, 1, valid)


def decode_embeddings(view: DecodedView, group: QueryGroup) -> list[torch.Tensor]:
    """The group's embeddings (B, N, D) after each decoder layer, with the matching queries kept."""
    (outputs,) = view.detector.decode_groups(view.memory, view.outputs, [group])
    return [layer["queries"] for layer in (*outputs["aux_outputs"], outputs)]


def consistency_loss(
    student: list[torch.Tensor],
    teacher: list[torch.Tensor],
    valid: torch.Tensor,
    num_queries: float | None = None,
) -> torch.Tensor:
    """Sum over layers of the mean squared difference of normalized embeddings, a scalar.

    Args:
        student, teacher: per layer (B, N, D); no gradient reaches the teacher.
        valid: (B, N) bool; the mean is over the valid queries and over D.
        num_queries: what replaces the number of valid queries in the mean, where others share it.
    """
    count = num_queries or valid.sum().clamp(min=1)
    total = valid.new_zeros((), dtype=torch.float32)
    for student_layer, teacher_layer in zip(student, teacher, strict=True):
        student_direction = F.normalize(student_layer.float(), dim=-1)
        teacher_direction = F.normalize(teacher_layer.detach().float(), dim=-1)
        difference = (student_direction - teacher_direction).square().mean(-1)
        total = total + (difference * valid).sum() / count
    return total
