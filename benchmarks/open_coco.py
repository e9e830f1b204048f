"""Open a json of COCO's size: seconds and megabytes.

    python benchmarks/open_coco.py [--images 118287] [--folder FOLDER]

Writes instances_train2017.json with random outlines (about 450 MB, as COCO's own) and empty image
files into a temporary folder, opens it in a fresh process as training does, and prints the time,
the memory at its height and the memory held afterwards (Linux). The headers of a folder of
unlabelled images are timed beside it, on small JPEG files.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

CATEGORIES = [{"id": number, "name": f"class {number}"} for number in range(1, 91) if number % 9]
BOXES = 7.27  # an image, as in COCO

PROBE = """
import resource, sys, time
import semidetr_lite.data.coco as coco
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
before, began, busy = resident(), time.perf_counter(), time.process_time()
splits = coco.load(sys.argv[1], percent=10)
seconds, busy = time.perf_counter() - began, time.process_time() - busy
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
boxes = len(splits.labelled.dataset.dataset.fields["boxes"])
print(f"opened in {seconds:.1f} s ({busy:.1f} s of one core)")
labelled, unlabelled = len(splits.labelled), len(splits.unlabelled)
print(f"{labelled:,} labelled, {unlabelled:,} unlabelled images, {boxes:,} boxes")
print(f"memory before {before:.0f} MB, at its height {peak:.0f} MB, held {resident():.0f} MB")
"""


def write_json(path: Path, images: int) -> None:
    """A json of `images` images with boxes and polygons, written row by row."""
    rng = random.Random(0)
    number = 0
    with open(path, "w") as file:
        file.write('{"info": {}, "licenses": [], "images": [')
        for image in range(images):
            row = {
                "license": 3,
                "file_name": f"{image:012d}.jpg",
                "coco_url": f"http://images.example/{image:012d}.jpg",
            }
            row |= {
                "height": 480,
                "width": 640,
                "date_captured": "2013-11-14 11:18:45",
                "id": image + 1,
            }
            file.write(", " * (image > 0) + json.dumps(row))
        file.write('], "annotations": [')
        for image in range(images):
            for _ in range(min(int(rng.expovariate(1 / BOXES) + 0.5), 60)):
                x, y, w, h = (
                    round(rng.uniform(*limits), 2)
                    for limits in ((0, 500), (0, 400), (4, 139), (4, 79))
                )
                outline = [round(rng.uniform(0, 640), 2) for _ in range(2 * rng.randint(4, 41))]
                row = {
                    "segmentation": [outline],
                    "area": w * h / 2,
                    "iscrowd": 0,
                    "image_id": image + 1,
                }
                row |= {
                    "bbox": [x, y, w, h],
                    "category_id": rng.choice(CATEGORIES)["id"],
                    "id": number + 1,
                }
                file.write(", " * (number > 0) + json.dumps(row))
                number += 1
        file.write(f'], "categories": {json.dumps(CATEGORIES)}}}')


def main() -> None:
    """Write, open, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument(
        "--folder", type=Path, help="keep the files here, and take them if they are there"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        path = folder / "instances_train2017.json"
        if not path.exists():
            (folder / "train2017").mkdir(parents=True)
            for image in range(options.images):
                (folder / "train2017" / f"{image:012d}.jpg").touch()
            write_json(path, options.images)
        print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB")
        subprocess.run([sys.executable, "-c", PROBE, str(folder)], check=True)

        from semidetr_lite.data.images import ImageFolder

        small = folder / "small"
        small.mkdir(exist_ok=True)
        for image in range(2000):
            Image.new("RGB", (640, 480)).save(small / f"{image}.jpg")
        opened = ImageFolder(small)
        began = time.perf_counter()
        _ = opened.sizes
        each = (time.perf_counter() - began) / len(opened)
        print(
            f"image sizes of an unlabelled folder: {1e3 * each:.2f} ms each, "
            f"{123_403 * each:.0f} s for unlabeled2017"
        )


if __name__ == "__main__":
    main()
