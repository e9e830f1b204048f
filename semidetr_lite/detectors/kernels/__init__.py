"""Faster ways to the numbers of `deformable_attention`.

The formula stands in deformable.py, in readable PyTorch that runs on every device. A kernel is a
function with the same arguments and the same result up to rounding:

    triton_attention.py          one GPU kernel, forward and backward
    embedding_bag_attention.py   CPU without gradients (teacher, inference)

A kernel for training on the CPU would get a file of its own here and a branch in `select_kernel`.
"""

import functools
import warnings
from collections.abc import Callable

import torch

from semidetr_lite.detectors.kernels.embedding_bag_attention import embedding_bag_attention

Kernel = Callable[[torch.Tensor, list[tuple[int, int]], torch.Tensor, torch.Tensor], torch.Tensor]


def select_kernel(value: torch.Tensor, locations: torch.Tensor) -> Kernel | None:
    """The fastest kernel for tensors like these, or None: use the readable formula.

    Args:
        value: (B, S, M, D/M), see `deformable_attention`.
        locations: (B, Q, M, L, P, 2).
    """
    if value.device.type == "cpu":
        without_gradients = not torch.is_grad_enabled()
        same_dtype = value.dtype == locations.dtype
        return embedding_bag_attention if without_gradients and same_dtype else None
    if value.device.type == "cuda":
        channels = value.shape[-1]
        power_of_two = channels & (channels - 1) == 0
        if power_of_two and value.dtype != torch.float64 and not torch.compiler.is_compiling():
            return triton_kernel()
    return None


@functools.cache
def triton_kernel() -> Kernel | None:
    """The Triton kernel if it can be built here, else None after a warning. Tried once."""
    try:
        from semidetr_lite.detectors.kernels.triton_attention import TritonAttention

        value = torch.zeros(1, 1, 1, 16, device="cuda", requires_grad=True)
        locations = torch.zeros(1, 1, 1, 1, 1, 2, device="cuda")
        weights = torch.zeros(1, 1, 1, 1, 1, device="cuda")
        with torch.enable_grad():
            TritonAttention.apply(value, [(1, 1)], locations, weights).sum().backward()
        return TritonAttention.apply
    except Exception as problem:  # no Triton, no C compiler, no Python headers: each fails its way
        message = f"slower deformable attention, Triton cannot build its kernel: {problem!r:.200}"
        warnings.warn(message, stacklevel=2)
        return None
