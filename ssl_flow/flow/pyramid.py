"""What coarse-to-fine methods share: the scales of the images, and flow carried between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def check(first: Tensor, second: Tensor, scale_step: float, **counts: int) -> None:
    """Raise ValueError unless both are grey images (B, H, W) of one shape, the numbers usable."""
    if first.ndim != 3 or first.shape != second.shape:
        raise ValueError(
            f"expected two tensors (B, H, W), got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if not 0 < scale_step < 1 or min(counts.values()) < 1:
        found = ", ".join(f"{name} {value}" for name, value in counts.items())
        raise ValueError(
            "the step between scales must be above 0 and below 1 and numbers at least 1, "
            f"got a step of {scale_step}, {found}"
        )


def pyramid(images: Tensor, scale_step: float, scales: int, min_side: int) -> list[Tensor]:
    """Return `images` (N, C, H, W) and up to `scales` - 1 smaller copies, the finest first.

    Each is `scale_step` times as large as the one before; none but the finest is smaller than
    `min_side` pixels.
    """
    levels = [images]
    for level in range(1, scales):
        size = [round(side * scale_step**level) for side in images.shape[2:]]
        if min(size) < min_side:
            break
        # Antialiased: a low-pass filter and the sampling in one.
        levels.append(F.interpolate(levels[-1], size, mode="bicubic", antialias=True))
    return levels


def resized(flow: Tensor, size: torch.Size) -> Tensor:
    """Return `flow` (B, 2, h, w) for a picture of another size (H, W): vectors scale with it."""
    height, width = flow.shape[2:]
    if (height, width) == tuple(size):
        return flow
    flow = F.interpolate(flow, tuple(size), mode="bilinear", antialias=size[0] < height)
    return flow * flow.new_tensor([size[1] / width, size[0] / height])[:, None, None]


class Places:
    """Where `grid_sample` finds each pixel of a picture shaped as `like` after it has moved."""

    def __init__(self, like: Tensor) -> None:
        """Make it for the height, width and device of `like` (..., H, W)."""
        height, width = like.shape[-2:]
        # x and y run from -1 to 1 over the area of the picture, edge to edge.
        self.pixel = like.new_tensor([2 / width, 2 / height])
        x = (torch.arange(width, device=like.device) + 0.5) * self.pixel[0] - 1
        y = (torch.arange(height, device=like.device) + 0.5) * self.pixel[1] - 1
        self.still = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (H, W, 2)

    def after(self, flow: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places (B, H, W, 2) after `flow` (B, 2, H, W), and which are inside.

        The latter is (B, 1, H, W) bool.
        """
        grid = torch.addcmul(self.still, flow.permute(0, 2, 3, 1), self.pixel)
        return grid, (grid.abs() <= 1).all(-1)[:, None]


def sample(images: Tensor, grid: Tensor, mode: str) -> Tensor:
    """Read `images` (B, C, H, W) at `grid` (B, H, W, 2); outside, at the nearest edge."""
    return F.grid_sample(images, grid, mode, "border", align_corners=False)
