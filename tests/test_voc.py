"""VOC's XML as COCO json; VOC's AP against a plain loop and against cases worked by hand."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))

import voc_to_coco

from semidetr_lite.data.coco import load
from semidetr_lite.evaluate import evaluate, evaluate_voc


def thing(name: str, *corners, difficult=0, inside="") -> str:
    ends = "".join(
        f"<{end}>{value}</{end}>" for end, value in zip(("xmin", "ymin", "xmax", "ymax"), corners)
    )
    mark = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{mark}<bndbox>{ends}</bndbox>{inside}</object>"


def add(
    folder: Path, stem: str, *things: str, size: str | None = None, suffix: str = ".jpg", flat=False
) -> None:
    """An image of 40 x 30 pixels and its XML file."""
    size = (
        "<size><width>40</width><height>30</height><depth>3</depth></size>"
        if size is None
        else size
    )
    image, xml = (folder, folder) if flat else (folder / "JPEGImages", folder / "Annotations")
    for path in (image, xml):
        path.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(image / (stem + suffix))
    text = f"<annotation><filename>{stem}{suffix}</filename>{size}{''.join(things)}</annotation>"
    (xml / f"{stem}.xml").write_text(text, encoding="utf-8")


def listing(folder: Path, name: str, *stems: str) -> None:
    path = folder / "ImageSets" / "Main" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{stem}\n" for stem in stems))


@pytest.fixture
def devkit(tmp_path) -> Path:
    """Two training, two test and two unlabelled images, and one that no list has."""
    kit = tmp_path / "VOCdevkit"
    add(
        kit / "VOC2007", "000001", thing("dog", 1, 1, 40, 30), thing("cat", 3, 4, 3, 4, difficult=1)
    )
    add(kit / "VOC2007", "000002", thing("person", 5.5, 6, 10, 12, difficult=None))
    add(kit / "VOC2007", "000003", thing("train", 2, 2, 9, 9))
    add(kit / "VOC2007", "000004")
    for stem in ("2008_000001", "2008_000002", "2008_000009"):
        add(kit / "VOC2012", stem, thing("cow", 1, 1, 5, 5))
    listing(kit / "VOC2007", "trainval", "000001", "000002")
    listing(kit / "VOC2007", "test", "000003", "000004")
    listing(kit / "VOC2012", "trainval", "2008_000001", "2008_000002  1")
    return kit


def convert(*arguments) -> int:
    return voc_to_coco.main([str(argument) for argument in arguments])


def read(folder: Path, part: str) -> dict:
    return json.loads((folder / voc_to_coco.FILES[part]).read_text(encoding="utf-8"))


def refused(capsys, *arguments, words: tuple = (), out: Path) -> None:
    assert convert(*arguments, "--out", out) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert str(word) in err
    assert not out.exists()


class TestConversion:
    def test_the_setting_of_the_paper(self, devkit, capsys):
        assert convert(devkit) == 0
        train, val, more = (
            read(devkit / "annotations", part) for part in ("train", "val", "unlabelled")
        )
        assert [(row["id"], row["file_name"]) for row in train["images"]] == [
            (1, "VOC2007/JPEGImages/000001.jpg"),
            (2, "VOC2007/JPEGImages/000002.jpg"),
        ]
        assert all((row["width"], row["height"]) == (40, 30) for row in train["images"])
        names = [row["name"] for row in train["categories"]]
        assert (
            names == sorted(names)
            and len(names) == 20
            and train["categories"][0] == {"id": 1, "name": "aeroplane"}
        )
        assert train["categories"] == val["categories"] == more["categories"]
        assert [row["id"] for row in more["images"]] == [2008000001, 2008000002] and more[
            "annotations"
        ] == []
        out, err = capsys.readouterr()
        assert "2 images, 3 boxes, 1 of them difficult" in out and err == ""

    def test_boxes(self, devkit):
        convert(devkit)
        whole, pixel, odd = read(devkit / "annotations", "train")["annotations"]
        assert (
            whole["bbox"] == [0, 0, 40, 30] and whole["area"] == 1200
        )  # corners 1, 1, 40, 30: the image itself
        assert pixel["bbox"] == [2, 3, 1, 1] and odd["bbox"] == [
            4.5,
            5,
            5.5,
            7,
        ]  # one pixel; a corner that is no whole one
        assert [row["difficult"] for row in (whole, pixel, odd)] == [0, 1, 0]
        assert [row["iscrowd"] for row in (whole, pixel, odd)] == [0, 1, 0]
        assert [row["category_id"] for row in (whole, pixel, odd)] == [12, 8, 15]
        assert [row["id"] for row in (whole, pixel, odd)] == [1, 2, 3] and [
            whole["image_id"],
            odd["image_id"],
        ] == [
            1,
            2,
        ]

    def test_the_package_reads_it(self, devkit):
        convert(devkit)
        splits = load(devkit, percent=100)
        assert (len(splits.labelled), len(splits.test)) == (2, 2)
        image, target = splits.labelled[0]
        assert image.shape == (3, 30, 40) and target["boxes"].tolist() == [
            [0, 0, 40, 30],
            [2, 3, 3, 4],
        ]
        assert target["crowd"].tolist() == [False, True]

    def test_years_joined_and_one_year_alone(self, devkit, tmp_path):
        sets = (
            "--train",
            "VOC2007/trainval",
            "--train",
            "VOC2012/trainval",
            "--val",
            "VOC2007/test",
        )
        assert convert(devkit, *sets, "--out", tmp_path / "joined") == 0
        ids = [row["id"] for row in read(tmp_path / "joined", "train")["images"]]
        assert (
            ids == [1, 2, 2008000001, 2008000002]
            and not (tmp_path / "joined" / "image_info_unlabeled.json").exists()
        )
        assert (
            convert(
                devkit / "VOC2007",
                "--train",
                "trainval",
                "--val",
                "test",
                "--out",
                tmp_path / "one",
            )
            == 0
        )
        assert read(tmp_path / "one", "train")["images"][0]["file_name"] == "JPEGImages/000001.jpg"

    def test_a_second_run_writes_the_same(self, devkit):
        convert(devkit)
        before = {path: path.read_bytes() for path in devkit.rglob("*") if path.is_file()}
        convert(devkit)
        assert {path: path.read_bytes() for path in devkit.rglob("*") if path.is_file()} == before

    def test_a_plain_folder_with_classes_of_its_own(self, tmp_path, capsys):
        for stem, name in (("scan b", "wheel"), ("scan a", "axle")):
            add(tmp_path / "mine", stem, thing(name, 1, 1, 9, 9), suffix=".png", flat=True)
        assert convert(tmp_path / "mine", "--classes", "found") == 0
        document = read(tmp_path / "mine" / "annotations", "train")
        assert [row["name"] for row in document["categories"]] == ["axle", "wheel"]
        assert [(row["id"], row["file_name"]) for row in document["images"]] == [
            (1, "scan a.png"),
            (2, "scan b.png"),
        ]
        assert (
            convert(tmp_path / "mine", "--classes", "wheel, axle", "--out", tmp_path / "other") == 0
        )
        assert [row["category_id"] for row in read(tmp_path / "other", "train")["annotations"]] == [
            2,
            1,
        ]
        capsys.readouterr()
        refused(
            capsys,
            tmp_path / "mine",
            words=("axle (1 boxes), wheel (1 boxes)", "--classes"),
            out=tmp_path / "no",
        )

    def test_parts_of_an_object_are_no_objects(self, tmp_path):
        corners = "<xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>"
        part = f"<part><name>head</name><bndbox>{corners}</bndbox></part>"
        layout = thing("person", 5, 5, 20, 20, inside=part)
        add(
            tmp_path, "000001", layout, layout.replace("<bndbox>", part + "<bndbox>", 1)
        )  # before its own box or after
        assert convert(tmp_path) == 0
        assert [row["bbox"] for row in read(tmp_path / "annotations", "train")["annotations"]] == [
            [4, 4, 16, 16]
        ] * 2

    @pytest.mark.parametrize(
        "size", ["", "<size/>", "<size><width>0</width><height>0</height></size>"]
    )
    def test_a_missing_size_is_read_from_the_image(self, tmp_path, size):
        add(tmp_path, "000001", thing("dog", 1, 1, 5, 5), size=size)
        assert convert(tmp_path) == 0
        row = read(tmp_path / "annotations", "train")["images"][0]
        assert (row["width"], row["height"]) == (40, 30)

    def test_unlabelled_images_need_no_xml(self, devkit):
        for path in (devkit / "VOC2012" / "Annotations").iterdir():
            path.unlink()
        assert convert(devkit) == 0
        assert [row["width"] for row in read(devkit / "annotations", "unlabelled")["images"]] == [
            40,
            40,
        ]

    def test_bad_input(self, devkit, tmp_path, capsys):
        seven, out = devkit / "VOC2007", tmp_path / "out"
        refused(capsys, tmp_path / "none", words=("no such folder",), out=out)
        refused(
            capsys, devkit, "--train", "VOC2007/extra", words=("extra.txt", "no such list"), out=out
        )
        leak = ("--train", "VOC2007/trainval", "--val", "VOC2007/trainval")
        refused(capsys, devkit, *leak, words=("000001", "--train and --val"), out=out)
        refused(
            capsys,
            devkit,
            "--train",
            "VOC2012/all",
            "--unlabelled",
            "VOC2012/trainval",
            words=("2008",),
            out=out,
        )
        listing(seven, "lost", "000099")
        refused(capsys, devkit, "--train", "VOC2007/lost", words=("000099.xml", "missing"), out=out)
        listing(seven, "twice", "000001", "000001")
        refused(capsys, devkit, "--train", "VOC2007/twice", words=("listed twice",), out=out)
        listing(seven, "away", "../../000001")
        refused(capsys, devkit, "--train", "VOC2007/away", words=("000001.xml", "missing"), out=out)
        refused(capsys, devkit, "--unlabelled", "VOC2007/away", words=("missing",), out=out)
        listing(seven, "empty")
        refused(capsys, devkit, "--train", "VOC2007/empty", words=("empty.txt",), out=out)
        (seven / "JPEGImages" / "000002.jpg").unlink()
        refused(capsys, devkit, words=("000002.jpg", "missing"), out=out)
        (seven / "Annotations" / "000001.xml").write_text("<annotation><object>")
        refused(capsys, devkit, words=("000001.xml", "no element found"), out=out)

    @pytest.mark.parametrize(
        "bad", [thing("dog", 1, 1, 5), thing("", 1, 1, 5, 5), thing("dog", 1, 1, 5, "wide")]
    )
    def test_an_incomplete_object(self, tmp_path, capsys, bad):
        add(tmp_path, "000001", bad)
        refused(capsys, tmp_path, words=("000001.xml", "lacks"), out=tmp_path / "out")

    def test_reversed_corners_are_put_right(self, tmp_path):
        add(tmp_path, "000001", thing("dog", 9, 1, 5, 6))
        assert convert(tmp_path) == 0
        (row,) = read(tmp_path / "annotations", "train")["annotations"]
        assert row["bbox"] == [4, 0, 5, 6]

    def test_boxes_that_are_not_finite(self, tmp_path, capsys):
        add(tmp_path, "000001", *[thing("dog", 1, 1, 5, 5)] * 200, thing("dog", 9, 1, "inf", 5))
        assert convert(tmp_path) == 0
        assert len(read(tmp_path / "annotations", "train")["annotations"]) == 200
        assert " 1 empty box" in capsys.readouterr().err
        add(tmp_path, "000002", thing("dog", "nan", 1, 5, 5), thing("dog", 1, "-inf", 5, 5))
        refused(capsys, tmp_path, words=("3 of 203", "000001.jpg"), out=tmp_path / "out")


# VOC's AP


def target(*boxes, labels=None, **others) -> dict:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([0] * len(boxes) if labels is None else labels, dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "size": (100, 100), **others}


def found(*boxes, scores=(), labels=None) -> dict:
    return target(*boxes, labels=labels, scores=torch.tensor(scores, dtype=torch.float32))


BOX, OTHER, FAR = [10, 10, 50, 50], [60, 60, 90, 90], [0, 0, 5, 5]
NAMES = ("AP50_11point", "AP50_allpoint")


def figures(detections, targets) -> tuple[float, float]:
    result = evaluate_voc(detections, targets)
    return tuple(result[name] for name in NAMES)


class TestAP:
    def test_by_hand(self):
        # right, wrong, right: precision 1 up to recall 1/2, then 2/3
        one = found(BOX, FAR, OTHER, scores=[0.9, 0.8, 0.7])
        assert figures([one], [target(BOX, OTHER)]) == pytest.approx(
            ((6 + 5 * 2 / 3) / 11, 1 / 2 + 1 / 2 * 2 / 3)
        )
        # one of two found: recall 0, 0.1 ... 0.5 are reached
        assert figures([found(BOX, scores=[0.9])], [target(BOX, OTHER)]) == pytest.approx(
            (6 / 11, 1 / 2)
        )
        # one of ten found: recall 0.1 is reached exactly
        ten = target(*([x, 0, x + 5, 5] for x in range(0, 100, 10)))
        assert figures([found([0, 0, 5, 5], scores=[0.9])], [ten]) == pytest.approx(
            (2 / 11, 1 / 10)
        )

    def test_the_overlap_that_counts(self):
        half = [10, 10, 30, 50]  # IoU exactly 0.5
        assert figures([found(half, scores=[0.9])], [target(BOX)]) == (1, 1)
        assert figures([found([10, 10, 29.9, 50], scores=[0.9])], [target(BOX)]) == (0, 0)

    def test_a_second_detection_is_wrong_even_if_it_overlaps_another_box(self):
        near = [12, 10, 52, 50]
        two = found(
            BOX, [10.5, 10, 50.5, 50], scores=[0.9, 0.8]
        )  # both overlap BOX most; the official rule looks no further
        assert figures([two], [target(BOX, near)])[1] == pytest.approx(1 / 2)

    @pytest.mark.parametrize("field", ["difficult", "crowd"])
    def test_difficult_boxes_are_neither_found_nor_missed(self, field):
        marked = target(BOX, OTHER, **{field: torch.tensor([True, False])})
        assert figures([found(OTHER, scores=[0.5])], [marked]) == (1, 1)
        assert figures([found(BOX, BOX, OTHER, scores=[0.9, 0.8, 0.5])], [marked]) == (1, 1)
        assert figures([found(FAR, OTHER, scores=[0.9, 0.5])], [marked]) == (0.5, 0.5)

    def test_classes(self):
        result = evaluate_voc(
            [found(BOX, OTHER, scores=[0.9, 0.8], labels=[0, 3])],
            [target(BOX, OTHER, labels=[0, 4])],
        )
        assert result["per_class"] == {
            0: {"AP50_11point": 1, "AP50_allpoint": 1, "boxes": 1},
            4: {"AP50_11point": 0, "AP50_allpoint": 0, "boxes": 1},
        }
        assert result["AP50_11point"] == result["AP50_allpoint"] == 0.5
        json.dumps(result)

    def test_nothing(self):
        for detections, targets in [([], []), ([found(BOX, scores=[0.9])], [target()])]:
            assert all(math.isnan(value) for value in figures(detections, targets))
        assert figures([found()], [target(BOX)]) == (0, 0)
        only = target(BOX, difficult=torch.tensor([True]))
        assert evaluate_voc([found(BOX, scores=[0.9])], [only])["per_class"] == {}
        nan = float("nan")
        assert figures(
            [found(BOX, BOX, [0, 0, nan, 9], scores=[0.9, nan, 0.99])], [target(BOX)]
        ) == (1, 1)
        with pytest.raises(ValueError, match="1 detections for 2 targets"):
            evaluate_voc([found()], [target(), target()])

    def test_order_over_all_images_by_score(self):
        detections = [found(FAR, scores=[0.3]), found(BOX, scores=[0.6])]
        assert figures(detections, [target(), target(BOX)]) == (1, 1)
        assert figures(detections[::-1], [target(BOX), target()]) == (1, 1)

    @pytest.mark.parametrize("seed", range(5))
    def test_against_a_plain_loop_over_inclusive_corners(self, seed):
        rng = np.random.default_rng(seed)
        truth, answers = [], []
        for _ in range(6):
            count = rng.integers(0, 5)
            corners = rng.integers(1, 30, (count, 2))
            boxes = np.concatenate([corners, corners + rng.integers(3, 15, (count, 2))], axis=1)
            truth.append((boxes, rng.integers(0, 2, count), rng.random(count) < 0.3))
            guesses = np.concatenate(
                [boxes + rng.integers(-2, 3, boxes.shape) for _ in range(3)]
            ).reshape(-1, 4)
            answers.append((guesses, rng.integers(0, 2, len(guesses)), rng.random(len(guesses))))
        shift = np.array(
            [-1, -1, 0, 0]
        )  # what voc_to_coco makes of inclusive corners counted from 1
        targets = [
            target(*(b + shift).tolist(), labels=c, difficult=torch.tensor(d)) for b, c, d in truth
        ]
        detections = [found(*(b + shift).tolist(), labels=c, scores=s) for b, c, s in answers]
        result = evaluate_voc(detections, targets)
        expected = {label: by_loops(answers, truth, label) for label in (0, 1)}
        for label, values in expected.items():
            assert [result["per_class"][label][name] for name in NAMES] == pytest.approx(values)
        assert figures(detections, targets) == pytest.approx(
            np.mean(list(expected.values()), axis=0)
        )
        if seed == 0:  # the check must not be met by 0 or 1 throughout
            assert 0.05 < result["AP50_allpoint"] < 0.95
        boxes_only = [{**one, "crowd": one["difficult"]} for one in targets]
        assert abs(evaluate(detections, boxes_only)["AP50"] - result["AP50_allpoint"]) < 0.2


def by_loops(answers, truth, label: int) -> tuple[float, float]:
    """(11-point, all-point) AP of one class from inclusive corners, box by box."""
    rows = [(s, i, b) for i, (boxes, labels, scores) in enumerate(answers)
            for b, c, s in zip(boxes, labels, scores) if c == label]  # fmt: skip
    wanted = sum(int(((c == label) & ~d).sum()) for _, c, d in truth)
    taken, right, curve = set(), 0, []
    wrong = 0
    for _, image, box in sorted(rows, key=lambda row: -row[0]):
        best, where = 0.0, None
        for place, (other, of, difficult) in enumerate(zip(*truth[image])):
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if of == label and width > 0 and height > 0:
                areas = [(one[2] - one[0] + 1) * (one[3] - one[1] + 1) for one in (box, other)]
                iou = width * height / (sum(areas) - width * height)
                if iou > best:
                    best, where = iou, (image, place, difficult)
        if best >= 0.5 and where[2]:
            continue
        if best >= 0.5 and where not in taken:
            taken.add(where)
            right += 1
        else:
            wrong += 1
        curve.append((right / wanted, right / (right + wrong)))
    eleven = [max([p for r, p in curve if r >= t / 10 - 1e-9], default=0) for t in range(11)]
    area, last = 0.0, 0.0
    for recall in sorted({r for r, _ in curve}):
        area += (recall - last) * max(p for r, p in curve if r >= recall)
        last = recall
    return sum(eleven) / 11, area
