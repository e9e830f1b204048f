"""Training: one step changes the student, resuming changes nothing, and nothing saved is ever lost."""

import dataclasses
import json
import math

import pytest
import torch
from test_methods import Accelerator
from torchvision.ops import batched_nms

from semidetr_lite import load_detector
from semidetr_lite.data import digits
from semidetr_lite.data.splits import Splits, Subset, WithoutLabels
from semidetr_lite.errors import UserError
from semidetr_lite.training import measure as measure_module
from semidetr_lite.training.engine import micro_batches
from semidetr_lite.training.loop import Run, learning_rate_factor
from semidetr_lite.training.presets import PRESETS, make_detector
from semidetr_lite.training.settings import (
    Config,
    DetectorKwargs,
    change,
    config_json,
    differences,
    new_config,
    preset_settings,
    read_settings,
)

DETECTOR = {
    "num_queries": 12, "dim": 32, "heads": 2, "levels": 3, "points": 2, "dim_feedforward": 32, "encoder_layers": 1,
    "decoder_layers": 2, "backbone": "tiny", "anchor_size": 0.1, "denoising_queries": 6,
}  # fmt: skip
SMALL = {
    "detector_kwargs": DetectorKwargs(**DETECTOR),
    "batch_size": 2,
    "unlabelled_batch_size": 2,
    "log_every": 2,
    "evaluate_every": 4,
    "evaluate_images": 4,
    "max_pseudo_boxes": 8,
}


@pytest.fixture(scope="module")
def splits() -> Splits:
    train = digits.DigitScenes("train", 12)
    few = Subset(digits.DigitScenes("test", 6), range(6))
    return Splits(
        Subset(train, range(4)),
        WithoutLabels(train, range(4, 12)),
        few,
        few,
        digits.CATEGORIES,
        flip=False,
    )


def small(method="semi-detr", steps=4, **changes) -> Config:
    return new_config(method=method, steps=steps, **{**SMALL, **changes})


def go(config, out, splits, **how) -> dict:
    return Run(config, out, splits=splits, quiet=True, workers=0, **how).run()


FORMS = {
    "deformable-detr": {"with_box_refine": True, "two_stage": True},
    "detr": {"level": 0},
}


@pytest.mark.parametrize(
    ("name", "method"),
    [("deformable-detr", "semi-detr"), ("detr", "supervised"), ("detr", "mean-teacher")],
)
def test_other_detectors_train_too(name, method, splits, tmp_path):
    shared = {
        "num_queries": 12,
        "dim": 32,
        "heads": 2,
        "dim_feedforward": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
    }
    further = {} if name == "detr" else {"levels": 3, "points": 2, "anchor_size": 0.1}
    arguments = {**shared, "backbone": "tiny", **further, **FORMS[name]}
    kwargs = DetectorKwargs(**arguments)
    config = small(method, detector=name, detector_kwargs=kwargs, score_threshold=0.0)
    last = go(config, tmp_path / "run", splits)
    assert all(math.isfinite(value) for value in last["losses"].values()) and set(last["test"]) == {
        "student",
        "teacher",
    }
    detection = load_detector(tmp_path / "run").detect([splits.test[0][0]])[0]
    assert len(detection["boxes"]) > 0 and detection["labels"].max() < 10


def test_semi_detr_needs_queries_that_are_boxes(splits, tmp_path):
    arguments = {
        "num_queries": 12,
        "dim": 32,
        "heads": 2,
        "dim_feedforward": 32,
        "backbone": "tiny",
        "level": 0,
    }
    config = small(detector="detr", detector_kwargs=DetectorKwargs(**arguments))
    with pytest.raises(UserError, match="semi-detr needs boxes as queries.*DETR"):
        Run(config, tmp_path / "run", splits=splits, workers=0)


def test_accumulated_parts_keep_the_mix_and_give_the_gradient_of_the_whole(splits, tmp_path):
    config = small("mean-teacher", batch_size=2, unlabelled_batch_size=4, score_threshold=0.0)
    whole, parted = (
        Run(change(config, accumulate=parts), tmp_path / "x", splits=splits, workers=0)
        for parts in (1, 2)
    )
    batch = next(iter(whole._loader()))
    parts = micro_batches(batch, 2)
    assert [[len(part[name][0]) for name in ("labelled", "weak", "strong")] for part in parts] == [
        [1, 2, 2]
    ] * 2
    assert parts[1]["strong"][1] == batch["strong"][1][2:]
    sum(whole.method(batch, 0).values()).backward()
    expected = torch.cat(
        [p.grad.flatten() for p in whole.method.parameters() if p.grad is not None]
    )
    parted.optimizer.step = lambda: None
    parted.config = change(parted.config, clip_grad_norm=1e9)
    parted.train_step(batch)
    gradient = torch.cat(
        [p.grad.flatten() for p in parted.method.parameters() if p.grad is not None]
    )
    assert torch.allclose(gradient, expected, atol=1e-4, rtol=1e-3) and gradient.abs().max() > 0.01
    with pytest.raises(UserError, match="lower accumulate"):
        micro_batches(batch, 3)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_step_waits_for_the_device_only_where_it_decides(stage, parts, splits, tmp_path):
    """For how many pseudo-boxes all parts have, for the matching, at the end for losses and norm.

    In stage one all parts are matched and mined together, in stage two each by itself.
    """
    share = 1.0 if stage == "one" else 0.0
    config = small(
        batch_size=2,
        unlabelled_batch_size=4,
        score_threshold=0.0,
        accumulate=parts,
        one_to_many_share=share,
    )
    run = Run(config, tmp_path / "x", splits=splits, workers=0)
    batch = next(iter(run._loader()))
    with Accelerator(run.method) as watch:
        run.train_step(batch)
    waits = 3 if stage == "one" else parts + 2
    assert [read.split(":")[0] for read in watch.reads] == ["device.py"] * waits
    assert watch.sends == []


DETECTORS = ("dino", "deformable-detr", "detr", "faster-rcnn", "fcos")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", DETECTORS)
def test_every_preset_is_sound_and_builds_its_detectors(preset, name):
    assert PRESETS[preset].preset == preset
    config = new_config(preset, "supervised", name)
    assert differences(config, preset_settings(preset, "supervised", name)) == {}
    assert read_settings(json.loads(config_json(config)), "config.json") == config
    is_open = preset == "photos"  # whose batch size is chosen for the machine
    assert is_open or config.optimizer.batch_size >= config.runtime.accumulate
    kwargs = dataclasses.replace(config.detector_kwargs, backbone_weights=None)
    with torch.device("meta"):
        make_detector(name, 80, kwargs)


def test_the_learning_rate_drops_in_coco_full():
    full = new_config("coco-full")
    rates = [learning_rate_factor(step, 240_000, full) for step in (0, 119_999, 120_000, 160_000)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize("method", ["supervised", "mean-teacher", "semi-detr"])
def test_a_run_leaves_every_file_and_figure(method, splits, tmp_path):
    last = go(small(method, score_threshold=0.0), tmp_path / "run", splits)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and lines[-1]["step"] == last["step"]
    assert all(math.isfinite(value) for line in lines for value in line["losses"].values())
    assert set(last["test"]) == {"student", "teacher"} and {
        "AP_student",
        "AP_teacher",
        "seconds",
    } <= set(lines[-1])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["method"] == method and config["categories"] == digits.CATEGORIES
    for part in ("student", "teacher"):
        detector = load_detector(tmp_path / "run", weights=part)
        assert detector.categories == digits.CATEGORIES and not detector.training
        detections = detector.detect([splits.test[0][0]])
        assert detections[0]["size"] == splits.test[0][1]["size"]
    if method != "supervised":
        assert {"pseudo_precision", "pseudo_recall", "pseudo_per_image"} <= set(lines[-1])
        boxes = [
            json.loads(line)
            for line in (tmp_path / "run/pseudo_boxes.jsonl").read_text().splitlines()
        ]
        assert {"step", "image_id", "boxes", "scores", "labels", "cost", "kept", "mined"} <= set(
            boxes[0]
        )
        assert (
            len(boxes[0]["boxes"])
            == len(boxes[0]["kept"])
            == len(boxes[0]["mined"])
            == len(boxes[0]["cost"])
        )


def test_a_run_goes_on_from_a_burn_in(splits, tmp_path):
    go(small("supervised"), tmp_path / "first", splits)
    run = Run(
        small(burn_in=str(tmp_path / "first")),
        tmp_path / "second",
        splits=splits,
        quiet=True,
        workers=0,
    )
    assert run.offset == 4 and run.method.one_to_many_steps == 4 + 2
    first = load_detector(tmp_path / "first", "student").state_dict()
    assert all(
        torch.equal(value, first[key]) for key, value in run.method.student.state_dict().items()
    )
    averaged = load_detector(tmp_path / "first", "teacher").state_dict()
    assert all(
        torch.equal(value, averaged[key]) for key, value in run.method.teacher.state_dict().items()
    )


def test_stage_one_weights_ask_for_suppression_and_stage_two_weights_do_not(splits, tmp_path):
    go(small(one_to_many_share=1.0), tmp_path / "one", splits)
    go(small(one_to_many_share=0.5), tmp_path / "two", splits)
    assert (
        load_detector(tmp_path / "one").nms == 0.6 and load_detector(tmp_path / "two").nms is None
    )


def test_a_run_folder_is_not_overwritten(splits, tmp_path):
    go(small("supervised", steps=2), tmp_path / "run", splits)
    with pytest.raises(UserError, match="holds a run already"):
        Run(small(), tmp_path / "run", splits=splits)


@pytest.mark.parametrize("name, content, message", [
    ("missing.safetensors", None, "no such weights"),
    ("broken.safetensors", b"not a tensor", "not a weights file"),
])  # fmt: skip
def test_weights_that_cannot_be_read_are_named(tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        load_detector(tmp_path / name)


def test_a_checkpoint_of_another_model_is_refused(splits, tmp_path):
    go(small("supervised", steps=2), tmp_path / "first", splits)
    other = small(dim=64, burn_in=str(tmp_path / "first"))
    with pytest.raises(UserError, match=r"last\.pt: weights of another model"):
        Run(other, tmp_path / "second", splits=splits)


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    recipe = new_config(warmup_steps=9, lr_decay_fraction=0.25)
    factors = [learning_rate_factor(step, 100, recipe) for step in range(100)]
    assert factors[0] == 0.1 and factors[9:76] == [1.0] * 67 and factors[-1] == pytest.approx(0.04)
    assert all(a <= b for a, b in zip(factors, factors[1:9])) and all(
        a >= b for a, b in zip(factors[75:], factors[76:])
    )


def test_unknown_names_list_what_there_is():
    with pytest.raises(
        UserError, match="no method called 'magic': choose from supervised, mean-teacher, semi-detr"
    ):
        new_config(method="magic")
    with pytest.raises(
        UserError, match="no setting called 'lr': choose from accumulate, .*learning_rate"
    ):
        new_config(lr=1)


def test_duplicates_are_counted_with_and_without_suppression():
    truth = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]]),
        "labels": torch.tensor([1, 2, 0]),
    }
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 6], [20, 20, 30, 30], [40, 40, 50, 50]]
    )
    labels = torch.tensor([1, 1, 1, 3, 0])  # the fourth has the wrong class

    class Seer:
        def detect(self, images, score, nms):
            keep = batched_nms(boxes, torch.linspace(1, 0.5, 5), labels, nms)
            return [{"boxes": boxes[keep], "labels": labels[keep]} for _ in images]

    image = torch.zeros(3, 60, 60)
    found = measure_module.duplicates(Seer(), [(image, truth)] * 2, images=5, nms=0.8)
    assert found == {
        "duplicates": 1.0,
        "duplicates_nms": 0.5,
    }  # two further boxes on two found objects, then one
    nothing = [(image, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)})]
    assert measure_module.duplicates(Seer(), nothing)["duplicates"] == 0


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["/env/lib/semidetr_lite/__main__.py", "demo", "--seed", "0"], "semidetr demo --seed 0"),
        (["/env/bin/semidetr", "train", "--out", "my runs"], "semidetr train --out 'my runs'"),
        (["benchmarks/record_demo.py", "--seeds", "0"], "record_demo --seeds 0"),
        (["/env/lib/pytest/__main__.py", "-q"], "__main__ -q"),
    ],
)
def test_the_command_is_recorded_as_it_is_typed(arguments, command, monkeypatch):
    monkeypatch.setattr("sys.argv", arguments)
    assert new_config().command == command
