"""DETR and Deformable DETR against `transformers`: same weights, same outputs, same gradients.

The weights are random, none is left at its initial value, and they go through a saved file and
`load_public_weights`.
"""

import pytest
import torch

from semidetr_lite.detectors.deformable_detr import DeformableDETR
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.public_weights import load_public_weights

transformers = pytest.importorskip(
    "transformers", reason="parity needs the dev dependency transformers"
)

SMALL = {
    "dim": 64,
    "heads": 4,
    "dim_feedforward": 48,
    "queries": 11,
    "backbone": "resnet18",
    "layers": (2, 3),
}
FULL = {
    "dim": 256,
    "heads": 8,
    "dim_feedforward": 1024,
    "queries": 10,
    "backbone": "resnet50",
    "layers": (1, 2),
}
FORMS = {
    "plain": {},
    "box refinement": {"with_box_refine": True},
    "two-stage": {"with_box_refine": True, "two_stage": True},
}
SIZES = {
    "square": [(96, 96)],
    "wide": [(64, 128)],
    "batch": [(96, 64), (96, 64)],
    "padded batch": [(128, 64), (70, 96), (64, 64)],
}


def backbone_config(name: str):
    sizes = {
        "resnet18": {
            "depths": [2, 2, 2, 2],
            "hidden_sizes": [64, 128, 256, 512],
            "layer_type": "basic",
        },
        "resnet50": {
            "depths": [3, 4, 6, 3],
            "hidden_sizes": [256, 512, 1024, 2048],
            "layer_type": "bottleneck",
        },
    }
    return transformers.ResNetConfig(**sizes[name], out_features=["stage2", "stage3", "stage4"])


def theirs(kind: str, classes: int, size: dict, **form):
    """A detector of transformers with random weights, nothing left at zero or one."""
    torch.manual_seed(0)
    common = {
        "use_timm_backbone": False,
        "backbone_config": backbone_config(size["backbone"]),
        "d_model": size["dim"],
        "encoder_layers": size["layers"][0],
        "decoder_layers": size["layers"][1],
        "encoder_attention_heads": size["heads"],
        "decoder_attention_heads": size["heads"],
        "encoder_ffn_dim": size["dim_feedforward"],
        "decoder_ffn_dim": size["dim_feedforward"],
        "num_queries": size["queries"],
        "num_labels": classes,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }
    if kind == "detr":
        model = transformers.DetrForObjectDetection(transformers.DetrConfig(**common))
    else:
        further = {"two_stage_num_proposals": size["queries"], **form}
        model = transformers.DeformableDetrForObjectDetection(
            transformers.DeformableDetrConfig(**common, **further)
        )
    with torch.no_grad():
        for name, entry in model.state_dict().items():
            if entry.is_floating_point() and "running_var" not in name:
                strength = (
                    1.0 if "query_position" in name else 0.2 if "bbox_predictor" in name else 0.03
                )
                entry += strength * torch.randn_like(entry)
        if form.get(
            "two_stage"
        ):  # places that are no proposals then score below the average: there they may be chosen
            model.model.enc_output.bias.zero_()
            model.model.enc_output_norm.bias.zero_()
    return model.eval()


def ours(kind: str, classes: int, size: dict, **form):
    sizes = {
        "encoder_layers": size["layers"][0],
        "decoder_layers": size["layers"][1],
        "num_queries": size["queries"],
    }
    sizes |= {key: size[key] for key in ("dim", "heads", "dim_feedforward", "backbone")}
    return DETR(classes, **sizes) if kind == "detr" else DeformableDETR(classes, **sizes, **form)


def pair(kind: str, size: dict, tmp_path, classes: int = 5, **form):
    """Both detectors with the same weights, by way of a file."""
    model, detector = theirs(kind, classes, size, **form), ours(kind, classes, size, **form)
    torch.save(model.state_dict(), tmp_path / "model.bin")
    report = load_public_weights(detector, tmp_path / "model.bin")
    assert not report.unmapped and len(report.mapped) + len(report.ignored) == len(
        model.state_dict()
    )
    return model, detector.eval()


def run_theirs(model, detector, images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, boxes) of the last layer, for images padded to the largest of them."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    pixels, mask = (
        torch.zeros(len(images), 3, height, width),
        torch.zeros(len(images), height, width).long(),
    )
    for row, image in enumerate(detector.normalize(images)):
        pixels[row, :, : image.shape[1], : image.shape[2]] = image
        mask[row, : image.shape[1], : image.shape[2]] = 1
    found = model(pixels, pixel_mask=mask)
    return found.logits, found.pred_boxes


def some_images(sizes, seed: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.rand(3, *size) for size in sizes]


def agree(model, detector, sizes) -> None:
    """Logits and boxes of every query to 1e-4."""
    images = some_images(sizes)
    with torch.no_grad():
        logits, boxes = run_theirs(model, detector, images)
        outputs = detector(images)
    assert logits.std() > 0.05 and boxes.std() > 0.01  # something to compare
    torch.testing.assert_close(outputs["pred_logits"], logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs["pred_boxes"], boxes, atol=1e-4, rtol=1e-4)


KINDS = {
    "detr": ("detr", {}),
    **{f"deformable {name}": ("deformable", form) for name, form in FORMS.items()},
}


@pytest.mark.parametrize(("kind", "form"), KINDS.values(), ids=KINDS)
def test_the_same_answers(kind, form, tmp_path):
    """Square and not, single, in a batch of one size, and in a batch that has to be padded."""
    model, detector = pair(kind, SMALL, tmp_path, **form)
    for sizes in SIZES.values():
        agree(model, detector, sizes)


@pytest.mark.parametrize(("kind", "form"), KINDS.values(), ids=KINDS)
def test_the_same_answers_at_full_width(kind, form, tmp_path):
    model, detector = pair(kind, FULL, tmp_path, classes=91, **form)
    agree(model, detector, SIZES["padded batch"])


@pytest.mark.parametrize(("kind", "form"), KINDS.values(), ids=KINDS)
def test_the_same_gradients(kind, form, tmp_path):
    """Gradients of a random sum of the last layer's logits and boxes, in a padded batch.

    Where the input of a ReLU is zero but for rounding, either side of its kink is right. So of
    several batches one must agree in every parameter; a wrong gradient agrees in none.
    """
    model, detector = pair(kind, SMALL, tmp_path, **form)
    model.requires_grad_(True)  # it freezes its own ResNet; ours trains all but the first stage
    for seed in (1, 3, 5, 7, 9):
        model.zero_grad()
        detector.zero_grad()
        differing = differing_gradients(kind, form, model, detector, seed, tmp_path)
        if not differing:
            return
    raise AssertionError(f"no batch has the same gradients; of the last one differ {differing}")


def differing_gradients(kind, form, model, detector, seed: int, tmp_path) -> list[str]:
    """The parameters whose gradients of one batch differ by more than rounding."""
    images = some_images(SIZES["padded batch"], seed)
    logits, boxes = run_theirs(model, detector, images)
    outputs = detector(images)
    torch.manual_seed(2)
    factors = torch.randn_like(logits), torch.randn_like(boxes)
    for answer in ((logits, boxes), (outputs["pred_logits"], outputs["pred_boxes"])):
        weighted = [(entry * factor).sum() for entry, factor in zip(answer, factors, strict=True)]
        sum(weighted).backward()
    theirs_by_name = model.state_dict(keep_vars=True)  # tied parameters under every name
    gradients = {
        name: torch.zeros_like(entry) if entry.grad is None else entry.grad
        for name, entry in theirs_by_name.items()
    }
    torch.save(gradients, tmp_path / "g.bin")
    under_our_names = ours(kind, 5, SMALL, **form)
    load_public_weights(under_our_names, tmp_path / "g.bin")
    expected, compared, differing = under_our_names.state_dict(), 0, []
    for name, parameter in detector.named_parameters():
        if parameter.grad is not None:
            scale = expected[name].abs().max().clamp(min=1.0)
            pair_of_gradients = parameter.grad / scale, expected[name] / scale
            if not torch.allclose(*pair_of_gradients, atol=2e-4, rtol=1e-3):
                differing.append(name)
            compared += int(parameter.grad.any())
    assert compared > 60
    return differing
