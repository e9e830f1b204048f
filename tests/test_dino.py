"""DINO: query groups cannot leak, an image does not depend on its batch, look forward twice."""

import pytest
import torch

from semidetr_lite.boxes import to_model
from semidetr_lite.data import digits
from semidetr_lite.detectors.backbone import Tiny
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.detectors.transformer import QueryGroup, sine_positions, slice_outputs
from semidetr_lite.methods.supervised import Supervised

SMALL = {
    "num_classes": 5,
    "num_queries": 8,
    "dim": 16,
    "heads": 2,
    "levels": 3,
    "points": 2,
    "dim_feedforward": 32,
}


def small(**changes) -> DINO:
    """A small DINO without the zeros and ones of its start, so that everything has an influence."""
    layers = {"encoder_layers": 1, "decoder_layers": 3, "denoising_queries": 6, "anchor_size": 0.1}
    detector = DINO(**{**SMALL, **layers, "backbone": Tiny((8, 8, 16, 16, 16)), **changes})
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return detector.eval()


def some_group(batch: int, count: int, copies: int = 1, valid=None) -> QueryGroup:
    boxes = torch.cat(
        [torch.rand(batch, count, 2) * 0.6 + 0.2, torch.rand(batch, count, 2) * 0.3 + 0.1], -1
    )
    valid = torch.ones(batch, count, dtype=torch.bool) if valid is None else valid
    return QueryGroup(torch.randn(batch, count, 16), boxes, copies, valid)


def layers_of(outputs: dict) -> list[dict]:
    return [*outputs["aux_outputs"], outputs]


def entries(outputs: dict, *more: str) -> list[torch.Tensor]:
    """Every tensor of the decoder's layers (and of further dicts), in one order."""
    dicts = layers_of(outputs) + [outputs[key] for key in more]
    return [layer[key] for layer in dicts for key in ("pred_logits", "pred_boxes", "queries")]


def same(a: dict, b: dict, *more: str, rows=slice(None), atol=1e-5) -> bool:
    pairs = zip(entries(a, *more), entries(b, *more), strict=True)
    return all(torch.allclose(ours[rows], theirs, atol=atol, rtol=1e-4) for ours, theirs in pairs)


# Shapes


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64), (50, 75)])
def test_outputs(size):
    outputs = small()(torch.rand(2, 3, *size))
    assert len(outputs["aux_outputs"]) == 2 and outputs["groups"] == []
    for layer in [*layers_of(outputs), outputs["encoder"]]:
        assert layer["pred_logits"].shape == (2, 8, 5) and layer["queries"].shape == (2, 8, 16)
        assert (
            layer["pred_boxes"].shape == (2, 8, 4)
            and 0 < layer["pred_boxes"].min() < layer["pred_boxes"].max() < 1
        )
        assert layer["pred_logits"].isfinite().all()


def test_bytes_and_floats_and_lists_are_the_same_images():
    detector, images = small(), torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    outputs = detector(images)
    assert same(outputs, detector(images.float() / 255))
    assert same(outputs, detector([images[0], images[1].float() / 255]))


def test_fewer_tokens_than_queries():
    outputs = small(num_queries=500)(torch.rand(1, 3, 32, 32))
    assert outputs["pred_logits"].shape == (1, 4 * 4 + 2 * 2 + 1, 5)
    assert all(entry.isfinite().all() for entry in entries(outputs, "encoder"))


# Start


def test_start_scores_are_low_and_boxes_are_their_anchors():
    detector = DINO(
        **SMALL,
        encoder_layers=1,
        decoder_layers=2,
        backbone=Tiny((8, 8, 16, 16, 16)),
        anchor_size=0.1,
    )
    outputs = detector(torch.rand(1, 3, 64, 96))
    assert outputs["pred_logits"].sigmoid().mean() < 0.1
    centres = {round((j + 0.5) / (96 / s), 4): None for s in (8, 16, 32) for j in range(96 // s)}
    rows = {round((i + 0.5) / (64 / s), 4): None for s in (8, 16, 32) for i in range(64 // s)}
    for layer in [outputs["encoder"], *layers_of(outputs)]:
        for x, y, width, height in layer["pred_boxes"][0].tolist():
            assert any(abs(x - centre) < 1e-3 for centre in centres) and any(
                abs(y - row) < 1e-3 for row in rows
            )
            assert width == pytest.approx(height, abs=1e-4) and round(width, 3) in (0.1, 0.2, 0.4)


def test_the_best_scored_tokens_become_proposals():
    detector = small(num_queries=6)
    memory = detector.encode(torch.rand(2, 3, 64, 96))
    assert memory.shapes == [(8, 12), (4, 6), (2, 3)]
    embedded = detector.proposal(memory.tokens)
    for image in range(2):
        best = detector.proposal_class(embedded[image]).amax(-1)
        order = sorted(range(len(best)), key=lambda token: -best[token].item())[:6]
        assert torch.allclose(memory.proposals["queries"][image], embedded[image, order], atol=1e-6)
        anchors = []
        for token in order:
            level, start = 0, 0
            while token - start >= memory.shapes[level][0] * memory.shapes[level][1]:
                start += memory.shapes[level][0] * memory.shapes[level][1]
                level += 1
            row, column = divmod(token - start, memory.shapes[level][1])
            height, width = memory.shapes[level]
            anchors.append(
                [(column + 0.5) / width, (row + 0.5) / height, 0.1 * 2**level, 0.1 * 2**level]
            )
        boxes = (
            detector.proposal_box(embedded[image, order]) + torch.logit(torch.tensor(anchors))
        ).sigmoid()
        assert torch.allclose(memory.proposals["pred_boxes"][image], boxes, atol=1e-5)


# Groups


def test_perturb_one_group_and_nothing_else_moves():
    detector = small()
    memory = detector.encode(torch.rand(2, 3, 64, 96))
    first, second = some_group(2, 6, copies=2), some_group(2, 3)
    outputs = detector.decode(memory, [first, second])
    content, boxes = first.content.clone(), first.boxes.clone()
    content[:, 3:] += torch.randn(2, 3, 16)  # the second copy of the first group
    boxes[:, 3:] = boxes[:, 3:] * 0.7
    moved = detector.decode(memory, [first._replace(content=content, boxes=boxes), second])
    for ours, theirs in zip(entries(outputs), entries(moved), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(
        entries(outputs["groups"][1]), entries(moved["groups"][1]), strict=True
    ):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(
        entries(outputs["groups"][0]), entries(moved["groups"][0]), strict=True
    ):
        assert torch.equal(ours[:, :3], theirs[:, :3])
        assert not torch.isclose(ours[:, 3:], theirs[:, 3:]).all(-1).any()


def test_a_group_attends_to_the_matching_queries_and_to_itself():
    detector = small()
    memory = detector.encode(torch.rand(1, 3, 64, 64))
    group = some_group(1, 3)
    before = detector.decode(memory, [group])["groups"][0]
    alone = detector.decode(
        memory, [QueryGroup(*(entry[:, :1] for entry in group[:2]), 1, group.valid[:, :1])]
    )
    assert not torch.allclose(before["queries"][:, :1], alone["groups"][0]["queries"], atol=1e-4)
    with torch.no_grad():
        detector.content.weight += torch.randn_like(detector.content.weight)
    assert not torch.allclose(
        before["queries"], detector.decode(memory, [group])["groups"][0]["queries"], atol=1e-4
    )


def test_padding_of_a_group_is_not_attended_to():
    detector = small()
    memory = detector.encode(torch.rand(2, 3, 64, 64))
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    group = some_group(2, 4, valid=valid)
    outputs = detector.decode(memory, [group])["groups"][0]
    content = torch.where(valid[..., None], group.content, torch.randn(2, 4, 16) * 50)
    changed = detector.decode(memory, [group._replace(content=content)])["groups"][0]
    for ours, theirs in zip(entries(outputs), entries(changed), strict=True):
        assert torch.equal(ours[valid], theirs[valid]) and ours.isfinite().all()


@pytest.mark.parametrize("sizes", [[(64, 96)] * 2, [(64, 96), (64, 64)]])
def test_groups_decoded_afterwards_equal_groups_decoded_together(sizes):
    detector = small()
    memory = detector.encode([torch.rand(3, *size) for size in sizes])
    groups = [
        some_group(2, 6, copies=3),
        some_group(2, 4, valid=torch.tensor([[True] * 4, [True, False, False, False]])),
    ]
    together = detector.decode(memory, groups)
    alone = detector.decode(memory)
    assert same(together, alone)  # and the matching queries do not notice
    afterwards = detector.decode_groups(memory, alone, groups)
    assert len(afterwards) == 2
    for ours, theirs in zip(together["groups"], afterwards, strict=True):
        assert same(ours, theirs)


def test_groups_decoded_after_other_groups_equal_groups_decoded_alone():
    """As in Semi-DETR: denoising queries first, consistency queries afterwards."""
    detector = small()
    memory = detector.encode(torch.rand(2, 3, 64, 96))
    group = some_group(2, 4)
    alone = detector.decode_groups(memory, detector.decode(memory), [group])[0]
    after_others = detector.decode(memory, [some_group(2, 6, copies=2)])
    assert same(alone, detector.decode_groups(memory, after_others, [group])[0])


def test_the_query_temperature_is_that_of_the_boxes_sine_code():
    detector = small(query_temperature=20.0)
    box = torch.tensor([[[0.3, 0.6, 0.2, 0.1]]])  # cx, cy, width, height
    memory = detector.encode(torch.rand(1, 3, 64, 64))
    content = torch.zeros(1, 1, 16)
    for temperature in (20.0, 500.0):
        detector.query_temperature = temperature
        _, layer_inputs = detector.run_decoder(memory, content, box)
        code = sine_positions(box[..., [1, 0, 2, 3]], 8, temperature)
        assert torch.allclose(layer_inputs[0][1], detector.query_positions(code), atol=1e-6)


def test_groups_decoded_afterwards_for_some_images_of_the_batch():
    detector, rows = small(), slice(1, 3)
    memory = detector.encode([torch.rand(3, *size) for size in [(64, 96), (64, 64), (48, 96)]])
    group = some_group(3, 4, copies=2)
    outputs = detector.decode(memory)
    whole = detector.decode_groups(memory, outputs, [group])[0]
    part = QueryGroup(group.content[rows], group.boxes[rows], 2, group.valid[rows])
    some = detector.decode_groups(memory.slice(rows), slice_outputs(outputs, rows), [part])[0]
    assert same(whole, some, rows=rows)


def test_a_group_padded_to_the_batch_gives_the_outputs_it_gives_alone():
    detector, rows = small(), slice(1, 3)
    memory = detector.encode(
        [torch.rand(3, *size) for size in [(64, 96), (64, 64), (48, 96), (64, 64)]]
    )
    groups = [
        some_group(2, 4, copies=2),
        some_group(2, 6, valid=torch.tensor([[True] * 6, [True] * 2 + [False] * 4])),
    ]
    places = [rows, slice(0, 2)]
    spread = [group.pad_to_batch(place, 4) for group, place in zip(groups, places)]
    assert [group.valid.any(1).tolist() for group in spread] == [
        [False, True, True, False],
        [True, True, False, False],
    ]
    alone, together = detector.decode(memory), detector.decode(memory, spread)
    assert same(together, alone)  # the matching queries do not notice
    for group, place, found in zip(groups, places, together["groups"]):
        own = detector.decode_groups(memory.slice(place), slice_outputs(alone, place), [group])[0]
        assert same(found, own, rows=place)


# Neighbours


def test_a_result_does_not_depend_on_the_neighbours_in_the_batch():
    detector = small()
    images = [torch.rand(3, *size) for size in [(64, 96), (96, 64), (70, 45), (64, 96), (96, 64)]]
    together = detector(images)
    for row, image in enumerate(images):
        assert same(together, detector([image]), "encoder", rows=slice(row, row + 1)), (
            f"image {row}"
        )


def test_a_mask_of_nothing_changes_nothing():
    detector = small()
    memory = detector.encode(torch.rand(2, 3, 64, 96))
    assert memory.mask is None
    masked = memory._replace(mask=torch.zeros(2, memory.tokens.shape[1], dtype=torch.bool))
    assert same(detector.decode(memory), detector.decode(masked))


@pytest.mark.parametrize("backbone", ["tiny", "resnet18"])
def test_padding_is_marked_on_every_level(backbone):
    detector = small(
        backbone=Tiny((8, 8, 16, 16, 16)) if backbone == "tiny" else backbone, levels=4
    )
    memory = detector.encode([torch.rand(3, 128, 128), torch.rand(3, 64, 128)])
    assert memory.shapes == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert torch.allclose(memory.valid_ratios[1], torch.tensor([[1.0, 0.5]]).expand(4, 2))
    mask = memory.mask[1].split([256, 64, 16, 4])
    for level, (height, width) in zip(mask, memory.shapes):
        lower_half = torch.arange(height)[:, None].expand(-1, width) >= height / 2
        assert torch.equal(level.view(height, width), lower_half)
    assert not memory.mask[0].any()


def test_a_padded_image_does_not_feel_what_its_neighbour_shows():
    detector = small(backbone="resnet18", levels=4)
    image, size = torch.rand(3, 64, 96), (96, 128)
    with torch.no_grad():
        one, other = (detector([image, torch.rand(3, *size)]) for _ in range(2))
    pairs = list(zip(entries(one, "encoder"), entries(other, "encoder"), strict=True))
    assert all(torch.allclose(a[0], b[0], atol=1e-5) for a, b in pairs)
    assert not any(torch.allclose(a[1], b[1], atol=1e-5) for a, b in pairs)


# Gradients


def test_boxes_look_forward_twice():
    """The box of a layer teaches that layer's shift and the one before, and none further back.

    The box head runs twice per layer: on the normed content for the box, and on the content itself
    for the next layer.
    """
    detector, shifts = small(decoder_layers=4), []
    detector.box_head.register_forward_hook(lambda module, inputs, output: shifts.append(output))
    outputs = detector(torch.rand(1, 3, 64, 64))
    predicted, handed_on = shifts[0::2], shifts[1::2]
    for number, layer in enumerate(layers_of(outputs)):
        gradients = [
            torch.autograd.grad(
                layer["pred_boxes"].sum(), part, retain_graph=True, allow_unused=True
            )
            for part in (predicted, handed_on)
        ]
        reached = [
            [
                place
                for place, gradient in enumerate(part)
                if gradient is not None and gradient.abs().sum() > 0
            ]
            for part in gradients
        ]
        assert reached == [[number], [number - 1] if number else []]


def test_the_next_layer_starts_from_the_content_before_the_norm():
    """Released code: references are handed on from what the box head reads before the norm."""
    detector, calls = small(decoder_layers=2), []
    for layer in detector.decoder:
        layer.register_forward_hook(
            lambda module, inputs, output: calls.append((inputs[2], output))
        )
    memory = detector.encode(torch.rand(1, 3, 64, 64))
    outputs = detector.decode(memory)
    (_, content), (references, _) = calls
    boxes = (
        detector.box_head(content) + torch.logit(memory.proposals["pred_boxes"], eps=1e-5)
    ).sigmoid()
    assert torch.allclose(references[:, :, 0], boxes, atol=1e-5)
    last = detector.box_head(detector.decoder_norm(calls[1][1])) + torch.logit(boxes, eps=1e-5)
    assert torch.allclose(outputs["pred_boxes"], last.sigmoid(), atol=1e-5)


def test_decoder_boxes_do_not_teach_the_proposals():
    detector = small()
    memory = detector.encode(torch.rand(1, 3, 64, 64))
    outputs = detector.decode(memory)
    loss = sum(layer["pred_boxes"].sum() for layer in layers_of(outputs))
    assert (
        torch.autograd.grad(
            loss, detector.proposal_box[-1].weight, allow_unused=True, retain_graph=True
        )[0]
        is None
    )
    assert torch.autograd.grad(
        memory.proposals["pred_boxes"].sum(), detector.proposal_box[-1].weight
    )[0].any()


def test_every_parameter_that_is_trained_gets_a_gradient():
    detector = small().train()
    outputs = detector(
        torch.rand(2, 3, 64, 64),
        [QueryGroup(detector.denoising.labels(torch.zeros(2, 3).long()), *some_group(2, 3)[1:])],
    )
    dicts = [*layers_of(outputs), outputs["encoder"], *layers_of(outputs["groups"][0])]
    sum((layer["pred_logits"] ** 2).sum() + layer["pred_boxes"].sum() for layer in dicts).backward()
    silent = [
        name
        for name, p in detector.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert silent == []


# Sizes


def test_the_paper_size_builds_by_plain_arguments():
    with torch.device("meta"):  # shapes without memory
        detector = DINO(
            num_classes=91,
            num_queries=900,
            dim=256,
            heads=8,
            levels=4,
            encoder_layers=6,
            decoder_layers=6,
            backbone="resnet50",
        )
        same_by_default = DINO(num_classes=91)
    count = sum(parameter.numel() for parameter in detector.parameters())
    print(f"{count / 1e6:.2f} M parameters")
    assert count == sum(parameter.numel() for parameter in same_by_default.parameters())
    assert 46.0e6 < count < 48.5e6  # DINO-4scale with ResNet-50 has 47 M
    trained = sum(
        parameter.numel() for parameter in detector.parameters() if parameter.requires_grad
    )
    assert 0.2e6 < count - trained < 0.3e6  # stem and first stage
    assert len(detector.encoder) == len(
        detector.decoder
    ) == 6 and detector.content.weight.shape == (900, 256)


def test_a_resnet_with_four_levels_runs():
    detector = small(backbone="resnet18", levels=4).train()
    outputs = detector(torch.rand(1, 3, 96, 128))
    memory = detector.encode(torch.rand(1, 3, 96, 128))
    assert memory.shapes == [(12, 16), (6, 8), (3, 4), (2, 2)]
    assert [tuple(level.shape) for level in memory.features] == [
        (1, 16, *shape) for shape in memory.shapes
    ]
    outputs["pred_boxes"].sum().backward()
    assert detector.backbone.layers[1][0].conv1.weight.grad is not None
    assert (
        detector.backbone.stem[0].weight.grad is None
        and not detector.backbone.layers[0][0].conv1.weight.requires_grad
    )


# Learning


def test_overfit_one_batch():
    """Two scenes, learnt by heart."""
    scenes = [digits.scene(index) for index in range(20)]
    scenes = [
        (image, target)
        for image, target in scenes
        if target["size"] == (96, 96) and len(target["boxes"])
    ][:2]
    batch = {"labelled": ([image for image, _ in scenes], [target for _, target in scenes])}
    sizes = {
        "dim": 32,
        "heads": 4,
        "dim_feedforward": 64,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_queries": 12,
    }
    backbone = Tiny((8, 16, 32, 32, 32))
    detector = DINO(
        **{**SMALL, **sizes, "num_classes": 10},
        backbone=backbone,
        anchor_size=0.15,
        denoising_queries=10,
    )
    method = Supervised(detector)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    history = []
    for step in range(40):
        losses = method(batch, step)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        history.append(total.item())
    print(
        [round(value, 1) for value in history[::5]],
        {key: round(value.item(), 2) for key, value in losses.items()},
    )
    assert sum(history[-3:]) < 0.5 * sum(history[:3])
    image, target = scenes[0]
    outputs = detector(image[None])
    near = torch.cdist(
        to_model(target["boxes"], target["size"]), outputs["pred_boxes"][0], p=1
    ).amin(1)
    assert near.mean() < 0.1  # every object has a query close by
