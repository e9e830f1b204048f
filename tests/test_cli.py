"""The commands as a user types them: they work on COCO-format data, and bad input gets one line and
status 2.
"""

import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from semidetr_lite import cli
from semidetr_lite.data import digits
from semidetr_lite.training import demo, presets
from semidetr_lite.training.checkpoint import load_state
from semidetr_lite.training.loop import Run
from semidetr_lite.training.settings import change, new_config
from tests.test_train import SMALL
from tests.test_trust import interrupt

FEW = {"train": 8, "tune": 3, "test": 3}


def coco_folder(root, count=8, sizes=((40, 60), (64, 48))):
    """Images of rectangles with two categories (ids 3 and 7), one crowd region, one image without
    boxes.
    """
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for split, images in (("train", count), ("val", 3)):
        document = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 3, "name": "box"}, {"id": 7, "name": "bar"}],
        }
        for number in range(images):
            height, width = sizes[number % 2]
            name = f"{split} {number}.png"
            pixels = rng.integers(0, 99, (height, width, 3), dtype=np.uint8)
            if number:
                pixels[10:30, 8:28] = 250
                row = {
                    "image_id": number,
                    "bbox": [8, 10, 20, 20],
                    "area": 400,
                    "iscrowd": int(number == 2),
                    "category_id": 3 + 4 * (number % 2),
                }
                document["annotations"].append({"id": number, **row})
            document["images"].append(
                {"id": number, "file_name": name, "height": height, "width": width}
            )
            Image.fromarray(pixels).save(root / "images" / name)
        (root / f"instances_{split}.json").write_text(json.dumps(document))
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch):
    recipe = change(presets.PRESETS["digits"], **SMALL, steps=2)
    monkeypatch.setitem(presets.PRESETS, "digits", recipe)
    monkeypatch.setattr(digits, "COUNTS", FEW)


def run(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["semidetr", *map(str, words)])
    return cli.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on COCO-format data with a folder of unlabelled images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            presets.PRESETS, "digits", change(presets.PRESETS["digits"], **SMALL, steps=2)
        )
        root = tmp_path_factory.mktemp("trained")
        data = coco_folder(root / "data")
        coco_folder(root / "more", 4)
        words = [
            "--preset",
            "digits",
            "--data",
            data,
            "--unlabelled",
            root / "more/images",
            "--percent",
            100,
            "--out",
            root / "run",
            "--workers",
            0,
        ]
        assert run(patch, "train", *words) == 0
    return root


def test_demo_trains_all_prints_the_table_and_writes_the_page(monkeypatch, tmp_path, capsys):
    short = {name: one._replace(steps=2) for name, one in demo.DEMO_RUNS.items()}
    monkeypatch.setattr(demo, "DEMO_RUNS", short)

    def one_after_the_other(
        names, out, seed, **changes
    ):  # other processes would not know the small preset
        return [demo.train_demo_run(name, out, seed, **changes) for name in names]

    monkeypatch.setattr(demo, "train_side_by_side", one_after_the_other)
    assert run(monkeypatch, "demo", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "supervised, same time" in printed and "Semi-DETR" in printed and "AP50" in printed
    assert "<html" in (tmp_path / "report.html").read_text()
    before = (tmp_path / "semi-detr/student.safetensors").stat().st_mtime_ns
    assert run(monkeypatch, "demo", "--out", tmp_path) == 0  # finished runs are not run again
    assert (tmp_path / "semi-detr/student.safetensors").stat().st_mtime_ns == before
    assert run(monkeypatch, "demo", "--out", tmp_path, "--seed", "1") == 2
    assert (
        "supervised: holds a run with another seed; choose another --out" in capsys.readouterr().err
    )


def test_training_on_coco_data_keeps_its_categories(trained):
    config = json.loads((trained / "run/config.json").read_text())
    assert config["categories"] == [{"id": 3, "name": "box"}, {"id": 7, "name": "bar"}]
    lines = [
        json.loads(line) for line in (trained / "run/pseudo_boxes.jsonl").read_text().splitlines()
    ]
    assert lines and all(line["step"] == 2 for line in lines)


def test_predict_writes_pictures_and_coco_json(monkeypatch, trained, tmp_path, capsys):
    words = [
        "predict",
        trained / "run",
        trained / "data/images",
        trained / "more/images/train 0.png",
        "--out",
        tmp_path,
        "--score",
        0,
    ]
    assert run(monkeypatch, *words) == 0
    rows = json.loads((tmp_path / "detections.json").read_text())
    document = json.loads((tmp_path / "annotations.json").read_text())
    assert [row["id"] for row in document["images"]] == list(range(1, 13))
    assert {row["category_id"] for row in rows} <= {3, 7} and len(rows[0]["bbox"]) == 4
    assert len(document["annotations"]) == len(rows)
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == 12 and all(Image.open(picture).width >= 320 for picture in pictures)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    large = tmp_path / "large.png"
    Image.new("RGB", (1000, 500)).save(large)
    assert (
        run(
            monkeypatch,
            "predict",
            trained / "run",
            large,
            tmp_path / "broken.png",
            "--out",
            tmp_path / "b",
        )
        == 2
    )
    said = capsys.readouterr().err
    assert (
        "broken.png: not a readable image" in said
        and "1 of 2 images are left out, the others are done" in said
    )
    assert Image.open(tmp_path / "b/00000_large.png").width == pytest.approx(
        1000, abs=30
    )  # and a border
    listed = json.loads((tmp_path / "b/annotations.json").read_text())["images"]
    assert listed == [{"id": 1, "file_name": "large.png", "width": 1000, "height": 500}]


@pytest.mark.parametrize(
    "words, said",
    [
        (["predict", "RUN", "--out", "OUT"], "give images or folders"),
        (["predict", "RUN", "IMAGES", "--out", "OUT", "--score", "2"], "--score 2: not in 0..1"),
        (
            ["evaluate", "RUN", "--truth", "x.json"],
            "give a run folder (with --voc if you like), or --truth",
        ),
        (["train", "--out", "OUT", "--unlabelled", "x"], "--unlabelled x goes with --data"),
        (["train", "--out", "OUT", "--workers", "-1"], "--workers must be at least 0, got -1"),
        (
            ["train", "--out", "OUT", "--seed", "-1"],
            "--seed: input should be greater than or equal to 0, got -1",
        ),
        (
            ["train", "--out", "OUT", "--accumulate", "99"],
            "a step cannot be run in 99 micro-batches; lower",
        ),
        (["train", "--out", "OUT", "--burn-in", "x"], "x: no run to start from, it has no last.pt"),
        (
            ["train", "--out", "OUT", "--backbone-weights", "x.pth"],
            "the backbone tiny is no ResNet",
        ),
        (["train", "--out", "OUT", "--level", "1"], "dino has no level: leave out --level"),
        (["doctor", "--data", "IMAGES", "--out", "x.jpg"], "x.jpg: the picture is a .png file"),
    ],
)
def test_options_that_do_not_go_together_get_one_line(
    monkeypatch, trained, tmp_path, capsys, words, said
):
    places = {"RUN": trained / "run", "OUT": tmp_path / "out", "IMAGES": trained / "data/images"}
    assert run(monkeypatch, *(places.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_backbone_weights_are_a_file_or_none():
    def chosen(weights):
        return new_config("coco-10pct", backbone_weights=weights).detector_kwargs.backbone_weights

    assert [chosen(weights) for weights in (None, "none", "r50.pth")] == [None, None, "r50.pth"]
    assert new_config("coco-10pct").detector_kwargs.backbone_weights == "IMAGENET1K_V1"


def test_a_burn_in_on_other_labels_is_told(monkeypatch, trained, tmp_path, capsys):
    words = [
        "train",
        "--preset",
        "digits",
        "--data",
        trained / "data",
        "--burn-in",
        trained / "run",
        "--method",
        "supervised",
        "--workers",
        0,
    ]
    assert run(monkeypatch, *words, "--percent", 100, "--out", tmp_path / "a") == 0
    assert "warning" not in capsys.readouterr().err
    assert run(monkeypatch, *words, "--percent", 50, "--out", tmp_path / "b") == 0
    assert (
        "run was trained with percent 100.0: what it learned may come from labels"
        in capsys.readouterr().err
    )


def test_evaluate_measures_runs_and_json_files(monkeypatch, trained, tmp_path, capsys):
    assert run(monkeypatch, "evaluate", trained / "run", "--weights", "student") == 0
    assert "AP_small" in capsys.readouterr().out
    truth = trained / "data/instances_val.json"
    rows = [
        {**a, "score": 1.0}
        for a in json.loads(truth.read_text())["annotations"]
        if not a["iscrowd"]
    ]
    (tmp_path / "found.json").write_text(json.dumps(rows))
    assert (
        run(monkeypatch, "evaluate", "--truth", truth, "--detections", tmp_path / "found.json") == 0
    )
    assert "AP         1.0000000000" in capsys.readouterr().out
    (tmp_path / "found.json").write_text(json.dumps([{**row, "image_id": 77} for row in rows]))
    assert (
        run(monkeypatch, "evaluate", "--truth", truth, "--detections", tmp_path / "found.json") == 2
    )
    assert (
        "found.json: none of its 1 detections is on an image of the truth"
        in capsys.readouterr().err
    )


def test_compare_writes_a_page(monkeypatch, trained, tmp_path):
    assert run(monkeypatch, "compare", trained / "run", "--out", tmp_path, "--images", 2) == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000


def broken(root, kind):
    """The same data with one thing wrong; returns further words for the command line and what the
    line must name.
    """
    data = coco_folder(root / "data")
    file = data / "instances_train.json"
    document = json.loads(file.read_text())
    out = ["--out", root / "run", "--workers", 0]
    if kind == "malformed json":
        file.write_text("{")
    elif kind == "missing json":
        return ["--data", root / "none.json", *out], "none.json"
    elif kind == "label not in categories":
        document["annotations"][1]["category_id"] = 99
    elif kind == "zero size box":
        document["annotations"][1]["bbox"] = [5, 5, 0, 3]
    elif kind == "box outside":
        document["annotations"][1]["bbox"] = [500, 500, 9, 9]
    elif kind == "unreadable image":
        for number in range(8):
            (data / f"images/train {number}.png").write_bytes(b"no picture")
        return ["--data", data, *out], ".png"
    elif kind == "empty unlabelled folder":
        (root / "empty").mkdir()
        return ["--data", data, "--unlabelled", root / "empty", *out], "empty"
    elif kind == "no such burn-in":
        return ["--data", data, "--burn-in", root / "nowhere", *out], "nowhere"
    elif kind == "nothing to resume":
        return ["--data", data, "--resume", *out], "last.pt"
    if kind in ("label not in categories", "zero size box", "box outside"):
        file.write_text(json.dumps(document))
    return [
        "--data",
        data,
        *out,
    ], "instances_train.json" if "json" not in kind or kind == "malformed json" else ""


KINDS = [
    "malformed json", "missing json", "label not in categories", "zero size box", "box outside", "unreadable image",
    "empty unlabelled folder", "no such burn-in", "nothing to resume",
]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_gets_one_line_and_status_2(monkeypatch, tmp_path, capsys, kind, workers):
    if workers and kind != "unreadable image":
        pytest.skip("only reading images happens in a worker")
    words, named = broken(tmp_path, kind)
    words[-1] = workers
    assert run(monkeypatch, "train", "--preset", "digits", *words) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and named in error[0]


def test_a_resumed_run_takes_memory_options_and_no_other(monkeypatch, tmp_path, capsys):
    words = ["train", "--out", tmp_path / "run", "--workers", 0]
    with monkeypatch.context() as patch:
        interrupt(patch, Run, "train_step", 1, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(patch, *words, "--steps", 3) == 143
    config = json.loads((tmp_path / "run/config.json").read_text())
    for option, there in {
        "--steps 9": 3,
        "--seed 1": 0,
        "--method supervised": "semi-detr",
    }.items():
        assert run(monkeypatch, *words, "--resume", *option.split()) == 2
        fault = f"{option} does not go with --resume: the run there has {there}; leave it out"
        assert fault in capsys.readouterr().err
    assert json.loads((tmp_path / "run/config.json").read_text()) == config
    assert (
        run(monkeypatch, *words, "--steps", 3, "--resume", "--accumulate", 2, "--checkpointing")
        == 0
    )
    changed = {**config["runtime"], "accumulate": 2, "checkpointing": True}
    assert json.loads((tmp_path / "run/config.json").read_text()) == {**config, "runtime": changed}
    assert load_state(tmp_path / "run/last.pt")["step"] == 3


def test_a_detector_is_not_loaded_from_another_programs_file(monkeypatch, tmp_path, capsys):
    torch.save({"a": 1}, tmp_path / "x.safetensors")
    assert run(monkeypatch, "predict", tmp_path / "x.safetensors", tmp_path, "--out", tmp_path) == 2
    assert "x.safetensors: not a weights file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_is_there(monkeypatch, capsys, command):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *[command] * bool(command), "--help")
    assert stop.value.code == 0 and "usage: semidetr" in capsys.readouterr().out


def test_doctor_tells_what_a_data_set_and_a_weights_file_are(monkeypatch, tmp_path, capsys):
    data = coco_folder(tmp_path / "data")
    status = run(monkeypatch, "doctor", "--data", data, "--out", tmp_path / "data.png")
    out, err = capsys.readouterr()
    assert "8 images" in out and "box" in out and Image.open(tmp_path / "data.png").width > 200
    assert status == (2 if "defect" in err else 0)
    (data / "images" / "train 3.png").write_bytes(b"broken")
    assert run(monkeypatch, "doctor", "--data", data) == 2
    out, err = capsys.readouterr()
    assert "train 3.png" in out and "listed above" in err and err.count("\n") == 1
    torch.save(
        {"model": {"class_labels_classifier.weight": torch.zeros(92, 256)}}, tmp_path / "w.pth"
    )
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for words in ([], ["--weights", tmp_path / "none.pth"], ["--weights", tmp_path / "other.pth"]):
        assert run(monkeypatch, "doctor", *words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_voc_figures_stand_beside_cocos(trained, monkeypatch, capsys):
    assert run(monkeypatch, "evaluate", trained / "run", "--voc") == 0
    out = capsys.readouterr().out
    assert "AP50_11point" in out and "AP50_allpoint" in out and "AR100" in out


def test_folds_from_disk_decide_what_is_labelled(monkeypatch, tmp_path, capsys):
    data = coco_folder(tmp_path / "data")
    words = [
        "train",
        "--preset",
        "digits",
        "--data",
        data,
        "--folds",
        tmp_path / "folds",
        "--steps",
        1,
        "--out",
        tmp_path / "run",
    ]
    assert run(monkeypatch, *words) == 2
    assert "folds: cannot be read" in capsys.readouterr().err
