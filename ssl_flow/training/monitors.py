"""What a run shows while it learns: numbers in metrics.jsonl and TensorBoard, and pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from ssl_flow.flow.shard import write_atomically


class Metrics:
    """Writes every number to `metrics.jsonl` and to TensorBoard."""

    def __init__(self, run: Path, first_step: int = 0) -> None:
        """Opens the files of a run; when resuming, drops lines past the checkpoint's step."""
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= first_step]
            write_atomically(self._path, "".join(line + "\n" for line in kept).encode())
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def write(self, values: dict[str, float]) -> None:
        """One line: `values` must hold `step`. JSON has no word for what is not finite: null."""
        line = {name: v if math.isfinite(v) else None for name, v in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            if name != "step":
                self._board.add_scalar(name, value, int(values["step"]))

    def picture(self, step: int, sheet: np.ndarray, folder: Path) -> None:
        """Show a (H, W, 3) uint8 picture in TensorBoard, and keep it as `training.png`."""
        self._board.add_image("training", sheet, step, dataformats="HWC")
        folder.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / "training.png"), sheet[..., ::-1])

    def close(self) -> None:
        """Flush TensorBoard."""
        self._board.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a torn last line of a killed run


@torch.no_grad()
def embedding_std(points: Tensor) -> float:
    """How far embeddings (N, D) lie from their mean, root mean square.

    Of unit ones 0 (all the same) to 1 (all directions alike).
    """
    return float(points.float().var(0, unbiased=False).sum().sqrt())
