"""The dicts that go from one part to the next: targets, batches, outputs.

At run time they are plain dicts. A target, a pseudo-label and a detection are the same dict. Where
an entry is missing, it is not known or does not apply.

Shapes: B images, T targets, Q queries, N queries of a group, C classes, D channels.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import torch


class Source(TypedDict):
    """One of the images that a mixed strong view shows; see data/mixing.py."""

    offset: int  # the image's row in the batch, less the row of the view
    matrix: torch.Tensor  # (3, 3) from the image's own pixels to those of the view
    region: tuple[int, int, int, int]  # x1, y1, x2, y2 pixels of the view in which it is seen
    visible: float  # a box of which a smaller fraction remains in the region is dropped


class Target(TypedDict, total=False):
    """The objects of one image, in pixels of the image beside it.

    An unlabelled target has no boxes and no labels; its "truth" is measured against, never trained
    on.
    """

    boxes: torch.Tensor  # (T, 4) float32 xyxy
    labels: torch.Tensor  # (T,) int64 in 0..C-1
    size: tuple[int, int]  # (H, W) of the image
    scores: torch.Tensor  # (T,) of a detection or pseudo-label
    crowd: torch.Tensor  # (T,) bool, regions of many objects
    difficult: torch.Tensor  # (T,) bool, objects that VOC's evaluation leaves out
    area: torch.Tensor  # (T,) of the objects, smaller than that of their boxes
    image_id: int
    matrix: torch.Tensor  # (3, 3), original pixels -> this view, acting on columns (x, y, 1)
    position: int  # of the image among those of its kind in the whole step
    truth: "Target"  # of an unlabelled image
    sources: list[Source]  # of a mixed strong view


TargetLike = Mapping[str, Any]  # a Target, or one of lists, as JSON holds it

View = tuple[torch.Tensor, Target]  # an image (3, H, W), uint8 or float in [0, 1], and its target
Views = tuple[list[torch.Tensor], list[Target]]  # B images and their targets


class Batch(TypedDict, total=False):
    """The images of a step. Supervised training needs the labelled ones alone."""

    labelled: Views
    weak: Views  # the unlabelled images as the teacher sees them
    strong: Views  # the same images as the student sees them


class Outputs(TypedDict, total=False):
    """What a detector predicts: its last decoder layer, and the earlier layers under "aux_outputs".

    An earlier layer has logits, boxes and queries alone, and so has a layer of a group.
    """

    pred_logits: torch.Tensor  # (B, Q, C), or (B, Q, C + 1) with `no_object`
    pred_boxes: torch.Tensor  # (B, Q, 4) cxcywh in [0, 1]
    queries: torch.Tensor  # (B, Q, D), the decoder's embeddings
    aux_outputs: list["Outputs"]  # of the earlier decoder layers, in order
    encoder: "Outputs"  # two-stage detectors: the chosen proposals
    # of these, where training asks all tokens (Deformable DETR): (B, S, C) and (B, S, 4) under
    # pred_logits and pred_boxes, and which tokens count, (B, S) bool
    tokens: "Outputs"
    usable: torch.Tensor
    groups: list["Outputs"]  # one per query group, with N queries
    no_object: bool  # whether the last logit is "no object" of a softmax
    # per decoder layer what `decode_groups` needs: content and positions (B, Q, D)
    layer_inputs: list[tuple[torch.Tensor, torch.Tensor]]
