"""DINO (Zhang et al., ICLR 2023), as Semi-DETR uses it: queries start from the encoder's best tokens.

    images -> backbone -> projected maps -> encoder -> tokens -> best Q tokens give boxes -> decoder refines them

* Mixed query selection: a query's box comes from the encoder, its content is learned.
* Look forward twice: the boxes of layer l are refined from those of layer l-1 with the gradient of both.
* Contrastive denoising: see denoising.py.

`DINO(num_classes=80)` is the model of the paper; `DINO(num_classes=10, num_queries=30, dim=64, ..., backbone="tiny")`
trains on a laptop.

Differences from the released code: no dropout (0 there), and query positions come from the boxes in the image itself,
not in the padded batch, so that they do not depend on the neighbours.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from semidetr_lite.boxes import inverse_sigmoid
from semidetr_lite.detectors.backbone import make_backbone
from semidetr_lite.detectors.deformable_detr import DecoderLayer, EncoderLayer
from semidetr_lite.detectors.denoising import Denoising, group_mask
from semidetr_lite.detectors.detector import IMAGENET_MEAN, IMAGENET_STD, Detector, same_size_chunks
from semidetr_lite.detectors.transformer import MLP, Memory, QueryGroup, map_positions, sine_positions


class DINO(Detector):
    """The detector.

    Args:
        num_classes: C.
        num_queries: Q matching queries; at most the number of tokens is used.
        dim, heads, levels, points: D, M, L, P.
        hidden: width of the feed-forward networks.
        encoder_layers, decoder_layers: their numbers.
        backbone: "tiny", a torchvision ResNet by name, or a module with `channels` and `sees_padding`.
        backbone_weights: see `make_backbone`.
        anchor_size: side of the encoder's anchors on the first level, as a share of the image; doubles with each level.
        denoising_queries, label_noise: see Denoising.
        mean, std, test_size: see Detector.
    """

    def __init__(
        self,
        num_classes: int,
        num_queries: int = 900,
        dim: int = 256,
        heads: int = 8,
        levels: int = 4,
        points: int = 4,
        hidden: int = 2048,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        backbone: str | nn.Module = "resnet50",
        backbone_weights: str | None = None,
        anchor_size: float = 0.05,
        denoising_queries: int = 100,
        label_noise: float = 0.25,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        test_size: tuple[int, int] | None = None,
    ):
        super().__init__(mean, std, test_size)
        self.num_classes, self.num_queries, self.dim, self.anchor_size = num_classes, num_queries, dim, anchor_size
        self.backbone = make_backbone(backbone, backbone_weights)
        self.projections = nn.ModuleList(_projection(channels, dim, 1) for channels in self.backbone.channels)
        for extra in range(levels - len(self.projections)):
            self.projections.append(_projection(self.backbone.channels[-1] if extra == 0 else dim, dim, 3))
        self.level_embedding = nn.Parameter(torch.randn(levels, dim))
        sizes = (dim, heads, levels, points, hidden)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.content = nn.Embedding(num_queries, dim)
        self.query_positions = MLP(2 * dim, dim, dim, 2)
        self.proposal = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.proposal_class, self.proposal_box = nn.Linear(dim, num_classes), MLP(dim, dim, 4, 3)
        self.class_head, self.box_head = (
            nn.Linear(dim, num_classes),
            MLP(dim, dim, 4, 3),
        )  # shared by the decoder's layers
        self.denoising = Denoising(num_classes, dim, denoising_queries, label_noise)
        self._start()

    def _start(self) -> None:
        """Scores start at 0.01, boxes where their references are."""
        for name, parameter in self.named_parameters():
            if (
                parameter.dim() > 1
                and name.startswith(("decoder.", "encoder."))
                and ".attention.offsets" not in name
                and ".attention.weights" not in name
            ):
                nn.init.xavier_uniform_(parameter)
        for head in (self.proposal_class, self.class_head):
            nn.init.constant_(head.bias, -math.log(0.99 / 0.01))
        for head in (self.proposal_box, self.box_head):
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)

    # ---- encoder
    # ----------------------------------------------------------------------------------------------------------

    def encode(self, images) -> Memory:
        """images -> Memory, with the tokens chosen as proposals."""
        maps, masks = self.pyramid(self.normalised(images))
        shapes = [tuple(level.shape[-2:]) for level in maps]
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)  # (B, S, D)
        positions = torch.cat(
            [
                (map_positions(mask, self.dim) + here).flatten(1, 2)
                for mask, here in zip(masks, self.level_embedding, strict=True)
            ],
            1,
        )
        mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        ratios = torch.stack([_valid_ratio(mask) for mask in masks], 1)  # (B, L, 2)
        memory = Memory(tokens, mask if self._padded else None, shapes, ratios, maps, None)
        references = _cell_centres(shapes, ratios)
        for layer in self.encoder:
            memory = layer(memory, positions, references)
        return memory._replace(proposals=self.propose(memory, mask))

    def pyramid(self, images: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """L projected maps (B, D, H, W) and their masks (B, H, W), True = padding."""
        sizes = {tuple(image.shape[-2:]) for image in images}
        self._padded = len(sizes) > 1
        if not self._padded:
            maps = self._project(torch.stack(images))
            return maps, [level.new_zeros(level.shape[0], *level.shape[-2:], dtype=torch.bool) for level in maps]
        if self.backbone.sees_padding:
            return self._project_padded(images)
        return self._project_apart(images)

    def _project(self, stacked: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) -> L maps.

        Levels beyond the backbone's come from strided convolutions of its last map, then of each other.
        """
        maps = self.backbone(stacked)
        projected = [projection(level) for projection, level in zip(self.projections, maps, strict=False)]
        source = maps[-1]
        for projection in self.projections[len(maps) :]:
            source = projection(source)
            projected.append(source)
        return projected

    def _project_padded(self, images):
        """Images filled up with zeros to the largest height and width; the backbone sees the filled border."""
        height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
        stacked = images[0].new_zeros(len(images), 3, height, width)
        mask = torch.ones(len(images), height, width, dtype=torch.bool, device=stacked.device)
        for row, image in enumerate(images):
            stacked[row, :, : image.shape[-2], : image.shape[-1]] = image
            mask[row, : image.shape[-2], : image.shape[-1]] = False
        maps = self._project(stacked)
        return maps, [F.interpolate(mask[:, None].float(), level.shape[-2:])[:, 0] > 0.5 for level in maps]

    def _project_apart(self, images):
        """Images of each size run together; only the finished maps are filled up, so no image feels its neighbours."""
        chunks = same_size_chunks(images, len(images))
        parts = [self._project(torch.stack([images[index] for index in chunk])) for chunk in chunks]
        maps, masks = [], []
        for level in zip(*parts, strict=True):
            height, width = (max(part.shape[side] for part in level) for side in (-2, -1))
            mask = torch.ones(len(images), height, width, dtype=torch.bool, device=level[0].device)
            for chunk, part in zip(chunks, level, strict=True):
                mask[chunk, : part.shape[-2], : part.shape[-1]] = False
            filled = [F.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2])) for part in level]
            order = torch.tensor([index for chunk in chunks for index in chunk]).argsort()
            maps.append(torch.cat(filled)[order])
            masks.append(mask)
        return maps, masks

    def propose(self, memory: Memory, mask: torch.Tensor) -> dict:
        """The Q best tokens as an outputs dict: a box each, refined from an anchor at the token's place."""
        anchors, usable = _anchors(memory.shapes, memory.valid_ratios, self.anchor_size)
        usable = usable & ~mask
        embedded = self.proposal(memory.tokens.masked_fill(~usable[..., None], 0.0))
        best = self.proposal_class(embedded).amax(-1).masked_fill(~usable, -torch.inf)
        chosen = best.topk(min(self.num_queries, best.shape[1]), dim=1).indices[..., None]  # (B, Q, 1)
        embedded = embedded.gather(1, chosen.expand(-1, -1, self.dim))
        boxes = self.proposal_box(embedded).float() + inverse_sigmoid(anchors.gather(1, chosen.expand(-1, -1, 4)))
        return {"pred_logits": self.proposal_class(embedded), "pred_boxes": boxes.sigmoid(), "queries": embedded}

    # ---- decoder
    # ----------------------------------------------------------------------------------------------------------

    def decode(self, memory: Memory, groups: Sequence[QueryGroup] = ()) -> dict:
        """The matching queries, and beside them any query groups, which they never see -> outputs."""
        boxes = memory.proposals["pred_boxes"].detach()
        content = self.content.weight[: boxes.shape[1]].expand(len(boxes), -1, -1)
        sizes = [group.content.shape[1] for group in groups]
        blocked, padding = self._masks(groups, boxes.shape[1], boxes.device)
        content = torch.cat([*(group.content for group in groups), content], 1)
        boxes = torch.cat([*(group.boxes for group in groups), boxes], 1)
        layers, states = self._refine(memory, content, boxes, blocked, padding)
        *parts, matching = zip(*(_split(layer, [*sizes, -1]) for layer in layers), strict=True)
        outputs = _as_outputs(matching)
        outputs["encoder"] = memory.proposals
        outputs["groups"] = [_as_outputs(part) for part in parts]
        start = sum(sizes)
        outputs["context"] = [(content[:, start:], positions[:, start:]) for content, positions in states]
        return outputs

    def decode_groups(self, memory: Memory, outputs: dict, groups: Sequence[QueryGroup]) -> list[dict]:
        """Decode groups afterwards, against the matching queries that `decode` kept.

        Exactly what decoding them together would give.
        """
        matching = outputs["pred_boxes"].shape[1]
        blocked, padding = self._masks(groups, matching, memory.tokens.device)
        content = torch.cat([group.content for group in groups], 1)
        boxes = torch.cat([group.boxes for group in groups], 1)
        layers, _ = self._refine(memory, content, boxes, blocked[: content.shape[1]], padding, outputs["context"])
        sizes = [group.content.shape[1] for group in groups]
        return [_as_outputs(part) for part in zip(*(_split(layer, sizes) for layer in layers), strict=True)]

    def _masks(
        self, groups: Sequence[QueryGroup], matching: int, device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(blocked (N, N) or None, padding (B, N) or None) for the groups followed by the matching queries."""
        if not groups:
            return None, None
        blocked = group_mask([g.content.shape[1] // g.copies for g in groups for _ in range(g.copies)], matching).to(
            device
        )
        valid = torch.cat([group.valid for group in groups], 1)
        return blocked, F.pad(~valid, (0, matching))

    def _refine(self, memory: Memory, content, boxes, blocked, padding, context=None):
        """All decoder layers: one outputs dict a layer, and what the queries of each layer were (content, positions).
        """
        layers, states = [], []
        scale = torch.cat([memory.valid_ratios, memory.valid_ratios], -1)  # (B, L, 4)
        before = boxes  # with gradient: look forward twice
        for number, layer in enumerate(self.decoder):
            references = boxes[:, :, None] * scale[:, None]  # (B, N, L, 4)
            places = sine_positions(boxes[..., [1, 0, 2, 3]], self.dim // 2).to(content.dtype)  # (B, N, 2 * D)
            positions = self.query_positions(places)
            states.append((content, positions))
            content = layer(
                content, positions, references, memory, blocked, padding, context[number] if context else None
            )
            hidden = self.decoder_norm(content)
            shift = self.box_head(hidden).float()
            pred_boxes = (shift + inverse_sigmoid(before)).sigmoid()
            layers.append({"pred_logits": self.class_head(hidden), "pred_boxes": pred_boxes, "queries": hidden})
            before = (shift + inverse_sigmoid(boxes)).sigmoid()
            boxes = before.detach()
        return layers, states


def _projection(channels: int, dim: int, kernel: int) -> nn.Sequential:
    """A 1x1 convolution, or a strided 3x3 one, and GroupNorm."""
    conv = nn.Conv2d(channels, dim, kernel, stride=2 if kernel == 3 else 1, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(math.gcd(32, dim // 2), dim))


def _valid_ratio(mask: torch.Tensor) -> torch.Tensor:
    """(B, H, W) padding -> (B, 2): the share of width and height that is image."""
    return torch.stack([(~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)], -1)


def _centres(shape: tuple[int, int], device) -> torch.Tensor:
    """(H*W, 2) cell centres (x, y), in cells."""
    y, x = torch.meshgrid(
        torch.arange(shape[0], device=device) + 0.5, torch.arange(shape[1], device=device) + 0.5, indexing="ij"
    )
    return torch.stack([x, y], -1).view(-1, 2)


def _cell_centres(shapes: list[tuple[int, int]], ratios: torch.Tensor) -> torch.Tensor:
    """(B, S, L, 2): where each token lies, in [0, 1] of each level's map."""
    places = []
    for level, shape in enumerate(shapes):
        cells = ratios[:, None, level] * ratios.new_tensor([shape[1], shape[0]])  # (B, 1, 2) image in cells
        places.append(_centres(shape, ratios.device)[None] / cells)  # (B, H*W, 2) in [0, 1] of the image
    return torch.cat(places, 1)[:, :, None] * ratios[:, None]


def _anchors(shapes: list[tuple[int, int]], ratios: torch.Tensor, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, 4) cxcywh anchors in [0, 1] of the image, and (B, S) whether they lie well inside it."""
    anchors = []
    for level, shape in enumerate(shapes):
        cells = ratios[:, None, level] * ratios.new_tensor([shape[1], shape[0]])
        centres = _centres(shape, ratios.device)[None] / cells
        anchors.append(torch.cat([centres, torch.full_like(centres, min(size * 2.0**level, 0.98))], -1))
    anchors = torch.cat(anchors, 1)
    return anchors, ((anchors > 0.01) & (anchors < 0.99)).all(-1)


def _split(layer: dict, sizes: list[int]) -> list[dict]:
    """One outputs dict per part of the queries; a last size of -1 takes the rest."""
    start, parts = 0, []
    for size in sizes:
        stop = None if size == -1 else start + size
        parts.append({key: value[:, start:stop] for key, value in layer.items()})
        start = stop
    return parts


def _as_outputs(layers: Sequence[dict]) -> dict:
    """The last layer's dict with the earlier ones under "aux_outputs"."""
    return {**layers[-1], "aux_outputs": list(layers[:-1])}
