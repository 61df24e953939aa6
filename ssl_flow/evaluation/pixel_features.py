"""Features of a frozen encoder at the pixels of an image, and linear maps of them.

A level of stride s is a map whose cells cover s x s pixels each, the first one starting at pixel 0;
it is read bilinearly (`align_corners=False`, border padding) at full image resolution. The levels
together are the hypercolumn of a pixel (Hariharan et al., CVPR 2015).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_flow.data.segmentation import Labelled, SegmentationSet
from ssl_flow.models.encoder import EMBEDDING_STRIDE, Encoder, device_of


@contextmanager
def frozen(encoder: Encoder) -> Iterator[None]:
    """Eval mode and no gradients inside; every module is back in its own mode afterwards."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_features(encoder: Encoder, name: str) -> None:
    """ValueError unless the encoder has features of this name."""
    known = ["hypercolumn", *(f"stage{i + 1}" for i in range(len(encoder.channels))), "last"]
    if getattr(encoder, "head", None) is not None:
        known.append("embedding")
    if name not in known:
        raise ValueError(f"this encoder has no features {name!r}; it has {', '.join(known)}")


def estimate_batchnorm(encoder: Encoder, images: Iterable[Tensor]) -> int:
    """Replace BatchNorm's running statistics by the mean over batches of (B, 3, H, W) images.

    An untrained network's statistics (mean 0, variance 1) are not those of its activations, which
    would make a random encoder look worse than its weights are. Returns the number of images seen
    (0 when there is no BatchNorm). The encoder is in eval mode afterwards.
    """
    encoder.eval()
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return 0
    momenta, seen = [m.momentum for m in norms], 0
    run = encoder.features if getattr(encoder, "head", None) is None else encoder.embed
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()  # only these: dropout and the like stay off
    with torch.no_grad():
        for batch in images:
            run(batch)
            seen += len(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    encoder.eval()
    return seen


def estimate_on(encoder: Encoder, images: Sequence[Labelled] | SegmentationSet, count: int) -> int:
    """`estimate_batchnorm` on at most `count` images spread over a set; how many it were."""
    indices = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int).tolist()
    batches = normalized_batches(encoder, (images[i] for i in indices), 8)
    return estimate_batchnorm(encoder, (batch for _, batch in batches))


def normalized_batches(
    encoder: Encoder, dataset: Iterable[Labelled], size: int
) -> Iterator[tuple[list[Labelled], Tensor]]:
    """Batches of consecutive images of equal size: the images, and (B, 3, H, W) for the encoder."""
    device = device_of(encoder)

    def batch(items: list[Labelled]) -> tuple[list[Labelled], Tensor]:
        pixels = torch.from_numpy(np.stack([item.image for item in items])).to(
            device
        )  # (B, H, W, 3)
        # channels_last is the fast layout for convolutions
        return items, encoder.normalize(pixels).contiguous(memory_format=torch.channels_last)

    items: list[Labelled] = []
    for item in dataset:
        if items and (len(items) == size or item.image.shape != items[0].image.shape):
            yield batch(items)
            items = []
        items.append(item)
    if items:
        yield batch(items)


def feature_levels(
    encoder: Encoder, images: Tensor, features: str
) -> tuple[list[Tensor], list[int]]:
    """Features of (B, 3, H, W) images: maps (B, C_i, H_i, W_i) in float32, and their strides."""
    strides = feature_strides(encoder, features)
    if features == "embedding":
        return [encoder.embed(images).float()], strides
    levels = [level.float() for level in encoder.features(images)]
    if features == "hypercolumn":
        return levels, strides
    return [levels[_stage(features)]], strides


def feature_strides(encoder: Encoder, features: str) -> list[int]:
    """The strides of the levels that `feature_levels` gives."""
    if features == "embedding":
        return [EMBEDDING_STRIDE]
    if features == "hypercolumn":
        return encoder.strides
    return [encoder.strides[_stage(features)]]


def _stage(features: str) -> int:
    return -1 if features == "last" else int(features.removeprefix("stage")) - 1


def sample_levels(
    levels: list[Tensor], strides: list[int], rows: Tensor, columns: Tensor
) -> Tensor:
    """Hypercolumns at pixels of the full image.

    Args:
        levels: maps (C_i, H_i, W_i), float32 or float16. A cell covers s_i x s_i pixels, the
            first one starts at 0.
        strides: s_i. A map may reach past the image (270 rows: 9 cells of 32).
        rows: (N,) pixel rows.
        columns: (N,) pixel columns.

    Returns:
        (N, sum C_i), bilinear with border padding as in `F.interpolate(..., align_corners=False)`.
    """
    sampled = []
    for level, stride in zip(levels, strides, strict=True):
        height, width = level.shape[1:]
        cells = level.permute(1, 2, 0).reshape(height * width, -1)  # a view if channels are last
        (y, v), (x, u) = (
            _neighbours(pixels.to(level.device), stride, count)
            for pixels, count in ((rows, height), (columns, width))
        )
        corners = [
            cells[y[i] * width + x[j]].float() * (v[i] * u[j])[:, None]
            for i in (0, 1)
            for j in (0, 1)
        ]
        sampled.append(torch.stack(corners).sum(0))
    return torch.cat(sampled, dim=1)


def _neighbours(pixels: Tensor, stride: int, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """The two of `count` cells whose centres lie around each pixel, and their weights."""
    place = ((pixels.float() + 0.5) / stride - 0.5).clamp(0, count - 1)
    first = place.long()
    weight = place - first
    return [first, (first + 1).clamp(max=count - 1)], [1 - weight, weight]


def project_levels(
    levels: list[Tensor], strides: list[int], weight: Tensor, bias: Tensor, size: tuple[int, int]
) -> Tensor:
    """A 1x1 convolution of the hypercolumn at full resolution, level by level.

    Args:
        levels: maps (B, C_i, H_i, W_i) of images of `size`.
        strides: theirs.
        weight: (K, sum C_i).
        bias: (K,).
        size: (H, W) of the images.

    Returns:
        (B, K, H, W) logits.
    """
    logits = bias.view(1, -1, 1, 1)
    parts = weight.split([level.shape[1] for level in levels], dim=1)
    for level, stride, part in zip(levels, strides, parts, strict=True):
        projected = F.conv2d(level.float(), part[:, :, None, None])
        full = [level.shape[2] * stride, level.shape[3] * stride]
        upsampled = F.interpolate(projected, full, mode="bilinear", align_corners=False)
        logits = logits + upsampled[..., : size[0], : size[1]]
    return logits


def check_finite(levels: list[Tensor], index: int, name: str) -> None:
    """ValueError with the image's name when an encoder's output has NaN or infinity."""
    # The largest magnitude, NaN if there is one: several times as fast as isfinite().all().
    if not all(torch.linalg.vector_norm(x[index], math.inf).isfinite() for x in levels):
        raise ValueError(f"the encoder's features of {name} are not finite")
