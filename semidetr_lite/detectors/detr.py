"""DETR (Carion et al., ECCV 2020): detection as set prediction with a plain transformer.

    images -> backbone -> one map at stride 32 -> encoder -> tokens;  Q learned queries -> decoder -> Q classes, Q boxes

Every token looks at every token, so cost grows with the square of the pixels, and attention has to learn from nothing
where to look: it needs ten times the epochs of Deformable DETR (500 against 50 on COCO). That is why the
semi-supervised methods stand on the other two; this one trains with `supervised` and `mean-teacher`, slowly.

The original scores by softmax over C classes and "no object"; `no_object=False` is the sigmoid variant.
Difference from the released code: no dropout (0.1 there).
"""

import math

import torch
from torch import nn

from semidetr_lite.detectors.backbone import make_backbone
from semidetr_lite.detectors.detector import Detector, valid_ratio
from semidetr_lite.detectors.transformer import MLP, FeedForward, Memory, QuerySelfAttention, as_outputs, map_positions


class EncoderLayer(nn.Module):
    """Every token looks at every token."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.self_attention, self.feed_forward = QuerySelfAttention(dim, heads), FeedForward(dim, hidden)

    def forward(self, tokens, positions, seen=None) -> torch.Tensor:
        """tokens, positions (B, S, D); seen (B, 1, S) bool, False = padding."""
        return self.feed_forward(self.self_attention(tokens, positions, seen))


class DecoderLayer(nn.Module):
    """Queries look at each other, then at every token."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.self_attention = QuerySelfAttention(dim, heads)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(self, content, positions, memory: Memory) -> torch.Tensor:
        """content, positions (B, Q, D)."""
        content = self.self_attention(content, positions)
        keys, values = memory.tokens + memory.positions, memory.tokens
        read = self.attention(content + positions, keys, values, key_padding_mask=memory.mask, need_weights=False)[0]
        return self.feed_forward(self.norm(content + read))


class DETR(Detector):
    """The detector.

    Args:
        num_classes, num_queries, dim, heads: C, Q, D, M.
        hidden: width of the feed-forward networks.
        encoder_layers, decoder_layers: their numbers.
        backbone, backbone_weights: see `make_backbone`.
        level: which of the backbone's maps, at strides 8, 16 and 32; small images need a finer one than the last.
        no_object: softmax over C + 1 logits, the last one "no object"; False: C sigmoids.
        options: mean, std and test_size, see Detector.
    """

    def __init__(
        self,
        num_classes: int,
        num_queries: int = 100,
        dim: int = 256,
        heads: int = 8,
        hidden: int = 2048,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        backbone: str | nn.Module = "resnet50",
        backbone_weights: str | None = None,
        level: int = 2,
        no_object: bool = True,
        **options,
    ):
        super().__init__(**options)
        self.num_classes, self.num_queries, self.dim, self.no_object = num_classes, num_queries, dim, no_object
        self.backbone = make_backbone(backbone, backbone_weights)
        self.used_maps = slice(level, level + 1)
        self.projections = nn.ModuleList([nn.Sequential(nn.Conv2d(self.backbone.channels[level], dim, 1))])
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, hidden) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(dim, heads, hidden) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.positions = nn.Embedding(num_queries, dim)
        self.class_head, self.box_head = nn.Linear(dim, num_classes + no_object), MLP(dim, dim, 4, 3)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and name.startswith(("decoder.", "encoder.")):
                nn.init.xavier_uniform_(parameter)
        if not no_object:
            nn.init.constant_(self.class_head.bias, -math.log(0.99 / 0.01))

    def encode(self, images) -> Memory:
        """images -> Memory of one level, positions kept."""
        maps, masks, padded = self.pyramid(self.normalised(images))
        tokens = maps[0].flatten(2).transpose(1, 2)  # (B, S, D)
        positions = map_positions(masks[0], self.dim, temperature=10_000.0).flatten(1, 2).to(tokens.dtype)
        mask = masks[0].flatten(1) if padded else None
        for layer in self.encoder:
            tokens = layer(tokens, positions, ~mask[:, None] if padded else None)
        ratios = valid_ratio(masks[0])[:, None]  # (B, 1, 2)
        return Memory(tokens, mask, [tuple(maps[0].shape[-2:])], ratios, maps, None, positions)

    def decode(self, memory: Memory, groups=()) -> dict:
        """The matching queries -> outputs. Takes no query groups: a query here is no box."""
        if groups:
            raise ValueError("DETR takes no query groups: its queries are no boxes; use DeformableDETR or DINO")
        positions = self.positions.weight.expand(len(memory.tokens), -1, -1)
        content, layers = torch.zeros_like(positions), []
        for layer in self.decoder:
            content = layer(content, positions, memory)
            hidden = self.decoder_norm(content)
            pred_boxes = self.box_head(hidden).float().sigmoid()
            layers.append({"pred_logits": self.class_head(hidden), "pred_boxes": pred_boxes, "queries": hidden})
        return {**as_outputs(layers), "no_object": self.no_object, "groups": []}
