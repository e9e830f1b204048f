"""Deformable DETR (Zhu et al., ICLR 2021): DETR whose attention reads a few points of several maps.

    images -> backbone -> projected maps -> encoder -> tokens;  queries -> decoder reads the tokens -> boxes

Three forms, as published:

* plain: a query is a learned position and a learned content; its reference point is read from the position, and every
  layer predicts its box around that same point.
* with_box_refine: every layer has heads of its own and corrects the box of the layer before.
* two_stage: the queries are not learned; the encoder's best tokens give boxes, and position and content are read from
  the sine code of each box. This is the form Semi-DETR needs, since only here any box can ask (`groups`).

What is new beside detr.py: the attention, several levels, sigmoid scores without a no-object class, references.
Difference from the released code: no dropout (0.1 there); anchors near the border or in the padding are chosen as
proposals only if there are fewer others than queries.
"""

import torch
import torch.nn.functional as F
from torch import nn

from semidetr_lite.boxes import inverse_sigmoid
from semidetr_lite.detectors.deformable import DeformableDetector, deformable_attention
from semidetr_lite.detectors.transformer import MLP, Memory, sine_positions
from semidetr_lite.errors import UserError

__all__ = ["DeformableDETR", "deformable_attention"]


class DeformableDETR(DeformableDetector):
    """The detector.

    Args:
        num_classes, num_queries, hidden: see DeformableDetector.
        with_box_refine, two_stage: the form, see above; two_stage alone is a UserError.
        shared: dim, heads and all that DeformableDetector has a default for.
    """

    class_agnostic = True

    def __init__(
        self,
        num_classes: int,
        num_queries: int = 300,
        hidden: int = 1024,
        with_box_refine: bool = False,
        two_stage: bool = False,
        **shared,
    ):
        if two_stage and not with_box_refine:
            raise UserError("DeformableDETR: two_stage=True needs with_box_refine=True")
        super().__init__(num_classes, num_queries, hidden, temperature=10_000.0, offset=-0.5, **shared)
        self.with_box_refine, self.two_stage, self.takes_groups, dim = with_box_refine, two_stage, two_stage, self.dim
        if two_stage:
            self.add_proposals()
            self.box_code = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim))
        else:
            self.positions, self.content = nn.Embedding(num_queries, dim), nn.Embedding(num_queries, dim)
            self.reference_points = nn.Linear(dim, 2)
        heads = len(self.decoder) if with_box_refine else 1
        self.class_heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(MLP(dim, dim, 4, 3) for _ in range(heads))
        proposal = [[self.proposal_class], [self.proposal_box]] if two_stage else [[], []]
        self.start([*self.class_heads, *proposal[0]], [*self.box_heads, *proposal[1]])
        if not two_stage:  # references are points; a box around one starts at sigmoid(-2) = 0.12 of the image
            nn.init.constant_(self.box_heads[0][-1].bias[2:], -2.0)

    def matching_queries(self, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
        """Two-stage: content from the code of the encoder's boxes, and these; else learned, with points (B, Q, 2)."""
        if self.two_stage:
            boxes = memory.proposals["pred_boxes"].detach()
            return self._code(boxes)[1], boxes
        with torch.autocast(memory.tokens.device.type, enabled=False):  # where to look, in full precision
            points = self.reference_points(self.positions.weight).sigmoid()
        return tuple(each.expand(len(memory.tokens), -1, -1) for each in (self.content.weight, points))

    def _code(self, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cxcywh (B, N, 4) -> position and content (B, N, D) each."""
        places = sine_positions(boxes, self.dim // 2, self.temperature)  # (B, N, 2 * D)
        return self.box_code(places.to(self.level_embedding.dtype)).chunk(2, -1)

    def refine(self, memory: Memory, content, boxes, seen=None, context=None):
        """All decoder layers; see DeformableDetector.refine."""
        layers, states = [], []
        scale = torch.cat([memory.valid_ratios, memory.valid_ratios], -1)[:, None]  # (B, 1, L, 4)
        positions = self._code(boxes)[0] if self.two_stage else self.positions.weight.expand(len(boxes), -1, -1)
        for number, layer in enumerate(self.decoder):
            references = boxes[:, :, None] * scale[..., : boxes.shape[-1]]  # (B, N, L, 2 or 4)
            states.append((content, positions))
            content = layer(content, positions, references, memory, seen, context and context[number])
            head = number if self.with_box_refine else 0
            before = F.pad(inverse_sigmoid(boxes), (0, 4 - boxes.shape[-1]))  # a point leaves width and height free
            pred_boxes = (self.box_heads[head](content).float() + before).sigmoid()
            logits = self.class_heads[head](content)
            layers.append({"pred_logits": logits, "pred_boxes": pred_boxes, "queries": content})
            if self.with_box_refine:
                boxes = pred_boxes.detach()
        return layers, states
