"""The generated data set of COCO's measures, and the COCO recipe end to end on it."""

import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))

import make_coco_sized

from semidetr_lite.data.coco import CocoDataset
from semidetr_lite.training import loop
from semidetr_lite.training.loop import Run
from semidetr_lite.training.settings import DetectorKwargs, new_config


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "coco"
    assert make_coco_sized.main([str(out), "--train=160", "--val=4"]) == 0
    return out


def test_sizes_boxes_and_classes_are_like_those_of_coco(tree):
    document = json.loads((tree / "annotations/instances_train2017.json").read_text())
    sizes = [(row["width"], row["height"]) for row in document["images"]]
    assert (
        0.2 < sizes.count((640, 480)) / len(sizes) < 0.4 and max(max(size) for size in sizes) == 640
    )
    assert 0.1 < np.mean([height > width for width, height in sizes]) < 0.45
    boxes = np.array([row["bbox"] for row in document["annotations"]])
    sides = np.sqrt(boxes[:, 2] * boxes[:, 3])
    assert 5 < len(boxes) / len(sizes) < 10
    assert 0.3 < (sides < 32).mean() < 0.5 and 0.15 < (sides > 96).mean() < 0.35
    assert len(document["categories"]) == 80 and document["categories"][-1]["id"] == 90
    assert len({row["id"] for row in document["annotations"]}) == len(boxes)
    assert 0 < sum(row["iscrowd"] for row in document["annotations"]) < 0.04 * len(boxes)


def test_boxes_are_where_the_colour_of_their_class_is(tree):
    dataset = CocoDataset(tree / "annotations/instances_val2017.json", tree / "val2017")
    close = []
    for image, target in (dataset[index] for index in range(4)):
        (x1, y1, x2, y2), label = (
            target["boxes"][-1].int().tolist(),
            int(target["labels"][-1]),
        )  # the last lies on top
        colour = np.array(make_coco_sized.COLOURS[label // 10])[:, None, None]
        inside = image[:, y1:y2, x1:x2].numpy().astype(int)
        close.append((np.abs(inside - colour).max(0) < 60).mean())
    assert min(close) > 0.1


def test_an_image_does_not_depend_on_how_many_there_are(tree):
    rows = make_coco_sized.scene(7, make_coco_sized.load_sources())[1]
    document = json.loads((tree / "annotations/instances_train2017.json").read_text())
    there = [row for row in document["annotations"] if row["image_id"] == 7]
    assert [row["bbox"] for row in there] == [row["bbox"] for row in rows] != []


def test_a_folder_in_use_and_impossible_counts_are_refused(tree, tmp_path, capsys):
    assert make_coco_sized.main([str(tree)]) == 2 and str(tree) in capsys.readouterr().err
    assert make_coco_sized.main([str(tmp_path / "x"), "--val=0"]) == 2 and not list(
        tmp_path.iterdir()
    )


def test_the_coco_recipe_runs_on_it_end_to_end(tree, tmp_path, monkeypatch):
    """80 classes, the resize draw, parts with the mix of both kinds, both stages; all of it small."""
    for name in ("pseudo_quality", "pseudo_box_log"):  # of few images, which they take as they are
        monkeypatch.setattr(loop, name, functools.partial(getattr(loop, name), images=2))
    small = {
        "num_queries": 20,
        "dim": 16,
        "heads": 2,
        "dim_feedforward": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
    }
    arguments = {**small, "backbone": "resnet18", "test_size": (48, 80)}
    few = {
        "batch_size": 2,
        "unlabelled_batch_size": 8,
        "accumulate": 2,
        "log_every": 1,
        "evaluate_every": 9,
    }
    few |= {
        "short_sides": (32, 40, 48),
        "long_side": 80,
        "detector_kwargs": DetectorKwargs(**arguments),
    }
    config = new_config("coco-10pct", data=str(tree), steps=2, **few)
    run = Run(config, tmp_path / "run", quiet=True, workers=0)
    assert (len(run.splits.labelled), len(run.splits.unlabelled), run.engine.num_micro_batches) == (
        16,
        144,
        2,
    )
    last = run.run()
    assert last["step"] == 2 and all(math.isfinite(value) for value in last["losses"].values())
    assert set(last["test"]) == {"student", "teacher"}
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert "consistency" in lines[0]["losses"] and "consistency" not in lines[1]["losses"]
