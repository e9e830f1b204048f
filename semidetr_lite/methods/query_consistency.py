"""Cross-view query consistency (CQC, paper section 3.3): the same object, asked for in two views, should get the same
answer.

Matching queries of student and teacher do not correspond, so extra queries are made that do: the content of each
comes from the teacher's features of a pseudo-box (RoIAlign and a small network), its position is that box in the view
at hand. Both decoders see the same content, and after every layer their normalised embeddings are pulled together:

    L = weight * sum over layers of mean (h_student / |h_student| - h_teacher / |h_teacher|)^2

Differences from the paper: both decoders get the teacher's content, and all layers are compared (as in the released
code). From the released code: the projector uses GroupNorm and LayerNorm instead of live batch statistics, filled-up
slots are left out of the mean (there they are averaged in, at quadratic memory), and one copy of the queries is
decoded instead of five equal ones.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align

from semidetr_lite.device import to_device


class Projector(nn.Module):
    """From the features inside a box to a query's content.

    Args:
        dim: D.
        hidden: width of the middle layer.
        side: cells of the RoIAlign grid.
    """

    def __init__(self, dim: int, hidden: int = 1024, side: int = 7):
        super().__init__()
        self.side = side
        groups = math.gcd(32, dim // 2)
        parts: list[nn.Module] = []
        for _ in range(2):
            parts += [nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(groups, dim), nn.ReLU(inplace=True)]
        parts += [nn.Flatten(), nn.Linear(dim * side * side, hidden), nn.LayerNorm(hidden), nn.ReLU()]
        self.layers = nn.Sequential(*parts, nn.Linear(hidden, dim), nn.ReLU())

    def forward(self, features: list[torch.Tensor], strides, images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Contents (R, D) of boxes; features are not trained through this.

        Args:
            features: maps (B, D, H, W), finest first.
            strides: pixels per cell (y, x) of each map.
            images: (R,) the image of each box.
            boxes: (R, 4) xyxy pixels.
        """
        side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt()
        level = (side / (7 * strides[0][0]) + 1e-6).log2().floor().clamp(0, len(features) - 1)
        cells = boxes.new_zeros(len(boxes), features[0].shape[1], self.side, self.side)
        scales = to_device(torch.tensor([[x, y, x, y] for y, x in strides]), boxes.device).to(boxes)  # (L, 4)
        for number, (feature, scale) in enumerate(zip(features, scales, strict=True)):
            rois = torch.cat([images[:, None].to(boxes), boxes / scale], 1)
            read = roi_align(feature.detach().float(), rois, self.side, aligned=True)
            cells = torch.where((level == number)[:, None, None, None], read, cells)
        return self.layers(cells)


def consistency_loss(student: list[torch.Tensor], teacher: list[torch.Tensor], valid: torch.Tensor, count=None):
    """Sum over layers of the mean squared difference of normalised embeddings.

    Args:
        student, teacher: per layer (B, N, D); no gradient reaches the teacher.
        valid: (B, N) bool; the mean is over valid queries and D.
        count: of valid queries, if others than these share the mean.
    """
    count = count or valid.sum().clamp(min=1)
    total = valid.new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(student, teacher, strict=True):
        difference = F.normalize(ours.float(), dim=-1) - F.normalize(theirs.detach().float(), dim=-1)
        total = total + (difference.square().mean(-1) * valid).sum() / count
    return total
