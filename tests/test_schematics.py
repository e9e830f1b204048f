"""Drawings that explain: the stage that is lit, and the numbers under two boxes."""

import pytest
import torch
from matplotlib.colors import to_hex

from semidetr_lite import visualize
from semidetr_lite.boxes import overlaps
from semidetr_lite.visualize import schematics


def test_the_stages_stand_in_order_and_the_named_ones_are_lit():
    figure = visualize.show_stages(["queries", "decoder"])
    names = [text for text in figure.axes[0].texts if text.get_text() in visualize.STAGES]
    assert [text.get_text() for text in names] == list(visualize.STAGES)
    lit = [text.get_text() for text in names if to_hex(text.get_color()) == schematics.LIT.lower()]
    assert lit == ["queries", "decoder"]
    assert visualize.describe(figure).endswith("in this notebook: queries, decoder")


def test_a_stage_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="no stage {'neck'}"):
        visualize.show_stages("neck")


def test_the_numbers_under_two_boxes_are_those_of_the_package():
    pairs = [((0, 0, 20, 20), (10, 5, 30, 25)), ((0, 0, 20, 20), (34, 8, 54, 28))]
    figure = visualize.show_overlaps(pairs, "two pairs")
    iou, giou = overlaps(*torch.tensor(pairs, dtype=torch.float32).unbind(1))
    words = [text.get_text().replace("\N{MINUS SIGN}", "-") for text in figure.axes[0].texts]
    assert words == [f"IoU {a:.2f}\nGIoU {b:.2f}" for a, b in zip(iou, giou, strict=True)]
