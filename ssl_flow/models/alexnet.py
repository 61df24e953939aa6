"""AlexNet with batch norm as a timm model, `alexnet_bn`: the backbone of arXiv 1807.05636.

timm has none; it loads a saved one once `ssl_flow.models` has been imported.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class AlexNet(nn.Module):
    """Krizhevsky et al., NIPS 2012, in Caffe's widths and one column; batch norm, no dropout.

    Paddings are such that a level of stride s is (H/s, W/s) for any image, as in other backbones;
    fc6 and fc7 are convolutions. Levels: conv1, pool1, conv3, pool5, fc7, the paper's hypercolumn.
    """

    def __init__(self, in_chans: int = 3, num_classes: int = 1000) -> None:
        """`num_classes` of 0: the forward pass gives the pooled fc7."""
        super().__init__()
        self.conv1 = _convolution(in_chans, 96, 11, stride=4)
        self.pool1 = nn.MaxPool2d(3, 2, padding=1)
        self.conv3 = nn.Sequential(
            _convolution(96, 256, 5), nn.MaxPool2d(3, 2, padding=1), _convolution(256, 384, 3)
        )
        self.pool5 = nn.Sequential(
            _convolution(384, 384, 3), _convolution(384, 256, 3), nn.MaxPool2d(3, 2, padding=1)
        )
        self.fc7 = nn.Sequential(
            nn.ZeroPad2d((2, 3, 2, 3)), _convolution(256, 4096, 6), _convolution(4096, 4096, 1)
        )
        self.num_features, self.num_classes = 4096, num_classes
        self.fc = nn.Linear(4096, num_classes) if num_classes else nn.Identity()
        levels = [("conv1", 96, 4), ("pool1", 96, 8), ("conv3", 384, 16), ("pool5", 256, 32)]
        self.feature_info: list[dict[str, Any]] = [
            {"module": name, "num_chs": channels, "reduction": stride}
            for name, channels, stride in [*levels, ("fc7", 4096, 32)]
        ]

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:  # noqa: ANN401
        """(B, 3, H, W) -> the levels at `indices`; the last before them unless intermediates_only.

        Arguments as in timm's models; there is no final norm, and NCHW is the only format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', found {output_fmt!r}")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        stop = last + 1 if stop_early or intermediates_only else None
        maps = [images]
        for info in self.feature_info[:stop]:
            maps.append(getattr(self, info["module"])(maps[-1]))
        levels = [maps[index + 1] for index in taken]
        return levels if intermediates_only else (maps[-1], levels)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> fc7, (B, 4096, ceil(H/32), ceil(W/32))."""
        last: Tensor = self.forward_intermediates(images)[0]
        return last

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes), or (B, 4096) without classes."""
        classes: Tensor = self.fc(self.forward_features(images).mean((2, 3)))
        return classes


def _convolution(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    # An even kernel is padded beforehand.
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2 * (kernel % 2), bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU())


default_cfgs = generate_default_cfgs({"alexnet_bn": {"first_conv": "conv1.0", "classifier": "fc"}})


@register_model
def alexnet_bn(pretrained: bool = False, **kwargs: Any) -> AlexNet:  # noqa: ANN401
    """AlexNet with batch norm; there are no pretrained weights."""
    model: AlexNet = build_model_with_cfg(
        AlexNet,
        "alexnet_bn",
        pretrained,
        feature_cfg={"feature_cls": "getter"},
        kwargs_filter=("global_pool",),
        **kwargs,
    )
    return model
