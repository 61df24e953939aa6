"""Training examples in a reproducible order: a stored (frame, flow) -> a window of random geometry.

This is done in the loader's processes; `ssl_flow.data.augment` does the rest, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_flow.data.augment import Windows
from ssl_flow.flow import FlowStore
from ssl_flow.flow.store import Sample


class Geometry(NamedTuple):
    """A window of the source, in pixels, and a horizontal flip."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class Window(NamedTuple):
    """One example, not yet resized: see `Windows`."""

    frame: Tensor  # (h, w, 3) uint8 RGB
    flow: Tensor  # (h, w, 2) float16, pixels, x right, y down; NaN = not to be trusted
    flip: bool
    color: np.ndarray  # (3, 4), see `sample_color`


def sample_geometry(
    rng: np.random.Generator, height: int, width: int, min_scale: float, aspect: float = 1.0
) -> Geometry:
    """Draw a window: `min_scale`..1 of the largest area with this width / height, x 3/4..4/3."""
    area = rng.uniform(min_scale, 1.0) * min(height, width / aspect) ** 2 * aspect
    aspect *= np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    window_width = min(width, max(8, round(float(np.sqrt(area * aspect)))))
    window_height = min(height, max(8, round(float(np.sqrt(area / aspect)))))
    return Geometry(
        top=int(rng.integers(0, height - window_height + 1)),
        left=int(rng.integers(0, width - window_width + 1)),
        height=window_height,
        width=window_width,
        flip=bool(rng.integers(0, 2)),
    )


def sample_color(rng: np.random.Generator, strength: float) -> np.ndarray:
    """Draw a change of brightness, contrast, saturation and hue, of the frame only.

    Returns:
        (3, 4): a matrix for RGB, and in the last column what part of the frame's mean to add.
    """
    if strength == 0:
        return np.eye(3, 4)
    brightness, contrast, saturation = 1 + strength * rng.uniform(-1, 1, 3)
    if rng.uniform() < 0.2 * min(1.0, strength / 0.4):
        saturation = 0.0
    luma = np.array([0.299, 0.587, 0.114])
    angle = 0.25 * np.pi * strength * rng.uniform(-1, 1)
    # Rotation about the grey axis (Rodrigues) turns the hue and keeps grey grey.
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    hue = np.eye(3) * np.cos(angle) + np.sin(angle) * cross + (1 - np.cos(angle)) / 3
    matrix = (saturation * np.eye(3) + (1 - saturation) * luma[None, :]) @ hue
    return np.hstack([brightness * contrast * matrix, np.full((3, 1), brightness * (1 - contrast))])


def cut(sample: Sample, geometry: Geometry, color: np.ndarray) -> Window:
    """Cut a window out of a stored pair; `color`: see `sample_color`."""
    top, left, height, width, flip = geometry
    window = np.s_[top : top + height, left : left + width]
    flow = torch.from_numpy(sample.flow[window]).half()
    flow[~torch.from_numpy(sample.valid[window])] = torch.nan
    return Window(torch.from_numpy(sample.frame[window]), flow, flip, color)


class FlowPairs(Dataset[Window]):
    """A reproducible order of windows of a store's pairs, every video equally often.

    Each round visits every video once, in a new order, and takes from it the next pair of a
    permutation of its own: one long video does not drown the others. Example `k` depends on
    (seed, k) alone, so neither the number of workers nor a restart in the middle changes what is
    seen; nor does the side to which `augment` brings it.
    """

    def __init__(
        self,
        store: FlowStore,
        length: int,
        min_scale: float = 0.3,
        color_jitter: float = 0.4,
        seed: int = 0,
    ) -> None:
        """`length` = examples in the whole run; `min_scale`: see `sample_geometry`."""
        if len(store) == 0:
            raise ValueError("the flow store holds no pairs")
        self.store, self.length = store, length
        self.min_scale, self.color_jitter, self.seed = min_scale, color_jitter, seed
        numbers = store.source_numbers
        self._pairs = np.argsort(numbers, kind="stable")  # video after video
        _, first = np.unique(numbers[self._pairs], return_index=True)
        self._bounds = np.append(first, len(numbers))
        self._round: tuple[int, np.ndarray] = (-1, first)  # the last one's order of videos

    def __len__(self) -> int:
        """`length`."""
        return self.length

    def __getitem__(self, k: int) -> Window:
        """The `k`-th example of the run."""
        sample = self.store[self.pair_index(k)]
        rng = np.random.default_rng((self.seed, 2, k))
        height, width = sample.valid.shape
        geometry = sample_geometry(rng, height, width, self.min_scale)
        return cut(sample, geometry, sample_color(rng, self.color_jitter))

    def pair_index(self, k: int) -> int:
        """Which pair of the store example `k` is made of."""
        turn, position = divmod(k, len(self._bounds) - 1)
        if self._round[0] != turn:  # of a million videos a permutation takes its time
            rng = np.random.default_rng((self.seed, 0, turn))
            self._round = turn, rng.permutation(len(self._bounds) - 1)
        number = int(self._round[1][position])
        pairs = self._pairs[self._bounds[number] : self._bounds[number + 1]]
        again, place = divmod(turn, len(pairs))
        order = np.random.default_rng((self.seed, 1, number, again)).permutation(len(pairs))
        return int(pairs[order[place]])


def collate(windows: Sequence[Window]) -> Windows:
    """Make a batch: windows of different sizes are padded with zeros, right and bottom."""
    sizes = [window.frame.shape[:2] for window in windows]
    shape = (len(windows), max(h for h, _ in sizes), max(w for _, w in sizes))
    frame = torch.zeros((*shape, 3), dtype=torch.uint8)
    flow = torch.zeros((*shape, 2), dtype=torch.float16)
    for i, ((height, width), window) in enumerate(zip(sizes, windows, strict=True)):
        frame[i, :height, :width] = window.frame
        flow[i, :height, :width] = window.flow
    return Windows(
        frame,
        flow,
        torch.tensor(sizes, dtype=torch.float32),
        torch.tensor([window.flip for window in windows]),
        torch.from_numpy(np.stack([window.color for window in windows])).float(),
    )
