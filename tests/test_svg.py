"""Boxes as SVG: on their pixels, in their style, with labels that do not cover each other."""

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from semidetr_lite import visualize
from semidetr_lite.visualize import svg

SIZE = (64, 128)  # H, W


def parsed(source: str) -> ElementTree.Element:
    return ElementTree.fromstring(source)


def paths(element: ElementTree.Element) -> dict[str, list[list[float]]]:
    """{classes of a group: its boxes}, of the upper path."""
    found = {}
    for group in element.iter("g"):
        if group.get("class") != "label":
            drawn = group.findall("path")[-1].get("d")
            corners = re.findall(r"M(.*?) (.*?)H(.*?)V(.*?)H", drawn)
            found[group.get("class")] = [[float(side) for side in box] for box in corners]
    return found


def labels(element: ElementTree.Element) -> dict[str, list[float]]:
    """{text: x1, y1, x2, y2} of the labels."""
    found = {}
    for group in element.iter("g"):
        if group.get("class") == "label":
            x, y, width, height = (
                float(group[0].get(key)) for key in ("x", "y", "width", "height")
            )
            found[group[1].text] = [x, y, x + width, y + height]
    return found


def test_boxes_lie_where_they_are_in_the_image():
    rows = [
        ("hit", [10, 5, 20, 30], "cat"),
        ("missed", [0, 0, 128, 64], ""),
        ("hit", [1, 1, 2, 2], ""),
    ]
    drawn = parsed(svg.picture("a", SIZE, rows, "what is shown", width=256))
    assert drawn.get("viewBox") == "0 0 256 128" and drawn.get("aria-label") == "what is shown"
    [use] = drawn.findall("use")
    assert (use.get("href"), use.get("width"), use.get("height")) == ("#a", "256", "128")
    assert paths(drawn) == {"hit": [[20, 10, 40, 60], [2, 2, 4, 4]], "missed": [[0, 0, 256, 128]]}


def test_a_box_beyond_the_image_ends_at_its_edge():
    drawn = parsed(svg.picture("a", SIZE, [("hit", [-50, -50, 500, 500], "")], "", width=128))
    assert paths(drawn) == {"hit": [[0, 0, 128, 64]]}


def test_optional_boxes_can_be_hidden():
    rows = [("dropped", [place, 0, place + 5, 5], "") for place in range(4)]
    drawn = parsed(svg.picture("a", SIZE, rows, "", width=128, optional={1, 3}))
    assert {name: [box[0] for box in boxes] for name, boxes in paths(drawn).items()} == {
        "dropped more": [1, 3],
        "dropped": [0, 2],
    }


@pytest.mark.parametrize("seed", range(5))
def test_labels_never_cover_each_other_and_stay_inside(seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 50, (10, 2))
    rows = [
        ("hit", [*corner, *(corner + 12)], f"{place} .55") for place, corner in enumerate(corners)
    ]
    found = labels(parsed(svg.picture("a", SIZE, rows, "", width=300)))
    assert len(found) >= 5
    for name, (x1, y1, x2, y2) in found.items():
        assert 0 <= x1 < x2 <= 300.1 and 0 <= y1 < y2 <= 150.1
        for other, (a1, b1, a2, b2) in found.items():
            wide, high = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
            assert (
                name == other
                or wide <= 0
                or high <= 0
                or wide * high < 0.05 * (x2 - x1) * (y2 - y1)
            )


def test_one_colour_for_a_style_whatever_the_class():
    rows = [("hit", [10, 10, 20, 20], "cat"), ("hit", [60, 30, 80, 50], "dog")]
    drawn = parsed(svg.picture("a", SIZE, rows, ""))
    colors = {group[0].get("fill") for group in drawn.iter("g") if group.get("class") == "label"}
    assert colors == {visualize.STYLES["hit"][0]}


def test_every_style_has_its_rules():
    rules = svg.css()
    for style, (color, _, dashes, hatch) in visualize.STYLES.items():
        rule = re.search(rf"^\.{style} path {{(.*)}}$", rules, re.MULTILINE)[1]
        assert color is None or f"stroke: {color};" in rule
        assert ("dasharray: none" in rule) == (dashes == "-") and ("url(#hatch)" in rule) == bool(
            hatch
        )
    legend = parsed(svg.swatch("false_alarm"))
    assert legend.find("g").get("class") == "false_alarm"


def test_texts_are_escaped():
    source = svg.picture("a", SIZE, [("hit", [9, 9, 30, 30], '<b>"&')], 'a <b> "c"', width=400)
    assert (
        list(labels(parsed(source))) == ['<b>"&']
        and parsed(source).get("aria-label") == 'a <b> "c"'
    )


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_images_stand_in_the_page_once(kind):
    image = torch.zeros(3, *SIZE, dtype=torch.uint8)
    image[0, :, 64:] = 255  # the right half is red
    given = image / 255 if kind == "float" else image
    hidden = parsed(svg.definitions({"a": given, "b": torch.zeros(3, 900, 1600)}))
    assert [symbol.get("id") for symbol in hidden.iter("symbol")] == ["a", "b"]
    small, large = hidden.iter("image")
    assert small.get("class") == "pixels" and large.get("class") is None
    for element, size in ((small, (128, 64)), (large, (800, 450))):
        code = element.get("href").removeprefix("data:image/jpeg;base64,")
        with Image.open(io.BytesIO(base64.b64decode(code, validate=True))) as picture:
            assert picture.size == size
            if element is small:
                assert picture.getpixel((120, 30))[0] > 240 and picture.getpixel((10, 30))[0] < 15
