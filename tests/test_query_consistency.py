"""The consistency loss in closed form, and which features a box becomes a query from."""

import math

import pytest
import torch
import torch.nn.functional as F

from semidetr_lite.methods.query_consistency import Projector, consistency_loss


def some_layers(count: int = 3, batch: int = 2, slots: int = 4, dim: int = 6) -> list[torch.Tensor]:
    return [torch.randn(batch, slots, dim) for _ in range(count)]


def test_consistency_loss_equals_two_minus_two_cosines_over_the_channels():
    student, teacher = some_layers(), some_layers()
    valid = torch.tensor([[True, True, False, True], [True, False, False, False]])
    expected = 0.0
    for ours, theirs in zip(student, teacher):
        cosines = [
            F.cosine_similarity(ours[b, n], theirs[b, n], dim=0)
            for b, n in valid.nonzero().tolist()
        ]
        expected += sum((2 - 2 * cosine) / 6 for cosine in cosines) / len(cosines)
    assert consistency_loss(student, teacher, valid).item() == pytest.approx(
        float(expected), rel=1e-4
    )


def test_lengths_do_not_count_and_equal_directions_cost_nothing():
    student, valid = some_layers(), torch.ones(2, 4, dtype=torch.bool)
    longer = [layer * 3 for layer in student]
    assert consistency_loss(student, longer, valid).item() < 1e-10
    opposite = [-layer for layer in student]
    assert consistency_loss(student, opposite, valid).item() == pytest.approx(3 * 4 / 6, rel=1e-4)


def test_slots_that_only_fill_up_have_no_influence():
    student, teacher = some_layers(), some_layers()
    valid = torch.tensor([[True, True, False, False], [True, False, False, False]])
    for layer in student:
        layer.requires_grad_()
    loss = consistency_loss(student, teacher, valid)
    changed = [
        torch.where(valid[..., None], layer, torch.randn_like(layer) * 9) for layer in teacher
    ]
    assert torch.equal(consistency_loss(student, changed, valid), loss)
    shorter = [[layer[:, :2] for layer in layers] for layers in (student, teacher)]
    assert consistency_loss(*shorter, valid[:, :2]).item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    for layer in student:
        assert (layer.grad[~valid] == 0).all() and (layer.grad[valid] != 0).any(-1).all()


def test_no_gradient_reaches_the_teacher():
    student, teacher = [[layer.requires_grad_() for layer in some_layers()] for _ in range(2)]
    consistency_loss(student, teacher, torch.ones(2, 4, dtype=torch.bool)).backward()
    assert all(layer.grad is not None for layer in student) and all(
        layer.grad is None for layer in teacher
    )


def test_no_question_costs_nothing():
    student, teacher = some_layers(), some_layers()
    student[0].requires_grad_()
    loss = consistency_loss(student, teacher, torch.zeros(2, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and (student[0].grad == 0).all()


# Projector


def reader(dim: int = 2) -> Projector:
    """A projector that hands out what it reads."""
    projector = Projector(dim)
    projector.layers = torch.nn.Identity()
    return projector


SHAPES, STRIDES = (
    [(16, 24), (8, 12), (4, 6)],
    [(8.0, 8.0), (16.0, 16.0), (32.0, 32.0)],
)  # of an image of 128 x 192


@pytest.mark.parametrize("strides", [STRIDES, [(4.0, 8.0), (8.0, 16.0), (16.0, 32.0)]])
def test_a_box_reads_its_own_place(strides):
    """On maps that hold the place of each cell in pixels, RoIAlign reads the centres of the 7 x 7
    bins of the box.
    """
    features = []
    for (height, width), (y, x) in zip(SHAPES, strides):
        ys = (torch.arange(height) + 0.5)[:, None].expand(height, width) * y
        xs = (torch.arange(width) + 0.5).expand(height, width) * x
        features.append(torch.stack([xs, ys])[None])
    # inside, so that no sample lies in the outer half of a cell at the border
    boxes = torch.tensor([[40.0, 20, 82, 41], [30, 20, 120, 40], [60, 24, 130, 46]])
    found = reader()(features, strides, torch.zeros(3, dtype=torch.int64), boxes)
    for box, cells in zip(boxes, found):
        x1, y1, x2, y2 = box.tolist()
        for row in range(7):
            for column in range(7):
                assert cells[0, row, column].item() == pytest.approx(
                    x1 + (column + 0.5) * (x2 - x1) / 7, abs=1e-2
                )
                assert cells[1, row, column].item() == pytest.approx(
                    y1 + (row + 0.5) * (y2 - y1) / 7, abs=1e-2
                )


def test_a_box_reads_the_level_of_its_size():
    features = [torch.full((1, 2, *shape), float(level)) for level, shape in enumerate(SHAPES)]
    sides = [5.0, 40, 55, 57, 80, 111, 113, 160]
    boxes = torch.tensor([[10.0, 8, 10 + side, 8 + side * 0.64] for side in sides])
    found = reader()(features, STRIDES, torch.zeros(len(sides), dtype=torch.int64), boxes)[
        :, 0, 3, 3
    ]
    expected = [min(max(math.floor(math.log2(0.8 * side / 56 + 1e-6)), 0), 2) for side in sides]
    assert found.tolist() == pytest.approx(expected) and set(expected) == {0, 1}
    large = torch.tensor([[0.0, 0, 1000, 900]])
    deep = [torch.full((1, 2, 200, 200), float(level)) for level in range(3)]
    assert reader()(deep, STRIDES, torch.zeros(1, dtype=torch.int64), large)[0, 0, 3, 3] == 2


def test_every_box_reads_its_own_image():
    features = [
        torch.stack([torch.full((2, *shape), float(image)) for image in range(3)])
        for shape in SHAPES
    ]
    boxes = torch.tensor([[10.0, 10, 60, 60]]).expand(4, 4)
    found = reader()(features, STRIDES, torch.tensor([2, 0, 1, 2]), boxes)
    assert found[:, 0, 3, 3].tolist() == [2, 0, 1, 2]


def test_queries_of_a_batch_equal_one_by_one_in_training_mode_too():
    projector = Projector(8, hidden=16).train()
    features = [torch.randn(2, 8, *shape, requires_grad=True) for shape in SHAPES]
    images = torch.tensor([0, 1, 1])
    boxes = torch.tensor([[10.0, 10, 60, 60], [0, 0, 190, 120], [50, 50, 54, 58]])
    together = projector(features, STRIDES, images, boxes)
    assert together.shape == (3, 8)
    for place in range(3):
        alone = projector(features, STRIDES, images[place : place + 1], boxes[place : place + 1])
        assert torch.allclose(together[place], alone[0], atol=1e-5)
    together.sum().backward()
    assert all(feature.grad is None for feature in features)
    assert all(parameter.grad is not None for parameter in projector.parameters())


def test_an_empty_box_gives_a_finite_query():
    features = [torch.randn(1, 8, *shape) for shape in SHAPES]
    boxes = torch.tensor([[10.0, 10, 10, 10], [20.0, 20, 10, 10]])
    assert (
        Projector(8, hidden=16)(features, STRIDES, torch.zeros(2, dtype=torch.int64), boxes)
        .isfinite()
        .all()
    )
