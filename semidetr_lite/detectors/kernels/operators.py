"""Deformable attention and its gradients as two operators of torch.

Autograd and torch.compile know an operator by its name. torch.compile takes it as one piece and
does not look inside, so a compiled detector keeps its kernel.

    device   kernel, forward and backward
    CPU      cpu_attention.py
    GPU      triton_attention.py

Both modules are imported when they are first used.
"""

import torch

TENSORS = "Tensor value, SymInt[] sides, Tensor locations, Tensor weights"


def attention_operator(
    value: torch.Tensor,
    shapes: list[tuple[int, int]],
    locations: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The result of `deformable_attention`, (B, Q, D), with gradients; same arguments."""
    sides = [side for shape in shapes for side in shape]  # operators take no pairs
    return attention(value, sides, locations, weights)


@torch.library.custom_op(
    "semidetr_lite::deformable_attention", mutates_args=(), schema=f"({TENSORS}) -> Tensor"
)
def attention(value, sides, locations, weights):
    """The forward pass; `sides` are H and W of each level, one after the other."""
    return _kernels(value.device).forward(value, _pairs(sides), locations, weights)


@torch.library.custom_op(
    "semidetr_lite::deformable_attention_backward",
    mutates_args=(),
    schema=f"({TENSORS}, Tensor output_grad) -> (Tensor, Tensor, Tensor)",
)
def attention_backward(value, sides, locations, weights, output_grad):
    """The gradients of value, locations and weights."""
    kernels = _kernels(value.device)
    return kernels.backward(value, _pairs(sides), locations, weights, output_grad)


def _kernels(device: torch.device):
    """The module with the forward and backward kernel of a device."""
    if device.type == "cpu":
        from semidetr_lite.detectors.kernels import cpu_attention

        return cpu_attention
    from semidetr_lite.detectors.kernels import triton_attention

    return triton_attention


def _pairs(sides: list[int]) -> list[tuple[int, int]]:
    return list(zip(sides[::2], sides[1::2], strict=True))


# ---- what torch.compile and autograd need to know ------------------------------------------------


@attention.register_fake
def _(value, sides, locations, weights):
    """The shape and dtype of the result."""
    batch, queries, heads = locations.shape[:3]
    return value.new_empty(batch, queries, heads * value.shape[3])


@attention_backward.register_fake
def _(value, sides, locations, weights, output_grad):
    return tuple(each.new_empty(each.shape) for each in (value, locations, weights))


def _save_for_backward(ctx, inputs, output):
    value, ctx.sides, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _propagate_back(ctx, output_grad):
    value, locations, weights = ctx.saved_tensors
    grads = attention_backward(value, ctx.sides, locations, weights, output_grad)
    value_grad, locations_grad, weights_grad = grads
    return value_grad, None, locations_grad, weights_grad


attention.register_autograd(_propagate_back, setup_context=_save_for_backward)
