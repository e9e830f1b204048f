"""What `detect` takes as an image, as a tensor (3, H, W) of RGB.

| given | read as |
|---|---|
| path; bytes or file object of an image file | RGB uint8, turned upright as its EXIF data ask |
| PIL image | the same |
| numpy array (H, W), (H, W, 3) or (H, W, 4) | grey, RGB, or RGB with a transparency to drop |
| tensor (3, H, W) | as it is |

Numbers are uint8 in 0..255, or floats in 0..1. Other whole numbers in 0..255 become uint8. Floats
that reach beyond 0..1 are refused: whether they count to 255 or were normalised is not guessed.
Arrays are RGB: OpenCV's are BGR and want `array[:, :, ::-1]`.
"""

import io
import os

import numpy as np
import torch
from PIL import Image

from semidetr_lite.data.images import read_image, rgb_pixels
from semidetr_lite.errors import UserError

TOLERANCE = 0.01  # that resizing and warping may reach beyond 0..1


def is_single_image(images) -> bool:
    """Whether this is one image, not several."""
    if isinstance(images, torch.Tensor):
        return images.dim() == 3
    if isinstance(images, np.ndarray):
        return images.ndim in (2, 3)
    kinds = (str, bytes, bytearray, os.PathLike, Image.Image)
    return isinstance(images, kinds) or hasattr(images, "read")


def load_image(image) -> torch.Tensor:
    """An image in any of the forms above as a tensor (3, H, W), uint8 or float in [0, 1].

    Raises:
        UserError: a file that is not a readable image, and numbers that are no RGB image.
    """
    if isinstance(image, torch.Tensor):
        return _checked(image)
    if isinstance(image, np.ndarray):
        return _checked(_from_array(image))
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, str | os.PathLike):
        return read_image(image, upright=True)
    if isinstance(image, bytes | bytearray):
        return _from_file(io.BytesIO(image), "the bytes given")
    if hasattr(image, "read"):
        return _from_file(image, f"the file {getattr(image, 'name', 'given')}")
    kind = type(image).__name__
    forms = "a path, PIL image, numpy array (H, W, 3), tensor (3, H, W), bytes or an open file"
    raise UserError(f"a {kind} is no image: give {forms}")


def _from_file(file, name: str) -> torch.Tensor:
    """The image in a file object, whose name in messages is `name`."""
    try:
        return read_image(file, upright=True)
    except UserError as problem:
        reason = str(problem).removeprefix(f"{file}: ")
        raise UserError(f"{name}: {reason}") from problem


def _from_pillow(image: Image.Image) -> torch.Tensor:
    try:
        return rgb_pixels(image, upright=True)
    except (OSError, ValueError, SyntaxError) as problem:
        name = getattr(image, "filename", "") or "the PIL image given"
        raise UserError(f"{name}: not a readable image: {problem}") from problem


def _from_array(array: np.ndarray) -> torch.Tensor:
    """A numpy image (H, W), (H, W, 3) or (H, W, 4) as a tensor (3, H, W)."""
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] not in (3, 4):
        fault = f"a numpy image has the shape (height, width, 3), got {array.shape}"
        raise UserError(f"{fault}; turn it with array.transpose(1, 2, 0) if channels come first")
    if array.dtype == object:
        raise UserError("a numpy image holds numbers, got objects")
    if array.dtype == np.uint16:  # torch has no arithmetic for it
        array = array.astype(np.int32)
    return torch.from_numpy(np.ascontiguousarray(array[:, :, :3])).permute(2, 0, 1)


def _checked(image: torch.Tensor) -> torch.Tensor:
    """The image, if its numbers are those of one."""
    if image.dtype == torch.uint8 or image.numel() == 0:
        return image
    low, high = float(image.min()), float(image.max())
    if not image.dtype.is_floating_point:
        if image.dtype != torch.bool and not image.dtype.is_complex and low >= 0 and high <= 255:
            return image.to(torch.uint8)
        fault = f"an image of {str(image.dtype).removeprefix('torch.')} with numbers"
        raise UserError(f"{fault} {low:g} to {high:g}: give uint8 in 0..255, or floats in 0..1")
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also for nan
        advice = "divide it by 255" if low >= 0 and 2 < high <= 256 else "bring it to 0..1"
        fault = f"a float image has numbers in 0..1, this one {low:g} to {high:g}"
        raise UserError(f"{fault}: {advice}, or give uint8")
    return image.float()
