"""`digits-v1`: real handwritten digits pasted on real photographs, drawn on the fly, nothing to download.

A scene is a crop of one of scikit-learn's two sample photographs with zero to six of its 8x8 handwritten digits
pasted at random size, aspect, rotation, colour and place, plus noise. The box is the tight hull of the ink. Every
scene is a pure function of (split, seed, index). Digit samples and photograph regions of the three splits are
disjoint. Some digits are faint, some scenes hold a crowded pair, and some hold unlabelled look-alikes (upper half of
one digit, lower half of another), so that a detector can be wrong in the ways that matter.

The numbers below are frozen: a test keeps a hash of ten scenes, and a change gets a new name.

Sources: handwritten digits of the UCI repository through `sklearn.datasets.load_digits` (BSD). Photographs through
`sklearn.datasets.load_sample_images`: china.jpg by danielbuechele and flower.jpg by vultilion, both on Flickr, CC BY
2.0.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from semidetr_lite.data.splits import Splits, Subset, Unlabelled, labelled_indices

NAME = "digits-v1"
COUNTS = {"train": 2000, "tune": 300, "test": 500}
CATEGORIES = [{"id": digit, "name": str(digit)} for digit in range(10)]

SPLIT_SEEDS = {"train": 1, "tune": 2, "test": 3}
DIGIT_RANGES = {"train": (0, 1197), "tune": (1197, 1397), "test": (1397, 1797)}  # after one fixed shuffle
COLUMN_RANGES = {"train": (0, 352), "tune": (352, 484), "test": (484, 640)}  # of the 427 x 640 photographs
SIZES, SIZE_ODDS = [(96, 96), (96, 128), (128, 96)], [0.6, 0.8, 1.0]
EMPTY, CROWDED, LOOK_ALIKES, FAINT = 0.05, 0.10, 0.15, 0.10
DIGIT_SIZE, ROTATION, ASPECT = (0.11, 0.38), 17.0, (0.75, 1.2)  # of the shorter side; degrees; width over height
COVER, CROWDED_COVER = 0.25, (0.25, 0.50)  # how much of a neighbour's box a digit may cover
OPACITY, FAINT_OPACITY, NOISE = (0.75, 1.0), (0.30, 0.45), (2.0, 10.0)
DIMMED = (0.35, 0.75)  # photographs are dimmed ...
BRIGHT, CONTRAST = 110.0, 70.0  # ... digits are bright: least of a channel, and how much lighter than what is below
INK = 0.35  # opacity of the pasted shape over which a pixel counts as ink


class Shape(NamedTuple):
    """A digit about to be pasted: its opacity mask (h, w) in 0..1, and the hull of its ink within the mask."""

    mask: np.ndarray
    hull: tuple[int, int, int, int]


@lru_cache(maxsize=1)
def _sources() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Digit masks (1797, 40, 40) in 0..1 in one fixed shuffle, their labels (1797,), two photographs (427, 640, 3)."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    order = np.random.default_rng(20230618).permutation(len(digits.target))
    padded = np.pad(digits.images[order] / 16.0, ((0, 0), (1, 1), (1, 1)))  # a margin, so that strokes end softly
    masks = ndimage.zoom(padded, (1, 4, 4), order=3, mode="grid-constant", grid_mode=True).clip(0, 1)  # (1797, 40, 40)
    return masks, digits.target[order], [np.asarray(photo, dtype=np.float64) for photo in load_sample_images().images]


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
    drawn = np.clip(1.6 * ndimage.affine_transform(mask, inverse, offset, (side, side), order=1), 0, 1)
    rows, columns = np.nonzero((drawn > INK).any(1))[0], np.nonzero((drawn > INK).any(0))[0]
    return Shape(drawn, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def _cover(box: np.ndarray, others: list[np.ndarray]) -> float:
    """The largest share of either box that a pair of (box, other) has in common."""
    worst = 0.0
    for other in others:
        common = np.clip(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0, None).prod()
        worst = max(worst, common / min((box[2:] - box[:2]).prod(), (other[2:] - other[:2]).prod()))
    return worst


def _place(
    rng: np.random.Generator, shape: Shape, size: tuple[int, int], taken: list[np.ndarray], crowd: bool
) -> np.ndarray | None:
    """A box (x1, y1, x2, y2) for the shape inside the scene that respects its neighbours, or None after 40 tries."""
    height, width = size
    extent = np.array([shape.hull[2] - shape.hull[0], shape.hull[3] - shape.hull[1]])
    near, others = (taken[-1:], taken[:-1]) if crowd else ([], taken)
    for _ in range(40):
        if crowd:  # near the last digit
            corner = np.rint(taken[-1][:2] + rng.uniform(-1, 1, 2) * extent).astype(int)
        else:
            corner = np.array([rng.integers(0, width - extent[0] + 1), rng.integers(0, height - extent[1] + 1)])
        box = np.concatenate([corner, corner + extent])
        if (corner < 0).any() or box[2] > width or box[3] > height or _cover(box, others) > COVER:
            continue
        if not crowd or CROWDED_COVER[0] <= _cover(box, near) <= CROWDED_COVER[1]:
            return box
    return None


def _paste(rng: np.random.Generator, scene: np.ndarray, shape: Shape, box: np.ndarray, opacity: float) -> None:
    """Blend the shape into the scene in a colour brighter than what lies under it."""
    top, left = box[1] - shape.hull[1], box[0] - shape.hull[0]
    rows = slice(max(top, 0), min(top + shape.mask.shape[0], scene.shape[0]))
    columns = slice(max(left, 0), min(left + shape.mask.shape[1], scene.shape[1]))
    mask = shape.mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    under = scene[rows, columns]
    grey = np.array([0.299, 0.587, 0.114])
    behind = under.mean((0, 1)) @ grey
    for _ in range(21):
        colour = rng.uniform(BRIGHT, 255, 3)
        if colour @ grey - behind >= CONTRAST:
            break
    alpha = (mask * opacity)[..., None]
    under[...] = under * (1 - alpha) + colour * alpha


def _background(rng: np.random.Generator, photos: list[np.ndarray], split: str, size: tuple[int, int]) -> np.ndarray:
    """A dimmed crop of a photograph inside the split's region, mirrored half of the time."""
    photo = photos[rng.integers(len(photos))]
    first, last = COLUMN_RANGES[split]
    top = rng.integers(0, photo.shape[0] - size[0] + 1)
    left = rng.integers(first, last - size[1] + 1)
    crop = photo[top : top + size[0], left : left + size[1]]
    return (crop[:, ::-1] if rng.random() < 0.5 else crop) * rng.uniform(*DIMMED)


def scene(index: int, split: str = "train", seed: int = 0) -> tuple[torch.Tensor, dict]:
    """Scene `index` of a split: (image (3, H, W) uint8, target). The same on every machine; about 2 ms."""
    masks, labels, photos = _sources()
    rng = np.random.default_rng([SPLIT_SEEDS[split], seed, index])
    size = SIZES[int(np.searchsorted(SIZE_ODDS, rng.random(), side="right"))]
    canvas = _background(rng, photos, split, size)
    count = 0 if rng.random() < EMPTY else int(rng.integers(1, 7))
    crowded = count >= 2 and rng.random() < CROWDED
    look_alikes = int(rng.integers(1, 3)) if rng.random() < LOOK_ALIKES else 0
    boxes, kept_boxes, kept_labels = [], [], []
    for position in range(count + look_alikes):
        picked = rng.integers(*DIGIT_RANGES[split])
        mask, real = masks[picked], position < count
        if not real:
            other = rng.integers(*DIGIT_RANGES[split])
            while labels[other] == labels[picked]:
                other = rng.integers(*DIGIT_RANGES[split])
            mask = np.concatenate([mask[:20], masks[other][20:]])
        height = min(size) * np.exp(rng.uniform(*np.log(DIGIT_SIZE)))
        shape = _shape(rng, mask, height)
        box = _place(rng, shape, size, boxes, crowd=crowded and position == 1 and len(boxes) == 1)
        if box is None:
            continue
        opacity = rng.uniform(*(FAINT_OPACITY if real and rng.random() < FAINT else OPACITY))
        _paste(rng, canvas, shape, box, opacity)
        boxes.append(box)
        if real:
            kept_boxes.append(box)
            kept_labels.append(labels[picked])
    canvas += rng.normal(0, 1, canvas.shape) * rng.uniform(*NOISE)
    image = torch.from_numpy(np.clip(np.rint(canvas), 0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()
    target = {
        "boxes": torch.tensor(np.array(kept_boxes).reshape(-1, 4), dtype=torch.float32),
        "labels": torch.tensor(np.array(kept_labels, dtype=np.int64)),
        "size": size,
        "image_id": index,
    }
    return image, target


class DigitScenes:
    """The first `count` scenes of a split, drawn when first asked for and then kept (about 30 kB each)."""

    def __init__(self, split: str, count: int | None = None):
        self.split, self.count = split, COUNTS[split] if count is None else count
        self.kept: dict[int, tuple[torch.Tensor, dict]] = {}
        self.sizes = [self._size(index) for index in range(self.count)]

    def _size(self, index: int) -> tuple[int, int]:
        rng = np.random.default_rng([SPLIT_SEEDS[self.split], 0, index])
        return SIZES[int(np.searchsorted(SIZE_ODDS, rng.random(), side="right"))]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        if index not in self.kept:
            self.kept[index] = scene(index, self.split)
        image, target = self.kept[index]
        return image, dict(target)


def load(percent: float = 10, fold: int = 1, further: int = 0) -> Splits:
    """digits-v1 with `percent` % of its 2,000 training scenes labelled and the others not.

    `further` unlabelled scenes are made of the same digits and photographs: number 2,000, 2,001 ... of the split.
    """
    train = DigitScenes("train", COUNTS["train"] + further)
    labelled = labelled_indices(COUNTS["train"], percent, fold)
    rest = sorted(set(range(len(train))) - set(labelled))
    tune, test = DigitScenes("tune"), DigitScenes("test")
    return Splits(Subset(train, labelled), Unlabelled(train, rest), tune, test, CATEGORIES, flip=False)
