"""The settings of data reach the data, and what the data lack for them is said before training."""

import json

import pytest

from semidetr_lite.data.batches import Batches
from semidetr_lite.errors import UserError
from semidetr_lite.training.loop import Run
from semidetr_lite.training.presets import load_splits
from semidetr_lite.training.settings import PRESETS, new_config
from tests.test_doctor_shows import coco
from tests.test_layouts import ids, rows
from tests.test_own_images import write


def config(data, method: str = "semi-detr", **changes):
    values = {"percent": 100, "steps": 2, "batch_size": 2, "unlabelled_batch_size": 2}
    often = {"log_every": 1, "evaluate_every": 2, "watch_every": 2}
    return new_config("digits", method, data=str(data), **{**values, **often, **changes})


@pytest.fixture
def data(tmp_path):
    """Twelve images, of which the last two have no annotation, and four for validation."""
    content = rows(12)
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] < 11]
    coco(tmp_path / "data", "instances_train.json", content, "train")
    coco(tmp_path / "data", "instances_val.json", rows(4, 50), "val")
    return tmp_path / "data"


def test_missing_labels(data):
    assert ids(load_splits(config(data)).unlabelled) == [11, 12]
    assert len(load_splits(config(data, missing_labels="background")).labelled) == 12


def test_the_draw_is_stratified_for_own_data_and_uniform_for_coco(tmp_path):
    content = rows(40)
    content["categories"] += [{"id": 3 + i, "name": f"rare {i}"} for i in range(4)]
    for place in range(4):
        row = {"image_id": 40 - 2 * place, "category_id": 3 + place, "bbox": [1, 1, 9, 9]}
        content["annotations"].append(row)
    coco(tmp_path, "instances_train.json", content, "train")
    coco(
        tmp_path, "instances_val.json", {**rows(4, 50), "categories": content["categories"]}, "val"
    )

    def classes(fold: int, stratified: bool) -> int:
        splits = load_splits(config(tmp_path, percent=10, fold=fold, stratified=stratified))
        whole, indices = splits.labelled.dataset, splits.labelled.indices
        return len(set().union(*(whole.classes(index) for index in indices)))

    assert [classes(fold, True) for fold in (1, 2, 3)] == [6, 6, 6]
    assert min(classes(fold, False) for fold in (1, 2, 3)) < 6
    for name, preset in PRESETS.items():
        for_own_data = name == "photos" or name.startswith("digits")
        assert preset.data_files.stratified == for_own_data
        missing = "unlabelled" if for_own_data else "background"
        assert preset.data_files.missing_labels == missing


def test_without_any_unlabelled_image_there_is_no_semi_supervised_training(tmp_path):
    coco(tmp_path, "instances_train.json", rows(8), "train")
    coco(tmp_path, "instances_val.json", rows(4, 50), "val")
    settings = config(tmp_path)
    with pytest.raises(UserError, match="no unlabelled image.*--unlabelled"):
        Batches(load_splits(settings), 2, 2, settings.views, seed=0)


def test_skip_unreadable_may_be_added_to_a_run_that_stopped(data, tmp_path, capsys):
    settings = config(data, "supervised", steps=4, evaluate_every=4)
    run = Run(settings, tmp_path / "run", workers=0, quiet=True)
    run.save()
    for name in ("train/1.png", "val/51.png"):
        write(data / name, "no image")
    stopped = Run(None, tmp_path / "run", resume=True, workers=0, quiet=True)
    with pytest.raises(UserError, match="not a readable image"):
        stopped.run()
    run = Run(None, tmp_path / "run", True, workers=0, quiet=True, skip_unreadable=True)
    assert len(run.splits.test) == 3
    assert run.run()["step"] == 4
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data_files"]["skip_unreadable"] is True
