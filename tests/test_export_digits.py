"""digits-v1 as a COCO tree: the same pixels and boxes, read by the same code as COCO."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))

import export_digits
import make_splits

from semidetr_lite.data import digits
from semidetr_lite.data.coco import CocoDataset, load
from semidetr_lite.data.folds import labelled_in_manifest
from semidetr_lite.data.splits import labelled_indices

COUNTS = {"scenes": 12, "val": 3, "unlabelled": 4}


def export(out: Path, **changes) -> int:
    options = [f"--{name}={count}" for name, count in {**COUNTS, **changes}.items()]
    return export_digits.main([str(out), *options])


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "digits"
    assert export(out) == 0
    return out


def test_layout(tree):
    names = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    images = {f"train2017/{number:012d}.png" for number in range(1, 13)}
    images |= {f"val2017/{number:012d}.png" for number in range(100_001, 100_004)}
    images |= {f"unlabeled2017/{number:012d}.png" for number in range(200_001, 200_005)}
    jsons = ("instances_train2017", "instances_val2017", "image_info_unlabeled2017")
    assert names == images | {f"annotations/{name}.json" for name in jsons}


@pytest.mark.parametrize(("part", "split"), [("train2017", "train"), ("val2017", "test")])
def test_pixels_and_boxes_are_the_embedded_ones(tree, part, split):
    dataset = CocoDataset(tree / "annotations" / f"instances_{part}.json", tree / part)
    assert dataset.categories == digits.CATEGORIES
    for index in range(len(dataset)):
        image, target = dataset[index]
        expected_image, expected = digits.scene(index, split)
        assert torch.equal(image, expected_image) and target["size"] == expected["size"]
        assert torch.equal(target["boxes"], expected["boxes"]) and torch.equal(
            target["labels"], expected["labels"]
        )
        assert not target["crowd"].any()


def test_unlabelled_scenes_are_others_and_have_no_boxes(tree):
    document = json.loads((tree / "annotations" / "image_info_unlabeled2017.json").read_text())
    assert document["annotations"] == [] and len(document["images"]) == 4
    splits = load(tree, unlabelled=tree / "unlabeled2017", percent=25)
    image, target = splits.unlabelled[len(splits.unlabelled) - 4]
    assert (
        torch.equal(image, digits.scene(2000)[0])
        and "truth" not in target
        and "boxes" not in target
    )


def test_the_package_draws_the_same_folds_from_it(tree, tmp_path):
    splits = load(tree, unlabelled=tree / "unlabeled2017", percent=25, fold=2)
    assert (len(splits.labelled), len(splits.unlabelled), len(splits.test)) == (3, 9 + 4, 3)
    ids = [splits.labelled[index][1]["image_id"] - 1 for index in range(3)]
    assert ids == labelled_indices(12, 25, 2)
    source = tree / "annotations" / "instances_train2017.json"
    assert make_splits.main([str(source), "--percent=25", f"--out={tmp_path}"]) == 0
    assert labelled_in_manifest(tmp_path, list(range(1, 13)), 25, 2) == ids


def test_a_second_run_does_nothing_and_others_are_refused(tree, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    assert export(tree) == 0 and "already" in capsys.readouterr().out
    assert export(tree, scenes=13) == 2 and str(tree) in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before
    assert export(tmp_path) == 2 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"scenes": 0}, {"scenes": 2001}, {"val": 501}, {"unlabelled": -1}]
)
def test_impossible_counts(tmp_path, changes, capsys):
    assert export(tmp_path / "out", **changes) == 2
    assert capsys.readouterr().err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_stopped_in_the_middle_it_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_digits, "write_json", full)
    assert export(tmp_path / "out") == 2 and list(tmp_path.iterdir()) == []
