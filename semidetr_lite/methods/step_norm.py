"""Batch normalization inside a method; its running statistics move once a step.

A forward pass in training normalizes by the mean and variance of its own micro-batch and process
(on COCO: of the boxes that one released GPU would have), as `torch.nn.BatchNorm2d` does. The
running statistics are updated apart from that, by `update_running_statistics`, after the
optimizer's step: by the mean over all forward passes of the step, in all micro-batches and
processes. So they are the same in every process, N processes have those of one process with N
micro-batches, a step that is skipped leaves them as they are, and a forward pass that is run again
for the backward pass does not count twice.

The running statistics normalize where there is no batch: in evaluation, and for fewer than two
rows.

Shapes: R rows (boxes), D channels.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from semidetr_lite import distributed


class StepBatchNorm(nn.Module):
    """Batch normalization of (R, D) or (R, D, H, W).

    Args:
        channels: D.
        momentum: how far the running statistics move towards those of a step.
        eps: added to the variance.
    """

    running_mean: torch.Tensor  # (D,)
    running_var: torch.Tensor  # (D,)

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.step_statistics: list[torch.Tensor] = []  # (2, D) mean, variance of each forward pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The normalized rows, of the shape of `x`."""
        if not self.training or len(x) < 2:
            running = (self.running_mean, self.running_var)
            return F.batch_norm(x, *running, self.weight, self.bias, False, 0.0, self.eps)
        if torch.is_grad_enabled():
            axes = [axis for axis in range(x.dim()) if axis != 1]
            variance, mean = torch.var_mean(x.detach(), axes)
            self.step_statistics.append(torch.stack([mean, variance]))
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


def forget_step(modules: Iterable[nn.Module]) -> None:
    """Drop what the forward passes of a step have noted; call it before each step."""
    for module in modules:
        if isinstance(module, StepBatchNorm):
            module.step_statistics.clear()


@torch.no_grad()
def update_running_statistics(modules: Iterable[nn.Module]) -> None:
    """Move the running statistics of all StepBatchNorm among the modules, after a step.

    They move towards the mean over all forward passes of the step in all processes; where there
    was none, they stay. All processes call it.
    """
    norms = [module for module in modules if isinstance(module, StepBatchNorm)]
    if not norms:
        return
    sums = []
    for norm in norms:
        none = torch.zeros_like(torch.stack([norm.running_mean, norm.running_var]))
        total = sum(norm.step_statistics, none).flatten()
        sums.append(torch.cat([total, total.new_tensor([len(norm.step_statistics)])]))
    lengths = [len(one) for one in sums]
    means = distributed.all_reduce_mean(torch.cat(sums)).split(lengths)
    for norm, values in zip(norms, means, strict=True):
        passes = values[-1]
        mean, variance = (values[:-1] / passes.clamp(min=1e-9)).view(2, -1)
        momentum = norm.momentum * (passes > 0)
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance, momentum)
        norm.step_statistics.clear()
