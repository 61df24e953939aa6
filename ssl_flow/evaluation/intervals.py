"""Bootstrap intervals of scores over test images, and the spread over seeds beside them.

The percentile bootstrap (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13): draw
N of the N test images with replacement, score the draw, repeat; the 2.5 and 97.5 % points of these
scores bound the interval. The score is the one that is reported: mIoU is taken from the summed
counts of a draw, never averaged over images.

What is drawn must be independent. Frames of a video, and objects of one frame, are not: with
`groups`, whole sequences are drawn (the cluster bootstrap), or the interval were too narrow. The
score stays the one over images: of a mean, the ratio of the drawn groups' sums and sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ssl_flow.evaluation.metrics import miou_of
from ssl_flow.evaluation.outcome import Outcome

_CHUNK = 2**20
"""Numbers held at a time: draws times the larger of images and counts."""


@dataclass(frozen=True)
class Interval:
    """A score with its uncertainty over test images, and its values over seeds."""

    value: float
    """The score; with several seeds, the mean of theirs."""
    low: float
    """Lower end of the interval over images; nan with fewer than two images."""
    high: float
    seeds: tuple[float, ...]
    """The score of each seed."""

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); None for a single one."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else None


def better(a: Interval, b: Interval, larger_is_better: bool = True) -> bool:
    """Whether a may be called better than b.

    Only where their intervals do not overlap, nor their scores over seeds: a's worst seed must beat
    b's best. A score without an interval (one image) is never better, nor beaten.
    """
    if not larger_is_better:
        a, b = b, a
    return a.low > b.high and min(a.seeds) > max(b.seeds)


def interval_of_mean(
    values: np.ndarray, resamples: int = 2000, seed: int = 0, groups: Sequence[str] | None = None
) -> Interval:
    """95 % interval of the mean of (N,) values, or of (S, N), the same N images under S seeds.

    Images are drawn for all seeds together, and each draw is averaged over the seeds. `groups`:
    the name of each image's group, of which all or none are drawn.

    Raises:
        ValueError: another shape, no images, a value that is not finite.
    """
    table = np.atleast_2d(np.asarray(values, np.float64))  # (S, N)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ValueError(f"expected finite values (N,) or (S, N), got {np.shape(values)}: {values}")
    per_image = table.mean(0)
    sums, sizes = (_grouped(x, groups) for x in (per_image, np.ones_like(per_image)))
    draws = [w @ sums / (w @ sizes) for w in _draws(len(sums), 1, resamples, seed)]
    return _interval(table.mean(1), np.concatenate(draws), len(sums))


def interval_of_miou(
    counts: np.ndarray, resamples: int = 2000, seed: int = 0, groups: Sequence[str] | None = None
) -> Interval:
    """95 % interval of the mIoU of images with counts (N, 3, K) (`ConfusionMatrix.sums`).

    Or (S, N, 3, K), the same images under S seeds. As in `ConfusionMatrix.miou`, a class that
    neither truth nor prediction of a draw has does not count in its mean.

    Raises:
        ValueError: another shape, no counted pixel at all.
    """
    table = np.asarray(counts, np.float64)
    table = table[None] if table.ndim == 3 else table
    if table.ndim != 4 or table.shape[2] != 3 or not table.any((1, 2, 3)).all():
        raise ValueError(
            f"counts of shape {table.shape}, expected (S, N, 3, K) with counted pixels"
        )
    sums = [_grouped(s, groups) for s in table]
    units, _, classes = sums[0].shape
    draws = [  # one of images without any counted pixel is nan, left out of the interval
        np.mean([miou_of(np.tensordot(w, s, 1)) for s in sums], axis=0)
        for w in _draws(units, 3 * classes, resamples, seed)
    ]
    scores = np.array([miou_of(s.sum(0)) for s in sums])
    return _interval(scores, np.concatenate(draws), units)


def interval_of_outcomes(
    outcomes: Sequence[Outcome], score: str, groups: Sequence[str] | None = None
) -> Interval:
    """95 % interval of one score of one encoder, from its outcomes under one or several seeds.

    `values[score]` is used where the score is a mean over images, `counts` for `miou`; `groups`
    (of `items`): see `interval_of_mean`.

    Raises:
        ValueError: outcomes on different images, or with neither values nor counts of this score.
    """
    if not outcomes or any(o.items != outcomes[0].items for o in outcomes):
        raise ValueError("the outcomes are none, or not of the same images in the same order")
    if all(score in o.values for o in outcomes):
        return interval_of_mean(np.stack([o.values[score] for o in outcomes]), groups=groups)
    counts = [o.counts for o in outcomes if o.counts is not None]
    if score != "miou" or len(counts) != len(outcomes):
        raise ValueError(f"no values per image of {score!r}")
    return interval_of_miou(np.stack(counts), groups=groups)


def _grouped(values: np.ndarray, groups: Sequence[str] | None) -> np.ndarray:
    """(N, ...) -> (G, ...), the sum over each group."""
    if groups is None:
        return values
    _, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((index.max() + 1, *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums


def _draws(images: int, width: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """(draws, images) how often each image is drawn; in parts, so that memory is bounded."""
    rng, step = np.random.default_rng(seed), max(1, _CHUNK // max(images, width))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, images, (rows, images)) + np.arange(rows)[:, None] * images
        counts = np.bincount(drawn.ravel(), minlength=rows * images)
        yield counts.reshape(rows, images).astype(np.float64)


def _interval(scores: np.ndarray, draws: np.ndarray, images: int) -> Interval:
    low, high = np.nanquantile(draws, [0.025, 0.975]) if images > 1 else (np.nan, np.nan)
    return Interval(float(scores.mean()), float(low), float(high), tuple(map(float, scores)))
