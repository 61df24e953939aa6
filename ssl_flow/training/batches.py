"""The batches of a run: which examples, at which size, for which process."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ssl_flow.config import Config
from ssl_flow.training.distributed import World
from ssl_flow.training.safety import ignore_stop_signals


class Share(Sampler[list[int]]):
    """The examples that one process takes of every global batch, from `first_step` on."""

    def __init__(self, config: Config, world: World, first_step: int) -> None:
        """The batch size must be a multiple of the number of processes."""
        self.steps = range(first_step, config.train.steps)
        self.batch, self.world = config.train.batch_size, world

    def __len__(self) -> int:
        """Steps that are left."""
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        """The numbers of a step's examples."""
        share = self.batch // self.world.size
        for step in self.steps:
            start = step * self.batch + self.world.rank * share
            yield list(range(start, start + share))


def make_loader(
    config: Config,
    examples: Dataset[Any],
    collate: Callable[[list[Any]], Any],
    world: World,
    first_step: int,
) -> DataLoader[Any]:
    """Batches of this process, the same whatever the number of workers or restarts."""
    workers = config.data.workers
    return DataLoader(
        examples,
        batch_sampler=Share(config, world, first_step),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        multiprocessing_context=_start_method() if workers else None,
        worker_init_fn=_prepare_reader if workers else None,
        generator=torch.Generator(),  # the global one must not be drawn from at every start
    )


@contextmanager
def reading(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """Iterate over a loader and end its processes, whatever happens.

    They ignore the signal with which Python would end them at its exit, to wait for them forever.
    """
    batches: Any = iter(loader)
    try:
        yield batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()


def crop_side(config: Config, step: int) -> int:
    """Side of the crops of step 0, 1, ... in pixels: a multiple of 32 that grows to `data.crop`.

    Progressive resizing (Howard 2018; Tan & Le, EfficientNetV2, arXiv 2104.00298, section 4):
    equally long stages, the last one is the final third of the run.
    """
    start, last = config.data.start_crop or config.data.crop, config.data.crop
    stages = (last - start) // 32  # below the full side
    done = step / (2 / 3 * config.train.steps)
    return min(last, start + 32 * int(done * stages))


def _prepare_reader(_: int) -> None:
    ignore_stop_signals()
    if parent := multiprocessing.parent_process():
        # PyTorch watches its parent's number, which is the fork server's: that outlives `kill -9`.
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    cv2.setNumThreads(1)  # the processes share the cores already


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _start_method() -> str:
    """Not fork, which may hang beside running threads; Windows has spawn alone."""
    methods = multiprocessing.get_all_start_methods()
    return "forkserver" if "forkserver" in methods else "spawn"
