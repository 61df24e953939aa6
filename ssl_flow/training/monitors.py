"""What a run shows while it learns: numbers in metrics.jsonl and TensorBoard, and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from ssl_flow.data.augment import Pair
from ssl_flow.evaluation.pictures import pca_rgb
from ssl_flow.flow import flow_to_rgb
from ssl_flow.flow.shard import write_atomically
from ssl_flow.models import Encoder


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
        """One line: `values` must hold `step`."""
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        for name, value in values.items():
            if name != "step":
                self._board.add_scalar(name, value, int(values["step"]))

    def picture(self, step: int, sheet: np.ndarray, folder: Path) -> None:
        """Show a (H, W, 3) uint8 picture in TensorBoard, and keep it as `training.png`."""
        self._board.add_image("frame, flow, embedding", sheet, step, dataformats="HWC")
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


def effective_rank(embedding: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli, EUSIPCO 2007).

    `embedding`: (B, D, H, W). Between 1 (collapsed to a line) and D, over all pixels of the batch.
    """
    pixels = torch.nn.functional.normalize(embedding.detach().float(), dim=1)
    pixels = pixels.permute(0, 2, 3, 1).reshape(-1, embedding.shape[1])  # (N, D)
    pixels = pixels - pixels.mean(0)
    spectrum = torch.linalg.eigvalsh(pixels.T @ pixels).clamp(min=0).sqrt()
    share = spectrum / spectrum.sum().clamp(min=1e-12)
    return float(torch.exp(-torch.xlogy(share, share).sum()))


@torch.no_grad()
def embedding_sheet(encoder: Encoder, pair: Pair, tile: int = 128) -> np.ndarray:
    """Rows of frame, flow (colour wheel), embedding (PCA-RGB) for a batch: (3 tile, B tile, 3)."""
    was_training = encoder.training
    encoder.eval()
    embedding = encoder.embed(encoder.normalize(pair.image))
    encoder.train(was_training)
    frames = pair.image.cpu().numpy()
    flows = (pair.flow * (pair.weight > 0).unsqueeze(1)).permute(0, 2, 3, 1).cpu().numpy()
    wheels = [flow_to_rgb(flow) for flow in flows]
    rows: list[Iterable[np.ndarray]] = [frames, wheels, pca_rgb(embedding)]
    return np.vstack([np.hstack([_resize(image, tile) for image in row]) for row in rows])


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_NEAREST)
