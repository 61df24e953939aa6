"""Features that nobody learned: the floor of a table of encoders."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_flow.models.encoder import Encoder, Normalization

_BINS = 9  # of unsigned orientation, 20 degrees each
_CLIP = 0.2


class HandmadeEncoder(Encoder):
    """Colour, position and oriented gradients in cells of 4, 8 and 16 pixels; no weights.

    Channels of a level: mean RGB in 0..1 (3), mean CIE L*a*b* / 100 (3), column and row of the
    cell's centre from -1 to 1 over the image (2), histograms of oriented gradients (36).
    """

    def __init__(self) -> None:
        """There is nothing to choose."""
        nn.Module.__init__(self)
        self.architecture, self.model_args, self.head = "handmade", {}, None
        self.strides, self.channels = [4, 8, 16], [8 + 4 * _BINS] * 3
        self.normalization = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.input_size = (224, 224)
        # Linear sRGB -> XYZ, divided by the white point D65 (IEC 61966-2-1).
        xyz = torch.tensor([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169],
                            [0.019334, 0.119193, 0.950227]])  # fmt: skip
        self.register_buffer("xyz", xyz / xyz.sum(1, keepdim=True), persistent=False)

    def _padded_features(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        pad = (0, -width % 16, 0, -height % 16)
        padded = F.pad(images.float(), pad, mode="replicate")
        pixels = torch.cat([padded, self._lab(padded)], dim=1)
        votes = orientation_votes(padded)
        levels = []
        for stride in self.strides:
            colour = F.avg_pool2d(pixels, stride)  # (B, 6, h, w)
            rows, columns = (
                (torch.arange(cells, device=images.device) + 0.5) * (2 * stride / side) - 1
                for cells, side in zip(colour.shape[2:], (height, width), strict=True)
            )
            position = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
            position = position.expand(len(images), -1, -1, -1)
            gradients = _normalized_cells(F.avg_pool2d(votes, stride))
            levels.append(torch.cat([colour, position, gradients], dim=1))
        return levels

    def _lab(self, rgb: Tensor) -> Tensor:
        """CIE L*a*b* / 100 of (B, 3, H, W) sRGB images in 0..1."""
        linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
        xyz = torch.einsum("ij,bjhw->bihw", self.xyz, linear)
        f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
        x, y, z = f.unbind(1)
        return torch.stack([1.16 * y - 0.16, 5 * (x - y), 2 * (y - z)], dim=1)


def orientation_votes(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 9, H, W): each pixel's gradient magnitude, shared by two orientations.

    Dalal & Triggs, CVPR 2005, sections 6.2 and 6.3: no smoothing, [-1, 0, 1], the colour channel
    with the largest gradient, unsigned orientation in 9 bins with linear interpolation.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    x = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    y = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    magnitude, channel = torch.hypot(x, y).max(dim=1, keepdim=True)
    angle = torch.atan2(y.gather(1, channel), x.gather(1, channel)) % math.pi
    place = angle * (_BINS / math.pi) - 0.5  # bin 0 is centred on 10 degrees
    lower = place.floor()
    votes = magnitude.new_zeros(len(images), _BINS, *images.shape[2:])
    votes.scatter_add_(1, lower.long() % _BINS, magnitude * (1 - (place - lower)))
    votes.scatter_add_(1, (lower.long() + 1) % _BINS, magnitude * (place - lower))
    return votes


def _normalized_cells(cells: Tensor) -> Tensor:
    """(B, 9, h, w) -> (B, 36, h, w): each cell by the norm of the four blocks of 2 x 2 around it.

    Section 6.4's L2-Hys without its second normalisation; cells at the border are repeated.
    """
    energy = F.pad(cells.square().sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    blocks = (4 * F.avg_pool2d(energy, 2, stride=1)).sqrt() + 1e-2  # (B, 1, h + 1, w + 1)
    height, width = cells.shape[2:]
    corners = [blocks[..., i : i + height, j : j + width] for i in (0, 1) for j in (0, 1)]
    return torch.cat([(cells / corner).clamp(max=_CLIP) for corner in corners], dim=1)
