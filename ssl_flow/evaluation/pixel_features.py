"""Features of a frozen encoder at the pixels of an image, and linear maps of them.

A level of stride s is a map whose cells cover s x s pixels each, the first one starting at pixel 0;
it is read bilinearly (`align_corners=False`, border padding) at full image resolution. The levels
together are the hypercolumn of a pixel (Hariharan et al., CVPR 2015).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
        with torch.no_grad():  # not inference_mode: autograd has to accept the features later
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def require_positive(settings: object, *names: str) -> None:
    """ValueError unless these attributes are more than 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} = {getattr(settings, name)}, expected more than 0")


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices of a sequence, evenly spread from the first to the last."""
    return [int(i) for i in np.linspace(0, length - 1, min(count, length))]


@contextmanager
def several_values(mend: str) -> Iterator[None]:
    """Say how to mend it where BatchNorm has one value a channel only, of which it can train."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(f"BatchNorm cannot train on a single value: use {mend}") from error


def check_features(encoder: Encoder, name: str) -> None:
    """ValueError unless the encoder has features of this name."""
    known = ["hypercolumn", *(f"stage{i + 1}" for i in range(len(encoder.channels))), "last"]
    if getattr(encoder, "head", None) is not None:
        known.append("embedding")
    if name not in known:
        raise ValueError(f"this encoder has no features {name!r}; it has {', '.join(known)}")


def estimate_batchnorm(encoder: Encoder, images: Iterable[Tensor]) -> int:
    """Replace BatchNorm's running statistics by the mean over batches of (B, 3, H, W) images.

    A batch counts by its images, but what differs between batches is not in their variances: make
    them large. An untrained network's statistics (mean 0, variance 1) are not those of its
    activations, which would make a random encoder look worse than its weights are. Returns the
    number of images seen (0 when there is no BatchNorm).
    """
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return 0
    momenta, counts, seen = [m.momentum for m in norms], dict.fromkeys(norms, 0), 0

    def weigh(norm: Any, inputs: tuple[Tensor, ...]) -> None:  # noqa: ANN401 (a BatchNorm)
        """The momentum with which this batch counts by its images; a norm may run twice a pass."""
        counts[norm] += len(inputs[0])
        norm.momentum = len(inputs[0]) / counts[norm]

    run = encoder.features if getattr(encoder, "head", None) is None else encoder.embed
    with frozen(encoder):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()  # only these: dropout and the like stay off
        hooks = [norm.register_forward_pre_hook(weigh) for norm in norms]
        try:
            for batch in images:
                run(batch)
                seen += len(batch)
        finally:
            for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
                norm.momentum = momentum
                hook.remove()
    return seen


def estimate_on(encoder: Encoder, images: Sequence[Labelled] | SegmentationSet, count: int) -> int:
    """`estimate_batchnorm` on at most `count` images spread over a set; how many it were.

    They are brought to the first one's size, at most 1024 pixels, so that batches are full.
    """
    indices = spread(len(images), count)
    full = images[0].image.shape[:2]
    size = [round(side * min(1, 1024 / max(full))) for side in full]

    def batches() -> Iterator[Tensor]:
        for part in np.array_split(indices, -(-len(indices) // 8)):  # no lone last one
            found = normalized_batches(encoder, (images[i] for i in part.tolist()), 1)
            yield torch.cat(
                [F.interpolate(x, size, mode="bilinear", antialias=True) for _, x in found]
            )

    return estimate_batchnorm(encoder, batches())


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
    encoder: Encoder, images: Tensor, features: str, names: Sequence[str]
) -> tuple[list[Tensor], list[int]]:
    """Features of (B, 3, H, W) images: maps (B, C_i, H_i, W_i) in float32, and their strides.

    Raises:
        ValueError: a map that does not fit its stride, features that are not finite (`names` says
            of which image).
    """
    strides = feature_strides(encoder, features)
    found = [encoder.embed(images)] if features == "embedding" else encoder.features(images)
    if features not in ("embedding", "hypercolumn"):
        found = [found[_stage(features)]]
    levels = [level.float() for level in found]
    check_shapes(levels, strides, images, names)
    check_finite(levels, names)
    return levels, strides


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
            neighbours(pixels.to(level.device), stride, count)
            for pixels, count in ((rows, height), (columns, width))
        )
        corners = [
            cells[y[i] * width + x[j]].float() * (v[i] * u[j])[:, None]
            for i in (0, 1)
            for j in (0, 1)
        ]
        sampled.append(torch.stack(corners).sum(0))
    return torch.cat(sampled, dim=1)


def neighbours(pixels: Tensor, stride: float, count: int) -> tuple[list[Tensor], list[Tensor]]:
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
    logits = bias.view(1, -1, 1, 1).repeat(len(levels[0]), 1, *size)
    parts = weight.split([level.shape[1] for level in levels], dim=1)
    for level, stride, part in zip(levels, strides, parts, strict=True):
        projected = F.conv2d(level.float(), part[:, :, None, None])
        full = [level.shape[2] * stride, level.shape[3] * stride]
        upsampled = F.interpolate(projected, full, mode="bilinear", align_corners=False)
        logits += upsampled[..., : size[0], : size[1]]
    return logits


def check_shapes(
    levels: list[Tensor], strides: list[int], images: Tensor, names: Sequence[str]
) -> None:
    """ValueError unless the maps of (B, 3, H, W) images have ceil(H/s) x ceil(W/s) cells."""
    for level, stride in zip(levels, strides, strict=True):
        expected = tuple(math.ceil(side / stride) for side in images.shape[-2:])
        if tuple(level.shape[-2:]) != expected:
            raise ValueError(
                f"{names[0]}: the encoder's map has {tuple(level.shape[-2:])} cells, but stride "
                f"{stride} and an image of {tuple(images.shape[-2:])} mean {expected}"
            )


def check_finite(levels: list[Tensor], names: Sequence[str]) -> None:
    """ValueError with the image's name when the maps of B images have NaN or infinity."""
    for index, name in enumerate(names):
        # The largest magnitude, NaN if there is one: several times as fast as isfinite().all().
        if not all(torch.linalg.vector_norm(x[index], math.inf).isfinite() for x in levels):
            raise ValueError(f"the encoder's features of {name} are not finite")
