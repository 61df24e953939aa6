"""Features of a frozen encoder as one map an image, for protocols that look at cells (patches)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_flow.data.segmentation import IGNORE, Labelled, SegmentationSet
from ssl_flow.evaluation.pixel_features import feature_levels, normalized_batches
from ssl_flow.models.encoder import Encoder
from ssl_flow.models.head import to_stride


def check_classes(train_set: SegmentationSet, test_set: SegmentationSet) -> None:
    """ValueError unless both splits have the same classes."""
    if train_set.classes != test_set.classes:
        raise ValueError(f"classes differ: train {train_set.classes}, test {test_set.classes}")


def check_labelled(train_set: SegmentationSet) -> None:
    """ValueError unless some pixel has a label; reads images up to the first one that has."""
    if all((item.mask == IGNORE).all() for item in train_set):
        raise ValueError(f"{train_set.name}: no training pixel has a label")


def resize_image(image: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(H, W, 3) uint8 -> (H', W', 3), bilinear with antialiasing."""
    return _resize(image, size, Image.Resampling.BILINEAR)


def resize_mask(mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(H, W) uint8 class indices -> (H', W'), nearest."""
    return _resize(mask, size, Image.Resampling.NEAREST)


def shrink_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """(H, W) class indices -> (size, size): pixel floor(i H / size), as PyTorch's `nearest`."""
    rows, columns = (np.arange(size) * side // size for side in mask.shape)
    small: np.ndarray = mask[rows[:, None], columns]
    return small


def _resize(array: np.ndarray, size: tuple[int, ...], how: Image.Resampling) -> np.ndarray:
    if array.shape[:2] == size:
        return array
    return np.asarray(Image.fromarray(array).resize((size[1], size[0]), how))


@torch.no_grad()
def image_features(
    encoder: Encoder,
    dataset: SegmentationSet,
    features: str,
    size: int | None = None,
    batch: int = 8,
) -> Iterator[tuple[Labelled, Tensor, int]]:
    """Every item of a set with its features, image by image.

    Args:
        encoder: in eval mode.
        dataset: labelled images.
        features: see `check_features`. Of a hypercolumn the coarser levels are brought to the
            finest one bilinearly and concatenated, one image at a time.
        size: side of the square to which images are brought first; None: as they are.
        batch: images in a forward pass (no influence on the result).

    Yields:
        The item (its image as it was encoded, its mask as on the disk); its map
        (C, ceil(H/s), ceil(W/s)) in float32; the stride s.

    Raises:
        ValueError: as `feature_levels`.
    """
    resized = (
        item if size is None else item._replace(image=resize_image(item.image, (size, size)))
        for item in dataset
    )
    for group, images in normalized_batches(encoder, resized, batch):
        names = [item.name for item in group]
        levels, strides = feature_levels(encoder, images, features, names)
        rows, columns = levels[0].shape[-2:]
        for i, item in enumerate(group):
            same = [
                to_stride(level[i : i + 1], stride, strides[0])[0, :, :rows, :columns]
                for level, stride in zip(levels, strides, strict=True)
            ]
            yield item, torch.cat(same), strides[0]


def resize_map(
    maps: Tensor, stride: int, image_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Read a map bilinearly at the pixels of its image brought to another size.

    Args:
        maps: (B, C, h, w), cells of stride x stride pixels, the last ones may reach past the image.
        stride: pixels.
        image_size: (H, W) of the image that was encoded.
        size: (H', W') wanted for the same field of view.

    Returns:
        (B, C, H', W'); where h * stride = H the same as `F.interpolate(maps, size, bilinear)`.
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


def label_counts(mask: np.ndarray, stride: int, cells: tuple[int, int], classes: int) -> Tensor:
    """How many pixels of each class a cell has.

    Args:
        mask: (H, W) class indices, 255 = ignore (counted nowhere).
        stride: a cell is stride x stride pixels, the first one starts at pixel 0.
        cells: (h, w) with h * stride >= H, w * stride >= W.
        classes: K.

    Returns:
        (h * w, K) int64.
    """
    rows, columns = np.nonzero(mask != IGNORE)
    cell = rows // stride * cells[1] + columns // stride
    counts = np.bincount(cell * classes + mask[rows, columns], minlength=math.prod(cells) * classes)
    return torch.from_numpy(counts).view(-1, classes)
