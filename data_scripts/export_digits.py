"""digits-v1 as a miniature COCO on disk, to walk every path that COCO takes without COCO.

    OUT/annotations/instances_train2017.json  instances_val2017.json
                    image_info_unlabeled2017.json
    OUT/train2017/  val2017/  unlabeled2017/  000000000001.png ...

    python data_scripts/export_digits.py data/digits
        about 100 MB, half a minute
    python data_scripts/export_digits.py data/digits --scenes 100 --val 20 --unlabelled 50
        fewer scenes
    semidetr train --data data/digits --unlabelled data/digits/unlabeled2017 --out RUN

train2017 are the first scenes of digits-v1's training split, val2017 those of its test split, so
that an AP measured on all of them stands beside one of the embedded data. unlabeled2017 are more
scenes made of the same digits and photographs as the training split: scenes 2,000, 2,001 ... of it.
Its json has no boxes. Images are PNG: the pixels are the embedded ones to the last bit, which JPEG
would not keep. One difference remains in training: COCO data is mirrored at random, and a mirrored
digit is no digit; switch that off to compare.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from _script import run
from PIL import Image
from tqdm import tqdm

from semidetr_lite.data import digits
from semidetr_lite.errors import UserError
from semidetr_lite.files import write_json

FIRST_ID = {
    "train2017": 1,
    "val2017": 100_001,
    "unlabeled2017": 200_001,
}  # image ids differ across the jsons


def main(argv=None) -> int:
    """Write the tree; the exit status is 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--scenes", type=int, default=digits.COUNTS["train"], help="images of train2017"
    )
    parser.add_argument("--val", type=int, default=digits.COUNTS["test"], help="images of val2017")
    parser.add_argument("--unlabelled", type=int, default=2000, help="images of unlabeled2017")
    options = parser.parse_args(argv)
    return run(export, options.out, options.scenes, options.val, options.unlabelled)


def export(out: Path, scenes: int, val: int, unlabelled: int) -> None:
    """Write the tree at `out`, whole or not at all.

    `scenes`, `val` and `unlabelled` are the numbers of images. Raises UserError for impossible
    counts or a folder that holds something else.
    """
    counts = {"train2017": scenes, "val2017": val, "unlabeled2017": unlabelled}
    limits = {
        "train2017": digits.COUNTS["train"],
        "val2017": digits.COUNTS["test"],
        "unlabeled2017": 50_000,
    }
    for split, count in counts.items():
        if not 1 <= count <= limits[split]:
            raise UserError(f"{split}: from 1 to {limits[split]} scenes, not {count}")
    if out.exists():
        if not all(_holds(out / split, count) for split, count in counts.items()):
            problem = "exists and is not this export"
            raise UserError(f"{out}: {problem}; give another folder, or delete it")
        print(f"{out}: is there already")
        return
    staging = out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        for split, count in counts.items():
            _write_split(staging, split, count)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{out}: " + ", ".join(f"{count} images in {split}" for split, count in counts.items()))


def _holds(folder: Path, count: int) -> bool:
    return folder.is_dir() and len(list(folder.glob("[0-9]*.png"))) == count


def _write_split(folder: Path, split: str, count: int) -> None:
    """The images of a split and its json, with boxes unless the split is unlabelled."""
    is_unlabelled = split == "unlabeled2017"
    source = "test" if split == "val2017" else "train"
    first = digits.COUNTS["train"] if is_unlabelled else 0
    (folder / split).mkdir(parents=True)
    images = []
    annotations = []
    for number in tqdm(range(count), desc=split, disable=None):
        pixels, target = digits.scene(first + number, source)
        image_id = FIRST_ID[split] + number
        name = f"{image_id:012d}.png"
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)
        picture.save(folder / split / name)
        height, width = target["size"]
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        if is_unlabelled:
            continue
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": digits.CATEGORIES[label]["id"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    document = {
        "info": {
            "description": f"{digits.NAME}: handwritten digits in photographs",
            "split": split,
        },
        "images": images,
        "annotations": annotations,
        "categories": digits.CATEGORIES,
    }
    prefix = "image_info" if is_unlabelled else "instances"
    write_json(folder / "annotations" / f"{prefix}_{split}.json", document)


if __name__ == "__main__":
    sys.exit(main())
