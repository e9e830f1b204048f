"""Weak, strong and labelled views of an image, each with the 3x3 matrix that says where every pixel went.

The teacher reads the weak view, the student the strong one, and a box found in one is carried into the other by
`strong["matrix"] @ inverse(weak["matrix"])` (paper section 3.1; released code: geo_utils.py). Pixels and boxes move
by the same matrix: there is one warp, and one `map_boxes`.

Matrices act on columns (x, y, 1) in continuous pixel coordinates: the centre of the first pixel is (0.5, 0.5), so
mirroring is x -> W - x. Randomness comes in as a numpy generator; nothing here keeps state.

Where images are resized (the COCO presets), bytes stay bytes from the file to the detector: Pillow's integer colour
operations are several times as fast as their float twins, and a batch takes a quarter of the memory. Elsewhere (digits)
views are floats in [0, 1], computed as in the recorded runs.

Differences from the released code: boxes that leave the view are dropped (there they stay as zero-width targets), and
the shear factor is the tangent of its angle (there the hyperbolic tangent).
"""

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torchvision.transforms.v2 import functional as F

from semidetr_lite.data.view_settings import ViewSettings

GREY = 125  # of what lies outside the image and of erased patches, as in the released code; of bytes
FILL = GREY / 255  # the same of floats
View = tuple[torch.Tensor, dict]  # an image and its target


def map_boxes(boxes: torch.Tensor, matrix: torch.Tensor, size) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry boxes through a matrix.

    Args:
        boxes: (T, 4) xyxy pixels; or (B, T, 4).
        matrix: (3, 3), acting on columns (x, y, 1); or (B, 3, 3).
        size: (H, W) of the image the boxes arrive in; or a tensor (B, 2).

    Returns:
        (T, 4) the axis-parallel hulls of the mapped corners, clamped to the image; (T,) bool, False where nothing of
        the box is left.
    """
    hull = _hulls(boxes, matrix)
    size = torch.as_tensor(size, dtype=hull.dtype, device=hull.device)
    limit = torch.cat([size, size], -1).flip(-1).unsqueeze(-2)  # (..., 1, 4) W, H, W, H
    clamped = torch.minimum(hull.clamp(min=0), limit)
    return clamped, (clamped[..., 2:] - clamped[..., :2] > 1e-3).all(-1)


def _hulls(boxes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(..., T, 4) hulls of the four mapped corners, not clamped."""
    left, top, right, bottom = boxes.unbind(-1)
    corners = torch.stack([left, top, right, top, right, bottom, left, bottom], -1)
    corners = corners.unflatten(-1, (4, 2))  # (..., T, 4 corners, xy)
    corners = torch.cat([corners, torch.ones_like(corners[..., :1])], -1)
    mapped = corners @ matrix.to(boxes).mT.unsqueeze(-3)  # (..., T, 4 corners, 3)
    mapped = mapped[..., :2] / mapped[..., 2:]
    return torch.cat([mapped.amin(-2), mapped.amax(-2)], -1)


def map_target(target: dict, matrix: torch.Tensor, size: tuple[int, int], visible: float = 0.0) -> dict:
    """The same target in another view.

    Every per-box entry follows, boxes out of view (or less than `visible` of them in it) are dropped.
    """
    moved = {key: value for key, value in target.items() if key not in PER_BOX and key != "truth"}
    moved["size"] = (int(size[0]), int(size[1]))
    moved["matrix"] = matrix.float() @ target.get("matrix", torch.eye(3))
    if "boxes" in target:
        boxes, keep = map_boxes(target["boxes"], matrix, size)
        keep &= _areas(boxes) >= visible * _areas(_hulls(target["boxes"], matrix))
        moved["boxes"] = boxes[keep]
        moved.update({key: target[key][keep] for key in PER_BOX if key in target and key not in ("boxes", "area")})
        if "area" in target:
            scale = float(torch.linalg.det(matrix[:2, :2].double()).abs())
            moved["area"] = target["area"][keep] * scale
    if "truth" in target:
        moved["truth"] = map_target(target["truth"], matrix, size)
    return moved


PER_BOX = ("boxes", "labels", "scores", "crowd", "difficult", "area")


def _areas(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def warp(image: torch.Tensor, matrix: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Move an image (3, H, W), float or uint8, by `matrix` onto a canvas of `size` (H', W'), bilinear, grey outside."""
    height, width = size
    if size == tuple(image.shape[1:]) and torch.equal(matrix[1:], torch.eye(3)[1:]):
        if torch.equal(matrix[0], torch.tensor([1.0, 0, 0])):
            return image
        if torch.equal(matrix[0], torch.tensor([-1.0, 0, width])):
            return image.flip(-1)
    to_source = torch.linalg.inv(matrix.double())
    if image.dtype == torch.uint8:
        grid = _grid(to_source, size, image.shape[1:])
        moved = nnf.grid_sample(image[None].contiguous().float().sub_(GREY), grid[None].to(image.device), **BILINEAR)
        return moved[0].add_(GREY).round_().byte()
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    source = torch.stack([xs, ys, torch.ones_like(xs)], -1) @ to_source.float().T  # (H', W', 3)
    grid = 2 * source[..., :2] / source.new_tensor([image.shape[2], image.shape[1]]) - 1
    return nnf.grid_sample(image[None] - FILL, grid[None].to(image.device), **BILINEAR)[0] + FILL


BILINEAR = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": False}


def _grid(to_source: torch.Tensor, size, source_size) -> torch.Tensor:
    """(H', W', 2) where each pixel comes from, in -1..1 of an image (H, W): a sum of a row and a column per coordinate.

    A fifth of the time of the product in `warp`, from which it differs by rounding.
    """
    grid = torch.empty(*size, 2)
    ys, xs = (torch.arange(side, dtype=torch.float64) + 0.5 for side in size)
    for place, side in enumerate((source_size[1], source_size[0])):
        a, b, c = (2 * to_source[place] / side).tolist()
        torch.add((b * ys + c - 1).float()[:, None], (a * xs).float(), out=grid[..., place])
    return grid


def labelled_view(image: torch.Tensor, target: dict, rng: np.random.Generator, settings: ViewSettings) -> View:
    """What the student sees of a labelled image: base geometry and one colour operation."""
    image, target = _base_view(image, target, rng, settings, settings.zoom, settings.shift)
    return recolour(image, rng), target


def weak_view(image: torch.Tensor, target: dict, rng: np.random.Generator, settings: ViewSettings) -> View:
    """What the teacher sees of an unlabelled image.

    Base geometry only. image (3, H, W) uint8 or float -> float in [0, 1], or uint8 if it was and is resized.
    """
    return _base_view(image, target, rng, settings, settings.weak_zoom, 0.0)


def _base_view(image, target, rng, settings, zoom, shift) -> View:
    """Resize, zoom, shift and mirror."""
    image, size, resize = _resized_image(image, target["size"], rng, settings)
    geometry = _base_matrix(size, rng, settings, zoom, shift)
    return warp(image, geometry, size), map_target(target, geometry @ resize, size, settings.visible)


def strong_view(image: torch.Tensor, target: dict, rng: np.random.Generator, settings: ViewSettings) -> View:
    """What the student sees of an unlabelled image.

    Base geometry, one more geometric operation, one colour operation, erased patches.
    """
    image, size, resize = _resized_image(image, target["size"], rng, settings)
    geometry = _base_matrix(size, rng, settings, settings.strong_zoom or settings.zoom, settings.shift)
    geometry = _strong_matrix(size, rng, settings) @ geometry
    if rng.random() < 0.5:  # geometry and colour in either order, as in the released code
        image = warp(recolour(image, rng), geometry, size)
    else:
        image = recolour(warp(image, geometry, size), rng)
    return erase(image, rng, settings), map_target(target, geometry @ resize, size, settings.visible)


def _resized_image(image, size, rng, settings) -> tuple[torch.Tensor, tuple[int, int], torch.Tensor]:
    """(image at its new size, that size, matrix): the short side is drawn from the settings, the long side bounded.

    As floats, unless bytes are resized.
    """
    if not settings.short_sides:
        return F.to_dtype(image, torch.float32, scale=True), size, torch.eye(3)
    height, width = resized(size, int(rng.choice(settings.short_sides)), settings.long_side)
    matrix = _matrix([width / size[1], 0, 0], [0, height / size[0], 0])
    if (height, width) != tuple(image.shape[-2:]):
        image = F.resize(image, [height, width], antialias=True)
    return image, (height, width), matrix


def resized(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """(H, W) scaled to the short side, or less if the long side would exceed its bound; at least 1 pixel each."""
    scale = min(short_side / min(size), long_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _base_matrix(size: tuple[int, int], rng: np.random.Generator, settings: ViewSettings, zoom, shift) -> torch.Tensor:
    """Zoom about the centre, shift and (where it is allowed) mirror, on the same canvas."""
    height, width = size
    zoom = float(np.exp(rng.uniform(*np.log(zoom))))
    dx, dy = rng.uniform(-shift, shift, 2) * (width, height)
    matrix = _about_centre(_matrix([zoom, 0, 0], [0, zoom, 0]), size)
    matrix = _matrix([1, 0, dx], [0, 1, dy]) @ matrix
    if settings.flip and rng.random() < 0.5:
        matrix = _matrix([-1, 0, width], [0, 1, 0]) @ matrix
    return matrix


def _strong_matrix(size: tuple[int, int], rng: np.random.Generator, settings: ViewSettings) -> torch.Tensor:
    """One of: shift along x, shift along y, rotate, shear; as in the released code."""
    height, width = size
    kind = rng.integers(4)
    amount = rng.uniform(-1, 1)
    if kind < 2:
        shift = amount * settings.strong_shift
        return _matrix([1, 0, shift * width * (kind == 0)], [0, 1, shift * height * (kind == 1)])
    if kind == 2:
        angle = np.deg2rad(amount * settings.strong_rotation)
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        return _about_centre(_matrix([cos, sin, 0], [-sin, cos, 0]), size)
    along_x, along_y = np.tan(np.deg2rad(np.array([amount, rng.uniform(-1, 1)]) * settings.strong_shear))
    shear = _matrix([1, along_x, 0], [0, 1, 0])
    return _about_centre(_matrix([1, 0, 0], [along_y, 1, 0]) @ shear, size)


def _matrix(first, second) -> torch.Tensor:
    """The affine (3, 3) with these two rows."""
    return torch.tensor(np.array([first, second, [0, 0, 1]]), dtype=torch.float32)


def _about_centre(matrix: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The linear map `matrix` with the image's centre kept in place."""
    centre = torch.tensor([size[1] / 2, size[0] / 2])
    matrix = matrix.clone()
    matrix[:2, 2] = centre - matrix[:2, :2] @ centre
    return matrix


def recolour(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """One of nine colour operations at a magnitude m of 1..9, each equally likely.

    Released code: rand_aug.py:57-61.
    """
    magnitude = int(rng.integers(1, 10))
    factor = 0.18 * magnitude + 0.1
    bytes_given = image.dtype == torch.uint8
    operations = (
        lambda x: x,
        F.autocontrast,
        lambda x: _on_bytes(F.equalize, x),
        lambda x: F.solarize(x, min(25.6 * magnitude, 255) / (1 if bytes_given else 255)),
        lambda x: F.adjust_saturation(x, factor),
        lambda x: F.adjust_contrast(x, factor),
        lambda x: F.adjust_brightness(x, factor),
        lambda x: F.adjust_sharpness(x, factor),
        lambda x: _on_bytes(lambda y: F.posterize(y, 4 - int(0.4 * magnitude)), x),
    )
    operation = operations[int(rng.integers(len(operations)))]
    if not bytes_given:
        return operation(image.clamp(0, 1))
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())  # torchvision hands it to Pillow
    return torch.from_numpy(np.array(operation(picture))).permute(2, 0, 1)


def _on_bytes(operation, image):
    """Apply an operation that is only defined on bytes."""
    if isinstance(image, Image.Image):
        return operation(image)
    return F.to_dtype(operation(F.to_dtype(image, torch.uint8, scale=True)), torch.float32, scale=True)


def erase(image: torch.Tensor, rng: np.random.Generator, settings: ViewSettings) -> torch.Tensor:
    """One to `patches` grey patches, each with sides of the same random fraction of the image's sides."""
    if not settings.patches:
        return image
    image, grey = image.clone(), FILL if image.is_floating_point() else GREY
    height, width = image.shape[-2:]
    for _ in range(int(rng.integers(1, settings.patches + 1))):
        side = rng.uniform(0, settings.patch_side)
        h, w = int(side * height), int(side * width)
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        image[:, top : top + h, left : left + w] = grey
    return image
