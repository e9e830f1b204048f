"""Batches of mixed sizes: padding changes nothing from the projected maps on.

Before them it does in a ResNet, which sees the padding, and does not in the tiny backbone.
"""

import pytest
import torch
import torch.nn.functional as F

from semidetr_lite.detectors.backbone import Tiny
from semidetr_lite.detectors.deformable_detr import DeformableDETR
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.errors import UserError
from semidetr_lite.losses import layer_loss

SMALL = {
    "num_classes": 5,
    "num_queries": 9,
    "dim": 32,
    "heads": 4,
    "dim_feedforward": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
}
KINDS = {
    "detr": (DETR, {}),
    "detr, sigmoid": (DETR, {"no_object": False}),
    "plain": (DeformableDETR, {}),
    "box refinement": (DeformableDETR, {"with_box_refine": True}),
    # with these first weights half precision changes the order of no two proposals
    "two-stage": (
        DeformableDETR,
        {"with_box_refine": True, "two_stage": True, "query_init": "torch"},
    ),
    "dino": (DINO, {"denoising_queries": 4}),
}


def build(kind: str, backbone="tiny", **changes):
    torch.manual_seed(0)
    made, form = KINDS[kind]
    detector = made(
        **{
            **SMALL,
            **form,
            "backbone": Tiny((16, 16, 16, 16, 16)) if backbone == "tiny" else backbone,
            **changes,
        }
    )
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return detector.eval()


def outputs_equal(one: dict, other: dict, row: int = 0, atol: float = 1e-5) -> bool:
    dicts = zip([one, *one["aux_outputs"]], [other, *other["aux_outputs"]], strict=True)
    return all(
        torch.allclose(a[key][row], b[key][row], atol=atol)
        for a, b in dicts
        for key in ("pred_logits", "pred_boxes")
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_from_the_projected_maps_on_extra_padding_changes_nothing(kind, size, monkeypatch):
    detector = build(kind)
    images = [torch.rand(3, *size)]
    plain = detector.extract_features(detector.normalize(images))
    maps = [F.pad(level, (0, 3, 0, 2), value=7.0) for level in plain[0]]
    masks = [F.pad(mask, (0, 3, 0, 2), value=True) for mask in plain[1]]
    with torch.no_grad():
        alone = detector(images)
        monkeypatch.setattr(detector, "extract_features", lambda images: (maps, masks, True))
        padded = detector(images)
    assert outputs_equal(alone, padded)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tiny_detector_does_not_feel_its_neighbours(kind):
    detector = build(kind)
    images = [torch.rand(3, *size) for size in [(64, 96), (96, 64), (40, 56)]]
    with torch.no_grad():
        together = detector(images)
        for row, image in enumerate(images):
            alone = detector([image])
            padded = {**together, "pred_logits": together["pred_logits"][row : row + 1]}
            assert torch.allclose(padded["pred_logits"][0], alone["pred_logits"][0], atol=1e-5)
            assert torch.allclose(together["pred_boxes"][row], alone["pred_boxes"][0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_images_have_defined_results(kind):
    """One pixel, not contiguous, half precision, bytes; fewer tokens than queries."""
    detector = build(kind)
    image = torch.rand(64, 48, 3).permute(2, 0, 1)
    with torch.no_grad():
        exact = detector([image.contiguous()])
        assert outputs_equal(exact, detector([image]))
        assert outputs_equal(exact, detector([image.half()]), atol=2e-2)
        for images in (
            [torch.rand(3, 1, 1)],
            [torch.rand(3, 1, 1), image],
            [torch.zeros(3, 9, 200, dtype=torch.uint8)],
        ):
            outputs = detector(images)
            assert (
                outputs["pred_logits"].isfinite().all() and outputs["pred_boxes"].isfinite().all()
            )
    for wrong in (torch.rand(1, 8, 8), torch.rand(3, 0, 8), torch.rand(8, 8)):
        with pytest.raises(UserError, match="an image must be a tensor"):
            detector([wrong])


@pytest.mark.parametrize("kind", ["plain", "box refinement", "detr"])
def test_queries_that_are_no_boxes_take_no_groups(kind):
    detector = build(kind)
    memory = detector.encode(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="query groups|takes no query groups"):
        detector.decode(memory, [object()])


def test_two_stage_needs_box_refinement():
    with pytest.raises(UserError, match="with_box_refine=True"):
        build("plain", two_stage=True)


@pytest.mark.parametrize("stage", ["one_to_many", "one_to_one"])
def test_a_target_without_area_gives_finite_losses_and_gradients(stage):
    target = {
        "boxes": torch.tensor([[5.0, 5, 5, 5], [3, 3, 20, 3], [2, 2, 30, 40]]),
        "labels": torch.tensor([0, 1, 2]),
    }
    logits, boxes = (
        torch.randn(1, 9, 5, requires_grad=True),
        torch.rand(1, 9, 4, requires_grad=True),
    )
    losses = layer_loss(logits, boxes, [{**target, "size": (64, 48)}], stage)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert logits.grad.isfinite().all() and boxes.grad.isfinite().all()


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [([(40, 70), (64, 33)], (64, 96)), ([(40, 70)], (40, 70)), ([(96, 64)] * 2, (96, 64))],
)
def test_a_batch_of_mixed_sizes_that_a_resnet_sees_is_padded_to_multiples_of_32(
    sizes, shape, monkeypatch
):
    detector = build("dino", backbone="resnet18", levels=3)
    seen, project = [], detector._project
    monkeypatch.setattr(
        detector,
        "_project",
        lambda stacked: seen.append(tuple(stacked.shape[-2:])) or project(stacked),
    )
    with torch.no_grad():
        maps, masks, padded = detector.extract_features([torch.rand(3, *size) for size in sizes])
    assert seen == [shape] and padded == (len(sizes) > 1 and sizes[0] != sizes[1])
    for level, mask in zip(maps, masks, strict=True):
        assert level.shape[-2:] == mask.shape[1:]
        for row, size in enumerate(sizes):  # a cell is image where its pixels begin inside
            inside = ~mask[row]
            expected = [
                -(-side * cells // whole) for side, cells, whole in zip(size, mask.shape[1:], shape)
            ]
            assert [int(inside.any(1).sum()), int(inside.any(0).sum())] == expected


def test_two_stage_decoder_boxes_do_not_train_the_proposals():
    detector = build("two-stage")
    outputs = detector(torch.rand(1, 3, 64, 64))
    weight = detector.proposal_box[-1].weight
    loss = sum(layer["pred_boxes"].sum() for layer in [*outputs["aux_outputs"], outputs])
    assert torch.autograd.grad(loss, weight, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(outputs["encoder"]["pred_boxes"].sum(), weight)[0].any()


@pytest.mark.parametrize("kind", ["detr, sigmoid", "plain", "two-stage"])
def test_sigmoid_scores_start_low(kind):
    made, form = KINDS[kind]
    detector = made(**{**SMALL, **form, "backbone": Tiny((16, 16, 16, 16, 16))}).eval()
    outputs = detector(torch.rand(1, 3, 64, 64))
    assert outputs["pred_logits"].sigmoid().mean() < 0.1


def test_boxes_around_points_start_small():
    detector = DeformableDETR(**SMALL, backbone=Tiny((16, 16, 16, 16, 16))).eval()
    sides = detector(torch.rand(1, 3, 64, 64))["pred_boxes"][..., 2:]
    assert torch.allclose(sides, torch.tensor(-2.0).sigmoid().expand_as(sides), atol=1e-5)
