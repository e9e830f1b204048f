"""The doctor's screen: counts, remarks, the first defects of each kind, pictures, what to type."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from semidetr_lite import cli
from semidetr_lite.data.doctor import diagnose
from tests.test_cli import run
from tests.test_layouts import coco as coco_of_equal_pictures
from tests.test_layouts import rows
from tests.test_own_images import picture, voc, yolo


def coco(folder, json_name, content, images="images"):
    """A json and its images, no two of them the same."""
    path = coco_of_equal_pictures(folder, json_name, content, images)
    for seed, file in enumerate(sorted((folder / images).glob("*.png"))):
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return path


def remark(found, *words) -> bool:
    return any(all(str(word) in line for word in words) for line in found.remarks)


def test_many_defects_of_one_kind_are_a_few_lines(tmp_path):
    content = rows(300)
    for row in content["annotations"][:200]:
        row["image_id"] = 99_999
    content["annotations"][-1]["bbox"] = [40, 40, 5, 5]
    coco(tmp_path, "instances_train.json", content)
    found = diagnose(tmp_path)
    assert len(found.problems) == 201
    lines = found.lines()
    assert len(lines) < 45 and any("197 more like these" in line for line in lines)
    assert any("[40, 40, 5, 5]" in line for line in lines)  # the only one of its kind
    assert found.all_problems().count("image_id 99999") == 200


def test_remarks_on_what_can_be_read_and_looks_wrong(tmp_path):
    content = rows(20)
    content["categories"].append({"id": 3, "name": "rare"})
    extra = [([5, 5, 0.6, 9], 1), ([2, 3, 10, 8], 1), ([1, 1, 9, 9], 3)]
    for bbox, category in extra:
        row = {"image_id": 1, "category_id": category, "bbox": bbox}
        content["annotations"].append(row)
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] != 20]
    coco(tmp_path, "instances_train.json", content)
    picture(tmp_path / "test" / "a.png")
    found = diagnose(tmp_path, percent=5, queries=3)
    assert remark(found, "1 boxes have a side of a pixel")
    assert remark(found, "1 boxes are repeated")
    assert remark(found, "1 of 20 training images have no annotation")
    assert remark(found, "1 of 20 images have more than 3 objects", "at most 4")
    assert remark(found, "not looked at", "test/ (1)")
    part = found.summary["train"]
    assert part["objects"] == [2, 4] and part["images_of_class"] == {"cat": 19, "dog": 9, "rare": 1}
    assert part["labelled"] == 1
    hidden = [name for name, count in part["labelled_of_class"].items() if not count]
    assert remark(found, "at 5 % (1 images)", *hidden) == bool(hidden)


@pytest.mark.parametrize("kind", ["crowd", "fractions", "corners"])
def test_boxes_that_cannot_be_what_they_say_are_defects(tmp_path, kind):
    content = rows(10)
    for row in content["annotations"]:
        if kind == "crowd":
            row["iscrowd"] = 1
        else:
            row["bbox"] = [0.1, 0.1, 0.4, 0.5] if kind == "fractions" else [10, 6, 30, 20]
    coco(tmp_path, "instances_train.json", content)
    word = {"crowd": "crowd", "fractions": "fractions", "corners": "[x1, y1, x2, y2]"}[kind]
    assert any(word in problem for problem in diagnose(tmp_path).problems)


@pytest.mark.parametrize("make", ["json", "voc", "yolo", "roboflow"])
def test_it_takes_every_form_that_train_takes(tmp_path, make):
    data = tmp_path / "data"
    if make == "json":
        data = coco(data, "a.json", rows(4))
    elif make == "roboflow":
        coco(data, "train/_annotations.coco.json", rows(4), "train")
    else:
        {"voc": voc, "yolo": yolo}[make](data)
    info = coco(tmp_path / "more", "image_info.json", {"images": rows(3, 70)["images"]})
    found = diagnose(data, unlabelled=info)
    assert found.summary["train"]["boxes"] > 0 and found.summary["unlabelled"]["images"] == 3
    images, targets, names = found.sample(3)
    assert len(images) == len(targets) == len(names) > 0
    assert all(len(target["boxes"]) for target in targets)


def test_pictures_a_list_of_all_defects_and_what_to_type(monkeypatch, tmp_path, capsys):
    content = rows(12)
    coco(tmp_path / "my data", "instances_train.json", content)
    words = ["doctor", "--data", tmp_path / "my data", "--out", tmp_path / "sheet.png"]
    assert run(monkeypatch, *words, "--percent", 50, "--queries", 1) == 0
    out, _ = capsys.readouterr()
    assert "labelled at 50 %" in out and "raise --queries" in out
    command = next(line for line in out.splitlines() if line.startswith("next: "))
    assert f"semidetr train --data '{tmp_path}/my data' --method supervised" in command
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 600 and Image.open(tmp_path / "sheet-sizes.png").width > 300
    assert "more than 1 objects" in (tmp_path / "sheet-defects.txt").read_text()
    content["annotations"] = content["annotations"][:9]  # the others are unlabelled
    coco(tmp_path / "my data", "instances_train.json", content)
    assert run(monkeypatch, *words) == 0
    assert "then: semidetr train" in capsys.readouterr().out


def test_the_command_it_prints_can_be_read(monkeypatch, tmp_path, capsys):
    coco(tmp_path, "instances_train.json", rows(12))
    assert run(monkeypatch, "doctor", "--data", tmp_path) == 0
    line = capsys.readouterr().out.rpartition("next: semidetr ")[2].splitlines()[0]
    settings = cli._starting_settings(line.split(), cli.Settings)
    assert settings.preset and json.dumps(line)


@pytest.mark.parametrize(("percent", "used"), [(None, "100"), (100, "100"), (50, "50")])
def test_the_next_command_uses_the_percentage_that_was_given(
    percent, used, monkeypatch, tmp_path, capsys
):
    coco(tmp_path, "instances_train.json", rows(12))
    words = ["--percent", percent] if percent else []
    assert run(monkeypatch, "doctor", "--data", tmp_path, *words) == 0
    _, _, commands = capsys.readouterr().out.rpartition("next: ")
    assert set(re.findall(r"--percent (\S+)", commands)) == {used}
    assert ("then: " in commands) == (used != "100")  # the other images are unlabelled
