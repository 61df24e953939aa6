"""What frozen encoders make of the same images: PCA as colours, similarity to marked pixels."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_flow.data.segmentation import IGNORE, Labelled, SegmentationSet
from ssl_flow.evaluation.pictures import Tile, pca_rgb
from ssl_flow.evaluation.pixel_features import image_levels
from ssl_flow.models.encoder import Encoder
from ssl_flow.models.head import to_stride

_SIDE = 320  # shorter side of the images
_STRIDE = 8  # of the maps, or the encoder's finest stride where that is coarser


def pick_images(
    dataset: SegmentationSet, unit_of: Callable[[str], str], count: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Images spread over a set (over its sequences), shrunk and cut to one size.

    Returns:
        (B, H, W, 3) uint8, (B, H, W) uint8.
    """
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(dataset.names):
        groups.setdefault(unit_of(name), []).append(index)
    middles = [part[len(part) // 2] for part in groups.values()]
    if len(middles) < count:
        middles = list(range(len(dataset)))
    # The middles of equal parts: neither the first nor the last.
    chosen = [middles[int((i + 0.5) * len(middles) / count)] for i in range(count)]
    images, masks = [], []
    for item in (dataset[index] for index in dict.fromkeys(chosen)):
        height, width = item.mask.shape
        scale = _SIDE / min(height, width)
        size = (round(width * scale), round(height * scale))
        images.append(cv2.resize(item.image, size, interpolation=cv2.INTER_AREA))
        masks.append(cv2.resize(item.mask, size, interpolation=cv2.INTER_NEAREST))
    # Whole cells of the usual strides, so that maps cover their image exactly.
    rows, columns = (min(mask.shape[axis] for mask in masks) // 16 * 16 for axis in (0, 1))

    def cut(array: np.ndarray) -> np.ndarray:
        top, left = (array.shape[0] - rows) // 2, (array.shape[1] - columns) // 2
        return array[top : top + rows, left : left + columns]

    return np.stack([cut(x) for x in images]), np.stack([cut(x) for x in masks])


def mark_pixels(masks: np.ndarray, each: int = 2) -> list[tuple[int, int, int]]:
    """Pixels well inside large regions of different classes: (image, row, column) of each."""
    used: dict[int, int] = {}
    marks = []
    for index, mask in enumerate(masks):
        classes, areas = np.unique(mask[mask != IGNORE], return_counts=True)
        large = [(used.get(c, 0), -a, c) for c, a in zip(classes.tolist(), areas, strict=True)
                 if a >= mask.size / 100]  # fmt: skip
        for _, _, chosen in sorted(large)[:each]:
            region = np.pad((mask == chosen).astype(np.uint8), 1)
            inside = cv2.distanceTransform(region, cv2.DIST_L2, 5)[1:-1, 1:-1]
            row, column = np.unravel_index(int(inside.argmax()), mask.shape)
            used[chosen] = used.get(chosen, 0) + 1
            marks.append((index, int(row), int(column)))
    return marks


@torch.no_grad()
def joint_maps(encoder: Encoder, images: np.ndarray) -> tuple[Tensor, int]:
    """All levels of (B, H, W, 3) images on one grid: (B, sum C, h, w), and its stride.

    A level has unit length at every cell before it is joined, so that each counts alike.

    Raises:
        ValueError: features that are not finite.
    """
    stride = max(_STRIDE, min(encoder.strides))
    rows, columns = (-(-side // stride) for side in images.shape[1:3])
    items = [Labelled(image, image[..., 0], f"picture {i}") for i, image in enumerate(images)]
    parts = []
    for _, levels, strides in image_levels(encoder, items, "hypercolumn", 1):
        same = [
            F.normalize(to_stride(level, s, stride)[..., :rows, :columns], dim=1)
            for level, s in zip(levels, strides, strict=True)
        ]
        parts.append((torch.cat(same, 1) / len(same) ** 0.5).cpu())
    return torch.cat(parts), stride


def pca_tiles(maps: Tensor, tile: Tile) -> list[np.ndarray]:
    """Three principal components over all images as colours, one (H, W, 3) uint8 an image."""
    if maps.shape[1] > 256:  # the decomposition below takes all dimensions at once
        batch, dim, height, width = maps.shape
        pixels = maps.permute(0, 2, 3, 1).reshape(-1, dim)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, _, basis = torch.pca_lowrank(pixels, q=12, niter=6)
        maps = (pixels @ basis).view(batch, height, width, -1).permute(0, 3, 1, 2)
    return [_enlarge(picture, tile) for picture in pca_rgb(maps)]


def similarity_tiles(
    maps: Tensor, stride: int, mark: tuple[int, int, int], tile: Tile
) -> list[np.ndarray]:
    """Cosine similarity of every cell of every image to that of a marked pixel, as colours.

    From the smallest (dark) to the largest value over all the images, the mark's own.
    """
    index, row, column = mark
    chosen = maps[index, :, row // stride, column // stride]
    similarity = torch.einsum("bchw,c->bhw", maps, chosen).numpy()
    low, high = similarity.min(), similarity.max()
    scaled = ((similarity - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    return [
        cv2.applyColorMap(_enlarge(picture, tile), cv2.COLORMAP_VIRIDIS)[..., ::-1]
        for picture in scaled
    ]


def _enlarge(picture: np.ndarray, tile: Tile) -> np.ndarray:
    return cv2.resize(picture, tile[::-1], interpolation=cv2.INTER_LINEAR)
