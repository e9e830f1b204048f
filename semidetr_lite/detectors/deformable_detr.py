"""Deformable DETR (Zhu et al., ICLR 2021): DETR with attention to a few points of several maps.

    images -> backbone -> projected maps -> encoder -> tokens
    queries -> decoder, which samples the tokens -> boxes

Three forms, as published:

* plain: a query is a learned position and a learned content. Its reference point is predicted from
  the position, and every layer predicts a box around that same point.
* with_box_refine: every layer has heads of its own and refines the box of the layer before.
* two_stage: queries are not learned. The encoder's best tokens give boxes; position and content are
  computed from the sine code of each box. Semi-DETR needs this form: only here can any box become a
  query (query groups).

New beside detr.py: deformable attention, several levels, reference boxes, and sigmoid scores
without a no-object class.

Differences from the released code: docs/paper_vs_code.md.
"""

import torch
import torch.nn.functional as F
from torch import nn

from semidetr_lite.boxes import inverse_sigmoid
from semidetr_lite.detectors.deformable import DeformableDetector, deformable_attention
from semidetr_lite.detectors.detector import IMAGENET_MEAN, IMAGENET_STD
from semidetr_lite.detectors.transformer import MLP, Memory, sine_positions
from semidetr_lite.errors import UserError

__all__ = ["DeformableDETR", "deformable_attention"]


class DeformableDETR(DeformableDetector):
    """Deformable DETR in one of its three published forms.

    Args:
        num_classes, num_queries: C, Q.
        dim, heads, levels, points: D, M, L, P.
        encoder_layers, decoder_layers: their numbers.
        dim_feedforward: width of the feed-forward networks.
        with_box_refine, two_stage: the form, see above.
        backbone, backbone_weights: see `make_backbone`.
        anchor_size: see DeformableDetector.
        mean, std, test_size: see Detector.
        query_init: first weights of the layers that make queries and proposals: "xavier" (as
            released) or "torch".
        all_token_loss: whether the encoder is trained by all of its tokens (as released), or by the
            Q proposals alone; two_stage only.

    Raises:
        UserError: two_stage without with_box_refine, all_token_loss without two_stage.
    """

    class_agnostic = True

    def __init__(
        self,
        num_classes: int,
        num_queries: int = 300,
        dim: int = 256,
        heads: int = 8,
        levels: int = 4,
        points: int = 4,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        dim_feedforward: int = 1024,
        with_box_refine: bool = False,
        two_stage: bool = False,
        backbone: str | nn.Module = "resnet50",
        backbone_weights: str | None = None,
        anchor_size: float = 0.05,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        test_size: tuple[int, int] | None = None,
        query_init: str = "xavier",
        all_token_loss: bool = False,
    ):
        if two_stage and not with_box_refine:
            raise UserError("DeformableDETR: two_stage=True needs with_box_refine=True")
        if all_token_loss and not two_stage:
            raise UserError("DeformableDETR: all_token_loss=True needs two_stage=True")
        super().__init__(
            num_classes=num_classes,
            num_queries=num_queries,
            dim=dim,
            heads=heads,
            levels=levels,
            points=points,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            dim_feedforward=dim_feedforward,
            temperature=10_000.0,
            offset=-0.5,
            backbone=backbone,
            backbone_weights=backbone_weights,
            anchor_size=anchor_size,
            mean=mean,
            std=std,
            test_size=test_size,
        )
        self.with_box_refine = with_box_refine
        self.two_stage = two_stage
        self.takes_groups = two_stage
        self.all_token_loss = all_token_loss
        self._add_queries()
        self._add_heads(num_heads=decoder_layers if with_box_refine else 1)
        self.init_queries(query_init)

    def _add_queries(self) -> None:
        """The layers from which the queries are computed."""
        dim = self.dim
        if self.two_stage:
            self.add_two_stage_heads()
            self.box_code = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim))
        else:
            self.positions = nn.Embedding(self.num_queries, dim)
            self.content = nn.Embedding(self.num_queries, dim)
            self.reference_points = nn.Linear(dim, 2)

    def _add_heads(self, num_heads: int) -> None:
        """The heads of the decoder layers: one of each kind per layer, or one for all layers."""
        dim = self.dim
        class_heads = [nn.Linear(dim, self.num_classes) for _ in range(num_heads)]
        box_heads = [MLP(dim, dim, 4, 3) for _ in range(num_heads)]
        self.class_heads, self.box_heads = nn.ModuleList(class_heads), nn.ModuleList(box_heads)
        if self.two_stage:
            class_heads.append(self.proposal_class)
            box_heads.append(self.proposal_box)
        self.init_heads(class_heads, box_heads)
        if not self.two_stage:
            # references are points; a box around one starts at sigmoid(-2) = 0.12 of the image
            nn.init.constant_(box_heads[0].last_layer.bias[2:], -2.0)

    def matching_queries(self, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
        """Content (B, Q, D) and boxes (B, Q, 4) cxcywh in [0, 1], or points (B, Q, 2).

        Two-stage: the encoder's boxes without their gradient, and content computed from them. Else
        both are learned.
        """
        if self.two_stage:
            assert memory.proposals is not None  # the encoder selects them
            boxes = memory.proposals["pred_boxes"].detach()
            _, content = self._encode_boxes(boxes)
            return content, boxes
        with torch.autocast(memory.tokens.device.type, enabled=False):  # in full precision
            points = self.reference_points(self.positions.weight).sigmoid()
        batch = len(memory.tokens)
        content = self.content.weight.expand(batch, -1, -1)
        return content, points.expand(batch, -1, -1)

    def _encode_boxes(self, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes (B, N, 4) cxcywh in [0, 1] -> positions and content, (B, N, D) each."""
        code = sine_positions(boxes, self.dim // 2, self.temperature)  # (B, N, 2 * D)
        positions, content = self.box_code(code.to(self.level_embedding.dtype)).chunk(2, -1)
        return positions, content

    def run_decoder(
        self,
        memory: Memory,
        content: torch.Tensor,
        boxes: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        extra_kv: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[list[dict], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Run all decoder layers; see DeformableDetector.run_decoder."""
        if self.two_stage:
            positions, _ = self._encode_boxes(boxes)
        else:
            positions = self.positions.weight.expand(len(boxes), -1, -1)
        # (B, 1, L, 4), from the unpadded image to the padded map
        scale = torch.cat([memory.valid_ratios, memory.valid_ratios], -1)[:, None]
        layers, layer_inputs = [], []
        for index, layer in enumerate(self.decoder):
            references = boxes[:, :, None] * scale[..., : boxes.shape[-1]]  # (B, N, L, 2 or 4)
            layer_inputs.append((content, positions))
            layer_kv = None if extra_kv is None else extra_kv[index]
            content = layer(content, positions, references, memory, attn_mask, layer_kv)

            head = index if self.with_box_refine else 0
            # a point has no width and height: the head predicts them from scratch
            reference_logits = F.pad(inverse_sigmoid(boxes), (0, 4 - boxes.shape[-1]))
            box_deltas = self.box_heads[head](content).float()
            pred_boxes = (box_deltas + reference_logits).sigmoid()
            logits = self.class_heads[head](content)
            layers.append({"pred_logits": logits, "pred_boxes": pred_boxes, "queries": content})
            if self.with_box_refine:
                boxes = pred_boxes.detach()
        return layers, layer_inputs
