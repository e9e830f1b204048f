"""The pictures of README and docs: what docs/make_pictures.py draws, and the files as they are."""

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "make_pictures.py")
make_pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_pictures)
PICTURES = ROOT / "docs" / "pictures"


@pytest.mark.parametrize("name", ["training.png", "timeline.png", "cells.png"])
def test_a_picture_is_small_and_sharp_at_twice_900_pixels(name):
    assert (PICTURES / name).stat().st_size < 400_000
    with Image.open(PICTURES / name) as picture:
        assert picture.width >= 1800


def test_the_drawing_of_the_method_is_one_small_file_with_large_text():
    drawn, stored = make_pictures.draw_method(), PICTURES / "method.svg"
    assert len(drawn.encode()) < 400_000 and stored.stat().st_size < 400_000
    for text in (drawn, stored.read_text(encoding="utf-8")):
        root = ElementTree.fromstring(text)
        names = {element.tag.split("}")[1] for element in root.iter()}
        assert "image" not in names  # some browsers show none in a picture that itself is a file
        sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)"', text)]
        assert root.get("width") == "900" and min(sizes) >= 13
        words = [element.text for element in root.iter() if element.tag.endswith("}text")]
        assert [word for word in words if word in list("123456")] == ["2", "1", "3", "4", "5", "6"]
    assert words == [
        element.text
        for element in ElementTree.fromstring(drawn).iter()
        if element.tag.endswith("}text")
    ]


def test_supervised_steps_lie_where_the_methods_are_after_the_same_time():
    line = {"row": "supervised", "percent": 10, "detector": "dino", "preset": "digits"}
    line |= {"steps": 4750, "seed": 3}
    values = {750: 0.1, 1000: 0.2, 2875: 0.3, 4750: 0.4}
    lines = [line | {"step": step, "AP_teacher": value} for step, value in values.items()]
    lines.append(line | {"step": 1000, "AP_teacher": 0.9, "percent": 5})
    curves = make_pictures.training_curves(lines, "supervised", "AP_teacher")
    assert curves == {3: ([0, 750, 1500], [20.0, 30.0, 40.0])}


def test_curves_of_cells_begin_where_the_supervised_run_of_their_fold_ends():
    def line(row, fold, step, value):
        return {"row": row, "fold": fold, "step": step, "AP_teacher": value}

    lines = [line("supervised", 1, 100, 0.1), line("supervised", 1, 200, 0.3)]
    lines += [line("semi-detr", 1, 40, 0.4), line("semi-detr", 1, 80, 0.5)]
    lines += [line("supervised, same time", 1, step, 0.35) for step in (100, 200)]
    lines += [line("supervised", 2, 200, 0.9), line("semi-detr", 2, 80, 0.95)]
    curves = make_pictures.cell_curves(lines, "semi-detr", "AP_teacher")
    assert curves == {1: ([0, 40, 80], [0.3, 0.4, 0.5]), 2: ([0, 80], [0.9, 0.95])}
    longer = make_pictures.cell_curves(lines, "supervised, same time", "AP_teacher")
    assert longer == {1: ([0, 40, 80], [0.3, 0.35, 0.35])}  # 200 steps as long as 80


def test_a_box_that_is_kept_and_mined_is_drawn_as_kept():
    line = {"boxes": [[0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]], "labels": [4, 5, 6]}
    line |= {"kept": [True, False, False], "mined": [True, False, True]}
    kept, mined = make_pictures.drawn_boxes(line)
    assert kept["labels"].tolist() == [4] and mined["labels"].tolist() == [6]
    assert mined["boxes"].tolist() == [[0, 0, 3, 3]]


def test_vector_pixels_cover_every_pixel_once():
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    image[0, 1:, 3:] = 200
    runs = re.findall(r"M(\d+) (\d+)h(\d+)v1H(\d+)z", make_pictures.as_paths(image))
    covered = [(int(x) + i, int(y)) for x, y, width, _ in runs for i in range(int(width))]
    assert sorted(covered) == [(x, y) for x in range(6) for y in range(4)]
    assert all(x == start for x, _, _, start in runs)
