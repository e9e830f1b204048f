"""A look without training: what shipped weights find on scenes of the embedded test split.

Supervised training and Semi-DETR had the same 200 labelled scenes and the same training time. The weights lie in
notebooks/checkpoints of the repository; checkpoints/recorded.json there says how each was made.
"""

from pathlib import Path
from typing import NamedTuple

from semidetr_lite.data import digits
from semidetr_lite.errors import UserError
from semidetr_lite.files import write_atomic
from semidetr_lite.training.checkpoint import load_detector
from semidetr_lite.visualize import Picture, count_hits, png, show_comparison

CHECKPOINTS = Path(__file__).parents[1] / "notebooks" / "checkpoints"
WEIGHTS = {"supervised": "supervised_same_time.safetensors", "Semi-DETR": "semi_detr.safetensors"}
COUNTED = 100  # test scenes whose hits, false alarms and misses are counted
SHARPNESS = 200  # pixels per inch


class Gallery(NamedTuple):
    """Detections on the first test scenes."""

    images: list
    truths: list[dict]
    detections: dict[str, list[dict]]  # by the name of the detector

    def counts(self, score: float) -> dict[str, tuple[int, int, int]]:
        """Hits, false alarms and misses of each detector, of boxes that score at least `score`."""
        found = {}
        for name, detections in self.detections.items():
            errors = [count_hits(*pair, score) for pair in zip(detections, self.truths, strict=True)]
            kinds = ("hits", "false_alarms", "misses")
            found[name] = tuple(sum(len(one[kind]) for one in errors) for kind in kinds)
        return found

    def picture(self, scenes: list[int], score: float, title: str | None = None) -> Picture:
        """Some scenes as rows: supervised, Semi-DETR, truth."""
        detections = {name: [found[i] for i in scenes] for name, found in self.detections.items()}
        images, truths = ([part[i] for i in scenes] for part in (self.images, self.truths))
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
    images, truths = zip(*(test[index] for index in range(min(scenes, len(test)))), strict=True)
    detections = {name: load_detector(CHECKPOINTS / file).detect(images) for name, file in WEIGHTS.items()}
    return Gallery(list(images), list(truths), detections)


def write_gallery(out: Path, scenes: int = 6, score: float = 0.3) -> tuple[Path, Gallery]:
    """Write `out`/gallery.png: the first test scenes with an object as rows; returns its path and the detections."""
    gallery = detect_scenes()
    shown = [index for index, truth in enumerate(gallery.truths) if len(truth["boxes"])][:scenes]
    picture = Path(out) / "gallery.png"
    write_atomic(picture, png(gallery.picture(shown, score), SHARPNESS))
    return picture, gallery
