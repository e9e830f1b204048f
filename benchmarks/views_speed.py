"""How fast one core makes the views of an unlabelled COCO-sized image, and where the time goes.

    python benchmarks/views_speed.py [--images 60] [--short-side 800]

A photograph of 640 x 480 pixels as a JPEG file (quality 92) becomes a weak and a strong view at the
short side given, as training does it, on one thread. Prints images a second by the clock and by the
processor's own time (which other programs on the machine disturb less), for the median image, and a
table in processor time: one row for each part of the work, timed on its own on the same images.
"""

import argparse
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from semidetr_lite.data import views
from semidetr_lite.data.images import read_image
from semidetr_lite.training.presets import PRESETS


def main() -> None:
    """Time the whole, then its parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--short-side", type=int, default=800)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = replace(PRESETS["coco-10pct"].views, short_sides=(options.short_side,))
    clock: list[float] = []
    times: dict[str, list[float]] = {}

    def timed(name: str, function, *arguments):
        began = time.process_time()
        made = function(*arguments)
        times.setdefault(name, []).append(time.process_time() - began)
        return made

    def both(path: Path, number: int) -> None:
        image = read_image(path)
        target = {"size": tuple(image.shape[1:]), "image_id": number}
        views.weak_view(image, target, np.random.default_rng([0, number]), settings)
        views.strong_view(image, target, np.random.default_rng([1, number]), settings)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        Image.fromarray(load_sample_images().images[0]).resize((640, 480)).save(path, quality=92)
        both(path, 0)  # warm up
        for number in range(options.images):
            began = time.perf_counter()
            timed("all", both, path, number)
            clock.append(time.perf_counter() - began)
            rng = np.random.default_rng([2, number])
            image = timed("decode", read_image, path)
            size = tuple(image.shape[1:])
            weak, size, _ = timed("weak: resize", views._resized_image, image, size, rng, settings)
            timed(
                "weak: mirror", views.warp, weak, views._matrix([-1, 0, size[1]], [0, 1, 0]), size
            )
            strong = timed(
                "strong: resize", views._resized_image, image, tuple(image.shape[1:]), rng, settings
            )[0]
            moved = timed(
                "strong: geometry",
                views.warp,
                strong,
                views._strong_matrix(size, rng, settings),
                size,
            )
            coloured = timed("strong: colour", views.color_augment, moved, rng)
            timed("strong: erase", views.random_erase, coloured, rng, settings)

    print(
        f"{platform.machine()}, one thread, torch {torch.__version__}, "
        f"640 x 480 to short side {options.short_side}"
    )
    for name, spent in (("by the clock", clock), ("of processor time", times.pop("all"))):
        each = statistics.median(spent)
        print(
            f"{1 / each:5.1f} images a second {name}, "
            f"weak and strong view each ({1e3 * each:.1f} ms)"
        )
    for name, spent in times.items():
        median, mean = 1e3 * statistics.median(spent), 1e3 * statistics.fmean(spent)
        print(f"  {name:<18} median {median:5.1f} ms, mean {mean:5.1f} ms")


if __name__ == "__main__":
    main()
