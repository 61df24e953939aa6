"""The per-pixel embedding head: a hypercolumn that is never built."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelEmbeddingHead(nn.Module):
    """Levels of a backbone -> (B, D, H/4, W/4) embeddings (not of unit length yet).

    The field's hypercolumn head upsamples every level to stride 4, concatenates and projects
    with a 1x1 convolution, then ReLU and a second 1x1 convolution. A 1x1 convolution commutes
    with bilinear upsampling (and average pooling), so the same function is had by projecting
    every level at its own resolution and summing the upsampled results, at a fraction of the
    time and memory. Levels of one stride are projected together. Each channel is batch-normalised
    first, so that no level drowns the others.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        embedding_dim: int = 16,
        hidden_dim: int = 128,
        stride: int = 4,
    ) -> None:
        """`channels` and `strides` describe the levels; `stride` is that of the result."""
        super().__init__()
        self.strides = list(strides)
        self.stride = stride
        self.embedding_dim = embedding_dim
        self.hidden_dim = hidden_dim
        grouped: dict[int, int] = {}
        for channel, own in zip(channels, strides, strict=True):
            coarse = max(own, stride)
            grouped[coarse] = grouped.get(coarse, 0) + channel
        self.projections = nn.ModuleDict(
            {
                str(coarse): nn.Sequential(
                    nn.BatchNorm2d(c), nn.Conv2d(c, hidden_dim, 1, bias=False)
                )
                for coarse, c in grouped.items()
            }
        )
        self.output = nn.Sequential(
            nn.BatchNorm2d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden_dim, embedding_dim, 1),
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """List of (B, C_i, H/s_i, W/s_i) -> (B, D, H/4, W/4)."""
        return self.combine(self.project(maps))

    def project(self, maps: Sequence[Tensor]) -> dict[int, Tensor]:
        """List of (B, C_i, H/s_i, W/s_i) -> stride -> (B, M, H/stride, W/stride)."""
        # Down before normalisation and projection, up after: they meet as few pixels as can be.
        grouped: dict[int, list[Tensor]] = {}
        for level, own in zip(maps, self.strides, strict=True):
            coarse = max(own, self.stride)
            grouped.setdefault(coarse, []).append(to_stride(level, own, coarse))
        return {
            coarse: self.projections[str(coarse)](torch.cat(levels, 1))
            for coarse, levels in grouped.items()
        }

    def combine(self, projected: dict[int, Tensor]) -> Tensor:
        """What `project` gives -> (B, D, H/4, W/4)."""
        total, *others = (to_stride(x, coarse, self.stride) for coarse, x in projected.items())
        for other in others:
            total += other  # in place: nothing in front needs its own result for the gradient
        embedding: Tensor = self.output(total)
        return embedding


def to_stride(level: Tensor, stride: int, target: int) -> Tensor:
    """Bring a (B, C, H/stride, W/stride) map to the target stride: average down, bilinear up."""
    if stride == target:
        return level
    if stride < target:
        return F.avg_pool2d(level, target // stride)
    size = [(side * stride + target - 1) // target for side in level.shape[-2:]]
    return F.interpolate(level, size, mode="bilinear", align_corners=False)
