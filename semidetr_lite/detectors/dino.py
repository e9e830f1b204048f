"""DINO (Zhang et al., ICLR 2023), as Semi-DETR uses it: queries start at the encoder's best tokens.

    images -> backbone -> projected maps -> encoder -> tokens
    the Q best tokens give boxes -> decoder refines them

New beside deformable_detr.py:

* Mixed query selection: the box of a query comes from the encoder, its content is learned.
* The position of a query follows its box from layer to layer.
* Look forward twice: the boxes of layer l are refined from those of layer l-1, with the gradients
  of both.
* Contrastive denoising: see denoising.py.

`DINO(num_classes=80)` is the model of the paper.
`DINO(num_classes=10, num_queries=30, dim=64, ..., backbone="tiny")` trains on a laptop.

Differences from the released code: docs/paper_vs_code.md.
"""

import torch
from torch import nn

from semidetr_lite.boxes import inverse_sigmoid
from semidetr_lite.detectors.deformable import DeformableDetector
from semidetr_lite.detectors.denoising import Denoising
from semidetr_lite.detectors.detector import IMAGENET_MEAN, IMAGENET_STD
from semidetr_lite.detectors.transformer import MLP, Memory, sine_positions


class DINO(DeformableDetector):
    """DINO: a two-stage deformable detector with look forward twice and contrastive denoising.

    Args:
        num_classes, num_queries: C, Q.
        dim, heads, levels, points: D, M, L, P.
        encoder_layers, decoder_layers: their numbers.
        dim_feedforward: width of the feed-forward networks.
        denoising_queries, label_noise: see Denoising.
        query_temperature: of the sine code of a query's box; 10,000 in the paper, less for images
            with few and large objects.
        eps: boxes in [0, 1] are clamped to [eps, 1 - eps] before the logit; 1e-3 in
            IDEA-Research/DINO, 1e-5 in Semi-DETR.
        backbone, backbone_weights: see `make_backbone`.
        anchor_size: see DeformableDetector.
        mean, std, test_size: see Detector.
        query_init: first weights of the contents, of the network of the positions and of the
            proposals: "xavier" (released: content about as large as position) or "torch"
            (contents of standard deviation 1, twenty times as large).
    """

    def __init__(
        self,
        num_classes: int,
        num_queries: int = 900,
        dim: int = 256,
        heads: int = 8,
        levels: int = 4,
        points: int = 4,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        denoising_queries: int = 100,
        label_noise: float = 0.25,
        query_temperature: float = 10_000.0,
        eps: float = 1e-5,
        backbone: str | nn.Module = "resnet50",
        backbone_weights: str | None = None,
        anchor_size: float = 0.05,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        test_size: tuple[int, int] | None = None,
        query_init: str = "xavier",
    ):
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
            temperature=20.0,
            offset=0.0,
            backbone=backbone,
            backbone_weights=backbone_weights,
            anchor_size=anchor_size,
            mean=mean,
            std=std,
            test_size=test_size,
        )
        self.query_temperature = query_temperature
        self.eps = eps
        self.decoder_norm = nn.LayerNorm(dim)
        self.content = nn.Embedding(num_queries, dim)
        self.query_positions = MLP(2 * dim, dim, dim, 2)
        self.add_two_stage_heads()
        # one head of each kind for all layers
        self.class_head = nn.Linear(dim, num_classes)
        self.box_head = MLP(dim, dim, 4, 3)
        self.denoising = Denoising(num_classes, dim, denoising_queries, label_noise)
        self.init_heads([self.proposal_class, self.class_head], [self.proposal_box, self.box_head])
        self.init_queries(query_init)
        if query_init == "xavier":
            nn.init.xavier_uniform_(self.content.weight)

    def matching_queries(self, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
        """Content (B, Q, D) and boxes (B, Q, 4) cxcywh in [0, 1].

        The boxes are the encoder's, without their gradient. The learned contents go to them in the
        order of their scores.
        """
        assert memory.proposals is not None  # DINO is two-stage
        boxes = memory.proposals["pred_boxes"].detach()
        batch, num_queries = boxes.shape[:2]
        return self.content.weight[:num_queries].expand(batch, -1, -1), boxes

    def _encode_boxes(self, boxes: torch.Tensor) -> torch.Tensor:
        """Boxes (B, N, 4) cxcywh in [0, 1] -> positions (B, N, D)."""
        x, y, width, height = boxes.unbind(-1)
        yxwh = torch.stack([y, x, width, height], -1)
        code = sine_positions(yxwh, self.dim // 2, self.query_temperature)  # (B, N, 2 * D)
        return self.query_positions(code.to(self.content.weight.dtype))

    def run_decoder(
        self,
        memory: Memory,
        content: torch.Tensor,
        boxes: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        extra_kv: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[list[dict], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Run all decoder layers; see DeformableDetector.run_decoder."""
        # (B, 1, L, 4), from the unpadded image to the padded map
        scale = torch.cat([memory.valid_ratios, memory.valid_ratios], -1)[:, None]
        reference_boxes = boxes  # keep their gradient: look forward twice
        layers, layer_inputs = [], []
        for index, layer in enumerate(self.decoder):
            references = boxes[:, :, None] * scale  # (B, N, L, 4)
            positions = self._encode_boxes(boxes)
            layer_inputs.append((content, positions))
            layer_kv = None if extra_kv is None else extra_kv[index]
            content = layer(content, positions, references, memory, attn_mask, layer_kv)

            queries = self.decoder_norm(content)
            box_deltas = self.box_head(queries).float()
            pred_boxes = (box_deltas + inverse_sigmoid(reference_boxes, self.eps)).sigmoid()
            logits = self.class_head(queries)
            layers.append({"pred_logits": logits, "pred_boxes": pred_boxes, "queries": queries})
            # The references of the next layer are predicted from the content before the norm.
            next_deltas = self.box_head(content).float()
            reference_boxes = (next_deltas + inverse_sigmoid(boxes, self.eps)).sigmoid()
            boxes = reference_boxes.detach()
        return layers, layer_inputs
