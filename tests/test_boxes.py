"""The border between pixels and model coordinates, and overlaps against torchvision's."""

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou, generalized_box_iou_loss

from semidetr_lite.boxes import inverse_sigmoid, overlaps, pairwise_overlaps, to_model, to_pixels


def random_boxes(*lead: int, within: float = 100.0) -> torch.Tensor:
    corners = torch.rand(*lead, 2, 2) * within
    return torch.cat([corners.amin(-2), corners.amax(-2) + 0.01], -1)


def test_to_model_divides_x_by_width_and_y_by_height():
    boxes = torch.tensor([[20.0, 10, 60, 30]])  # in an image 50 high and 200 wide
    model = torch.tensor([[0.2, 0.4, 0.2, 0.4]])
    assert torch.allclose(to_model(boxes, (50, 200)), model)
    assert torch.allclose(to_pixels(model, (50, 200)), boxes)


def test_round_trip():
    boxes = random_boxes(7)
    for size in [(100, 100), (50, 200), torch.Size([33, 21])]:
        assert torch.allclose(to_pixels(to_model(boxes, size), size), boxes, atol=1e-4)


def test_a_tensor_of_sizes_gives_each_image_its_own():
    sizes = torch.tensor([[50, 200], [120, 80], [96, 96]])
    boxes = random_boxes(3, 5)
    model = to_model(boxes, sizes)
    for image in range(3):
        assert torch.allclose(model[image], to_model(boxes[image], tuple(sizes[image].tolist())))
    assert torch.allclose(to_pixels(model, sizes), boxes, atol=1e-4)


def test_no_boxes_stay_no_boxes():
    none = torch.zeros(0, 4)
    assert to_model(none, (10, 20)).shape == to_pixels(none, (10, 20)).shape == (0, 4)
    assert to_model(torch.zeros(2, 0, 4), torch.tensor([[10, 20], [20, 10]])).shape == (2, 0, 4)
    iou, giou = pairwise_overlaps(none, random_boxes(3))
    assert iou.shape == giou.shape == (0, 3)


def test_pairwise_overlaps_equal_torchvision():
    a, b = random_boxes(40), random_boxes(30)
    iou, giou = pairwise_overlaps(a, b)
    assert torch.allclose(iou, box_iou(a, b), atol=1e-6)
    assert torch.allclose(giou, generalized_box_iou(a, b), atol=1e-6)
    assert (iou > 0).any() and (iou == 0).any()


def test_overlaps_of_pairs_equal_torchvision_with_gradients():
    a, b = random_boxes(40).requires_grad_(), random_boxes(40)
    ours = 1 - overlaps(a, b)[1]
    theirs = generalized_box_iou_loss(a, b)
    assert torch.allclose(ours, theirs, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), a)[0] for loss in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_overlaps_broadcast_over_leading_dimensions():
    a, b = random_boxes(2, 3, 5), random_boxes(3, 4)
    iou, giou = pairwise_overlaps(a, b)
    assert iou.shape == (2, 3, 5, 4)
    for layer in range(2):
        for image in range(3):
            assert torch.allclose(iou[layer, image], box_iou(a[layer, image], b[image]), atol=1e-6)
            assert torch.allclose(
                giou[layer, image], generalized_box_iou(a[layer, image], b[image]), atol=1e-6
            )


@pytest.mark.parametrize(
    "empty", [[5.0, 5, 5, 5], [5.0, 5, 5, 9], [8.0, 8, 2, 2]]
)  # a point, a line, corners swapped
def test_empty_boxes_overlap_by_nothing_and_have_finite_gradients(empty):
    a = torch.tensor([empty], requires_grad=True)
    b = torch.tensor([[0.0, 0, 10, 10], empty])
    iou, giou = pairwise_overlaps(a, b)
    assert (iou == 0).all() and giou.isfinite().all()
    (iou.sum() + giou.sum()).backward()
    assert a.grad.isfinite().all()


def test_small_boxes_in_model_coordinates_overlap_exactly():
    """A pixel in an image of 1333 is far above the floor that keeps the division finite."""
    box = torch.tensor([[0.5, 0.5, 0.5 + 1 / 1333, 0.5 + 1 / 1333]])
    assert torch.allclose(overlaps(box, box)[0], torch.ones(1), atol=1e-3)


def test_inverse_sigmoid():
    inside = torch.linspace(0.01, 0.99, 9)
    assert torch.allclose(inverse_sigmoid(inside).sigmoid(), inside, atol=1e-6)
    ends = inverse_sigmoid(torch.tensor([0.0, 1.0]), eps=1e-3)
    assert torch.allclose(ends.sigmoid(), torch.tensor([1e-3, 1 - 1e-3]), atol=1e-5)
