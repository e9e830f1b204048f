"""Predictions that other tools can use: which images are read, which files are written, and that a
score against a truth is right or refused.
"""

import csv
import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from semidetr_lite import cli, prediction
from semidetr_lite.data.coco import CocoDataset, find_annotations
from semidetr_lite.detection_files import match_names
from semidetr_lite.errors import UserError
from semidetr_lite.evaluate import evaluate
from semidetr_lite.prediction import find_images, stored_boxes
from semidetr_lite.training import checkpoint

TURN = 0x0112  # EXIF's orientation
CATEGORIES = [{"id": 3, "name": "box"}, {"id": 7, "name": "bar & co"}]


class Seer:
    """A detector that sees the truth: bright rectangles, boxes in class 0 and bars in class 1."""

    test_size = train_sides = nms = None

    def __init__(self, categories=CATEGORIES):
        self.categories = categories

    def detect(self, images, nms=None):
        found = []
        for image in images:
            labels, boxes = [], []
            for label, channel in enumerate(image[:2]):
                rows, columns = (channel > 200).nonzero(as_tuple=True)
                if len(rows):
                    corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                    labels, boxes = [*labels, label], [*boxes, [float(x) for x in corners]]
            scores = torch.tensor([0.9, 0.2][: len(boxes)])
            boxes = torch.tensor(boxes).reshape(-1, 4)
            target = {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64)}
            found.append({**target, "scores": scores, "size": tuple(image.shape[-2:])})
        return found


def scene(path: Path, number: int = 0, size=(40, 60), **saving) -> list[list]:
    """An image with a red and a green rectangle; returns [category id, x, y, width, height]."""
    height, width = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    x, y = 3 + 2 * number, 4 + number
    pixels[y : y + 10, x : x + 8, 0] = 255
    pixels[20:32, 30 - number : 36, 1] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **saving)
    return [[3, x, y, 8, 10], [7, 30 - number, 20, 6 + number, 12]]


def truth_json(path: Path, images: dict[str, list], first_id=100, size=(40, 60)) -> Path:
    """A COCO json of {file name: rows of `scene`}, its images in reversed order."""
    document = {"images": [], "annotations": [], "categories": CATEGORIES}
    for number, (name, rows) in enumerate(reversed(images.items())):
        image = {"id": first_id + number, "file_name": name}
        document["images"].append({**image, "height": size[0], "width": size[1]})
        for category_id, *box in rows:
            row = {"id": len(document["annotations"]) + 1, "image_id": first_id + number}
            row |= {"category_id": category_id, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            document["annotations"].append(row)
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def predict(monkeypatch, tmp_path, capsys):
    """Runs the command on images with the Seer; returns status, output folder, what was said."""
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(checkpoint, "load_detector", lambda *_: Seer())

    def run(*words, out="out"):
        command = ["semidetr", "predict", tmp_path / "run", *words, "--out", tmp_path / out]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        return cli.main(), tmp_path / out, "".join(capsys.readouterr())

    return run


def scored(truth: Path, out: Path) -> float:
    return evaluate(str(out / "detections.json"), str(truth))["AP"]


# ---- scores --------------------------------------------------------------------------------------


def test_predictions_are_scored_by_the_names_of_images_and_classes(predict, tmp_path):
    rows = {f"{number}.png": scene(tmp_path / f"in/{number}.png", number) for number in range(4)}
    truth = truth_json(tmp_path / "truth.json", rows, first_id=1)  # ids of other images
    status, out, _ = predict(tmp_path / "in")
    assert status == 0 and scored(truth, out) == pytest.approx(1)
    renamed = json.loads(truth.read_text())
    swap = {3: 7, 7: 3}
    for row in renamed["categories"]:
        row["id"] = swap[row["id"]]
    for row in renamed["annotations"]:
        row["category_id"] = swap[row["category_id"]]
    truth.write_text(json.dumps(renamed))
    assert scored(truth, out) == pytest.approx(1)
    complete = evaluate(str(out / "annotations.json"), str(truth))
    assert complete["AP"] == pytest.approx(0.5)  # without the bars, which score 0.2


def test_a_truth_gives_its_ids(predict, tmp_path):
    rows = {f"{number}.png": scene(tmp_path / f"in/{number}.png", number) for number in range(3)}
    truth = truth_json(tmp_path / "truth.json", {**rows, "away.png": rows["0.png"]})
    scene(tmp_path / "in/more.png")
    status, out, said = predict(tmp_path / "in", "--truth", truth)
    assert status == 0 and "1 of 4 images are not in it" in said and "1 of its images" in said
    ids = {row["file_name"]: row["id"] for row in json.loads(truth.read_text())["images"]}
    found = json.loads((out / "detections.json").read_text())
    assert all(row["image_id"] == ids[row["file_name"]] for row in found)
    assert {row["category_id"] for row in found} == {3, 7}
    bare = [
        {key: row[key] for key in ("image_id", "category_id", "bbox", "score")} for row in found
    ]
    (out / "detections.json").write_text(json.dumps(bare))
    assert scored(truth, out) == pytest.approx(0.75, abs=0.01)  # a quarter was not given


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("counts", ["stored", "upright"])
@pytest.mark.parametrize("with_truth", [True, False])
def test_turned_photographs_are_scored_right_or_refused(
    predict, tmp_path, orientation, counts, with_truth
):
    exif = Image.Exif()
    exif[TURN] = orientation
    rows = {f"{n}.png": scene(tmp_path / f"in/{n}.png", n, exif=exif) for n in range(2)}
    truth = truth_json(tmp_path / "truth.json", rows)
    if counts == "upright":
        if orientation < 5:
            pytest.skip("sizes do not tell")
        document = json.loads(truth.read_text())
        for image in document["images"]:
            image["width"], image["height"] = 40, 60
        for row in document["annotations"]:
            image = document["images"][row["image_id"] - 100]["file_name"]
            seen = Seer().detect([prediction.load_image(tmp_path / "in" / image)])[0]
            label = [row["id"] for row in CATEGORIES].index(row["category_id"])
            x1, y1, x2, y2 = seen["boxes"][seen["labels"].tolist().index(label)].tolist()
            row["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        truth.write_text(json.dumps(document))
    status, out, said = predict(tmp_path / "in", *(["--truth", truth] if with_truth else []))
    assert status == 0, said
    if with_truth or orientation == 1:
        assert scored(truth, out) == pytest.approx(1)
    else:
        with pytest.raises(UserError, match="give --truth to `semidetr predict`"):
            scored(truth, out)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_boxes_undo_the_turn(orientation):
    stored = np.zeros((6, 9), dtype=np.uint8)
    stored[1:3, 4:8] = 255
    picture = Image.fromarray(stored)
    exif = picture.getexif()
    exif[TURN] = orientation
    upright = prediction.load_image(picture)[0]
    rows, columns = (upright > 0).nonzero(as_tuple=True)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    box = torch.tensor([[float(value) for value in box]])
    assert stored_boxes(box, (6, 9), orientation).tolist() == [[4, 1, 8, 3]]


def test_other_pixels_or_classes_or_images_are_refused(predict, tmp_path):
    rows = {f"{number}.png": scene(tmp_path / f"in/{number}.png", number) for number in range(2)}
    smaller = truth_json(tmp_path / "small.json", rows, size=(20, 30))
    status, out, said = predict(tmp_path / "in", "--truth", smaller)
    assert status == 2 and "the truth says 30 x 20" in said and said.count("\n") == 1
    assert predict(tmp_path / "in")[0] == 0
    with pytest.raises(UserError, match="60 x 40 pixels here, but 30 x 20 pixels in the truth"):
        scored(smaller, out)
    text = truth_json(tmp_path / "truth.json", rows).read_text()
    (tmp_path / "other.json").write_text(text.replace("bar & co", "lid"))
    with pytest.raises(UserError, match="its class 'bar & co' is not in the truth"):
        scored(tmp_path / "other.json", out)
    assert predict(tmp_path / "in", "--truth", tmp_path / "other.json")[0] == 2
    (tmp_path / "away.json").write_text(text.replace(".png", ".tif"))
    with pytest.raises(UserError, match="are not in the truth; another data set?"):
        scored(tmp_path / "away.json", out)


def test_scores_that_are_no_number_are_refused_and_spellings_are_not(tmp_path):
    truth = truth_json(tmp_path / "truth.json", {"a.png": scene(tmp_path / "a.png")})
    rows = [
        {"image_id": 100, "category_id": row[0], "bbox": row[1:], "score": 0.5}
        for row in scene(tmp_path / "a.png")
    ]
    file = tmp_path / "detections.json"
    spelt = [{**row, "image_id": "100", "category_id": 1.0 * row["category_id"], "score": "0.5"} for row in rows]  # fmt: skip
    for content in (rows, {"annotations": rows}, spelt):
        file.write_text(json.dumps(content))
        assert evaluate(str(file), str(truth))["AP"] == pytest.approx(1)
    file.write_text(json.dumps([{**row, "score": float("nan")} for row in rows]))
    with pytest.raises(UserError, match="detection number 1 has the score nan"):
        evaluate(str(file), str(truth))


def test_names_are_matched_from_their_ends():
    known = ["a/x.png", "b/x.png", "images\\1\\y.png"]
    names = ["mine/a/x.png", "y.png", "z.png"]
    assert match_names(names, known) == dict(zip(names, ["a/x.png", "images\\1\\y.png", None]))
    with pytest.raises(UserError, match="x.png may be a/x.png or b/x.png"):
        match_names(["x.png"], known)


# ---- files ---------------------------------------------------------------------------------------


def test_the_complete_coco_json_names_everything(predict, tmp_path):
    scene(tmp_path / "in/sub/a.png")
    status, out, _ = predict(tmp_path / "in", "--no-pictures")
    assert status == 0 and not list(out.glob("*.png"))
    document = json.loads((out / "annotations.json").read_text())
    image = {"id": 1, "file_name": "sub/a.png", "width": 60, "height": 40}
    assert document["images"] == [image] and document["categories"] == CATEGORIES
    (row,) = document["annotations"]  # the bar scores 0.2
    assert row["id"] == 1 and row["bbox"] == [3, 4, 8, 10] and row["area"] == 80
    assert row["image_id"] == 1 and row["category_id"] == 3 and row["score"] == pytest.approx(0.9)
    assert len(CocoDataset(out / "annotations.json", tmp_path / "in")) == 1


@pytest.mark.parametrize(("options", "labelled", "scored"), [([], 1, 2), (["--score", 0.1], 2, 2), (["--score", 0.5], 1, 1)])  # fmt: skip
def test_a_score_counts_for_all_files_but_without_one_all_boxes_are_scored(
    predict, tmp_path, options, labelled, scored
):
    scene(tmp_path / "in/a.png")
    out = predict(tmp_path / "in", *options)[1]
    assert len(json.loads((out / "annotations.json").read_text())["annotations"]) == labelled
    assert len(json.loads((out / "detections.json").read_text())) == scored


def test_voc_and_yolo_are_read_back_as_they_were_found(predict, tmp_path):
    rows = {f"{number}.png": scene(tmp_path / f"in/{number}.png", number) for number in range(3)}
    Image.new("RGB", (60, 40)).save(tmp_path / "in/none.png")
    status, out, _ = predict(tmp_path / "in", "--format", "voc", "--score", 0, out="voc")
    assert status == 0 and not (out / "annotations.json").exists()
    categories = [{"id": row["id"], "name": row["name"]} for row in CATEGORIES]
    os.rename(tmp_path / "in", out / "JPEGImages")
    found = CocoDataset(find_annotations(out, categories=categories)[0])
    expected = sum(rows.values(), [])
    assert sorted(found.fields["boxes"].tolist()) == sorted([x, y, x + w, y + h] for _, x, y, w, h in expected)  # fmt: skip
    assert len(found) == 4 and found.categories == categories
    assert "bar &amp; co" in (out / "Annotations/0.xml").read_text()

    status, out, _ = predict(out / "JPEGImages", "--format", "yolo", "--score", 0, out="yolo")
    os.rename(tmp_path / "voc/JPEGImages", out / "images")
    found = CocoDataset(find_annotations(out)[0])
    np.testing.assert_allclose(
        sorted(found.fields["boxes"].tolist()),
        sorted([x, y, x + w, y + h] for _, x, y, w, h in expected),
        atol=1e-3,
    )
    assert (out / "labels/none.txt").read_text() == "" and len(found) == 4
    assert [row["name"] for row in found.categories] == ["box", "bar & co"]


def test_voc_boxes_have_a_pixel_at_least_and_stay_inside():
    tiny = {"boxes": torch.tensor([[59.8, 0.1, 60.0, 0.2]]), "labels": torch.tensor([0])}
    image = prediction.ImageFile(Path("a.png"), "a.png")
    one = prediction.Prediction(image, 1, (40, 60), {**tiny, "scores": torch.ones(1)}, False)
    box = ElementTree.fromstring(prediction.voc_xml(one, CATEGORIES)).find("object/bndbox")
    assert [int(corner.text) for corner in box] == [60, 1, 60, 1]


def test_a_table_has_a_line_per_box(predict, tmp_path):
    scene(tmp_path / "in/a, b.png")
    out = predict(tmp_path / "in", "--format", "csv", "--score", 0)[1]
    with open(out / "detections.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["box", "bar & co"]
    assert rows[0]["file"] == "a, b.png" and float(rows[0]["x2"]) == 11


def test_two_images_never_share_a_label_file(predict, tmp_path):
    for name in ("a.png", "a.bmp"):
        scene(tmp_path / "in" / name)
    status, _, said = predict(tmp_path / "in", "--format", "yolo")
    assert status == 2 and "would have the same label file" in said


# ---- images --------------------------------------------------------------------------------------


def test_hidden_files_and_own_output_are_no_input_and_links_are_followed(predict, tmp_path):
    for name in ("in/a.png", "in/sub/b.png", "away/c.png", "in/._a.png", "in/.git/d.png"):
        scene(tmp_path / name)
    (tmp_path / "in/._a.png").write_bytes(b"a Mac's notes")
    (tmp_path / "in/link").symlink_to(tmp_path / "away")
    (tmp_path / "in/again.png").symlink_to(tmp_path / "in/a.png")
    for _ in range(2):  # the second time there is output
        status, out, said = predict(tmp_path / "in", tmp_path / "in/a.png", out="in/found")
        assert status == 0, said
        listed = json.loads((out / "annotations.json").read_text())["images"]
        assert [row["file_name"] for row in listed] == ["a.png", "link/c.png", "sub/b.png"]
    status, _, said = predict(tmp_path / "in", out="in")
    assert status == 2 and "is the folder of the images" in said


def test_an_output_folder_around_the_images_hides_none(tmp_path):
    scene(tmp_path / "in/a.png")
    assert len(find_images([tmp_path / "in"], tmp_path)) == 1


def test_a_name_that_is_no_text_is_predicted(predict, tmp_path):
    folder = os.fsencode(tmp_path / "in")
    scene(tmp_path / "in/a.png")
    try:
        os.rename(folder + b"/a.png", folder + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system has no such names")
    for kind in ("coco", "voc", "yolo", "csv"):
        status, out, said = predict(tmp_path / "in", "--format", kind, out=kind)
        assert status == 0, said
    name = json.loads((tmp_path / "coco/annotations.json").read_text())["images"][0]["file_name"]
    assert os.fsencode(name) == b"caf\xe9.png" and len(list((tmp_path / "coco").glob("*.png"))) == 1
    assert "caf\ufffd.png" in (tmp_path / "csv/detections.csv").read_text()


@pytest.mark.parametrize("size", [(400, 2), (1500, 8), (2, 1500), (1, 1), (5000, 20)])
def test_pictures_of_odd_shapes_are_bounded(size):
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}
    png = prediction.draw(torch.zeros(3, *size, dtype=torch.uint8), nothing, CATEGORIES, "a.png")
    assert int.from_bytes(png[16:20], "big") < 2100 and int.from_bytes(png[20:24], "big") < 8500


@pytest.mark.parametrize(
    ("test_size", "train_sides", "size", "far"),
    [
        ((240, 400), None, (480, 640), False),
        ((240, 400), None, (100, 150), True),
        ((240, 400), None, (3000, 4000), True),
        ((240, 400), None, (1500, 2), False),
        (None, (96, 128), (96, 128), False),
        (None, (96, 128), (480, 640), True),
        (None, (96, 128), (30, 40), True),
        (None, None, (4000, 4000), False),
    ],
)
def test_an_image_far_from_the_size_of_training_is_told(test_size, train_sides, size, far):
    detector = Seer()
    detector.test_size, detector.train_sides = test_size, train_sides
    assert prediction.is_far_from_training(detector, size) == far
