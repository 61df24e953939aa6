"""What a long run meets: no memory, a signal to stop, numbers that are not finite, a collapse."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from ssl_flow.config import Config

PATIENCE = 10
"""Non-finite steps in a row after which training stops."""
COLLAPSED_LOGS = 5
"""Collapsed embeddings in a row, one a log after the warm-up, after which training stops."""
_LEAST_RANK, _LEAST_STD = 1.2, 0.01


class CollapseError(RuntimeError):
    """The embedding has become the same everywhere, or a line."""


class MemoryAdvice(MemoryError):
    """Out of memory; the message says which knobs need less."""


class Interrupted(Exception):
    """A signal asked the run to stop; its checkpoint is saved."""

    def __init__(self, number: int, run: Path, step: int, steps: int) -> None:
        """`number` of the signal, `step` of `steps` done."""
        name = signal.Signals(number).name
        super().__init__(
            f"{name} at step {step} of {steps}: checkpoint saved; to go on: "
            f"ssl-flow train --resume {run}"
        )
        self.exit_status = 128 + number


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C only set `number`: the step at hand ends first.

    A second Ctrl-C acts at once. Outside the main thread nothing is caught.
    """

    def __init__(self) -> None:
        """Nothing has been caught yet."""
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            names = ("SIGTERM", "SIGUSR1", "SIGINT")  # Windows has no SIGUSR1
            for number in (getattr(signal, n) for n in names if hasattr(signal, n)):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Put the old handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])


def ignore_stop_signals() -> None:
    """For processes that read data: signals reach the whole group, the main process decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextmanager
def explain_out_of_memory(config: Config) -> Iterator[None]:
    """Turn every kind of "out of memory" into `MemoryAdvice`."""
    signs = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    try:
        yield
    except MemoryAdvice:
        raise
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(sign in str(error) for sign in signs):
            raise
        train = config.train
        probes = (
            "; in a linear probe: evaluation.every 0, or evaluation.data none and "
            "`ssl-flow eval linear-probe`"
        )
        parts = (
            f"a higher train.accumulate (now {train.accumulate} parts of a batch; the result is "
            "the same but for BatchNorm); "
        )
        raise MemoryAdvice(
            "out of memory. Less is needed with: "
            f"{'' if config.data.store.startswith('map:') else parts}a smaller train.batch_size "
            f"(now {train.batch_size}); a smaller data.crop (now {config.data.crop}); "
            f"train.checkpoint_activations true (now {str(train.checkpoint_activations).lower()}); "
            f"train.amp bfloat16 or float16 (now {train.amp})"
            f"{probes if config.evaluation.data != 'none' else ''}"
        ) from error


def save_bad_batch(run: Path, rank: int, batch: dict[str, Tensor], **facts: float) -> Path:
    """Keep a batch whose loss or gradient is not finite, to look at; its path.

    `torch.load(path)` gives image, flow, weight as the loss takes them, and the facts.
    """
    path = run / ("bad_batch.pt" if rank == 0 else f"bad_batch_{rank}.pt")
    tensors = {name: tensor.detach().cpu() for name, tensor in batch.items()}
    torch.save({**tensors, **facts}, path)
    return path


def check_collapse(values: dict[str, float], times: int, run: Path) -> int:
    """How often in a row the embedding has now been collapsed.

    Args:
        values: what was logged: `effective_rank`, `embedding_std`, `step`.
        times: how often in a row it was before.
        run: for the message.

    Raises:
        CollapseError: `COLLAPSED_LOGS` times.
    """
    rank, std = values["effective_rank"], values["embedding_std"]
    if rank >= _LEAST_RANK and std >= _LEAST_STD:
        return 0
    if times + 1 == COLLAPSED_LOGS:
        raise CollapseError(
            f"the embedding has collapsed: effective rank {rank:.2f} (below {_LEAST_RANK} it is a "
            f"line), standard deviation of the embeddings {std:.4f} (below {_LEAST_STD} they "
            f"are all the same), {COLLAPSED_LOGS} logs in a row up to step {values['step']}. Try "
            f"another loss.objective or loss.flow_sigma, a lower train.learning_rate, or look at "
            f"what is learned from in {run / 'pictures'}"
        )
    return times + 1
