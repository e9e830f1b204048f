"""Positions by loops, and what the parts that all detectors share promise."""

import math

import pytest
import torch

from semidetr_lite.detectors.transformer import (
    MLP,
    Memory,
    SelfAttention,
    level_layout,
    map_positions,
    sine_positions,
    slice_outputs,
)
from semidetr_lite.device import to_device


def sine_by_loop(value: float, dim: int, temperature: float) -> list[float]:
    row = []
    for pair in range(dim // 2):
        angle = 2 * math.pi * value / temperature ** (2 * pair / dim)
        row += [math.sin(angle), math.cos(angle)]
    return row


@pytest.mark.parametrize("temperature", [20.0, 10000.0])
def test_sine_positions_equal_a_loop(temperature):
    coordinates = torch.rand(3, 4)
    found = sine_positions(coordinates, 8, temperature)
    assert found.shape == (3, 32)
    for row in range(3):
        expected = [
            entry
            for value in coordinates[row].tolist()
            for entry in sine_by_loop(value, 8, temperature)
        ]
        assert torch.allclose(found[row], torch.tensor(expected), atol=1e-5)


def test_map_positions_count_the_cells_of_the_image_only():
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[1, 3:], mask[1, :, 4:] = True, True  # the second image has 3 x 4 cells
    found = map_positions(mask, 16)
    assert found.shape == (2, 4, 6, 16)
    for image, (height, width) in enumerate([(4, 6), (3, 4)]):
        for i in range(height):
            for j in range(width):
                expected = sine_by_loop((i + 1) / height, 8, 20.0) + sine_by_loop(
                    (j + 1) / width, 8, 20.0
                )
                assert torch.allclose(found[image, i, j], torch.tensor(expected), atol=1e-4)
    assert found.isfinite().all()
    alone = map_positions(torch.zeros(1, 3, 4, dtype=torch.bool), 16)
    assert torch.allclose(found[1, :3, :4], alone[0], atol=1e-5)


def test_mlp_has_its_layers_and_no_relu_at_the_end():
    mlp = MLP(3, 8, 5, 3)
    assert [tuple(part.weight.shape) for part in mlp if isinstance(part, torch.nn.Linear)] == [
        (8, 3),
        (8, 8),
        (5, 8),
    ]
    assert (mlp(torch.randn(50, 3)) < 0).any()


def test_self_attention_lets_positions_into_keys_and_queries_only():
    attention = SelfAttention(8, 2)
    content = torch.ones(
        1, 5, 8
    )  # all values alike: whatever is attended to, the output is the same
    assert torch.allclose(
        attention(content, torch.randn(1, 5, 8)),
        attention(content, torch.randn(1, 5, 8)),
        atol=1e-6,
    )
    different = torch.randn(1, 5, 8)
    assert not torch.allclose(
        attention(different, torch.randn(1, 5, 8)),
        attention(different, torch.randn(1, 5, 8)),
        atol=1e-3,
    )


def test_self_attention_with_extra_keys_equals_those_rows_of_the_whole():
    attention, content, positions = SelfAttention(8, 2), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    whole = attention(content, positions)
    part = attention(content[:, :3], positions[:, :3], extra_kv=(content[:, 3:], positions[:, 3:]))
    assert torch.allclose(whole[:, :3], part, atol=1e-5)


def test_slices_of_a_memory_and_of_outputs():
    layer = {
        "pred_logits": torch.randn(4, 3, 2),
        "pred_boxes": torch.rand(4, 3, 4),
        "queries": torch.randn(4, 3, 8),
    }
    memory = Memory(
        torch.randn(4, 6, 8),
        torch.rand(4, 6) > 0.5,
        [(2, 3)],
        torch.rand(4, 1, 2),
        [torch.randn(4, 8, 2, 3)],
        layer,
    )
    images = slice(1, 3)
    part = memory.slice(images)
    assert torch.equal(part.tokens, memory.tokens[1:3]) and torch.equal(part.mask, memory.mask[1:3])
    assert part.shapes == [(2, 3)] and torch.equal(part.features[0], memory.features[0][1:3])
    assert torch.equal(part.valid_ratios, memory.valid_ratios[1:3])
    assert torch.equal(part.proposals["queries"], layer["queries"][1:3])
    bare = memory._replace(mask=None, proposals=None).slice(images)
    assert bare.mask is None and bare.proposals is None

    layer_inputs = [(torch.randn(4, 3, 8), torch.randn(4, 3, 8))]
    outputs = {
        **layer,
        "aux_outputs": [layer],
        "encoder": layer,
        "groups": [layer],
        "layer_inputs": layer_inputs,
    }
    part = slice_outputs(outputs, images)
    for found in (part, part["aux_outputs"][0], part["encoder"]):
        assert all(torch.equal(found[key], layer[key][1:3]) for key in layer)
    assert torch.equal(part["layer_inputs"][0][1], layer_inputs[0][1][1:3]) and "groups" not in part


def test_level_layout_is_width_height_and_first_token_and_serves_training_after_inference():
    shapes = [(3, 5), (2, 7), (1, 1)]
    with torch.inference_mode():
        cached = level_layout(shapes, torch.device("cpu"))
    assert cached.tolist() == [[5, 3, 0], [7, 2, 15], [1, 1, 29]]
    scale = torch.ones(3, 3, requires_grad=True)
    # an inference tensor could not be saved for the backward pass
    (scale * level_layout(shapes, torch.device("cpu"))).sum().backward()
    assert torch.equal(scale.grad, cached.float())


@pytest.mark.parametrize(
    ("device", "pinned", "waits"),
    [
        (None, False, False),
        ("cpu", False, False),
        ("cuda", True, False),
        ("cuda:1", True, False),
        ("mps", False, True),
    ],
)
def test_a_copy_to_cuda_is_pinned_and_does_not_wait_and_one_to_other_gpus_does(
    device, pinned, waits, monkeypatch
):
    copies = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: copies.append("pinned") or tensor
    )
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, place, non_blocking=False: copies.append(non_blocking)
    )
    to_device(torch.ones(2), device)
    assert copies == ["pinned"] * pinned + [not waits]
