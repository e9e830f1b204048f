"""Deformable attention against four nested loops with bilinear sampling by hand."""

import math

import pytest
import torch

from semidetr_lite.detectors.deformable import (
    DecoderLayer,
    DeformableAttention,
    EncoderLayer,
    deformable_attention,
)
from semidetr_lite.detectors.kernels.embedding_bag_attention import embedding_bag_attention
from semidetr_lite.detectors.transformer import Memory

SHAPES = [(6, 9), (4, 3), (1, 2)]


def bilinear(cells, x: float, y: float):
    """Cells (H, W, D) at (x, y) in [0, 1], zero outside.

    Cell (i, j) has its centre at ((j + 0.5) / W, (i + 0.5) / H).
    """
    height, width = cells.shape[:2]
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column), math.floor(row)
    total = torch.zeros_like(cells[0, 0])
    for i, share_y in ((top, top + 1 - row), (top + 1, row - top)):
        for j, share_x in ((left, left + 1 - column), (left + 1, column - left)):
            if 0 <= i < height and 0 <= j < width:
                total = total + share_y * share_x * cells[i, j]
    return total


def attention_by_loops(value, shapes, locations, weights):
    batch, queries, heads, levels, points, _ = locations.shape
    rows = []
    for b in range(batch):
        for q in range(queries):
            for m in range(heads):
                total, start = torch.zeros_like(value[0, 0, 0]), 0
                for level in range(levels):
                    height, width = shapes[level]
                    cells = value[b, start : start + height * width, m].view(height, width, -1)
                    start += height * width
                    for p in range(points):
                        x, y = locations[b, q, m, level, p].tolist()
                        total = total + weights[b, q, m, level, p] * bilinear(cells, x, y)
                rows.append(total)
    return torch.stack(rows).view(batch, queries, -1)  # heads side by side


def some_inputs(dtype=torch.float32, batch=2, queries=4, heads=3, points=2, depth=5, shapes=SHAPES):
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, depth, dtype=dtype)
    locations = (
        torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=dtype) * 1.4 - 0.2
    )  # some outside
    weights = torch.rand(batch, queries, heads, len(shapes), points, dtype=dtype)
    return value, shapes, locations, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deformable_attention_equals_nested_loops(dtype):
    inputs = some_inputs(dtype)
    ours = deformable_attention(*inputs)
    assert ours.shape == (2, 4, 15) and ours.dtype == dtype
    assert torch.allclose(
        ours, attention_by_loops(*inputs), atol=1e-5 if dtype == torch.float32 else 1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_embedding_bag_kernel_equals_the_formula(dtype):
    """Also for points outside the maps."""
    value, shapes, locations, weights = some_inputs(dtype, 2, 7, 3, 5, 4, [(4, 6), (3, 2), (1, 1)])
    locations = locations * 1.6 - 0.3
    with torch.no_grad():
        fast = embedding_bag_attention(value, shapes, locations, weights)
    readable = attention_by_loops(value, shapes, locations, weights)
    assert readable.abs().max() > 0.1
    assert torch.allclose(fast, readable, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_gradients_in_double_precision():
    value, shapes, locations, weights = some_inputs(torch.float64, 1, 2, 2, 2, 3, [(3, 4), (2, 1)])
    for entry in (value, locations, weights):
        entry.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, x, w: deformable_attention(v, shapes, x, w), (value, locations, weights)
    )


def test_bfloat16_values_with_float32_locations():
    value, shapes, locations, weights = some_inputs()
    exact = deformable_attention(value, shapes, locations, weights)
    rough = deformable_attention(value.bfloat16(), shapes, locations, weights)
    assert rough.dtype == torch.bfloat16
    assert torch.allclose(rough.float(), exact, atol=0.2) and not torch.equal(rough.float(), exact)
    value, shapes, locations, weights = some_inputs(
        shapes=[(100, 160)]
    )  # where a cell is no wider than a rounding
    read = deformable_attention(value.bfloat16(), shapes, locations, weights).float()
    assert torch.allclose(
        read, deformable_attention(value.bfloat16().float(), shapes, locations, weights), atol=0.03
    )


def test_bfloat16_values_without_gradients():
    value, shapes, locations, weights = some_inputs()
    value = value.bfloat16()
    expected = deformable_attention(value, shapes, locations, weights)
    with torch.no_grad():
        assert torch.equal(deformable_attention(value, shapes, locations, weights), expected)


def test_at_the_centre_of_a_cell_it_reads_that_cell():
    value = torch.randn(1, 6 * 9, 2, 3)
    y, x = torch.meshgrid((torch.arange(6) + 0.5) / 6, (torch.arange(9) + 0.5) / 9, indexing="ij")
    centres = torch.stack([x, y], -1).view(1, 54, 1, 1, 1, 2).expand(-1, -1, 2, -1, -1, -1)
    read = deformable_attention(value, [(6, 9)], centres, torch.ones(1, 54, 2, 1, 1))
    assert torch.allclose(read, value.flatten(2), atol=1e-5)


def test_outside_reads_zero():
    value, shapes, locations, weights = some_inputs()
    assert (deformable_attention(value, shapes, locations * 0 - 1.0, weights) == 0).all()


# The learned part


def memory_of(tokens: torch.Tensor, shapes, mask=None) -> Memory:
    return Memory(tokens, mask, shapes, tokens.new_ones(len(tokens), len(shapes), 2), [], None)


def identity(linear: torch.nn.Linear) -> None:
    torch.nn.init.eye_(linear.weight)
    torch.nn.init.zeros_(linear.bias)


def plain_attention(dim=8, heads=2, levels=1, points=2) -> DeformableAttention:
    """Values and outputs pass through; all points lie on the reference."""
    attention = DeformableAttention(dim, heads, levels, points)
    identity(attention.value), identity(attention.output)
    torch.nn.init.zeros_(attention.offsets.bias)
    return attention


def test_without_offsets_a_query_reads_its_reference():
    tokens = torch.randn(2, 54, 8)
    queries, references = (
        torch.randn(2, 3, 8),
        torch.tensor([[0.5 / 9, 0.5 / 6], [4.5 / 9, 2.5 / 6], [8.5 / 9, 5.5 / 6]]),
    )
    places = references[None, :, None].expand(2, -1, -1, -1)
    read = plain_attention()(queries, places, memory_of(tokens, [(6, 9)]))
    assert torch.allclose(read, tokens[:, [0, 2 * 9 + 4, 5 * 9 + 8]], atol=1e-5)
    boxes = torch.cat([places, torch.full_like(places, 0.3)], -1)
    assert torch.allclose(
        plain_attention()(queries, boxes, memory_of(tokens, [(6, 9)])), read, atol=1e-5
    )


def test_offsets_of_points_are_in_cells_and_of_boxes_in_half_sides():
    tokens = torch.randn(1, 54, 8)
    memory, query = memory_of(tokens, [(6, 9)]), torch.zeros(1, 1, 8)
    attention = plain_attention(points=2)
    attention.offsets.bias.data = torch.tensor([3.0, 1.0] * 4)  # x, y of both heads and both points
    point = torch.tensor([1.5 / 9, 2.5 / 6]).view(1, 1, 1, 2)
    assert torch.allclose(attention(query, point, memory)[0, 0], tokens[0, 3 * 9 + 4], atol=1e-5)
    attention.offsets.bias.data = torch.tensor(
        [2.0, -2.0] * 4
    )  # over the number of points: one half side
    box = torch.tensor([4.5 / 9, 2.5 / 6, 4 / 9, 2 / 6]).view(1, 1, 1, 4)  # 4 cells wide, 2 high
    assert torch.allclose(attention(query, box, memory)[0, 0], tokens[0, 1 * 9 + 6], atol=1e-5)


def test_attention_weights_sum_to_one_over_levels_and_points():
    attention = DeformableAttention(8, 2, 3, 4)
    identity(attention.value), identity(attention.output)
    torch.nn.init.normal_(attention.weights.weight)
    tokens = torch.ones(1, sum(h * w for h, w in SHAPES), 8)
    torch.nn.init.zeros_(attention.offsets.bias)
    references = torch.full((1, 5, 3, 2), 0.5)
    read = attention(torch.randn(1, 5, 8), references, memory_of(tokens, SHAPES))
    assert torch.allclose(read, torch.ones_like(read), atol=1e-5)


def test_each_head_starts_in_its_own_direction_one_cell_further_with_each_point():
    attention = DeformableAttention(16, 4, 2, 3)
    star = attention.offsets.bias.view(4, 2, 3, 2)  # heads, levels, points, xy
    assert (attention.offsets.weight == 0).all() and (attention.weights.weight == 0).all()
    assert torch.allclose(star.abs().amax(-1), torch.tensor([1.0, 2, 3]).expand(4, 2, 3))
    right = torch.tensor([[1.0, 0], [2, 0], [3, 0]])
    assert torch.allclose(star[0, 1], right, atol=1e-5) and torch.allclose(
        star[2, 0], -right, atol=1e-5
    )
    assert torch.allclose(star[1, 0], right.flip(-1), atol=1e-5)


def test_padding_is_never_read():
    tokens, mask = torch.randn(1, 54, 8), torch.zeros(1, 54, dtype=torch.bool)
    mask[0, 20:] = True
    attention = DeformableAttention(8, 2, 1, 4)
    places = torch.rand(1, 7, 1, 2)
    first = attention(torch.zeros(1, 7, 8), places, memory_of(tokens, [(6, 9)], mask))
    changed = torch.where(mask[..., None], torch.tensor(1e3), tokens)
    again = attention(torch.zeros(1, 7, 8), places, memory_of(changed, [(6, 9)], mask))
    assert torch.equal(first, again)
    assert not torch.equal(
        first, attention(torch.zeros(1, 7, 8), places, memory_of(tokens, [(6, 9)]))
    )


def test_layers_run_under_autocast_with_float32_locations():
    tokens = torch.randn(2, sum(h * w for h, w in SHAPES), 16)
    memory = memory_of(tokens, SHAPES)
    encoder, decoder = EncoderLayer(16, 2, 3, 2, 32), DecoderLayer(16, 2, 3, 2, 32)
    references = torch.rand(2, tokens.shape[1], 3, 2)
    content, boxes = torch.randn(2, 5, 16), torch.rand(2, 5, 3, 4)
    exact = (
        encoder(memory, torch.zeros_like(tokens), references).tokens,
        decoder(content, content, boxes, memory),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = (
            encoder(memory, torch.zeros_like(tokens), references).tokens,
            decoder(content, content, boxes, memory),
        )
    for ours, theirs in zip(rough, exact):
        assert ours.isfinite().all() and torch.allclose(ours.float(), theirs, atol=0.15)
