"""Scores of a segmentation protocol, gathered image by image."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ssl_flow.data.segmentation import Labelled, SegmentationSet
from ssl_flow.evaluation.metrics import ConfusionMatrix, iou_of, miou_of
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.patch_features import resize_image
from ssl_flow.evaluation.pixel_features import spread


class SegmentationScores:
    """What is right of each image of a set, and a few images to look at.

    >>> scores = SegmentationScores(test_set, examples=6)
    >>> scores.add(item, prediction)
    >>> outcome = scores.outcome(seed=0)
    """

    def __init__(self, dataset: SegmentationSet, examples: int) -> None:
        """`examples` of the images are kept, spread evenly; the clock starts."""
        self._dataset = dataset
        self._wanted = spread(len(dataset), examples)
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
        self._counts.append(matrix.sums())
        self._items.append(item.name)

    def outcome(self, **details: Any) -> Outcome:  # noqa: ANN401 (whatever JSON holds)
        """mIoU and pixel accuracy over all pixels of the set; `details` as given.

        Raises:
            ValueError: every label is ignored.
        """
        counts = np.stack(self._counts)
        right, true, _ = total = counts.sum(0)
        if not true.any():
            raise ValueError(f"{self._dataset.name}: no pixel to score has a label")
        iou = [None if np.isnan(v) else float(v) for v in iou_of(total)]
        return Outcome(
            scores={
                "miou": float(miou_of(total)),
                "pixel_accuracy": float(right.sum() / true.sum()),
            },
            counts=counts,
            items=self._items,
            per_class=dict(zip(self._dataset.classes, iou, strict=True)),
            details=details | {"seconds": round(time.perf_counter() - self._start, 1)},
            examples=self._examples,
        )
