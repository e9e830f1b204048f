"""Copies between the CPU and a GPU.

A GPU works through its queue of operations while Python already adds the next ones. A copy to the
CPU synchronises: it waits until the queue is empty. So a step makes few of them. A copy to the GPU
does not synchronise if it reads pinned memory.
"""

import numpy as np
import torch


def to_host(values: torch.Tensor) -> np.ndarray:
    """A tensor as a numpy array on the CPU. This is the one place where a step synchronises."""
    return values.detach().cpu().numpy()


def copy_to_host(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Several tensors as numpy arrays on the CPU, in one copy.

    Args:
        tensors: of float or bool, of any shapes.

    Returns:
        An array per tensor, of the same shape: float32, or bool for a tensor of bool.
    """
    flat = to_host(torch.cat([tensor.detach().float().flatten() for tensor in tensors]))
    arrays, start = [], 0
    for tensor in tensors:
        array = flat[start : start + tensor.numel()].reshape(tensor.shape)
        arrays.append(array > 0.5 if tensor.dtype == torch.bool else array)
        start += tensor.numel()
    return arrays


def to_device(values: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """A tensor of the CPU on a device, without synchronising; None leaves it where it is.

    Only CUDA is safe for this: Apple's GPU may read the memory of the CPU when it holds something
    else already.
    """
    kind = "cpu" if device is None else torch.device(device).type
    if kind == "cuda" and not (values.is_cuda or torch.compiler.is_compiling()):
        values = values.pin_memory()
    return values.to(device, non_blocking=kind in ("cpu", "cuda"))
