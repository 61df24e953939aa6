"""What every evaluation protocol returns, so that tables, intervals and reports read all alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Outcome:
    """Scores of one encoder on one set with one seed."""

    scores: dict[str, float]
    """Name -> value, the headline first, as a fraction or, where the name says so, in pixels."""
    counts: np.ndarray | None = None
    """(N, K, K) confusion matrix (true, predicted) of each test image: intervals of mIoU."""
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Score -> (N,) its value for each test image, where the score is their mean: intervals."""
    items: list[str] = field(default_factory=list)
    """N names of the test images (or sequences) in the order of `counts` and `values`."""
    per_class: dict[str, float | None] = field(default_factory=dict)
    """Class -> its score; None: in no truth and no prediction."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else a reader needs, as JSON: seed, seconds, features a pixel, memory size."""
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(
        default_factory=list, repr=False
    )
    """(image, truth, prediction) of a few test images; class indices, 255 = ignore."""
