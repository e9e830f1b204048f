"""Faster ways to the numbers of `deformable_attention`.

The formula stands in deformable.py, in readable PyTorch that runs on every device. A kernel is a
function with the same arguments and the same result up to rounding:

    cpu_attention.py             CPU, forward and backward, compiled by numba
    triton_attention.py          GPU, forward and backward, compiled by Triton
    embedding_bag_attention.py   CPU without gradients, where numba is not installed

operators.py makes the compiled kernels known to autograd and torch.compile.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch

from semidetr_lite.detectors.kernels.embedding_bag_attention import embedding_bag_attention
from semidetr_lite.detectors.kernels.operators import attention_operator

Kernel = Callable[[torch.Tensor, list[tuple[int, int]], torch.Tensor, torch.Tensor], torch.Tensor]


def select_kernel(value: torch.Tensor, locations: torch.Tensor) -> Kernel | None:
    """The fastest kernel for tensors like these, or None: use the readable formula.

    Args:
        value: (B, S, M, D/M), see `deformable_attention`.
        locations: (B, Q, M, L, P, 2).
    """
    device, channels = value.device.type, value.shape[-1]
    if device == "cpu":
        suitable = locations.dtype in (torch.float32, torch.float64)
    else:
        power_of_two = channels & (channels - 1) == 0
        suitable = device == "cuda" and power_of_two and value.dtype != torch.float64
    if suitable and can_compile(device):
        return attention_operator
    without_gradients = not torch.is_grad_enabled()
    if device == "cpu" and without_gradients and value.dtype == locations.dtype:
        return embedding_bag_attention
    return None


@torch.compiler.assume_constant_result  # torch.compile asks and does not look inside
def can_compile(device: str) -> bool:
    """Whether the kernel of a kind of device, "cpu" or "cuda", can be compiled here."""
    return _try_kernel(device)


@functools.cache
def _try_kernel(device: str) -> bool:
    """Compile a kernel and run it once, forward and backward; a warning where that fails.

    Without numba there is no warning: it is left out where it has no wheel.
    """
    compiler = "numba" if device == "cpu" else "Triton"
    if device == "cpu" and not importlib.util.find_spec("numba"):
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            value = torch.zeros(1, 1, 1, 16, device=device, requires_grad=True)
            locations = torch.zeros(1, 1, 1, 1, 1, 2, device=device)
            weights = torch.zeros(1, 1, 1, 1, 1, device=device)
            attention_operator(value, [(1, 1)], locations, weights).sum().backward()
        return True
    except Exception as problem:  # no C compiler, no headers, another numpy: each fails its way
        fault = f"{compiler} cannot build its kernel: {problem!r:.200}"
        warnings.warn(f"slower deformable attention, {fault}", stacklevel=2)
        return False
