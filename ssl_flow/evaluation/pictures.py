"""Segmentations and feature maps as pictures, beside each other, as data URIs."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Tile = tuple[int, int]  # height, width


def palette(classes: int) -> np.ndarray:
    """(256, 3) uint8 RGB: the PASCAL VOC colours of 0..classes-1, the same pale grey for the rest.

    The bits of the index spread over R, G, B, highest first, so neighbours differ strongly; class 0
    is black.
    """
    colors = np.full((256, 3), (224, 224, 192), np.uint8)
    index = np.arange(classes)[:, None]
    shifts, channels = np.arange(8)[:, None], np.arange(3)
    bits = index[..., None] >> (3 * shifts + channels) & 1  # (classes, 8, 3)
    colors[:classes] = (bits << (7 - shifts)).sum(1)
    return colors


def prediction_strips(
    examples: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: int, height: int = 180
) -> np.ndarray:
    """(len * height, W, 3) uint8: an example a row, image, truth, prediction; ignored is pale."""
    colors, tile = palette(classes), tile_of(examples[0][0], height)
    rows = [
        strip([image, colors[truth], colors[np.where(truth == 255, 255, found)]], tile)
        for image, truth, found in examples
    ]
    return np.concatenate(rows)


def tile_of(image: np.ndarray, height: int = 150) -> Tile:
    """The size of an image brought to a height."""
    return height, round(height * image.shape[1] / image.shape[0])


def strip(pictures: Sequence[np.ndarray], tile: Tile, nearest: bool = False) -> np.ndarray:
    """Pictures beside each other with a white gap, each fitted into one size: (H, W, 3) uint8."""
    height, width = tile
    gap = np.full((height, 4, 3), 255, np.uint8)
    parts = []
    for picture in pictures:
        scale = min(height / picture.shape[0], width / picture.shape[1])
        size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
        how = cv2.INTER_NEAREST if nearest else cv2.INTER_AREA
        fitted = np.full((height, width, 3), 255, np.uint8)
        fitted[: size[1], : size[0]] = cv2.resize(picture, size, interpolation=how)
        parts += [fitted, gap]
    return np.concatenate(parts[:-1], axis=1)


def data_uri(picture: np.ndarray | bytes, flat: bool = False) -> str:
    """A picture (PNG bytes, or RGB, stored as PNG if it has few flat colours, else as JPEG)."""
    kind = "png" if flat or isinstance(picture, bytes) else "jpeg"
    if not isinstance(picture, bytes):
        options = [] if flat else [cv2.IMWRITE_JPEG_QUALITY, 88]
        picture = cv2.imencode(f".{kind}", picture[..., ::-1], options)[1].tobytes()
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode()


def pca_rgb(embedding: Tensor) -> np.ndarray:
    """(B, D, H, W) embeddings -> (B, H, W, 3) uint8: three principal components of the batch."""
    batch, dim, height, width = embedding.shape
    pixels = embedding.detach().float().cpu().permute(0, 2, 3, 1).reshape(-1, dim).nan_to_num()
    weight, bias = fit_colors(pixels)
    colors = (pixels @ weight.T + bias).clamp(0, 1) * 255
    picture: np.ndarray = colors.byte().view(batch, height, width, 3).numpy()
    return picture


def fit_colors(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (3, D) and bias (3,) that make RGB in 0..1 of vectors: three principal components.

    The 1st to the 99th percentile of the finite `pixels` (N, D), on the CPU, fill a colour's range.
    With D = 2 the third colour stays dark.
    """
    mean = pixels.mean(0)
    centred = pixels - mean
    if pixels.shape[1] > 256:  # the exact decomposition takes all dimensions at once
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            rank = min(12, len(pixels))
            basis = torch.pca_lowrank(centred, rank, center=False, niter=6)[2][:, :3]
    else:
        basis = torch.linalg.eigh(centred.T @ centred)[1][:, -3:].flip(1)  # ascending
    low, high = (centred @ basis).quantile(torch.tensor([0.01, 0.99]), dim=0)
    # Below this it would be rounding errors that are drawn.
    span = (high - low).clamp(min=1e-4 * float(pixels.abs().max()) + 1e-9)
    missing = (0, 3 - basis.shape[1])
    weight = F.pad((basis / span), missing).T
    return weight, -F.pad(low / span, missing) - weight @ mean
