"""The drawings show the numbers that they are given."""

import pytest
import torch
from matplotlib.patches import FancyArrowPatch, Rectangle

from semidetr_lite import load_detector
from semidetr_lite.data import digits
from semidetr_lite.detectors import denoising
from semidetr_lite.teach import widgets
from semidetr_lite.visualize import RED, describe, mechanisms


def words(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_the_pairs_of_each_matching_are_framed_and_the_cheaper_one_is_named():
    costs = torch.tensor([[1.0, 2.0], [2.0, 10.0], [3.0, 3.0]])
    pairs = {"greedy": [(0, 0), (2, 1)], "Hungarian": [(1, 0), (0, 1)]}
    costs[2, 1] = 9.0
    figure = mechanisms.draw_assignments(costs, pairs)
    assert describe(figure).startswith("Hungarian has the smallest total")
    for ax, (name, chosen) in zip(figure.axes, pairs.items(), strict=True):
        framed = [patch for patch in ax.patches if patch.get_linewidth() > 2]
        framed = {
            (int(patch.get_y()), int(patch.get_x() // 2))
            for patch in framed
            if patch.get_edgecolor()[:3] == pytest.approx((0.89, 0.0, 0.106), abs=0.01)
        }
        assert framed == set(chosen)
        total = sum(float(costs[pair]) for pair in chosen)
        assert f"{name}: total cost {total:.2f}" in words(ax)
    assert RED == "#E3001B"


@pytest.mark.parametrize(("x", "y"), [(0.45, 0.4), (0.5, 0.5), (0.3, 0.6)])
def test_the_value_between_cells_is_that_of_grid_sample(x, y):
    values = torch.tensor([[0.0, 10, 20, 30], [100, 110, 120, 130]])
    place = 2 * torch.tensor([[[[x, y]]]]) - 1
    read = torch.nn.functional.grid_sample(values[None, None], place, align_corners=False)
    figure = mechanisms.draw_bilinear(values, x, y)
    value = float(describe(figure).split(";")[0].split()[-1])
    assert value == pytest.approx(float(read), abs=1e-2)


def test_the_mask_is_drawn_cell_by_cell():
    mask = denoising.group_mask([4, 4], 3)
    _, table = mechanisms.draw_group_mask([4, 4], 3, mask).axes
    assert words(table).count("1") == int(mask.sum())
    cells = [patch for patch in table.patches if isinstance(patch, Rectangle)]
    assert len(cells) == mask.numel()


def test_both_noised_boxes_lie_over_the_true_one():
    true_box, positive, negative = [30.0, 40, 70, 60], [34.0, 36, 78, 61], [42.0, 32, 86, 65]
    figure = mechanisms.draw_noised_boxes(true_box, positive, negative, 0.4)
    for ax, box in zip(figure.axes, (positive, negative), strict=True):
        outlines = [patch.get_bbox().extents.tolist() for patch in ax.patches if not patch.fill]
        assert true_box in outlines and box in outlines


def test_the_last_point_of_a_box_lies_on_its_edge():
    directions = torch.tensor([[[1.0, 0], [2, 0]], [[0, 1.0], [0, 2]]])
    _, ax = mechanisms.draw_sampling_star(directions, (6.0, 2.0)).axes
    ends = {tuple(line.get_xydata()[-1]) for line in ax.lines if len(line.get_xydata()) == 2}
    assert {(3.0, 0.0), (0.0, 1.0)} <= ends


def test_only_looking_forward_twice_sends_the_second_loss_to_the_first_correction():
    once, twice = mechanisms.draw_look_forward_twice().axes
    count = [sum(isinstance(p, FancyArrowPatch) for p in ax.patches) for ax in (once, twice)]
    assert count[1] == count[0] + 1
    assert "loss 2 trains Δ1 too" in words(twice) and "detached: no gradient" in words(once)


def test_the_points_of_two_layers_stand_side_by_side():
    detector = load_detector("notebooks/checkpoints/early.safetensors")
    scene = digits.load(percent=10, fold=1).tune[3]
    figure = widgets.show_layers(detector, scene, query=0, layers=(1, 3))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["layer 1; levels", "layer 3; levels"]
    first, last = ([part.get_offsets() for part in ax.collections] for ax in figure.axes)
    assert len(first[0]) == 16 and (first[0] != last[0]).any()  # four heads, four points
