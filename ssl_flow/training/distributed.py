"""Several processes, one run: `torchrun --nproc-per-node N train.py ...`.

Every process computes its share of each global batch; DistributedDataParallel averages their
gradients, which is exact, as the loss is a mean over images (of a map, with negatives from the
share alone). Process 0 alone writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_flow.models import pick_device

T = TypeVar("T")
# While process 0 makes synthetic videos, writes a checkpoint or probes, the others wait.
_PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes, prints and judges."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of a tensor that each of them has."""
        if self.size > 1:
            values = values / self.size
            dist.all_reduce(values)
        return values

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns in process 0, in every process; the others wait for it."""
        made: list[T | None] = [make() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(made, device=torch.device("cpu"))
        return made[0]  # type: ignore[return-value]


def is_main_process() -> bool:
    """Whether this is process 0 of torchrun's, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Meet the other processes that torchrun started (none without it).

    Args:
        device: as `pick_device` takes it; on CUDA each process gets the GPU of its local rank.

    Raises:
        ValueError: no such device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(pick_device(device))
        return
    if pick_device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(pick_device(device))
    place = pick_device(device)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    yield World(place, dist.get_rank(), size)
    dist.destroy_process_group()  # not after an error: the others may wait, torchrun ends them
