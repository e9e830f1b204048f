"""A run starts from what fits of a file, by class names; a file that fits nothing is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from semidetr_lite.data.coco import COCO_IDS
from semidetr_lite.detectors.backbone import make_backbone
from semidetr_lite.detectors.deformable_detr import DeformableDETR
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.detectors.start_weights import (
    COCO_NAMES,
    class_rows,
    reorder_classes,
    start_from,
)
from semidetr_lite.errors import UserError
from semidetr_lite.training.checkpoint import save_weights
from semidetr_lite.training.loop import Run
from semidetr_lite.training.presets import make_detector
from semidetr_lite.training.settings import DetectorKwargs, change
from tests.test_public_weights import BUILD, aliases, random_file
from tests.test_train import small, splits  # noqa: F401  (a fixture)

TINY = {"dim": 16, "heads": 2, "dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2}


def tiny(num_classes: int, queries: int = 6, kind=DINO, **changes):
    return kind(num_classes, num_queries=queries, backbone="tiny", **{**TINY, **changes})


def names(*words: str) -> list[dict]:
    return [{"id": number, "name": word} for number, word in enumerate(words, 1)]


def refusal(call, *words) -> None:
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def test_coco_has_80_names_for_its_80_ids():
    assert len(COCO_NAMES) == len(COCO_IDS) == len(set(COCO_NAMES)) == 80


def test_names_are_equal_whatever_their_case_and_spaces():
    assert class_rows(["Traffic light", "cat"], ["dog", "traffic_light"]) == {
        "traffic_light": (0, 1)
    }


LAYOUTS = ["dino_r50_4scale", "deformable_detr_r50_two_stage", "detr_r50", "hf_detr_resnet50_v5"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_files_of_91_classes_start_a_detector_of_three(name, tmp_path):
    """All but the class rows, the first queries, and the rows of "dog" and "person"."""
    kind, arguments = BUILD[name]
    path = tmp_path / "published.pth"
    torch.save({"model": aliases(name, random_file(name))}, path)
    detector = kind(num_classes=3, num_queries=50, **arguments)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    report = start_from(detector, path, names("dog", "mitosis", "person"))
    after = detector.state_dict()
    assert report.classes == ["dog", "person"] and report.fraction > 0.99
    left = [key for key in report.left if not re.search("class|denoising", key)]
    assert left == [] and any("dog, person" in line for line in report.lines())
    body = [key for key in report.taken if before[key].is_floating_point()]
    assert all(not torch.equal(after[key], before[key]) for key in body)
    rows = [key for key in report.partly if key.endswith("class_head.weight")] or [
        key for key in report.partly if "class_head" in key and key.endswith("weight")
    ]
    for key in rows:
        assert not torch.equal(after[key][0], before[key][0])
        assert torch.equal(after[key][1], before[key][1])  # nobody knows "mitosis"


def test_rows_of_an_own_file_follow_the_names(tmp_path):
    source, path = tiny(3), tmp_path / "a.safetensors"
    save_weights(path, source, "dino", {}, names("cat", "ox", "dog"))
    detector = tiny(2, queries=4)
    fresh = detector.state_dict()["class_head.weight"].clone()
    report = start_from(detector, path, names("dog", "bird"))
    theirs, ours = source.state_dict(), detector.state_dict()
    for key in ("class_head.weight", "proposal_class.bias", "denoising.labels.weight"):
        assert torch.equal(ours[key][0], theirs[key][2])
    assert torch.equal(ours["class_head.weight"][1], fresh[1])
    assert torch.equal(ours["denoising.labels.weight"][2], theirs["denoising.labels.weight"][3])
    assert torch.equal(ours["content.weight"], theirs["content.weight"][:4])
    body = [key for key in ours if not re.match("class|proposal_class|denoising|content", key)]
    assert all(torch.equal(ours[key], theirs[key]) for key in body)
    assert report.classes == ["dog"] and report.fraction == 1


def test_no_object_of_detr_stays_the_last_row(tmp_path):
    source, path = tiny(3, kind=DETR, level=0), tmp_path / "a.safetensors"
    save_weights(path, source, "detr", {}, names("cat", "ox", "dog"))
    detector = tiny(1, kind=DETR, level=0)
    start_from(detector, path, names("dog"))
    ours, theirs = detector.class_head.weight, source.class_head.weight
    assert torch.equal(ours, theirs[[2, 3]])


def test_more_queries_than_the_file_has(tmp_path):
    source, path = tiny(2), tmp_path / "a.safetensors"
    save_weights(path, source, "dino", {}, names("cat", "ox"))
    detector = tiny(2, queries=9)
    before = detector.content.weight.clone()
    report = start_from(detector, path, names("cat", "ox"))
    assert torch.equal(detector.content.weight[:6], source.content.weight)
    assert torch.equal(detector.content.weight[6:], before[6:])
    assert report.partly == ["content.weight"] or "content.weight" in report.partly


@pytest.mark.parametrize("make", ["other size", "other names", "text", "gone", "foreign"])
def test_files_that_fit_nothing(make, tmp_path):
    path = tmp_path / "a.safetensors"
    if make == "other size":
        source = tiny(2, dim=32)
        source.backbone = make_backbone("resnet18")
        save_weights(path, source, "dino", {}, names("cat", "ox"))
    elif make == "other names":
        save_file({"layer.weight": torch.zeros(3)}, path, {"semidetr_lite": json.dumps(
            {"detector": "dino", "categories": names("cat")})})  # fmt: skip
    elif make == "text":
        path.write_text("no weights")
    elif make == "foreign":
        save_file({"layer.weight": torch.zeros(3)}, path)
    detector = tiny(2)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    refusal(lambda: start_from(detector, path, names("cat", "ox")), path)
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_names_of_a_config_json_beside_the_file(tmp_path):
    name = "hf_detr_resnet50_v5"
    save_file(
        {key: value.clone() for key, value in random_file(name).items()}, tmp_path / "m.safetensors"
    )
    labels = {str(row): f"thing {row}" for row in range(91)}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    detector = DETR(num_classes=1, num_queries=20)
    report = start_from(detector, tmp_path / "m.safetensors", names("thing 5"))
    assert report.classes == ["thing 5"]


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_starts_from_weights_and_so_does_its_teacher(splits, tmp_path, capsys):
    path = tmp_path / "start.safetensors"
    config = small("supervised")
    source = make_detector("dino", len(splits.categories), config.detector_kwargs)
    save_weights(path, source, "dino", config.detector_kwargs.given(), splits.categories)
    run = Run(change(config, weights=str(path)), tmp_path / "run", splits=splits, workers=0)
    assert "100 % of the numbers" in capsys.readouterr().err
    for network in (run.method.student, run.method.teacher):
        for key, value in network.state_dict().items():
            assert torch.equal(value, source.state_dict()[key]), key


def test_weights_and_burn_in_together_are_refused(splits, tmp_path):
    config = change(small("supervised"), weights="a.pth", burn_in="b")
    refusal(lambda: Run(config, tmp_path / "run", splits=splits), "--weights a.pth", "--burn-in b")


def test_class_rows_in_another_order_are_put_in_ours():
    detector = tiny(3)
    tensors = detector.state_dict()
    ours = reorder_classes(tensors, ["a", "b", "c"], ["c", "a", "b"], "x")
    for key in ("class_head.weight", "class_head.bias", "proposal_class.weight"):
        assert torch.equal(ours[key], tensors[key][[2, 0, 1]])
    assert torch.equal(
        ours["denoising.labels.weight"], tensors["denoising.labels.weight"][[2, 0, 1, 3]]
    )
    assert ours["content.weight"] is tensors["content.weight"]
    assert reorder_classes(tensors, ["a", "b"], ["a", "b"], "x") is tensors


def test_other_classes_are_refused_by_name():
    tensors = DeformableDETR(num_classes=2, num_queries=3, backbone="tiny", **TINY).state_dict()
    refusal(lambda: reorder_classes(tensors, ["a", "ox"], ["a", "b"], "run/last.pt"),
            "run/last.pt", "'ox'", "'b'", "--weights")  # fmt: skip


def test_a_burn_in_run_whose_classes_have_another_order(splits, tmp_path):
    """Its rows follow the names: the detector finds the same objects under the same names."""
    first = Run(small("supervised"), tmp_path / "first", splits=splits, workers=0, quiet=True)
    first.save()
    turned = type(splits)(**{**vars(splits), "categories": splits.categories[::-1]})
    config = change(small("supervised"), burn_in=str(tmp_path / "first"))
    second = Run(config, tmp_path / "second", splits=turned, workers=0, quiet=True)
    ours, theirs = (run.method.student.class_head.weight for run in (second, first))
    assert torch.equal(ours, theirs.flip(0))
    other = [{**splits.categories[0], "name": "ox"}, *splits.categories[1:]]
    changed = type(splits)(**{**vars(splits), "categories": other})
    refusal(lambda: Run(config, tmp_path / "third", splits=changed, workers=0), "'ox'",
            repr(splits.categories[0]["name"]))  # fmt: skip


# ---- backbones -----------------------------------------------------------------------------------


def test_a_resnet_file_must_hold_a_resnet(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": random_file("dino_r50_4scale")}, path)
    backbone = make_backbone("resnet50", str(path))  # of a whole detector the backbone is taken
    value = backbone.layers[2][0].conv1.weight
    assert value.unique().numel() == 1
    refusal(lambda: make_backbone("resnet18", str(path)), path, "of the 100 entries of a resnet18")
    torch.save({"something": torch.zeros(3)}, path)
    refusal(lambda: make_backbone("resnet18", str(path)), path, "0 of the 100 entries")


class TestTimm:
    @pytest.fixture(autouse=True)
    def timm(self):
        return pytest.importorskip("timm")

    def test_maps_at_the_strides_of_the_other_backbones(self):
        backbone = make_backbone("timm:tf_efficientnet_lite0")
        maps = backbone(torch.rand(1, 3, 64, 96))
        assert [tuple(level.shape[1:]) for level in maps] == [(40, 8, 12), (112, 4, 6), (320, 2, 3)]
        assert backbone.channels == (40, 112, 320)
        assert make_backbone("timm:resnet18", with_stride_4=True).channels == (64, 128, 256, 512)

    @pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050"])
    def test_no_batch_statistics(self, name):
        backbone = make_backbone(f"timm:{name}").train()
        images = torch.rand(3, 3, 64, 64)
        before = [buffer.clone() for buffer in backbone.buffers()]
        together, alone = backbone(images), backbone(images[:1])
        assert all(torch.allclose(a[:1], b, atol=1e-4) for a, b in zip(together, alone))
        assert all(torch.equal(a, b) for a, b in zip(backbone.buffers(), before))

    def test_weights_from_a_file(self, timm, tmp_path):
        net = timm.create_model("resnet18").eval()
        torch.save(net.state_dict(), tmp_path / "w.pth")
        backbone = make_backbone("timm:resnet18", str(tmp_path / "w.pth")).eval()
        images = torch.rand(2, 3, 64, 64)
        last = net.forward_features(images)
        assert torch.allclose(backbone(images)[-1], last, atol=1e-4)
        torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "w.pth")
        refusal(lambda: make_backbone("timm:tf_efficientnet_lite0", str(tmp_path / "w.pth")),
                tmp_path / "w.pth", "tf_efficientnet_lite0", "0 of the")  # fmt: skip

    def test_a_port_with_other_names_for_the_same_shapes(self, timm, tmp_path, capsys):
        net = timm.create_model("mobilenetv3_small_050").eval()
        other = {f"_{key}": value for key, value in net.state_dict().items()}
        torch.save(other, tmp_path / "w.pth")
        backbone = make_backbone("timm:mobilenetv3_small_050", str(tmp_path / "w.pth"))
        ours = backbone.net.state_dict()
        theirs = net.state_dict()
        assert torch.equal(ours["conv_stem.weight"], theirs["conv_stem.weight"])
        assert "taken in their order" in capsys.readouterr().err
        torch.save(dict(list(other.items())[::-1]), tmp_path / "w.pth")
        refusal(
            lambda: make_backbone("timm:mobilenetv3_small_050", str(tmp_path / "w.pth")), "0 of the"
        )

    @pytest.mark.parametrize(
        "name, words",
        [("no_such_model", ["no_such_model"]), ("vit_tiny_patch16_224", ["strides", "vit_tiny"])],
    )
    def test_names_that_are_none(self, name, words):
        refusal(lambda: make_backbone(f"timm:{name}"), *words)

    def test_the_images_are_normalised_as_the_model_expects(self):
        kwargs = DetectorKwargs(**TINY, num_queries=5, backbone="timm:tf_efficientnet_lite0")
        detector = make_detector("dino", 2, kwargs)
        assert detector.mean.flatten().tolist() == [0.5] * 3 == detector.std.flatten().tolist()
        kwargs = DetectorKwargs(**TINY, num_queries=5, backbone="timm:resnet18")
        assert make_detector("dino", 2, kwargs).mean.flatten()[0] == pytest.approx(0.485)
