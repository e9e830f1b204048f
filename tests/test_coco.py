"""COCO-format data: what is read, how it is split, and one line for every defect."""

import copy
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semidetr_lite.data import images as image_files
from semidetr_lite.data.coco import CocoDataset, load, read_coco_json
from semidetr_lite.data.images import ImageFolder, header_size, read_image
from semidetr_lite.errors import UserError

REAL = Path(__file__).parents[2] / "shared" / "data" / "coco-permissive-320"
CATEGORIES = [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 40, "name": "cow"}]


def picture(path: Path, height: int = 24, width: int = 32, seed: int = 0, **saving) -> np.ndarray:
    """Write a noisy image of whole RGB values and give back its pixels (H, W, 3)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **saving)
    return pixels


def box(number: int, image: int, category: int, *xywh, **others) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(xywh), **others}


def document(images: int = 3) -> dict:
    """Three annotations on image 11 (one a crowd region), one on image 10, none on the others."""
    rows = [
        {"id": 10 + i, "file_name": f"{i}.png", "height": 24, "width": 32} for i in range(images)
    ]
    boxes = [
        box(1, 11, 40, 1, 2, 10, 12, area=77.5, iscrowd=0),
        box(2, 10, 2, 0, 0, 32, 24),
        box(3, 11, 2, 20.25, 4.5, 6, 8, area=40, iscrowd=1),
        box(4, 11, 9, 3, 3, 5, 5, area=25, iscrowd=0),
    ]
    return {"images": rows, "annotations": boxes, "categories": CATEGORIES}


def full(images: int = 3) -> dict:
    """The same, and a cat on every image."""
    content = document(images)
    cats = [box(100 + number, 10 + number, 2, 1, 1, 9, 9) for number in range(images)]
    return {**content, "annotations": content["annotations"] + cats}


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def make(
    folder: Path, content: dict | None = None, json_name="instances_train.json", images="images"
) -> Path:
    """A data set on disk: the json in `folder`, its pictures in folder/`images`."""
    content = content or document()
    for place, row in enumerate(content["images"]):
        picture(folder / images / row["file_name"], row["height"], row["width"], seed=place)
    return write(folder / json_name, content)


def image_ids(dataset) -> list[int]:
    return [dataset[index][1]["image_id"] for index in range(len(dataset))]


class TestCocoDataset:
    def test_what_comes_out(self, tmp_path, capsys):
        dataset = CocoDataset(make(tmp_path), tmp_path / "images")
        assert dataset.categories == [
            {"id": 2, "name": "cat"},
            {"id": 9, "name": "dog"},
            {"id": 40, "name": "cow"},
        ]
        assert (
            len(dataset) == 3
            and dataset.sizes == [(24, 32)] * 3
            and dataset.image_ids == [10, 11, 12]
        )
        image, target = dataset[1]
        assert image.dtype == torch.uint8 and image.shape == (3, 24, 32)
        expected = picture(tmp_path / "again.png", seed=1)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
        assert target["boxes"].tolist() == [[1, 2, 11, 14], [20.25, 4.5, 26.25, 12.5], [3, 3, 8, 8]]
        assert target["labels"].tolist() == [2, 0, 1] and target["crowd"].tolist() == [
            False,
            True,
            False,
        ]
        assert target["area"].tolist() == [77.5, 40, 25]
        assert target["size"] == (24, 32) and target["image_id"] == 11
        types = {
            "boxes": torch.float32,
            "labels": torch.int64,
            "crowd": torch.bool,
            "area": torch.float32,
        }
        assert {name: target[name].dtype for name in types} == types
        assert dataset[0][1]["area"].tolist() == [32 * 24]  # the box's own, where the json has none
        assert capsys.readouterr() == ("", "")

    def test_image_without_boxes(self, tmp_path):
        target = CocoDataset(make(tmp_path), tmp_path / "images")[2][1]
        assert (
            target["boxes"].shape == (0, 4)
            and target["labels"].shape == (0,)
            and target["crowd"].shape == (0,)
        )
        content = {**document(), "annotations": []}
        target = CocoDataset(make(tmp_path / "none", content), tmp_path / "none" / "images")[0][1]
        assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32

    def test_changing_a_target_leaves_the_data_set_alone(self, tmp_path):
        dataset = CocoDataset(make(tmp_path), tmp_path / "images")
        dataset[1][1]["boxes"].zero_()
        assert dataset[1][1]["boxes"].sum() > 0
        assert dataset.target(-1)["image_id"] == 12 and len(list(dataset)) == 3

    def test_files_in_folders_below(self, tmp_path):
        content = document()
        content["images"][2]["file_name"] = "deep/er/2.png"
        dataset = CocoDataset(
            make(tmp_path, content), [tmp_path / "elsewhere", tmp_path, tmp_path / "images"]
        )
        assert dataset.image_dir == tmp_path / "images" and dataset[2][0].shape == (3, 24, 32)

    def test_rotation_in_exif_is_not_applied(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # "turn by 90 degrees to see it upright"
        pixels = picture(tmp_path / "turned.png", 24, 32, exif=exif)
        assert np.array_equal(read_image(tmp_path / "turned.png").permute(1, 2, 0).numpy(), pixels)

    def test_boxes_drawn_on_the_upright_image(self, tmp_path):
        path = make(tmp_path, document() | {"annotations": []})
        content = json.loads(path.read_text())
        content["images"][1] |= {"height": 32, "width": 24}
        exif = Image.Exif()
        exif[0x0112] = 6
        pixels = picture(tmp_path / "images" / "1.png", 24, 32, exif=exif)
        image, target = CocoDataset(write(path, content), tmp_path / "images")[1]
        assert target["size"] == (32, 24) and np.array_equal(
            image.permute(1, 2, 0).numpy(), np.rot90(pixels, -1)
        )

    def test_difficult_objects_are_marked(self, tmp_path):
        content = document()
        content["annotations"][3]["difficult"] = 1
        dataset = CocoDataset(make(tmp_path, content), tmp_path / "images")
        assert dataset.target(1)["difficult"].tolist() == [False, False, True]
        assert (
            dataset.target(2)["difficult"].shape == (0,)
            and dataset.target(2)["difficult"].dtype == torch.bool
        )
        assert "difficult" not in CocoDataset(
            make(tmp_path / "b"), tmp_path / "b" / "images"
        ).target(1)

    @pytest.mark.parametrize("indent", [None, 1])
    def test_outlines_are_left_out_and_nothing_else(self, tmp_path, indent, monkeypatch):
        content = document()
        content["annotations"][0]["segmentation"] = [[1, 2.5, -3e-2, 4], [5, 6]]
        content["annotations"][1]["segmentation"] = []
        content["annotations"][2]["segmentation"] = {"counts": [1, 2], "size": [24, 32]}
        content["images"][0]["file_name"] = 'a "segmentation": [[1]] b.png'
        content["info"] = {"segmentation": "kept", "other": [[1, 2]]}
        path = write(tmp_path / "a.json", json.dumps(content, indent=indent))
        expected = copy.deepcopy(content)
        expected["annotations"][0]["segmentation"] = []
        assert read_coco_json(path) == expected
        path.write_text(path.read_text()[:-1])
        end = path.read_text().count("\n") + 1
        refused(path, tmp_path, f"line {end} ")

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
    def test_every_mode_becomes_rgb(self, tmp_path, mode):
        path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
        Image.new("RGB", (8, 6), "white").convert(mode).save(path)
        image = read_image(path)
        assert image.shape == (3, 6, 8) and image.dtype == torch.uint8 and image.min() >= 250

    def test_boxes_are_cut_or_dropped_and_counted(self, tmp_path, capsys):
        content = document()
        good = [box(100 + i, 12, 2, 1, 1, 5, 5) for i in range(600)]
        bad = [
            box(7, 12, 2, 0, 0, 0, 5),
            box(8, 12, 2, 5, 5, 3, -2),
            box(9, 12, 2, 32, 3, 5, 5),  # touches the right edge from outside
            box(20, 12, 2, -9, 3, 5, 5),
            box(21, 12, 2, float("nan"), 3, 5, 5),
            box(22, 12, 2, 0, float("inf"), 5, 5),
        ]
        over = [
            box(30, 10, 9, -0.5, 0, 10, 24.9),
            box(31, 10, 9, 28, 20, 8, 8),
            box(32, 10, 9, -3, 0, 5, 5),
        ]
        content["annotations"] += good + bad + over
        path = make(tmp_path, content)
        dataset = CocoDataset(path, tmp_path / "images")
        assert dataset.target(2)["boxes"].tolist() == [[1, 1, 6, 6]] * 600
        assert dataset.target(0)["boxes"].tolist()[1:] == [
            [0, 0, 9.5, 24],
            [28, 20, 32, 24],
            [0, 0, 2, 5],
        ]
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and str(path) in err
        dropped, cut = err.split(";")
        assert "6 boxes" in dropped and "annotation 7" in dropped
        assert "2 boxes" in cut and "annotation 31" in cut

    @pytest.mark.parametrize("beyond, counted", [(0.9, False), (1.1, True)])
    def test_a_box_is_counted_as_cut_from_more_than_a_pixel_on(
        self, tmp_path, capsys, beyond, counted
    ):
        content = document()
        content["annotations"] += [box(30, 10, 9, 22, 5, 10 + beyond, 9)]
        dataset = CocoDataset(make(tmp_path, content), tmp_path / "images")
        assert dataset.target(0)["boxes"][-1].tolist() == [22, 5, 32, 14]
        assert ("annotation 30" in capsys.readouterr().err) == counted

    @pytest.mark.parametrize(
        "xywh", [(0, 0, 0, 5), (5, 5, 3, -2), (40, 3, 5, 5), (float("nan"), 1, 2, 3)]
    )
    def test_a_file_with_many_unusable_boxes_is_refused(self, tmp_path, xywh):
        content = document()
        content["annotations"].append(box(77, 12, 2, *xywh))
        refused(make(tmp_path, content), tmp_path / "images", "1 of 5 boxes", "annotation 77")


def refused(path: Path, images: Path, *words: str, names: Path | None = None) -> None:
    """Opening the data raises one line with `words` that names the json, or `names`."""
    with pytest.raises(UserError) as error:
        CocoDataset(path, images)
    one_line(error.value, names or path, *words)


def one_line(error: UserError, path: Path, *words: str) -> None:
    message = str(error)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message


def without(content: dict, key: str) -> dict:
    return {name: value for name, value in content.items() if name != key}


class TestBadJson:
    @pytest.mark.parametrize("content", ["", "{", '{"images": [}', "\0\1\2"])
    def test_malformed(self, tmp_path, content):
        refused(write(tmp_path / "a.json", content), tmp_path, "not valid json")

    def test_not_text(self, tmp_path):
        (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00\x80")
        refused(tmp_path / "a.json", tmp_path, "not valid json")

    def test_missing(self, tmp_path):
        refused(tmp_path / "none.json", tmp_path, "No such file")
        refused(tmp_path, tmp_path, "cannot be read")

    @pytest.mark.parametrize(
        "content, word",
        [
            ([], "object"),
            ("text", "not valid json"),
            (3, "object"),
            (without(document(), "images"), '"images"'),
            ({**document(), "annotations": None, "images": {}}, '"images"'),
            ({**document(), "annotations": {}}, '"annotations"'),
            (without(document(), "categories"), '"categories"'),
            ({**document(), "images": {}}, '"images"'),
            ({**document(), "annotations": [1]}, '"annotations"'),
            ({**document(), "images": []}, "empty"),
            ({**document(), "categories": []}, "empty"),
        ],
    )
    def test_not_coco(self, tmp_path, content, word):
        refused(write(tmp_path / "a.json", content), tmp_path, word)

    @pytest.mark.parametrize(
        "part, change, words",
        [
            ("images", {"id": 10}, ["two of the images have the id 10"]),
            ("images", {"id": "x"}, ["whole number"]),
            ("images", {"file_name": None}, ["file_name", "12"]),
            ("images", {"file_name": "."}, ["file_name"]),
            ("categories", {"id": 9}, ["two of the categories have the id 9"]),
            ("categories", {"name": None}, ["name", "40"]),
            ("annotations", {"category_id": 3}, ["annotation 4", "category_id 3", "categories"]),
            ("annotations", {"category_id": [3]}, ["annotation 4", "category_id"]),
            ("annotations", {"image_id": 99}, ["annotation 4", "image_id 99", "images"]),
            ("annotations", {"bbox": [1, 2, 3]}, ["annotation 4", "4 numbers"]),
            ("annotations", {"bbox": [1, 2, 3, "wide"]}, ["annotation 4", "4 numbers"]),
            ("annotations", {"iscrowd": 5}, ["annotation 4", "iscrowd"]),
            ("annotations", {"difficult": "no"}, ["annotation 4", "difficult"]),
        ],
    )
    def test_bad_row(self, tmp_path, part, change, words):
        path = make(tmp_path)
        content = copy.deepcopy(document())
        content[part][-1].update(change)
        refused(write(path, content), tmp_path / "images", *words)

    def test_a_file_name_that_stays_inside(self, tmp_path):
        path = make(tmp_path)
        content = document()
        content["images"][2]["file_name"] = "a/../2.png"
        (tmp_path / "images" / "a").mkdir()
        assert CocoDataset(write(path, content), tmp_path / "images")[2][0].shape == (3, 24, 32)


class TestBadImages:
    def test_no_folder(self, tmp_path):
        refused(make(tmp_path), tmp_path / "elsewhere", "elsewhere: no such folder")

    def test_a_folder_of_other_images(self, tmp_path):
        picture(tmp_path / "others" / "a.png")
        refused(make(tmp_path), tmp_path / "others", "0.png", str(tmp_path / "others"))

    def test_a_missing_image_is_found_at_opening(self, tmp_path):
        path = make(tmp_path)
        (tmp_path / "images" / "2.png").unlink()
        refused(path, tmp_path / "images", str(path), names=tmp_path / "images" / "2.png")

    @pytest.mark.parametrize("damage", ["truncated", "text", "empty", "gone"])
    def test_unreadable(self, tmp_path, damage):
        dataset = CocoDataset(make(tmp_path), tmp_path / "images")
        path = tmp_path / "images" / "1.png"
        content = {"truncated": path.read_bytes()[:900], "text": b"no image", "empty": b""}
        path.unlink() if damage == "gone" else path.write_bytes(content[damage])
        dataset[0]
        with pytest.raises(UserError) as error:
            dataset[1]
        one_line(error.value, path, "not a readable image")

    def test_truncated_jpeg(self, tmp_path):
        path = tmp_path / "a.jpg"
        picture(path, 64, 64)
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(UserError) as error:
            read_image(path)
        one_line(error.value, path, "truncated")

    def test_sixteen_bits_are_not_squeezed_into_white(self, tmp_path):
        Image.fromarray(np.full((6, 8), 30000, dtype=np.uint16)).save(tmp_path / "a.png")
        with pytest.raises(UserError) as error:
            read_image(tmp_path / "a.png")
        one_line(error.value, tmp_path / "a.png", "8 bits")

    def test_sixteen_bits_of_colour_keep_their_high_byte(self, tmp_path):
        row = b"\0" + bytes([200, 7, 100, 0, 50, 255]) * 2  # two pixels of 3 x 16 bits
        chunks = [
            (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(row)),
            (b"IEND", b""),
        ]
        body = b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        assert read_image(tmp_path / "a.png")[:, 0, 1].tolist() == [200, 100, 50]

    def test_transparent_palettes_and_animations(self, tmp_path, recwarn):
        palette = Image.new("P", (4, 3))
        palette.putpalette([255, 0, 0, 0, 255, 0])
        palette.save(tmp_path / "a.png", transparency=b"\x00\xff")
        frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
        for name in ("a.gif", "b.png", "a.tiff"):
            frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        for name in ("a.png", "a.gif", "b.png", "a.tiff"):
            assert read_image(tmp_path / name)[:, 0, 0].tolist() == [255, 0, 0]
        assert not list(recwarn) and len(ImageFolder(tmp_path)) == 4

    @pytest.mark.parametrize(
        "factor", [1.5, 3]
    )  # Pillow warns over its limit, and raises over twice that
    def test_far_too_many_pixels(self, tmp_path, factor, monkeypatch, recwarn):
        picture(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(24 * 32 / factor))
        for read in (read_image, header_size):
            with pytest.raises(UserError) as error:
                read(tmp_path / "a.png")
            one_line(error.value, tmp_path / "a.png", "pixels", "make it smaller")
        assert not list(recwarn)

    def test_another_size_than_declared(self, tmp_path):
        dataset = CocoDataset(make(tmp_path), tmp_path / "images")
        picture(tmp_path / "images" / "1.png", height=32, width=24)
        with pytest.raises(UserError) as error:
            dataset[1]
        one_line(
            error.value, tmp_path / "images" / "1.png", "24 x 32", "32 x 24", str(dataset.source)
        )


class TestImageFolder:
    def test_any_tree_in_order(self, tmp_path):
        names = ["b.JPG", "a/z.png", "a/b/c.webp", "c.jpeg", "d.bmp"]
        for place, name in enumerate(names):
            picture(tmp_path / name, height=10 + place, width=20)
        write(tmp_path / "notes.txt", "no image")
        write(tmp_path / "._b.jpg", "a shadow that some systems leave behind")
        dataset = ImageFolder(tmp_path, first_id=50)
        assert [str(path.relative_to(tmp_path)) for path in dataset.paths] == sorted(names)
        assert dataset.sizes == [(10 + names.index(name), 20) for name in sorted(names)]
        image, target = dataset[1]
        assert image.shape == (3, *dataset.sizes[1]) and target == {
            "size": dataset.sizes[1],
            "image_id": 51,
        }
        assert dataset[-1][1]["image_id"] == 54

    def test_bad_folders(self, tmp_path):
        (tmp_path / "empty" / "below").mkdir(parents=True)
        write(tmp_path / "broken" / "a.png", "no image")
        for name, word in [
            ("empty", "no image"),
            ("none", "no such folder"),
            ("broken", "not a readable image"),
        ]:
            with pytest.raises(UserError) as error:
                _ = ImageFolder(tmp_path / name).sizes
            one_line(error.value, tmp_path / name, word)

    def test_headers_are_read_when_sizes_are_asked_for_and_bad_ones_counted(
        self, tmp_path, monkeypatch, capsys
    ):
        for name in "abc":
            picture(tmp_path / f"{name}.png")
        write(tmp_path / "d.png", "no image")
        (tmp_path / "e.png").symlink_to("nowhere.png")
        looks = []
        monkeypatch.setattr(
            image_files,
            "header_size",
            lambda path, upright: looks.append(path) or header_size(path, upright),
        )
        dataset = ImageFolder(tmp_path)
        assert len(dataset) == 5 and dataset[0][1]["size"] == (24, 32) and not looks
        assert dataset.sizes == [(24, 32)] * 3 + [(0, 0)] * 2 and dataset.sizes and len(looks) == 5
        out, err = capsys.readouterr()
        assert (
            out == ""
            and err.count("\n") == 1
            and "2 of 5 images are left out" in err
            and "d.png" in err
        )

    def test_links_are_followed_and_no_file_is_taken_twice(self, tmp_path):
        picture(tmp_path / "store" / "1.png")
        picture(tmp_path / "store" / "deep" / "2.png")
        picture(tmp_path / "data" / "own ä 中.png")
        (tmp_path / "data" / "z.png").symlink_to(tmp_path / "store" / "1.png")
        (tmp_path / "data" / "more").symlink_to(tmp_path / "store")
        (tmp_path / "store" / "round").symlink_to(tmp_path / "data")  # a circle
        dataset = ImageFolder(tmp_path / "data")
        assert sorted(path.name for path in dataset.paths) in (
            ["1.png", "2.png", "own ä 中.png"],
            ["2.png", "own ä 中.png", "z.png"],
        )
        assert dataset[0][0].shape == (3, 24, 32)

    def test_images_are_turned_upright(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        pixels = picture(tmp_path / "turned.png", 24, 32, exif=exif)
        dataset = ImageFolder(tmp_path)
        image, target = dataset[0]
        assert dataset.sizes == [(32, 24)] and target["size"] == (32, 24)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.rot90(pixels, -1))


class TestLoad:
    def test_percent_splits_the_training_images(self, tmp_path, capsys):
        make(tmp_path, full(20), images="train")
        make(tmp_path, full(4), "instances_val.json", images="val")
        splits = load(tmp_path, percent=20, fold=1)
        labelled, unlabelled = image_ids(splits.labelled), image_ids(splits.unlabelled)
        assert len(labelled) == 4 and sorted(labelled + unlabelled) == list(range(10, 30))
        assert splits.tune is splits.test and image_ids(splits.test) == [10, 11, 12, 13]
        assert splits.flip and [row["id"] for row in splits.categories] == [2, 9, 40]
        assert len(splits.unlabelled.sizes) == 16
        for index in range(16):
            target = splits.unlabelled[index][1]
            assert not {"boxes", "labels", "crowd", "area"} & set(target)
            assert target["truth"]["image_id"] == target["image_id"]
        assert image_ids(load(tmp_path, percent=20, fold=1).labelled) == labelled
        assert image_ids(load(tmp_path, percent=20, fold=2).labelled) != labelled
        everything = load(tmp_path, percent=100)
        assert len(everything.labelled) == 20 and len(everything.unlabelled) == 0
        said = capsys.readouterr()
        assert said.out == "" and "images" not in said.err.replace("labelled images", "")

    @pytest.mark.parametrize("place", ["", "annotations/"])
    @pytest.mark.parametrize(
        "train, val", [("images", "images"), ("train2017", "val2017"), ("", "")]
    )
    def test_layouts(self, tmp_path, place, train, val):
        other = full()
        for row in other["images"]:
            row["file_name"] = "v" + row["file_name"]
        for name, images, content in [("train2017", train, full()), ("val2017", val, other)]:
            path = make(tmp_path, content, f"{place}instances_{name}.json", images)
            assert path.parent == tmp_path / place
        splits = load(tmp_path)
        assert splits.labelled[0][0].shape == splits.test[2][0].shape == (3, 24, 32)

    def test_without_validation_a_fifth_is_set_aside(self, tmp_path, capsys):
        path = make(tmp_path, full(20))
        splits = load(path, images=tmp_path / "images", percent=25)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "classes" not in line]
        assert out == "" and len(lines) == 1
        assert str(path) in lines[0] and "4 of its 20 images" in lines[0]
        held_out, labelled, unlabelled = map(
            image_ids, (splits.test, splits.labelled, splits.unlabelled)
        )
        assert len(held_out) == 4 and len(labelled) == 4
        assert sorted(held_out + labelled + unlabelled) == list(range(10, 30))
        assert (
            image_ids(load(path, images=tmp_path / "images", percent=50, fold=3).test) == held_out
        )
        two = load(
            make(tmp_path / "two", full(2)),
            images=tmp_path / "two" / "images",
        )
        assert (len(two.test), len(two.labelled), len(two.unlabelled)) == (1, 1, 0)

    def test_validation_given(self, tmp_path):
        train = make(tmp_path, full(6), "a.json", images="one")
        val = make(tmp_path, full(4), "b.json", images="b")
        splits = load(train, images=tmp_path / "one", validation=val)
        assert len(splits.test) == 4 and len(splits.labelled) + len(splits.unlabelled) == 6
        # Images of the same names in two folders: the folder named as the json is the one meant.
        assert splits.test.image_dir == tmp_path / "b"
        splits = load(train, images=tmp_path / "one", validation=val.rename(tmp_path / "c.json"))
        assert splits.test.image_dir == tmp_path / "one"

    def test_a_folder_of_unlabelled_images(self, tmp_path):
        train = make(tmp_path / "data", full(6))
        val = make(tmp_path / "data", full(4), "v.json", images="v")
        for name in "ab":
            picture(tmp_path / "more" / f"{name}.jpg", 12, 16)
        data = {
            "data": train,
            "images": tmp_path / "data" / "images",
            "unlabelled": tmp_path / "more",
        }
        splits = load(**data, validation=val, percent=50)
        assert len(splits.labelled) == 3 and len(splits.unlabelled) == 5
        assert splits.unlabelled.sizes == [(24, 32)] * 3 + [(12, 16)] * 2
        assert image_ids(splits.unlabelled)[3:] == [16, 17]  # after the largest id of the jsons
        assert "truth" in splits.unlabelled[2][1] and "truth" not in splits.unlabelled[3][1]
        assert splits.unlabelled[-1][0].shape == (3, 12, 16)
        with pytest.raises(IndexError):
            splits.unlabelled[5]
        splits = load(**data, validation=val, percent=100)
        assert len(splits.labelled) == 6 and image_ids(splits.unlabelled) == [16, 17]

    def test_ids_of_unlabelled_images_clash_with_no_json(self, tmp_path):
        train = make(tmp_path / "data", full(6))
        val_content = full(4)
        for row in val_content["images"]:
            row["id"] += 500
        for row in val_content["annotations"]:
            row["image_id"] += 500
        val = make(tmp_path / "data", val_content, "v.json", images="v")
        picture(tmp_path / "more" / "a.jpg", 12, 16)
        images = tmp_path / "data" / "images"
        more = tmp_path / "more"
        splits = load(train, images, unlabelled=more, validation=val, percent=100)
        assert image_ids(splits.test) == [510, 511, 512, 513]
        assert image_ids(splits.unlabelled) == [514]

    def test_a_labelled_link_is_not_unlabelled_as_well(self, tmp_path):
        make(tmp_path / "data", full(4))
        (tmp_path / "pool").mkdir()
        for name in ("1.png", "3.png"):
            (tmp_path / "data" / "images" / name).rename(tmp_path / "pool" / name)
            (tmp_path / "data" / "images" / name).symlink_to(tmp_path / "pool" / name)
        picture(tmp_path / "pool" / "new one.png")
        splits = load(tmp_path / "data", unlabelled=tmp_path / "pool", percent=100)
        assert [path.name for path in splits.unlabelled.datasets[1].paths] == ["new one.png"]

    def test_images_of_the_jsons_are_not_unlabelled_as_well(self, tmp_path, capsys):
        make(tmp_path, full(6))
        make(tmp_path, full(4), "instances_val.json", images="images/val")
        picture(tmp_path / "images" / "new.png")
        (tmp_path / "link").symlink_to(tmp_path / "images")
        splits = load(tmp_path, unlabelled=tmp_path / "link", percent=100)
        assert [path.name for path in splits.unlabelled.datasets[1].paths] == ["new.png"]
        assert "10 of its 11 images" in capsys.readouterr().err
        splits = load(
            tmp_path, images=tmp_path / "link", unlabelled=tmp_path / "images", percent=100
        )
        assert len(splits.unlabelled) == 1
        (tmp_path / "images" / "new.png").unlink()
        bad_load(tmp_path / "link", "none is left", data=tmp_path, unlabelled=tmp_path / "link")

    def test_nothing_to_find(self, tmp_path):
        bad_load(tmp_path, "no instances_train*.json", data=tmp_path)
        bad_load(tmp_path / "none", "No such file", data=tmp_path / "none")
        path = make(tmp_path, images="hidden")
        (tmp_path / "hidden" / "0.png").rename(tmp_path / "hidden" / "other.png")
        bad_load(path, "0.png", data=tmp_path)
        (tmp_path / "hidden" / "other.png").rename(tmp_path / "hidden" / "0.png")
        bad_load(
            tmp_path / "nowhere",
            "nowhere: no such folder",
            data=tmp_path,
            images=tmp_path / "nowhere",
        )
        bad_load(
            tmp_path / "v.json",
            "No such file",
            data=tmp_path,
            images=tmp_path / "hidden",
            validation=tmp_path / "v.json",
        )
        (tmp_path / "empty").mkdir()
        bad_load(
            tmp_path / "empty",
            "no image",
            data=path,
            images=tmp_path / "hidden",
            unlabelled=tmp_path / "empty",
        )

    def test_several_jsons(self, tmp_path):
        make(tmp_path, json_name="instances_train2014.json")
        make(tmp_path, json_name="annotations/instances_train2017.json")
        bad_load(tmp_path, "instances_train2014.json", data=tmp_path)

    def test_one_image_and_no_validation(self, tmp_path):
        content = full(1)
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] == 10]
        path = make(tmp_path, content)
        bad_load(path, "validation", data=tmp_path)

    @pytest.mark.parametrize(
        "categories, words",
        [
            ([*CATEGORIES[:2], {"id": 40, "name": "ox"}], ["category 40", "'ox'", "'cow'"]),
            ([*CATEGORIES, {"id": 41, "name": "ox"}], ["category 41", "'ox'", "missing"]),
        ],
    )
    def test_other_categories_in_validation(self, tmp_path, categories, words):
        train = make(tmp_path)
        val = make(
            tmp_path,
            {**full(), "annotations": [], "categories": categories},
            "instances_val.json",
        )
        bad_load(val, *words, str(train), data=tmp_path)
        write(val, {**full(), "categories": CATEGORIES[::-1]})
        assert len(load(tmp_path).test) == 3  # another order is the same


def bad_load(path: Path, *words: str, **arguments) -> None:
    with pytest.raises(UserError) as error:
        load(**arguments)
    one_line(error.value, path, *words)


@pytest.mark.skipif(not REAL.exists(), reason="the real COCO images are not beside this checkout")
def test_real_coco_images(capsys):
    splits = load(REAL, percent=10, fold=1, missing_labels="background")
    assert (len(splits.labelled), len(splits.unlabelled), len(splits.tune)) == (9, 83, 66)
    assert len(splits.categories) == 80 and splits.categories[-1] == {
        "id": 90,
        "name": "toothbrush",
    }
    content = json.loads((REAL / "instances_val.json").read_text())
    name = {row["id"]: row["name"] for row in content["categories"]}
    boxes = crowds = 0
    for index in range(len(splits.tune)):
        target = splits.tune.target(index)
        rows = [row for row in content["annotations"] if row["image_id"] == target["image_id"]]
        found = [splits.categories[label]["name"] for label in target["labels"].tolist()]
        assert found == [name[row["category_id"]] for row in rows]
        boxes, crowds = boxes + len(rows), crowds + int(target["crowd"].sum())
    assert boxes == 560 and crowds == sum(row["iscrowd"] for row in content["annotations"]) > 0
    for part in (splits.labelled, splits.unlabelled, splits.tune):
        image, target = part[len(part) - 1]
        assert image.shape[1:] == target["size"] == part.sizes[-1]
    assert "classes have no box in the 9 labelled images" in capsys.readouterr().err
