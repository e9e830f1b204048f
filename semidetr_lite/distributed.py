"""One run in several processes, which `torchrun` starts; with one process, every function here is the identity.

Each process takes its share of a step's images, and what a loss is divided by is that of all of them, so that the
mean of the processes' losses (and gradients) is what one process would find with the whole batch.
"""

import datetime
import hashlib
import os
import re
import sys

import torch
import torch.distributed as dist

from semidetr_lite.errors import UserError


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; the first, 0, is the one that writes and prints."""
    return dist.get_rank() if world() > 1 else 0


def start() -> None:
    """Join the other processes if torchrun started this one; call it before anything else here."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # what the host knows never waits for a GPU
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    if rank():
        sys.stdout = open(os.devnull, "w")


def stop() -> None:
    """Leave the other processes."""
    if world() > 1:
        dist.destroy_process_group()


def is_loss(problem: Exception) -> bool:
    """Whether this is how the death of another process shows here."""
    return world() > 1 and re.search("gloo|nccl|peer|connection", str(problem), re.IGNORECASE) is not None


def share(count: int) -> range:
    """Which of `count` things in a row are this process's: the parts differ by one at most."""
    return range(count * rank() // world(), count * (rank() + 1) // world())


def gather(value) -> list:
    """The values of all processes, in their order; anything that can be pickled, kept on the host."""
    found = [value] * world()
    if world() > 1:
        dist.all_gather_object(found, value)
    return found


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over the processes, without gradient; a tensor of one shape in all of them."""
    values = values.detach().clone()
    if world() > 1:
        dist.all_reduce(values)
    return values / world()


def agree(what: str, *values) -> None:
    """Raises UserError, in every process, if the values (by their repr) are not the same in all."""
    found = gather(hashlib.sha256(repr(values).encode()).hexdigest())
    other = next((number for number, digest in enumerate(found) if digest != found[0]), None)
    if other is not None:
        raise UserError(f"process {other} has other {what} than process 0: give all the same files and options")
