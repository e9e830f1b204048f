"""Deformable attention as one GPU kernel, in Triton: what `deformable_attention` computes, without what lies between.

The sum in deformable.py keeps every value read, (B, Q, D, L * P), for the backward pass. Here a program reads the 4
cells around each point, adds them up and keeps nothing; the backward pass reads them again. Triton comes with torch for
Linux and builds the kernel when it first runs, with the machine's C compiler. Without either, elsewhere, in float64,
inside torch.compile and for heads whose width is no power of two, the sum in deformable.py is used.

Values may be bfloat16; sums and gradients are float32. Gradients of values are added up in any order, so that two runs
differ by rounding (as they do with `grid_sample` on a GPU).
"""

import torch
import triton
import triton.language as tl

from semidetr_lite.detectors.transformer import level_table


@triton.jit
def _place(places, weights, place, live, width, height):
    """Of one point of each query: weight, lower left cell and the shares (x, y) of what is above it."""
    x = tl.load(places + 2 * place, live, 0.0) * width - 0.5
    y = tl.load(places + 2 * place + 1, live, 0.0) * height - 0.5
    low_x, low_y = tl.floor(x), tl.floor(y)
    return tl.load(weights + place, live, 0.0), low_x.to(tl.int32), low_y.to(tl.int32), x - low_x, y - low_y


@triton.jit(do_not_specialize=["tokens", "queries"])  # one build for images of all sizes
def _forward(
    values, levels, places, weights, sums, tokens, queries,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head of one image; arguments as in `FusedAttention`, levels (L, 3): width, height, first."""
    image, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    query, depth = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    live, own = query < queries, (image * queries + query) * HEADS + head
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    for level in range(LEVELS):
        width, height = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        first = image * tokens + tl.load(levels + 3 * level + 2)
        for point in tl.static_range(POINTS):
            place = (own * LEVELS + level) * POINTS + point
            weight, x, y, above_x, above_y = _place(places, weights, place, live, width, height)
            for corner in tl.static_range(4):
                u, v = x + corner % 2, y + corner // 2
                share = (above_x if corner % 2 else 1 - above_x) * (above_y if corner // 2 else 1 - above_y)
                inside = live & (u >= 0) & (u < width) & (v >= 0) & (v < height)
                row = ((first + v * width + u) * HEADS + head) * DEPTH
                read = tl.load(values + row[:, None] + depth, inside[:, None], 0.0)
                total += (weight * share)[:, None] * read.to(tl.float32)
    tl.store(sums + own[:, None] * DEPTH + depth, total, live[:, None])


@triton.jit(do_not_specialize=["tokens", "queries"])
def _backward(
    values, levels, places, weights, sums_grad, values_grad, places_grad, weights_grad, tokens, queries,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of the same queries; that of the values is added to what others add."""
    image, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    query, depth = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    live, own = query < queries, (image * queries + query) * HEADS + head
    asked = tl.load(sums_grad + own[:, None] * DEPTH + depth, live[:, None], 0.0).to(tl.float32)
    for level in range(LEVELS):
        width, height = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        first = image * tokens + tl.load(levels + 3 * level + 2)
        for point in tl.static_range(POINTS):
            place = (own * LEVELS + level) * POINTS + point
            weight, x, y, above_x, above_y = _place(places, weights, place, live, width, height)
            to_weight, to_x, to_y = 0.0, 0.0, 0.0
            for corner in tl.static_range(4):
                u, v = x + corner % 2, y + corner // 2
                share_x, share_y = above_x if corner % 2 else 1 - above_x, above_y if corner // 2 else 1 - above_y
                inside = live & (u >= 0) & (u < width) & (v >= 0) & (v < height)
                row = ((first + v * width + u) * HEADS + head) * DEPTH
                read = tl.load(values + row[:, None] + depth, inside[:, None], 0.0)
                agrees = tl.sum(read.to(tl.float32) * asked, 1)
                to_weight += share_x * share_y * agrees
                to_x += (share_y if corner % 2 else -share_y) * agrees
                to_y += (share_x if corner // 2 else -share_x) * agrees
                part = (weight * share_x * share_y)[:, None] * asked
                tl.atomic_add(values_grad + row[:, None] + depth, part, inside[:, None], sem="relaxed")
            tl.store(weights_grad + place, to_weight, live)
            tl.store(places_grad + 2 * place, to_x * weight * width, live)
            tl.store(places_grad + 2 * place + 1, to_y * weight * height, live)


class FusedAttention(torch.autograd.Function):
    """apply(value (B, S, M, D/M), shapes, locations (B, Q, M, L, P, 2), weights (B, Q, M, L, P)) -> (B, Q, D)."""

    ROWS = 32  # queries of a program

    @staticmethod
    def _run(kernel, value, shapes, locations, *tensors):
        batch, queries, heads, levels, points = locations.shape[:5]
        grid = (-(-queries // FusedAttention.ROWS), batch * heads)
        sizes = (value.shape[1], queries, heads, value.shape[3], levels, points, FusedAttention.ROWS)
        with torch.cuda.device_of(value):  # Triton starts a kernel on the current device
            if all(grid):
                kernel[grid](value, level_table(shapes, value.device), locations, *tensors, *sizes)

    @staticmethod
    def forward(ctx, value, shapes, locations, weights):
        value, locations, weights = value.contiguous(), locations.float().contiguous(), weights.float().contiguous()
        ctx.shapes = shapes
        ctx.save_for_backward(value, locations, weights)
        sums = torch.empty(*locations.shape[:3], value.shape[3], dtype=value.dtype, device=value.device)
        FusedAttention._run(_forward, value, shapes, locations, weights, sums)
        return sums.flatten(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, sums_grad):
        value, locations, weights = ctx.saved_tensors
        grads = [torch.zeros_like(value, dtype=torch.float32), torch.empty_like(locations), torch.empty_like(weights)]
        FusedAttention._run(_backward, value, ctx.shapes, locations, weights, sums_grad.contiguous(), *grads)
        return grads[0].to(value.dtype), None, grads[1], grads[2]
