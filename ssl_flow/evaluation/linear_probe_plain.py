"""`linear-probe-plain`: the linear segmentation probe of Leopart and NeCo, with its recipe.

Ziegler & Asano (Leopart), CVPR 2022; NeCo (Pariza et al., ICLR 2025) has the same. Every number
below is that of their code (experiments/linear_probing/linear_finetune.py in MkuuWaUjinga/leopart,
experiments/linear_segmentation in vpariza/NeCo, and the configs for Pascal): a 1x1 convolution with
PyTorch's initial weights on the last layer's patch features, SGD with momentum, the rate divided by
10 after 20 of 25 epochs; random resized crops and flips at 448 x 448; features brought bilinearly
and masks by nearest neighbour to 100 x 100 pixels in training and in the score. The batch is
NeCo's 128 (Leopart: 60 on each of 2 GPUs).

Ours: the last epoch is scored (theirs: the one with the best mIoU on the very set it is reported
for); a set smaller than the batch is one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ssl_flow.data.segmentation import Labelled
from ssl_flow.evaluation.outcome import Settings
from ssl_flow.evaluation.pixel_features import (
    best_class,
    resize_image,
    resize_mask,
    shrink_mask,
)

Classify = Callable[[np.ndarray, tuple[int, int]], Tensor]
"""(H, W, 3) uint8 and (H', W') -> logits (1, K, H', W') of that image."""


@dataclass(frozen=True)
class PlainProbe(Settings):
    """The protocol, as published."""

    name: ClassVar[str] = "linear-probe-plain"
    may_be_zero: ClassVar[tuple[str, ...]] = ("momentum", "weight_decay", "flip")
    ignored_count: ClassVar[bool] = False  # the loss's mean is over labelled pixels
    features: str = "last"  # or hypercolumn, embedding, stage1, ...
    epochs: int = 25
    drop_epoch: int = 20  # from here on a tenth of the learning rate
    batch_images: int = 128  # an incomplete last batch of an epoch is left out
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    input_size: int = 448  # images and masks are brought to a square of this side
    target_size: int = 100  # side at which masks and predictions are compared
    crop_area: tuple[float, float] = (0.8, 1.0)  # share of the image in a training crop
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # its width / height
    flip: float = 0.5
    forward_images: int = 8  # images per forward pass of the encoder (no influence on the result)

    def total_steps(self, images: int) -> int:
        """Of the training, for a set of so many images."""
        return self.epochs * max(1, images // self.batch_images)

    def layers(self, channels: list[int], classes: int) -> tuple[nn.Conv2d, list[nn.Module]]:
        """The classifier of all levels, and what each goes through before."""
        return nn.Conv2d(sum(channels), classes, 1), [nn.Identity() for _ in channels]

    def optimizer(self, head: nn.Module) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(head.parameters(), self.lr, self.momentum, 0, self.weight_decay)

    def learning_rate(self, step: int, images: int) -> float:
        """At a step from 0."""
        epoch = step // max(1, images // self.batch_images)
        return self.lr * 0.1 ** (epoch // self.drop_epoch)

    def augment(
        self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A training example: image of input_size and mask of target_size on both sides."""
        window, size = self._crop(mask.shape, rng), (self.input_size, self.input_size)
        image, mask = resize_image(image[window], size), resize_mask(mask[window], size)
        if rng.random() < self.flip:
            image, mask = image[:, ::-1], mask[:, ::-1]
        return image, shrink_mask(mask, self.target_size)

    def _crop(self, size: tuple[int, ...], rng: np.random.Generator) -> tuple[slice, slice]:
        """As torchvision's RandomResizedCrop: area uniform, ratio log-uniform, 10 draws."""
        height, width = size
        low, high = np.log(self.crop_ratio)
        for _ in range(10):
            area = height * width * rng.uniform(*self.crop_area)
            ratio = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                row = int(rng.integers(0, height - h + 1))
                column = int(rng.integers(0, width - w + 1))
                return slice(row, row + h), slice(column, column + w)
        w = min(width, round(height * self.crop_ratio[1]))  # none fits: the centre, ratio in bounds
        h = min(height, round(width / self.crop_ratio[0]))
        row, column = (height - h) // 2, (width - w) // 2
        return slice(row, row + h), slice(column, column + w)

    def predict(self, classify: Classify, item: Labelled) -> tuple[Tensor, np.ndarray]:
        """Classes and mask of a test image, both (target_size, target_size)."""
        size = self.input_size, self.input_size
        logits = classify(resize_image(item.image, size), (self.target_size, self.target_size))
        mask = shrink_mask(resize_mask(item.mask, size), self.target_size)
        return best_class(logits[0]), mask
