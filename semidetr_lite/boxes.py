"""Box formats, the one border between them, and overlaps that broadcast.

Dicts hold xyxy boxes in pixels of the image beside them. Detectors use cxcywh in [0, 1].
`to_model` and `to_pixels` are the only two places where one becomes the other. The overlaps below
take any leading dimensions, which those of torchvision.ops do not.
"""

from collections.abc import Sequence

import torch
from torchvision.ops import box_convert


def to_model(boxes: torch.Tensor, size: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Model coordinates of boxes: xyxy pixels (..., 4) -> cxcywh in [0, 1], the same shape.

    Args:
        boxes: (..., 4) xyxy pixels.
        size: (H, W) of the image; or a tensor of sizes (B, 2) for boxes (B, T, 4).
    """
    return box_convert(boxes / _whwh(size, boxes), "xyxy", "cxcywh")


def to_pixels(pred_boxes: torch.Tensor, size: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Pixels of model coordinates: cxcywh in [0, 1] (..., 4) -> xyxy pixels, the same shape.

    Args:
        pred_boxes: (..., 4) cxcywh in [0, 1].
        size: (H, W) of the image; or a tensor of sizes (B, 2) for boxes (B, T, 4).
    """
    return box_convert(pred_boxes, "cxcywh", "xyxy") * _whwh(size, pred_boxes)


def _whwh(size: torch.Tensor | Sequence[int], boxes: torch.Tensor) -> torch.Tensor:
    """(H, W) as (W, H, W, H).

    A tensor of sizes (..., 2) is given a dimension to broadcast over the boxes of each image.
    """
    if isinstance(size, torch.Tensor):
        return torch.cat([size, size], -1).flip(-1).to(boxes).unsqueeze(-2)
    height, width = size
    return boxes.new_tensor([width, height, width, height])


def height_and_width(image: torch.Tensor) -> tuple[int, int]:
    """(H, W) of an image or a feature map (..., H, W)."""
    height, width = image.shape[-2:]
    return height, width


def inverse_sigmoid(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """The logit of x, with x clamped to [eps, 1 - eps]."""
    return torch.logit(x, eps=eps)


def overlaps(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU and GIoU of xyxy boxes, element by element: a (..., 4) and b (..., 4) -> two (...).

    The leading dimensions broadcast. Empty boxes overlap by 0.
    """
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    union = area_a + area_b - intersection
    hull_bottom_right = torch.maximum(a[..., 2:], b[..., 2:])
    hull_top_left = torch.minimum(a[..., :2], b[..., :2])
    hull = (hull_bottom_right - hull_top_left).clamp(min=0).prod(-1)
    iou = intersection / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


def pairwise_overlaps(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU and GIoU of every pair of a (..., N, 4) and b (..., M, 4): two (..., N, M)."""
    return overlaps(a.unsqueeze(-2), b.unsqueeze(-3))
