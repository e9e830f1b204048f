"""DINO (Zhang et al., ICLR 2023), as Semi-DETR uses it: queries start from the encoder's best tokens.

    images -> backbone -> projected maps -> encoder -> tokens -> best Q tokens give boxes -> decoder refines them

What is new beside deformable_detr.py:

* Mixed query selection: a query's box comes from the encoder, its content is learned.
* A query's position follows its box from layer to layer.
* Look forward twice: the boxes of layer l are refined from those of layer l-1 with the gradient of both.
* Contrastive denoising: see denoising.py.

`DINO(num_classes=80)` is the model of the paper; `DINO(num_classes=10, num_queries=30, dim=64, ..., backbone="tiny")`
trains on a laptop.

Differences from the released code: no dropout (0 there); query positions come from the boxes in the image itself, not
in the padded batch, so that they do not depend on the neighbours; anchors near the border or in the padding are
chosen as proposals only if there are fewer others than queries.
"""

import torch
from torch import nn

from semidetr_lite.boxes import inverse_sigmoid
from semidetr_lite.detectors.deformable import DeformableDetector
from semidetr_lite.detectors.denoising import Denoising
from semidetr_lite.detectors.transformer import MLP, Memory, sine_positions


class DINO(DeformableDetector):
    """The detector.

    Args:
        num_classes, num_queries, hidden: see DeformableDetector.
        denoising_queries, label_noise: see Denoising.
        query_temperature: of the sine code of a query's box; 10,000 in the paper, less for few and large boxes.
        eps: what boxes in [0, 1] are clamped to before the logit; 1e-3 in IDEA-Research/DINO, 1e-5 in Semi-DETR.
        shared: dim, heads and all that DeformableDetector has a default for.
    """

    def __init__(
        self,
        num_classes: int,
        num_queries: int = 900,
        hidden: int = 2048,
        denoising_queries: int = 100,
        label_noise: float = 0.25,
        query_temperature: float = 10_000.0,
        eps: float = 1e-5,
        **shared,
    ):
        super().__init__(num_classes, num_queries, hidden, temperature=20.0, **shared)
        self.query_temperature, self.eps, dim = query_temperature, eps, self.dim
        self.decoder_norm = nn.LayerNorm(dim)
        self.content = nn.Embedding(num_queries, dim)
        self.query_positions = MLP(2 * dim, dim, dim, 2)
        self.add_proposals()
        self.class_head, self.box_head = nn.Linear(dim, num_classes), MLP(dim, dim, 4, 3)  # one for all layers
        self.denoising = Denoising(num_classes, dim, denoising_queries, label_noise)
        self.start([self.proposal_class, self.class_head], [self.proposal_box, self.box_head])

    def matching_queries(self, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes from the encoder, without their gradient; learned content in the order of the scores."""
        boxes = memory.proposals["pred_boxes"].detach()
        return self.content.weight[: boxes.shape[1]].expand(len(boxes), -1, -1), boxes

    def refine(self, memory: Memory, content, boxes, seen=None, context=None):
        """All decoder layers; see DeformableDetector.refine."""
        layers, states = [], []
        scale = torch.cat([memory.valid_ratios, memory.valid_ratios], -1)  # (B, L, 4)
        before = boxes  # with gradient: look forward twice
        for number, layer in enumerate(self.decoder):
            references = boxes[:, :, None] * scale[:, None]  # (B, N, L, 4)
            x, y, width, height = boxes.unbind(-1)
            yxwh = torch.stack([y, x, width, height], -1)
            places = sine_positions(yxwh, self.dim // 2, self.query_temperature)  # (B, N, 2 * D)
            positions = self.query_positions(places.to(content.dtype))
            states.append((content, positions))
            content = layer(content, positions, references, memory, seen, context and context[number])
            hidden = self.decoder_norm(content)
            pred_boxes = (self.box_head(hidden).float() + inverse_sigmoid(before, self.eps)).sigmoid()
            layers.append({"pred_logits": self.class_head(hidden), "pred_boxes": pred_boxes, "queries": hidden})
            # the next layer starts from what the same head reads in the content before the norm
            before = (self.box_head(content).float() + inverse_sigmoid(boxes, self.eps)).sigmoid()
            boxes = before.detach()
        return layers, states
