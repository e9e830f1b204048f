"""VOC and YOLO folders give the rows that a COCO json would, and every bad file one line."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semidetr_lite.data.coco import CocoDataset, find_annotations, load
from semidetr_lite.data.formats import names_in_yaml, read_yolo
from semidetr_lite.errors import UserError

REAL = Path(__file__).parents[2] / "shared" / "data" / "voc2012-100"
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def picture(path: Path, height: int = 24, width: int = 32, **saving) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    Image.fromarray(pixels).save(path, **saving)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def thing(name: str, *corners, more: str = "") -> str:
    return f"<object><name>{name}</name>{more}{BOX.format(*corners)}</object>"


def xml(*objects: str, size: str = "<size><width>32</width><height>24</height></size>") -> str:
    return f"<annotation><filename>wrong.jpg</filename>{size}{''.join(objects)}</annotation>"


def voc(folder: Path, names="abcdefgh", lists: dict[str, str] | None = None) -> Path:
    """A VOC folder with a dog on an image of each name; `lists` go to ImageSets/Main."""
    for name in names:
        picture(folder / "JPEGImages" / f"{name}.jpg")
        write(folder / "Annotations" / f"{name}.xml", xml(thing("dog", 1, 1, 16, 12)))
    for name, stems in (lists or {}).items():
        write(folder / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{stem}\n" for stem in stems))
    return folder


def stems(labels) -> list[str]:
    return [Path(row["file_name"]).stem for row in labels.document["images"]]


def refused(folder, *words: str, **arguments) -> None:
    """Loading raises one line with these words."""
    with pytest.raises(UserError) as error:
        load(folder, **arguments)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


class TestVoc:
    def test_what_comes_out(self, tmp_path):
        folder = voc(tmp_path)
        part = f"<part><name>head</name>{BOX.format(9, 9, 10, 10)}</part>"
        objects = [
            thing("dog", 2, 3, 11, 12),
            thing("cat", 1, 1, 32, 24, more="<difficult>1</difficult>" + part),
        ]
        write(folder / "Annotations" / "b.xml", xml(*objects))
        labels, measured = find_annotations(folder)
        dataset = CocoDataset(labels)
        assert measured is None and dataset.categories == [
            {"id": 1, "name": "cat"},
            {"id": 2, "name": "dog"},
        ]
        image, target = dataset[1]
        assert image.shape == (3, 24, 32) and target["size"] == (24, 32)
        assert target["boxes"].tolist() == [
            [1, 2, 11, 12],
            [0, 0, 32, 24],
        ]  # 10 x 10 pixels, and the whole image
        assert target["labels"].tolist() == [1, 0] and target["area"].tolist() == [100, 768]
        assert target["difficult"].tolist() == [False, True] == target["crowd"].tolist()

    @pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
    def test_a_missing_size_is_read_from_the_image(self, tmp_path, size):
        folder = voc(tmp_path)
        picture(folder / "JPEGImages" / "c.jpg", 40, 20)
        write(folder / "Annotations" / "c.xml", xml(size=size))
        dataset = CocoDataset(find_annotations(folder)[0])
        assert dataset.sizes[2] == (40, 20) and dataset[2][1]["boxes"].shape == (0, 4)

    @pytest.mark.parametrize(
        "lists, train, measured",
        [
            ({"train": "abc", "val": "de", "trainval": "abcde"}, "abc", "de"),
            ({"train": "abc", "val": "de", "trainval": "abcde", "test": "gh"}, "abcde", "gh"),
            (
                {"trainval": "abcde", "test": ["2008_1", "2008_2"]},
                "abcde",
                None,
            ),  # VOC 2012: a test without labels
            ({"train": "ab"}, "ab", None),
            ({}, "abcdefgh", None),
        ],
    )
    def test_image_sets(self, tmp_path, lists, train, measured):
        labels, other = find_annotations(voc(tmp_path, lists=lists))
        assert stems(labels) == list(train) and (other and stems(other)) == (
            measured and list(measured)
        )

    def test_a_whole_run_of_it(self, tmp_path, capsys):
        voc(tmp_path / "data", lists={"train": "abcdef", "val": "gh"})
        picture(tmp_path / "more" / "sub" / "new picture ü.png")
        splits = load(tmp_path / "data", unlabelled=tmp_path / "more", percent=50)
        assert (len(splits.labelled), len(splits.unlabelled), len(splits.test)) == (3, 4, 2)
        assert "truth" in splits.unlabelled[0][1] and "boxes" not in splits.unlabelled[0][1]
        assert set(splits.unlabelled[3][1]) == {"size", "image_id"}
        # Images elsewhere, and nothing to measure on.
        (tmp_path / "data" / "JPEGImages").rename(tmp_path / "pictures")
        (tmp_path / "data" / "ImageSets" / "Main" / "val.txt").unlink()
        assert len(load(tmp_path / "data", images=tmp_path / "pictures", percent=100).labelled) == 5
        assert "1 of its 6 images" in capsys.readouterr().err

    def test_validation_in_another_folder_speaks_of_the_same_classes(self, tmp_path):
        train, other = (
            voc(tmp_path / "07"),
            voc(tmp_path / "12", "xyz", {"val": "yz", "train": "x"}),
        )
        write(train / "Annotations" / "a.xml", xml(thing("cat", 1, 1, 9, 9)))
        splits = load(train, validation=other)
        assert stems(find_annotations(train, validation=other)[1]) == ["y", "z"]
        assert splits.test[0][1]["labels"].tolist() == [1] and len(splits.categories) == 2
        write(other / "Annotations" / "y.xml", xml(thing("cow", 1, 1, 9, 9)))
        refused(train, other, "y.jpg", "'cow'", validation=other)

    @pytest.mark.parametrize(
        "content, words",
        [
            ("<annotation><object></annotation>", ["mismatched tag"]),
            ("", ["no element found"]),
            (xml("<object><name>dog</name></object>"), ["bndbox"]),
            (xml(f"<object>{BOX.format(1, 2, 3, 4)}</object>"), ["name"]),
            (xml(thing("dog", 1, 2, "far", 4)), ["far"]),
            (xml(thing("dog", 40, 2, 50, 4)), ["1 of 8 boxes", "outside"]),
        ],
    )
    def test_bad_annotations(self, tmp_path, content, words):
        folder = voc(tmp_path)
        write(folder / "Annotations" / "c.xml", content)
        refused(
            folder, folder if "8 boxes" in words[0] else folder / "Annotations" / "c.xml", *words
        )

    def test_missing_files(self, tmp_path):
        folder = voc(tmp_path, lists={"train": [*"abc", "zz"]})
        refused(folder, folder / "Annotations" / "zz.xml", "missing")
        (folder / "JPEGImages" / "b.jpg").unlink()
        (folder / "ImageSets" / "Main" / "train.txt").unlink()
        refused(
            folder, folder / "Annotations" / "b.xml", folder / "JPEGImages" / "b.jpg", "missing"
        )


def yolo(folder: Path, train="images/train", val="images/val") -> Path:
    """A YOLO folder: four training images, the last with an empty file, one for validation."""
    for place, names in ((train, "abcd"), (val, "e")):
        for name in names:
            picture(folder / place / f"{name}.png")
            lines = "1 0.5 0.5 0.25 0.5\n\n0 0.125 .25 .25 .5\n" if name != "d" else "\n"
            write(folder / place.replace("images", "labels") / f"{name}.txt", lines)
    write(
        folder / "data.yaml", "path: .\ntrain: x\nnames:\n  0: person\n  1: traffic light\nnc: 2\n"
    )
    return folder


class TestYolo:
    @pytest.mark.parametrize(
        "train, val",
        [
            ("images/train2017", "images/val2017"),
            ("train/images", "valid/images"),
            ("images", "test/images"),
        ],
    )
    def test_layouts(self, tmp_path, train, val):
        splits = load(yolo(tmp_path, train, val), percent=100)
        assert splits.categories == [
            {"id": 0, "name": "person"},
            {"id": 1, "name": "traffic light"},
        ]
        assert len(splits.labelled) == 4 and len(splits.test) == 1
        image, target = splits.labelled[0]
        assert image.shape == (3, 24, 32)
        assert target["boxes"].tolist() == [[12, 6, 20, 18], [0, 0, 8, 12]] and target[
            "labels"
        ].tolist() == [1, 0]
        assert splits.labelled[3][1]["boxes"].shape == (0, 4)

    def test_the_innermost_folder_of_images_has_the_labels_beside_it(self, tmp_path):
        picture(tmp_path / "images" / "one" / "images" / "a.png")
        text = "0 0.5 0.5 0.25 0.5\n"
        write(tmp_path / "images" / "one" / "labels" / "a.txt", text)
        write(tmp_path / "data.yaml", "names: [person]")
        annotations, _ = read_yolo(tmp_path)
        assert annotations.problems == []
        assert [row["bbox"] for row in annotations.document["annotations"]] == [[12, 6, 8, 12]]

    def test_val_is_for_validation_and_test_neither_for_it_nor_for_training(self, tmp_path):
        folder = yolo(tmp_path)
        picture(folder / "images" / "test" / "f.png")
        write(folder / "labels" / "test" / "f.txt", "1 0.5 0.5 0.25 0.5")
        train, validation = find_annotations(folder)
        assert stems(train) == list("abcd") and stems(validation) == ["e"]
        (folder / "images" / "val" / "e.png").unlink()
        (folder / "labels" / "val" / "e.txt").unlink()
        assert stems(find_annotations(folder)[1]) == ["f"]

    def test_boxes_are_of_the_upright_image(self, tmp_path):
        folder = yolo(tmp_path)
        exif = Image.Exif()
        exif[0x0112] = 8
        picture(folder / "images" / "train" / "a.png", exif=exif)
        image, target = CocoDataset(find_annotations(folder)[0])[0]
        assert image.shape == (3, 32, 24) and target["boxes"][0].tolist() == [9, 8, 15, 24]

    @pytest.mark.parametrize(
        "line, words",
        [
            ("0 0.5 0.5 0.2", ["line 2", "class cx cy width height"]),
            ("0 0.5 0.5 0.2 0.2 0.9 0.1 0.1", ["line 2", "class cx cy width height"]),
            ("dog 0.5 0.5 0.2 0.2", ["line 2", "class cx cy width height"]),
            ("0 320 240 20 20", ["line 2", "0..1"]),
            ("0 nan 0.5 0.2 0.2", ["line 2", "0..1"]),
            ("2 0.5 0.5 0.2 0.2", ["line 2", "class 2", "0 to 1"]),
            ("0.5 0.5 0.5 0.2 0.2", ["line 2", "class 0.5"]),
            ("-1 0.5 0.5 0.2 0.2", ["line 2", "class -1"]),
        ],
    )
    def test_bad_lines(self, tmp_path, line, words):
        folder = yolo(tmp_path)
        path = write(folder / "labels" / "train" / "b.txt", f"1 0.5 0.5 0.25 0.5\n{line}\n")
        refused(folder, path, *words)

    def test_bad_files(self, tmp_path):
        folder = yolo(tmp_path)
        path = write(folder / "labels" / "train" / "gone.txt", "0 0.5 0.5 0.1 0.1")
        refused(folder, path, "missing")
        path.unlink()
        write(folder / "images" / "train" / "b.png", "no image")
        refused(folder, folder / "images" / "train" / "b.png", "not a readable image")

    def test_names_of_the_classes(self, tmp_path):
        folder = yolo(tmp_path)
        write(folder / "data.yaml", "names: other.yaml")
        refused(folder, folder / "data.yaml", "classes.txt")
        write(folder / "data.yaml", "names: {0: a, 2: b}")
        refused(folder, folder / "data.yaml", "classes.txt")
        (folder / "data.yaml").unlink()
        refused(folder, folder, "data.yaml", "classes.txt")
        write(folder / "labels" / "classes.txt", "man\nlight house\n")
        assert [row["name"] for row in load(folder).categories] == ["man", "light house"]

    @pytest.mark.parametrize(
        "text",
        [
            "names: [a b, 'c, d', \"e\"]  # three\nnc: 3",
            "nc: 3\nnames: ['a b',\n  'c, d',\n  'e']",
            "names:\n  0: a b\n  1: 'c, d'\n\n  2: e  # last\ntrain: images",
            "names:\n- a b\n- 'c, d'\n- e\nval:\n- images",
            "names: {0: a b, 1: 'c, d', 2: e}",
            "names: {2: e, 1: 'c, d', 0: a b}",
            "\ufeffnames: [a b, 'c, d', e]",
        ],
    )
    def test_ways_to_write_names_in_yaml(self, tmp_path, text):
        assert names_in_yaml(write(tmp_path / "data.yaml", text)) == ["a b", "c, d", "e"]

    @pytest.mark.parametrize(
        "text, names",
        [
            ("names: ['a [x]', 'b']", ["a [x]", "b"]),
            ("names:\n- 'c # sharp'\n- d", ["c # sharp", "d"]),
            ('names: ["it\'s", \'{"a": 1}\']', ["it's", '{"a": 1}']),
            ("names:\n  0: 'colon: inside'\n  1: \"tab\\there\"", ["colon: inside", "tab\there"]),
            # what YAML would read as a truth value, a number or a date is a name here
            (
                "names: [no, yes, null, 007, 1e3, 2024-01-01]",
                ["no", "yes", "null", "007", "1e3", "2024-01-01"],
            ),
            ("names: [ünïcode, 犬]", ["ünïcode", "犬"]),
        ],
    )
    def test_names_that_need_care_in_yaml(self, tmp_path, text, names):
        assert names_in_yaml(write(tmp_path / "data.yaml", text)) == names

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "names:",
            "names: 3",
            "names: []",
            "names: {}",
            "names: [a, '']",
            "names: [a, [b]]",
            "names: {a: 0, b: 1}",
            "names: {1: a, 2: b}",
            "- names",
            "names: [a, b",
            "names: 'a",
            "names: &x [*x]",
            "[" * 5000,
            "\x00",
        ],
    )
    def test_yaml_without_names_is_one_line_that_names_the_file(self, tmp_path, text):
        path = write(tmp_path / "data.yaml", text)
        with pytest.raises(UserError) as error:
            names_in_yaml(path)
        message = str(error.value)
        assert "\n" not in message and str(path) in message and "classes.txt" in message

    @pytest.mark.parametrize(
        "name, text", [("data.yaml", "names: [a, b, a]"), ("classes.txt", "a\nb\na\n")]
    )
    def test_two_classes_of_one_name_would_become_one(self, tmp_path, name, text):
        folder = yolo(tmp_path)
        refused(folder, write(folder / name, text), "'a'")


def test_a_folder_of_nothing_known(tmp_path):
    picture(tmp_path / "images" / "a.png")
    refused(tmp_path, tmp_path, "no instances_train*.json", "VOC", "YOLO")


def test_links_instead_of_files(tmp_path):
    store = voc(tmp_path / "store")
    data = tmp_path / "data"
    (data / "JPEGImages").mkdir(parents=True)
    for name in "abcdefgh":
        os.symlink(store / "JPEGImages" / f"{name}.jpg", data / "JPEGImages" / f"{name}.jpg")
    os.symlink(store / "Annotations", data / "Annotations")
    picture(store / "JPEGImages" / "new.jpg")
    splits = load(data, unlabelled=store / "JPEGImages", percent=100)
    assert [path.name for path in splits.unlabelled.datasets[1].paths] == ["new.jpg"]


@pytest.mark.skipif(not REAL.exists(), reason="the real VOC images are not beside this checkout")
def test_real_voc_images(capsys):
    splits = load(REAL, percent=100)
    assert (len(splits.labelled), len(splits.test), len(splits.categories)) == (80, 20, 20)
    whole = CocoDataset(find_annotations(REAL)[0])
    targets = [whole.target(index) for index in range(100)]
    assert sum(len(target["boxes"]) for target in targets) == 273
    assert sum(int(target["difficult"].sum()) for target in targets) == 38
    assert torch.cat([target["boxes"] for target in targets]).min() == 0
    assert whole[0][0].shape[1:] == whole.sizes[0]
    assert capsys.readouterr().err.count("\n") == 1
