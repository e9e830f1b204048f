"""Costs by loops, one-to-one against all permutations, one-to-many against a double loop over the
rules.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

from semidetr_lite.boxes import to_model, to_pixels
from semidetr_lite.matching import (
    assign_one_to_many,
    assign_one_to_one,
    batched_cost,
    hungarian,
    matching_cost,
    one_to_many,
    one_to_one,
    pad_targets,
)

SIZE = (60, 90)


def some_target(count: int, classes: int = 4, size=SIZE) -> dict:
    centres, sides = torch.rand(count, 2) * 0.6 + 0.2, torch.rand(count, 2) * 0.35 + 0.05
    boxes = to_pixels(torch.cat([centres, sides], 1), size)
    return {"boxes": boxes, "labels": torch.randint(0, classes, (count,)), "size": size}


def some_predictions(queries: int, target: dict, classes: int = 4, lead=(), noise: float = 0.06):
    """Logits, and boxes that lie near the targets, so that overlaps are neither all zero nor all
    alike.
    """
    logits = torch.randn(*lead, queries, classes) * 2
    boxes = torch.rand(*lead, queries, 4) * 0.4 + 0.2
    if len(target["boxes"]):
        near = to_model(target["boxes"], target["size"])
        boxes = near[torch.randint(0, len(near), (*lead, queries))] + noise * torch.randn(
            *lead, queries, 4
        )
    return logits, boxes.clamp(0.02, 0.98)


# Cost


def cost_by_loop(logits, pred_boxes, target, kind: str) -> list[list[float]]:
    height, width = target["size"]
    pixels = to_pixels(pred_boxes, target["size"])
    normal = torch.tensor([width, height, width, height])
    giou = generalized_box_iou(pixels / normal, target["boxes"] / normal)
    rows = []
    for q in range(len(logits)):
        row = []
        for t in range(len(target["labels"])):
            label = int(target["labels"][t])
            if kind == "softmax":
                price = -math.exp(logits[q, label]) / sum(math.exp(logit) for logit in logits[q])
            else:
                p = 1 / (1 + math.exp(-logits[q, label]))
                price = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
            x1, y1, x2, y2 = target["boxes"][t].tolist()
            truth = [
                (x1 + x2) / 2 / width,
                (y1 + y2) / 2 / height,
                (x2 - x1) / width,
                (y2 - y1) / height,
            ]
            l1 = sum(abs(float(a) - b) for a, b in zip(pred_boxes[q], truth))
            row.append(2 * price + 5 * l1 - 2 * float(giou[q, t]))
        rows.append(row)
    return rows


def test_an_unknown_class_cost_is_refused():
    target = {"boxes": torch.tensor([[1.0, 1, 5, 5]]), "labels": torch.tensor([0]), "size": (8, 8)}
    with pytest.raises(ValueError, match="class_cost must be 'focal' or 'softmax', got 'sofmax'"):
        matching_cost(torch.zeros(3, 2), torch.rand(3, 4), target, class_cost="sofmax")


@pytest.mark.parametrize("kind", ["focal", "softmax"])
def test_matching_cost_equals_its_closed_form(kind):
    target = some_target(3)
    logits, boxes = some_predictions(6, target)
    cost = matching_cost(logits, boxes, target, class_cost=kind)
    assert cost.shape == (6, 3)
    assert torch.allclose(cost, torch.tensor(cost_by_loop(logits, boxes, target, kind)), atol=1e-4)


def test_matching_cost_takes_its_weights():
    target = some_target(2)
    logits, boxes = some_predictions(5, target)
    parts = [
        matching_cost(logits, boxes, target, "focal", *weights)
        for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert torch.allclose(
        matching_cost(logits, boxes, target), 2 * parts[0] + 5 * parts[1] + 2 * parts[2], atol=1e-5
    )


def test_cost_of_a_perfect_and_sure_query_is_lowest():
    target = some_target(1)
    sure = torch.full((1, 4), -10.0)
    sure[0, target["labels"][0]] = 10.0
    cost = matching_cost(sure, to_model(target["boxes"], SIZE), target)
    # class: -0.75 * -log(1 - p) at p = sigmoid(10) is about -7.5; L1 is 0, GIoU is 1
    assert cost.item() == pytest.approx(2 * -0.75 * 10 - 2, abs=0.01)


def test_cost_is_finite_at_extreme_logits():
    target = some_target(2)
    boxes = to_model(target["boxes"], SIZE)
    for logit in (-200.0, 200.0):
        assert matching_cost(torch.full((2, 4), logit), boxes, target).isfinite().all()


# One-to-one


@pytest.mark.parametrize(("queries", "count"), [(5, 3), (4, 4), (3, 5), (6, 1), (1, 3)])
def test_one_to_one_equals_the_best_of_all_permutations(queries, count):
    for _ in range(5):
        target = some_target(count)
        logits, boxes = some_predictions(queries, target)
        cost = matching_cost(logits, boxes, target)
        pairs = min(queries, count)
        best = math.inf
        for chosen in itertools.combinations(range(queries), pairs):
            for order in itertools.permutations(range(count), pairs):
                best = min(best, sum(float(cost[q, t]) for q, t in zip(chosen, order)))
        match = one_to_one(logits, boxes, target)
        assert float(cost[match.queries, match.targets].sum()) == pytest.approx(best, abs=1e-4)
        assert (
            len(match.queries)
            == len(set(match.queries.tolist()))
            == len(set(match.targets.tolist()))
            == pairs
        )
        assert match.queries.tolist() == sorted(match.queries.tolist())
        assert match.quality.tolist() == [1.0] * pairs


def test_one_to_one_without_targets():
    target = some_target(0)
    match = one_to_one(*some_predictions(5, target), target)
    assert [entry.shape for entry in match] == [(0,)] * 3 and match.queries.dtype == torch.int64


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_avoided(bad):
    cost = np.array([[bad, 1.0], [5.0, bad], [900.0, 2.0]])
    assert [index.tolist() for index in hungarian(cost)] == [[0, 1], [1, 0]]
    assert len(hungarian(np.full((2, 2), bad))[0]) == 2


def test_assign_one_to_one_of_a_batch_equals_image_by_image():
    costs = np.random.default_rng(0).normal(size=(2, 3, 6, 4))  # layers, images, queries, targets
    valid = np.array([[True, True, False, False], [False] * 4, [True, False, True, True]])
    assigned = assign_one_to_one(costs, valid)
    assert assigned.shape == (2, 3, 6)
    for layer in range(2):
        for image in range(3):
            columns = np.flatnonzero(valid[image])
            queries, targets = hungarian(costs[layer, image][:, columns])
            expected = np.full(6, -1)
            expected[queries] = columns[targets]
            assert assigned[layer, image].tolist() == expected.tolist()
    assert (assigned[:, 1] == -1).all() and (assigned[:, 0] < 2).all()


# One-to-many


def one_to_many_by_loop(
    scores, iou, labels, candidates: int, alpha: float = 1.0, beta: float = 6.0
):
    """The rules one by one. scores[q][c], iou[q][t], labels[t] -> (target or -1, quality) of every
    query.
    """
    queries, count = len(scores), len(labels)
    m = [
        [scores[q][labels[t]] ** alpha * iou[q][t] ** beta for t in range(count)]
        for q in range(queries)
    ]
    wanted_by: list[list[int]] = [[] for _ in range(queries)]
    for t in range(count):
        by_quality = sorted(range(queries), key=lambda q: -m[q][t])
        for q in by_quality[: min(candidates, queries)]:
            if m[q][t] > 0:
                wanted_by[q].append(t)
    owner = []
    for q in range(queries):
        best = -1
        for t in wanted_by[q]:
            if best == -1 or iou[q][t] > iou[q][best]:
                best = t  # the first of equals stays
        owner.append(best)
    quality = [0.0] * queries
    for t in range(count):
        owned = [q for q in range(queries) if owner[q] == t]
        if owned:
            top_m, top_iou = max(m[q][t] for q in owned), max(iou[q][t] for q in owned)
            for q in owned:
                quality[q] = m[q][t] / (top_m + 1e-7) * top_iou
    return owner, quality


def loop_on(logits, boxes, target, candidates: int, **exponents):
    iou = box_iou(to_pixels(boxes, target["size"]).double(), target["boxes"].double())
    scores = logits.double().sigmoid()
    return one_to_many_by_loop(
        scores.tolist(), iou.tolist(), target["labels"].tolist(), candidates, **exponents
    )


def check_one_to_many(match, owner, quality):
    assert match.queries.tolist() == [q for q, t in enumerate(owner) if t >= 0]
    assert match.targets.tolist() == [t for t in owner if t >= 0]
    expected = torch.tensor([quality[q] for q, t in enumerate(owner) if t >= 0])
    assert torch.allclose(match.quality.float(), expected.float(), atol=2e-4)


@pytest.mark.parametrize(
    ("queries", "count", "candidates"), [(20, 3, 4), (30, 6, 13), (5, 3, 13), (3, 5, 2), (40, 1, 7)]
)
def test_one_to_many_equals_a_double_loop(queries, count, candidates):
    conflicts = 0
    for _ in range(6):
        target = some_target(count)
        logits, boxes = some_predictions(queries, target)
        match = one_to_many(logits, boxes, target, candidates=candidates)
        check_one_to_many(match, *loop_on(logits, boxes, target, candidates))
        conflicts += count * min(candidates, queries) > len(match.queries)
    assert conflicts or count == 1


def test_one_to_many_takes_its_exponents():
    target = some_target(3)
    logits, boxes = some_predictions(20, target)
    for alpha, beta in ((0.5, 2.0), (2.0, 1.0)):
        match = one_to_many(logits, boxes, target, alpha, beta, candidates=5)
        check_one_to_many(match, *loop_on(logits, boxes, target, 5, alpha=alpha, beta=beta))


def test_a_query_wanted_twice_goes_to_the_higher_overlap_not_to_the_higher_quality():
    """Both targets want the one query. It scores far better for the class of target 0, but overlaps
    target 1 more.
    """
    target = {
        "boxes": torch.tensor([[10.0, 10, 30, 30], [12, 10, 32, 30]]),
        "labels": torch.tensor([0, 1]),
        "size": SIZE,
    }
    query = to_model(torch.tensor([[11.5, 10.0, 31.5, 30]]), SIZE)
    match = one_to_many(torch.tensor([[5.0, -5.0]]), query, target)
    assert match.targets.tolist() == [1]
    assert match.quality.item() == pytest.approx(
        39 / 41, abs=1e-3
    )  # the best query of a target gets the best IoU of its queries


def test_equal_overlaps_go_to_the_lower_target_index():
    box = [10.0, 10, 30, 30]
    target = {
        "boxes": torch.tensor([[50.0, 10, 60, 20], box, box]),
        "labels": torch.tensor([0, 1, 0]),
        "size": SIZE,
    }
    query = to_model(torch.tensor([box, box]), SIZE)
    assert one_to_many(torch.zeros(2, 2), query, target).targets.tolist() == [1, 1]


def test_only_overlapping_queries_are_taken():
    target = {
        "boxes": torch.tensor([[10.0, 10, 30, 30]]),
        "labels": torch.tensor([0]),
        "size": SIZE,
    }
    query = to_model(torch.tensor([[50.0, 40, 60, 50], [12, 12, 28, 30], [30, 10, 40, 30]]), SIZE)
    match = one_to_many(torch.zeros(3, 1), query, target, candidates=13)
    assert match.queries.tolist() == [1]
    far = {**target, "boxes": torch.tensor([[70.0, 5, 80, 8]])}
    assert len(one_to_many(torch.zeros(3, 1), query, far).queries) == 0  # a target may get nothing


def test_one_to_many_without_targets():
    target = some_target(0)
    match = one_to_many(*some_predictions(5, target), target)
    assert [entry.shape for entry in match] == [(0,)] * 3


def test_one_to_many_lets_no_gradient_through():
    target = some_target(2)
    logits, boxes = some_predictions(6, target)
    assert not one_to_many(
        logits.requires_grad_(), boxes.requires_grad_(), target
    ).quality.requires_grad


# Batches


def some_batch(counts, queries: int = 12, layers: int = 2):
    targets = [
        some_target(count, size=size)
        for count, size in zip(counts, [(60, 90), (90, 60), (70, 70), (64, 32)])
    ]
    pairs = [some_predictions(queries, target, lead=(layers,)) for target in targets]
    return torch.stack([p[0] for p in pairs], 1), torch.stack([p[1] for p in pairs], 1), targets


def test_batched_cost_equals_image_by_image():
    logits, boxes, targets = some_batch([3, 0, 5, 1])
    padded = pad_targets(targets)
    for kind in ("focal", "softmax"):
        cost = batched_cost(logits, boxes, padded.boxes, padded.labels, kind)
        assert cost.shape == (2, 4, 12, 5)
        for layer in range(2):
            for image, target in enumerate(targets):
                alone = matching_cost(logits[layer, image], boxes[layer, image], target, kind)
                assert torch.allclose(cost[layer, image][:, : alone.shape[1]], alone, atol=1e-4)


@pytest.mark.parametrize("candidates", [4, 13])
def test_batched_one_to_many_equals_image_by_image(candidates):
    logits, boxes, targets = some_batch([3, 0, 5, 1])
    assigned, quality = assign_one_to_many(
        logits, boxes, pad_targets(targets), candidates=candidates
    )
    assert assigned.shape == quality.shape == (2, 4, 12)
    for layer in range(2):
        for image, target in enumerate(targets):
            match = one_to_many(
                logits[layer, image], boxes[layer, image], target, candidates=candidates
            )
            expected = torch.full((12,), -1)
            expected[match.queries] = match.targets
            assert torch.equal(assigned[layer, image], expected)
            assert torch.allclose(quality[layer, image][match.queries], match.quality, atol=1e-5)
            assert (quality[layer, image][expected < 0] == 0).all()


def test_boxes_that_are_not_valid_are_nobodys_target():
    """Pseudo-boxes under the cut keep their place in the padded targets."""
    logits, boxes, targets = some_batch([5, 4])
    whole = pad_targets(targets)
    valid = torch.tensor([[True, False, True, False, True], [False, True, True, True, False]])
    kept = []
    for target, row in zip(targets, valid):
        row = row[: len(target["labels"])]
        kept.append({**target, "boxes": target["boxes"][row], "labels": target["labels"][row]})
    assigned, quality = assign_one_to_many(logits, boxes, whole._replace(valid=valid), candidates=4)
    places, fewer = assign_one_to_many(logits, boxes, pad_targets(kept), candidates=4)
    columns = valid.long().argsort(descending=True, stable=True)[:, :3].expand(2, -1, -1)
    assert torch.equal(
        assigned, torch.where(places >= 0, columns.gather(-1, places.clamp(min=0)), -1)
    )
    assert torch.allclose(quality, fewer)


def test_batch_without_any_target():
    logits, boxes, targets = some_batch([0, 0, 0])
    padded = pad_targets(targets)
    assert padded.valid.shape == (3, 0)
    assigned, quality = assign_one_to_many(logits, boxes, padded)
    assert (assigned == -1).all() and (quality == 0).all() and assigned.dtype == torch.int64
    costs = batched_cost(logits, boxes, padded.boxes, padded.labels)
    assert costs.shape == (2, 3, 12, 0)
    assert (assign_one_to_one(costs.numpy(), padded.valid.numpy()) == -1).all()


def test_pad_targets_converts_fills_up_and_leaves_crowds_out():
    first = {
        "boxes": torch.tensor([[10.0, 20, 30, 40], [0, 0, 90, 60], [9, 6, 18, 12]]),
        "labels": torch.tensor([2, 1, 3]),
    }
    first |= {"size": (60, 90), "crowd": torch.tensor([False, True, False])}
    second = {
        "boxes": torch.tensor([[10.0, 20, 30, 40]]),
        "labels": torch.tensor([1]),
        "size": (100, 50),
    }
    padded = pad_targets([first, second])
    assert padded.labels.tolist() == [[2, 3], [1, 0]] and padded.valid.tolist() == [
        [True, True],
        [True, False],
    ]
    assert torch.allclose(padded.boxes[0, 1], torch.tensor([13.5 / 90, 9 / 60, 9 / 90, 6 / 60]))
    assert torch.allclose(
        padded.boxes[1], torch.tensor([[20 / 50, 30 / 100, 20 / 50, 20 / 100], [0.0] * 4])
    )
    only_crowd = {**first, "crowd": torch.ones(3, dtype=torch.bool)}
    assert pad_targets([only_crowd]).valid.shape == (1, 0)
    assert pad_targets([]).boxes.shape == (0, 0, 4)
