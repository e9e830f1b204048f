"""What all detection transformers here share.

Positional encodings, small networks, self-attention, the encoder's memory, query groups and the
layers of their outputs.

Shapes: B images, Q matching queries, N queries, S tokens, D channels, L levels, M heads, P points,
C classes. Batch first; no dropout (as in DINO).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from semidetr_lite.contracts import Outputs
from semidetr_lite.device import to_device


class Memory(NamedTuple):
    """What the decoder reads of a batch of images: the encoder's tokens and where they lie."""

    tokens: torch.Tensor  # (B, S, D), level after level
    mask: torch.Tensor | None  # (B, S) bool, True = padding; None if nothing is padded
    shapes: list[tuple[int, int]]  # (H, W) of each level
    valid_ratios: torch.Tensor  # (B, L, 2): fraction of each level's width and height that is image
    features: list[torch.Tensor]  # L projected maps (B, D, H, W), before the encoder
    proposals: Outputs | None  # two-stage: of the selected tokens
    positions: torch.Tensor | None = None  # (B, S, D), where the decoder needs them again (DETR)

    def slice(self, images: slice) -> "Memory":
        """The memory of some images of the batch."""
        return Memory(*slice_batch(tuple(self), images))


class QueryGroup(NamedTuple):
    """Extra queries for the decoder: denoising or consistency queries.

    A group consists of `copies` blocks of equal length, unless `blocks` says something else. The
    queries of a block attend to each other and to the matching queries; they do not attend to other
    blocks.
    """

    content: torch.Tensor  # (B, N, D)
    boxes: torch.Tensor  # (B, N, 4) cxcywh in [0, 1]
    copies: int
    valid: torch.Tensor  # (B, N) bool, False = padding
    blocks: tuple[tuple[int, ...], ...] | None = None  # the lengths of each image's blocks

    def block_sizes(self) -> list[tuple[int, ...]]:
        """The lengths of the blocks of each image; their sum is N."""
        if self.blocks is not None:
            return list(self.blocks)
        batch, num_queries = self.valid.shape
        return [(num_queries // self.copies,) * self.copies] * batch

    def pad_to_batch(self, images: slice, batch_size: int) -> "QueryGroup":
        """The group of some images as a group of the whole batch, padding for all other images.

        Args:
            images: which images of the batch this group belongs to.
            batch_size: the number of images of the whole batch.
        """
        before, after = images.start, batch_size - images.stop
        content = F.pad(self.content, (0, 0, 0, 0, before, after), value=0.5)
        boxes = F.pad(self.boxes, (0, 0, 0, 0, before, after), value=0.5)
        valid = F.pad(self.valid, (0, 0, before, after))
        blocks = self.blocks
        if blocks is not None:
            blocks = (blocks[0],) * before + blocks + (blocks[-1],) * after
        return QueryGroup(content, boxes, self.copies, valid, blocks)


def level_layout(shapes: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """(L, 3) int32: width, height and index of the first token of each level.

    The tensor is cached per (shapes, device): every layer asks for the same one.
    """
    layout = _level_layout.__wrapped__ if torch.compiler.is_compiling() else _level_layout
    return layout(tuple(map(tuple, shapes)), device)


@functools.lru_cache(maxsize=64)
def _level_layout(shapes: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    counts = [height * width for height, width in shapes]
    rows = [[width, height, sum(counts[:level])] for level, (height, width) in enumerate(shapes)]
    # A cached inference tensor could not be used in training later on.
    with torch.inference_mode(False):
        return to_device(torch.tensor(rows, dtype=torch.int32), device)


# ---- positional encodings ------------------------------------------------------------------------


def sine_positions(coordinates: torch.Tensor, dim: int, temperature: float = 20.0) -> torch.Tensor:
    """Sine and cosine of each coordinate at `dim` / 2 frequencies.

    Args:
        coordinates: (..., K) in [0, 1].
        dim: numbers per coordinate.
        temperature: the longest wavelength over the shortest.

    Returns:
        (..., K * dim) float32.
    """
    exponents = 2 * torch.arange(dim // 2, device=coordinates.device, dtype=torch.float32) / dim
    angles = coordinates.float().unsqueeze(-1) * (2 * math.pi) / temperature**exponents
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


def map_positions(
    mask: torch.Tensor, dim: int, temperature: float = 20.0, offset: float = 0.0
) -> torch.Tensor:
    """Positional encodings of the cells of a map: the first half of D encodes y, the second x.

    Args:
        mask: (B, H, W), True = padding.
        dim: D.
        temperature: 20 in DINO, 10,000 in DETR and Deformable DETR.
        offset: added to the index of a cell, which starts at 1 (Deformable DETR: -0.5).

    Returns:
        (B, H, W, D) float32.
    """
    inside = (~mask).float()
    y = inside.cumsum(1)
    x = inside.cumsum(2)
    y = (y + offset) / (y[:, -1:] + 1e-6)
    x = (x + offset) / (x[:, :, -1:] + 1e-6)
    return sine_positions(torch.stack([y, x], -1), dim // 2, temperature)


# ---- small networks ------------------------------------------------------------------------------


class MLP(nn.Sequential):
    """Linear layers with ReLU between them: (..., input_dim) -> (..., output_dim)."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        modules: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            modules += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*modules[:-1])

    @property
    def last_layer(self) -> nn.Linear:
        """The layer that makes the output."""
        return cast(nn.Linear, self[-1])


class FeedForward(nn.Module):
    """The feed-forward network of a transformer layer: (B, N, D) -> (B, N, D).

    Two linear layers with a ReLU between them, a residual connection, a LayerNorm.
    """

    def __init__(self, dim: int, dim_feedforward: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class SelfAttention(nn.Module):
    """Multi-head self-attention of tokens or queries, a residual connection, a LayerNorm.

    Positions are added to queries and keys, not to values.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        content: torch.Tensor,
        positions: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        extra_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """New content (B, N, D).

        Args:
            content, positions: (B, N, D).
            attn_mask: (B, N or 1, K) bool, True = may attend; None: everything may attend to
                everything. K is N plus the number of extra keys.
            extra_kv: content and positions (B, K - N, D) of more keys and values, after the N.
        """
        queries = keys = content + positions
        values = content
        if extra_kv is not None:
            extra_content, extra_positions = extra_kv
            keys = torch.cat([keys, extra_content + extra_positions], 1)
            values = torch.cat([values, extra_content], 1)

        query_weight, key_weight, value_weight = self.attention.in_proj_weight.chunk(3)
        query_bias, key_bias, value_bias = self.attention.in_proj_bias.chunk(3)
        queries = self._split_heads(F.linear(queries, query_weight, query_bias))
        keys = self._split_heads(F.linear(keys, key_weight, key_bias))
        values = self._split_heads(F.linear(values, value_weight, value_bias))
        if attn_mask is not None:
            # (B, 1, N, K): nn.MultiheadAttention would copy the mask for each head
            attn_mask = attn_mask[:, None]
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=attn_mask)
        attended = attended.transpose(1, 2).flatten(2)  # (B, N, D)
        return self.norm(content + self.attention.out_proj(attended))

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, M, N, D/M)."""
        return x.unflatten(-1, (self.attention.num_heads, -1)).transpose(1, 2)


# ---- outputs -------------------------------------------------------------------------------------


def as_outputs(layers: Sequence[dict]) -> Outputs:
    """The dict of the last layer, with those of the earlier layers under "aux_outputs"."""
    return cast(Outputs, {**layers[-1], "aux_outputs": list(layers[:-1])})


def split_outputs(layers: Sequence[dict], sizes: list[int]) -> list[Outputs]:
    """One outputs dict for each block of queries.

    Args:
        layers: per layer a dict of tensors (B, N, ...).
        sizes: the number of queries of each block; their sum is N.
    """
    blocks: list[list[dict]] = [[] for _ in sizes]
    for layer in layers:
        parts = {key: value.split(sizes, dim=1) for key, value in layer.items()}
        for index, block in enumerate(blocks):
            block.append({key: part[index] for key, part in parts.items()})
    return [as_outputs(block) for block in blocks]


def slice_outputs(outputs: Outputs, images: slice) -> Outputs:
    """The outputs dict of some images of the batch, without query groups."""
    return slice_batch({key: value for key, value in outputs.items() if key != "groups"}, images)


def slice_batch(value, images: slice):
    """The same dicts, lists and tuples, with every tensor in them cut to some images of the batch.

    Anything else (None, numbers) stays as it is.
    """
    if isinstance(value, torch.Tensor):
        return value[images]
    if isinstance(value, dict):
        return {key: slice_batch(entry, images) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(slice_batch(entry, images) for entry in value)
    return value


class Layers(NamedTuple):
    """All layers of an outputs dict: the decoder's in order, then the encoder's proposals if any.

    L counts these layers.
    """

    logits: torch.Tensor  # (L, B, Q, C)
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
        """Labels (B, T) of targets as each layer learns them: (L, B, T).

        The encoder's proposals are class-agnostic: they learn class 0 alone.
        """
        labels = labels.expand(len(self.logits), -1, -1)
        if self.encoder:
            labels = torch.cat([labels[:-1], torch.zeros_like(labels[-1:])])
        return labels


def stack_layers(outputs: Outputs) -> Layers:
    """The layers of an outputs dict, all logits in one tensor and all boxes in another.

    The encoder's proposals are left out where all tokens are trained in their place.
    """
    layers = [*outputs["aux_outputs"], outputs]
    encoder = outputs.get("encoder")
    if encoder and "tokens" not in encoder:
        layers.append(encoder)
    return Layers(
        torch.stack([layer["pred_logits"] for layer in layers]),
        torch.stack([layer["pred_boxes"] for layer in layers]),
        encoder=len(layers) > 1 + len(outputs["aux_outputs"]),
        no_object=bool(outputs.get("no_object")),
    )
