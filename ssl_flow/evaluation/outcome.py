"""What every evaluation protocol returns, so that tables, intervals and reports read all alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Outcome:
    """Scores of one encoder on one set with one seed."""

    scores: dict[str, float]
    """Name -> value, the headline first, as a fraction or, where the name says so, in pixels."""
    counts: np.ndarray | None = None
    """(N, 3, K) of each test image, the pixels of each class that are right, of the truth, of the
    prediction: intervals of mIoU. Whole confusion matrices are gigabytes at K = 150."""
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

    def as_dict(self) -> dict[str, Any]:
        """Scores, scores of the classes and details, for JSON."""
        return self.scores | {"per_class": self.per_class} | self.details


def mean_per_class(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """The score of every class, its mean over those of several seeds that have it."""
    means: dict[str, float | None] = {}
    for name in outcomes[0].per_class:
        found = [v for outcome in outcomes if (v := outcome.per_class[name]) is not None]
        means[name] = float(np.mean(found)) if found else None
    return means
