"""What labelling tools write is recognised and read; what it lacks is said in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from semidetr_lite.data.coco import CocoDataset, find_annotations, load
from semidetr_lite.data.coco_json import box_of_outline, read_annotations, read_coco, whole_number
from semidetr_lite.data.images import turn_boxes
from semidetr_lite.errors import UserError
from tests.test_own_images import BOX, picture, stems, thing, voc, write, xml, yolo

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def rows(count: int, first: int = 1) -> dict:
    """A COCO json of `count` images, a cat on each and a dog on every second."""
    images = [
        {"id": first + i, "file_name": f"{first + i}.png", "width": 32, "height": 24}
        for i in range(count)
    ]
    annotations = []
    for place, image in enumerate(images):
        for category in (1, 2)[: 1 + place % 2]:
            bbox = [2.0 * category, 3.0, 10.0, 8.0]
            row = {"image_id": image["id"], "category_id": category, "bbox": bbox, "area": 80.0}
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **row})
    return {
        "images": images,
        "annotations": annotations,
        "categories": [dict(row) for row in CATEGORIES],
    }


def coco(folder: Path, json_name: str, content: dict, images: str = "images") -> Path:
    """A json and its images."""
    for row in content["images"]:
        name = Path(row["file_name"].replace("\\", "/")).name
        if not (folder / images / name).exists():
            picture(folder / images / name)
    return write(folder / json_name, json.dumps(content))


def boxes_of(dataset) -> list:
    return [dataset[index][1]["boxes"].tolist() for index in range(len(dataset))]


def refusal(call, *words) -> None:
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


EXPECTED = [[[2, 3, 12, 11]], [[2, 3, 12, 11], [4, 3, 14, 11]]]


# ---- folders -------------------------------------------------------------------------------------


class TestCocoFolders:
    def test_roboflow(self, tmp_path):
        for split, count, first in (("train", 6, 1), ("valid", 2, 50), ("test", 3, 90)):
            coco(tmp_path, f"{split}/_annotations.coco.json", rows(count, first), split)
        train, val = find_annotations(tmp_path)
        assert stems(train) == list("123456") and stems(val) == ["50", "51"]
        assert boxes_of(CocoDataset(train))[:2] == EXPECTED

    def test_without_valid_the_test_images_are_for_validation(self, tmp_path):
        for split, count, first in (("train", 6, 1), ("test", 3, 90)):
            coco(tmp_path, f"{split}/_annotations.coco.json", rows(count, first), split)
        assert stems(find_annotations(tmp_path)[1]) == ["90", "91", "92"]

    @pytest.mark.parametrize(
        "name, images",
        [
            ("annotations/instances_default.json", "images/default"),  # CVAT
            ("result.json", "images"),  # Label Studio
            ("labels.json", "data"),  # FiftyOne
            ("annotations/my labels.json", "images"),
        ],
    )
    def test_one_json_of_any_name(self, tmp_path, name, images):
        coco(tmp_path, name, rows(5), images)
        write(tmp_path / "notes.json", '{"other": 1}')
        write(tmp_path / "annotations" / "captions_train2017.json", '{"images": []}')
        train, val = find_annotations(tmp_path)
        assert val is None and boxes_of(CocoDataset(train))[:2] == EXPECTED

    def test_train_json_and_val_json(self, tmp_path):
        coco(tmp_path, "annotations/train.json", rows(4), "images/train")
        coco(tmp_path, "annotations/val.json", rows(2, 50), "images/val")
        train, val = find_annotations(tmp_path)
        assert len(stems(train)) == 4 and stems(val) == ["50", "51"]
        assert boxes_of(CocoDataset(val)) == EXPECTED

    def test_two_jsons_that_may_be_meant(self, tmp_path):
        coco(tmp_path, "one.json", rows(4))
        coco(tmp_path, "two.json", rows(4))
        refusal(lambda: find_annotations(tmp_path), tmp_path, "one.json", "two.json")

    @pytest.mark.parametrize(
        "written",
        ["images\\1\\{}", "C:\\Users\\me\\photos\\{}", "/data/upload/{}", "../../x/{}", "./{}"],
    )
    def test_paths_of_the_machine_that_labelled(self, tmp_path, written):
        content = rows(4)
        path = coco(tmp_path, "result.json", content, "images")
        for row in content["images"]:
            row["file_name"] = written.format(row["file_name"])
        write(path, json.dumps(content))
        assert boxes_of(CocoDataset(find_annotations(tmp_path)[0]))[:2] == EXPECTED

    def test_a_name_that_two_images_have_is_not_guessed(self, tmp_path):
        content = rows(3)
        content["images"][0]["file_name"] = "/elsewhere/x.png"
        picture(tmp_path / "images" / "a" / "x.png")
        picture(tmp_path / "images" / "b" / "x.png")
        path = coco(tmp_path / "other", "a.json", content)
        dataset = read_annotations(path, [tmp_path / "images"])
        refusal(lambda: CocoDataset(dataset), "x.png")
        content["images"][0]["file_name"] = "/elsewhere/b/x.png"
        write(path, json.dumps({**content, "images": content["images"][:1], "annotations": []}))
        dataset = CocoDataset(read_annotations(path, [tmp_path / "images"]))
        assert dataset.names == ["b/x.png"]

    def test_a_missing_image_is_not_taken_from_another_split(self, tmp_path):
        path = coco(tmp_path, "annotations/instances_train2017.json", rows(4), "train2017")
        (tmp_path / "train2017" / "3.png").unlink()
        picture(tmp_path / "val2017" / "3.png")
        refusal(lambda: load(tmp_path), tmp_path / "train2017" / "3.png", "missing", path)


# ---- spellings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, number",
    [(7, 7), (7.0, 7), ("7", 7), (" 7.0 ", 7), ("-1", -1), (7.5, None), ("7a", None), ("", None),
     (True, None), (None, None), ([7], None), (float("inf"), None), (1e300, None)],
)  # fmt: skip
def test_whole_number(value, number):
    assert whole_number(value) == number


def respell(content: dict, table: str, key: str, change) -> dict:
    """The json with a field of every row of a table changed; `change` None takes it away."""
    for row in content[table]:
        value = row.pop(key)
        if change is not None:
            row[key] = change(value)
    return content


class TestSpellings:
    @pytest.mark.parametrize(
        "table, key, change",
        [
            ("images", "id", str),
            ("images", "id", float),
            ("annotations", "image_id", str),
            ("annotations", "category_id", str),
            ("annotations", "category_id", float),
            ("categories", "id", str),
            ("images", "width", float),
            ("images", "width", lambda value: -1),
            ("images", "height", lambda value: 0),
            ("images", "height", None),
            ("images", "height", lambda value: None),
            ("annotations", "area", lambda value: [value]),
            ("annotations", "area", lambda value: None),
            ("annotations", "area", None),
            ("annotations", "iscrowd", float),
            ("annotations", "iscrowd", bool),
            ("annotations", "iscrowd", str),
            ("annotations", "iscrowd", lambda value: None),
            ("annotations", "bbox", lambda value: [str(number) for number in value]),
            ("annotations", "id", None),
        ],
    )
    def test_they_all_mean_the_same(self, tmp_path, table, key, change, capsys):
        path = coco(tmp_path, "a.json", respell(rows(2), table, key, change))
        dataset = CocoDataset(path, tmp_path / "images")
        assert boxes_of(dataset) == EXPECTED and dataset.sizes == [(24, 32)] * 2
        assert dataset.image_ids == [1, 2] and dataset.categories == CATEGORIES
        assert dataset[1][1]["area"].tolist() == [80, 80]
        assert not dataset[1][1]["crowd"].any() and capsys.readouterr() == ("", "")
        if key not in ("bbox", "width", "height"):
            assert len(read_coco(path)["annotations"]) == 3  # as `evaluate` reads the truth

    def test_numbers_as_class_names(self, tmp_path):
        content = rows(2) | {"categories": [{"id": 1, "name": 7}, {"id": 2, "name": 3.5}]}
        dataset = CocoDataset(coco(tmp_path, "a.json", content), tmp_path / "images")
        assert [row["name"] for row in dataset.categories] == ["7", "3.5"]

    def test_boxes_of_polygons(self, tmp_path):
        content = rows(2)
        for row in content["annotations"]:
            x, y, w, h = row.pop("bbox")
            row["segmentation"] = [[x, y, x + w, y, x + 1, y + h]]
        dataset = CocoDataset(coco(tmp_path, "a.json", content), tmp_path / "images")
        assert boxes_of(dataset) == EXPECTED

    @pytest.mark.parametrize("seed", range(4))
    def test_boxes_of_masks_are_those_of_pycocotools(self, seed):
        generator = np.random.default_rng(seed)
        mask = np.zeros((23, 40), dtype=np.uint8, order="F")
        for _ in range(3):
            y, x = generator.integers(0, 15), generator.integers(0, 30)
            mask[y : y + generator.integers(1, 8), x : x + generator.integers(1, 10)] = 1
        mask[:, 20:22] = seed == 3  # a run over two whole columns
        encoded = coco_mask.encode(mask)
        expected = coco_mask.toBbox(encoded).tolist()
        text = encoded["counts"].decode()
        assert box_of_outline({"size": [23, 40], "counts": text}) == expected
        changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.flatten(order="F")])))
        counts = np.diff([0, *changes, mask.size]).tolist()
        assert box_of_outline({"size": [23, 40], "counts": counts}) == expected

    @pytest.mark.parametrize(
        "outline",
        [None, [], [[]], [[1, 2, 3]], [["a", "b"]], "text", 3, {}, {"size": [2, 2]}, [{"x": 1}],
         {"size": [0, 2], "counts": [1]}, {"size": [2, 2], "counts": [4]},
         {"size": [2, 2], "counts": "\x00ÿ"}, {"size": [2, 2], "counts": [0, -3]},
         {"size": ["2", 2], "counts": [0, 3]}],
    )  # fmt: skip
    def test_what_is_no_outline_has_no_box(self, outline):
        assert box_of_outline(outline) is None

    def test_images_without_annotations_key(self, tmp_path):
        info = rows(4)
        path = coco(tmp_path, "image_info.json", {"images": info["images"]})
        assert len(CocoDataset(path, tmp_path / "images")) == 4
        coco(tmp_path / "data", "instances_train.json", rows(6))
        splits = load(tmp_path / "data", unlabelled=path, percent=100)
        assert [Path(p).name for p in splits.unlabelled.datasets[1].paths] == [
            "1.png", "2.png", "3.png", "4.png",
        ]  # fmt: skip

    @pytest.mark.parametrize("bbox", [[], None, "gone"])
    def test_placeholders_are_no_annotations(self, tmp_path, bbox, capsys):
        content = rows(6)
        blank = {"image_id": 6, "category_id": 1, "segmentation": [], "area": 0}
        content["annotations"] = [r for r in content["annotations"] if r["image_id"] < 6]
        content["annotations"] += [blank if bbox == "gone" else {**blank, "bbox": bbox}] * 3
        dataset = CocoDataset(coco(tmp_path, "a.json", content), tmp_path / "images")
        assert dataset.without_labels == [5]
        assert "3 annotations without a box" in capsys.readouterr().err

    def test_the_heading_of_roboflow_is_no_class(self, tmp_path, capsys):
        heading = {"id": 0, "name": "animals", "supercategory": "none"}
        content = rows(6)
        content["categories"] = [heading] + [
            {**row, "supercategory": "animals"} for row in CATEGORIES
        ]
        dataset = CocoDataset(coco(tmp_path, "a.json", content), tmp_path / "images")
        assert dataset.categories == CATEGORIES
        assert "'animals'" in capsys.readouterr().err
        content["annotations"][0]["category_id"] = 0  # somebody used it
        dataset = CocoDataset(coco(tmp_path, "a.json", content), tmp_path / "images")
        assert len(dataset.categories) == 3

    def test_a_few_faulty_annotations_are_counted_and_many_refused(self, tmp_path, capsys):
        content = rows(300)
        content["annotations"][7]["image_id"] = 999
        path = coco(tmp_path, "a.json", content)
        dataset = CocoDataset(path, tmp_path / "images")
        assert len(dataset.fields["boxes"]) == 449
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "1 annotations" in said and "image_id 999" in said
        for row in content["annotations"][:20]:
            row["image_id"] = 999
        write(path, json.dumps(content))
        refusal(lambda: CocoDataset(path, tmp_path / "images"), "annotation 1 ", "19 more")


# ---- VOC and YOLO --------------------------------------------------------------------------------


class TestVocFolders:
    @pytest.mark.parametrize(
        "images, labels", [("", ""), ("images", "annots"), ("pics/all", "xmls"), ("JPEGImages", "")]
    )
    def test_names_of_the_folders(self, tmp_path, images, labels):
        for name in ("im.0", "b", "ü 1"):
            picture(tmp_path / images / f"{name}.png")
            write(tmp_path / labels / f"{name}.xml", xml(thing("dog", 3, 4, 12, 11)))
        train, val = find_annotations(tmp_path)
        assert val is None and boxes_of(CocoDataset(train)) == [[[2, 3, 12, 11]]] * 3

    def test_splits_as_folders(self, tmp_path):
        for split, names in (("train", "abc"), ("valid", "ab"), ("test", "x")):
            for name in names:  # the same names in two splits
                picture(tmp_path / split / f"{name}.jpg", 24, 32 if split == "train" else 40)
                size = (
                    "" if split == "valid" else "<size><width>32</width><height>24</height></size>"
                )
                write(tmp_path / split / f"{name}.xml", xml(thing("dog", 3, 4, 12, 11), size=size))
        train, val = find_annotations(tmp_path)
        assert stems(train) == list("abc") and stems(val) == list("ab")
        assert CocoDataset(val).sizes == [(24, 40)] * 2 and len(CocoDataset(train)) == 3

    def test_swapped_corners_are_put_right_and_counted(self, tmp_path, capsys):
        folder = voc(tmp_path)
        write(folder / "Annotations" / "c.xml", xml(thing("dog", 12, 11, 3, 4)))
        assert boxes_of(CocoDataset(find_annotations(folder)[0]))[2] == [[2, 3, 12, 11]]
        assert "1 boxes the corners are swapped" in capsys.readouterr().err

    def test_an_image_without_xml_is_unlabelled_and_an_empty_xml_is_background(self, tmp_path):
        folder = voc(tmp_path)
        (folder / "Annotations" / "c.xml").unlink()
        write(folder / "Annotations" / "d.xml", xml())
        picture(folder / "elsewhere" / "z.jpg")  # beside no labelled image: not looked at
        dataset = CocoDataset(find_annotations(folder)[0])
        assert [dataset.names[index] for index in dataset.without_labels] == ["JPEGImages/c.jpg"]
        assert len(dataset) == 8

    def test_masks_beside_the_photographs_are_no_images(self, tmp_path):
        folder = voc(tmp_path)
        picture(folder / "SegmentationClass" / "a.png")
        dataset = CocoDataset(find_annotations(folder)[0])
        assert len(dataset) == 8 and all("JPEG" in name for name in dataset.names)

    def test_xml_of_another_kind(self, tmp_path):
        picture(tmp_path / "a.png")
        path = write(tmp_path / "annotations.xml", "<annotations><image/></annotations>")
        refusal(lambda: load(tmp_path), tmp_path, path, "another kind")


class TestYolo:
    def test_outlines_and_scores(self, tmp_path, capsys):
        folder = yolo(tmp_path)
        lines = "1 0.125 0.25 0.5 0.25 0.25 0.75\n0 .5 .5 .25 .5 0.87\n1 0 0 .5 0 .5 .5 0 .5\n"
        write(folder / "labels" / "train" / "b.txt", lines)
        dataset = CocoDataset(find_annotations(folder)[0])
        assert boxes_of(dataset)[1] == [[4, 6, 16, 18], [12, 6, 20, 18], [0, 0, 16, 12]]
        said = capsys.readouterr().err
        assert "2 lines are outlines" in said and "1 lines have a sixth number" in said

    def test_text_files_beside_the_images(self, tmp_path):
        for name in "abc":
            picture(tmp_path / "photos" / f"{name}.png")
            write(tmp_path / "photos" / f"{name}.txt", "0 0.5 0.5 0.25 0.5")
        write(tmp_path / "photos" / "d.txt", "some notes")
        write(tmp_path / "classes.txt", "dog\n")
        dataset = CocoDataset(find_annotations(tmp_path)[0])
        assert boxes_of(dataset) == [[[12, 6, 20, 18]]] * 3

    def test_darknet_names(self, tmp_path):
        picture(tmp_path / "obj_train_data" / "a.png")
        write(tmp_path / "obj_train_data" / "a.txt", "1 0.5 0.5 0.25 0.5")
        write(tmp_path / "obj.names", "cat\ndog\n")
        write(tmp_path / "train.txt", "data/obj_train_data/a.png")
        train, _ = find_annotations(tmp_path)
        assert train.problems == [] and boxes_of(CocoDataset(train)) == [[[12, 6, 20, 18]]]

    def test_the_yaml_itself(self, tmp_path):
        assert stems(find_annotations(yolo(tmp_path) / "data.yaml")[0]) == list("abcd")

    def test_without_a_text_file_unlabelled_and_with_an_empty_one_background(self, tmp_path):
        folder = yolo(tmp_path)
        picture(folder / "images" / "train" / "e.png")
        dataset = CocoDataset(find_annotations(folder)[0])
        assert [dataset.names[index] for index in dataset.without_labels] == ["images/train/e.png"]


# ---- labelled or not -----------------------------------------------------------------------------


def ids(dataset) -> list[int]:
    return [dataset[index][1]["image_id"] for index in range(len(dataset))]


class TestMissingLabels:
    def data(self, folder: Path) -> Path:
        """Ten images, of which number 4 and number 9 have no annotation; four for validation."""
        content = rows(10)
        content["annotations"] = [r for r in content["annotations"] if r["image_id"] not in (4, 9)]
        coco(folder, "instances_train.json", content)
        val = rows(4, 50)
        val["annotations"] = [row for row in val["annotations"] if row["image_id"] != 51]
        coco(folder, "instances_val.json", val)
        return folder

    def test_they_are_unlabelled_and_counted(self, tmp_path, capsys):
        splits = load(self.data(tmp_path), percent=100)
        assert ids(splits.labelled) == [1, 2, 3, 5, 6, 7, 8, 10] and ids(splits.unlabelled) == [
            4,
            9,
        ]
        assert set(splits.unlabelled[0][1]) == {"size", "image_id"}  # and no truth to measure
        assert "2 of its 10 training images have no annotation" in capsys.readouterr().err
        assert ids(splits.test) == [50, 51, 52, 53]  # a validation json lists what was looked at
        splits = load(tmp_path, percent=50)
        assert len(splits.labelled) == 4 and ids(splits.unlabelled)[-2:] == [4, 9]
        assert sorted(ids(splits.labelled) + ids(splits.unlabelled)) == list(range(1, 11))

    def test_as_background(self, tmp_path, capsys):
        splits = load(self.data(tmp_path), percent=100, missing_labels="background")
        assert ids(splits.labelled) == list(range(1, 11)) and len(splits.unlabelled) == 0
        assert splits.labelled[3][1]["boxes"].shape == (0, 4)
        assert "as images without objects" in capsys.readouterr().err

    def test_an_image_whose_boxes_are_all_dropped_is_not_taught_as_background(self, tmp_path):
        content = rows(300)
        content["annotations"][0]["bbox"] = [5, 5, 0, 0]
        dataset = CocoDataset(coco(tmp_path, "a.json", content), tmp_path / "images")
        assert dataset.without_labels == [0]

    def test_validation_images_without_a_label_file_are_not_measured_on(self, tmp_path, capsys):
        folder = yolo(tmp_path)
        picture(folder / "images" / "val" / "f.png")
        assert len(load(folder, percent=100).test) == 1
        assert "1 of its 2 validation images" in capsys.readouterr().err
        assert len(load(folder, percent=100, missing_labels="background").test) == 2

    def test_the_held_out_fifth_is_of_labelled_images(self, tmp_path):
        self.data(tmp_path)
        (tmp_path / "instances_val.json").unlink()
        splits = load(tmp_path, percent=100)
        assert not {4, 9} & set(ids(splits.test)) and len(splits.test) == 2
        assert len(splits.labelled) == 6 and ids(splits.unlabelled) == [4, 9]


# ---- EXIF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_boxes_lie_where_pillow_turns_them(orientation):
    pixels = np.zeros((24, 32, 3), dtype=np.uint8)
    pixels[5:9, 12:28] = 255
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    seen = np.array(ImageOps.exif_transpose(image))[..., 0]
    ys, xs = np.nonzero(seen)
    expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    turned = turn_boxes(torch.tensor([[12.0, 5, 28, 9]]), (24, 32), orientation)
    assert turned.tolist() == [expected]


class TestTurnedPhotographs:
    def photo(self, path: Path, orientation: int, height: int = 24, width: int = 32) -> None:
        """A picture with a white rectangle in the stored pixels 12..28, 5..9."""
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[5:9, 12:28] = 255
        exif = Image.Exif()
        exif[0x0112] = orientation
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, exif=exif)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("declared", ["stored", "upright", "absent"])
    def test_boxes_of_a_json(self, tmp_path, orientation, declared):
        self.photo(tmp_path / "images" / "1.png", orientation)
        stored = torch.tensor([[12.0, 5, 28, 9]])
        upright = turn_boxes(stored, (24, 32), orientation)[0].tolist()
        quarter = orientation > 4
        drawn_upright = quarter and declared == "upright" or declared == "absent" and quarter
        size = (24, 32) if not (quarter and declared == "upright") else (32, 24)
        x1, y1, x2, y2 = upright if drawn_upright else stored[0].tolist()
        content = rows(1)
        content["annotations"][0]["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        content["images"][0] |= {"height": size[0], "width": size[1]}
        if declared == "absent":
            del content["images"][0]["width"]
        path = write(tmp_path / "a.json", json.dumps(content))
        image, target = CocoDataset(path, tmp_path / "images")[0]
        assert target["boxes"].tolist() == [upright]
        assert target["size"] == tuple(image.shape[1:]) == ((32, 24) if quarter else (24, 32))
        x1, y1, x2, y2 = map(int, upright)
        assert image[:, y1:y2, x1:x2].min() == 255  # the box is on the rectangle

    def test_boxes_of_voc(self, tmp_path):
        self.photo(tmp_path / "a.png", 6)
        write(tmp_path / "a.xml", xml(thing("dog", 13, 6, 28, 9)))
        image, target = CocoDataset(find_annotations(tmp_path)[0])[0]
        x1, y1, x2, y2 = map(int, target["boxes"][0].tolist())
        assert image.shape == (3, 32, 24) and image[:, y1:y2, x1:x2].min() == 255
        assert (x2 - x1) * (y2 - y1) == 64


# ---- what cannot be read -------------------------------------------------------------------------


class TestSkipUnreadable:
    def test_missing_and_broken_images_of_training_and_validation(self, tmp_path, capsys):
        coco(tmp_path, "instances_train.json", rows(10))
        coco(tmp_path, "instances_val.json", rows(5, 50))
        (tmp_path / "images" / "3.png").unlink()
        (tmp_path / "images" / "51.png").unlink()
        broken = tmp_path / "images" / "52.png"
        broken.write_bytes(broken.read_bytes()[:300])
        refusal(lambda: load(tmp_path), tmp_path / "images" / "3.png", "missing")
        splits = load(tmp_path, percent=100, skip_unreadable=True)
        assert ids(splits.labelled) == [1, 2, 4, 5, 6, 7, 8, 9, 10]
        assert ids(splits.test) == [50, 53, 54]
        said = capsys.readouterr().err
        assert "3.png" in said and "51.png" in said and "52.png" in said

    def test_label_files(self, tmp_path):
        folder = voc(tmp_path)
        write(folder / "Annotations" / "c.xml", "<annotation>")
        refusal(lambda: load(folder), "c.xml")
        splits = load(folder, percent=100, skip_unreadable=True)
        assert len(splits.labelled) + len(splits.test) == 7

    def test_everything_missing_is_refused_even_so(self, tmp_path):
        path = coco(tmp_path, "instances_train.json", rows(10))
        shutil.rmtree(tmp_path / "images")
        (tmp_path / "images").mkdir()
        refusal(lambda: load(tmp_path, skip_unreadable=True), path)


# ---- what there is to learn ----------------------------------------------------------------------


class TestNothingToLearn:
    def test_all_crowd(self, tmp_path):
        content = respell(rows(10), "annotations", "iscrowd", lambda value: 1)
        coco(tmp_path, "instances_train.json", content)
        refusal(lambda: load(tmp_path), "15 boxes are crowd", "nothing to learn")

    @pytest.mark.parametrize("missing_labels", ["unlabelled", "background"])
    def test_no_annotation(self, tmp_path, missing_labels):
        coco(tmp_path, "instances_train.json", {**rows(10), "annotations": []})
        refusal(lambda: load(tmp_path, missing_labels=missing_labels), "nothing to learn")

    def test_validation_without_boxes_is_said(self, tmp_path, capsys):
        coco(tmp_path, "instances_train.json", rows(10))
        coco(tmp_path, "instances_val.json", {**rows(5, 50), "annotations": []})
        assert len(load(tmp_path, percent=100).test) == 5
        assert "AP cannot be measured" in capsys.readouterr().err

    def test_fractions_instead_of_pixels(self, tmp_path):
        content = rows(10)
        for row in content["annotations"]:
            row["bbox"] = [value / 32 for value in row["bbox"]]
        coco(tmp_path, "instances_train.json", content)
        refusal(lambda: load(tmp_path), "fractions of the image")

    def test_corners_instead_of_sides(self, tmp_path):
        content = rows(10)
        for row in content["annotations"]:
            row["bbox"] = [10.0, 6.0, 30.0, 20.0]
        coco(tmp_path, "instances_train.json", content)
        refusal(lambda: load(tmp_path), "[x1, y1, x2, y2]")

    def test_large_objects_are_not_taken_for_corners(self, tmp_path):
        content = rows(10)
        for row in content["annotations"]:
            row["bbox"] = [2.0, 2.0, 29.0, 21.0]
        coco(tmp_path, "instances_train.json", content)
        assert len(load(tmp_path, percent=100).labelled) == 8

    def test_all_classes_without_a_label_are_named(self, tmp_path, capsys):
        content = rows(20)
        names = [{"id": 3 + i, "name": f"rare {i}"} for i in range(6)] + [{"id": 99, "name": "ox"}]
        content["categories"] = CATEGORIES + names
        for place in range(6):
            row = {"image_id": 20 - place, "category_id": 3 + place, "bbox": [1, 1, 9, 9]}
            content["annotations"].append(row)
        coco(tmp_path, "instances_train.json", content)
        coco(tmp_path, "instances_val.json", {**rows(5, 50), "categories": content["categories"]})
        load(tmp_path, percent=10)
        said = capsys.readouterr().err
        there = {line for line in said.splitlines() if "classes have no box" in line}
        assert len(there) == 2 and "'ox'" in said
        assert sum(f"'rare {i}'" in said for i in range(6)) >= 4
        load(tmp_path, percent=40, stratified=True)
        assert "rare" not in capsys.readouterr().err  # every class has its image


class TestValidationClasses:
    def test_the_same_names_under_other_ids(self, tmp_path):
        coco(tmp_path, "instances_train.json", rows(10))
        val = rows(4, 50)
        val["categories"] = [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}]
        for row in val["annotations"]:
            row["category_id"] = {1: 9, 2: 7}[row["category_id"]]
        coco(tmp_path, "instances_val.json", val)
        splits = load(tmp_path, percent=100)
        assert splits.test[1][1]["labels"].tolist() == [0, 1]
        assert boxes_of(splits.test)[:2] == EXPECTED

    def test_a_class_that_only_training_has(self, tmp_path):
        coco(tmp_path, "instances_train.json", rows(10))
        val = rows(4, 50)
        val["categories"] = val["categories"][:1]
        val["annotations"] = [row for row in val["annotations"] if row["category_id"] == 1]
        coco(tmp_path, "instances_val.json", val)
        assert load(tmp_path, percent=100).test[1][1]["labels"].tolist() == [0]

    def test_a_class_that_training_does_not_have(self, tmp_path):
        coco(tmp_path, "instances_train.json", rows(10))
        val = rows(4, 50)
        val["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "ox"}]
        coco(tmp_path, "instances_val.json", val)
        refusal(lambda: load(tmp_path), "'ox'", "'dog'")


def test_an_object_may_have_no_box(tmp_path):
    write(tmp_path / "a.xml", xml(f"<object><name>dog</name></object>{BOX}"))
    picture(tmp_path / "a.png")
    refusal(lambda: load(tmp_path), "a.xml", "bndbox")
