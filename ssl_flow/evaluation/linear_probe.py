"""Linear probe: what a frozen encoder's features say about the class of every pixel.

    result = run_linear_probe(encoder, train_set, test_set, LinearProbe(), seed=0)
    result.scores["miou"], result.per_class

The classifier is BatchNorm + 1x1 convolution on the hypercolumn (Hariharan et al., CVPR 2015):
every level of the encoder sampled bilinearly at a labelled pixel of the full-resolution mask.
Training sees a sample of such pixels, cached once. Scoring uses that a 1x1 convolution commutes
with bilinear upsampling: no hypercolumn of every pixel is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_flow.data.segmentation import IGNORE, Labelled, SegmentationSet
from ssl_flow.evaluation.feature_cache import cached_levels
from ssl_flow.evaluation.metrics import SegmentationScores
from ssl_flow.evaluation.outcome import Outcome, Settings
from ssl_flow.evaluation.pixel_features import (
    bar,
    best_class,
    check_input,
    frozen,
    project_levels,
    sample_levels,
)
from ssl_flow.models.encoder import Encoder


@dataclass(frozen=True)
class LinearProbe(Settings):
    """The protocol; its settings are ours."""

    name: ClassVar[str] = "linear-probe"
    may_be_zero: ClassVar[tuple[str, ...]] = ("weight_decay",)
    features: str = "hypercolumn"  # all levels; or embedding, or stage1 (finest), stage2, ...
    pixels_per_image: int = 1024  # labelled pixels drawn from each training image
    # uniform; or balanced: equally many of each class in the image, as far as it has them. A probe
    # of uniform pixels seldom says a class that is rare, as the foreground of DAVIS is.
    draw: Literal["uniform", "balanced"] = "uniform"
    cache_gib: float = 1.0  # memory for their float16 features; when short, fewer are drawn
    batch_pixels: int = 4096  # pixels per optimisation step
    steps: int = 1000  # optimisation steps
    lr: float = 1e-2  # AdamW's peak learning rate, cosine to 0; weights start from zero
    weight_decay: float = 1e-3  # AdamW's
    batch_images: int = 8  # images per forward pass of the encoder (no influence on the result)


def run_linear_probe(
    encoder: Encoder,
    train_set: SegmentationSet,
    test_set: SegmentationSet,
    protocol: LinearProbe | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Outcome:
    """Train the probe on one split, score it on another (`outcome.py` has what all protocols do).

    `seed` is that of the pixel sample and the batches. A folder `cache` keeps the features of both
    splits as float16 (`cache_features`), so that the next probe of this encoder computes none.
    ValueError also for a loss that is not finite.
    """
    protocol = protocol or LinearProbe()
    check_input(encoder, protocol.features, train_set, test_set, labelled=True)
    scores = SegmentationScores(test_set)
    generator = torch.Generator().manual_seed(seed)
    walk = protocol.features, protocol.batch_images, cache
    with frozen(encoder):
        found = cached_levels(encoder, train_set, *walk, "train features")
        features, labels, used = draw_pixels(found, len(train_set), protocol, generator)
        weight, bias, right = fit_probe(
            features, labels, len(train_set.classes), protocol, generator
        )
        del features
        with torch.inference_mode():
            for item, levels, strides in cached_levels(encoder, test_set, *walk, "test"):
                logits = project_levels(levels, strides, weight, bias, item.mask.shape)
                scores.add(item, best_class(logits[0]).byte().cpu().numpy())
    return scores.outcome(
        seed=seed, train_accuracy=right, pixels_per_image=used, channels=weight.shape[1]
    )


def draw_pixels(
    found: Iterable[tuple[Labelled, list[Tensor], list[int]]],
    images: int,
    protocol: LinearProbe,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, int]:
    """Features (N, C) float16 and labels (N,) of the sampled pixels, and the pixels per image.

    `found` holds (image, levels (1, C_i, H_i, W_i), strides) of each of the `images` images.
    Rows are in random order, so that a batch is a slice: gathering rows costs more than a step.
    ValueError: a feature beyond float16.
    """
    features, labels, slots = torch.empty(0), torch.empty(0), torch.empty(0)
    limit, filled = 0, 0
    for item, levels, strides in found:
        if not limit:  # the first image tells the number of channels
            channels = sum(level.shape[1] for level in levels)
            affordable = int(protocol.cache_gib * 2**30 / (2 * channels * images))
            limit = max(1, min(protocol.pixels_per_image, affordable))
            size, device = (limit * images, channels), levels[0].device
            features = torch.empty(size, dtype=torch.float16, device=device)
            labels = torch.full([len(features)], -1, device=device)
            slots = torch.randperm(len(features), generator=generator).to(labels)
        mask = torch.from_numpy(item.mask)
        rows, columns = (mask != IGNORE).nonzero(as_tuple=True)
        order = torch.randperm(len(rows), generator=generator)
        if protocol.draw == "balanced":
            order = order[_rank_in_class(mask[rows, columns][order].long()).argsort(stable=True)]
        chosen = order[:limit]
        rows, columns = rows[chosen], columns[chosen]
        sampled = sample_levels([x[0] for x in levels], strides, rows, columns).half()
        if not sampled.isfinite().all():
            raise ValueError(f"features of {item.name} exceed float16's range (65504)")
        slot = slots[filled : filled + len(rows)]
        features[slot] = sampled
        labels[slot] = mask[rows, columns].to(labels)
        filled += len(rows)
    if filled < len(features):  # some image has fewer labelled pixels than the limit
        features, labels = features[labels >= 0], labels[labels >= 0]
    return features, labels, limit


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many of the same class come before each of the labels (N,) int64."""
    by_class, counts = labels.argsort(stable=True), labels.bincount()
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return rank


@torch.enable_grad()
def fit_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    protocol: LinearProbe,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, float]:
    """BatchNorm + linear layer, folded into one weight (K, C) and bias (K,); training accuracy.

    BatchNorm's statistics are the exact ones of all training features, not running averages; its
    own scale and shift are left out, the linear layer has them. Overwrites `features`.
    """
    size = protocol.batch_pixels
    scale, mean = _standardize(features)
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    both = [weight, bias]
    optimizer = torch.optim.AdamW(both, lr=protocol.lr, weight_decay=protocol.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, protocol.steps)
    for _ in bar(range(protocol.steps), "fit"):
        start = int(torch.randint(max(1, len(features) - size + 1), (), generator=generator))
        x, y = features[start : start + size].float(), labels[start : start + size]
        loss = F.cross_entropy(F.linear(x, weight, bias), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    if not loss.isfinite():
        raise ValueError(f"the training loss is {loss.item()}: lower lr = {protocol.lr}")
    with torch.inference_mode():
        right = sum(
            (F.linear(x.float(), weight, bias).argmax(1) == y).sum()
            for x, y in zip(features.split(65536), labels.split(65536), strict=True)
        )
        folded = weight * scale
        return folded, bias - folded @ mean, float(right) / len(features)


@torch.inference_mode()
def _standardize(features: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the mean of every column of (N, C), in place, times the scale; (scale, mean)."""
    chunks = features.split(4096)  # few enough rows for sums in float32, and for the cache
    mean = torch.stack([c.float().sum(0) for c in chunks]).double().sum(0) / len(features)
    squares = [(c.float() - mean.float()).square_().sum(0) for c in chunks]
    variance = torch.stack(squares).double().sum(0) / len(features)
    # A channel that never varies carries nothing; dividing by its rounding error would be noise.
    scale = torch.where(variance > 1e-10, (variance + 1e-8).rsqrt(), 0.0).float()
    for chunk in chunks:
        chunk.copy_((chunk.float() - mean.float()).mul_(scale))
    return scale, mean.float()
