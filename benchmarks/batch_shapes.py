"""How often a batch of the COCO recipe has a shape that was there before, without and with rounding
of its sides.

    python benchmarks/batch_shapes.py --parts 8 2 1

cuDNN prepares a convolution for each shape of its input, and PyTorch keeps the newest 10,000 of
these plans. No image is read: sizes are drawn like those of data_scripts/make_coco_sized.py, steps
and short sides like those of training. One line for each number of parts and each multiple that
sides are rounded up to (1: as they are):

    shapes  different ones, of as many batches of teacher and student
    known   share of the batches, in the second half, whose plans were kept
    area    pixels to those without rounding
"""

import argparse
import collections
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))

import make_coco_sized

from semidetr_lite.data.batches import Batches
from semidetr_lite.data.views import resized
from semidetr_lite.training.engine import micro_batches
from semidetr_lite.training.settings import new_config

PLANS = {
    "teacher": 25,
    "student": 63,
}  # different convolutions of ResNet-50 and projections, and their gradients
KEPT = 10_000


@dataclass
class Sizes:
    """Images of which only the sizes are known."""

    sizes: list[tuple[int, int]]

    def __len__(self):
        return len(self.sizes)


@dataclass
class Splits:
    """Labelled and unlabelled images."""

    labelled: Sizes
    unlabelled: Sizes
    flip: bool = True


def batches(steps: int, parts: int, splits: Splits):
    """("teacher" or "student", sizes of its images) for each part of each step."""
    recipe, rng = new_config("coco-10pct", data="none"), np.random.default_rng(0)
    count, unlabelled_count = recipe.optimizer.batch_size, recipe.optimizer.unlabelled_batch_size
    sides = recipe.views
    drawn = Batches(splits, count, unlabelled_count, sides, 0)
    for step in range(steps):
        shape, turn = drawn.shape_and_draw_index(step)
        labelled = [splits.labelled.sizes[index] for index in drawn.labelled.draw(shape, turn)]
        unlabelled = [
            splits.unlabelled.sizes[index] for index in drawn.unlabelled.draw(shape, turn)
        ]
        batch = {}
        for name, sizes in {"labelled": labelled, "weak": unlabelled, "strong": unlabelled}.items():
            seen = [
                resized(size, int(rng.choice(sides.short_sides)), sides.long_side) for size in sizes
            ]
            batch[name] = (seen, seen)  # in place of images and targets
        for part in micro_batches(batch, parts):
            yield "teacher", part["weak"][0]
            yield "student", part["labelled"][0] + part["strong"][0]


def padded_to(sizes: list[tuple[int, int]], multiple: int) -> tuple[int, int]:
    """Height and width of a batch; images of one size are not padded."""
    multiple = multiple if len(set(sizes)) > 1 else 1
    return tuple(-(-max(side) // multiple) * multiple for side in zip(*sizes))


def known_shapes(shapes: list[tuple]) -> float:
    """Share of the second half whose plans were kept, the oldest being dropped."""
    kept, used, known = collections.OrderedDict(), 0, 0
    for number, shape in enumerate(shapes):
        if shape in kept:
            kept.move_to_end(shape)
            known += number >= len(shapes) // 2
            continue
        kept[shape], used = True, used + PLANS[shape[0]]
        while used > KEPT:
            used -= PLANS[kept.popitem(last=False)[0][0]]
    return known / (len(shapes) - len(shapes) // 2)


def main(argv=None) -> int:
    """Print a line for each number of parts and each multiple."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=int, nargs="+", default=[8, 2, 1])
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args(argv)
    rng = np.random.default_rng(5)
    sizes = [make_coco_sized.draw_size(rng)[::-1] for _ in range(20_000)]  # (height, width)
    splits = Splits(Sizes(sizes[:2000]), Sizes(sizes[2000:]))
    for parts in options.parts:
        found = list(batches(options.steps, parts, splits))
        areas = {}
        for multiple in (1, 32, 64):
            shapes = [(who, len(images), *padded_to(images, multiple)) for who, images in found]
            areas[multiple] = sum(count * height * width for _, count, height, width in shapes)
            print(
                f"{parts} parts, multiples of {multiple}: "
                f"{len(set(shapes))} shapes of {len(shapes)} batches, "
                f"{100 * known_shapes(shapes):.1f} % known, area {areas[multiple] / areas[1]:.3f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
