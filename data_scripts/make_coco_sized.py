"""A data set of COCO's measures: all but the photographs is as there, to run the COCO recipe without COCO.

    OUT/annotations/instances_train2017.json  instances_val2017.json      OUT/train2017/  val2017/  000000000001.jpg ...

    python data_scripts/make_coco_sized.py data/coco-sized                                   1,200 images, about 150 MB
    python data_scripts/make_coco_sized.py data/coco-sized --train 118287 --val 5000         as many as COCO has
    semidetr train --preset coco-10pct --data data/coco-sized --out RUN

Sizes and aspect ratios come about as often as in COCO (shares written down from memory), so do objects in an image (7
on average, up to 93, none in 1 %) and their sizes (four in ten under 32 x 32 pixels, a quarter over 96 x 96); one in a
hundred is a crowd region. The 80 classes have COCO's ids with their gaps: a class is a digit in one of 8 colours. It is
pasted on crops of scikit-learn's two photographs (by danielbuechele and vultilion, CC BY 2.0). Image i is the same
whatever the counts.
"""

import argparse
import colorsys
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from _script import run, write_json
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from tqdm import tqdm

from semidetr_lite.errors import UserError

# (width, height): share; what is left over has sides of its own between 300 and 640
SIZES = {
    (640, 480): 0.29, (640, 427): 0.13, (480, 640): 0.11, (640, 426): 0.09, (500, 375): 0.05, (427, 640): 0.04,
    (426, 640): 0.03, (640, 360): 0.02, (500, 333): 0.02, (640, 640): 0.02, (612, 612): 0.02, (375, 500): 0.02,
    (640, 425): 0.02, (640, 428): 0.02, (333, 500): 0.01,
}  # fmt: skip
GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids that COCO does not use
IDS = [number for number in range(1, 91) if number not in GAPS]
COLOURS = [tuple(int(255 * part) for part in colorsys.hsv_to_rgb(hue / 8, 0.9, 0.95)) for hue in range(8)]
CATEGORIES = [{"id": number, "name": f"{place % 10} in colour {place // 10}"} for place, number in enumerate(IDS)]
FIRST_ID = {"train2017": 1, "val2017": 1_000_001}
MOST = 93  # objects in an image of COCO


def main(argv=None) -> int:
    """Write the tree; the exit status is 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=1000, help="images of train2017")
    parser.add_argument("--val", type=int, default=200, help="images of val2017")
    options = parser.parse_args(argv)
    return run(make, options.out, {"train2017": options.train, "val2017": options.val})


def make(out: Path, counts: dict[str, int]) -> None:
    """Write the tree at `out`, whole or not at all. Raises UserError for impossible counts or a folder in use."""
    if min(counts.values()) < 1 or counts["train2017"] >= FIRST_ID["val2017"]:
        raise UserError("from 1 to a million images in each part")
    if out.exists():
        raise UserError(f"{out}: is there already; give another folder, or delete it")
    staging = out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    masks = load_digits()
    sources = {digit: masks.images[masks.target == digit] / 16 for digit in range(10)}, load_sample_images().images
    try:
        for part, count in counts.items():
            _write_part(staging, part, count, sources)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{out}: " + ", ".join(f"{count} images in {part}" for part, count in counts.items()))


def _write_part(folder: Path, part: str, count: int, sources) -> None:
    (folder / part).mkdir(parents=True)
    images, annotations = [], []
    for image_id in tqdm(range(FIRST_ID[part], FIRST_ID[part] + count), desc=part, disable=None):
        pixels, rows = scene(image_id, sources)
        pixels.save(folder / part / f"{image_id:012d}.jpg", quality=90)
        images.append({"id": image_id, "file_name": f"{image_id:012d}.jpg", "width": pixels.width})
        images[-1]["height"] = pixels.height
        annotations += [
            {"id": len(annotations) + place, "image_id": image_id, **row} for place, row in enumerate(rows, 1)
        ]
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    write_json(folder / "annotations" / f"instances_{part}.json", document)


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height of an image."""
    place = int(np.searchsorted(np.cumsum(list(SIZES.values())), rng.random()))
    return [*SIZES, tuple(rng.integers(300, 641, 2).tolist())][place]


def scene(number: int, sources) -> tuple[Image.Image, list[dict]]:
    """Image `number` and its annotations without ids; sources: masks (8, 8) in [0, 1] of each digit, photographs."""
    masks, photos = sources
    rng = np.random.default_rng([number, 17])
    width, height = draw_size(rng)
    photo = Image.fromarray(photos[rng.integers(len(photos))])
    scale = rng.uniform(0.4, 1.0) * min(photo.width / width, photo.height / height)
    left, top = (rng.uniform(0, side - scale * own) for side, own in ((photo.width, width), (photo.height, height)))
    picture = photo.resize((width, height), Image.BILINEAR, (left, top, left + scale * width, top + scale * height))
    count = 0 if rng.random() < 0.01 else min(MOST, 1 + int(np.exp(rng.normal(1.35, 1.0))))
    rows = []
    for _ in range(count):
        side, shape = np.exp(rng.normal(np.log(45), 1.2)), np.exp(rng.normal(0, 0.35))
        w, h = (int(np.clip(s, 4, 0.95 * whole)) for s, whole in ((side * shape, width), (side / shape, height)))
        x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        label = int(rng.integers(80))
        mask = masks[label % 10][rng.integers(len(masks[label % 10]))]
        inked = mask[np.ix_(mask.any(1), mask.any(0))]  # the box is the hull of the ink
        ink = Image.fromarray(np.uint8(255 * np.minimum(1, 1.3 * inked))).resize((w, h), Image.BILINEAR)
        picture.paste(COLOURS[label // 10], (x, y), ink)
        row = {"category_id": IDS[label], "bbox": [x, y, w, h], "area": w * h, "iscrowd": int(rng.random() < 0.01)}
        rows.append(row)
    return picture, rows


if __name__ == "__main__":
    sys.exit(main())
