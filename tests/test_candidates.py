"""Which boxes mining chooses from, by the scores that make the bar; and the figures of mined boxes."""

import pytest
import torch
from test_methods import make, some_batch, some_pseudo

from semidetr_lite.detectors.detector import class_scores
from semidetr_lite.errors import UserError
from semidetr_lite.methods.cost_mining import above_mean_plus_std, mining_candidates
from semidetr_lite.methods.mean_teacher import PseudoBoxes, select_pseudo_boxes
from semidetr_lite.training import measure
from semidetr_lite.training.presets import PRESETS, make_method
from semidetr_lite.training.settings import change


def few_confident_boxes() -> tuple[torch.Tensor, torch.Tensor]:
    """Ten boxes of a small detector, and the scores of the 300 pairs that they come from."""
    scores = torch.tensor([[0.9, 0.85, 0.8, 0.3, 0.25, 0.2, 0.15, 0.05, 0.02, 0.01]])
    pair_scores = torch.cat([scores, torch.full((1, 290), 0.004)], 1)
    return scores, pair_scores


def test_over_all_pairs_the_bar_is_low_enough_for_unsure_boxes():
    scores, pair_scores = few_confident_boxes()
    valid = torch.ones_like(scores, dtype=torch.bool)
    of_boxes = mining_candidates(scores, valid, "gmm", 9)
    of_pairs = mining_candidates(scores, valid, "gmm", 9, pair_scores)
    assert of_boxes.sum() == 3 and of_pairs.sum() == 7
    bar = pair_scores.mean() + pair_scores.std()
    assert of_pairs.tolist() == (scores >= bar).tolist()


@pytest.mark.parametrize("rule", ["gmm", "mean_std"])
def test_without_pairs_the_bar_is_the_released_one(rule):
    pseudo = some_pseudo(3, 9)
    found = mining_candidates(pseudo.scores, pseudo.valid, rule, 4)
    assert torch.equal(found, above_mean_plus_std(pseudo.scores, pseudo.valid))


def test_padding_is_no_candidate_and_other_rules_have_no_bar():
    scores, pair_scores = few_confident_boxes()
    valid = torch.tensor([[True, False] * 5])
    assert not (mining_candidates(scores, valid, "gmm", 9, pair_scores) & ~valid).any()
    assert mining_candidates(scores, valid, "none", 9, pair_scores).sum() == 0
    assert mining_candidates(scores, valid, "top_k", 4, pair_scores).tolist() == [
        [True, False, True] + [False] * 7
    ]


def test_one_box_alone_can_be_a_candidate_over_pairs():
    scores, pair_scores = torch.tensor([[0.5]]), torch.tensor([[0.5] + [0.01] * 99])
    valid = torch.ones(1, 1, dtype=torch.bool)
    assert mining_candidates(scores, valid, "gmm", 9, pair_scores).all()
    assert not mining_candidates(scores, valid, "gmm", 9).any()


def test_pseudo_boxes_know_the_scores_of_all_pairs():
    outputs = {"pred_logits": torch.randn(2, 5, 3), "pred_boxes": torch.rand(2, 5, 4)}
    pseudo = select_pseudo_boxes(outputs, torch.tensor([[64, 64]] * 2), 4, 0.6)
    assert torch.equal(pseudo.pair_scores, class_scores(outputs).flatten(1))


def test_the_setting_decides_what_a_step_mines_from():
    found = {}
    for candidate_scores in ("boxes", "pairs"):
        method, step = make("stage one", candidate_scores=candidate_scores, score_threshold=0.99)
        (labels,) = (method.prepare([some_batch()], step)[0].pseudo_labels,)
        bar = labels.weak.scores if candidate_scores == "boxes" else labels.weak.pair_scores
        if candidate_scores == "pairs":
            expected = labels.weak.scores >= (bar.mean(1) + bar.std(1))[:, None]
            assert torch.equal(
                labels.candidates, expected & labels.weak.valid & labels.strong.valid
            )
        found[candidate_scores] = labels.candidates
    assert not torch.equal(found["boxes"], found["pairs"])


def test_the_setting_reaches_the_method_and_coco_keeps_the_released_bar():
    method, _ = make("stage one")
    for preset, recipe in PRESETS.items():
        if preset.startswith(("coco", "voc")):
            assert recipe.semi_detr.candidate_scores == "boxes"
    recipe = change(PRESETS["digits"], candidate_scores="pairs")
    made = make_method("semi-detr", method.student, recipe, 10, 0, 0)
    assert made.candidate_scores == "pairs"
    with pytest.raises(UserError, match="no candidate_scores called 'best': choose from boxes"):
        make("stage one", candidate_scores="best")


# ---- figures of mined boxes ----------------------------------------------------------------------

OBJECTS = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])


def scene() -> tuple[torch.Tensor, dict]:
    truth = {"boxes": OBJECTS, "labels": torch.zeros(4, dtype=torch.int64), "size": (64, 96)}
    return torch.zeros(3, 64, 96), {"image_id": 0, "size": (64, 96), "truth": truth}


def boxes_and_mined(monkeypatch, boxes: torch.Tensor, scores: list[float], mined: list[bool]):
    """The teacher finds these boxes, and mining takes those of `mined`."""
    valid = torch.ones(1, len(boxes), dtype=torch.bool)
    labels = torch.zeros(1, len(boxes), dtype=torch.int64)
    pseudo = PseudoBoxes(boxes[None], torch.tensor([scores]), labels, valid)
    monkeypatch.setattr(measure, "plain_pseudo_boxes", lambda *_: pseudo)
    monkeypatch.setattr(measure, "mined_of_image", lambda *_: torch.tensor(mined))


def test_mined_figures_are_of_boxes_that_are_not_confident(monkeypatch):
    wrong = torch.tensor([[0.0, 40, 10, 50]])
    boxes = torch.cat([OBJECTS[:3], wrong, OBJECTS[:1]])
    # confident and mined; unsure and mined; unsure; wrong and mined; a second box on the first
    scores, mined = [0.9, 0.3, 0.3, 0.2, 0.2], [True, True, False, True, True]
    boxes_and_mined(monkeypatch, boxes, scores, mined)
    figures = measure.pseudo_quality(make("stage one")[0], [scene()])
    assert (figures["pseudo_precision"], figures["pseudo_recall"]) == (1.0, 0.25)
    assert figures["mined_boxes"] == 3
    assert figures["mined_precision"] == pytest.approx(2 / 3, abs=1e-4)
    assert figures["mined_recall"] == pytest.approx(1 / 3, abs=1e-4)  # one of three without a box


def test_a_mined_box_of_the_wrong_class_still_has_its_place(monkeypatch):
    boxes_and_mined(monkeypatch, OBJECTS[:2], [0.9, 0.3], [False, True])
    image, target = scene()
    target["truth"]["labels"] = torch.tensor([0, 1, 0, 0])
    figures = measure.pseudo_quality(make("stage one")[0], [(image, target)])
    assert (figures["mined_precision"], figures["mined_recall"]) == (0, 0)
    assert figures["mined_precision_any_class"] == 1
    assert figures["mined_recall_any_class"] == pytest.approx(1 / 3, abs=1e-4)


def test_nothing_mined_is_zero_and_methods_without_mining_have_no_such_figures(monkeypatch):
    boxes_and_mined(monkeypatch, OBJECTS[:1], [0.9], [False])
    figures = measure.pseudo_quality(make("stage one")[0], [scene()])
    assert [figures[f"mined_{name}"] for name in ("boxes", "precision", "recall")] == [0, 0, 0]
    for method in (make("mean teacher")[0], make("stage one", mining="none")[0]):
        assert not any(key.startswith("mined") for key in measure.pseudo_quality(method, [scene()]))


def test_figures_of_a_real_step_use_what_training_mined():
    method, step = make("stage one", candidate_scores="pairs", score_threshold=0.8)
    batch = some_batch()
    method(batch, step)
    images, targets = batch["strong"]
    scenes = [
        (image, {**target, "matrix": torch.eye(3)})
        for image, target in zip(images, targets, strict=True)
    ]
    figures = measure.pseudo_quality(method, scenes)
    assert figures["mined_boxes"] > 0
