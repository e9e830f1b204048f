"""One run in several processes, which `torchrun` starts; alone, a process is its own world.

Each process takes its shard of a step's images, and every loss is divided by a number that counts
the images or boxes of all processes. So the mean of the processes' losses (and gradients) is what
one process would find with the whole batch.
"""

import datetime
import hashlib
import os
import re
import sys

import torch
import torch.distributed as dist

from semidetr_lite.errors import UserError


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process. Process 0 is the one that writes and prints."""
    return dist.get_rank() if world_size() > 1 else 0


def start() -> None:
    """Join the other processes if torchrun started this one; call it before anything else here."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # values on the CPU are exchanged by gloo, so that they never synchronise with a GPU
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    if rank():
        sys.stdout = open(os.devnull, "w")


def stop() -> None:
    """Leave the other processes."""
    if world_size() > 1:
        dist.destroy_process_group()


def is_peer_failure(problem: Exception) -> bool:
    """Whether this exception is how the death of another process shows in this one."""
    words = "gloo|nccl|peer|connection"
    return world_size() > 1 and re.search(words, str(problem), re.IGNORECASE) is not None


def shard(count: int) -> range:
    """Which of `count` items in a row are this process's; shards differ in length by at most 1."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def all_gather(value) -> list:
    """The values of all processes, by rank; `value` is anything that can be pickled, on the CPU."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def all_reduce_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean over the processes, without gradient; the shape is the same in all of them."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values / world_size()


def assert_same_on_all_ranks(what: str, *values) -> None:
    """Check that all processes were given the same `values`, compared by their repr.

    Raises UserError, in every process, where they differ; `what` names them in its message.
    """
    digests = all_gather(hashlib.sha256(repr(values).encode()).hexdigest())
    other = next((number for number, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise UserError(
            f"process {other} has other {what} than process 0: "
            "give all processes the same files and options"
        )
