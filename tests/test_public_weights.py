"""Every published layout loads whole: random tensors of the published names and shapes."""

import argparse
import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from semidetr_lite.detectors.deformable_detr import DeformableDETR
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.detectors.public_weights import COCO_IDS, describe, load_public_weights
from semidetr_lite.errors import UserError

LAYOUTS = json.loads(gzip.decompress((Path(__file__).parent / "public_keys.json.gz").read_bytes()))
REFINE, TWO_STAGE = {"with_box_refine": True}, {"with_box_refine": True, "two_stage": True}
BUILD = {
    "detr_r50": (DETR, {}),
    "deformable_detr_r50": (DeformableDETR, {}),
    "deformable_detr_r50_box_refine": (DeformableDETR, REFINE),
    "deformable_detr_r50_two_stage": (DeformableDETR, TWO_STAGE),
    "dino_r50_4scale": (DINO, {}),
    "semidetr_ssod_r50_coco": (DINO, {"num_classes": 80}),
    "semidetr_sup_dino_r50_coco": (DINO, {"num_classes": 80}),
    **{
        f"hf_{name}_{form}": (kind, arguments)
        for form in ("v4_published", "v5")
        for name, kind, arguments in (
            ("detr_resnet50", DETR, {}),
            ("deformable_detr", DeformableDETR, {}),
            ("deformable_detr_with_box_refine", DeformableDETR, REFINE),
            ("deformable_detr_with_box_refine_two_stage", DeformableDETR, TWO_STAGE),
        )
    },
    "hf_detr_resnet50_no_timm_v4": (DETR, {}),
}


def test_every_layout_is_tried():
    assert set(BUILD) | {"torchvision_resnet50"} == set(LAYOUTS)


def random_file(name: str) -> dict:
    """A state dict of this layout; each entry is one random number, stored once."""
    tensors = {}
    for key, shape, dtype in LAYOUTS[name]:
        size = [] if shape == "scalar" else [int(side) for side in shape.split("x")]
        tensors[key] = (
            torch.zeros(size, dtype=torch.int64) if dtype == "int64" else torch.rand(1).expand(size)
        )
    return tensors


def aliases(name: str, tensors: dict) -> dict:
    """The entries that are one tensor under several names made equal, as published."""
    for key in tensors:
        short = key.replace("transformer.decoder.", "").replace("model.decoder.", "")
        if "bbox_embed." in key or "class_embed." in key:
            if (
                name.startswith("dino")
                or name
                in (
                    "deformable_detr_r50",
                    "hf_deformable_detr_v4_published",
                    "hf_deformable_detr_v5",
                )
            ) and "enc_out" not in key:
                head, number, rest = short.split(".", 2)
                short = f"{head}.0.{rest}"
            if short in tensors:
                tensors[key] = tensors[short]
        elif ".fc_cls." in key or ".fc_reg." in key:
            head, rest = key.split(".fc_", 1)
            kind, number, rest = rest.split(".", 2)
            tensors[key] = tensors[f"{head}.fc_{kind}.0.{rest}"]
    return tensors


def build(name: str, **changes):
    """A detector for a layout, every parameter set to nan."""
    kind, arguments = BUILD[name]
    with torch.device("meta"):
        detector = kind(**{"num_classes": 91, **arguments, **changes})
    detector = detector.to_empty(device="cpu")
    with torch.no_grad():
        for entry in detector.state_dict().values():
            entry.fill_(float("nan"))
    return detector


@pytest.mark.parametrize("name", BUILD)
def test_a_layout_loads_whole(name, tmp_path):
    tensors = aliases(name, random_file(name))
    wrapping = {"semidetr": "state_dict"}.get(name.split("_")[0], "model")
    content = (
        tensors
        if name.startswith("hf")
        else {wrapping: tensors, "args": argparse.Namespace(lr=1e-4), "epoch": 3}
    )
    torch.save(content, tmp_path / "weights.pth")
    detector = build(name)
    report = load_public_weights(detector, tmp_path / "weights.pth")
    assert report.unmapped == []
    assert len(report.mapped) + len(report.ignored) == len(tensors)
    assert all(
        "num_batches_tracked" in key or key.startswith(("student.", "projector."))
        for key in report.ignored
    )
    assert all(entry.isfinite().all() for entry in detector.state_dict().values())
    given = {float(entry.flatten()[0]) for entry in tensors.values()}
    assert {
        float(entry.flatten()[0]) for entry in detector.state_dict().values()
    } <= given  # nothing is made up


SPOTS = {  # their name -> our name, by hand
    "detr_r50": {
        "transformer.decoder.layers.3.norm1.weight": "decoder.3.self_attention.norm.weight",
        "transformer.decoder.layers.3.norm2.weight": "decoder.3.norm.weight",
        "transformer.decoder.layers.3.norm3.weight": "decoder.3.feed_forward.norm.weight",
        "transformer.decoder.layers.3.multihead_attn.in_proj_weight": "decoder.3.attention.in_proj_weight",
        "transformer.encoder.layers.5.norm1.bias": "encoder.5.self_attention.norm.bias",
        "transformer.encoder.layers.5.linear1.bias": "encoder.5.feed_forward.linear1.bias",
        "backbone.0.body.layer4.2.bn3.running_var": "backbone.layers.3.2.bn3.running_var",
        "query_embed.weight": "positions.weight",
        "class_embed.bias": "class_head.bias",
        "bbox_embed.layers.2.weight": "box_head.4.weight",
    },
    "deformable_detr_r50_two_stage": {
        "transformer.decoder.layers.3.norm1.weight": "decoder.3.norm.weight",
        "transformer.decoder.layers.3.norm2.weight": "decoder.3.self_attention.norm.weight",
        "transformer.decoder.layers.3.norm3.weight": "decoder.3.feed_forward.norm.weight",
        "transformer.encoder.layers.2.self_attn.sampling_offsets.bias": "encoder.2.attention.offsets.bias",
        "class_embed.6.bias": "proposal_class.bias",
        "class_embed.5.bias": "class_heads.5.bias",
        "bbox_embed.6.layers.1.weight": "proposal_box.2.weight",
        "transformer.pos_trans.weight": "box_code.0.weight",
        "transformer.enc_output_norm.bias": "proposal.1.bias",
        "input_proj.3.1.bias": "projections.3.1.bias",
    },
    "dino_r50_4scale": {
        "transformer.decoder.layers.3.norm1.weight": "decoder.3.norm.weight",
        "transformer.decoder.layers.3.norm2.weight": "decoder.3.self_attention.norm.weight",
        "transformer.decoder.ref_point_head.layers.1.weight": "query_positions.2.weight",
        "transformer.decoder.norm.weight": "decoder_norm.weight",
        "transformer.enc_out_bbox_embed.layers.2.bias": "proposal_box.4.bias",
        "transformer.tgt_embed.weight": "content.weight",
        "transformer.level_embed": "level_embedding",
        "label_enc.weight": "denoising.labels.weight",
        "backbone.0.body.conv1.weight": "backbone.stem.0.weight",
    },
    "semidetr_ssod_r50_coco": {
        "teacher.bbox_head.fc_cls.0.bias": "class_head.bias",
        "teacher.bbox_head.fc_reg.5.layers.2.bias": "box_head.4.bias",
        "teacher.bbox_head.fc_enc_reg.layers.1.bias": "proposal_box.2.bias",
        "teacher.bbox_head.transformer.encoder.layers.0.norm2.bias": "encoder.0.feed_forward.norm.bias",
        "teacher.backbone.layer2.0.downsample.1.weight": "backbone.layers.1.0.downsample.1.weight",
    },
}


@pytest.mark.parametrize("name", SPOTS)
def test_entries_go_where_they_belong(name, tmp_path):
    tensors = aliases(name, random_file(name))
    torch.save({"model": tensors}, tmp_path / "weights.pth")
    detector = build(name)
    load_public_weights(detector, tmp_path / "weights.pth")
    own = detector.state_dict()
    for theirs, ours in SPOTS[name].items():
        assert torch.equal(own[ours], tensors[theirs]), theirs


def test_positions_and_contents_are_the_halves_of_one_matrix(tmp_path):
    tensors = random_file("deformable_detr_r50")
    tensors = aliases("deformable_detr_r50", tensors)
    tensors["query_embed.weight"] = torch.randn(300, 512)
    torch.save(tensors, tmp_path / "weights.pth")
    detector = build("deformable_detr_r50")
    load_public_weights(detector, tmp_path / "weights.pth")
    assert torch.equal(detector.positions.weight, tensors["query_embed.weight"][:, :256])
    assert torch.equal(detector.content.weight, tensors["query_embed.weight"][:, 256:])


def test_student_or_teacher_and_the_constants_of_each_program(tmp_path):
    tensors = aliases("semidetr_ssod_r50_coco", random_file("semidetr_ssod_r50_coco"))
    torch.save(
        {"state_dict": tensors, "meta": {"CLASSES": ("a", "b"), "iter": 3}}, tmp_path / "iter_3.pth"
    )
    for part in ("student", "teacher"):
        detector = build("semidetr_ssod_r50_coco")
        load_public_weights(detector, tmp_path / "iter_3.pth", part)
        expected = tensors[f"{part}.bbox_head.transformer.tgt_embed.weight"]
        assert torch.equal(detector.content.weight, expected) and detector.eps == 1e-5
    torch.save(
        {"model": aliases("dino_r50_4scale", random_file("dino_r50_4scale"))}, tmp_path / "dino.pth"
    )
    detector = build("dino_r50_4scale")
    load_public_weights(detector, tmp_path / "dino.pth")
    assert detector.eps == 1e-3
    with pytest.raises(UserError, match="teacher and a student"):
        load_public_weights(detector, tmp_path / "iter_3.pth", "both")


@pytest.mark.parametrize("name", ["detr_r50", "deformable_detr_r50_two_stage", "dino_r50_4scale"])
def test_eighty_classes_take_cocos_rows(name, tmp_path):
    tensors = aliases(name, random_file(name))
    for key, entry in tensors.items():
        if entry.shape[:1] in ((91,), (92,)):
            tensors[key] = (
                torch.arange(len(entry))
                .float()
                .view(-1, *[1] * (entry.dim() - 1))
                .expand(entry.shape)
            )
    torch.save({"model": tensors}, tmp_path / "weights.pth")
    detector = build(name, num_classes=80)
    load_public_weights(detector, tmp_path / "weights.pth")
    assert len(COCO_IDS) == 80 and COCO_IDS[0] == 1 and COCO_IDS[-1] == 90 and 12 not in COCO_IDS
    heads = [detector.class_heads[2]] if name.startswith("deformable") else [detector.class_head]
    heads += [] if name.startswith("detr") else [detector.proposal_class]
    for head in heads:
        assert head.bias[:80].tolist() == COCO_IDS and head.bias[80:].tolist() == [91.0] * (
            len(head.bias) - 80
        )
    if name.startswith("dino"):
        assert detector.denoising.labels.weight[:, 0].tolist() == [*COCO_IDS, 91]


@pytest.mark.parametrize(
    ("name", "left_out", "count"),
    [
        ("hf_deformable_detr_v5", ("class_embed.[1-5]", "bbox_embed.[1-5]"), 545),
        ("hf_deformable_detr_with_box_refine_v5", ("^bbox_embed",), 585),
        ("hf_deformable_detr_with_box_refine_v5", ("^bbox_embed", "class_embed.[1-5]"), 575),
        ("hf_deformable_detr_with_box_refine_two_stage_v5", ("^bbox_embed", "^class_embed"), 598),
    ],
)
def test_safetensors_hold_shared_tensors_once(name, left_out, count, tmp_path):
    tensors = aliases(name, random_file(name))
    tensors = {
        key: entry
        for key, entry in tensors.items()
        if not any(re.search(part, key) for part in left_out)
    }
    assert len(tensors) == count
    save_file(
        {key: entry.clone() for key, entry in tensors.items()}, tmp_path / "model.safetensors"
    )
    detector = build(name)
    load_public_weights(detector, tmp_path / "model.safetensors")
    assert all(entry.isfinite().all() for entry in detector.state_dict().values())


# What cannot be loaded


class Evil:
    def __reduce__(self):
        return print, ("code in a file of weights ran",)


@pytest.fixture
def untouched():
    """A small detector; after the test it has the weights it had."""
    detector = DINO(
        5,
        num_queries=7,
        dim=16,
        heads=2,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=1,
        backbone="tiny",
    )
    before = {key: entry.clone() for key, entry in detector.state_dict().items()}
    yield detector
    assert all(torch.equal(entry, before[key]) for key, entry in detector.state_dict().items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "cannot be read"),
        (b"no weights at all", "cannot be read"),
        ({"model": {"fc.weight": torch.zeros(2)}}, "none of the published"),
        ({}, "none of the published"),
        ([1, 2], "none of the published"),
        (torch.zeros(3), "none of the published"),
        ({"model": {"a": Evil()}}, "cannot be read"),
    ],
)
def test_other_files_get_one_line(untouched, content, words, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=words) as problem:
        load_public_weights(untouched, path)
    assert "weights.pth" in str(problem.value) and "\n" not in str(problem.value)
    assert "ran" not in capsys.readouterr().out


def test_another_detector_and_another_size_are_named(untouched, tmp_path):
    for name, words in (
        ("detr_r50", "build DETR for them"),
        (
            "deformable_detr_r50_two_stage",
            r"build DeformableDETR\(with_box_refine=True, two_stage=True\)",
        ),
        ("dino_r50_4scale", "another size"),
    ):
        torch.save(random_file(name), tmp_path / "weights.pth")
        with pytest.raises(UserError, match=words):
            load_public_weights(untouched, tmp_path / "weights.pth")
    torch.save(random_file("deformable_detr_r50"), tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match="Deformable DETR .fundamentalvision.*build DeformableDETR for them"
    ):
        load_public_weights(build("deformable_detr_r50_two_stage"), tmp_path / "weights.pth")


def test_unknown_and_missing_entries(tmp_path):
    tensors = random_file("detr_r50")
    torch.save({"model": tensors | {"mask_head.weight": torch.zeros(3)}}, tmp_path / "weights.pth")
    assert load_public_weights(build("detr_r50"), tmp_path / "weights.pth").unmapped == [
        "mask_head.weight"
    ]
    del tensors["transformer.encoder.layers.0.norm1.bias"]
    torch.save({"model": tensors}, tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match=r"encoder.0.self_attention.norm.bias is nothing there and \(256,\) here"
    ):
        load_public_weights(build("detr_r50"), tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("detr_r50", "DETR(num_classes=91, num_queries=100, dim_feedforward=2048"),
        (
            "hf_deformable_detr_v5",
            "DeformableDETR(num_classes=91, num_queries=300, levels=4, dim_feedforward=1024",
        ),
        (
            "semidetr_ssod_r50_coco",
            "DINO(num_classes=80, num_queries=900, levels=4, dim_feedforward=2048",
        ),
    ],
)
def test_describe_says_what_to_build(name, words, tmp_path):
    torch.save(aliases(name, random_file(name)), tmp_path / "weights.pth")
    text = "\n".join(describe(tmp_path / "weights.pth"))
    assert (
        words in text and "dim=256, encoder_layers=6, decoder_layers=6, backbone='resnet50'" in text
    )
