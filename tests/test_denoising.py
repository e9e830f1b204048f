"""Denoising: who sees whom by brute force, noise within its bounds, targets that fit their queries."""

import numpy as np
import pytest
import torch

from semidetr_lite.detectors.denoising import Denoising, group_mask, noise_boxes

# Masks


@pytest.mark.parametrize(
    ("sizes", "queries"),
    [([2, 2, 2], 4), ([3], 1), ([], 5), ([1, 4, 2, 2], 3), ([0, 2], 2), ([2], 0)],
)
def test_groups_see_themselves_and_the_matching_queries_which_see_only_themselves(sizes, queries):
    owner = [group for group, size in enumerate(sizes) for _ in range(size)] + [
        "matching"
    ] * queries
    blocked = group_mask(sizes, queries)
    assert blocked.shape == (len(owner), len(owner)) and blocked.dtype == torch.bool
    for row, own in enumerate(owner):
        for column, seen in enumerate(owner):
            assert blocked[row, column] == (seen not in (own, "matching"))


# Noise


def some_boxes(*lead: int) -> torch.Tensor:
    """cxcywh far enough from the border that no noise is cut off."""
    return torch.cat([torch.rand(*lead, 2) * 0.2 + 0.4, torch.rand(*lead, 2) * 0.2 + 0.1], -1)


def corner_shifts(noised: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """How far the four coordinates of the corners moved, in half sides."""
    half = boxes[..., 2:] / 2
    corners = [
        torch.cat([b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2], -1)
        for b in (noised, boxes)
    ]
    return (corners[0] - corners[1]) / torch.cat([half, half], -1)


@pytest.mark.parametrize("amount", [0.4, 0.2])
def test_positive_corners_move_less_than_the_amount_and_negative_ones_up_to_twice_as_far(amount):
    boxes, noise = some_boxes(4000), torch.rand(4000, 8)
    near = corner_shifts(
        noise_boxes(boxes, torch.zeros(4000, dtype=torch.bool), amount, noise), boxes
    )
    far = corner_shifts(
        noise_boxes(boxes, torch.ones(4000, dtype=torch.bool), amount, noise), boxes
    )
    assert near.abs().max() <= amount + 1e-4
    assert amount - 1e-4 <= far.abs().min() and far.abs().max() <= 2 * amount + 1e-4
    for shifts in (near, far):
        assert (shifts.mean(0).abs() < 0.05).all()  # both directions alike
    assert torch.allclose(near.abs().mean(0), torch.full((4,), amount / 2), atol=0.02)
    assert torch.allclose(far.abs().mean(0), torch.full((4,), amount * 1.5), atol=0.02)
    assert (near.T.corrcoef() - torch.eye(4)).abs().max() < 0.1  # each coordinate for itself


def test_noise_stays_in_the_image():
    boxes, negative = torch.rand(500, 4).clamp(0.01, 0.99), torch.rand(500) < 0.5
    noised = noise_boxes(boxes, negative, 0.4, torch.rand(500, 8))
    first, last = noised[:, :2] - noised[:, 2:] / 2, noised[:, :2] + noised[:, 2:] / 2
    assert first.min() >= -1e-6 and last.max() <= 1 + 1e-6 and (noised[:, 2:] >= 0).all()


def test_without_noise_a_box_stays():
    boxes = some_boxes(3)
    assert torch.allclose(
        noise_boxes(boxes, torch.zeros(3, dtype=torch.bool), 0.4, torch.zeros(3, 8)), boxes
    )


# Queries


CLASSES = 6


def numbered(**arguments) -> Denoising:
    """Label embeddings that can be read: label i is the vector (i, i, ...)."""
    denoising = Denoising(CLASSES, dim=4, **arguments)
    denoising.labels.weight.data = torch.arange(CLASSES + 1.0)[:, None].repeat(1, 4)
    return denoising


def some_targets(*counts: int):
    max_targets = max(counts)
    valid = torch.arange(max_targets) < torch.tensor(counts)[:, None]
    labels = torch.where(valid, torch.randint(0, CLASSES, valid.shape), 0)
    return torch.where(valid[..., None], some_boxes(*valid.shape), 0.0), labels, valid


def rngs(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, image]) for image in range(count)]


def test_layout_of_denoising_queries_and_targets():
    boxes, labels, valid = some_targets(3, 1, 0)
    group, targets = numbered(queries=7, label_noise=0.0)(boxes, labels, valid, rngs(3))
    assert group.copies == 2  # 7 // 3
    assert group.content.shape == (3, 12, 4) and group.boxes.shape == (3, 12, 4)
    # copies, positive before negative, targets
    assert targets.assigned[0].tolist() == [0, 1, 2, -1, -1, -1] * 2
    assert targets.assigned[1].tolist() == [0, -1, -1, -1, -1, -1] * 2
    assert targets.assigned[2].tolist() == [-1] * 12
    assert (
        targets.valid[0].all()
        and targets.valid[1].tolist() == [True, False, False] * 4
        and not targets.valid[2].any()
    )
    assert torch.equal(group.valid, targets.valid)
    shown = group.content[..., 0]
    assert shown[0].tolist() == labels[0].tolist() * 4
    assert (
        shown[1].tolist() == [labels[1, 0].item(), CLASSES, CLASSES] * 4
    )  # the last row is that of the padding
    assert torch.equal(shown, group.content[..., 3])


def test_denoising_queries_lie_near_their_targets():
    boxes, labels, valid = some_targets(3, 2)
    group, targets = numbered(queries=60)(boxes, labels, valid, rngs(2))
    for image in range(2):
        shifts = corner_shifts(group.boxes[image], boxes[image].repeat(2 * group.copies, 1)).abs()
        positive = targets.assigned[image] >= 0
        negative = targets.valid[image] & ~positive
        assert shifts[positive].max() <= 0.4 + 1e-4 and shifts[negative].min() >= 0.4 - 1e-4
        assert positive.sum() == negative.sum() == group.copies * int(valid[image].sum())


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_labels_are_drawn_anew_at_about_the_rate(rate):
    boxes, labels, valid = some_targets(5, 5)
    group, targets = numbered(queries=3000, label_noise=rate)(boxes, labels, valid, rngs(2))
    shown, true = group.content[..., 0], labels.repeat(1, 2 * group.copies)
    assert shown.max() < CLASSES and shown.min() >= 0
    changed = (shown != true).float()
    for part in (changed[targets.assigned >= 0], changed[targets.assigned < 0]):
        assert part.mean().item() == pytest.approx(
            rate * (CLASSES - 1) / CLASSES, abs=0.02
        )  # one in C falls on itself
    wrong = shown[(shown != true) & (true == true[0, 0])].long().bincount(minlength=CLASSES).float()
    others = wrong[torch.arange(CLASSES) != int(true[0, 0])]
    assert (others / others.sum() - 1 / (CLASSES - 1)).abs().max() < 0.06  # all wrong labels alike


def test_a_random_label_says_nothing_about_the_shift_of_the_box():
    boxes, labels, valid = some_targets(5, 5)
    group, targets = numbered(queries=3000, label_noise=0.5)(boxes, labels, valid, rngs(2))
    times = 2 * group.copies
    changed = group.content[..., 0] != labels.repeat(1, times)
    shifts = corner_shifts(group.boxes, boxes.repeat(1, times, 1))
    positive = targets.assigned >= 0
    for shift in (shifts, shifts.abs()):
        means = [shift[positive & mask].mean(0) for mask in (changed, ~changed)]
        assert (means[0] - means[1]).abs().max() < 0.05


def test_number_of_copies():
    for most, copies in ((1, 10), (3, 3), (10, 1), (25, 1)):
        group, _ = numbered(queries=10)(*some_targets(most), rngs(1))
        assert group.copies == copies and group.content.shape[1] == 2 * copies * most


def test_no_box_no_query():
    empty = (
        torch.zeros(2, 0, 4),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(2, 0, dtype=torch.bool),
    )
    assert numbered()(*empty, rngs(2)) is None


def test_the_same_generators_give_the_same_queries():
    targets = some_targets(3, 2)
    denoising = Denoising(CLASSES, dim=4, queries=12)
    first, again, other = (denoising(*targets, rngs(2, seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first.boxes, again.boxes) and torch.equal(first.content, again.content)
    assert not torch.equal(first.boxes, other.boxes)
    # an image keeps its queries whatever lies beside it
    boxes, labels, valid = (entry.clone() for entry in targets)
    boxes[1, :2], labels[1] = some_boxes(2), 0
    beside, _ = denoising(boxes, labels, valid, rngs(2, 1))
    assert torch.equal(first.boxes[0], beside.boxes[0]) and torch.equal(
        first.content[0], beside.content[0]
    )


def test_of_too_many_targets_some_are_drawn():
    """Each drawn query still knows its own target; images of few targets keep all of theirs."""
    denoising = Denoising(CLASSES, 4, queries=12, label_noise=0.0, box_noise=0.0, max_targets=6)
    boxes = torch.rand(2, 40, 4) * 0.2 + 0.3
    labels = torch.randint(CLASSES, (2, 40))
    valid = torch.stack([torch.arange(40) < 40, torch.arange(40) < 3])
    group, targets = denoising(boxes, labels, valid, [np.random.default_rng(i) for i in (0, 1)])
    assert group.boxes.shape == (2, denoising.num_copies(40) * 2 * 6, 4) == (2, 24, 4)
    for image in range(2):
        positive = targets.assigned[image] >= 0
        found = targets.assigned[image][positive]
        assert torch.allclose(group.boxes[image][positive], boxes[image][found])
        content = denoising.labels(labels[image][found])
        assert torch.equal(group.content[image][positive], content)
    assert len(set(targets.assigned[0].tolist()) - {-1}) == 6
    assert sorted(set(targets.assigned[1].tolist()) - {-1}) == [0, 1, 2]
    again, _ = denoising(boxes, labels, valid, [np.random.default_rng(i) for i in (0, 1)])
    assert torch.equal(again.boxes, group.boxes)
    other, _ = denoising(boxes, labels, valid, [np.random.default_rng(i) for i in (2, 3)])
    assert not torch.equal(other.boxes[0], group.boxes[0])


def test_label_embeddings_are_trained():
    denoising = Denoising(CLASSES, dim=4, label_noise=0.0)
    boxes, labels, valid = some_targets(2, 1)
    denoising(boxes, labels, valid, rngs(2))[0].content.sum().backward()
    used = set(labels[valid].tolist()) | {CLASSES}
    assert {
        row for row in range(CLASSES + 1) if denoising.labels.weight.grad[row].abs().sum() > 0
    } == used
