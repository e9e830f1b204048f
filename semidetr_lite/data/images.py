"""Image files as RGB bytes, and a folder of images without labels.

Every kind of image that Pillow reads becomes RGB with 8 bits per channel: grey, palette and CMYK
images are converted, transparency is dropped (a pixel keeps the colour stored under it), of an
animation the first frame is taken. Refused with one line that names the file: a truncated file, a
file that is no image, grey images of 16 bits (their range is unknown), and more pixels than
Pillow's guard against decompression bombs allows (about 89 million).

A camera stores a turned photograph as its sensor saw it, and notes in the EXIF data how to turn it.
One convention holds everywhere: an image is seen upright, and the boxes that go with it are in
pixels of the upright image. Boxes that were drawn on the stored pixels are turned with the image
(`turn_boxes`); `CocoDataset` says how it tells which ones those are.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Set
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from semidetr_lite.boxes import height_and_width
from semidetr_lite.contracts import View
from semidetr_lite.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
# the formats accepted, whatever a file is called; others, such as EPS, would have Pillow start
# another program
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000")
ORIENTATION = 0x0112  # of EXIF: 1 is upright, 5 to 8 are turned by a quarter
QUARTER_TURNS = (5, 6, 7, 8)
# orientation -> what makes the stored image upright: mirror x, mirror y, then swap x and y
MIRROR_AND_SWAP = {
    1: (False, False, False),
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}


def read_image(path, upright: bool = False) -> torch.Tensor:
    """An image file as RGB uint8 (3, H, W).

    In memory the three channels of a pixel lie together, which makes resizing fast.

    Args:
        path: the file.
        upright: whether to turn the image as its EXIF data ask; if not, pixels are as stored.

    Raises UserError naming the file.
    """
    with _opened(path) as file:
        return rgb_pixels(file, upright)


def rgb_pixels(image: Image.Image, upright: bool = False) -> torch.Tensor:
    """A PIL image as RGB uint8 (3, H, W); `upright` as in `read_image`.

    Raises ValueError for grey images of 16 bits, and what Pillow raises for a damaged file.
    """
    if image.mode.startswith(("I", "F")):
        problem = f"its pixels are of mode {image.mode}"
        raise ValueError(f"{problem}; save it with 8 bits per channel")
    if upright and image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def read_upright(path) -> tuple[torch.Tensor, int]:
    """An image file turned upright, as of `read_image`, and its EXIF orientation: 1 for no turn.

    Raises UserError naming the file.
    """
    with _opened(path) as file:
        return rgb_pixels(file, upright=True), orientation_of(file)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 for one that is stored upright."""
    orientation = image.getexif().get(ORIENTATION, 1)
    return orientation if orientation in MIRROR_AND_SWAP else 1


def header_size(path, upright: bool = False) -> tuple[int, int]:
    """(H, W) of an image file, read from its header alone. Raises UserError naming the file."""
    with _opened(path) as file:
        turned = upright and file.getexif().get(ORIENTATION, 1) in QUARTER_TURNS
        return (file.width, file.height) if turned else (file.height, file.width)


def turn_boxes(boxes: torch.Tensor, size: tuple[int, int], orientation: int) -> torch.Tensor:
    """Boxes in stored pixels as boxes in pixels of the upright image.

    Args:
        boxes: (T, 4) xyxy in pixels of the image as it is stored.
        size: (H, W) of the image as it is stored.
        orientation: of the image's EXIF data, 1 to 8.
    """
    mirror_x, mirror_y, swap = MIRROR_AND_SWAP[orientation]
    boxes = _mirrored(boxes, size, mirror_x, mirror_y)
    return boxes[..., [1, 0, 3, 2]] if swap else boxes


def stored_boxes(boxes: torch.Tensor, size: tuple[int, int], orientation: int) -> torch.Tensor:
    """Boxes in pixels of the upright image as boxes in stored pixels; it undoes `turn_boxes`.

    Args:
        boxes: (T, 4) xyxy in pixels of the upright image.
        size: (H, W) of the image as it is stored.
        orientation: of the image's EXIF data, 1 to 8.
    """
    mirror_x, mirror_y, swap = MIRROR_AND_SWAP[orientation]
    boxes = boxes[..., [1, 0, 3, 2]] if swap else boxes
    return _mirrored(boxes, size, mirror_x, mirror_y)


def _mirrored(
    boxes: torch.Tensor, size: tuple[int, int], mirror_x: bool, mirror_y: bool
) -> torch.Tensor:
    """Boxes (T, 4) xyxy in pixels of an image of `size` (H, W), mirrored along some axes."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    height, width = size
    if mirror_x:
        x1, x2 = width - x2, width - x1
    if mirror_y:
        y1, y2 = height - y2, height - y1
    return torch.stack([x1, y1, x2, y2], dim=-1)


@contextmanager
def _opened(path) -> Iterator[Image.Image]:
    """The file opened by Pillow, whose many kinds of exceptions become one UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                yield file
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as problem:
        limit = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels"
        reason = f"it has more than {limit}; make it smaller"
        raise UserError(f"{path}: not a readable image: {reason}") from problem
    except (
        Exception
    ) as problem:  # OSError, SyntaxError, ValueError, struct.error and more, by format
        reason = getattr(problem, "strerror", None) or " ".join(str(problem).split())
        raise UserError(
            f"{path}: not a readable image: {reason or type(problem).__name__}"
        ) from problem


def images_below(folder) -> dict[str, str]:
    """The image files in a folder and below it, sorted by path: {real path: path}.

    Links to files and to folders are followed, and a file that is reached twice is taken once.
    Names that begin with a dot are left out.
    """
    paths: dict[str, str] = {}
    for path in files_below(folder, IMAGE_SUFFIXES):
        paths.setdefault(os.path.realpath(path), path)
    return dict(sorted(paths.items(), key=lambda item: item[1].split(os.sep)))


def files_below(folder, suffixes: str | tuple[str, ...]) -> Iterator[str]:
    """The files with some suffix in a folder and below it, sorted by name in each folder.

    Links are followed, into each folder once; names that begin with a dot are left out.
    """
    visited: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in visited:
            folders[:] = []
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(names):
            if name[0] != "." and name.lower().endswith(suffixes):
                yield os.path.join(here, name)


class ImageFolder:
    """Images of a folder, without labels: `dataset[i] -> (image, {"size", "image_id"})`.

    All images in the folder and below it, sorted by path and turned upright as their EXIF data ask,
    as every viewer shows them.

    Args:
        folder: the folder.
        first_id: image ids count from here.
        listed: files to leave out, as `CocoDataset.paths` returns them: an image that is labelled
            or evaluated on is not unlabelled as well.
        paths: the images, if not all of the folder are meant.

    Attributes:
        sizes: [(H, W)]. All headers are read on the first access. An image whose header cannot be
            read has the size (0, 0) and is counted on stderr.

    Raises UserError for a missing folder, one without any image, and an image that cannot be read.
    """

    def __init__(
        self,
        folder,
        first_id: int = 0,
        listed: Set[str] = frozenset(),
        paths: list[str] | None = None,
    ):
        self.folder = Path(folder)
        self.first_id = first_id
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder of images")
        if paths is None:
            candidates = images_below(folder)
        else:
            candidates = {os.path.realpath(path): path for path in paths}
        self.paths = [Path(path) for real, path in candidates.items() if real not in listed]
        if not candidates:
            suffixes = " ".join(IMAGE_SUFFIXES)
            raise UserError(f"{folder}: no image in this folder or below ({suffixes})")
        if not self.paths:
            problem = "the annotations list every image of this folder"
            raise UserError(f"{folder}: {problem}; none is left as unlabelled")
        if len(self.paths) < len(candidates):
            count = f"{len(candidates) - len(self.paths)} of its {len(candidates)} images"
            message = f"{count} are in the annotations and not taken as unlabelled"
            print(f"{folder}: {message}", file=sys.stderr)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of every image."""
        sizes: list[tuple[int, int]] = []
        problems: list[UserError] = []
        many = len(self.paths) >= 10_000
        for path in tqdm(self.paths, desc="image sizes", disable=not many, leave=False):
            try:
                sizes.append(header_size(path, upright=True))
            except UserError as problem:
                sizes.append((0, 0))
                problems.append(problem)
        if len(problems) == len(sizes):
            raise problems[0]
        if problems:
            count = f"{len(problems)} of {len(sizes)} images"
            message = f"{count} are left out (first: {problems[0]})"
            print(f"warning: {self.folder}: {message}", file=sys.stderr)
        return sizes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> View:
        index = range(len(self))[index]  # -1 is the last one
        image = read_image(self.paths[index], upright=True)
        return image, {"size": height_and_width(image), "image_id": self.first_id + index}
