"""An exported detector gives the same scores and boxes outside, on images of any size."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from semidetr_lite import cli, export
from semidetr_lite.detectors import deformable
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.errors import UserError
from semidetr_lite.training.checkpoint import save_weights

SMALL = {
    "num_queries": 5, "dim": 16, "heads": 2, "levels": 2, "points": 2, "dim_feedforward": 16, "encoder_layers": 1,
    "decoder_layers": 1, "backbone": "tiny", "anchor_size": 0.1,
}  # fmt: skip
CATEGORIES = [{"id": 3, "name": "box"}, {"id": 7, "name": "bar"}]


def detector() -> DINO:
    made = DINO(num_classes=2, **SMALL).eval()
    with torch.no_grad():  # so that scores differ
        made.class_head.weight.normal_()
        made.box_head[-1].weight.normal_(std=0.3)
    made.categories, made.nms, made.test_size = CATEGORIES, 0.6, (96, 160)
    return made


def test_an_onnx_file_agrees_on_mixed_sizes(tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = detector()
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, made, "dino", SMALL, CATEGORIES)
    before = deformable.level_layout, deformable.select_kernel
    monkeypatch.setattr(sys, "argv", ["semidetr", "export", str(weights)])
    assert cli.main() == 0
    assert (deformable.level_layout, deformable.select_kernel) == before
    printed = capsys.readouterr().out
    assert "short side 96" in printed and "IoU 0.6" in printed and "differ by" in printed

    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx")
    props = session.get_modelmeta().custom_metadata_map
    assert json.loads(props["categories"]) == ["box", "bar"] and json.loads(props["nms"]) == 0.6
    for size in ((64, 64), (97, 203)):
        image = torch.rand(3, *size)
        scores, boxes = session.run(["scores", "boxes"], {"image": image[None].numpy()})
        made.test_size = None
        found = made.detect(image, nms=1.0)[0]
        order = np.argsort(-scores[0].ravel(), kind="stable")
        np.testing.assert_allclose(scores[0].ravel()[order], found["scores"], atol=1e-5)
        theirs = boxes[0][order // 2] * [size[1], size[0], size[1], size[0]]
        limits = [size[1], size[0]] * 2
        np.testing.assert_allclose(theirs.clip(0, limits), found["boxes"], atol=1e-2)

    monkeypatch.setattr(export, "largest_difference", lambda *_: 0.1)
    content = (tmp_path / "detector.onnx").read_bytes()
    monkeypatch.setattr(export, "_onnx_program", lambda model: Program(content))
    with pytest.raises(UserError, match="differ from the detector's by 0.1"):
        export.export_onnx(made, tmp_path / "detector.onnx")


class Program:
    """What torch returns, of a file that is there already."""

    def __init__(self, content: bytes):
        self.content, self.model = content, SimpleNamespace(metadata_props={})

    def save(self, path) -> None:
        path.write_bytes(self.content)


def test_what_cannot_be_exported_is_one_line(tmp_path, monkeypatch, capsys):
    kwargs = {"num_queries": 5, "dim": 16, "heads": 2, "dim_feedforward": 16, "level": 0}
    detr = DETR(num_classes=2, backbone="tiny", encoder_layers=1, decoder_layers=1, **kwargs)
    with pytest.raises(UserError, match="DETR cannot be exported: dino and deformable-detr can"):
        export.export_onnx(detr, tmp_path / "a.onnx")
    save_weights(tmp_path / "a.safetensors", detector(), "dino", SMALL, CATEGORIES)
    words = ["semidetr", "export", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "a.pt")]
    monkeypatch.setattr(sys, "argv", words)
    assert cli.main() == 2 and "give --out such a name" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="pip install onnx"):
        export.export_onnx(detector(), tmp_path / "a.onnx")
