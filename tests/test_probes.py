"""Linear probes read a class where there is one, and nothing where there is none."""

from pathlib import Path

import pytest
import torch

from semidetr_lite import load_detector
from semidetr_lite.data import digits
from semidetr_lite.teach.probes import PROBED, probe_classes, read_objects

FILE = Path(__file__).parents[1] / "notebooks" / "checkpoints" / "detr.safetensors"


@pytest.fixture(scope="module")
def detector():
    return load_detector(FILE)


def test_each_stage_has_a_vector_for_each_object(detector):
    image, target = digits.scene(8, "tune")
    vectors = read_objects(detector, image, target)
    count = len(target["labels"])
    channels = [detector.backbone.channels[0], detector.dim, detector.dim]
    assert [tuple(stage.shape) for stage in vectors] == [(count, size) for size in channels]


def test_a_probe_needs_the_class_in_the_features(detector):
    scenes = [digits.scene(index, "train") for index in range(80)]
    training, testing = scenes[:60], scenes[60:]
    accuracies = probe_classes(detector, training, testing)
    assert list(accuracies) == list(PROBED) and accuracies["backbone"] > 0.3
    generator = torch.Generator().manual_seed(0)
    noise = [(torch.rand(image.shape, generator=generator), target) for image, target in scenes]
    blind = probe_classes(detector, noise[:60], noise[60:])
    assert blind["backbone"] < 0.3
