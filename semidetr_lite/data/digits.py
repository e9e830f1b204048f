"""`digits-v1`: real handwritten digits pasted on real photographs; nothing to download.

A scene is a crop of one of scikit-learn's two sample photographs with zero to six of its 8x8
handwritten digits pasted at random size, aspect, rotation, colour and position, plus noise. The box
is the tight bounding box of the ink. Every scene is a pure function of (split, seed, index). The
three splits share no digit sample and no photograph region. Some digits are faint, some scenes hold
a crowded pair, and some hold unlabelled look-alikes (upper half of one digit, lower half of
another): a detector can make the mistakes that detectors make on photographs.

The numbers below are frozen: a test keeps a hash of ten scenes, and a change gets a new name.

Sources: handwritten digits of the UCI repository through `sklearn.datasets.load_digits` (BSD).
Photographs through `sklearn.datasets.load_sample_images`: china.jpg by danielbuechele and
flower.jpg by vultilion, both on Flickr, CC BY 2.0.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from semidetr_lite.contracts import Target, View
from semidetr_lite.data.splits import Splits, Subset, WithoutLabels, labelled_indices

NAME = "digits-v1"
COUNTS = {"train": 2000, "tune": 300, "test": 500}
CATEGORIES = [{"id": digit, "name": str(digit)} for digit in range(10)]

SPLIT_SEEDS = {"train": 1, "tune": 2, "test": 3}
DIGIT_RANGES = {
    "train": (0, 1197),
    "tune": (1197, 1397),
    "test": (1397, 1797),
}  # after one fixed shuffle
COLUMN_RANGES = {
    "train": (0, 352),
    "tune": (352, 484),
    "test": (484, 640),
}  # of the 427 x 640 photographs
SIZES = [(96, 96), (96, 128), (128, 96)]  # (H, W) of a scene
SIZE_ODDS = [0.6, 0.8, 1.0]  # cumulative
# fractions of the scenes ...
EMPTY = 0.05  # without a digit
CROWDED = 0.10  # with a pair that may overlap more
LOOK_ALIKES = 0.15  # with one or two unlabelled look-alikes
# ... and of the digits
FAINT = 0.10
DIGIT_SIZE = (0.11, 0.38)  # height over the shorter side of the scene, log-uniform
ROTATION = 17.0  # degrees at most, to either side
ASPECT = (0.75, 1.2)  # width over height
COVER = 0.25  # of a neighbour's box that a digit may cover at most
CROWDED_COVER = (0.25, 0.50)  # the same of a crowded pair, at least and at most
OPACITY = (0.75, 1.0)
FAINT_OPACITY = (0.30, 0.45)
NOISE = (2.0, 10.0)  # standard deviation, in grey values
DIMMED = (0.35, 0.75)  # photographs are darkened by this factor, digits are bright:
BRIGHT = 110.0  # least value of a digit's channels
CONTRAST = 70.0  # how much brighter a digit is than what lies under it
INK = 0.35  # opacity of the pasted shape over which a pixel counts as ink


class Shape(NamedTuple):
    """A digit about to be pasted."""

    mask: np.ndarray  # opacity (h, w) in 0..1
    hull: tuple[int, int, int, int]  # bounding box of the ink within the mask, x1, y1, x2, y2


@lru_cache(maxsize=1)
def _sources() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Shuffled digit masks (1797, 40, 40) in 0..1, labels (1797,), photographs (427, 640, 3)."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    order = np.random.default_rng(20230618).permutation(len(digits.target))
    # a margin of one cell, so that strokes end softly
    padded = np.pad(digits.images[order] / 16.0, ((0, 0), (1, 1), (1, 1)))
    zoomed = ndimage.zoom(padded, (1, 4, 4), order=3, mode="grid-constant", grid_mode=True)
    photos = [np.asarray(photo, dtype=np.float64) for photo in load_sample_images().images]
    return zoomed.clip(0, 1), digits.target[order], photos


def _shape(rng: np.random.Generator, mask: np.ndarray, height: float) -> Shape:
    """The mask scaled to `height` pixels, stretched and rotated."""
    angle = np.deg2rad(rng.uniform(-ROTATION, ROTATION))
    # 8 cells of ink are 32 pixels of the mask, and its soft margin adds some
    scale = np.array([height, height * rng.uniform(*ASPECT)]) / 36.0
    cos, sin = np.cos(angle), np.sin(angle)
    forward = np.array([[cos, -sin], [sin, cos]]) * scale  # mask (row, column) -> scene
    side = int(np.ceil(np.abs(forward).sum(1).max() * 40)) + 2
    inverse = np.linalg.inv(forward)
    offset = (np.array(mask.shape) - 1) / 2 - inverse @ np.full(2, (side - 1) / 2)
    moved = ndimage.affine_transform(mask, inverse, offset, (side, side), order=1)
    opacity = np.clip(1.6 * moved, 0, 1)
    rows = np.nonzero((opacity > INK).any(1))[0]
    columns = np.nonzero((opacity > INK).any(0))[0]
    return Shape(opacity, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def _cover(box: np.ndarray, neighbours: list[np.ndarray]) -> float:
    """The largest fraction of the smaller box of a pair (box, neighbour) that lies in both."""
    largest = 0.0
    for other in neighbours:
        sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
        intersection = np.clip(sides, 0, None).prod()
        smaller = min((box[2:] - box[:2]).prod(), (other[2:] - other[:2]).prod())
        largest = max(largest, intersection / smaller)
    return largest


def _free_box(
    rng: np.random.Generator,
    shape: Shape,
    size: tuple[int, int],
    boxes: list[np.ndarray],
    crowd: bool,
) -> np.ndarray | None:
    """A box (x1, y1, x2, y2) for the shape that respects `boxes`, or None after 40 tries.

    With `crowd` it lies near the last of `boxes` and overlaps it as CROWDED_COVER says.
    """
    height, width = size
    extent = np.array([shape.hull[2] - shape.hull[0], shape.hull[3] - shape.hull[1]])
    partner = boxes[-1:] if crowd else []
    others = boxes[:-1] if crowd else boxes
    for _ in range(40):
        if crowd:
            corner = np.rint(boxes[-1][:2] + rng.uniform(-1, 1, 2) * extent).astype(int)
        else:
            x = rng.integers(0, width - extent[0] + 1)
            y = rng.integers(0, height - extent[1] + 1)
            corner = np.array([x, y])
        box = np.concatenate([corner, corner + extent])
        outside = (corner < 0).any() or box[2] > width or box[3] > height
        if outside or _cover(box, others) > COVER:
            continue
        if not crowd or CROWDED_COVER[0] <= _cover(box, partner) <= CROWDED_COVER[1]:
            return box
    return None


def _paste(
    rng: np.random.Generator,
    canvas: np.ndarray,
    shape: Shape,
    box: np.ndarray,
    opacity: float,
) -> None:
    """Blend the shape into the scene in a colour brighter than what lies under it."""
    top = box[1] - shape.hull[1]
    left = box[0] - shape.hull[0]
    rows = slice(max(top, 0), min(top + shape.mask.shape[0], canvas.shape[0]))
    columns = slice(max(left, 0), min(left + shape.mask.shape[1], canvas.shape[1]))
    mask_rows = slice(rows.start - top, rows.stop - top)
    mask_columns = slice(columns.start - left, columns.stop - left)
    mask = shape.mask[mask_rows, mask_columns]
    under = canvas[rows, columns]
    grey = np.array([0.299, 0.587, 0.114])
    background = under.mean((0, 1)) @ grey
    for _ in range(21):
        colour = rng.uniform(BRIGHT, 255, 3)
        if colour @ grey - background >= CONTRAST:
            break
    alpha = (mask * opacity)[..., None]
    under[...] = under * (1 - alpha) + colour * alpha


def _background(
    rng: np.random.Generator, photos: list[np.ndarray], split: str, size: tuple[int, int]
) -> np.ndarray:
    """A dimmed crop of a photograph inside the split's region, mirrored half of the time."""
    photo = photos[rng.integers(len(photos))]
    first, last = COLUMN_RANGES[split]
    top = rng.integers(0, photo.shape[0] - size[0] + 1)
    left = rng.integers(first, last - size[1] + 1)
    crop = photo[top : top + size[0], left : left + size[1]]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return crop * rng.uniform(*DIMMED)


def scene(index: int, split: str = "train", seed: int = 0) -> View:
    """Scene `index` of a split: image (3, H, W) uint8, and its target.

    The same on every machine. It takes about 2 ms.
    """
    masks, labels, photos = _sources()
    rng = np.random.default_rng([SPLIT_SEEDS[split], seed, index])
    size = _draw_size(rng)
    canvas = _background(rng, photos, split, size)
    count = 0 if rng.random() < EMPTY else int(rng.integers(1, 7))
    crowded = count >= 2 and rng.random() < CROWDED
    look_alikes = int(rng.integers(1, 3)) if rng.random() < LOOK_ALIKES else 0
    boxes: list[np.ndarray] = []  # of digits and look-alikes
    digit_boxes: list[np.ndarray] = []
    digit_labels: list[int] = []
    for position in range(count + look_alikes):
        is_digit = position < count
        sample = rng.integers(*DIGIT_RANGES[split])
        mask = masks[sample]
        if not is_digit:
            other = rng.integers(*DIGIT_RANGES[split])
            while labels[other] == labels[sample]:
                other = rng.integers(*DIGIT_RANGES[split])
            mask = np.concatenate([mask[:20], masks[other][20:]])
        height = min(size) * np.exp(rng.uniform(*np.log(DIGIT_SIZE)))
        shape = _shape(rng, mask, height)
        box = _free_box(
            rng, shape, size, boxes, crowd=crowded and position == 1 and len(boxes) == 1
        )
        if box is None:
            continue
        faint = is_digit and rng.random() < FAINT
        opacity = rng.uniform(*(FAINT_OPACITY if faint else OPACITY))
        _paste(rng, canvas, shape, box, opacity)
        boxes.append(box)
        if is_digit:
            digit_boxes.append(box)
            digit_labels.append(labels[sample])
    canvas += rng.normal(0, 1, canvas.shape) * rng.uniform(*NOISE)
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    target: Target = {
        "boxes": torch.tensor(np.array(digit_boxes).reshape(-1, 4), dtype=torch.float32),
        "labels": torch.tensor(np.array(digit_labels, dtype=np.int64)),
        "size": size,
        "image_id": index,
    }
    return image, target


def _draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """(H, W) of a scene: the first number its generator draws."""
    return SIZES[int(np.searchsorted(SIZE_ODDS, rng.random(), side="right"))]


class DigitScenes:
    """The first `count` scenes of a split, each drawn on its first access and kept (30 kB).

    `sizes` [(H, W)] are known without drawing.
    """

    def __init__(self, split: str, count: int | None = None):
        self.split = split
        self.count = COUNTS[split] if count is None else count
        self.kept: dict[int, View] = {}
        self.sizes = [
            _draw_size(np.random.default_rng([SPLIT_SEEDS[split], 0, index]))
            for index in range(self.count)
        ]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> View:
        if index not in self.kept:
            self.kept[index] = scene(index, self.split)
        image, target = self.kept[index]
        return image, target.copy()


def load(percent: float = 10, fold: int = 1, extra_unlabelled: int = 0) -> Splits:
    """digits-v1 with `percent` % of its 2,000 training scenes labelled and the others not.

    `extra_unlabelled` more unlabelled scenes come from the same digits and photographs: number
    2,000, 2,001 ... of the training split.
    """
    train = DigitScenes("train", COUNTS["train"] + extra_unlabelled)
    labelled = labelled_indices(COUNTS["train"], percent, fold)
    rest = sorted(set(range(len(train))) - set(labelled))
    return Splits(
        labelled=Subset(train, labelled),
        unlabelled=WithoutLabels(train, rest),
        tune=DigitScenes("tune"),
        test=DigitScenes("test"),
        categories=CATEGORIES,
        flip=False,
    )
