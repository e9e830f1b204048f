"""Deformable attention (Zhu et al., ICLR 2021): a query reads a few learned points instead of the whole image.

    output(q) = W * concat over heads of  sum over l, p of  weight(q, l, p) * value_l(reference(q) + offset(q, l, p))

with levels l and points p. Cost grows linearly with the number of tokens. The function below is pure PyTorch: one
`grid_sample` a level, any device, no compiled operator. Without gradients on a CPU (teacher, inference) the same sum is
read as one bag of weighted rows, which is three times as fast; on a GPU by one kernel, see fused_attention.py.

Below it stands what Deformable DETR and DINO share: layers, encoder, the choice of proposals among its tokens
("two-stage"), and a decoder run that takes query groups beside the matching queries.
"""

import functools
import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from semidetr_lite.boxes import inverse_sigmoid
from semidetr_lite.detectors.backbone import make_backbone
from semidetr_lite.detectors.denoising import group_mask
from semidetr_lite.detectors.detector import Detector, valid_ratio
from semidetr_lite.detectors.transformer import (
    MLP,
    FeedForward,
    Memory,
    QueryGroup,
    QuerySelfAttention,
    level_table,
    map_positions,
    split_outputs,
)
from semidetr_lite.device import to_device


def deformable_attention(
    value: torch.Tensor, shapes: list[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted bilinear reads from a pyramid of maps: (B, Q, D).

    Args:
        value: (B, S, M, D/M), the tokens of all levels one after the other, split in heads.
        shapes: (H, W) of each level.
        locations: (B, Q, M, L, P, 2), (x, y) in [0, 1] of each level; outside reads zero.
        weights: (B, Q, M, L, P).
    """
    if faster := _faster_way(value, locations):
        return faster(value, shapes, locations, weights)
    batch, _, heads, depth = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)  # (B*M, L, Q, P, 2)
    weights = weights.permute(0, 2, 3, 1, 4).flatten(0, 1)  # (B*M, L, Q, P)
    total = value.new_zeros(())
    for level, tokens in enumerate(value.split([height * width for height, width in shapes], dim=1)):
        maps = tokens.permute(0, 2, 3, 1).reshape(batch * heads, depth, *shapes[level])
        # bilinear, zeros outside; values of lower precision are read at places of full precision
        read = F.grid_sample(maps.to(grids.dtype), grids[:, level], align_corners=False)
        total = total + (read * weights[:, level, None]).sum(-1)  # (B*M, D/M, Q)
    return total.view(batch, heads * depth, queries).transpose(1, 2).to(value.dtype)


def _faster_way(value, locations):
    """A function that computes the same for tensors like these and is faster, or None."""
    if value.device.type == "cpu" and not torch.is_grad_enabled() and value.dtype == locations.dtype:
        return _read_as_bags
    plain = value.device.type != "cuda" or value.dtype == torch.float64 or torch.compiler.is_compiling()
    return None if plain or value.shape[-1] & (value.shape[-1] - 1) else _fused_attention()


@functools.cache
def _fused_attention():
    """FusedAttention.apply where its kernels can be built, tried once; else None, after a warning."""
    try:
        from semidetr_lite.detectors.fused_attention import FusedAttention

        value = torch.zeros(1, 1, 1, 16, device="cuda", requires_grad=True)
        places = torch.zeros(1, 1, 1, 1, 1, 2, device="cuda")
        with torch.enable_grad():
            FusedAttention.apply(value, [(1, 1)], places, places[..., 0]).sum().backward()
        return FusedAttention.apply
    except Exception as problem:  # no Triton, no C compiler, no Python headers: each fails in its own way
        warnings.warn(f"slower deformable attention, Triton cannot build its kernel: {problem!r:.200}", stacklevel=2)
        return None


def _read_as_bags(value, shapes, locations, weights) -> torch.Tensor:
    """The same as deformable_attention: every output is a weighted sum of 4 * L * P rows of the values."""
    batch, tokens, heads, depth = value.shape
    table = level_table(shapes, locations.device)
    width, height, first = table.unbind(-1)  # (L,) each
    xy = locations * table[:, None, :2] - 0.5  # (B, Q, M, L, P, 2) in cells, whole numbers at their centres
    low = xy.floor()
    corners = []
    for axis, size in ((0, width[:, None]), (1, height[:, None])):
        cell, share = low[..., axis].clamp(-2, 2**20).int(), xy[..., axis] - low[..., axis]
        for step, part in ((0, 1 - share), (1, share)):
            here = cell + step
            corners.append((here.clamp(min=0).minimum(size - 1), part * ((here >= 0) & (here < size))))
    rows = torch.stack([y * width[:, None] + x + first[:, None] for y, _ in corners[2:] for x, _ in corners[:2]], -1)
    shares = torch.stack([weights * near_y * near_x for _, near_y in corners[2:] for _, near_x in corners[:2]], -1)
    start = torch.arange(batch, dtype=torch.int32)[:, None] * tokens * heads + torch.arange(heads, dtype=torch.int32)
    rows = rows * heads + start.view(batch, 1, heads, 1, 1, 1)  # of the values as (B * S * M, D/M)
    rows, shares = (each.flatten(3).flatten(0, 2) for each in (rows, shares))  # (B * Q * M, 4 * L * P)
    read = F.embedding_bag(rows, value.reshape(-1, depth), mode="sum", per_sample_weights=shares)
    return read.view(batch, locations.shape[1], heads * depth)


class DeformableAttention(nn.Module):
    """The learned part: where to look and how much, from the query alone; dim, heads, levels, points are D, M, L, P."""

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
        """queries (B, N, D) -> the same; references: points (B, N, L, 2) or boxes (B, N, L, 4) in [0, 1] of a level."""
        batch, count, dim = queries.shape
        value = self.value(memory.tokens)
        if memory.mask is not None:
            value = value.masked_fill(memory.mask[..., None], 0.0)
        layout = (batch, count, self.heads, self.levels, self.points)
        with torch.autocast(queries.device.type, enabled=False):  # where to look, in full precision
            asked = queries.to(self.offsets.weight.dtype)
            offsets = self.offsets(asked).float().view(*layout, 2)
            weights = self.weights(asked).float().view(*layout[:3], -1).softmax(-1).view(layout)
        centres = references[:, :, None, :, None, :2].float()
        if references.shape[-1] == 2:  # offsets in cells of each level
            cells = level_table(memory.shapes, offsets.device)[:, None, :2]  # width and height, (L, 1, 2)
            locations = centres + offsets / cells
        else:  # offsets in half box sides, spread over the points
            locations = centres + offsets / self.points * references[:, :, None, :, None, 2:].float() * 0.5
        value = value.view(batch, -1, self.heads, dim // self.heads)
        return self.output(deformable_attention(value, memory.shapes, locations, weights))


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

    def forward(self, content, positions, references, memory: Memory, *others) -> torch.Tensor:
        """As in DeformableAttention.forward; `others`: seen and context, see QuerySelfAttention.forward."""
        content = self.self_attention(content, positions, *others)
        read = self.attention(content + positions, references, memory)
        return self.feed_forward(self.norm(content + read))


class DeformableDetector(Detector):
    """Backbone, deformable encoder, decoder layers; the queries are the business of the detectors.

    Args:
        num_classes: C.
        num_queries: Q matching queries; with proposals at most the number of tokens is used.
        hidden: width of the feed-forward networks.
        temperature, offset: of the positions, see `map_positions`.
        dim, heads, levels, points: D, M, L, P.
        encoder_layers, decoder_layers: their numbers.
        backbone, backbone_weights: see `make_backbone`.
        anchor_size: side of the encoder's anchors on the first level, as a share of the image; doubles with each level.
        options: mean, std and test_size, see Detector.
    """

    takes_groups = True
    class_agnostic = False  # whether proposals are chosen by class channel 0 or by their best class

    def __init__(
        self,
        num_classes: int,
        num_queries: int,
        hidden: int,
        temperature: float,
        offset: float = 0.0,
        dim: int = 256,
        heads: int = 8,
        levels: int = 4,
        points: int = 4,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        backbone: str | nn.Module = "resnet50",
        backbone_weights: str | None = None,
        anchor_size: float = 0.05,
        **options,
    ):
        super().__init__(**options)
        self.num_classes, self.num_queries, self.dim, self.anchor_size = num_classes, num_queries, dim, anchor_size
        self.temperature, self.offset = temperature, offset
        self.backbone = make_backbone(backbone, backbone_weights)
        self.used_maps = slice(-levels, None)
        used = self.backbone.channels[self.used_maps]
        self.projections = nn.ModuleList(_projection(channels, dim, 1) for channels in used)
        for extra in range(levels - len(used)):
            self.projections.append(_projection(used[-1] if extra == 0 else dim, dim, 3))
        self.level_embedding = nn.Parameter(torch.randn(levels, dim))
        sizes = (dim, heads, levels, points, hidden)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(decoder_layers))

    def add_proposals(self) -> None:
        """The layers that choose tokens as proposals."""
        self.proposal = nn.Sequential(nn.Linear(self.dim, self.dim), nn.LayerNorm(self.dim))
        self.proposal_class, self.proposal_box = nn.Linear(self.dim, self.num_classes), MLP(self.dim, self.dim, 4, 3)

    def start(self, class_heads: Sequence[nn.Linear], box_heads: Sequence[MLP]) -> None:
        """Initial values: scores start at 0.01, boxes where their references are."""
        for stack in (self.encoder, self.decoder):
            for name, parameter in stack.named_parameters():
                if parameter.dim() > 1 and ".offsets." not in name and ".weights." not in name:
                    nn.init.xavier_uniform_(parameter)
        for head in class_heads:
            nn.init.constant_(head.bias, -math.log(0.99 / 0.01))
        for head in box_heads:
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)

    # ---- encoder -----------------------------------------------------------------------------------------------------

    def encode(self, images) -> Memory:
        """images -> Memory, with the tokens chosen as proposals if the detector has them."""
        maps, masks, padded = self.pyramid(self.normalised(images))
        shapes = [tuple(level.shape[-2:]) for level in maps]
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)  # (B, S, D)
        places = [map_positions(mask, self.dim, self.temperature, self.offset) for mask in masks]  # (B, H, W, D)
        placed = zip(places, self.level_embedding, strict=True)
        positions = torch.cat([(place + level).flatten(1, 2) for place, level in placed], 1)
        mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        ratios = torch.stack([valid_ratio(mask) for mask in masks], 1)  # (B, L, 2)
        memory = Memory(tokens, mask if padded else None, shapes, ratios, maps, None)
        references = _cell_centres(shapes, ratios)
        for layer in self.encoder:
            memory = layer(memory, positions, references)
        return memory._replace(proposals=self.propose(memory, mask)) if hasattr(self, "proposal") else memory

    def propose(self, memory: Memory, mask: torch.Tensor) -> dict:
        """The Q best tokens as an outputs dict: a box each, refined from an anchor at the token's place."""
        anchors, usable = _anchors(memory.shapes, memory.valid_ratios, self.anchor_size)
        usable = usable & ~mask
        embedded = self.proposal(memory.tokens.masked_fill(~usable[..., None], 0.0))
        scores = self.proposal_class(embedded)
        best = scores[..., 0] if self.class_agnostic else scores.amax(-1)
        best = best.masked_fill(~usable, -torch.inf)
        chosen = best.topk(min(self.num_queries, best.shape[1]), dim=1).indices[..., None]  # (B, Q, 1)
        embedded = embedded.gather(1, chosen.expand(-1, -1, self.dim))
        boxes = self.proposal_box(embedded).float() + inverse_sigmoid(anchors.gather(1, chosen.expand(-1, -1, 4)))
        return {"pred_logits": self.proposal_class(embedded), "pred_boxes": boxes.sigmoid(), "queries": embedded}

    # ---- decoder -----------------------------------------------------------------------------------------------------

    def matching_queries(self, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
        """content (B, Q, D) and boxes (B, Q, 4) cxcywh in [0, 1] (or points (B, Q, 2)) of the matching queries."""
        raise NotImplementedError

    def refine(self, memory: Memory, content, boxes, seen=None, context=None):
        """All decoder layers.

        Args:
            content, boxes: (B, N, D), (B, N, 4).
            seen: see QuerySelfAttention.forward.
            context: per layer (content, positions) of further queries that are seen but not decoded again.

        Returns:
            One outputs dict a layer, and what the queries of each layer were, (content, positions).
        """
        raise NotImplementedError

    def decode(self, memory: Memory, groups: Sequence[QueryGroup] = ()) -> dict:
        """The matching queries, and beside them any query groups, which they never see -> outputs."""
        if groups and not self.takes_groups:
            raise ValueError("query groups are boxes: DeformableDETR takes them with two_stage=True only")
        content, boxes = self.matching_queries(memory)
        sizes = [group.content.shape[1] for group in groups]
        seen = _seen(groups, boxes.shape[1])
        content = torch.cat([*(group.content for group in groups), content], 1)
        boxes = torch.cat([*(group.boxes for group in groups), boxes], 1)
        layers, states = self.refine(memory, content, boxes, seen)
        *parts, outputs = split_outputs(layers, [*sizes, content.shape[1] - sum(sizes)])
        if memory.proposals is not None:
            outputs["encoder"] = memory.proposals
        outputs["groups"] = parts
        outputs["context"] = [tuple(state[:, sum(sizes) :] for state in pair) for pair in states]
        return outputs

    def decode_groups(self, memory: Memory, outputs: dict, groups: Sequence[QueryGroup]) -> list[dict]:
        """Decode groups against the matching queries that `decode` kept: what decoding them together would give."""
        seen = _seen(groups, outputs["pred_boxes"].shape[1])
        content = torch.cat([group.content for group in groups], 1)
        boxes = torch.cat([group.boxes for group in groups], 1)
        layers, _ = self.refine(memory, content, boxes, seen[:, : content.shape[1]], outputs["context"])
        return split_outputs(layers, [group.content.shape[1] for group in groups])


def _seen(groups: Sequence[QueryGroup], matching: int) -> torch.Tensor | None:
    """(B, N, N) bool, whom the queries of the groups, followed by the matching queries, see; None for all."""
    if not groups:
        return None
    sizes = [group.content.shape[1] // group.copies for group in groups for _ in range(group.copies)]
    valid = F.pad(torch.cat([group.valid for group in groups], 1), (0, matching), value=True)
    return ~to_device(group_mask(sizes, matching), valid.device) & valid[:, None]


def _projection(channels: int, dim: int, kernel: int) -> nn.Sequential:
    """A 1x1 convolution, or a strided 3x3 one, and GroupNorm."""
    conv = nn.Conv2d(channels, dim, kernel, stride=2 if kernel == 3 else 1, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(math.gcd(32, dim // 2), dim))


def _places(shapes: list[tuple[int, int]], ratios: torch.Tensor) -> list[torch.Tensor]:
    """(B, H*W, 2) for each level: the centres (x, y) of its cells, in [0, 1] of the image in it."""
    places, table = [], level_table(shapes, ratios.device)
    for level, (height, width) in enumerate(shapes):
        y, x = (torch.arange(side, device=ratios.device) + 0.5 for side in (height, width))
        centres = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).view(-1, 2)  # in cells
        places.append(centres / (ratios[:, None, level] * table[level, :2]))
    return places


def _cell_centres(shapes: list[tuple[int, int]], ratios: torch.Tensor) -> torch.Tensor:
    """(B, S, L, 2): where each token lies, in [0, 1] of each level's map."""
    return torch.cat(_places(shapes, ratios), 1)[:, :, None] * ratios[:, None]


def _anchors(shapes: list[tuple[int, int]], ratios: torch.Tensor, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, 4) cxcywh anchors in [0, 1] of the image, and (B, S) whether they lie well inside it."""
    sides = [min(size * 2.0**level, 0.98) for level in range(len(shapes))]
    places = zip(_places(shapes, ratios), sides)
    anchors = torch.cat([torch.cat([place, torch.full_like(place, side)], -1) for place, side in places], 1)
    return anchors, ((anchors > 0.01) & (anchors < 0.99)).all(-1)
