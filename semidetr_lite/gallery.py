"""The gallery: detections of shipped weights on scenes of the embedded test split, no training.

Supervised training and Semi-DETR had the same 200 labelled scenes and the same training time. The
weights lie in notebooks/checkpoints of the repository; checkpoints/recorded.json there says how
each was made.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from semidetr_lite.contracts import Target
from semidetr_lite.data import digits
from semidetr_lite.errors import UserError
from semidetr_lite.files import write_atomic
from semidetr_lite.training.checkpoint import load_detector
from semidetr_lite.visualize import Picture, count_hits, png, show_comparison

CHECKPOINTS = Path(__file__).parents[1] / "notebooks" / "checkpoints"
WEIGHTS = {"supervised": "supervised_same_time.safetensors", "Semi-DETR": "semi_detr.safetensors"}
COUNTED = 100  # test scenes whose hits, false alarms and misses are counted
PNG_DPI = 200


class Gallery(NamedTuple):
    """Detections on the first test scenes."""

    images: list[torch.Tensor]
    truths: list[Target]
    detections: dict[str, list[Target]]  # by the name of the detector

    def counts(self, score: float) -> dict[str, tuple[int, int, int]]:
        """Hits, false alarms and misses of each detector, of boxes that score at least `score`."""
        counts = {}
        for name, detections in self.detections.items():
            pairs = zip(detections, self.truths, strict=True)
            errors = [count_hits(*pair, score) for pair in pairs]
            kinds = ("hits", "false_alarms", "misses")
            hits, false_alarms, misses = (
                sum(len(image[kind]) for image in errors) for kind in kinds
            )
            counts[name] = (hits, false_alarms, misses)
        return counts

    def picture(self, scenes: list[int], score: float, title: str | None = None) -> Picture:
        """Some scenes as rows: supervised, Semi-DETR, truth."""
        images = [self.images[index] for index in scenes]
        truths = [self.truths[index] for index in scenes]
        detections = {
            name: [targets[index] for index in scenes] for name, targets in self.detections.items()
        }
        return show_comparison(images, detections, truths, digits.CATEGORIES, score, title)


def detect_scenes(scenes: int = COUNTED) -> Gallery:
    """Run the shipped weights on the first test scenes.

    Raises UserError where the weights are not there, since an installed package has none.
    """
    missing = [file for file in WEIGHTS.values() if not (CHECKPOINTS / file).is_file()]
    if missing:
        advice = "run it in a clone of the repository, which holds them in notebooks/checkpoints"
        raise UserError(f"gallery: the shipped weights {missing[0]} are not here; {advice}")
    test = digits.load(percent=10, fold=1).test
    count = min(scenes, len(test))
    images, truths = zip(*(test[index] for index in range(count)), strict=True)
    detections = {
        name: load_detector(CHECKPOINTS / file).detect(images) for name, file in WEIGHTS.items()
    }
    return Gallery(list(images), list(truths), detections)


def write_gallery(out: Path, scenes: int = 6, score: float = 0.3) -> tuple[Path, Gallery]:
    """Write `out`/gallery.png: the first test scenes with an object as rows.

    Args:
        out: a folder.
        scenes: number of rows.
        score: the lowest score of a box that is drawn and counted.

    Returns:
        The path of the picture, and the detections.

    Raises UserError where the weights are not there.
    """
    gallery = detect_scenes()
    with_object = [index for index, truth in enumerate(gallery.truths) if len(truth["boxes"])]
    path = Path(out) / "gallery.png"
    write_atomic(path, png(gallery.picture(with_object[:scenes], score), PNG_DPI))
    return path, gallery
