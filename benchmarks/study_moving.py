"""Which pixels move against the camera, for two ideas of benchmarks/study.py that did not help.

The dominant motion is an affine map of the pixel's place, found by reweighted least squares; what
departs from it by far more than the median pixel moves by itself, and what is in between is left
out. As a target this is that of Pathak et al., "Learning features by watching objects move" (CVPR
2017), from one flow instead of a segmented track; pasting is that of Ghiasi et al. (CVPR 2021).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_flow.data.augment import Pair
from ssl_flow.flow.store import Sample

LOW, HIGH, FLOOR = 2.5, 5.0, 0.5  # of the median residual, of the median residual, pixels


def moving(sample: Sample) -> Sample:
    """The sample with a flow of (0, 1) where a pixel moves by itself, (0, -1) where it does not.

    Not valid where that is unclear, and nowhere if half of the frame seems to move.
    """
    height, width = sample.valid.shape
    every = np.s_[4::8, 4::8]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    place = np.stack([np.ones_like(x), x / width - 0.5, y / height - 0.5], -1)
    known = sample.valid[every]
    a, flow = place[every][known], sample.flow[every][known].astype(np.float64)
    if len(a) < 50:
        return Sample(sample.frame, 0 * sample.flow, np.zeros_like(known), sample.meta)
    size = np.linalg.norm(flow - np.median(flow, 0), axis=1)
    for _ in range(8):
        weight = 1 / (1 + (size / max(1.5 * np.median(size), 0.1)) ** 2) ** 2
        ata = (a.T * weight) @ a + 1e-6 * np.eye(3)
        affine = np.linalg.solve(ata, (a.T * weight) @ flow)
        size = np.linalg.norm(flow - a @ affine, axis=1)
    noise = np.median(size)
    rest = np.linalg.norm(sample.flow - place @ affine.astype(np.float32), axis=-1)
    moves, rests = rest > max(HIGH * noise, FLOOR), rest < max(LOW * noise, FLOOR / 2)
    clear = sample.valid & (moves | rests)
    if (moves & sample.valid).sum() >= 0.5 * sample.valid.sum():
        clear = np.zeros_like(clear)
    sign = np.where(moves, 1, -1).astype(np.float32)
    return Sample(sample.frame, np.stack([0 * sign, sign], -1), clear, sample.meta)


@torch.no_grad()
def moving_crop(flow: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of crops: (B, 2, h, w) and (B, h, w) -> moves and clear (B, h, w), affine motion."""
    batch, _, height, width = flow.shape
    lines = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    y, x = torch.meshgrid(*lines, indexing="ij")
    a = torch.stack([torch.ones(height * width), x.flatten(), y.flatten()], 1)
    known = weight.flatten(1) > 0
    hidden = torch.where(known, 0.0, torch.nan)
    rows = torch.where(known[..., None], flow.flatten(2).mT, 0.0)

    def median(values: Tensor) -> Tensor:
        return (values + hidden).nanmedian(1, keepdim=True).values.nan_to_num()

    middle = torch.stack([median(rows[..., 0]), median(rows[..., 1])], -1)
    size = (rows - middle).norm(dim=-1)
    for _ in range(8):
        share = known / (1 + (size / (1.5 * median(size)).clamp(min=0.1)) ** 2) ** 2
        weighted = (a * share[..., None]).mT
        affine = a @ torch.linalg.solve(weighted @ a + 1e-4 * torch.eye(3), weighted @ rows)
        size = (rows - affine).norm(dim=-1)
    noise = median(size)
    moves, rests = size > (HIGH * noise).clamp(min=FLOOR), size < (LOW * noise).clamp(min=FLOOR / 2)
    grid = (batch, height, width)
    clear = (known & (moves | rests)).view(grid)
    return (moves & known).view(grid), clear, affine.mT.unflatten(2, (height, width))


@torch.no_grad()
def paste(pair: Pair, share: float) -> Pair:
    """Put the moving pixels of another image, with their motion, over a `share` of the batch."""
    moves, _, affine = moving_crop(pair.flow, pair.weight)
    order, flip = torch.randperm(len(moves)), torch.rand(len(moves)) < 0.5
    taken = (torch.rand(len(moves)) < share) & (order != torch.arange(len(moves)))

    def other(maps: Tensor, axis: int) -> Tensor:
        mirrored = flip.view(-1, *[1] * (maps.ndim - 1))
        return torch.where(mirrored, maps[order].flip(axis), maps[order])

    mask = other(moves, 2) & taken[:, None, None]
    motion = other(pair.flow - affine, 3)
    motion[:, 0] = torch.where(flip[:, None, None], -motion[:, 0], motion[:, 0])
    flow = torch.where(mask[:, None], affine + motion, pair.flow)
    weight = torch.where(mask, other(pair.weight, 2), pair.weight)
    soft = F.interpolate(mask[:, None].float(), scale_factor=4, mode="bilinear")[:, 0, ..., None]
    image = soft * other(pair.image, 2) + (1 - soft) * pair.image
    return Pair(image.round().to(torch.uint8), flow, weight)
