"""Generated images of COCO's measures, to run the COCO recipe without COCO.

    OUT/annotations/instances_train2017.json  instances_val2017.json
    OUT/train2017/  val2017/  000000000001.jpg ...

    python data_scripts/make_coco_sized.py data/coco-sized
        1,200 images, about 150 MB
    python data_scripts/make_coco_sized.py data/coco-sized --train 118287 --val 5000
        as many as COCO has
    semidetr train --preset coco-10pct --data data/coco-sized --out RUN

Sizes and aspect ratios come about as often as in COCO (fractions written down from memory), so do
objects in an image (7 on average, up to 93, none in 1 %) and their sizes (four in ten under 32 x 32
pixels, a quarter over 96 x 96); one in a hundred is a crowd region. The 80 classes have COCO's ids
with their gaps: a class is a digit in one of 8 colours. It is pasted on crops of scikit-learn's two
photographs (by danielbuechele and vultilion, CC BY 2.0). Image i is the same whatever the counts.
"""

import argparse
import colorsys
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from _script import run
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from tqdm import tqdm

from semidetr_lite.data.coco import COCO_IDS
from semidetr_lite.errors import UserError
from semidetr_lite.files import write_json

# (width, height): fraction of the images; the others have sides drawn between 300 and 640
SIZES = {
    (640, 480): 0.29, (640, 427): 0.13, (480, 640): 0.11, (640, 426): 0.09, (500, 375): 0.05,
    (427, 640): 0.04, (426, 640): 0.03, (640, 360): 0.02, (500, 333): 0.02, (640, 640): 0.02,
    (612, 612): 0.02, (375, 500): 0.02, (640, 425): 0.02, (640, 428): 0.02, (333, 500): 0.01,
}  # fmt: skip
COLOURS = [
    tuple(int(255 * value) for value in colorsys.hsv_to_rgb(hue / 8, 0.9, 0.95)) for hue in range(8)
]
CATEGORIES = [
    {"id": number, "name": f"{label % 10} in colour {label // 10}"}
    for label, number in enumerate(COCO_IDS)
]
FIRST_ID = {"train2017": 1, "val2017": 1_000_001}
MAX_OBJECTS = 93  # in an image of COCO
Sources = tuple[dict[int, np.ndarray], list[np.ndarray]]  # see `load_sources`


def main(argv=None) -> int:
    """Write the tree; the exit status is 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=1000, help="images of train2017")
    parser.add_argument("--val", type=int, default=200, help="images of val2017")
    options = parser.parse_args(argv)
    return run(make, options.out, {"train2017": options.train, "val2017": options.val})


def make(out: Path, counts: dict[str, int]) -> None:
    """Write the tree at `out`, whole or not at all.

    `counts` {"train2017", "val2017"} are the numbers of images. Raises UserError for impossible
    counts or a folder that is there already.
    """
    if min(counts.values()) < 1 or counts["train2017"] >= FIRST_ID["val2017"]:
        raise UserError("from 1 to a million images in each split")
    if out.exists():
        raise UserError(f"{out}: is there already; give another folder, or delete it")
    staging = out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    sources = load_sources()
    try:
        for split, count in counts.items():
            _write_split(staging, split, count, sources)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{out}: " + ", ".join(f"{count} images in {split}" for split, count in counts.items()))


def load_sources() -> Sources:
    """Masks (N, 8, 8) in 0..1 of each digit, and scikit-learn's two photographs (H, W, 3) uint8."""
    digits = load_digits()
    masks = {digit: digits.images[digits.target == digit] / 16 for digit in range(10)}
    return masks, load_sample_images().images


def _write_split(folder: Path, split: str, count: int, sources: Sources) -> None:
    (folder / split).mkdir(parents=True)
    images = []
    annotations = []
    ids = range(FIRST_ID[split], FIRST_ID[split] + count)
    for image_id in tqdm(ids, desc=split, disable=None):
        picture, rows = scene(image_id, sources)
        name = f"{image_id:012d}.jpg"
        picture.save(folder / split / name, quality=90)
        size = {"width": picture.width, "height": picture.height}
        images.append({"id": image_id, "file_name": name, **size})
        for row in rows:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **row})
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    write_json(folder / "annotations" / f"instances_{split}.json", document)


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height of an image."""
    number = int(np.searchsorted(np.cumsum(list(SIZES.values())), rng.random()))
    any_size = tuple(rng.integers(300, 641, 2).tolist())
    return [*SIZES, any_size][number]


def scene(number: int, sources: Sources) -> tuple[Image.Image, list[dict]]:
    """Image `number` and its annotations, without ids; `sources` as `load_sources` returns them."""
    masks, photos = sources
    rng = np.random.default_rng([number, 17])
    width, height = draw_size(rng)
    photo = Image.fromarray(photos[rng.integers(len(photos))])
    scale = rng.uniform(0.4, 1.0) * min(photo.width / width, photo.height / height)
    left = rng.uniform(0, photo.width - scale * width)
    top = rng.uniform(0, photo.height - scale * height)
    crop = (left, top, left + scale * width, top + scale * height)
    picture = photo.resize((width, height), Image.BILINEAR, crop)
    count = 0
    if rng.random() >= 0.01:
        count = min(MAX_OBJECTS, 1 + int(np.exp(rng.normal(1.35, 1.0))))
    rows = []
    for _ in range(count):
        side = np.exp(rng.normal(np.log(45), 1.2))
        aspect = np.exp(rng.normal(0, 0.35))
        w = int(np.clip(side * aspect, 4, 0.95 * width))
        h = int(np.clip(side / aspect, 4, 0.95 * height))
        x = int(rng.integers(0, width - w + 1))
        y = int(rng.integers(0, height - h + 1))
        label = int(rng.integers(80))
        of_digit = masks[label % 10]
        mask = of_digit[rng.integers(len(of_digit))]
        inked = mask[np.ix_(mask.any(1), mask.any(0))]  # the box is the bounding box of the ink
        ink = Image.fromarray(np.uint8(255 * np.minimum(1, 1.3 * inked)))
        picture.paste(COLOURS[label // 10], (x, y), ink.resize((w, h), Image.BILINEAR))
        crowd = int(rng.random() < 0.01)
        row = {"category_id": COCO_IDS[label], "bbox": [x, y, w, h], "area": w * h}
        rows.append({**row, "iscrowd": crowd})
    return picture, rows


if __name__ == "__main__":
    sys.exit(main())
