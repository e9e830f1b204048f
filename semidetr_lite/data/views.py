"""Weak, strong and labelled views of an image, each with the 3x3 matrix that moved its pixels.

The teacher sees the weak view, the student the strong view. A box found in the weak view is mapped
to the strong view by `strong["matrix"] @ inverse(weak["matrix"])` (paper section 3.1; released
code: geo_utils.py). Pixels and boxes move by the same matrix: there is one `warp` and one
`map_boxes`.

Matrices act on columns (x, y, 1) in continuous pixel coordinates: the centre of the first pixel is
(0.5, 0.5), so mirroring is x -> W - x. Randomness comes in as a numpy generator; nothing here keeps
state.

Where images are resized (the COCO presets), they stay uint8 from the file to the detector: Pillow's
integer colour operations are several times as fast as their float twins, and a batch takes a
quarter of the memory. Elsewhere (digits) views are floats in [0, 1], computed as in the recorded
runs.

Differences from the released code: docs/paper_vs_code.md.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torchvision.transforms.v2 import functional as F

from semidetr_lite.boxes import height_and_width
from semidetr_lite.contracts import Target, View
from semidetr_lite.data.view_settings import ViewSettings

GREY = 125  # uint8 value outside the image and of erased patches, as in the released code
FILL = GREY / 255  # the same for floats in [0, 1]
CROP_SHORT_SIDES = (400, 500, 600)  # pixels, of an image before it is cropped
CROP_SIDES = (384, 600)  # pixels, least and largest side of what is cropped from it
PER_BOX = (
    "boxes",
    "labels",
    "scores",
    "crowd",
    "difficult",
    "area",
)  # target entries with a row per box


def map_boxes(
    boxes: torch.Tensor, matrix: torch.Tensor, size, visible: float | torch.Tensor = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map boxes to another view by the matrix that moved the pixels.

    Args:
        boxes: (T, 4) xyxy pixels; or (B, T, 4).
        matrix: (3, 3), acting on columns (x, y, 1); or (B, 3, 3).
        size: (H, W) of the image the boxes are mapped to; or a tensor (B, 2).
        visible: the fraction of a box's area that must be left; or a tensor (B, 1).

    Returns:
        (T, 4) the bounding boxes of the mapped corners, clamped to the image; (T,) bool, False
        where nothing, or too little, of the box is left.
    """
    mapped = _bounding_boxes_of_corners(boxes, matrix)
    size = torch.as_tensor(size, dtype=mapped.dtype, device=mapped.device)
    limit = torch.cat([size, size], -1).flip(-1).unsqueeze(-2)  # (..., 1, 4) W, H, W, H
    clamped = torch.minimum(mapped.clamp(min=0), limit)
    sides = clamped[..., 2:] - clamped[..., :2]
    keep = (sides > 1e-3).all(-1)
    if isinstance(visible, torch.Tensor) or visible > 0:
        keep &= sides.prod(-1) >= visible * (mapped[..., 2:] - mapped[..., :2]).prod(-1)
    return clamped, keep


def _bounding_boxes_of_corners(boxes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(..., T, 4) bounding boxes of the four mapped corners of boxes (..., T, 4), not clamped."""
    left, top, right, bottom = boxes.unbind(-1)
    corners = torch.stack([left, top, right, top, right, bottom, left, bottom], -1)
    corners = corners.unflatten(-1, (4, 2))  # (..., T, 4 corners, xy)
    corners = torch.cat([corners, torch.ones_like(corners[..., :1])], -1)
    mapped = corners @ matrix.to(boxes).mT.unsqueeze(-3)  # (..., T, 4 corners, 3)
    mapped = mapped[..., :2] / mapped[..., 2:]
    return torch.cat([mapped.amin(-2), mapped.amax(-2)], -1)


def map_target(
    target: Target, matrix: torch.Tensor, size: tuple[int, int], visible: float = 0.0
) -> Target:
    """The same target in another view.

    Args:
        target: boxes and what belongs to them, perhaps a "truth" inside; it is not changed.
        matrix: (3, 3), from the pixels of `target` to those of the view.
        size: (H, W) of the view.
        visible: a box of which a smaller fraction remains in view is dropped, with its row in every
            other entry.
    """
    entries: Mapping[str, Any] = target
    mapped = {key: value for key, value in entries.items() if key not in PER_BOX and key != "truth"}
    mapped["size"] = (int(size[0]), int(size[1]))
    mapped["matrix"] = matrix.float() @ target.get("matrix", torch.eye(3))
    if "boxes" in target:
        boxes, keep = map_boxes(target["boxes"], matrix, size)
        whole = _bounding_boxes_of_corners(target["boxes"], matrix)
        keep &= _areas(boxes) >= visible * _areas(whole)
        mapped["boxes"] = boxes[keep]
        for key in PER_BOX:
            if key in entries and key not in ("boxes", "area"):
                mapped[key] = entries[key][keep]
        if "area" in target:
            scale = float(torch.linalg.det(matrix[:2, :2].double()).abs())
            mapped["area"] = target["area"][keep] * scale
    if "truth" in target:
        mapped["truth"] = map_target(target["truth"], matrix, size)
    return cast(Target, mapped)


def _areas(boxes: torch.Tensor) -> torch.Tensor:
    """(T,) areas of boxes (T, 4) xyxy."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def warp(image: torch.Tensor, matrix: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Move the pixels of an image by a matrix, bilinear, grey outside.

    Args:
        image: (3, H, W), float in [0, 1] or uint8.
        matrix: (3, 3), from pixels of `image` to pixels of the result.
        size: (H', W') of the result.

    Returns:
        (3, H', W') of the same dtype. A still image and a mirrored one are exact.
    """
    height, width = size
    if size == tuple(image.shape[1:]) and torch.equal(matrix[1:], torch.eye(3)[1:]):
        if torch.equal(matrix[0], torch.tensor([1.0, 0, 0])):
            return image
        if torch.equal(matrix[0], torch.tensor([-1.0, 0, width])):
            return image.flip(-1)
    to_source = torch.linalg.inv(matrix.double())
    if image.dtype == torch.uint8:
        grid = _grid(to_source, size, height_and_width(image))[None].to(image.device)
        centred = image[None].contiguous().float().sub_(GREY)  # outside is 0, which is grey
        moved = nnf.grid_sample(centred, grid, align_corners=False)
        return moved[0].add_(GREY).round_().byte()
    xs = torch.arange(width) + 0.5
    ys = torch.arange(height) + 0.5
    ys, xs = torch.meshgrid(ys, xs, indexing="ij")
    source = torch.stack([xs, ys, torch.ones_like(xs)], -1) @ to_source.float().T  # (H', W', 3)
    grid = 2 * source[..., :2] / source.new_tensor([image.shape[2], image.shape[1]]) - 1
    grid = grid[None].to(image.device)
    return nnf.grid_sample(image[None] - FILL, grid, align_corners=False)[0] + FILL


def _grid(
    to_source: torch.Tensor, size: tuple[int, int], source_size: tuple[int, int]
) -> torch.Tensor:
    """(H', W', 2) where each pixel comes from, in -1..1 of an image of `source_size` (H, W).

    Each coordinate is the sum of a row and a column, which takes a fifth of the time of the product
    in `warp` and differs from it by rounding.
    """
    grid = torch.empty(*size, 2)
    ys, xs = (torch.arange(side, dtype=torch.float64) + 0.5 for side in size)
    for axis, side in enumerate((source_size[1], source_size[0])):
        a, b, c = (2 * to_source[axis] / side).tolist()
        of_row = (b * ys + c - 1).float()[:, None]
        of_column = (a * xs).float()
        torch.add(of_row, of_column, out=grid[..., axis])
    return grid


def labelled_view(
    image: torch.Tensor, target: Target, rng: np.random.Generator, settings: ViewSettings
) -> View:
    """A labelled image as the student sees it: base geometry and one colour operation."""
    if settings.detr_crops and settings.short_sides and rng.random() < 0.5:
        image, target = random_crop(image, target, rng)
    zoom = settings.zoom
    image, target = _base_view(image, target, rng, settings, zoom, settings.shift)
    return (color_augment(image, rng) if settings.labelled_color else image), target


def random_crop(image: torch.Tensor, target: Target, rng: np.random.Generator) -> View:
    """A random part of an image: at a short side of 400, 500 or 600 pixels, 384 to 600 a side.

    DETR's crop (facebookresearch/detr, datasets/coco.py). The part is not resized here; boxes keep
    what remains of them, those outside are dropped.
    """
    height, width = target["size"]
    scale = int(rng.choice(CROP_SHORT_SIDES)) / min(height, width)
    sides = []
    for side in (height, width):
        largest = min(round(side * scale), CROP_SIDES[1])
        wanted = int(rng.integers(min(CROP_SIDES[0], largest), largest + 1))
        sides.append(min(side, max(1, round(wanted / scale))))
    top, left = (int(rng.integers(0, whole - side + 1)) for whole, side in
                 ((height, sides[0]), (width, sides[1])))  # fmt: skip
    part = image[:, top : top + sides[0], left : left + sides[1]]
    matrix = _matrix([1, 0, -left], [0, 1, -top])
    return part, map_target(target, matrix, (sides[0], sides[1]))


def weak_view(
    image: torch.Tensor, target: Target, rng: np.random.Generator, settings: ViewSettings
) -> View:
    """An unlabelled image as the teacher sees it: base geometry only.

    A uint8 image (3, H, W) that is resized stays uint8; any other becomes float in [0, 1].
    """
    return _base_view(image, target, rng, settings, settings.weak_zoom, shift=0.0)


def _base_view(
    image: torch.Tensor,
    target: Target,
    rng: np.random.Generator,
    settings: ViewSettings,
    zoom: tuple[float, float],
    shift: float,
) -> View:
    """Resize, zoom, shift and mirror."""
    image, size, resize = _resized_image(image, target["size"], rng, settings)
    geometry = _base_matrix(size, rng, settings, zoom, shift)
    view = warp(image, geometry, size)
    return view, map_target(target, geometry @ resize, size, settings.visible)


def strong_view(
    image: torch.Tensor, target: Target, rng: np.random.Generator, settings: ViewSettings
) -> View:
    """An unlabelled image as the student sees it.

    Base geometry, one more geometric operation, one colour operation, erased patches.
    """
    image, size, resize = _resized_image(image, target["size"], rng, settings)
    zoom = settings.strong_zoom or settings.zoom
    geometry = _base_matrix(size, rng, settings, zoom, settings.shift)
    geometry = _strong_matrix(size, rng, settings) @ geometry
    if rng.random() < 0.5:  # geometry and colour in either order, as in the released code
        view = warp(color_augment(image, rng), geometry, size)
    else:
        view = color_augment(warp(image, geometry, size), rng)
    view = random_erase(view, rng, settings)
    return view, map_target(target, geometry @ resize, size, settings.visible)


def _resized_image(
    image: torch.Tensor,
    size: tuple[int, int],
    rng: np.random.Generator,
    settings: ViewSettings,
) -> tuple[torch.Tensor, tuple[int, int], torch.Tensor]:
    """The image at a drawn size, that size (H, W), and the matrix (3, 3) from old to new pixels.

    The short side is drawn from the settings, the long side bounded. Without short sides to draw
    from, the size stays and the image becomes float in [0, 1].
    """
    if not settings.short_sides:
        return F.to_dtype(image, torch.float32, scale=True), size, torch.eye(3)
    short_side = int(rng.choice(settings.short_sides))
    height, width = resized(size, short_side, settings.long_side)
    matrix = _matrix([width / size[1], 0, 0], [0, height / size[0], 0])
    if (height, width) != tuple(image.shape[-2:]):
        image = F.resize(image, [height, width], antialias=True)
    return image, (height, width), matrix


def resized(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """(H, W) scaled to `short_side`, or to less where the long side would exceed `long_side`.

    Each side is at least 1 pixel.
    """
    scale = min(short_side / min(size), long_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _base_matrix(
    size: tuple[int, int],
    rng: np.random.Generator,
    settings: ViewSettings,
    zoom: tuple[float, float],
    shift: float,
) -> torch.Tensor:
    """Zoom about the centre, shift and, where it is allowed, mirror; on the same canvas."""
    height, width = size
    factor = float(np.exp(rng.uniform(*np.log(zoom))))
    dx, dy = rng.uniform(-shift, shift, 2) * (width, height)
    matrix = _about_centre(_matrix([factor, 0, 0], [0, factor, 0]), size)
    matrix = _matrix([1, 0, dx], [0, 1, dy]) @ matrix
    if settings.flip and rng.random() < 0.5:
        matrix = _matrix([-1, 0, width], [0, 1, 0]) @ matrix
    return matrix


def _strong_matrix(
    size: tuple[int, int], rng: np.random.Generator, settings: ViewSettings
) -> torch.Tensor:
    """One of: shift along x, shift along y, rotate, shear; as in the released code."""
    height, width = size
    operation = rng.integers(4)
    amount = rng.uniform(-1, 1)
    if operation < 2:
        shift = amount * settings.strong_shift
        dx = shift * width * (operation == 0)
        dy = shift * height * (operation == 1)
        return _matrix([1, 0, dx], [0, 1, dy])
    if operation == 2:
        angle = np.deg2rad(amount * settings.strong_rotation)
        cos = float(np.cos(angle))
        sin = float(np.sin(angle))
        return _about_centre(_matrix([cos, sin, 0], [-sin, cos, 0]), size)
    angles = np.deg2rad(np.array([amount, rng.uniform(-1, 1)]) * settings.strong_shear)
    along_x, along_y = np.tanh(angles) if settings.released_shear else np.tan(angles)
    shear = _matrix([1, along_x, 0], [0, 1, 0])
    shear = _matrix([1, 0, 0], [along_y, 1, 0]) @ shear
    return shear if settings.released_shear else _about_centre(shear, size)


def _matrix(first: list[float], second: list[float]) -> torch.Tensor:
    """The affine matrix (3, 3) with these two rows of three."""
    return torch.tensor(np.array([first, second, [0, 0, 1]]), dtype=torch.float32)


def _about_centre(matrix: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The linear map `matrix` with the image's centre kept in place."""
    centre = torch.tensor([size[1] / 2, size[0] / 2])
    matrix = matrix.clone()
    matrix[:2, 2] = centre - matrix[:2, :2] @ centre
    return matrix


def color_augment(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """One of nine colour operations at a magnitude m of 1..9, each equally likely.

    image (3, H, W), uint8 or float in [0, 1]; the result has the same dtype. Released code:
    rand_aug.py:57-61.
    """
    magnitude = int(rng.integers(1, 10))
    factor = 0.18 * magnitude + 0.1
    is_uint8 = image.dtype == torch.uint8
    solarize_from = min(25.6 * magnitude, 255) / (1 if is_uint8 else 255)
    bits = 4 - int(0.4 * magnitude)
    operations = (
        lambda x: x,
        F.autocontrast,
        lambda x: _on_uint8(F.equalize, x),
        lambda x: F.solarize(x, solarize_from),
        lambda x: F.adjust_saturation(x, factor),
        lambda x: F.adjust_contrast(x, factor),
        lambda x: F.adjust_brightness(x, factor),
        lambda x: F.adjust_sharpness(x, factor),
        lambda x: _on_uint8(lambda y: F.posterize(y, bits), x),
    )
    operation = operations[int(rng.integers(len(operations)))]
    if not is_uint8:
        return operation(image.clamp(0, 1))
    pixels = image.permute(1, 2, 0).contiguous().numpy()  # (H, W, 3)
    augmented = operation(Image.fromarray(pixels))  # torchvision hands a PIL image to Pillow
    return torch.from_numpy(np.array(augmented)).permute(2, 0, 1)


def _on_uint8(operation: Callable, image: torch.Tensor | Image.Image):
    """Apply an operation that is only defined on uint8 to a float or PIL image."""
    if isinstance(image, Image.Image):
        return operation(image)
    result = operation(F.to_dtype(image, torch.uint8, scale=True))
    return F.to_dtype(result, torch.float32, scale=True)


def random_erase(
    image: torch.Tensor, rng: np.random.Generator, settings: ViewSettings
) -> torch.Tensor:
    """Paint one to `settings.patches` grey patches on a copy of an image (3, H, W), float or uint8.

    Both sides of a patch are the same random fraction of the image's sides.
    """
    if not settings.patches:
        return image
    image = image.clone()
    grey = FILL if image.is_floating_point() else GREY
    height, width = image.shape[-2:]
    for _ in range(int(rng.integers(1, settings.patches + 1))):
        fraction = rng.uniform(0, settings.patch_side)
        h = int(fraction * height)
        w = int(fraction * width)
        top = int(rng.integers(0, height - h + 1))
        left = int(rng.integers(0, width - w + 1))
        image[:, top : top + h, left : left + w] = grey
    return image
