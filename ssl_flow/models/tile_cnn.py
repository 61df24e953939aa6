"""The small network of Loc2Vec's kind as a timm model, `tile_cnn`: 0.17 M weights at 12 channels.

timm has none so small; it loads a saved one once `ssl_flow.models` has been imported.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class TileCNN(nn.Module):
    """3x3 convolutions with max pooling, then 1x1, after Sentiance's "Loc2Vec" (2018).

    Widths are those of public re-implementations. Where they flatten a map of a fixed size it is
    averaged here, so that tiles may have any side from 16 pixels on, and each convolution is
    batch-normalised.
    """

    def __init__(self, in_chans: int = 3, num_classes: int = 1000) -> None:
        """`num_classes` of 0: the forward pass gives the pooled features."""
        super().__init__()
        widths = [in_chans, 32, 32, 64, 64, 128]
        blocks: list[nn.Module] = []
        for channels, out in pairwise(widths):
            blocks += [_convolution(channels, out, 3), nn.MaxPool2d(2)]
        blocks[-1] = _convolution(widths[-1], 256, 1)  # in the place of a fifth pooling
        self.features = nn.Sequential(*blocks)
        self.num_features, self.num_classes = 256, num_classes
        self.fc = nn.Linear(256, num_classes) if num_classes else nn.Identity()

    def forward_features(self, tiles: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 256, H/16, W/16), rounded down."""
        maps: Tensor = self.features(tiles)
        return maps

    def forward(self, tiles: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or (B, 256) without classes."""
        classes: Tensor = self.fc(self.forward_features(tiles).mean((2, 3)))
        return classes


def _convolution(channels: int, out: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.LeakyReLU(0.1))


default_cfgs = generate_default_cfgs(
    {"tile_cnn": {"first_conv": "features.0.0", "classifier": "fc"}}
)


@register_model
def tile_cnn(pretrained: bool = False, **kwargs: Any) -> TileCNN:  # noqa: ANN401
    """The small network; there are no pretrained weights."""
    model: TileCNN = build_model_with_cfg(TileCNN, "tile_cnn", pretrained, **kwargs)
    return model
