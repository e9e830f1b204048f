"""Mixing: a strong view that shows several unlabelled images, with the pseudo-boxes of all of them.

Two forms, as in MixPL (Chen et al., 2023):

    mixup   two strong views, half and half, pixel by pixel; boxes of both
    mosaic  four strong views, each cut to a cell of the canvas; boxes cut to the cell

The teacher still sees each weak view alone. What is mixed are the strong views that the student
sees, and a mixed view says where each of its images is: an entry of "sources" is

    "offset"   the image's row in the batch, less the row of the view
    "matrix"   (3, 3) from the image's own pixels to the pixels of the mixed view
    "region"   (x1, y1, x2, y2) pixels of the mixed view in which it is seen
    "visible"  a box of which a smaller fraction remains in the region is dropped

so that pseudo-boxes of a weak view are mapped by the same matrices as those of a plain strong view.
The first source is the image of the view itself.

Partners come from the same block of four neighbouring images of the step. A block is never divided
among micro-batches or processes, so a step is the same in any number of them, and its views are a
pure function of (seed, step, position) as all others are.

Shapes: B images, S sources of a view, K boxes of an image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from semidetr_lite.contracts import Source, Target
from semidetr_lite.data.view_settings import ViewSettings
from semidetr_lite.data.views import PER_BOX, View, map_boxes, map_target, warp
from semidetr_lite.device import to_device
from semidetr_lite.errors import UserError

BLOCK = 4  # images that are mixed with each other
MOSAIC_CENTRE = (0.35, 0.65)  # where the four cells meet, a fraction of the canvas
MIXING_STREAM = 6  # of random numbers, beside those of batches.py


def check_blocks(mixing: str, unlabelled: int, parts: int) -> None:
    """Raises UserError where micro-batches and processes would divide a block of a step.

    Args:
        mixing: the setting.
        unlabelled: images of a step.
        parts: micro-batches times processes that they are divided among.
    """
    if mixing != "none" and unlabelled % (BLOCK * parts):
        whole = f"a multiple of {BLOCK * parts}"
        fault = f"--mixing {mixing} mixes blocks of {BLOCK} unlabelled images"
        raise UserError(f"{fault}: --unlabelled-batch-size must be {whole}, got {unlabelled}")


# ---- making views --------------------------------------------------------------------------------


def mix_views(
    views: Sequence[View], positions: Sequence[int], seed: int, step: int, settings: ViewSettings
) -> list[View]:
    """The strong views of whole blocks, some of them mixed.

    Args:
        views: plain strong views, of one shard of a step.
        positions: their positions in the whole step; the first begins a block.
        seed, step: of the random numbers.
        settings: `mixing` and `mixing_share`.
    """
    if settings.mixing == "none":
        return list(views)
    mixed = []
    for row, position in enumerate(positions):
        rng = np.random.default_rng([seed, MIXING_STREAM, step, position])
        if rng.random() >= settings.mixing_share:
            mixed.append(views[row])
            continue
        kind = settings.mixing
        if kind == "both":
            kind = "mixup" if rng.random() < 0.5 else "mosaic"
        first = row - position % BLOCK
        others = [first + (position + further) % BLOCK for further in range(1, BLOCK)]
        others = rng.permutation(others).tolist()
        if kind == "mixup":
            mixed.append(mixup(views, row, others[0]))
        else:
            mixed.append(mosaic(views, [row, *others], rng, settings.visible))
    return mixed


def mixup(views: Sequence[View], row: int, other: int) -> View:
    """View `row` and view `other`, half and half where both are.

    The other is made smaller, if need be, to fit into the canvas of the first.
    """
    (image, target), (other_image, other_target) = views[row], views[other]
    size = tuple(target["size"])
    height, width = other_target["size"]
    scale = min(size[0] / height, size[1] / width, 1.0)
    matrix = _scale_and_move(scale, 0.0, 0.0)
    cell = (round(height * scale), round(width * scale))
    moved = warp(other_image, matrix, cell)
    image = image.clone()
    part = image[:, : cell[0], : cell[1]]
    half = (part.float() + moved.float()) / 2
    image[:, : cell[0], : cell[1]] = half if image.is_floating_point() else half.round().byte()
    placed = [
        (row, _scale_and_move(1.0, 0.0, 0.0), (0, 0, size[1], size[0])),
        (other, matrix, (0, 0, cell[1], cell[0])),
    ]
    return image, _mixed_target(views, placed, visible=0.0)


def mosaic(
    views: Sequence[View], rows: list[int], rng: np.random.Generator, visible: float
) -> View:
    """Four views in the cells of one canvas, that of the first.

    Each is shown at a random scale, between a whole view in the cell and full size, and at a
    random place of it.
    """
    height, width = views[rows[0]][1]["size"]
    x = round(float(rng.uniform(*MOSAIC_CENTRE)) * width)
    y = round(float(rng.uniform(*MOSAIC_CENTRE)) * height)
    cells = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    canvas, placed = torch.empty_like(views[rows[0]][0]), []
    for row, cell in zip(rows, rng.permutation(len(cells)).tolist(), strict=True):
        left, top, right, bottom = region = cells[cell]
        image, target = views[row]
        whole = max((right - left) / target["size"][1], (bottom - top) / target["size"][0])
        scale = float(np.exp(rng.uniform(np.log(whole), np.log(max(whole, 1.0)))))
        spare_x = max(target["size"][1] * scale - (right - left), 0.0)
        spare_y = max(target["size"][0] * scale - (bottom - top), 0.0)
        dx, dy = rng.uniform(0, 1, 2) * (spare_x, spare_y)
        to_cell = _scale_and_move(scale, -dx, -dy)
        canvas[:, top:bottom, left:right] = warp(image, to_cell, (bottom - top, right - left))
        placed.append((row, _scale_and_move(scale, left - dx, top - dy), region))
    return canvas, _mixed_target(views, placed, visible)


def _scale_and_move(scale: float, dx: float, dy: float) -> torch.Tensor:
    """The matrix (3, 3) x -> scale * x + dx, y -> scale * y + dy."""
    return torch.tensor([[scale, 0, dx], [0, scale, dy], [0, 0, 1]], dtype=torch.float32)


def _mixed_target(views: Sequence[View], placed: list[tuple], visible: float) -> Target:
    """The target of a mixed view: that of its own image, moved, with "sources" and all truths.

    Args:
        views: the plain views.
        placed: per source its row, the matrix (3, 3) from its plain view to the mixed one, and its
            region; the view's own image first.
        visible: see "visible" above.
    """
    row, matrix, _ = placed[0]
    own = views[row][1]
    without_truth = own.copy()
    without_truth.pop("truth", None)
    target = map_target(without_truth, matrix, own["size"])
    target["sources"] = []
    truths = []
    for other, matrix, region in placed:
        of_source = views[other][1]
        target["sources"].append({
            "offset": other - row,
            "matrix": matrix @ of_source["matrix"],
            "region": region,
            "visible": visible,
        })  # fmt: skip
        if "truth" in of_source:
            truths.append(_in_region(of_source["truth"], matrix, region, visible))
    if len(truths) == len(placed):
        per_box: dict[str, Any] = {
            key: torch.cat([cast(dict, truth)[key] for truth in truths])
            for key in PER_BOX
            if all(key in truth for truth in truths)
        }
        target["truth"] = cast(Target, {"size": target["size"], **per_box})
    return target


def _in_region(truth: Target, matrix: torch.Tensor, region: tuple, visible: float) -> Target:
    """A truth in a mixed view: what remains of it in its region, in pixels of the whole view."""
    left, top, right, bottom = region
    to_region = _scale_and_move(1.0, -left, -top) @ matrix
    mapped = map_target(truth, to_region, (bottom - top, right - left), visible)
    corner = torch.tensor([left, top, left, top], dtype=torch.float32)
    mapped["boxes"] = mapped["boxes"] + corner
    return mapped


# ---- mapping pseudo-boxes ------------------------------------------------------------------------


class Sources(NamedTuple):
    """Which images the strong views of a batch show, and where; a plain view shows its own."""

    rows: np.ndarray  # (B, S) the images' rows in the batch
    present: torch.Tensor  # (B, S) bool, False where a view has fewer sources
    matrices: torch.Tensor  # (B, S, 3, 3) from an image's own pixels to the view's
    regions: torch.Tensor  # (B, S, 4) xyxy pixels of the view
    visible: torch.Tensor  # (B, S) the fraction of a box that must remain


def sources_of(views: list[Target]) -> Sources | None:
    """The sources of strong views, from their targets; None where none of them is mixed."""
    if not any("sources" in view for view in views):
        return None
    per_view: list[list[Source]] = []
    for view in views:
        height, width = view["size"]
        region = (0, 0, width, height)
        plain = Source(offset=0, matrix=view["matrix"], region=region, visible=0.0)
        per_view.append(view.get("sources", [plain]))
    most = max(len(sources) for sources in per_view)
    present = [[number < len(sources) for number in range(most)] for sources in per_view]
    padded = [sources + sources[:1] * (most - len(sources)) for sources in per_view]
    rows = [[row + one["offset"] for one in sources] for row, sources in enumerate(padded)]
    return Sources(
        np.array(rows),
        torch.tensor(present),
        torch.stack([torch.stack([one["matrix"] for one in sources]) for sources in padded]),
        torch.tensor([[one["region"] for one in sources] for sources in padded]).float(),
        torch.tensor([[one["visible"] for one in sources] for sources in padded]),
    )


def map_to_mixed_views(
    boxes: torch.Tensor, sources: Sources, weak: list[Target]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map the boxes of weak views to the strong views that show their images.

    Args:
        boxes: (B, S, K, 4) xyxy pixels of the weak views `sources.rows`.
        sources: of the strong views.
        weak: the targets of the weak views, with "matrix".

    Returns:
        (B, S, K, 4) xyxy pixels of the strong views, cut to their regions; (B, S, K) bool, False
        where too little of a box is left.
    """
    device = boxes.device
    to_original = torch.stack([torch.linalg.inv(view["matrix"]) for view in weak])
    corners = sources.regions[..., :2]
    to_region = torch.eye(3).expand(sources.matrices.shape).clone()
    to_region[..., :2, 2] = -corners
    matrices = to_region @ (sources.matrices @ to_original[torch.from_numpy(sources.rows)])
    sizes = (sources.regions[..., 2:] - corners).flip(-1)
    mapped, keep = map_boxes(
        boxes,
        to_device(matrices, device),
        to_device(sizes, device),
        to_device(sources.visible[..., None], device),
    )
    corners = to_device(corners.repeat(1, 1, 2)[:, :, None], device)
    return mapped + corners, keep & to_device(sources.present[..., None], device)
