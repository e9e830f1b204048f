"""Folds on disk: names, contents, the manifest, and folds that others published."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))

import make_splits

from semidetr_lite.data.folds import check_manifest, labelled_in_manifest
from semidetr_lite.data.splits import labelled_indices
from semidetr_lite.errors import UserError
from semidetr_lite.files import file_digest

COUNT, EMPTY = 200, 20
NAME = "instances_train2017"


def document() -> dict:
    """200 images, ids not in order; the last 20 have only crowds; class 3 is on two images."""
    ids = list(range(1000, 1000 + COUNT))
    random.Random(1).shuffle(ids)
    images = [
        {"id": i, "file_name": f"{i:012d}.jpg", "height": 6, "width": 8, "license": 4} for i in ids
    ]
    classes = {
        index: [1] + [2] * (index % 4 == 0) + [3] * (index in (17, 90))
        for index in range(COUNT - EMPTY)
    }
    pairs = [
        (ids[index], category) for index, categories in classes.items() for category in categories
    ]
    rows = [
        {"image_id": image, "category_id": category, "bbox": [1, 1, 3, 3], "area": 9}
        for image, category in pairs
    ]
    rows += [
        {"image_id": i, "category_id": 2, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 1}
        for i in ids[-EMPTY:]
    ]
    for number, row in enumerate(rows, 1):
        row["id"] = number
    return {
        "images": images,
        "annotations": rows,
        "categories": [{"id": c, "name": f"class {c}"} for c in (1, 2, 3)],
    }


DOCUMENT = document()
IDS = [image["id"] for image in DOCUMENT["images"]]


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "annotations" / f"{NAME}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(DOCUMENT))
    return path


@pytest.fixture
def out(source) -> Path:
    return source.parent / "semi_supervised"


def split(*arguments) -> int:
    return make_splits.main([str(argument) for argument in arguments])


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def labelled(out: Path, percent="10", fold=1) -> set[int]:
    return {image["id"] for image in read(out / f"{NAME}.{fold}@{percent}.json")["images"]}


def refused(capsys, *arguments, words: tuple) -> None:
    capsys.readouterr()
    assert split(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert str(word) in err


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


class TestFiles:
    def test_names_and_contents(self, source, out):
        assert split(source) == 0
        pairs = [
            f"{NAME}.{fold}@{percent}" for percent in (1, 2, 5, 10) for fold in (1, 2, 3, 4, 5)
        ]
        assert set(files(out)) == {
            f"{pair}{end}.json" for pair in pairs for end in ("", "-unlabeled")
        } | {"manifest.json"}
        for percent, count in (("1", 2), ("2", 4), ("5", 10), ("10", 20)):
            for fold in (1, 5):
                one, rest = (
                    read(out / f"{NAME}.{fold}@{percent}{end}.json") for end in ("", "-unlabeled")
                )
                chosen = labelled_indices(COUNT, float(percent), fold)
                assert (
                    one["images"] == [DOCUMENT["images"][index] for index in chosen]
                    and len(chosen) == count
                )
                ids = {image["id"] for image in one["images"]}
                assert one["annotations"] == [
                    row for row in DOCUMENT["annotations"] if row["image_id"] in ids
                ]
                assert ids | {image["id"] for image in rest["images"]} == set(IDS)
                assert len(rest["images"]) == COUNT - count
                assert one["categories"] == rest["categories"] == DOCUMENT["categories"]

    def test_the_truth_of_unlabelled_images_is_nowhere(self, source, out):
        split(source)
        for path in out.glob("*-unlabeled.json"):
            assert read(path)["annotations"] == [] and "bbox" not in path.read_text()

    def test_a_second_run_does_nothing(self, source, out, capsys):
        split(source, "--percent", 10)
        before = files(out)
        assert split(source, "--percent", 10) == 0 and files(out) == before
        assert "already" in capsys.readouterr().out

    def test_two_machines_write_the_same_bytes(self, source, out, tmp_path):
        split(source, "--percent", 5)
        other = tmp_path / "elsewhere" / "annotations" / source.name
        other.parent.mkdir(parents=True)
        other.write_bytes(source.read_bytes())
        split(other, "--percent", 5)
        mine, theirs = files(out), files(other.parent / "semi_supervised")
        assert {name: content for name, (content, _) in mine.items()} == {
            n: c for n, (c, _) in theirs.items()
        }

    def test_other_folds_do_not_overwrite_these(self, source, out, tmp_path, capsys):
        split(source, "--percent", 10)
        before = files(out)
        for options in (
            ("--percent", 5),
            ("--percent", 10, "--fold", 1),
            ("--percent", 10, "--stratified"),
        ):
            refused(capsys, source, *options, words=(out, "--out"))
        assert files(out) == before
        assert split(source, "--percent", 5, "--fold", 7, "--out", tmp_path / "five") == 0
        assert set(files(tmp_path / "five")) == {
            f"{NAME}.7@5.json",
            f"{NAME}.7@5-unlabeled.json",
            "manifest.json",
        }

    def test_classes_without_a_label_are_told(self, source, capsys):
        split(source)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "class 3" in err and "--stratified" in err

    def test_bad_arguments(self, source, capsys):
        refused(capsys, source, "--percent", 0, words=("percent",))
        refused(capsys, source, "--fold", 0, words=("--fold",))
        refused(capsys, source.parent / "none.json", words=("none.json",))
        refused(capsys, "--check", source.parent, words=("manifest.json",))
        for arguments in ((), (source, "--check", source.parent)):
            with pytest.raises(SystemExit) as stopped:
                split(*arguments)
            assert stopped.value.code == 2
        assert [path.name for path in source.parent.iterdir()] == [source.name]


class TestManifest:
    def test_what_it_says(self, source, out):
        split(source, "--percent", 10, "--fold", 2)
        manifest = read(out / "manifest.json")
        assert manifest["generator"] == "uniform" and manifest["seed"] == 2023
        assert set(manifest["versions"]) == {"semidetr_lite", "numpy"}
        assert manifest["source"] == {
            "file": f"../{NAME}.json",
            "sha256": file_digest(source),
            "images": COUNT,
            "annotations": len(DOCUMENT["annotations"]),
            "categories": 3,
        }
        row = manifest["files"][f"{NAME}.2@10.json"]
        boxes = len(read(out / f"{NAME}.2@10.json")["annotations"])
        assert (row["percent"], row["fold"], row["labelled"], row["images"], row["boxes"]) == (
            10,
            2,
            True,
            20,
            boxes,
        )
        assert row["sha256"] == file_digest(out / f"{NAME}.2@10.json")
        assert check_manifest(out) == check_manifest(out / "manifest.json") == manifest
        assert split("--check", out) == 0

    @pytest.mark.parametrize(
        "damaged", [f"{NAME}.1@10.json", f"{NAME}.1@10-unlabeled.json", f"../{NAME}.json"]
    )
    def test_any_change_is_found(self, source, out, damaged, capsys):
        split(source, "--percent", 10, "--percent", 5)
        path = (out / damaged).resolve()
        path.write_bytes(path.read_bytes().replace(b"1000", b"1001", 1) + b" ")
        with pytest.raises(UserError, match=re.escape(path.name)):
            check_manifest(out)
        refused(capsys, "--check", out, words=(path.name,))
        if path != source:
            assert (
                len(check_manifest(out, percent=5)["files"]) == 10
            )  # the other folds are as they were
            with pytest.raises(UserError, match=re.escape(path.name)):
                check_manifest(out, percent=10, fold=1)

    def test_missing_files(self, source, out):
        split(source, "--percent", 10)
        source.unlink()
        check_manifest(out)  # the folds may travel without the json they were drawn from
        (out / f"{NAME}.3@10.json").unlink()
        with pytest.raises(UserError, match=r"3@10\.json.*missing"):
            check_manifest(out)
        check_manifest(out, 10, 2)

    def test_a_damaged_fold_is_made_anew_as_the_error_says(self, source, out, capsys):
        split(source, "--percent", 10)
        before = {name: content for name, (content, _) in files(out).items()}
        (out / f"{NAME}.3@10.json").write_text("{}")
        refused(
            capsys, source, "--percent", 10, words=("3@10.json", f"delete {out / 'manifest.json'}")
        )
        (out / "manifest.json").unlink()
        assert split(source, "--percent", 10) == 0
        assert {name: content for name, (content, _) in files(out).items()} == before

    def test_a_fold_that_is_not_there(self, source, out):
        split(source, "--percent", 10, "--fold", 1)
        with pytest.raises(UserError, match="fold 2 of 10 %.* 10 % fold 1"):
            check_manifest(out, 10, 2)

    @pytest.mark.parametrize(
        "content", ["{}", "[]", "3", '{"files": {"a": 3}}', '{"files": {}, "source": []}', "no"]
    )
    def test_not_a_manifest(self, tmp_path, content):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="manifest.json") as error:
            check_manifest(tmp_path)
        assert "\n" not in str(error.value)

    def test_labelled_images_are_found_again(self, source, out):
        split(source, "--percent", 10)
        assert labelled_in_manifest(out, IDS, 10, 3) == labelled_indices(COUNT, 10, 3)
        turned = IDS[::-1]
        places = labelled_in_manifest(out / "manifest.json", turned, 10, 3)
        assert places == sorted(places) and {turned[place] for place in places} == labelled(
            out, fold=3
        )
        with pytest.raises(UserError, match=r"3@10\.json: 12 of its images"):
            labelled_in_manifest(out, IDS[:50], 10, 3)


class TestStratified:
    def test_every_class_has_its_share(self, source, out, capsys):
        assert split(source, "--stratified") == 0
        classes = dict(zip(IDS, make_splits.classes_of(DOCUMENT)))
        for fold in (1, 2, 3):
            chosen = [classes[image_id] for image_id in labelled(out, "10", fold)]
            assert len(chosen) == 20 == len(labelled_indices(COUNT, 10, fold))
            counts = [sum(category in of_image for of_image in chosen) for category in (1, 2, 3)]
            assert (
                counts[2] >= 1 and 4 <= counts[1] <= 6 and counts[0] == 18
            )  # of 2, 45 and 180 images
        assert labelled(out, "10", 1) != labelled(out, "10", 2)
        assert read(out / "manifest.json")["generator"] == "stratified"

    @pytest.mark.parametrize("percent", [1, 7, 50, 100])
    def test_as_many_as_a_uniform_draw(self, percent):
        classes = make_splits.classes_of(DOCUMENT)
        chosen = make_splits.stratified_indices(classes, percent, 1)
        assert len(set(chosen)) == len(chosen) == len(
            labelled_indices(COUNT, percent, 1)
        ) and chosen == sorted(chosen)
        assert chosen == make_splits.stratified_indices(classes, percent, 1)

    def test_folds_differ_even_where_every_class_is_rare(self):
        classes = [{category} for category in range(40)]
        folds = [tuple(make_splits.stratified_indices(classes, 10, fold)) for fold in range(1, 6)]
        assert len(set(folds)) == 5 and all(len(fold) == 4 for fold in folds)

    def test_a_uniform_draw_would_miss_the_rare_class(self):
        assert not {17, 90} & set(labelled_indices(COUNT, 10, 1))
        assert {17, 90} & set(
            make_splits.stratified_indices(make_splits.classes_of(DOCUMENT), 10, 1)
        )


class TestPublished:
    def write(self, path: Path, lists) -> Path:
        path.write_text(json.dumps(lists))
        return path

    def test_index_lists(self, source, out, tmp_path):
        with_boxes = sorted(
            IDS[: COUNT - EMPTY]
        )  # detectron2: by id, without the images that have no box
        lists = {
            "10.0": {"1": list(range(0, 180, 10)), "2": list(range(5, 180, 10))},
            "0.5": {"1": []},
        }
        assert split(source, "--indices", self.write(tmp_path / "COCO_supervision.txt", lists)) == 0
        assert labelled(out) == {with_boxes[index] for index in range(0, 180, 10)}
        assert labelled(out, fold=2) == {with_boxes[index] for index in range(5, 180, 10)}
        assert len(read(out / f"{NAME}.1@10-unlabeled.json")["images"]) == COUNT - 18
        manifest = check_manifest(out)
        assert len(manifest["files"]) == 4 and manifest["seed"] is None
        assert manifest["generator"] == "COCO_supervision.txt"

    def test_bad_index_lists(self, source, out, tmp_path, capsys):
        good = list(range(18))
        cases = [
            ([1], "not index lists"),
            ({"10": [1]}, "not index lists"),
            ({"ten": {"1": good}}, "both numbers"),
            (
                {"10": {"1": list(range(20))}},
                "10 % fold 1 is no list of 18 indices, as of 180 images",
            ),
            ({"10": {"1": [0] * 18}}, "twice"),
            ({"10": {"1": [180, *good[1:]]}}, "from 0 to 179"),
            ({"10": {"1": ["0", *good[1:]]}}, "from 0 to 179"),
            ({"3": {"1": good}}, "no fold 1 of 1 %"),
        ]
        for lists, word in cases:
            path = self.write(tmp_path / "lists.txt", lists)
            refused(capsys, source, "--indices", path, words=(path, word))
        path = self.write(path, {"10": {"1": good}})
        refused(capsys, source, "--indices", path, "--percent", 10, words=("no fold 2 of 10 %",))
        assert not out.exists()

    def pairs(self, folder: Path, one: list[int], rest: list[int]) -> Path:
        folder.mkdir(exist_ok=True)
        for end, ids in (("", one), ("-unlabeled", rest)):
            rows = {
                "images": [{"id": image_id} for image_id in ids],
                "annotations": [{"id": 1}],
                "categories": [],
            }
            (folder / f"{NAME}.1@10{end}.json").write_text(json.dumps(rows))
        return folder

    def test_ready_made_pairs(self, source, out, tmp_path, capsys):
        theirs = self.pairs(tmp_path / "theirs", IDS[3:23], IDS[:3] + IDS[23:])
        assert split(source, "--pairs", theirs) == 0
        assert labelled(out) == set(IDS[3:23]) and check_manifest(out)["generator"] == "json pairs"
        assert read(out / f"{NAME}.1@10-unlabeled.json")["annotations"] == []
        assert "neither" not in capsys.readouterr().err

    def test_bad_pairs(self, source, out, tmp_path, capsys):
        theirs = tmp_path / "theirs"
        theirs.mkdir()
        refused(capsys, source, "--pairs", theirs, words=(theirs, "no fold 1 of 1 %"))
        for one, rest, word in [
            (IDS[:20], IDS[19:], "1 of its images are also unlabelled"),
            ([7, *IDS[:19]], IDS[19:], "first id 7"),
            ([], IDS, "no image"),
        ]:
            refused(
                capsys,
                source,
                "--pairs",
                self.pairs(theirs, one, rest),
                words=(f"{NAME}.1@10.json", word),
            )
        (theirs / f"{NAME}.1@10-unlabeled.json").unlink()
        refused(capsys, source, "--pairs", theirs, words=("-unlabeled.json",))
        assert not out.exists()

    def test_images_in_neither_part_are_counted(self, source, out, tmp_path, capsys):
        split(source, "--pairs", self.pairs(tmp_path / "theirs", IDS[:20], IDS[25:]))
        assert "5 images in neither part" in capsys.readouterr().err
        assert len(read(out / f"{NAME}.1@10-unlabeled.json")["images"]) == COUNT - 20
