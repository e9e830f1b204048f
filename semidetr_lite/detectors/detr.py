"""DETR (Carion et al., ECCV 2020): detection as set prediction with a plain transformer.

    images -> backbone -> one map at stride 32 -> encoder -> tokens
    Q learned queries -> decoder, which attends to the tokens -> Q classes, Q boxes

Every token attends to every token, so the cost grows with the square of the number of pixels, and
attention has to learn from scratch where the objects are: DETR needs ten times the epochs of
Deformable DETR (500 against 50 on COCO). That is why the semi-supervised methods build on the other
two; this one trains with `supervised` and `mean-teacher`, slowly.

The original scores by a softmax over C classes and "no object"; `no_object=False` is the variant
with sigmoids.

Differences from the released code: docs/paper_vs_code.md.

Shapes: B images, Q queries, S tokens, D channels, M heads, C classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from semidetr_lite.boxes import height_and_width
from semidetr_lite.contracts import Outputs
from semidetr_lite.detectors.backbone import make_backbone
from semidetr_lite.detectors.detector import IMAGENET_MEAN, IMAGENET_STD, Detector, valid_ratio
from semidetr_lite.detectors.transformer import (
    MLP,
    FeedForward,
    Memory,
    SelfAttention,
    as_outputs,
    map_positions,
)


class EncoderLayer(nn.Module):
    """Self-attention of all tokens, then a feed-forward network."""

    def __init__(self, dim: int, heads: int, dim_feedforward: int):
        super().__init__()
        self.self_attention = SelfAttention(dim, heads)
        self.feed_forward = FeedForward(dim, dim_feedforward)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """New tokens (B, S, D).

        Args:
            tokens, positions: (B, S, D).
            attn_mask: (B, 1, S) bool, True = may be attended to, False = padding.
        """
        return self.feed_forward(self.self_attention(tokens, positions, attn_mask))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, cross-attention to all tokens, a feed-forward network."""

    def __init__(self, dim: int, heads: int, dim_feedforward: int):
        super().__init__()
        self.self_attention = SelfAttention(dim, heads)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, dim_feedforward)

    def forward(
        self, content: torch.Tensor, positions: torch.Tensor, memory: Memory
    ) -> torch.Tensor:
        """New content (B, Q, D) from content and positions (B, Q, D)."""
        assert memory.positions is not None  # DETR.encode computes them
        content = self.self_attention(content, positions)
        keys = memory.tokens + memory.positions
        attended, _ = self.attention(
            query=content + positions,
            key=keys,
            value=memory.tokens,
            key_padding_mask=memory.mask,
            need_weights=False,
        )
        return self.feed_forward(self.norm(content + attended))


class DETR(Detector):
    """DETR: a plain transformer between one feature map and a set of learned queries.

    Args:
        num_classes, num_queries, dim, heads: C, Q, D, M.
        encoder_layers, decoder_layers: their numbers.
        dim_feedforward: width of the feed-forward networks.
        backbone, backbone_weights: see `make_backbone`.
        level: which of the backbone's maps, at strides 8, 16 and 32; small images need a finer one
            than the last.
        no_object: softmax over C + 1 logits, the last one "no object"; False: C sigmoids.
        mean, std, test_size: see Detector.
    """

    def __init__(
        self,
        num_classes: int,
        num_queries: int = 100,
        dim: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        backbone: str | nn.Module = "resnet50",
        backbone_weights: str | None = None,
        level: int = 2,
        no_object: bool = True,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        test_size: tuple[int, int] | None = None,
    ):
        super().__init__(mean, std, test_size)
        self.num_classes, self.num_queries, self.dim = num_classes, num_queries, dim
        self.no_object = no_object
        self.backbone = make_backbone(backbone, backbone_weights)
        self.used_maps = slice(level, level + 1)
        projection = nn.Conv2d(self.backbone.channels[level], dim, 1)
        self.projections = nn.ModuleList([nn.Sequential(projection)])
        self.encoder = nn.ModuleList(
            EncoderLayer(dim, heads, dim_feedforward) for _ in range(encoder_layers)
        )
        self.decoder = nn.ModuleList(
            DecoderLayer(dim, heads, dim_feedforward) for _ in range(decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(dim)
        self.positions = nn.Embedding(num_queries, dim)
        self.class_head = nn.Linear(dim, num_classes + no_object)
        self.box_head = MLP(dim, dim, 4, 3)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Xavier for the matrices of encoder and decoder; sigmoid scores start at 0.01."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and name.startswith(("decoder.", "encoder.")):
                nn.init.xavier_uniform_(parameter)
        if not self.no_object:
            nn.init.constant_(self.class_head.bias, -math.log(0.99 / 0.01))

    def encode(self, images: Sequence[torch.Tensor] | torch.Tensor) -> Memory:
        """The encoder's memory of a batch, of one level and with positions.

        Args:
            images: B images, see Detector.forward.
        """
        maps, masks, padded = self.extract_features(self.normalize(images))
        tokens = maps[0].flatten(2).transpose(1, 2)  # (B, S, D)
        positions = map_positions(masks[0], self.dim, temperature=10_000.0)
        positions = positions.flatten(1, 2).to(tokens.dtype)
        mask = masks[0].flatten(1) if padded else None
        attn_mask = None if mask is None else ~mask[:, None]
        for layer in self.encoder:
            tokens = layer(tokens, positions, attn_mask)
        return Memory(
            tokens=tokens,
            mask=mask,
            shapes=[height_and_width(maps[0])],
            valid_ratios=valid_ratio(masks[0])[:, None],  # (B, 1, 2)
            features=maps,
            proposals=None,
            positions=positions,
        )

    def decode(self, memory: Memory, groups: Sequence = ()) -> Outputs:
        """Decode the matching queries -> outputs.

        Raises:
            ValueError: query groups are given. A query here is not a box.
        """
        if groups:
            raise ValueError(
                "DETR takes no query groups: its queries are not boxes; use DeformableDETR or DINO"
            )
        positions = self.positions.weight.expand(len(memory.tokens), -1, -1)
        content = torch.zeros_like(positions)
        layers = []
        for layer in self.decoder:
            content = layer(content, positions, memory)
            queries = self.decoder_norm(content)
            pred_boxes = self.box_head(queries).float().sigmoid()
            logits = self.class_head(queries)
            layers.append({"pred_logits": logits, "pred_boxes": pred_boxes, "queries": queries})
        return {**as_outputs(layers), "no_object": self.no_object, "groups": []}
