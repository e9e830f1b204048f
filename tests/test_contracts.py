"""The dicts that parts hand to each other hold what semidetr_lite/contracts.py says, no more."""

import pytest
import torch

from semidetr_lite.contracts import Batch, Outputs, Target
from semidetr_lite.data import digits
from semidetr_lite.data.batches import Batches
from semidetr_lite.data.splits import Concat, Subset
from semidetr_lite.detectors.transformer import QueryGroup, stack_layers
from semidetr_lite.evaluate import evaluate
from semidetr_lite.matching import match_layers, pad_targets
from semidetr_lite.training.presets import make_detector
from semidetr_lite.training.settings import PRESETS, TINY_DETECTORS

SPLITS = digits.load(10, 1)
QUERY_DETECTORS = ("dino", "deformable-detr", "detr")


def detector(name: str):
    torch.manual_seed(0)
    return make_detector(name, 10, TINY_DETECTORS[name]).eval()


def unknown_keys(value: dict, contract: type) -> set[str]:
    return set(value) - set(contract.__annotations__)


def test_batches_hold_views_of_targets():
    batch = Batches(SPLITS, 2, 2, PRESETS["digits"].views, seed=0)[0]
    assert set(batch) == set(Batch.__annotations__)
    for images, targets in batch.values():
        assert len(images) == len(targets) == 2
        for target in targets:
            assert unknown_keys(target, Target) == set()
            assert unknown_keys(target.get("truth", {}), Target) == set()


@pytest.mark.parametrize("name", QUERY_DETECTORS)
def test_outputs_hold_the_same_at_every_depth(name):
    model = detector(name)
    groups = ()
    if model.takes_groups:
        valid = torch.ones(1, 4, dtype=torch.bool)
        groups = (QueryGroup(torch.zeros(1, 4, model.dim), torch.full((1, 4, 4), 0.5), 2, valid),)
    outputs = model([SPLITS.test[0][0]], groups)
    assert len(outputs["groups"]) == len(groups)
    for part in (outputs, *outputs["groups"], outputs.get("encoder", {})):
        assert unknown_keys(part, Outputs) == set()
        for layer in part.get("aux_outputs", ()):
            assert set(layer) == {"pred_logits", "pred_boxes", "queries"}


@pytest.mark.parametrize("name", TINY_DETECTORS)
def test_a_detection_is_a_target(name):
    (detection,) = detector(name).detect([SPLITS.test[0][0]])
    assert set(detection) == {"boxes", "labels", "scores", "size"}
    assert unknown_keys(detection, Target) == set()
    assert detection["size"] == SPLITS.test.sizes[0]


def test_one_data_set_after_the_other():
    first, second = Subset(SPLITS.test, [4, 2]), Subset(SPLITS.test, [7])
    both = Concat([first, second])
    assert len(both) == 3
    assert both.sizes == [SPLITS.test.sizes[index] for index in (4, 2, 7)]
    assert [both[index][1]["image_id"] for index in range(3)] == [
        SPLITS.test[index][1]["image_id"] for index in (4, 2, 7)
    ]
    assert both[-1][1]["image_id"] == SPLITS.test[7][1]["image_id"]
    with pytest.raises(IndexError):
        both[3]


def test_half_an_argument_is_refused(tmp_path):
    target = SPLITS.test[0][1]
    with pytest.raises(ValueError, match="not one of each"):
        evaluate([target], tmp_path / "truth.json")
    model = detector("dino")
    layers = stack_layers(model([SPLITS.test[0][0]]))
    with pytest.raises(ValueError, match="costs"):
        match_layers(layers, pad_targets([target]), "one_to_one")
