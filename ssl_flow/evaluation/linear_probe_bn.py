"""`linear-probe-bn`: the linear segmentation probe of DINOv3, with its training recipe.

Siméoni et al., "DINOv3", arXiv 2508.10104; every number below is that of the public code
(facebookresearch/dinov3, dinov3/eval/segmentation: config-ade20k-linear-training.yaml, train.py,
transforms.py, schedulers.py, inference.py, models/heads/linear_head.py): dropout of channels,
BatchNorm and 1x1 convolution on the last layer; AdamW; the short side scaled at random, a random
crop without too much of one class, flip, colour distortion; cross-entropy whose mean counts ignored
pixels too; at test time windows of 512 pixels every 341, averaged logits, scored at the mask's own
resolution. Their batch is 2 images on each of 8 GPUs with synchronised BatchNorm: here 16 at once.

Ours: the recipe is ADE20K's (20,210 images) whatever the set. `features = hypercolumn` is theirs
for the four levels of a ViT (their FOUR_EVEN_INTERVALS); the levels of a pyramid are normalised
each at its own stride. The maps are those that the encoder gives; DINOv3's have gone through the
backbone's last LayerNorm.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as V
from torch import Tensor, nn

from ssl_flow.data.segmentation import IGNORE, Labelled
from ssl_flow.evaluation.linear_probe_plain import Classify
from ssl_flow.evaluation.outcome import Settings
from ssl_flow.evaluation.pixel_features import best_class, neighbours, resize_image, resize_mask


@dataclass(frozen=True)
class BnProbe(Settings):
    """The protocol, as published."""

    name: ClassVar[str] = "linear-probe-bn"
    may_be_zero: ClassVar[tuple[str, ...]] = ("weight_decay", "warmup_steps", "dropout", "flip")
    ignored_count: ClassVar[bool] = True  # in the denominator of the loss's mean
    features: str = "last"  # or hypercolumn, embedding, stage1, ...
    steps: int = 40_000  # optimisation steps
    batch_images: int = 16
    lr: float = 1e-3  # AdamW's peak, betas 0.9 and 0.999, no gradient clipping
    weight_decay: float = 1e-3
    warmup_steps: int = 1500  # linear from lr * 1e-6; then cosine to 0
    dropout: float = 0.1  # of whole channels, before BatchNorm
    input_size: int = 512  # side of a crop and of a test window; the test image's short side
    stride: int = 341  # between test windows
    scales: tuple[float, float] = (0.5, 2.0)  # of input_size: the training image's short side
    max_class_share: float = 0.75  # of a crop's labelled pixels; up to 10 further draws
    flip: float = 0.5
    forward_images: int = 4  # images per forward pass of the encoder (no influence on the result)

    def __post_init__(self) -> None:
        """ValueError also for settings that do not go together."""
        super().__post_init__()
        if self.warmup_steps >= self.steps:
            found = f"warmup_steps = {self.warmup_steps} of steps = {self.steps}"
            raise ValueError(f"{found}: shorten both")
        if self.stride > self.input_size:
            raise ValueError(f"stride = {self.stride} leaves gaps between windows of input_size")

    def total_steps(self, images: int) -> int:
        """Of the training, for a set of so many images."""
        return self.steps

    def layers(self, channels: list[int], classes: int) -> tuple[nn.Conv2d, list[nn.Module]]:
        """The classifier of all levels, and what each goes through before."""
        convolution = nn.Conv2d(sum(channels), classes, 1)
        nn.init.normal_(convolution.weight, std=0.01)
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        drop = nn.Dropout2d(self.dropout)
        return convolution, [nn.Sequential(drop, nn.BatchNorm2d(c)) for c in channels]

    def optimizer(self, head: nn.Module) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(head.parameters(), self.lr, weight_decay=self.weight_decay)

    def learning_rate(self, step: int, images: int) -> float:
        """At a step from 0; the first two steps have the same one, as in the original."""
        t = max(step - 1, 0)
        if t < self.warmup_steps:
            below = (1 - t / self.warmup_steps) * (1 - 1e-6)
            return self.lr * (1 - below) * (1 - t / self.steps)
        return self.lr / 2 * (1 + math.cos(math.pi * (t + 1) / self.steps))

    def augment(
        self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A training example: image at most and mask exactly input_size on both sides.

        The image is padded after it is normalised (with 0), the mask here (with 255).
        """
        low, high = self.scales
        size = _short_side(mask.shape, int(self.input_size * rng.uniform(low, high)))
        image, mask = resize_image(image, size), resize_mask(mask, size)
        spare = [max(side - self.input_size, 0) for side in size]
        for _ in range(11):
            row, column = (int(rng.integers(0, s + 1)) for s in spare)
            window = (slice(row, row + self.input_size), slice(column, column + self.input_size))
            counts = np.bincount(mask[window].ravel(), minlength=256)[:IGNORE]
            if (counts > 0).sum() > 1 and counts.max() < self.max_class_share * counts.sum():
                break
        image, mask = image[window], mask[window]
        if rng.random() < self.flip:
            image, mask = image[:, ::-1], mask[:, ::-1]
        missing = [(0, self.input_size - side) for side in mask.shape]
        return distort_colors(image, rng), np.pad(mask, missing, constant_values=IGNORE)

    def predict(self, classify: Classify, item: Labelled) -> tuple[Tensor, np.ndarray]:
        """Classes of a test image at its mask's resolution, and that mask."""
        size = _short_side(item.mask.shape, self.input_size)
        image = resize_image(item.image, size)
        total, count = torch.zeros(()), torch.zeros(size)
        for y, x in itertools.product(*(self._starts(side) for side in size)):
            window = slice(y, y + self.input_size), slice(x, x + self.input_size)
            logits = classify(image[window], (self.input_size, self.input_size))
            if not total.ndim:
                total = logits.new_zeros(1, logits.shape[1], *size)
            total[..., window[0], window[1]] += logits
            count[window] += 1
        return _largest(total / count.to(total.device), item.mask.shape), item.mask

    def _starts(self, side: int) -> list[int]:
        """First pixels of the windows along one side."""
        last = max(side - self.input_size, 0)
        return [*range(0, last, self.stride), last]


def _largest(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """(H, W) classes of (1, K, h, w) logits, read bilinearly in strips (K may be 150)."""
    parts = []
    for rows in torch.arange(size[0], device=logits.device).split(64):
        near, weights = neighbours(rows, size[0] / logits.shape[2], logits.shape[2])
        above, below = (logits[:, :, i] * w[:, None] for i, w in zip(near, weights, strict=True))
        strip = (len(rows), size[1])
        wide = F.interpolate(above + below, strip, mode="bilinear", align_corners=False)
        parts.append(best_class(wide[0]))
    return torch.cat(parts)


def _short_side(size: tuple[int, ...], short: int) -> tuple[int, int]:
    height, width = (int(short * side / min(size) + 0.5) for side in size)
    return height, width


def distort_colors(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random brightness, contrast, saturation, hue of (H, W, 3) uint8, each in half of the images.

    Brightness +-32, contrast and saturation times 0.5 to 1.5, hue by up to half a turn; contrast
    comes after brightness or last, by chance.
    """

    def linear(scale: float, shift: float) -> Tensor:
        return (pixels.double() * scale + shift).clamp(0, 255).byte()

    brightness, contrast, saturation, hue, early = rng.integers(0, 2, 5).astype(bool)
    shift, turn = rng.uniform(-32, 32), rng.uniform(-0.5, 0.5)
    factor, color = rng.uniform(0.5, 1.5, 2)
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
    pixels = linear(1, shift) if brightness else pixels
    pixels = linear(factor, 0) if contrast and early else pixels
    pixels = V.adjust_saturation_image(pixels, color) if saturation else pixels
    pixels = V.adjust_hue_image(pixels, turn) if hue else pixels
    pixels = linear(factor, 0) if contrast and not early else pixels
    return pixels.permute(1, 2, 0).numpy()
