"""Deformable attention on a CPU, forward and backward, compiled by numba.

The readable formula makes a tensor of all sampled values and walks over it several times. Here one
loop reads the four cells around each point, adds them up and keeps nothing; the backward pass reads
them again.

A head of an image is one piece of work. Pieces are shared among as many threads as torch has
(`torch.set_num_threads`), plain threads of Python: the loops run without its lock. No two threads
add to the same number, so the result has the same bits with any number of threads.

numba compiles the loops when they first run, once per dtype, and keeps them in its cache. It needs
no C compiler.

Shapes: B images, Q queries, S tokens, D channels, L levels, M heads, P points.
"""

import threading
from typing import Any

import numba
import numpy as np
import torch

from semidetr_lite.detectors.transformer import level_layout

# The compiler may reorder sums to use vector instructions. NaN and infinity stay what they are.
FAST_MATH = {"contract", "reassoc", "nsz"}
ONE_THREAD_BELOW = 1_000_000  # numbers to read: starting a thread would take longer


def _compiled(function):
    """The function, compiled when it first runs; from a cache where a folder can be written."""
    options: dict[str, Any] = {"nogil": True, "fastmath": FAST_MATH, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder for its cache
        return numba.njit(**options)(function)


def forward(
    value: torch.Tensor,
    shapes: list[tuple[int, int]],
    locations: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The result of `deformable_attention`, (B, Q, D) in the dtype of `value`; same arguments.

    It is computed in the dtype of the locations, float32 or float64.
    """
    inputs = _as_read(value, shapes, locations, weights)
    batch, queries, heads = locations.shape[:3]
    output = locations.new_empty(batch, queries, heads, value.shape[3])
    _run(_forward, *inputs, output)
    return output.flatten(2).to(value.dtype)


def backward(
    value: torch.Tensor,
    shapes: list[tuple[int, int]],
    locations: torch.Tensor,
    weights: torch.Tensor,
    output_grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of value, locations and weights, each like its tensor.

    Args:
        value, shapes, locations, weights: see `deformable_attention`.
        output_grad: (B, Q, D), the gradient of its result.
    """
    inputs = _as_read(value, shapes, locations, weights)
    by_head, _, locations_read, weights_read = inputs
    heads, channels = value.shape[2:]
    output_grad = output_grad.to(locations.dtype).unflatten(2, (heads, channels)).contiguous()
    value_grad = torch.zeros_like(by_head)  # added to
    locations_grad = torch.empty_like(locations_read)
    weights_grad = torch.empty_like(weights_read)
    _run(_backward, *inputs, output_grad, value_grad, locations_grad, weights_grad)
    value_grad = value_grad.transpose(1, 2).to(value.dtype).contiguous()
    return value_grad, locations_grad, weights_grad.to(weights.dtype)


def _as_read(value, shapes, locations, weights) -> tuple[torch.Tensor, ...]:
    """The tensors as the loops read them: contiguous, of one dtype, and the layout of the levels.

    The values of a head lie side by side, (B, M, S, D/M). In the order of tokens there would be
    those of the other heads between them, and the processor's cache would hold fewer cells.
    """
    dtype = locations.dtype
    return (
        value.transpose(1, 2).to(dtype).contiguous(),
        level_layout(shapes, value.device),
        locations.contiguous(),
        weights.to(dtype).contiguous(),
    )


def _run(loop, value: torch.Tensor, *tensors: torch.Tensor) -> None:
    """Run a loop for all heads of all images, in as many threads as torch has."""
    pieces = value.shape[0] * value.shape[1]
    locations = tensors[1]
    numbers_read = 2 * locations.numel() * value.shape[3]
    count = 1 if numbers_read < ONE_THREAD_BELOW else min(torch.get_num_threads(), pieces)
    edges = [pieces * number // count for number in range(count + 1)]
    arrays = [tensor.numpy() for tensor in (value, *tensors)]
    threads = [
        threading.Thread(target=loop, args=(*arrays, first, end))
        for first, end in zip(edges[1:], edges[2:], strict=False)
    ]
    for thread in threads:
        thread.start()
    loop(*arrays, edges[0], edges[1])
    for thread in threads:
        thread.join()


# ---- compiled loops ------------------------------------------------------------------------------
# The four cells around a point are numbered by row and column: 00, 01, 10, 11. Sums over channels
# are loops of their own, which become vector instructions.


@_compiled
def _neighbours(coordinate, size, one):
    """The cells below and above a coordinate along one axis, and how they count.

    Args:
        coordinate: in cells, an integer at the centre of a cell; it lies in [-1, size).
        size: cells along this axis.
        one: 1 in the dtype of the coordinate.

    Returns:
        Two indices, two bilinear weights, and the derivatives of the weights by the coordinate.
        Where a cell lies outside the map, the index is that of the border and the others are 0.
    """
    zero = one - one
    below = np.floor(coordinate)
    above_weight, above_slope = coordinate - below, one
    below_weight, below_slope = one - above_weight, -one
    index = int(below)
    if index < 0:
        below_weight, below_slope = zero, zero
    if index + 1 >= size:
        above_weight, above_slope = zero, zero
    indices = max(index, 0), min(index + 1, size - 1)
    return indices, (below_weight, above_weight), (below_slope, above_slope)


@_compiled
def _is_finite(x, y, weight):
    """Whether a point outside the map adds 0; one that lies nowhere adds NaN."""
    return abs(x) < np.inf and abs(y) < np.inf and abs(weight) < np.inf


@_compiled
def _forward(values, layout, locations, weights, output, first, end):
    """The output of all queries in some heads of images.

    Args:
        values: (B, M, S, D/M).
        layout: (L, 3), see `level_layout`.
        locations, weights: see `deformable_attention`.
        output: (B, Q, M, D/M), to write to.
        first, end: of the pieces of work, which are numbered image * M + head.
    """
    heads, channels = values.shape[1], values.shape[3]
    queries, levels, points = weights.shape[1], weights.shape[3], weights.shape[4]
    real = values.dtype.type
    one, half = real(1), real(0.5)
    for piece in range(first, end):
        image, head = piece // heads, piece % heads
        for query in range(queries):
            total = output[image, query, head]
            total[:] = 0
            finite = True
            for level in range(levels):
                width, height, start = layout[level, 0], layout[level, 1], layout[level, 2]
                for p in range(points):
                    weight = weights[image, query, head, level, p]
                    x = locations[image, query, head, level, p, 0] * real(width) - half
                    y = locations[image, query, head, level, p, 1] * real(height) - half
                    if not (-one <= x < real(width) and -one <= y < real(height)):
                        finite = finite and _is_finite(x, y, weight)
                        continue
                    columns, (left, right), _ = _neighbours(x, width, one)
                    rows, (top, bottom), _ = _neighbours(y, height, one)
                    upper, lower = start + rows[0] * width, start + rows[1] * width
                    cell_00 = values[image, head, upper + columns[0]]
                    cell_01 = values[image, head, upper + columns[1]]
                    cell_10 = values[image, head, lower + columns[0]]
                    cell_11 = values[image, head, lower + columns[1]]
                    weight_00, weight_01 = weight * top * left, weight * top * right
                    weight_10, weight_11 = weight * bottom * left, weight * bottom * right
                    for c in range(channels):
                        upper_sum = weight_00 * cell_00[c] + weight_01 * cell_01[c]
                        lower_sum = weight_10 * cell_10[c] + weight_11 * cell_11[c]
                        total[c] += upper_sum + lower_sum
            if not finite:
                total[:] = np.nan


@_compiled
def _products(cells, tokens, upstream, one):
    """The dot products of four cells with the output's gradient: what each adds with weight 1."""
    cell_00, cell_01 = cells[tokens[0]], cells[tokens[1]]
    cell_10, cell_11 = cells[tokens[2]], cells[tokens[3]]
    dot_00 = dot_01 = dot_10 = dot_11 = one - one
    for c in range(len(upstream)):
        dot_00 += cell_00[c] * upstream[c]
        dot_01 += cell_01[c] * upstream[c]
        dot_10 += cell_10[c] * upstream[c]
        dot_11 += cell_11[c] * upstream[c]
    return dot_00, dot_01, dot_10, dot_11


@_compiled
def _add_scaled(cells_grad, tokens, factors, upstream):
    """Add a multiple of the output's gradient to the gradients of four cells."""
    grad_00, grad_01 = cells_grad[tokens[0]], cells_grad[tokens[1]]
    grad_10, grad_11 = cells_grad[tokens[2]], cells_grad[tokens[3]]
    for c in range(len(upstream)):
        grad_00[c] += factors[0] * upstream[c]
        grad_01[c] += factors[1] * upstream[c]
        grad_10[c] += factors[2] * upstream[c]
        grad_11[c] += factors[3] * upstream[c]


@_compiled
def _backward(
    values, layout, locations, weights, output_grad,
    values_grad, locations_grad, weights_grad, first, end,
):  # fmt: skip
    """The gradients that come from some heads of images.

    Arguments as in `_forward`, and the gradient of its output. `values_grad` is added to, the
    others are written.
    """
    heads = values.shape[1]
    queries, levels, points = weights.shape[1], weights.shape[3], weights.shape[4]
    real = values.dtype.type
    one, half = real(1), real(0.5)
    for piece in range(first, end):
        image, head = piece // heads, piece % heads
        for query in range(queries):
            upstream = output_grad[image, query, head]
            for level in range(levels):
                width, height, start = layout[level, 0], layout[level, 1], layout[level, 2]
                for p in range(points):
                    weight = weights[image, query, head, level, p]
                    x = locations[image, query, head, level, p, 0] * real(width) - half
                    y = locations[image, query, head, level, p, 1] * real(height) - half
                    if not (-one <= x < real(width) and -one <= y < real(height)):
                        nothing = real(0) if _is_finite(x, y, weight) else real(np.nan)
                        weights_grad[image, query, head, level, p] = nothing
                        locations_grad[image, query, head, level, p, :] = nothing
                        continue
                    columns, (left, right), (left_slope, right_slope) = _neighbours(x, width, one)
                    rows, (top, bottom), (top_slope, bottom_slope) = _neighbours(y, height, one)
                    upper, lower = start + rows[0] * width, start + rows[1] * width
                    tokens = (
                        upper + columns[0], upper + columns[1],
                        lower + columns[0], lower + columns[1],
                    )  # fmt: skip
                    dot_00, dot_01, dot_10, dot_11 = _products(
                        values[image, head], tokens, upstream, one
                    )
                    upper_dot = left * dot_00 + right * dot_01
                    lower_dot = left * dot_10 + right * dot_11
                    upper_slope = left_slope * dot_00 + right_slope * dot_01
                    lower_slope = left_slope * dot_10 + right_slope * dot_11
                    x_grad = top * upper_slope + bottom * lower_slope
                    y_grad = top_slope * upper_dot + bottom_slope * lower_dot
                    weight_grad = top * upper_dot + bottom * lower_dot
                    weights_grad[image, query, head, level, p] = weight_grad
                    locations_grad[image, query, head, level, p, 0] = x_grad * weight * real(width)
                    locations_grad[image, query, head, level, p, 1] = y_grad * weight * real(height)
                    factors = (
                        weight * top * left, weight * top * right,
                        weight * bottom * left, weight * bottom * right,
                    )  # fmt: skip
                    _add_scaled(values_grad[image, head], tokens, factors, upstream)
