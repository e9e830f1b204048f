"""What every detection transformer here shares: positions, small networks, the encoder's memory, query groups.

Shapes: B images, Q queries, S tokens, D channels, L levels, M heads, P points. Batch first everywhere, no dropout (as
in DINO).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from semidetr_lite.device import to_device


class Memory(NamedTuple):
    """What the encoder leaves for the decoder."""

    tokens: torch.Tensor  # (B, S, D), the levels one after the other
    mask: torch.Tensor | None  # (B, S) bool, True = padding; None if nothing is padded
    shapes: list[tuple[int, int]]  # (H, W) of each level
    valid_ratios: torch.Tensor  # (B, L, 2): share of each level's width and height that is image
    features: list[torch.Tensor]  # the projected maps (B, D, H, W) before the encoder
    proposals: dict | None  # two-stage: outputs dict of the chosen tokens
    positions: torch.Tensor | None = None  # (B, S, D), where the decoder needs them again (DETR)

    def rows(self, rows: slice) -> "Memory":
        """The same for some images of the batch."""
        return Memory(*batch_rows(tuple(self), rows))


def level_table(shapes: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """(L, 3) int32: width, height and first token of each level; kept for the layers to come."""
    made = _level_table.__wrapped__ if torch.compiler.is_compiling() else _level_table
    return made(tuple(map(tuple, shapes)), device)


@functools.lru_cache(maxsize=64)
def _level_table(shapes: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    counts = [height * width for height, width in shapes]
    rows = [[width, height, sum(counts[:level])] for level, (height, width) in enumerate(shapes)]
    with torch.inference_mode(False):  # else what is kept could not be trained with
        return to_device(torch.tensor(rows, dtype=torch.int32), device)


class QueryGroup(NamedTuple):
    """Extra queries for the decoder, in `copies` parts of equal length that do not see each other."""

    content: torch.Tensor  # (B, N, D)
    boxes: torch.Tensor  # (B, N, 4) cxcywh in [0, 1]
    copies: int
    valid: torch.Tensor  # (B, N) bool, False = filled up to the longest image

    def among(self, rows: slice, images: int) -> "QueryGroup":
        """A group of some `rows` of a batch of `images`, valid in none of the others."""
        sides = (rows.start, images - rows.stop)
        content, boxes = (F.pad(entry, (0, 0, 0, 0, *sides), value=0.5) for entry in (self.content, self.boxes))
        return QueryGroup(content, boxes, self.copies, F.pad(self.valid, (0, 0, *sides)))


def sine_positions(coordinates: torch.Tensor, dim: int, temperature: float = 20.0) -> torch.Tensor:
    """Sine and cosine of each coordinate at `dim` / 2 frequencies: (..., K) in [0, 1] -> (..., K * dim)."""
    frequencies = temperature ** (2 * torch.arange(dim // 2, device=coordinates.device, dtype=torch.float32) / dim)
    angles = coordinates.float().unsqueeze(-1) * (2 * math.pi) / frequencies  # (..., K, dim / 2)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


def map_positions(mask: torch.Tensor, dim: int, temperature: float = 20.0, offset: float = 0.0) -> torch.Tensor:
    """Positions of the cells of a map: (B, H, W, D), the first half of D y, the second x.

    Args:
        mask: (B, H, W), True = padding.
        dim: D.
        temperature: 20 in DINO, 10,000 in DETR and Deformable DETR.
        offset: added to the cells' counts, which begin at 1 (Deformable DETR: -0.5).
    """
    inside = (~mask).float()
    y, x = inside.cumsum(1), inside.cumsum(2)
    y, x = (y + offset) / (y[:, -1:] + 1e-6), (x + offset) / (x[:, :, -1:] + 1e-6)
    return sine_positions(torch.stack([y, x], -1), dim // 2, temperature)


class MLP(nn.Sequential):
    """`layers` linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int):
        widths = [inputs] + [hidden] * (layers - 1) + [outputs]
        modules: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            modules += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*modules[:-1])


class FeedForward(nn.Module):
    """Two linear layers around a ReLU, a shortcut, a LayerNorm."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear1, self.linear2, self.norm = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class QuerySelfAttention(nn.Module):
    """Queries look at each other; positions enter keys and queries, never values."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, content, positions, seen=None, context=None) -> torch.Tensor:
        """content, positions (B, N, D); seen (B, N or 1, K) bool, all if None; context: those of keys behind the N."""
        queries = keys = content + positions
        values, own = content, self.attention
        if context is not None:
            keys, values = torch.cat([keys, sum(context)], 1), torch.cat([values, context[0]], 1)
        projections = zip((queries, keys, values), own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3))
        heads = (F.linear(*each).unflatten(-1, (own.num_heads, -1)).transpose(1, 2) for each in projections)
        seen = None if seen is None else seen[:, None]  # (B, 1, N, K): nn.MultiheadAttention copies it for each head
        read = F.scaled_dot_product_attention(*heads, attn_mask=seen)  # (B, M, N, D/M)
        return self.norm(content + own.out_proj(read.transpose(1, 2).flatten(2)))


def as_outputs(layers: Sequence[dict]) -> dict:
    """The last layer's dict with the earlier ones under "aux_outputs"."""
    return {**layers[-1], "aux_outputs": list(layers[:-1])}


def split_outputs(layers: Sequence[dict], sizes: list[int]) -> list[dict]:
    """The dicts of all layers, their queries cut into parts of these sizes -> an outputs dict for each part."""
    cut = [{key: value.split(sizes, dim=1) for key, value in layer.items()} for layer in layers]
    return [as_outputs([{key: parts[n] for key, parts in layer.items()} for layer in cut]) for n in range(len(sizes))]


def output_rows(outputs: dict, rows: slice) -> dict:
    """An outputs dict for some images of the batch, query groups left out."""
    return batch_rows({key: value for key, value in outputs.items() if key != "groups"}, rows)


def batch_rows(value, rows: slice):
    """The same dicts, lists and tuples with every tensor in them cut to some images of the batch."""
    if isinstance(value, torch.Tensor):
        return value[rows]
    if isinstance(value, dict):
        return {key: batch_rows(part, rows) for key, part in value.items()}
    return type(value)(batch_rows(part, rows) for part in value) if isinstance(value, list | tuple) else value


class Layers(NamedTuple):
    """All layers of an outputs dict: the decoder's in order, then the encoder's proposals if any."""

    logits: torch.Tensor  # (L, B, Q, C), here L counts these layers
    boxes: torch.Tensor  # (L, B, Q, 4) cxcywh in [0, 1]
    encoder: bool  # whether the last entry is the encoder's
    no_object: bool = False  # whether the last logit is "no object" of a softmax

    def of_images(self, images: slice) -> "Layers":
        """The same layers for some images of the batch."""
        return self._replace(logits=self.logits[:, images], boxes=self.boxes[:, images])

    def last_of_decoder(self) -> "Layers":
        """The decoder's last layer alone."""
        last = -2 if self.encoder else -1
        return Layers(self.logits[last][None], self.boxes[last][None], False, self.no_object)

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (B, T) of targets as each layer learns them (L, B, T): the encoder's proposals know class 0 alone."""
        labels = labels.expand(len(self.logits), -1, -1)
        if self.encoder:
            labels = torch.cat([labels[:-1], torch.zeros_like(labels[-1:])])
        return labels


def stack_layers(outputs: dict) -> Layers:
    """The layers of an outputs dict, in one tensor for all logits and one for all boxes."""
    layers = [*outputs["aux_outputs"], outputs]
    if outputs.get("encoder"):
        layers.append(outputs["encoder"])
    return Layers(
        torch.stack([layer["pred_logits"] for layer in layers]),
        torch.stack([layer["pred_boxes"] for layer in layers]),
        encoder=bool(outputs.get("encoder")),
        no_object=bool(outputs.get("no_object")),
    )
