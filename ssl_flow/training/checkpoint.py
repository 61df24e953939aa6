"""Checkpoints to resume from: one file, replaced atomically, loaded without running its code."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn


def save_checkpoint(
    run: Path, step: int, state: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write `RUN/checkpoints/last.pt`: weights, optimizer, random state, steps done."""
    folder = run / "checkpoints"
    folder.mkdir(exist_ok=True)
    temporary = folder / f".last.pt.{os.getpid()}"
    content = {
        "step": step,
        "state": state.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "last.pt")


def load_checkpoint(run: Path, state: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save_checkpoint` wrote; the steps done, 0 when there is no checkpoint yet."""
    path = run / "checkpoints" / "last.pt"
    if not path.is_file():
        return 0
    device = next(state.parameters()).device
    content = torch.load(path, map_location=device, weights_only=True)
    state.load_state_dict(content["state"])
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["random"].cpu())
    if content["cuda_random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in content["cuda_random"]])
    return int(content["step"])
