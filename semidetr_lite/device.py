"""Between the host and a GPU, which works through what it was asked while the host asks for more.

A copy to the host waits until all of it is done, so a step makes few of them. A copy to the GPU need not wait, if it is
read from pinned memory.
"""

import torch


def to_host(values: torch.Tensor):
    """The one place where a step waits for the device: a tensor as a numpy array."""
    return values.detach().cpu().numpy()


def to_device(values: torch.Tensor, device) -> torch.Tensor:
    """A tensor of the host on a device, in its turn behind what the device is doing; None leaves it where it is.

    Only CUDA is safe for this: Apple's GPU may read the host's memory when it serves something else already.
    """
    kind = "cpu" if device is None else torch.device(device).type
    if kind == "cuda" and not (values.is_cuda or torch.compiler.is_compiling()):
        values = values.pin_memory()
    return values.to(device, non_blocking=kind in ("cpu", "cuda"))
