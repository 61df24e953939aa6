"""Scores of object masks in video as DAVIS defines them: region similarity J and boundary F.

J and F: Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation, CVPR 2016, sec. 4.1. Their mean, recall and decay over objects: Pont-Tuset et al., The
2017 DAVIS Challenge on Video Object Segmentation, sec. 4. All are fractions, not percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np


def region_similarity(prediction: np.ndarray, truth: np.ndarray) -> float:
    """J, the intersection over union of two (H, W) bool masks; 1 where both are empty."""
    union = int((prediction | truth).sum())
    return float((prediction & truth).sum() / union) if union else 1.0


def boundary_f(prediction: np.ndarray, truth: np.ndarray, tolerance: float = 0.008) -> float:
    """F of the boundaries of two (H, W) bool masks, `2 P R / (P + R)`.

    A boundary pixel is matched where the other mask has one no further away than
    `ceil(tolerance * image diagonal)` pixels (a disk). Precision P is the matched share of the
    prediction's boundary, recall R that of the truth's. Two masks without boundary score 1, one
    without boundary 0.
    """
    boundaries = _boundary(prediction), _boundary(truth)
    sizes = [int(b.sum()) for b in boundaries]
    if not all(sizes):
        return float(not any(sizes))
    radius = int(np.ceil(tolerance * np.hypot(*truth.shape)))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
    # Only what lies on a boundary is asked for, so the box of both boundaries is enough.
    left, top, width, height = cv2.boundingRect(boundaries[0] | boundaries[1])
    mine, theirs = (b[top : top + height, left : left + width] for b in boundaries)
    precision = (mine & cv2.dilate(theirs, disk)).sum() / sizes[0]
    recall = (theirs & cv2.dilate(mine, disk)).sum() / sizes[1]
    total = precision + recall
    return float(2 * precision * recall / total) if total else 0.0


def sequence_scores(
    predictions: Iterable[np.ndarray], truths: Iterable[np.ndarray], objects: int
) -> np.ndarray:
    """J and F (objects, T - 2, 2) in every frame but the first (which is given) and the last.

    Of T index maps (H, W) each, 0 = background, 1..objects. ValueError for fewer than three frames,
    unequal lengths or sizes, an index above `objects`.
    """
    frames = []
    for index, (prediction, truth) in enumerate(zip(predictions, truths, strict=True)):
        if prediction.shape != truth.shape:
            found = f"prediction {prediction.shape}, truth {truth.shape}"
            raise ValueError(f"frame {index}: {found} differ")
        if prediction.max(initial=0) > objects:
            raise ValueError(f"frame {index} predicts object {prediction.max()} of {objects}")
        pairs = [(prediction == i, truth == i) for i in range(1, objects + 1)]
        frames.append([(region_similarity(*pair), boundary_f(*pair)) for pair in pairs])
    if len(frames) < 3:
        raise ValueError(f"{len(frames)} frames: without the first and the last none is left")
    return np.array(frames[1:-1], np.float64).transpose(1, 0, 2)


def davis_summary(sequences: Sequence[np.ndarray]) -> dict[str, float]:
    """Means over all objects of each object's statistics over its frames.

    Of (objects, frames, 2) of each sequence, from `sequence_scores`: `J&F mean` first, then for J
    and F: `mean`; `recall`, the share of frames above 0.5; `decay`, the mean of the first quarter
    of the frames minus that of the last.
    """
    objects = [scores for sequence in sequences for scores in sequence]  # (frames, 2) each
    mean = np.mean([o.mean(0) for o in objects], axis=0)
    recall = np.mean([(o > 0.5).mean(0) for o in objects], axis=0)
    decays = []
    for o in objects:  # the quarters share their border frames, as in the official code
        borders = (np.round(np.linspace(1, len(o), 5) + 1e-10) - 1).astype(int)
        decays.append(o[: borders[1] + 1].mean(0) - o[borders[3] :].mean(0))
    rows = {"mean": mean, "recall": recall, "decay": np.mean(decays, axis=0)}
    table = {f"{m} {name}": float(row[i]) for i, m in enumerate("JF") for name, row in rows.items()}
    return {"J&F mean": float(mean.mean())} | table


def _boundary(mask: np.ndarray) -> np.ndarray:
    """(H, W) uint8: 1 where the pixel right of, below, or diagonally below differs."""
    right, below, diagonal = (
        np.pad(mask, ((0, 1), (0, 1)), mode="edge")[y:, x:][: len(mask), : mask.shape[1]]
        for y, x in ((0, 1), (1, 0), (1, 1))
    )
    differs = (mask != right) | (mask != below) | (mask != diagonal)
    return np.asarray(differs, np.uint8)
