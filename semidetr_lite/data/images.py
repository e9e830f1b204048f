"""Image files as RGB bytes, whatever Pillow reads them from, and a folder of them without labels.

Every kind becomes RGB with 8 bits: grey, palette and CMYK images are converted, transparency is dropped (a pixel keeps
the colour stored under it), of an animation the first frame counts. Refused with one line, naming the file: what is
truncated or no image, grey images of 16 bits (their range cannot be known), and more pixels than Pillow's guard
against decompression bombs lets through (about 89 million).
"""

import os
import sys
import warnings
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from semidetr_lite.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
# whatever the name says; others, such as EPS, would have Pillow start another program
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000")
ORIENTATION = 0x0112  # of EXIF: 1 is upright, 5 to 8 are turned by a quarter


def read_image(path, upright: bool = False) -> torch.Tensor:
    """An image file as RGB uint8 (3, H, W), as its pixels are stored or turned `upright` as its EXIF data ask.

    In memory the three channels of a pixel lie together, which is what resizing is fast on. Raises UserError naming
    the file.
    """
    with _opened(path) as file:
        if file.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels are of mode {file.mode}; save it with 8 bits per channel")
        if upright and file.getexif().get(ORIENTATION, 1) != 1:
            file = ImageOps.exif_transpose(file)
        pixels = np.array(file.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def header_size(path, upright: bool = False) -> tuple[int, int]:
    """(H, W) of an image file from its header alone. Raises UserError naming the file."""
    with _opened(path) as file:
        turned = upright and file.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        return (file.width, file.height) if turned else (file.height, file.width)


@contextmanager
def _opened(path):
    """The file opened by Pillow; its many kinds of exceptions, and its guard against bombs, become one UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                yield file
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as problem:
        most = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
        raise UserError(f"{path}: not a readable image: it has more than {most}; make it smaller") from problem
    except Exception as problem:  # OSError, SyntaxError, ValueError, struct.error and more, by format
        reason = getattr(problem, "strerror", None) or " ".join(str(problem).split()) or type(problem).__name__
        raise UserError(f"{path}: not a readable image: {reason}") from problem


def images_below(folder) -> dict[str, str]:
    """The image files in a folder and below it, sorted: where each really lies -> its path.

    Links are followed, to files and to folders, and a file reached twice is taken once. Names that begin with a dot
    are passed over.
    """
    found, seen = {}, set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else sorted(name for name in folders if name[0] != ".")
        for name in [] if real in seen else sorted(names):
            if name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES):
                found.setdefault(os.path.realpath(os.path.join(real, name)), os.path.join(here, name))
        seen.add(real)
    return dict(sorted(found.items(), key=lambda item: item[1].split(os.sep)))


class ImageFolder:
    """The images in a folder and below it, sorted by path, without labels: `ds[i] -> (image, {"size", "image_id"})`.

    Image ids count from `first_id`. Files among `listed` (paths as `CocoDataset.paths` gives them) are passed over: an
    image that is labelled or measured on is not unlabelled as well. `paths` are the images, where not all of the folder
    are meant. Images are turned upright as their EXIF data ask,
    as every viewer shows them. Raises UserError for a missing folder, one without any image, and an image that cannot
    be read. `.sizes` [(H, W)] reads all headers when it is first asked for; an image whose header cannot be read has
    the size (0, 0) and is counted on stderr.
    """

    def __init__(self, folder, first_id: int = 0, listed=frozenset(), paths: list[str] | None = None):
        self.folder, self.first_id = Path(folder), first_id
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder of images")
        found = images_below(folder) if paths is None else {os.path.realpath(path): path for path in paths}
        self.paths = [Path(path) for place, path in found.items() if place not in listed]
        if not found:
            raise UserError(f"{folder}: no image in this folder or below ({' '.join(IMAGE_SUFFIXES)})")
        if not self.paths:
            raise UserError(f"{folder}: the annotations list every image of this folder; none is left as unlabelled")
        if len(self.paths) < len(found):
            count = f"{len(found) - len(self.paths)} of its {len(found)} images"
            print(f"{folder}: {count} are in the annotations and not taken as unlabelled", file=sys.stderr)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        sizes, problems = [], []
        for path in tqdm(self.paths, desc="image sizes", disable=len(self.paths) < 10_000, leave=False):
            try:
                sizes.append(header_size(path, upright=True))
            except UserError as problem:
                sizes.append((0, 0))
                problems.append(problem)
        if len(problems) == len(sizes):
            raise problems[0]
        if problems:
            count = f"{len(problems)} of {len(sizes)} images"
            print(f"warning: {self.folder}: {count} are left out (first: {problems[0]})", file=sys.stderr)
        return sizes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        index = range(len(self))[index]  # -1 is the last one
        image = read_image(self.paths[index], upright=True)
        return image, {"size": tuple(image.shape[1:]), "image_id": self.first_id + index}
