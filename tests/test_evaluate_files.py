"""`semidetr evaluate FILE --data DATA`: weights that others published, measured on a data set."""

import pytest
import torch
from test_cli import coco_folder, run
from test_parity import FULL, ours, theirs
from test_public_weights import aliases, build, random_file

from semidetr_lite import cli
from semidetr_lite.data import coco
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.detectors.public_weights import build_public_detector, load_public_weights
from semidetr_lite.errors import UserError
from semidetr_lite.training import measure as measure_module
from semidetr_lite.training.checkpoint import save_weights
from semidetr_lite.training.measure import measure
from semidetr_lite.training.presets import make_detector


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_the_detector_of_a_semi_detr_file_is_built_and_filled(network, tmp_path):
    tensors = aliases("semidetr_ssod_r50_coco", random_file("semidetr_ssod_r50_coco"))
    torch.save({"state_dict": tensors, "meta": {"epoch": 1}}, tmp_path / "iter_120000.pth")
    built = build_public_detector(tmp_path / "iter_120000.pth", 80, network)
    expected = build("semidetr_ssod_r50_coco")
    load_public_weights(expected, tmp_path / "iter_120000.pth", network)
    assert type(built) is DINO and built.num_queries == 900 and not built.training
    assert built.test_size == (800, 1333) and built.eps == 1e-5
    for key, value in expected.state_dict().items():
        assert torch.equal(built.state_dict()[key], value), key
    with pytest.raises(UserError, match="weights for 80 classes, but the data have 3"):
        build_public_detector(tmp_path / "iter_120000.pth", 3)


def test_a_published_file_is_measured_on_the_validation_images(monkeypatch, tmp_path, capsys):
    data = coco_folder(tmp_path / "data")
    train, val = (data / f"instances_{split}.json" for split in ("train", "val"))
    torch.save(theirs("detr", 2, FULL).state_dict(), tmp_path / "model.bin")
    expected, seen = ours("detr", 2, FULL), []
    load_public_weights(expected, tmp_path / "model.bin")

    detect_dataset = measure_module.detect_dataset

    def watched(detector, dataset):
        seen.append((detector, dataset))
        return detect_dataset(detector, dataset)

    monkeypatch.setattr(measure_module, "detect_dataset", watched)
    words = ["evaluate", tmp_path / "model.bin", "--data", train, "--images", data / "images"]
    assert run(monkeypatch, *words, "--validation", val, "--nms", "0.5", "--voc") == 0
    printed = capsys.readouterr().out
    assert "AR100 " in printed and "AP50_11point" in printed  # COCO's figures, and VOC's
    ((detector, dataset),) = seen
    assert len(dataset) == 3 and not detector.training
    assert detector.test_size == (800, 1333) and detector.nms == 0.5
    state = detector.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(state[key].to(value), value), key


def test_a_file_of_this_package_is_measured_too(monkeypatch, tmp_path, capsys):
    data = coco_folder(tmp_path / "data")
    train, val = (data / f"instances_{split}.json" for split in ("train", "val"))
    kwargs = {"num_queries": 5, "dim": 16, "heads": 2, "dim_feedforward": 16, "backbone": "tiny",
              "encoder_layers": 1, "decoder_layers": 1}  # fmt: skip
    detector = make_detector("dino", 2, kwargs).eval()
    categories = [{"id": 3, "name": "box"}, {"id": 7, "name": "bar"}]
    save_weights(tmp_path / "w.safetensors", detector, "dino", kwargs, categories)
    words = ["evaluate", tmp_path / "w.safetensors", "--data", train]
    words += ["--images", data / "images", "--validation", val]
    assert run(monkeypatch, *words) == 0
    images = coco.load(train, data / "images", percent=100.0, validation=val).test
    expected = measure(detector, images)
    assert f"AR100      {100 * expected['AR100']:5.1f}" in capsys.readouterr().out


def test_what_does_not_go_together_is_said(monkeypatch, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "w.pth").write_bytes(b"x")
    for words, said in (
        ([tmp_path / "w.pth"], "say with --data what to measure it on"),
        ([tmp_path / "run", "--data", "x"], "no such weights"),
        ([tmp_path / "w.pth", "--data", tmp_path / "none"], "none"),
    ):
        assert run(monkeypatch, "evaluate", *words) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert "evaluate" in cli.COMMANDS
