"""Training that gives the best it had: figures at the size of training, classes, best weights, an
early end; and measuring on other data.
"""

import dataclasses
import json
import sys

import pytest
import torch
from safetensors import safe_open

from semidetr_lite import cli, load_detector
from semidetr_lite.data import digits
from semidetr_lite.data.splits import Subset
from semidetr_lite.errors import UserError
from semidetr_lite.training import loop
from semidetr_lite.training import measure as measure_module
from semidetr_lite.training.loop import Run
from semidetr_lite.training.measure import Renamed, chunks_of, plain_pseudo_boxes
from tests.test_cli import coco_folder
from tests.test_train import go, small, splits  # noqa: F401  (a fixture)


def script(monkeypatch, aps: list[tuple[float, float]]) -> None:
    """Make the measurements of a run say these APs, of student and teacher in turn."""
    values = iter([ap for pair in aps for ap in pair])
    figures = dict.fromkeys(("AP50",), 0.0)
    monkeypatch.setattr(loop, "measure", lambda *_: {**figures, "AP": next(values)})


def header(file) -> dict:
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["semidetr_lite"])


def test_the_best_weights_are_kept_beside_the_last(splits, tmp_path, monkeypatch):
    script(monkeypatch, [(0.1, 0.2), (0.4, 0.3), (0.3, 0.3)])
    config = small("supervised", steps=6, log_every=1, evaluate_every=2, learning_rate=1e-2)
    kept = {}
    real = Run.save

    def save(run):
        real(run)
        kept[run.step] = (tmp_path / "student.safetensors").read_bytes()

    monkeypatch.setattr(Run, "save", save)
    last = go(config, tmp_path, splits)
    assert last["best"] == {"AP": 0.4, "weights": "student", "step": 4}
    assert header(tmp_path / "best.safetensors")["measured"] == last["best"]
    (tmp_path / "then.safetensors").write_bytes(kept[4])
    best, then = load_detector(tmp_path, "best"), load_detector(tmp_path / "then.safetensors")
    final = load_detector(tmp_path, "student")
    for name, value in best.state_dict().items():
        assert torch.equal(value, then.state_dict()[name])
    assert any(not torch.equal(v, final.state_dict()[n]) for n, v in best.state_dict().items())
    (tmp_path / "best.safetensors").unlink()
    teacher = load_detector(tmp_path, "teacher").state_dict()
    fallback = load_detector(tmp_path, "best").state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in fallback.items())


def test_of_equal_weights_the_teacher_is_best_and_without_truth_none(splits, tmp_path, monkeypatch):
    nan = float("nan")
    script(monkeypatch, [(nan, nan), (0.2, 0.2)])
    config = small("supervised", steps=2, log_every=1, evaluate_every=1)
    last = go(config, tmp_path / "a", splits)
    assert last["best"] == {"AP": 0.2, "weights": "teacher", "step": 2}
    script(monkeypatch, [(nan, nan)])
    config = small("supervised", steps=1, log_every=1, evaluate_every=1)
    assert go(config, tmp_path / "b", splits)["best"] is None
    assert not (tmp_path / "b/best.safetensors").exists()


def test_patience_ends_a_run_early_and_it_stays_ended(splits, tmp_path, monkeypatch):
    aps = [(0.1, 0.2), (0.1, 0.3), (0.2, 0.1), (0.3, 0.1)] + [(0.9, 0.9)] * 9
    script(monkeypatch, aps)
    config = small("supervised", steps=9, log_every=1, evaluate_every=1, patience=2)
    last = go(config, tmp_path, splits)
    assert last["step"] == 4 and set(last["test"]) == {"student", "teacher"}
    assert last["best"]["step"] == 2
    assert Run(None, tmp_path, resume=True, splits=splits, quiet=True).finished
    assert "ended early, at step 4 of 9" in "\n".join(cli._result_lines(last, 9))


def test_suppression_is_kept_where_it_measures_better(splits, tmp_path, monkeypatch):
    """The student is better with it, the teacher without; files and figures of the end follow."""
    aps = {
        ("student", None): 0.1,
        ("student", 0.6): 0.3,
        ("teacher", None): 0.2,
        ("teacher", 0.6): 0.1,
    }
    config = small("supervised", steps=2, log_every=1, evaluate_every=2, try_nms=0.6)
    run = Run(config, tmp_path, splits=splits, workers=0, quiet=True)
    names = {id(run.method.student): "student", id(run.method.teacher): "teacher"}
    tested = {}
    real = loop.measure_classes

    def measure_classes(detector, *rest):
        tested[names[id(detector)]] = detector.nms
        return real(detector, *rest)

    def measure(detector, *_):
        return {"AP50": 0.5, "AP": aps[names[id(detector)], detector.nms]}

    monkeypatch.setattr(loop, "measure", measure)
    monkeypatch.setattr(loop, "measure_classes", measure_classes)
    last = run.run()
    assert (last["AP_student"], last["AP_teacher"]) == (0.3, 0.2)
    assert last["best"] == {"AP": 0.3, "weights": "student", "step": 2, "nms": 0.6}
    assert tested == {"student": 0.6, "teacher": None}
    kept = {name: load_detector(tmp_path, name).nms for name in ("best", "student", "teacher")}
    assert kept == {"best": 0.6, "student": 0.6, "teacher": None}
    assert run.method.student.nms is None  # training goes on as before
    assert "--nms 0.6" in "\n".join(cli._result_lines(last, 2))


def test_suppression_is_not_tried_where_weights_need_it_anyway(splits, tmp_path, monkeypatch):
    config = small("supervised", steps=1, log_every=1, try_nms=0.6)
    run = Run(config, tmp_path, splits=splits, workers=0, quiet=True)
    run.method.student.nms = run.method.teacher.nms = 0.5
    seen = []
    figures = {"AP": 0.1, "AP50": 0.1}
    monkeypatch.setattr(loop, "measure", lambda detector, *_: seen.append(detector.nms) or figures)
    run.run()
    assert seen == [0.5, 0.5]
    assert "nms" not in run.best


def test_the_last_line_has_the_ap_of_each_class(splits, tmp_path):
    last = go(small("supervised", steps=1), tmp_path, splits)
    labels = torch.cat([splits.test[index][1]["labels"] for index in range(6)]).tolist()
    for name in ("student", "teacher"):
        rows = last["per_class"][name]
        assert {int(key): row["boxes"] for key, row in rows.items()} == {
            label: labels.count(label) for label in set(labels)
        }
        mean = sum(row["AP"] for row in rows.values()) / len(rows)
        assert mean == pytest.approx(last["test"][name]["AP"])
    printed = cli._result_lines(last, 1)
    assert any(f"of {labels.count(labels[0])} boxes" in line for line in printed)


def test_health_is_measured_at_the_size_of_training(splits, tmp_path):
    config = small("mean-teacher", steps=1, image_size=48)
    run = Run(config, tmp_path, splits=splits, workers=0, quiet=True)
    method, seen = run.method, []
    for detector in (method.student, method.teacher):
        detector.register_forward_pre_hook(
            lambda _, inputs: seen.extend(tuple(image.shape[-2:]) for image in inputs[0])
        )
    large = torch.rand(3, 192, 256)
    boxes = plain_pseudo_boxes(method, [large])
    assert seen == [(48, 64)] and boxes.boxes.max() > 64  # in pixels of the image given
    measure_module.matched_costs_of_image(method, large, boxes)
    assert seen == [(48, 64)] * 2
    resized = method.teacher.at_test_size(large)
    small_boxes = plain_pseudo_boxes(method, [resized])
    torch.testing.assert_close(boxes.boxes, small_boxes.boxes * 4, atol=1e-2, rtol=0)
    torch.testing.assert_close(boxes.scores, small_boxes.scores)


def test_images_are_read_in_chunks_that_fit_into_memory(monkeypatch):
    monkeypatch.setattr(measure_module, "PIXELS_READ_AT_ONCE", 100)
    data = [(torch.zeros(3, side, side), {"index": index}) for index, side in enumerate([5, 5, 9, 20, 2])]  # fmt: skip
    chunks = [[target["index"] for _, target in chunk] for chunk in chunks_of(data, range(5))]
    assert chunks == [[0, 1, 2], [3], [4]]


def test_a_progress_line_says_epoch_time_left_and_memory(splits, tmp_path, capsys):
    Run(small("supervised", steps=2), tmp_path, splits=splits, workers=0).run()
    line = next(line for line in capsys.readouterr().out.splitlines() if "step 2" in line)
    assert "epoch 1.0, 0 s left" in line and "GB at most" in line  # 2 steps of 2 of 4 images


# ---- other data ----------------------------------------------------------------------------------


def test_labels_of_other_data_are_the_detectors_by_name():
    data = Subset(digits.DigitScenes("test", 6), range(6))
    names = [row["name"] for row in digits.CATEGORIES]
    categories = [{"name": name} for name in reversed(names[:5])]
    renamed = Renamed(data, names, categories)
    assert renamed.unknown == names[5:]
    for index in range(6):
        before, after = data[index][1], renamed[index][1]
        known = before["labels"] < 5
        assert torch.equal(after["labels"], 4 - before["labels"][known])
        assert torch.equal(after["boxes"], before["boxes"][known])
    with pytest.raises(UserError, match="the detector knows 'cat', but the data have '0', '1'"):
        Renamed(data, names, [{"name": "cat"}])


def test_evaluate_measures_a_run_on_other_data(splits, tmp_path, monkeypatch, capsys):
    labelled, tune = OddAndEven(splits.labelled), OddAndEven(splits.tune)
    categories = [{"id": 1, "name": "bar"}, {"id": 2, "name": "box"}]
    changed = {"labelled": labelled, "tune": tune, "test": tune, "categories": categories}
    go(small("supervised", steps=1), tmp_path / "run", dataclasses.replace(splits, **changed))
    data = coco_folder(tmp_path / "data")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["semidetr", "evaluate", str(tmp_path / "run"), *words])
        return cli.main()

    assert run("--data", str(data)) == 0
    printed = capsys.readouterr().out
    assert "of 1 boxes" in printed and "AP_small" in printed  # of its three validation images
    text = (data / "instances_val.json").read_text().replace('"bar"', '"lid"')
    (data / "other.json").write_text(text.replace('"box"', '"pen"'))
    assert run("--data", str(data / "other.json"), "--images", str(data / "images")) == 2
    assert "the detector knows 'bar', 'box', but the data have" in capsys.readouterr().err


class OddAndEven:
    """A dataset whose digits are of two classes, odd and even."""

    def __init__(self, dataset):
        self.dataset, self.sizes = dataset, dataset.sizes

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, target = self.dataset[index]
        return image, {**target, "labels": target["labels"] % 2}
