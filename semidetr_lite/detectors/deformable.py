"""Deformable attention (Zhu et al., ICLR 2021): a query samples a few learned points of the maps.

    output(q) = W * concat over heads of
                sum over l, p of  weight(q, l, p) * value_l(reference(q) + offset(q, l, p))

with levels l and points p. Its cost grows linearly with the number of tokens.
`deformable_attention` below is the formula in PyTorch; faster ways to the same numbers stand in
kernels/.

The rest of this file is what Deformable DETR and DINO share: encoder and decoder layers, the
selection of proposals among the encoder's tokens ("two-stage"), and a decoder that takes query
groups beside the matching queries.

Shapes: B images, Q matching queries, N queries, S tokens, D channels, L levels, M heads, P points,
C classes.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from semidetr_lite.boxes import height_and_width, inverse_sigmoid
from semidetr_lite.contracts import Outputs
from semidetr_lite.detectors.backbone import make_backbone
from semidetr_lite.detectors.denoising import group_mask
from semidetr_lite.detectors.detector import Detector, valid_ratio
from semidetr_lite.detectors.kernels import select_kernel
from semidetr_lite.detectors.transformer import (
    MLP,
    FeedForward,
    Memory,
    QueryGroup,
    SelfAttention,
    level_layout,
    map_positions,
    split_outputs,
)
from semidetr_lite.device import to_device
from semidetr_lite.errors import UserError

QUERY_INITS = ("xavier", "torch")


def deformable_attention(
    value: torch.Tensor,
    shapes: list[tuple[int, int]],
    locations: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Weighted bilinear samples from a pyramid of maps.

    Args:
        value: (B, S, M, D/M), the tokens of all levels one after the other, split into heads.
        shapes: (H, W) of each level.
        locations: (B, Q, M, L, P, 2), (x, y) in [0, 1] of each level; outside is zero.
        weights: (B, Q, M, L, P).

    Returns:
        (B, Q, D), the heads side by side, in the dtype of `value`.
    """
    kernel = select_kernel(value, locations)
    if kernel is not None:
        return kernel(value, shapes, locations, weights)

    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)  # (B*M, L, Q, P, 2)
    weights = weights.permute(0, 2, 3, 1, 4).flatten(0, 1)  # (B*M, L, Q, P)
    tokens_per_level = [height * width for height, width in shapes]
    total = value.new_zeros(())
    for level, tokens in enumerate(value.split(tokens_per_level, dim=1)):
        maps = tokens.permute(0, 2, 3, 1).reshape(batch * heads, channels, *shapes[level])
        # locations keep their full precision, also beside values of lower precision
        sampled = F.grid_sample(maps.to(grids.dtype), grids[:, level], align_corners=False)
        total = total + (sampled * weights[:, level, None]).sum(-1)  # (B*M, D/M, Q)
    return total.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)


class DeformableAttention(nn.Module):
    """Deformable attention whose offsets and weights are predicted from the query alone.

    Args:
        dim, heads, levels, points: D, M, L, P.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """At first each head samples in a direction of its own and weighs all its points equally.

        Point p lies p cells from the reference.
        """
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.weights.bias)
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.points + 1)[:, None]
        offsets = directions[:, None, None] * distances  # (M, 1, P, 2)
        offsets = offsets.expand(-1, self.levels, -1, -1)
        self.offsets.bias.data = offsets.reshape(-1).clone()
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, queries: torch.Tensor, references: torch.Tensor, memory: Memory
    ) -> torch.Tensor:
        """What the queries read from the memory: (B, N, D).

        Args:
            queries: (B, N, D), content plus positions.
            references: points (B, N, L, 2) or cxcywh boxes (B, N, L, 4), in [0, 1] of each level.
                Offsets from a point are in cells; offsets from a box are in halves of its sides,
                divided by P.
            memory: its tokens are sampled; padded ones count as zero.
        """
        batch, num_queries, dim = queries.shape
        value = self.value(memory.tokens)
        if memory.mask is not None:
            value = value.masked_fill(memory.mask[..., None], 0.0)

        shape = (batch, num_queries, self.heads, self.levels, self.points)
        with torch.autocast(queries.device.type, enabled=False):  # locations in full precision
            query = queries.to(self.offsets.weight.dtype)
            offsets = self.offsets(query).float().view(*shape, 2)
            weights = self.weights(query).float().view(*shape[:3], -1).softmax(-1).view(shape)

        references = references[:, :, None, :, None].float()  # (B, N, 1, L, 1, 2 or 4)
        centres = references[..., :2]
        if references.shape[-1] == 2:
            cells = level_layout(memory.shapes, offsets.device)[:, None, :2]  # (L, 1, 2) (W, H)
            locations = centres + offsets / cells
        else:
            locations = centres + offsets / self.points * references[..., 2:] * 0.5
        value = value.view(batch, -1, self.heads, dim // self.heads)
        return self.output(deformable_attention(value, memory.shapes, locations, weights))


class EncoderLayer(nn.Module):
    """Every token samples around its own position, on every level; then a feed-forward network."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, dim_feedforward: int):
        super().__init__()
        self.attention = DeformableAttention(dim, heads, levels, points)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, dim_feedforward)

    def forward(self, memory: Memory, positions: torch.Tensor, references: torch.Tensor) -> Memory:
        """The memory with new tokens.

        Args:
            memory: of the layer before.
            positions: (B, S, D).
            references: (B, S, L, 2), the position of each token in [0, 1] of each level.
        """
        attended = self.attention(memory.tokens + positions, references, memory)
        tokens = self.feed_forward(self.norm(memory.tokens + attended))
        return memory._replace(tokens=tokens)


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the image, a feed-forward network."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, dim_feedforward: int):
        super().__init__()
        self.self_attention = SelfAttention(dim, heads)
        self.attention = DeformableAttention(dim, heads, levels, points)
        self.norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, dim_feedforward)

    def forward(
        self,
        content: torch.Tensor,
        positions: torch.Tensor,
        references: torch.Tensor,
        memory: Memory,
        attn_mask: torch.Tensor | None = None,
        extra_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """New content (B, N, D).

        Args:
            content, positions: (B, N, D).
            references: (B, N, L, 2 or 4), see DeformableAttention.forward.
            memory: of the encoder.
            attn_mask, extra_kv: see SelfAttention.forward.
        """
        content = self.self_attention(content, positions, attn_mask, extra_kv)
        attended = self.attention(content + positions, references, memory)
        return self.feed_forward(self.norm(content + attended))


class DeformableDetector(Detector):
    """Base of Deformable DETR and DINO: backbone, deformable encoder, decoder layers.

    A subclass adds its heads, and says what the matching queries are (`matching_queries`) and how
    the decoder refines them (`run_decoder`).

    Args:
        num_classes: C.
        num_queries: Q; with proposals it is at most the number of tokens.
        dim, heads, levels, points: D, M, L, P.
        encoder_layers, decoder_layers: their numbers.
        dim_feedforward: width of the feed-forward networks.
        temperature, offset: of the tokens' positions, see `map_positions`.
        backbone, backbone_weights: see `make_backbone`.
        anchor_size: side of the encoder's anchors on the first level, as a fraction of the image;
            it doubles with each level.
        mean, std, test_size: see Detector.
    """

    takes_groups = True
    class_agnostic = False  # whether proposals are ranked by class 0 alone or by their best class
    all_token_loss = False  # whether training asks all tokens, not the selected ones alone

    def __init__(
        self,
        *,
        num_classes: int,
        num_queries: int,
        dim: int,
        heads: int,
        levels: int,
        points: int,
        encoder_layers: int,
        decoder_layers: int,
        dim_feedforward: int,
        temperature: float,
        offset: float,
        backbone: str | nn.Module,
        backbone_weights: str | None,
        anchor_size: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        test_size: tuple[int, int] | None,
    ):
        super().__init__(mean, std, test_size)
        self.num_classes, self.num_queries, self.dim = num_classes, num_queries, dim
        self.anchor_size = anchor_size
        self.temperature, self.offset = temperature, offset
        self.backbone = make_backbone(backbone, backbone_weights)
        self.used_maps = slice(-levels, None)
        channels = self.backbone.channels[self.used_maps]
        self.projections = nn.ModuleList(_projection(width, dim, 1) for width in channels)
        for extra in range(levels - len(channels)):
            input_channels = channels[-1] if extra == 0 else dim
            self.projections.append(_projection(input_channels, dim, 3))
        coarsest = 2 ** (len(channels) - 1)
        self.strides = [32 // coarsest * 2**level for level in range(levels)]  # pixels per cell
        self.level_embedding = nn.Parameter(torch.randn(levels, dim))
        self.encoder = nn.ModuleList(
            EncoderLayer(dim, heads, levels, points, dim_feedforward) for _ in range(encoder_layers)
        )
        self.decoder = nn.ModuleList(
            DecoderLayer(dim, heads, levels, points, dim_feedforward) for _ in range(decoder_layers)
        )

    def add_two_stage_heads(self) -> None:
        """Add the heads that select tokens as proposals."""
        dim = self.dim
        self.proposal = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.proposal_class = nn.Linear(dim, self.num_classes)
        self.proposal_box = MLP(dim, dim, 4, 3)

    def init_heads(self, class_heads: Sequence[nn.Linear], box_heads: Sequence[MLP]) -> None:
        """Initial values of encoder, decoder and heads.

        Scores start at 0.01, boxes at their references.
        """
        for stack in (self.encoder, self.decoder):
            for name, parameter in stack.named_parameters():
                # offsets and weights: see DeformableAttention._reset_parameters
                sampling = ".offsets." in name or ".weights." in name
                if parameter.dim() > 1 and not sampling:
                    nn.init.xavier_uniform_(parameter)
        for class_head in class_heads:
            nn.init.constant_(class_head.bias, -math.log(0.99 / 0.01))
        for box_head in box_heads:
            nn.init.zeros_(box_head.last_layer.weight)
            nn.init.zeros_(box_head.last_layer.bias)

    def init_queries(self, query_init: str) -> None:
        """Initial weights of what makes the queries: positions, contents and proposals.

        Args:
            query_init: "xavier" as in the released detectors, or "torch" for PyTorch's own.

        Raises UserError for another name.
        """
        if query_init not in QUERY_INITS:
            choice = " or ".join(QUERY_INITS)
            raise UserError(f"no query_init called {query_init!r}: choose {choice}")
        if query_init == "torch":
            return
        names = ("query_positions", "proposal", "box_code", "reference_points")
        layers = [layer for name in names if hasattr(self, name)
                  for layer in getattr(self, name).modules()]  # fmt: skip
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        reference_points = getattr(self, "reference_points", None)
        if isinstance(reference_points, nn.Linear):
            nn.init.zeros_(reference_points.bias)

    # ---- encoder ---------------------------------------------------------------------------------

    def encode(self, images: Sequence[torch.Tensor] | torch.Tensor) -> Memory:
        """The encoder's memory of a batch, with proposals if the detector is two-stage.

        Args:
            images: B images, see Detector.forward.
        """
        maps, masks, padded = self.extract_features(self.normalize(images))
        shapes = [height_and_width(level) for level in maps]
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)  # (B, S, D)
        level_positions = []
        for mask, embedding in zip(masks, self.level_embedding, strict=True):
            code = map_positions(mask, self.dim, self.temperature, self.offset)  # (B, H, W, D)
            level_positions.append((code + embedding).flatten(1, 2))
        positions = torch.cat(level_positions, 1)
        mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        valid_ratios = torch.stack([valid_ratio(mask) for mask in masks], 1)  # (B, L, 2)
        memory = Memory(
            tokens=tokens,
            mask=mask if padded else None,
            shapes=shapes,
            valid_ratios=valid_ratios,
            features=maps,
            proposals=None,
        )
        references = _token_references(shapes, valid_ratios)
        for layer in self.encoder:
            memory = layer(memory, positions, references)
        if hasattr(self, "proposal"):
            memory = memory._replace(proposals=self.select_proposals(memory, mask))
        return memory

    def select_proposals(self, memory: Memory, mask: torch.Tensor) -> Outputs:
        """The Q best-scored tokens as an outputs dict; each box is an anchor at its token, refined.

        Anchors near the border or in the padding come last. In training with `all_token_loss`, what
        all tokens say stands under "tokens".

        Args:
            memory: of the last encoder layer.
            mask: (B, S) bool, True = padding.
        """
        anchors, inside = _anchors(memory.shapes, memory.valid_ratios, self.anchor_size)
        usable = inside & ~mask
        embedded = self.proposal(memory.tokens.masked_fill(~usable[..., None], 0.0))
        class_logits = self.proposal_class(embedded)
        scores = class_logits[..., 0] if self.class_agnostic else class_logits.amax(-1)
        scores = scores.masked_fill(~usable, -torch.inf)
        count = min(self.num_queries, scores.shape[1])
        selected = scores.topk(count, dim=1).indices[..., None]  # (B, Q, 1)
        proposals: Outputs = {}
        if self.training and self.all_token_loss:
            boxes = self._refined(embedded, anchors)
            proposals["tokens"] = {
                "pred_logits": class_logits,
                "pred_boxes": boxes,
                "usable": usable,
            }
        embedded = embedded.gather(1, selected.expand(-1, -1, self.dim))
        anchors = anchors.gather(1, selected.expand(-1, -1, 4))
        proposals["pred_logits"] = self.proposal_class(embedded)
        proposals["pred_boxes"] = self._refined(embedded, anchors)
        proposals["queries"] = embedded
        return proposals

    def _refined(self, embedded: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Boxes (B, N, 4) cxcywh in [0, 1] of embedded tokens (B, N, D) and their anchors."""
        return (self.proposal_box(embedded).float() + inverse_sigmoid(anchors)).sigmoid()

    # ---- decoder ---------------------------------------------------------------------------------

    def matching_queries(self, memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
        """The matching queries of a batch.

        Returns:
            content (B, Q, D), and boxes (B, Q, 4) cxcywh in [0, 1] or points (B, Q, 2).
        """
        raise NotImplementedError

    def run_decoder(
        self,
        memory: Memory,
        content: torch.Tensor,
        boxes: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        extra_kv: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[list[dict], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Run all decoder layers on N queries.

        Args:
            memory: of the encoder.
            content: (B, N, D).
            boxes: (B, N, 4) reference boxes, cxcywh in [0, 1]; points (B, N, 2) in some detectors.
            attn_mask: (B, N, K) bool, True = may attend, see SelfAttention.forward.
            extra_kv: per layer the content and positions of more queries, which are attended to
                and not decoded again.

        Returns:
            One outputs dict per layer; per layer its input, (content, positions) (B, N, D) each.
        """
        raise NotImplementedError

    def decode(self, memory: Memory, groups: Sequence[QueryGroup] = ()) -> Outputs:
        """Decode the matching queries, and beside them query groups, to which they do not attend.

        Returns:
            The outputs of the matching queries, those of the groups under "groups". Under
            "layer_inputs" stands what `decode_groups` needs.

        Raises:
            ValueError: groups for a detector whose queries are not boxes.
        """
        if groups and not self.takes_groups:
            raise ValueError(
                "query groups are boxes: DeformableDETR takes them with two_stage=True only"
            )
        content, boxes = self.matching_queries(memory)
        num_matching = content.shape[1]
        sizes = [group.content.shape[1] for group in groups]
        attn_mask = _group_attn_mask(groups, num_matching)
        content = torch.cat([*(group.content for group in groups), content], 1)
        boxes = torch.cat([*(group.boxes for group in groups), boxes], 1)
        layers, layer_inputs = self.run_decoder(memory, content, boxes, attn_mask)
        *group_outputs, outputs = split_outputs(layers, [*sizes, num_matching])
        if memory.proposals is not None:
            outputs["encoder"] = memory.proposals
        outputs["groups"] = group_outputs
        first = sum(sizes)
        outputs["layer_inputs"] = [
            (content[:, first:], positions[:, first:]) for content, positions in layer_inputs
        ]
        return outputs

    def decode_groups(
        self, memory: Memory, outputs: Outputs, groups: Sequence[QueryGroup]
    ) -> list[Outputs]:
        """Decode query groups after the matching queries: the result of decoding them together.

        Args:
            memory: of the encoder.
            outputs: of `decode` on the same memory.
            groups: at least one.

        Returns:
            One outputs dict per group.
        """
        attn_mask = _group_attn_mask(groups, outputs["pred_boxes"].shape[1])
        content = torch.cat([group.content for group in groups], 1)
        boxes = torch.cat([group.boxes for group in groups], 1)
        assert attn_mask is not None  # there is a group
        attn_mask = attn_mask[:, : content.shape[1]]  # the rows of the groups
        layers, _ = self.run_decoder(memory, content, boxes, attn_mask, outputs["layer_inputs"])
        return split_outputs(layers, [group.content.shape[1] for group in groups])


def _group_attn_mask(groups: Sequence[QueryGroup], num_matching: int) -> torch.Tensor | None:
    """(B, N, N) bool, True = may attend, for the queries of all groups and then the matching ones.

    None if there are no groups: the matching queries attend to each other.
    """
    if not groups:
        return None
    valid = torch.cat([group.valid for group in groups], 1)
    valid = F.pad(valid, (0, num_matching), value=True)
    sizes_per_image = [
        sum(sizes, ()) for sizes in zip(*(group.block_sizes() for group in groups), strict=True)
    ]
    layouts = list(dict.fromkeys(sizes_per_image))  # mostly a single one
    masks = torch.stack([group_mask(list(sizes), num_matching) for sizes in layouts])
    blocked = to_device(masks, valid.device)
    if len(layouts) > 1:
        layout_of = torch.tensor([layouts.index(sizes) for sizes in sizes_per_image])
        blocked = blocked[to_device(layout_of, valid.device)]
    return ~blocked & valid[:, None]


def _projection(channels: int, dim: int, kernel: int) -> nn.Sequential:
    """A 1x1 convolution, or a 3x3 one with stride 2, and GroupNorm."""
    stride = 2 if kernel == 3 else 1
    conv = nn.Conv2d(channels, dim, kernel, stride=stride, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(cast(torch.Tensor, conv.bias))
    return nn.Sequential(conv, nn.GroupNorm(math.gcd(32, dim // 2), dim))


def _cell_centers(shapes: list[tuple[int, int]], valid_ratios: torch.Tensor) -> list[torch.Tensor]:
    """Per level (B, H*W, 2): the centres (x, y) of its cells, in [0, 1] of the unpadded image.

    Args:
        shapes: (H, W) of each level.
        valid_ratios: (B, L, 2), see Memory.
    """
    device = valid_ratios.device
    layout = level_layout(shapes, device)
    centers = []
    for level, (height, width) in enumerate(shapes):
        y = torch.arange(height, device=device) + 0.5
        x = torch.arange(width, device=device) + 0.5
        grid = [x.expand(height, width), y[:, None].expand(height, width)]
        cells = torch.stack(grid, -1).view(-1, 2)
        valid_cells = valid_ratios[:, None, level] * layout[level, :2]  # (B, 1, 2) (W, H)
        centers.append(cells / valid_cells)
    return centers


def _token_references(shapes: list[tuple[int, int]], valid_ratios: torch.Tensor) -> torch.Tensor:
    """(B, S, L, 2): the position (x, y) of each token, in [0, 1] of each padded level."""
    centers = torch.cat(_cell_centers(shapes, valid_ratios), 1)
    return centers[:, :, None] * valid_ratios[:, None]


def _anchors(
    shapes: list[tuple[int, int]], valid_ratios: torch.Tensor, size: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A square anchor at every token.

    Args:
        shapes, valid_ratios: see _cell_centers.
        size: side on the first level, as a fraction of the image; it doubles with each level.

    Returns:
        anchors (B, S, 4) cxcywh in [0, 1] of the unpadded image; (B, S) bool, whether all four
        numbers lie between 0.01 and 0.99.
    """
    level_anchors = []
    for level, centers in enumerate(_cell_centers(shapes, valid_ratios)):
        side = min(size * 2.0**level, 0.98)
        level_anchors.append(torch.cat([centers, torch.full_like(centers, side)], -1))
    anchors = torch.cat(level_anchors, 1)
    return anchors, ((anchors > 0.01) & (anchors < 0.99)).all(-1)
