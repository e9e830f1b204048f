"""Deformable attention (Zhu et al., ICLR 2021): a query reads a few learned points instead of the whole image.

    output(q) = W * concat over heads of  sum over l, p of  weight(q, l, p) * value_l(reference(q) + offset(q, l, p))

with levels l and points p.

Cost grows linearly with the number of tokens. The function below is pure PyTorch: one `grid_sample` a level, any
device, no compiled operator.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from semidetr_lite.detectors.transformer import FeedForward, Memory, QuerySelfAttention


def deformable_attention(
    value: torch.Tensor, shapes: list[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted bilinear reads from a pyramid of maps.

    Args:
        value: (B, S, M, D/M), the tokens of all levels one after the other, split in heads.
        shapes: (H, W) of each level.
        locations: (B, Q, M, L, P, 2), (x, y) in [0, 1] of each level; outside reads zero.
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, D).
    """
    batch, _, heads, depth = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)  # (B*M, L, Q, P, 2)
    weights = weights.permute(0, 2, 3, 1, 4).flatten(0, 1)  # (B*M, L, Q, P)
    total = value.new_zeros(())
    for level, tokens in enumerate(value.split([height * width for height, width in shapes], dim=1)):
        maps = tokens.permute(0, 2, 3, 1).reshape(batch * heads, depth, *shapes[level])
        read = F.grid_sample(
            maps, grids[:, level].to(maps.dtype), mode="bilinear", padding_mode="zeros", align_corners=False
        )
        total = total + (read * weights[:, level, None].to(read.dtype)).sum(-1)  # (B*M, D/M, Q)
    return total.view(batch, heads * depth, queries).transpose(1, 2)


class DeformableAttention(nn.Module):
    """The learned part: where to look and how much, from the query alone.

    Args:
        dim, heads, levels, points: D, M, L, P.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.value, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self._start_as_a_star()

    def _start_as_a_star(self) -> None:
        """Each head starts by looking in its own direction, each point one cell further out, all equally weighted."""
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.weights.bias)
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        star = directions[:, None, None] * torch.arange(1, self.points + 1)[:, None]  # (M, 1, P, 2)
        self.offsets.bias.data = star.expand(-1, self.levels, -1, -1).reshape(-1).clone()
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, queries: torch.Tensor, references: torch.Tensor, memory: Memory) -> torch.Tensor:
        """queries (B, N, D), references (B, N, L, 2) points or (B, N, L, 4) cxcywh boxes, in [0, 1] of each level ->
        (B, N, D).
        """
        batch, count, dim = queries.shape
        value = self.value(memory.tokens)
        if memory.mask is not None:
            value = value.masked_fill(memory.mask[..., None], 0.0)
        layout = (batch, count, self.heads, self.levels, self.points)
        offsets = self.offsets(queries).float().view(*layout, 2)
        weights = self.weights(queries).float().view(*layout[:3], -1).softmax(-1).view(layout)
        centres = references[:, :, None, :, None, :2].float()
        if references.shape[-1] == 2:  # offsets in cells of each level
            cells = torch.tensor([[width, height] for height, width in memory.shapes], device=offsets.device)
            locations = centres + offsets / cells[:, None]
        else:  # offsets in half box sides, spread over the points
            locations = centres + offsets / self.points * references[:, :, None, :, None, 2:].float() * 0.5
        value = value.view(batch, -1, self.heads, dim // self.heads)
        return self.output(deformable_attention(value, memory.shapes, locations, weights).to(queries.dtype))


class EncoderLayer(nn.Module):
    """Every token reads around its own place, on every level."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, hidden: int):
        super().__init__()
        self.attention = DeformableAttention(dim, heads, levels, points)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(self, memory: Memory, positions: torch.Tensor, references: torch.Tensor) -> Memory:
        read = self.attention(memory.tokens + positions, references, memory)
        return memory._replace(tokens=self.feed_forward(self.norm(memory.tokens + read)))


class DecoderLayer(nn.Module):
    """Queries look at each other, then around their boxes in the image."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, hidden: int):
        super().__init__()
        self.self_attention = QuerySelfAttention(dim, heads)
        self.attention = DeformableAttention(dim, heads, levels, points)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(
        self, content, positions, references, memory: Memory, blocked=None, padding=None, context=None
    ) -> torch.Tensor:
        """As in QuerySelfAttention.forward, with references (B, N, L, 4) in [0, 1] of each level."""
        content = self.self_attention(content, positions, blocked, padding, context)
        read = self.attention(content + positions, references, memory)
        return self.feed_forward(self.norm(content + read))
