"""Geometry and colour of a batch, on the device that trains: windows of frames -> training pairs.

A frame and its flow share one geometry, drawn by `ssl_flow.data.pairs`. A flow field is not an
image: resizing scales its vectors, a horizontal flip negates u.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Windows(NamedTuple):
    """Parts cut out of frames and their flows, each (h, w) in the upper left of (H, W)."""

    frame: Tensor  # (B, H, W, 3) uint8 RGB
    flow: Tensor  # (B, H, W, 2) float16, pixels of the source, x right, y down; NaN = not trusted
    size: Tensor  # (B, 2) float32: h, w
    flip: Tensor  # (B,) bool: to be mirrored horizontally
    color: Tensor  # (B, 3, 4) float32: matrix of the colours; what to add of the mean grey value

    def to(self, device: torch.device) -> Windows:
        """Copy to a device, without waiting where the memory is pinned."""
        return Windows(*(tensor.to(device, non_blocking=True) for tensor in self))


class Pair(NamedTuple):
    """A batch to train on, all on the crop's own pixel scale."""

    image: Tensor  # (B, H, W, 3) uint8 RGB
    flow: Tensor  # (B, 2, H/4, W/4) float32, pixels of the crop (not of the grid), x right, y down
    weight: Tensor  # (B, H/4, W/4) float32 in 0..1; 0 = flow unknown there


@torch.no_grad()
def augment(windows: Windows, shape: tuple[int, int], stride: int = 4) -> Pair:
    """Resize windows to `shape`, mirror them, change their colours.

    Args:
        windows: what `ssl_flow.data.pairs.collate` made.
        shape: (H, W) of the crop, in pixels; may differ from one batch to the next.
        stride: pixels of the crop per cell of the embedding grid; 1 gives flow for each pixel.

    Returns:
        The frame, and the flow averaged over the trusted pixels of each cell; the weight is the
        trusted share of the cell, 0 where it is below one half.
    """
    sizes, flip = windows.size, windows.flip
    frame = resize(_planes(windows.frame), sizes, flip, shape)
    matrix, offset = windows.color.split([3, 1], dim=2)
    mean = frame.mean(dim=(1, 2, 3))[:, None, None]
    image = torch.baddbmm(offset * mean, matrix, frame.flatten(2)).view_as(frame)
    image = image.round_().clamp_(0, 255).to(torch.uint8)

    flow = F.pad(_planes(windows.flow), (0, 0, 0, 0, 0, 1))
    flow[:, 2] = flow[:, 0] == flow[:, 0]  # where it is not NaN
    grid = resize(flow.nan_to_num_(0.0), sizes, flip, (shape[0] // stride, shape[1] // stride))
    share = grid[:, 2]
    factor = torch.stack([shape[1] / sizes[:, 1], shape[0] / sizes[:, 0]], 1)  # of u and v
    factor[:, 0] *= torch.where(flip, -1, 1)
    vectors = grid[:, :2] * (factor[..., None, None] / share.clamp(min=1e-6)[:, None])
    return Pair(image.permute(0, 2, 3, 1), vectors, torch.where(share >= 0.5, share, 0))


def _planes(images: Tensor) -> Tensor:
    """(B, H, W, C) of any type -> (B, C, H, W) float32."""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def resize(images: Tensor, size: Tensor, flip: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize windows of any sizes at once: (B, C, H, W) float32 -> (B, C, *shape).

    An axis that shrinks is averaged over the area of each new pixel, one that grows is interpolated
    linearly. Both are short weighted sums, of rows and then of columns: bags of embeddings, which
    PyTorch sums for the whole batch at once on any device.

    Args:
        images: window i fills [:, :h, :w]; what lies beyond must be finite and is ignored.
        size: (B, 2) float32: h, w.
        flip: (B,) bool: mirror horizontally.
        shape: of the result.
    """
    tall = _sums(images, size[:, 0], torch.zeros_like(flip), shape[0])
    return _sums(tall.mT, size[:, 1], flip, shape[1]).mT


def _sums(lines: Tensor, length: Tensor, flip: Tensor, cells: int) -> Tensor:
    """(B, C, L, M), of which the first `length` (B,) lines count -> (B, C, cells, M)."""
    batch, channels, padded, _ = lines.shape
    length, device = length[:, None], lines.device
    scale = length / cells
    start = scale * torch.arange(cells, device=device)
    centre = torch.minimum((start + (scale - 1) / 2).clamp(min=0), length - 1)
    first = torch.where(scale > 1, start, centre).floor()
    taps = first[..., None] + torch.arange(math.ceil(padded / cells) + 1, device=device)
    start, centre, scale = start[..., None], centre[..., None], scale[..., None]
    overlap = torch.minimum(taps + 1, start + scale) - torch.maximum(taps, start)
    weight = torch.where(scale > 1, overlap / scale, 1 - (taps - centre).abs()).clamp_(min=0)
    mirrored = flip[:, None, None]
    taps, weight = (torch.where(mirrored, t.flip(1), t) for t in (taps, weight))
    plane = torch.arange(batch * channels, device=device).view(batch, channels, 1, 1)
    index = plane * padded + taps.long().clamp_(max=padded - 1)[:, None]
    weight = weight[:, None].expand_as(index)
    summed = F.embedding_bag(
        index.flatten(0, 2),
        lines.reshape(batch * channels * padded, -1),
        mode="sum",
        per_sample_weights=weight.flatten(0, 2),
    )
    return summed.view(batch, channels, cells, -1)


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
