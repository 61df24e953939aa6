"""Training pairs: a stored (frame, flow) -> an augmented crop and its flow on the embedding grid.

The frame and its flow share one geometry. A flow field is not an image: resizing scales its
vectors, a horizontal flip negates u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_flow.flow import FlowStore


@dataclass(frozen=True)
class Geometry:
    """A crop of the source (pixels), the square side it is resized to, and a horizontal flip."""

    top: int
    left: int
    height: int
    width: int
    side: int
    flip: bool


class Pair(NamedTuple):
    """One training example, all on the crop's own pixel scale."""

    image: Tensor
    """(side, side, 3) uint8 RGB."""
    flow: Tensor
    """(2, side/4, side/4) float32, in pixels of the crop (not of the grid), x right, y down."""
    weight: Tensor
    """(side/4, side/4) float32 in 0..1; 0 = flow unknown there, leave the pixel out."""


def sample_geometry(
    rng: np.random.Generator, height: int, width: int, side: int, min_scale: float
) -> Geometry:
    """Draw a crop of `min_scale`..1 of the largest square's area, aspect ratio 3/4..4/3."""
    area = rng.uniform(min_scale, 1.0) * min(height, width) ** 2
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    crop_width = min(width, max(8, round(float(np.sqrt(area * aspect)))))
    crop_height = min(height, max(8, round(float(np.sqrt(area / aspect)))))
    return Geometry(
        top=int(rng.integers(0, height - crop_height + 1)),
        left=int(rng.integers(0, width - crop_width + 1)),
        height=crop_height,
        width=crop_width,
        side=side,
        flip=bool(rng.integers(0, 2)),
    )


def transform_frame(frame: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Apply the geometry to a (H, W, 3) uint8 frame -> (side, side, 3) uint8."""
    g = geometry
    crop = frame[g.top : g.top + g.height, g.left : g.left + g.width]
    shrinks = g.side < min(g.height, g.width)
    resized = cv2.resize(
        crop, (g.side, g.side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return np.ascontiguousarray(resized[:, ::-1] if g.flip else resized)


def transform_flow(
    flow: np.ndarray, valid: np.ndarray, geometry: Geometry, stride: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Apply the geometry to a flow field and average it over the cells of the embedding grid.

    Args:
        flow: (H, W, 2) float32, pixels of the source, x right, y down.
        valid: (H, W) bool, where the flow can be trusted.
        geometry: the crop, as applied to the frame.
        stride: pixels of the crop per grid cell; 1 gives flow for each pixel.

    Returns:
        (side/stride, side/stride, 2) float32 flow in pixels of the crop, the mean over the
        trusted pixels of each cell, and (side/stride, side/stride) float32 weight: the trusted
        share of the cell, 0 where it is below one half.
    """
    g = geometry
    window = np.s_[g.top : g.top + g.height, g.left : g.left + g.width]
    weight = valid[window].astype(np.float32)
    scale = np.array([g.side / g.width, g.side / g.height], np.float32)
    planes = np.dstack([np.where(valid[window][..., None], flow[window], 0) * scale, weight])
    cells = g.side // stride
    shrinks = cells <= min(g.height, g.width)
    grid = cv2.resize(
        planes, (cells, cells), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    if g.flip:
        grid = grid[:, ::-1] * np.array([-1, 1, 1], np.float32)
    share = grid[..., 2]
    vectors = grid[..., :2] / np.maximum(share, 1e-6)[..., None]
    return np.ascontiguousarray(vectors), np.where(share >= 0.5, share, 0).astype(np.float32)


def jitter_color(frame: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Change brightness, contrast, saturation and hue of a (H, W, 3) uint8 frame at random.

    The frame only: flow does not depend on colour. One pass, as a 3x3 colour matrix with offset.
    """
    if strength == 0:
        return frame
    brightness, contrast, saturation = 1 + strength * rng.uniform(-1, 1, 3)
    if rng.uniform() < 0.2 * min(1.0, strength / 0.4):
        saturation = 0.0
    luma = np.array([0.299, 0.587, 0.114])
    angle = 0.25 * np.pi * strength * rng.uniform(-1, 1)
    # Rotation about the grey axis (Rodrigues) turns the hue and keeps grey grey.
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    hue = np.eye(3) * np.cos(angle) + np.sin(angle) * cross + (1 - np.cos(angle)) / 3
    matrix = (saturation * np.eye(3) + (1 - saturation) * luma[None, :]) @ hue
    matrix = brightness * contrast * matrix
    offset = brightness * (1 - contrast) * float(frame.mean())
    return cv2.transform(frame, np.hstack([matrix, np.full((3, 1), offset)]))


class FlowPairs(Dataset[Pair]):
    """A reproducible order of augmented pairs of a store, every video equally often.

    Each round visits every video once, in a new order, and takes from it the next pair of a
    permutation of its own: one long video does not drown the others. Example `k` depends on
    (seed, k) alone, so neither the number of workers nor a restart in the middle changes what is
    seen.
    """

    def __init__(
        self,
        store: FlowStore,
        length: int,
        side: int = 128,
        min_scale: float = 0.3,
        color_jitter: float = 0.4,
        seed: int = 0,
    ) -> None:
        """`length` = examples in the whole run; `side`, `min_scale`: see `sample_geometry`."""
        if len(store) == 0:
            raise ValueError("the flow store holds no pairs")
        self.store, self.length, self.side = store, length, side
        self.min_scale, self.color_jitter, self.seed = min_scale, color_jitter, seed
        numbers = store.source_numbers
        self._videos = [np.flatnonzero(numbers == n) for n in np.unique(numbers)]

    def __len__(self) -> int:
        """Examples in the whole run."""
        return self.length

    def __getitem__(self, k: int) -> Pair:
        """The `k`-th example of the run."""
        sample = self.store[self.pair_index(k)]
        rng = np.random.default_rng((self.seed, 2, k))
        height, width = sample.frame.shape[:2]
        geometry = sample_geometry(rng, height, width, self.side, self.min_scale)
        frame = jitter_color(transform_frame(sample.frame, geometry), rng, self.color_jitter)
        flow, weight = transform_flow(sample.flow, sample.valid, geometry)
        return Pair(
            torch.from_numpy(frame),
            torch.from_numpy(flow).permute(2, 0, 1).contiguous(),
            torch.from_numpy(weight),
        )

    def pair_index(self, k: int) -> int:
        """Which pair of the store example `k` is made of."""
        turn, position = divmod(k, len(self._videos))
        number = np.random.default_rng((self.seed, 0, turn)).permutation(len(self._videos))[
            position
        ]
        pairs = self._videos[number]
        again, place = divmod(turn, len(pairs))
        order = np.random.default_rng((self.seed, 1, int(number), again)).permutation(len(pairs))
        return int(pairs[order[place]])


def normalize_flow(flow: Tensor, weight: Tensor, mode: str = "standardize") -> Tensor:
    """Bring each image's flow to a common scale, so that one `flow_sigma` serves all.

    Args:
        flow: (B, 2, H, W), pixels, x right, y down.
        weight: (B, H, W), 0 = ignore.
        mode: `standardize` = subtract the weighted mean motion and divide by the root mean
            square deviation per component, at least 0.25 px so that the noise of a still image is
            not blown up; `log` = sign(f) min(1, log(1 + |f|) / log 51), as re-implementations
            of arXiv 1807.05636 do; `none` = pixels.

    Returns:
        (B, 2, H, W) float32.

    Raises:
        ValueError: unknown mode.
    """
    flow = flow.float()
    if mode == "none":
        return flow
    if mode == "log":
        return flow.sign() * (flow.abs().log1p() / math.log(51)).clamp(max=1)
    if mode != "standardize":
        raise ValueError(f"unknown flow normalisation {mode!r}; known: standardize, log, none")
    w = weight.unsqueeze(1).float()
    flow = torch.where(w > 0, flow, 0.0)
    total = w.sum(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    centred = flow - (w * flow).sum(dim=(2, 3), keepdim=True) / total
    variance = (w * centred.square()).sum(dim=(1, 2, 3), keepdim=True) / (2 * total)
    return centred / variance.sqrt().clamp(min=0.25)
