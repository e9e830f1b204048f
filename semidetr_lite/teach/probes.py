"""Linear probes: after which stage of a DETR can the class of an object be read off?

A linear classifier is trained on the vectors that a stage has for the objects of labelled scenes.
Its accuracy on other scenes says how much of the class the stage still holds.
"""

from collections.abc import Sequence

import torch
from sklearn.linear_model import LogisticRegression
from torchvision.ops import roi_align

from semidetr_lite.boxes import pairwise_overlaps, to_pixels
from semidetr_lite.detectors.detr import DETR

PROBED = ("backbone", "encoder", "decoder")


@torch.no_grad()
def read_objects(detector: DETR, image: torch.Tensor, target: dict) -> list[torch.Tensor]:
    """The vectors (T, D) of the T objects of an image after each stage of PROBED.

    From a map it is the mean inside the object's box; from the decoder the query whose box has the
    highest IoU with the object.
    """
    features = detector.backbone(torch.stack(detector.normalize([image])))[detector.used_maps][0]
    memory = detector.encode([image])
    encoded = memory.tokens.transpose(1, 2).unflatten(2, memory.shapes[0])
    scale = features.shape[-1] / image.shape[-1]
    vectors = [
        roi_align(maps, [target["boxes"]], 1, scale, 2, aligned=True).flatten(1)
        for maps in (features, encoded)
    ]
    outputs = detector.decode(memory)
    boxes = to_pixels(outputs["pred_boxes"][0], target["size"])
    nearest = pairwise_overlaps(target["boxes"], boxes)[0].argmax(1)
    return [*vectors, outputs["queries"][0][nearest]]


def probe_classes(
    detector: DETR, training: Sequence[tuple], testing: Sequence[tuple]
) -> dict[str, float]:
    """The accuracy, in 0..1, of a linear classifier on the vectors of each stage of PROBED.

    Args:
        detector: a DETR.
        training, testing: pairs (image, target), on which the classifiers are trained and measured.
    """
    (vectors, labels), (test_vectors, test_labels) = (
        _read_scenes(detector, scenes) for scenes in (training, testing)
    )
    accuracies = {}
    for name, known, unknown in zip(PROBED, vectors, test_vectors, strict=True):
        mean, deviation = known.mean(0), known.std(0) + 1e-5
        probe = LogisticRegression(C=0.05, max_iter=500).fit((known - mean) / deviation, labels)
        accuracies[name] = float(probe.score((unknown - mean) / deviation, test_labels))
    return accuracies


def _read_scenes(
    detector: DETR, scenes: Sequence[tuple]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The vectors of all objects after each stage, and their labels."""
    with_objects = [scene for scene in scenes if len(scene[1]["labels"])]
    read = [read_objects(detector, *scene) for scene in with_objects]
    vectors = [torch.cat(stage) for stage in zip(*read, strict=True)]
    return vectors, torch.cat([target["labels"] for _, target in with_objects])
