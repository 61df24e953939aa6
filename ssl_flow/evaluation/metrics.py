"""Segmentation scores from one confusion matrix over a whole data set."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class ConfusionMatrix:
    """Counts of (true class, predicted class) over all pixels of all images.

    Intersection over union of class c, over the data set (Everingham et al., PASCAL VOC, 2010):
    `IoU_c = M_cc / (sum_j M_cj + sum_i M_ic - M_cc)`. The mean of per-image IoUs is another number,
    usually a different one, and is not offered.

    >>> scores = ConfusionMatrix(2)
    >>> scores.update(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 255]))
    >>> scores.iou().tolist(), scores.miou(), round(scores.pixel_accuracy(), 3)
    ([0.5, 0.5], 0.5, 0.667)
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        """Start from zero counts; pixels whose target is `ignore_index` are never counted."""
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # (true, predicted)

    def update(self, prediction: np.ndarray | Tensor, target: np.ndarray | Tensor) -> None:
        """Add integer arrays of one same shape.

        Raises:
            ValueError: shapes differ, or a counted index is outside 0..num_classes-1.
        """
        if tuple(prediction.shape) != tuple(target.shape):
            raise ValueError(f"prediction {prediction.shape} and target {target.shape} differ")
        predicted, true = (torch.as_tensor(x).flatten().long().cpu() for x in (prediction, target))
        counted = true != self.ignore_index
        predicted, true = predicted[counted], true[counted]
        classes = len(self.counts)
        for what, index in (("prediction", predicted), ("target", true)):
            low, high = (int(index.min()), int(index.max())) if len(index) else (0, 0)
            if low < 0 or high >= classes:
                found = f"{low}..{high}"
                raise ValueError(f"{what} holds class indices {found}, expected 0..{classes - 1}")
        pairs = torch.bincount(true * classes + predicted, minlength=classes**2)
        self.counts += pairs.view(classes, classes)

    def sums(self) -> np.ndarray:
        """(3, num_classes) int64, all that the scores need: pixels of each class that are right, of
        the truth, of the prediction."""
        return torch.stack([self.counts.diag(), self.counts.sum(1), self.counts.sum(0)]).numpy()

    def iou(self) -> np.ndarray:
        """IoU per class, (num_classes,) float64; nan where neither truth nor prediction has it."""
        return iou_of(self.sums())

    def miou(self) -> float:
        """Mean IoU over the classes present in truth or prediction; nan before any update."""
        return float(miou_of(self.sums()))

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that are right."""
        return float(self.counts.diag().sum().double() / self.counts.sum())


def iou_of(sums: np.ndarray) -> np.ndarray:
    """IoU (..., K) of (..., 3, K) `ConfusionMatrix.sums`; nan where a class is in neither."""
    right, true, predicted = np.moveaxis(sums, -2, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray(right / (true + predicted - right))


def miou_of(sums: np.ndarray) -> np.ndarray:
    """(..., 3, K) -> (...): the mean over the classes that are there; nan where none is."""
    iou = iou_of(sums)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(iou, -1) / (~np.isnan(iou)).sum(-1))


def effective_rank(points: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli, EUSIPCO 2007).

    `points`: (N, D) embeddings. Between 1 (collapsed to a line) and D.
    """
    points = points.detach().double()
    points = points - points.mean(0)
    spectrum = torch.linalg.eigvalsh(points.T @ points).clamp(min=0).sqrt()
    share = spectrum / spectrum.sum().clamp(min=1e-12)
    return float(torch.exp(-torch.xlogy(share, share).sum()))
