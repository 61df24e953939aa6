"""Features of a frozen encoder at the pixels and cells of images, and linear maps of them.

A level of stride s is a map whose cells cover s x s pixels each, the first one starting at pixel 0
and the last ones perhaps reaching past the image; it is read bilinearly (`align_corners=False`,
border padding) at full resolution. The levels together are the hypercolumn of a pixel (Hariharan et
al., CVPR 2015).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ssl_flow.data.classification import ClassificationSet
from ssl_flow.data.segmentation import IGNORE, Labelled, SegmentationSet
from ssl_flow.models.encoder import EMBEDDING_STRIDE, Encoder, device_of
from ssl_flow.models.head import to_stride

AnySet = SegmentationSet | ClassificationSet
bar = partial(tqdm, leave=False, disable=None)
"""A progress bar; none where stderr is no terminal."""


@contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module is back in its own mode afterwards."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.no_grad():  # not inference_mode: autograd has to accept the features later
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices of a sequence, evenly spread from the first to the last."""
    return [int(i) for i in np.linspace(0, length - 1, min(count, length))]


def check_features(encoder: Encoder, name: str) -> None:
    """ValueError unless the encoder has features of this name."""
    known = ["hypercolumn", *(f"stage{i + 1}" for i in range(len(encoder.channels))), "last"]
    if getattr(encoder, "head", None) is not None:
        known.append("embedding")
    if name not in known:
        raise ValueError(f"this encoder has no features {name!r}; it has {', '.join(known)}")


def check_input(
    encoder: Encoder, features: str, train_set: AnySet, test_set: AnySet, labelled: bool = False
) -> None:
    """`check_features`; ValueError unless classes agree and, if asked, a training pixel has one."""
    check_features(encoder, features)
    if list(train_set.classes) != list(test_set.classes):
        raise ValueError(f"classes differ: train {train_set.classes}, test {test_set.classes}")
    if labelled and all(np.all(item[1] == IGNORE) for item in train_set):
        raise ValueError(f"{train_set.name}: no training pixel has a label")


def estimate_batchnorm(encoder: Encoder, images: Iterable[Tensor]) -> int:
    """Replace BatchNorm's running statistics by the mean over batches of (B, 3, H, W) images.

    An untrained network's statistics (mean 0, variance 1) are not those of its activations, which
    would make a random encoder look worse than its weights are. A batch counts by its images, but
    what differs between batches is not in their variances: make them large. Returns the number of
    images seen (0 when there is no BatchNorm).
    """
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return 0
    momenta, counts, seen = [m.momentum for m in norms], dict.fromkeys(norms, 0), 0

    def weigh(norm: Any, inputs: tuple[Tensor, ...]) -> None:  # noqa: ANN401 (a BatchNorm)
        counts[norm] += len(inputs[0])  # a norm may run twice a pass
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
    indices, full = spread(len(images), count), images[0].image.shape[:2]
    size = [round(side * min(1, 1024 / max(full))) for side in full]
    resize = partial(F.interpolate, size=size, mode="bilinear", antialias=True)

    def batches() -> Iterator[Tensor]:
        for part in np.array_split(indices, -(-len(indices) // 8)):  # no lone last one
            found = normalized_batches(encoder, (images[i] for i in part.tolist()), 1)
            yield torch.cat([resize(x) for _, x in found])

    return estimate_batchnorm(encoder, batches())


def normalized_batches(
    encoder: Encoder, dataset: Iterable[Labelled], size: int
) -> Iterator[tuple[list[Labelled], Tensor]]:
    """Batches of consecutive images of equal size: the images, and (B, 3, H, W) for the encoder."""
    for _, alike in groupby(dataset, key=lambda item: item.image.shape):
        while items := list(islice(alike, size)):
            pixels = torch.from_numpy(np.stack([item.image for item in items]))
            images = encoder.normalize(pixels.to(device_of(encoder)))
            # channels_last is the fast layout for convolutions
            yield items, images.contiguous(memory_format=torch.channels_last)


def feature_strides(encoder: Encoder, features: str) -> list[int]:
    """The strides of the levels that `feature_levels` gives."""
    return [EMBEDDING_STRIDE] if features == "embedding" else encoder.strides[_stages(features)]


def _stages(features: str) -> slice:
    if features in ("hypercolumn", "last"):
        return slice(None if features == "hypercolumn" else -1, None)
    stage = int(features.removeprefix("stage"))
    return slice(stage - 1, stage)


def feature_levels(
    encoder: Encoder, images: Tensor, features: str, names: Sequence[str], finite: bool = True
) -> tuple[list[Tensor], list[int]]:
    """Features of (B, 3, H, W) images: maps (B, C_i, H_i, W_i) in float32, and their strides.

    ValueError, by `names`, for a map that does not fit its stride and, unless `finite` is off,
    for features that are not finite.
    """
    embedding, strides = features == "embedding", feature_strides(encoder, features)
    found = [encoder.embed(images)] if embedding else encoder.features(images)[_stages(features)]
    levels = [level.float() for level in found]
    for level, stride in zip(levels, strides, strict=True):
        expected = tuple(math.ceil(side / stride) for side in images.shape[-2:])
        if tuple(level.shape[-2:]) != expected:
            raise ValueError(
                f"{names[0]}: the encoder's map has {tuple(level.shape[-2:])} cells, but stride "
                f"{stride} and an image of {tuple(images.shape[-2:])} mean {expected}"
            )
    for index, name in enumerate(names if finite else ()):
        # The largest magnitude, NaN if there is one: several times as fast as isfinite().all().
        if not all(torch.linalg.vector_norm(x[index], math.inf).isfinite() for x in levels):
            raise ValueError(f"the encoder's features of {name} are not finite")
    return levels, strides


def image_levels(
    encoder: Encoder, images: Iterable[Labelled], features: str, batch: int = 8
) -> Iterator[tuple[Labelled, list[Tensor], list[int]]]:
    """Every image with its maps (1, C_i, H_i, W_i) and strides, as of `feature_levels`.

    `batch` images of equal size go through the encoder at a time (no influence on the result).
    """
    for items, pixels in normalized_batches(encoder, images, batch):
        names = [item.name for item in items]
        levels, strides = feature_levels(encoder, pixels, features, names)
        for i, item in enumerate(items):
            yield item, [level[i : i + 1] for level in levels], strides


def joined(
    levels: list[Tensor], strides: list[int], stride: int, size: Sequence[int], unit: bool = False
) -> Tensor:
    """Maps (1, C_i, h_i, w_i) of an image of `size` (H, W) concatenated on the grid of a stride.

    With `unit` each level has unit length at every cell.
    """
    rows, columns = (-(-side // stride) for side in size)
    same = (to_stride(level, s, stride) for level, s in zip(levels, strides, strict=True))
    cut = [level[..., :rows, :columns] for level in same]
    return torch.cat([F.normalize(level, dim=1) for level in cut] if unit else cut, 1)


@torch.no_grad()
def image_features(
    encoder: Encoder,
    dataset: SegmentationSet,
    protocol: Any,  # noqa: ANN401 (DenseKnn or Clustering)
    what: str,
) -> Iterator[tuple[Labelled, Tensor, int]]:
    """Every item with its `protocol.features` on one grid; ValueError as of `feature_levels`.

    Images are brought to a square of side `protocol.image_size`, if that is given; of a hypercolumn
    the coarser levels to the finest one, bilinearly. `what` is the progress bar's text.

    Yields:
        The item (its image as it was encoded, its mask as on the disk); its map
        (C, ceil(H/s), ceil(W/s)) in float32; the stride s.
    """
    size = (protocol.image_size, protocol.image_size)
    resized = (
        item._replace(image=resize_image(item.image, size)) if protocol.image_size else item
        for item in bar(dataset, what)
    )
    found = image_levels(encoder, resized, protocol.features, protocol.batch_images)
    for item, levels, strides in found:
        yield item, joined(levels, strides, strides[0], item.image.shape[:2])[0], strides[0]


def sample_levels(
    levels: list[Tensor], strides: list[int], rows: Tensor, columns: Tensor
) -> Tensor:
    """Hypercolumns (N, sum C_i) at pixels (N,), (N,) of the full image.

    The maps (C_i, H_i, W_i) of strides s_i are float32 or float16, read as by
    `F.interpolate(..., align_corners=False)`.
    """
    sampled = []
    for level, stride in zip(levels, strides, strict=True):
        height, width = level.shape[1:]
        cells = level.permute(1, 2, 0).reshape(height * width, -1)  # a view if channels are last
        y, v = neighbours(rows.to(level.device), stride, height)
        x, u = neighbours(columns.to(level.device), stride, width)
        corners = ((i, j) for i in (0, 1) for j in (0, 1))
        read = [cells[y[i] * width + x[j]].float() * (v[i] * u[j])[:, None] for i, j in corners]
        sampled.append(torch.stack(read).sum(0))
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
    """A 1x1 convolution (K, sum C_i), (K,) of the hypercolumn at full resolution, level by level.

    Maps (B, C_i, H_i, W_i) of images of `size` (H, W) -> (B, K, H, W) logits.
    """
    logits = bias.view(1, -1, 1, 1).repeat(len(levels[0]), 1, *size)
    parts = weight.split([level.shape[1] for level in levels], dim=1)
    for level, stride, part in zip(levels, strides, parts, strict=True):
        projected = F.conv2d(level.float(), part[:, :, None, None])
        logits += to_stride(projected, stride, 1)[..., : size[0], : size[1]]
    return logits


def resize_map(
    maps: Tensor, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Read a map (B, C, h, w) bilinearly at the pixels of its image brought to another size.

    `image_size` (H, W) is that of the image that was encoded. Returns (B, C, *size); where
    h * stride = H the same as `F.interpolate(maps, size, mode="bilinear")`.
    """
    if all(n * stride == side for n, side in zip(maps.shape[-2:], image_size, strict=True)):
        return F.interpolate(maps, size, mode="bilinear", align_corners=False)
    axes = []
    for n, side, wanted in zip(maps.shape[-2:], image_size, size, strict=True):
        pixels = (torch.arange(wanted, device=maps.device) + 0.5) * (side / wanted)
        axes.append((pixels / (n * stride) * 2 - 1).to(maps.dtype))
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([columns, rows], -1).expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)


def best_class(logits: Tensor) -> Tensor:
    """(K, ...) -> (...): the class with the highest value, the first of equal ones.

    Not argmax: along the first dimension it takes a CPU ten times as long.
    """
    return logits.max(0).indices


def resize_image(
    image: np.ndarray, size: tuple[int, ...], how: Image.Resampling = Image.Resampling.BILINEAR
) -> np.ndarray:
    """(H, W, ...) uint8 -> (*size, ...), by default bilinear with antialiasing."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), how))


def resize_mask(mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(H, W) uint8 class indices -> (H', W'), nearest."""
    return resize_image(mask, size, Image.Resampling.NEAREST)


def shrink_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """(H, W) class indices -> (size, size): pixel floor(i H / size), as PyTorch's `nearest`."""
    rows, columns = (np.arange(size) * side // size for side in mask.shape)
    small: np.ndarray = mask[rows[:, None], columns]
    return small
