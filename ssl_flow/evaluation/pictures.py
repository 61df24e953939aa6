"""Segmentations (image | truth | prediction) and feature maps as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor


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
    """One row an example: image, truth, prediction; ignored pixels are pale in both.

    Args:
        examples: (image (H, W, 3) uint8, truth (H, W), prediction (H, W)), any sizes.
        classes: number of classes.
        height: of a row in pixels.

    Returns:
        (len * height, W, 3) uint8.
    """
    colors, strips = palette(classes), []
    for image, truth, prediction in examples:
        shown = np.where(truth == 255, 255, prediction)
        strip = np.concatenate([image, colors[truth], colors[shown]], axis=1)
        width = round(strip.shape[1] * height / strip.shape[0])
        strips.append(cv2.resize(strip, (width, height), interpolation=cv2.INTER_AREA))
    widest = max(s.shape[1] for s in strips)
    return np.concatenate([np.pad(s, ((0, 0), (0, widest - s.shape[1]), (0, 0))) for s in strips])


def pca_rgb(embedding: Tensor) -> np.ndarray:
    """(B, D, H, W) embeddings -> (B, H, W, 3) uint8: three principal components of the batch.

    With D = 2 the third colour stays dark.
    """
    batch, dim, height, width = embedding.shape
    embedding = embedding.detach().float().cpu().nan_to_num()  # a decomposition of NaN raises
    pixels = embedding.permute(0, 2, 3, 1).reshape(-1, dim)
    pixels = pixels - pixels.mean(0)
    _, basis = torch.linalg.eigh(pixels.T @ pixels)  # ascending
    projected = pixels @ basis[:, -3:].flip(1)
    low, high = projected.quantile(0.01, dim=0), projected.quantile(0.99, dim=0)
    scaled = ((projected - low) / (high - low).clamp(min=1e-9)).clamp(0, 1) * 255
    scaled = torch.nn.functional.pad(scaled, (0, 3 - scaled.shape[1]))
    picture: np.ndarray = scaled.byte().view(batch, height, width, 3).numpy()
    return picture
