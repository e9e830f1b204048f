"""The doctor lists every defect with its file, and counts what is there."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semidetr_lite.data.doctor import bins, doctor_data
from semidetr_lite.visualize import png, show_data_summary

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 4, "name": "dog"}, {"id": 5, "name": "cow"}]


def picture(path: Path, seed: int, height: int = 24, width: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def coco(folder: Path, part: str, count: int, seed: int, boxes=(), **changes) -> Path:
    """A json of `count` pictures in folder/`part`, with two boxes on the first, and `boxes`."""
    images = [
        {"id": 1 + i, "file_name": f"{i}.png", "height": 24, "width": 32} for i in range(count)
    ]
    for place, row in enumerate(images):
        picture(folder / part / row["file_name"], seed + place)
    rows = [[1, 1, 2, 2, 10, 10], [1, 4, 0, 0, 32, 24], *boxes]
    annotations = [
        {"id": 1 + i, "image_id": a, "category_id": b, "bbox": box}
        for i, (a, b, *box) in enumerate(rows)
    ]
    path = folder / f"instances_{part}.json"
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES, **changes}
    path.write_text(json.dumps(content))
    return path


def found(lines: list[str], *words) -> bool:
    """Whether one of the lines holds all the words."""
    return any(all(str(word) in line for word in words) for line in lines)


def test_a_clean_data_set(tmp_path):
    coco(tmp_path, "train", 4, 0, [[2, 5, 1, 1, 4, 4]])
    coco(tmp_path, "val", 2, 50)
    picture(tmp_path / "more" / "a.png", 90, 100, 70)
    lines, summary, defects = doctor_data(tmp_path, unlabelled=tmp_path / "more")
    assert defects == 0 and lines[-1] == "no defects"
    train = summary["train"]
    assert (
        train["images"],
        train["boxes"],
        train["empty"],
        train["crowd"],
        train["difficult"],
    ) == (4, 3, 2, 0, 0)
    assert train["classes"] == {"cat": 1, "dog": 1, "cow": 1}
    assert bins(train["box_sides"]) == [("4 to 8", 1), ("8 to 16", 1), ("16 to 32", 1)]
    assert bins(summary["unlabelled"]["image_sides"]) == [("64 to 128", 1)]
    assert summary["validation"]["images"] == 2 and set(summary["unlabelled"]) == {
        "source",
        "images",
        "image_sides",
    }
    assert found(lines, "train: 4 images") and found(
        lines, "3 boxes of 3 classes", "2 images without a box"
    )
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.parametrize("workers", [0, 2])
def test_every_defect_is_found_with_its_file(tmp_path, workers):
    boxes = [
        [2, 1, 0, 0, 0, 5],
        [2, 1, 40, 3, 5, 5],
        [3, 1, 20, 20, 30, 2],
        [9, 1, 1, 1, 2, 2],
        [3, 7, 1, 1, 2, 2],
    ]
    train = coco(tmp_path, "train", 8, 0, boxes)
    other = [*CATEGORIES[:2], {"id": 5, "name": "ox"}, {"id": 6, "name": "sheep"}]
    val = coco(tmp_path, "val", 3, 50, categories=other)
    images, more = tmp_path / "train", tmp_path / "more"
    (images / "3.png").unlink()
    (images / "4.png").write_bytes((images / "4.png").read_bytes()[:500])
    picture(images / "5.png", 5, 20, 30)
    picture(images / "6.png", 7)  # as 7.png is
    Image.open(images / "1.png").save(tmp_path / "val" / "0.png", pnginfo=None, compress_level=1)
    picture(more / "new.png", 99)
    picture(more / "same.png", 52)  # as val/2.png is
    (more / "bad.jpg").write_text("no image")
    lines, summary, defects = doctor_data(tmp_path, unlabelled=more, workers=workers)
    expected = [
        (train, "annotation 6", "image_id 9"),
        (train, "annotation 7", "category_id 7"),
        (images / "1.png", "annotation 3", "empty or outside", "32 x 24"),
        (images / "1.png", "annotation 4", "empty or outside"),
        (images / "2.png", "annotation 5", "reaches out"),
        (train, "category 5", "'cow'", "'ox'", val),
        (train, "category 6", "missing", "'sheep'"),
        (train, "'cow'", "no labelled example"),
        (images / "3.png", "not a readable image", "No such file"),
        (images / "4.png", "truncated"),
        (images / "5.png", "30 x 20", "32 x 24", train),
        (images / "7.png", "same picture", images / "6.png"),
        (tmp_path / "val" / "0.png", "same picture", images / "1.png", "train"),
        (more / "same.png", "same picture", tmp_path / "val" / "2.png", "validation"),
        (more / "bad.jpg", "not a readable image"),
    ]
    said = lines[lines.index(f"{len(expected)} defects") + 1 :]
    assert defects == len(expected) == len(said)
    for words in expected:
        assert found(said, *words), words
    assert sum(summary["train"]["image_sides"]["counts"]) == 5 and summary["train"]["boxes"] == 3


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"images": [], "annotations": [], "categories": []}']
)
def test_one_bad_json_does_not_hide_the_rest(tmp_path, content):
    train, val = coco(tmp_path, "train", 3, 0, [[2, 5, 1, 1, 4, 4]]), coco(tmp_path, "val", 2, 50)
    val.write_text(content)
    lines, summary, defects = doctor_data(tmp_path, unlabelled=tmp_path / "none")
    assert set(summary) == {"train"} and defects == 2
    assert found(lines, val) and found(lines, tmp_path / "none", "no such folder")
    train.write_text(content)
    assert doctor_data(tmp_path)[1:] == ({}, 2)


def test_two_images_with_one_id_and_two_rows_for_one_file(tmp_path):
    train = coco(tmp_path, "train", 4, 0, [[2, 5, 1, 1, 4, 4]])
    content = json.loads(train.read_text())
    content["images"][2]["id"] = 2
    content["images"][3]["file_name"] = "0.png"
    train.write_text(json.dumps(content))
    lines, summary, defects = doctor_data(tmp_path)
    assert defects == 2 and found(lines, train, "have the id 2") and summary["train"]["images"] == 3
    assert found(lines, "0.png: the same picture as", "0.png (train)")


def test_nothing_there(tmp_path):
    lines, summary, defects = doctor_data(tmp_path / "none")
    assert defects == 1 and summary == {} and found(lines, tmp_path / "none", "No such file")


def test_a_name_that_is_no_text_can_be_printed(tmp_path):
    coco(tmp_path, "train", 2, 0, [[2, 5, 1, 1, 4, 4]])
    (tmp_path / "more").mkdir()
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "more") + b"/\xff.png")).write_text("no image")
    except OSError:
        pytest.skip("this disk takes only names that are text")
    lines = doctor_data(tmp_path, unlabelled=tmp_path / "more")[0]
    assert found(
        "\n".join(lines).encode("utf-8").decode().splitlines(),
        "\\udcff.png",
        "not a readable image",
    )


def test_the_picture_of_a_summary(tmp_path):
    coco(tmp_path, "train", 4, 0)
    coco(tmp_path, "val", 2, 50)
    _, summary, _ = doctor_data(tmp_path, unlabelled=coco(tmp_path / "more", "train", 2, 70).parent)
    figure = show_data_summary(summary)
    assert png(figure)[:4] == b"\x89PNG" and figure.get_figwidth() <= 9
    classes, boxes, images = figure.axes
    assert [line.get_ydata().tolist() for line in classes.lines] == [[1, 1, 0], [1, 1, 0]]
    heights = [[bar.get_height() for bar in part] for part in images.containers]
    assert heights == [
        summary[name]["image_sides"]["counts"] for name in ("train", "validation", "unlabelled")
    ]
    assert len(boxes.containers) == 2
    assert "cow" in figure.get_suptitle() and "0 boxes" in figure.get_suptitle()
    for few in ({}, {"unlabelled": summary["unlabelled"]}):
        assert png(show_data_summary(few))


def test_two_plain_pictures_of_one_colour_are_duplicates_only_at_one_size(tmp_path):
    coco(tmp_path, "train", 2, 0, [[2, 5, 1, 1, 4, 4]])
    (tmp_path / "more").mkdir()
    for name, size in (("wide.png", (30, 20)), ("tall.png", (20, 30)), ("again.png", (30, 20))):
        Image.new("RGB", size, "green").save(tmp_path / "more" / name)
    lines, _, defects = doctor_data(tmp_path, unlabelled=tmp_path / "more")
    assert defects == 1 and found(lines, "wide.png", "same picture", "again.png")
