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

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ssl_flow.evaluation.metrics import miou_of
from ssl_flow.evaluation.outcome import Outcome

_Score = Callable[[np.ndarray], np.ndarray]
_Sums = tuple[np.ndarray, _Score]
_CHUNK = 2**20  # numbers held at a time: draws times the larger of images and counts


@dataclass(frozen=True)
class Interval:
    """A score with its uncertainty over test images, and its values over seeds."""

    value: float  # the score; with several seeds, the mean of theirs
    low: float  # lower end of the interval over images; nan with fewer than two images
    high: float
    seeds: tuple[float, ...]  # the score of each seed

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
    the name of each image's group, of which all or none are drawn. ValueError for another shape,
    no images, a value that is not finite.
    """
    return _interval(_sums_of_values(values), _mean_of, resamples, seed, groups)


def interval_of_miou(
    counts: np.ndarray, resamples: int = 2000, seed: int = 0, groups: Sequence[str] | None = None
) -> Interval:
    """The same of the mIoU of images with counts (N, 3, K) or (S, N, 3, K).

    As in `ConfusionMatrix.miou`, of whose `sums` they are, a class that neither truth nor
    prediction of a draw has does not count in its mean. ValueError for another shape or no counted
    pixel at all.
    """
    return _interval(_sums_of_counts(counts), miou_of, resamples, seed, groups)


def interval_of_outcomes(
    outcomes: Sequence[Outcome], score: str, groups: Sequence[str] | None = None
) -> Interval:
    """95 % interval of one score of one encoder, from its outcomes under one or several seeds.

    Of `values[score]` where the score is a mean over images, of `counts` for `miou`; no interval
    (nan) where there is neither. ValueError for outcomes on different images.
    """
    found = _sums_of(outcomes, score)
    if found is None:
        seeds = tuple(o.scores[score] for o in outcomes)
        return Interval(float(np.mean(seeds)), math.nan, math.nan, seeds)
    return _interval(*found, groups=groups)


def interval_of_difference(
    a: Sequence[Outcome], b: Sequence[Outcome], score: str, groups: Sequence[str] | None = None
) -> Interval | None:
    """95 % interval of one score of encoder a less that of b, both scored on the same draws.

    The paired bootstrap: what makes an image hard for both is in neither end, so that it tells
    apart what two intervals side by side often cannot. None where the score has no interval;
    ValueError for outcomes on different images.
    """
    sums = [_sums_of(outcomes, score) for outcomes in (a, b)]
    if a[0].items != b[0].items:
        raise ValueError("the two encoders' outcomes are not of the same images in the same order")
    if sums[0] is None or sums[1] is None:
        return None
    (first, own), (second, other) = (_resampled(*found, groups=groups) for found in sums if found)
    return _ends(first - second, (float(np.mean(own) - np.mean(other)),))


def _sums_of(outcomes: Sequence[Outcome], score: str) -> _Sums | None:
    """What `_interval` takes first, or None where nothing is known of single images."""
    if not outcomes or any(o.items != outcomes[0].items for o in outcomes):
        raise ValueError("the outcomes are none, or not of the same images in the same order")
    if all(score in o.values for o in outcomes):
        return _sums_of_values(np.stack([o.values[score] for o in outcomes])), _mean_of
    counts = [o.counts for o in outcomes if o.counts is not None]
    if score != "miou" or len(counts) != len(outcomes):
        return None
    runs = [c.reshape(len(c), -1, *c.shape[-2:]).swapaxes(0, 1) for c in counts]  # (R, N, 3, K)
    return _sums_of_counts(np.concatenate(runs)), miou_of


def _sums_of_values(values: np.ndarray) -> np.ndarray:
    table = np.atleast_2d(np.asarray(values, np.float64))  # (S, N)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ValueError(f"expected finite values (N,) or (S, N), got {np.shape(values)}: {values}")
    return np.stack([table, np.ones_like(table)], -1)


def _mean_of(sums: np.ndarray) -> np.ndarray:
    """(..., 2) sums and sizes -> (...)."""
    mean: np.ndarray = sums[..., 0] / sums[..., 1]
    return mean


def _sums_of_counts(counts: np.ndarray) -> np.ndarray:
    table = np.asarray(counts, np.float64)
    table = table[None] if table.ndim == 3 else table
    if table.ndim != 4 or table.shape[2] != 3 or not table.any((1, 2, 3)).all():
        found = f"counts of shape {table.shape}"
        raise ValueError(f"{found}, expected (S, N, 3, K) with counted pixels")
    return table


def _interval(
    table: np.ndarray, score: _Score, resamples: int = 2000, seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Interval:  # fmt: skip
    """The score of what is summed over the N images of (S, N, ...), averaged over S."""
    return _ends(*_resampled(table, score, resamples, seed, groups))


def _resampled(
    table: np.ndarray, score: _Score, resamples: int = 2000, seed: int = 0,
    groups: Sequence[str] | None = None,
) -> tuple[np.ndarray, tuple[float, ...]]:  # fmt: skip
    """(resamples,) scores of draws, the same draws for the same N or groups; score of each of S."""
    if groups is not None:
        names, members = np.unique(groups, return_inverse=True)
        sums = np.zeros((len(table), len(names), *table.shape[2:]))
        for into, values in zip(sums, table, strict=True):
            np.add.at(into, members, values)
        table = sums
    units, width = table.shape[1], table[0, 0].size
    scores = tuple(float(score(s.sum(0))) for s in table)
    if units == 1:
        return np.full(resamples, np.nan), scores
    draws = [  # one of images without any counted pixel is nan, left out of the interval
        np.mean([score(np.tensordot(w, s, 1)) for s in table], axis=0)
        for w in _draws(units, width, resamples, seed)
    ]
    return np.concatenate(draws), scores


def _ends(draws: np.ndarray, scores: tuple[float, ...]) -> Interval:
    """Bounds of the draws around the mean of the scores; nan where no draw could be scored."""
    known = draws[~np.isnan(draws)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return Interval(float(np.mean(scores)), float(low), float(high), scores)


def _draws(images: int, width: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """(draws, images) how often each image is drawn; in parts, so that memory is bounded."""
    rng, step = np.random.default_rng(seed), max(1, _CHUNK // max(images, width))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, images, (rows, images)) + np.arange(rows)[:, None] * images
        counts = np.bincount(drawn.ravel(), minlength=rows * images)
        yield counts.reshape(rows, images).astype(np.float64)
