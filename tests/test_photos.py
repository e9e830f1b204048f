"""The preset for photographs: what it chooses, from which data and machine, and what it says."""

import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from semidetr_lite import cli
from semidetr_lite.data.splits import Splits, Subset, WithoutLabels
from semidetr_lite.errors import UserError
from semidetr_lite.training import memory, photos
from semidetr_lite.training.ablate import Ablation
from semidetr_lite.training.loop import Run, train_or_resume
from semidetr_lite.training.photos import CPU, LARGE_GPU, SMALL_GPU, choose, facts_of, warnings_of
from semidetr_lite.training.settings import PRESETS, Settings, change, config_json, new_config
from tests.test_cli import coco_folder
from tests.test_settings import given
from tests.test_train import small, splits  # noqa: F401  (a fixture)
from tests.test_trust import interrupt

LITTLE = {"dim": 16, "heads": 2, "dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 1}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(photos, "_can_get", lambda weights: False)


class Boxes:
    """Images of one size with so many square boxes each, of which only the targets are read."""

    def __init__(self, counts, size=(480, 640), side=60.0, labels=(0,)):
        self.counts, self.side, self.labels = counts, side, torch.tensor(labels)
        self.sizes = [size] * len(counts)

    def __len__(self):
        return len(self.counts)

    def __getitem__(self, index):
        raise AssertionError("an image was decoded")

    def target(self, index):
        count = self.counts[index]
        boxes = torch.tensor([0, 0, self.side, self.side]).expand(count, 4)
        labels = self.labels[torch.arange(count) % len(self.labels)]
        return {"boxes": boxes, "labels": labels, "size": self.sizes[index]}


def data(counts=(5, 12, 20), unlabelled=9, classes=("cell",), **more) -> Splits:
    whole = Boxes(list(counts) + [0] * unlabelled, **more)
    train = Subset(whole, range(len(counts)))
    rest = WithoutLabels(whole, range(len(counts), len(whole)))
    categories = [{"id": number, "name": name} for number, name in enumerate(classes)]
    return Splits(train, rest, train, train, categories, flip=True)


def chosen(splits, machine=CPU, method="supervised", **changes):
    config = new_config("photos", method, data="my", **changes)
    return choose(config, facts_of(splits), machine)


# ---- choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "size", "batch"), [(CPU, 240, 4), (SMALL_GPU, 480, 8), (LARGE_GPU, 640, 16)])  # fmt: skip
def test_size_and_batch_follow_the_machine(machine, size, batch):
    config, lines = chosen(data(size=(3000, 4000), side=400.0), machine)
    assert config.image_size == size and config.views.short_sides == (size,)
    assert config.detector_kwargs.test_size[0] == size
    optimizer = config.optimizer
    assert (optimizer.batch_size, optimizer.unlabelled_batch_size) == (batch, batch)
    assert any(
        f"--image-size {size}" in line and "4000 x 3000 pixels become" in line for line in lines
    )


def test_images_are_not_enlarged_and_small_objects_get_more_pixels():
    assert chosen(data(size=(96, 128), side=30.0))[0].image_size == 96
    small_objects = chosen(data(side=12.0))[0].image_size  # 6 pixels at 240
    assert small_objects == 320 and 12 * small_objects / 480 >= 8
    assert chosen(data(side=1.0))[0].image_size == 368  # at most half as much again


@pytest.mark.parametrize(("most", "queries"), [(2, 100), (20, 100), (30, 150), (500, 300)])
def test_queries_follow_the_objects(most, queries):
    assert chosen(data([1, most, 2]))[0].detector_kwargs.num_queries == queries


@pytest.mark.parametrize(("images", "steps"), [(3, 600), (100, 1250), (5000, 3000)])
def test_steps_follow_the_labelled_images(images, steps):
    config, lines = chosen(data([1] * images))
    epochs = steps * 4 / images
    assert config.steps == steps and any(f"{epochs:.0f} epochs" in line for line in lines)


def test_every_choice_is_an_option():
    options = {"image_size": 100, "num_queries": 33, "batch_size": 2, "unlabelled_batch_size": 3}
    options |= {"steps": 7, "backbone": "resnet34", "backbone_weights": None}
    config, lines = chosen(data(), **options)
    assert lines == []
    assert (config.image_size, config.detector_kwargs.num_queries) == (100, 33)
    assert (config.optimizer.batch_size, config.optimizer.unlabelled_batch_size) == (2, 3)
    assert (config.steps, config.detector_kwargs.backbone) == (7, "resnet34")
    config, lines = chosen(data(), steps=9, batch_size=5)
    assert (config.steps, config.optimizer.batch_size) == (9, 5)
    assert config.optimizer.unlabelled_batch_size == 4  # the one that is left open


def test_without_imagenet_weights_there_is_one_warning_and_random_ones(capsys, monkeypatch):
    config, _ = chosen(data())
    kwargs = config.detector_kwargs
    assert (kwargs.backbone, kwargs.backbone_weights) == ("tiny", None)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "random weights" in warning
    chosen(data(), backbone_weights="none")
    assert capsys.readouterr().err == ""  # asked for
    monkeypatch.setattr(photos, "_can_get", lambda weights: True)
    kwargs = chosen(data())[0].detector_kwargs
    assert (kwargs.backbone, kwargs.backbone_weights) == ("resnet18", "IMAGENET1K_V1")


def test_weights_that_cannot_be_had_are_no_error(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: 1 / 0)
    assert photos._can_get("IMAGENET1K_V1") is False


@pytest.mark.parametrize("detector", ["dino", "deformable-detr", "detr", "faster-rcnn", "fcos"])
def test_every_detector_can_be_built_from_the_choices(detector, tmp_path):
    config = new_config("photos", "supervised", detector, data="my", steps=1)
    run = Run(config, tmp_path, splits=data(size=(64, 64), side=20.0), workers=0, quiet=True)
    assert run.method.student.test_size == (64, 107)


# ---- what is said --------------------------------------------------------------------------------


def said(splits, method="supervised", **changes) -> str:
    config = chosen(splits, method=method, **changes)[0]
    return "\n".join(warnings_of(config, facts_of(splits)))


def test_more_objects_than_can_be_found_are_told_before_training():
    assert "150 objects, but only 30 can be found: give --queries 150" in said(data([3, 150]), num_queries=30)  # fmt: skip
    assert "detections are the 100 best of each" in said(data([150]))
    assert said(data([12, 5])) == ""
    crowded = said(data([12] * 9), "semi-detr", num_queries=30, burn_in=None)
    assert "9 of 9 images have too many objects for 30 queries" in crowded


def test_classes_without_a_label_are_told():
    assert "1 of 2 classes have no labelled box and will not be found: 'b'" in said(
        data(classes="ab")
    )
    assert said(data(classes="ab", labels=(0, 1))) == ""
    assert "nothing to learn" in said(data([0, 0]))


def test_an_unripe_teacher_is_told():
    assert "--burn-in" in said(data(), "mean-teacher") and said(data()) == ""


def test_other_presets_are_warned_too_and_the_digits_are_not(splits, tmp_path):
    crowd = data([40] * 4, size=(64, 64), side=9.0)
    run = Run(small("supervised", data="my"), tmp_path / "a", splits=crowd, quiet=True)
    assert ["only 12 can be found" in note for note in run.notes] == [True]
    assert Run(small("supervised"), tmp_path / "b", splits=splits, quiet=True).notes == []


# ---- runs ----------------------------------------------------------------------------------------


def test_own_data_have_this_preset_unless_another_is_named():
    def preset(*words):
        return given(*words, "--out", "x")["settings"]

    assert preset("train", "--data", "my/photos").preset == "photos"
    assert preset("train", "--data=my/photos", "--steps", "7") == change(
        PRESETS["photos"], data="my/photos", steps=7
    )
    assert preset("train").preset == preset("train", "--data", "digits").preset == "digits"
    assert preset("train", "--data", "x", "--preset", "coco-10pct").preset == "coco-10pct"
    assert PRESETS["photos"].percent == 100


def train(monkeypatch, *words) -> int:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in LITTLE.items()]
    command = ["semidetr", "train", *map(str, words), "--workers", "0", *options]
    monkeypatch.setattr(sys, "argv", command)
    return cli.main()


def test_choices_are_stored_once_and_kept_on_resume(monkeypatch, tmp_path, capsys):
    words = ["--data", coco_folder(tmp_path / "data"), "--method", "supervised"]
    words += ["--out", tmp_path / "run", "--steps", 3, "--evaluate-every", 9]
    with monkeypatch.context() as patch:
        interrupt(patch, Run, "train_step", 1, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(patch, *words) == 143
    printed = capsys.readouterr().out
    assert "--image-size 48" in printed and "--queries 100" in printed
    assert "a step takes" in printed and "measured" in printed
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["image_size"] == 48 and stored["detector_kwargs"]["num_queries"] == 100
    assert stored["optimizer"]["batch_size"] == 4 and stored["percent"] == 100
    assert stored["detector_kwargs"]["backbone"] == "tiny"
    monkeypatch.setattr(photos, "CPU", LARGE_GPU)  # another machine
    assert train(monkeypatch, *words, "--resume") == 0
    assert json.loads((tmp_path / "run/config.json").read_text()) == stored


def test_a_run_is_gone_on_with_by_the_settings_that_left_it_open(tmp_path, monkeypatch):
    images = coco_folder(tmp_path / "data")
    config = new_config("photos", "supervised", data=str(images), steps=2, **LITTLE)
    with monkeypatch.context() as patch:
        interrupt(patch, Run, "train_step", 1, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train_or_resume(config, tmp_path / "run", workers=0, quiet=True)
    train_or_resume(config, tmp_path / "run", workers=0, quiet=True)
    assert Run(None, tmp_path / "run", resume=True, quiet=True).finished
    with pytest.raises(UserError, match="another optimizer.learning_rate"):
        train_or_resume(change(config, learning_rate=1.0), tmp_path / "run", workers=0, quiet=True)


def test_a_run_from_a_burn_in_has_its_size_queries_and_backbone(tmp_path):
    options = {"image_size": 48, "num_queries": 33, "backbone": "tiny"}
    splits = data(size=(64, 64), side=20.0)
    config = new_config("photos", "supervised", data="my", steps=1, **LITTLE, **options)
    Run(config, tmp_path / "a", splits=splits, workers=0, quiet=True).save()
    config = new_config("photos", data="my", burn_in=str(tmp_path / "a"), **LITTLE)
    run = Run(config, tmp_path / "b", splits=splits, workers=0, quiet=True)
    assert run.config.image_size == 48 and run.method.student.num_queries == 33
    assert any("as in" in note for note in run.notes)


def test_the_stage_of_one_to_many_matching_lasts_to_the_end(tmp_path):
    config = new_config("photos", data="my", steps=8, **LITTLE)
    run = Run(config, tmp_path, splits=data(size=(64, 64), side=20.0), workers=0, quiet=True)
    assert run.method.stage(7) == "one_to_many"
    run.method.after_step(7)
    assert run.method.student.nms == pytest.approx(0.6)


@pytest.mark.parametrize("method", ["supervised", "semi-detr"])
def test_measuring_the_cost_of_a_step_changes_nothing(method, splits, tmp_path):
    ends = []
    for measured in (False, True):
        config = small(method, steps=2, score_threshold=0.0)
        run = Run(config, tmp_path / f"{measured}", splits=splits, workers=0, quiet=True)
        before = torch.random.get_rng_state()
        if measured:
            assert memory.time_of_step(run.engine, (96, 96), 2, 2) > 0
            assert "a step takes" in run.cost_of_a_step()
        assert torch.equal(before, torch.random.get_rng_state())
        run.run()
        ends.append(run.method.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value.nan_to_num(), ends[1][name].nan_to_num()), name


def test_a_run_of_days_is_told(splits, tmp_path, monkeypatch):
    run = Run(small("supervised"), tmp_path, splits=splits, quiet=True)
    monkeypatch.setattr("semidetr_lite.training.loop.time_of_step", lambda *_: 1e5)
    assert "lower --image-size" in run.cost_of_a_step()


def test_an_ablation_wants_its_steps(tmp_path):
    with pytest.raises(UserError, match="give --steps"):
        Ablation(tmp_path, tmp_path / "a.jsonl", PRESETS["photos"])


def test_the_open_preset_can_be_written_and_read():
    text = config_json(new_config("photos"))
    assert json.loads(text)["steps"] == 0 and isinstance(PRESETS["photos"], Settings)
    for name in ("steps", "batch_size", "unlabelled_batch_size"):
        with pytest.raises(UserError, match="greater than or equal to 1, got 0"):
            new_config("digits", **{name: 0})


def test_photographs_go_from_a_folder_to_a_picture(monkeypatch, tmp_path, capsys):
    images = coco_folder(tmp_path / "data")
    words = ["--data", images, "--steps", 1, "--batch-size", 2, "--unlabelled-batch-size", 2]
    first = [*words, "--method", "supervised", "--out", tmp_path / "first"]
    assert train(monkeypatch, *first) == 0
    more = tmp_path / "more"
    more.mkdir()
    Image.fromarray(np.zeros((60, 80, 3), dtype=np.uint8)).save(more / "a.png")
    second = ["--unlabelled", more, "--burn-in", tmp_path / "first", "--out", tmp_path / "second"]
    assert train(monkeypatch, *words, *second) == 0, capsys.readouterr().err
    command = ["semidetr", "predict", tmp_path / "second", more, "--out", tmp_path / "found"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    assert cli.main() == 0 and len(list((tmp_path / "found").glob("*.png"))) == 1
    alone = ["--missing-labels", "background", "--out", tmp_path / "third"]
    assert train(monkeypatch, *words, *alone) == 2
    assert "no unlabelled image" in capsys.readouterr().err
