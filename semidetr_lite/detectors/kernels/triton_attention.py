"""Deformable attention as one GPU kernel in Triton, forward and backward.

The readable formula keeps every sampled value, (B, Q, D, L * P), for the backward pass. Here a
program reads the four cells around each point, adds them up and keeps nothing; the backward pass
reads them again.

Triton comes with torch for Linux and compiles the kernel when it first runs, with the machine's C
compiler. The number of channels per head must be a power of two.

Values may be bfloat16; sums and gradients are float32. Gradients of values are added up in any
order, so two runs differ by rounding (as they do with `grid_sample` on a GPU).

Shapes: B images, Q queries, S tokens, D channels, L levels, M heads, P points.
"""

import torch
import triton
import triton.language as tl

from semidetr_lite.detectors.transformer import level_layout

BLOCK = 32  # queries per program


@triton.jit
def _load_point(locations, weights, point, active, width, height):
    """One sampling point of each query.

    Returns its weight, the cell below and to the left (x, y), and how far the point lies beyond
    that cell's centre (x, y), in cells.
    """
    x = tl.load(locations + 2 * point, active, 0.0) * width - 0.5
    y = tl.load(locations + 2 * point + 1, active, 0.0) * height - 0.5
    cell_x = tl.floor(x)
    cell_y = tl.floor(y)
    weight = tl.load(weights + point, active, 0.0)
    return weight, cell_x.to(tl.int32), cell_y.to(tl.int32), x - cell_x, y - cell_y


@triton.jit(do_not_specialize=["tokens", "queries"])  # compiled once for images of all sizes
def _forward(
    values, layout, locations, weights, output, tokens, queries,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The output of BLOCK queries in one head of one image.

    Tensors as in `deformable_attention`; layout is `level_layout`, CHANNELS is D/M.
    """
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, CHANNELS)
    active = query < queries
    query_head = (image * queries + query) * HEADS + head
    total = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for level in range(LEVELS):
        width = tl.load(layout + 3 * level)
        height = tl.load(layout + 3 * level + 1)
        first_token = image * tokens + tl.load(layout + 3 * level + 2)
        for p in tl.static_range(POINTS):
            point = (query_head * LEVELS + level) * POINTS + p
            weight, x, y, right, up = _load_point(locations, weights, point, active, width, height)
            for corner in tl.static_range(4):
                u = x + corner % 2
                v = y + corner // 2
                factor_x = right if corner % 2 else 1 - right
                factor_y = up if corner // 2 else 1 - up
                inside = active & (u >= 0) & (u < width) & (v >= 0) & (v < height)
                row = ((first_token + v * width + u) * HEADS + head) * CHANNELS
                cell = tl.load(values + row[:, None] + channel, inside[:, None], 0.0)
                factor = weight * (factor_x * factor_y)
                total += factor[:, None] * cell.to(tl.float32)
    tl.store(output + query_head[:, None] * CHANNELS + channel, total, active[:, None])


@triton.jit(do_not_specialize=["tokens", "queries"])
def _backward(
    values, layout, locations, weights, output_grad, values_grad, locations_grad, weights_grad,
    tokens, queries,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK queries in one head of one image.

    Gradients of values are added to those of the other programs.
    """
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, CHANNELS)
    active = query < queries
    query_head = (image * queries + query) * HEADS + head
    upstream = tl.load(
        output_grad + query_head[:, None] * CHANNELS + channel, active[:, None], 0.0
    ).to(tl.float32)
    for level in range(LEVELS):
        width = tl.load(layout + 3 * level)
        height = tl.load(layout + 3 * level + 1)
        first_token = image * tokens + tl.load(layout + 3 * level + 2)
        for p in tl.static_range(POINTS):
            point = (query_head * LEVELS + level) * POINTS + p
            weight, x, y, right, up = _load_point(locations, weights, point, active, width, height)
            weight_grad = 0.0
            x_grad = 0.0
            y_grad = 0.0
            for corner in tl.static_range(4):
                u = x + corner % 2
                v = y + corner // 2
                factor_x = right if corner % 2 else 1 - right
                factor_y = up if corner // 2 else 1 - up
                inside = active & (u >= 0) & (u < width) & (v >= 0) & (v < height)
                row = ((first_token + v * width + u) * HEADS + head) * CHANNELS
                cell = tl.load(values + row[:, None] + channel, inside[:, None], 0.0)
                product = tl.sum(cell.to(tl.float32) * upstream, 1)
                weight_grad += factor_x * factor_y * product
                x_grad += (factor_y if corner % 2 else -factor_y) * product
                y_grad += (factor_x if corner // 2 else -factor_x) * product
                cell_grad = (weight * factor_x * factor_y)[:, None] * upstream
                cell_address = values_grad + row[:, None] + channel
                tl.atomic_add(cell_address, cell_grad, inside[:, None], sem="relaxed")
            tl.store(weights_grad + point, weight_grad, active)
            tl.store(locations_grad + 2 * point, x_grad * weight * width, active)
            tl.store(locations_grad + 2 * point + 1, y_grad * weight * height, active)


def forward(
    value: torch.Tensor,
    shapes: list[tuple[int, int]],
    locations: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The result of `deformable_attention`, (B, Q, D) in the dtype of `value`; same arguments."""
    value, locations, weights = _as_read(value, locations, weights)
    batch, queries, heads = locations.shape[:3]
    output = value.new_empty(batch, queries, heads * value.shape[3])
    _run(_forward, value, shapes, locations, weights, output)
    return output


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
    dtypes = value.dtype, locations.dtype, weights.dtype
    value, locations, weights = _as_read(value, locations, weights)
    grads = (
        torch.zeros_like(value, dtype=torch.float32),  # added to
        torch.empty_like(locations),
        torch.empty_like(weights),
    )
    _run(_backward, value, shapes, locations, weights, output_grad.contiguous(), *grads)
    value_grad, locations_grad, weights_grad = (
        grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)
    )
    return value_grad, locations_grad, weights_grad


def _as_read(
    value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors as the kernels read them: contiguous, locations and weights in float32."""
    return value.contiguous(), locations.float().contiguous(), weights.float().contiguous()


def _run(kernel, value, shapes, locations, *tensors):
    """Start a kernel for all queries, heads and images."""
    batch, queries, heads, levels, points = locations.shape[:5]
    tokens, channels = value.shape[1], value.shape[3]
    blocks = -(-queries // BLOCK)
    if blocks == 0 or batch == 0:
        return
    layout = level_layout(shapes, value.device)
    with torch.cuda.device_of(value):  # Triton starts a kernel on the current device
        kernel[blocks, batch * heads](
            value, layout, locations, *tensors, tokens, queries,
            heads, channels, levels, points, BLOCK,
        )  # fmt: skip
