"""Checkpoints to resume from: written atomically, the last ones and the best kept, loaded as data.

`RUN/checkpoints/step-00000200.pt` holds the state of everything that a step changes. Random
numbers need no state: a step's come from (seed, step, process), its examples from (seed, number).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ssl_flow.models.weights import code_asked_for

KEPT = 2
"""How many of the newest checkpoints stay; the best one stays beside them as `best.pt`."""


@dataclass
class Progress:
    """Where a run is, beside its weights; part of the checkpoint."""

    step: int = 0
    """Steps done."""
    skipped: int = 0
    """Steps that changed nothing, since the loss or the gradient was not finite."""
    bad_in_a_row: int = 0
    collapsed_in_a_row: int = 0
    window: list[float] = field(default_factory=list)
    """What was logged since the last checkpoint of the quantity that decides which is the best."""
    best: float = -math.inf
    """Quality of `best.pt`: the higher, the better."""
    normalization: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """`mean` and `std` of the encoder's images, which start weights may have brought."""


def save_checkpoint(
    run: Path, progress: Progress, parts: Mapping[str, Any], judge: bool = True
) -> None:
    """Write a checkpoint, drop old ones; it becomes `best.pt` when its window is the best so far.

    Args:
        run: the run folder.
        progress: as it is after `progress.step` steps.
        parts: name -> what has `state_dict` and `load_state_dict`.
        judge: whether the window ends here; it is then emptied.
    """
    is_best = False
    if judge and progress.window:
        quality = sum(progress.window) / len(progress.window)
        is_best = quality > progress.best
        progress.window, progress.best = [], max(quality, progress.best)
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    for torn in folder.glob(".*.pt"):  # of a run that was killed while it wrote
        torn.unlink()
    content = {name: part.state_dict() for name, part in parts.items()}
    temporary, path = folder / ".writing.pt", folder / f"step-{progress.step:08d}.pt"
    with temporary.open("wb") as file:
        torch.save({"progress": asdict(progress), **content}, file)
        file.flush()
        os.fsync(file.fileno())
    if is_best:
        shutil.copyfile(temporary, folder / ".best.pt")
        (folder / ".best.pt").replace(folder / "best.pt")
    temporary.replace(path)
    for old in _newest_first(run)[KEPT:]:
        old.unlink()


def load_checkpoint(run: Path, parts: Mapping[str, Any]) -> Progress:
    """Restore the newest readable checkpoint; what cannot be read is named and passed over.

    Files are read as data (`weights_only`): a pickle that would run code is refused.

    Returns:
        The progress; of step 0 when the run has no checkpoint yet.

    Raises:
        ValueError: none of the checkpoints can be read, or one does not fit this configuration.
    """
    refused = []
    for path in _newest_first(run):
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            print(f"{reason}; going on from {path.name}", flush=True)
        try:
            for name, part in parts.items():
                if content[name]:  # a scaler that was off has no state
                    part.load_state_dict(content[name])
            return Progress(**content["progress"])
        except torch.OutOfMemoryError:
            raise
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not fit {run / 'config.yaml'}: {error}") from error
    if refused:
        raise ValueError("; ".join(refused))
    return Progress()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; ValueError when it is damaged or holds code."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        content["progress"]["step"]
    except MemoryError:
        raise
    except Exception as error:  # each kind of damage has its own
        if wish := code_asked_for(error):
            raise ValueError(
                f"{path} was not opened, since loading it could run code (it asks for {wish}): no "
                "checkpoint of a run does"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or no checkpoint ({reason})") from error
    return content


def has_checkpoint(run: Path) -> bool:
    """Whether there is anything to go on from."""
    return bool(_newest_first(run))


def _newest_first(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*.pt"), reverse=True)
