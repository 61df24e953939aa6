"""Scores of a segmentation protocol, gathered image by image."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from ssl_flow.data.segmentation import Labelled, SegmentationSet
from ssl_flow.evaluation.metrics import ConfusionMatrix
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.patch_features import resize_image


class SegmentationScores:
    """A confusion matrix for each image of a set, and a few images to look at.

    >>> scores = SegmentationScores(test_set, examples=6)
    >>> scores.add(item, prediction)
    >>> outcome = scores.outcome(seed=0)
    """

    def __init__(self, dataset: SegmentationSet, examples: int) -> None:
        """`examples` of the images are kept, spread evenly; the clock starts."""
        self._dataset = dataset
        self._wanted = set(
            np.linspace(0, len(dataset) - 1, min(examples, len(dataset))).astype(int)
        )
        self._counts: list[np.ndarray] = []
        self._items: list[str] = []
        self._examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._start = time.perf_counter()

    def add(self, item: Labelled, prediction: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Score the next image: (H, W) classes against its mask, or against one of another size."""
        mask = item.mask if mask is None else mask
        matrix = ConfusionMatrix(len(self._dataset.classes))
        matrix.update(prediction, mask)
        if len(self._items) in self._wanted:
            image = resize_image(item.image, prediction.shape)
            self._examples.append((image, mask, prediction.astype(np.uint8)))
        self._counts.append(matrix.counts.numpy())
        self._items.append(item.name)

    def outcome(self, **details: Any) -> Outcome:  # noqa: ANN401 (whatever JSON holds)
        """mIoU and pixel accuracy over all pixels of the set; `details` as given."""
        counts, total = np.stack(self._counts), ConfusionMatrix(len(self._dataset.classes))
        total.counts = torch.from_numpy(counts.sum(0))
        iou = [None if np.isnan(v) else float(v) for v in total.iou()]
        return Outcome(
            scores={"miou": total.miou(), "pixel_accuracy": total.pixel_accuracy()},
            counts=counts,
            items=self._items,
            per_class=dict(zip(self._dataset.classes, iou, strict=True)),
            details=details | {"seconds": round(time.perf_counter() - self._start, 1)},
            examples=self._examples,
        )
