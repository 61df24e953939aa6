"""Bootstrap intervals: known answers, other people's mIoU, and coverage on synthetic sets."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from ssl_flow.evaluation import intervals
from ssl_flow.evaluation.intervals import (
    Interval,
    better,
    interval_of_difference,
    interval_of_mean,
    interval_of_miou,
    interval_of_outcomes,
)
from ssl_flow.evaluation.metrics import ConfusionMatrix
from ssl_flow.evaluation.outcome import Outcome


def _images(rng, images, classes=4):
    """(N, K, K) counts of images that differ in their classes and in how hard they are."""
    mix = rng.dirichlet(np.ones(classes), images)
    true = np.stack([rng.multinomial(400, m) for m in mix])  # (N, K)
    right = rng.beta(4, 2, images)[:, None, None]
    chance = np.eye(classes) * right + (1 - right) / classes  # (N, K, K)
    return rng.multinomial(true, chance)


def _sums(counts):
    """(N, K, K) -> (N, 3, K), what an outcome keeps."""
    return np.stack([counts.diagonal(axis1=1, axis2=2), counts.sum(2), counts.sum(1)], axis=1)


def test_coverage_of_the_mean():
    rng = np.random.default_rng(0)
    truth = 2 / 7  # the mean of Beta(2, 5)
    hits = 0
    for i in range(300):
        low_high = interval_of_mean(rng.beta(2, 5, 40), resamples=300, seed=i)
        hits += low_high.low <= truth <= low_high.high
    assert 0.89 <= hits / 300 <= 0.98


def test_coverage_of_miou():
    rng = np.random.default_rng(1)
    everything = ConfusionMatrix(4)
    everything.counts = torch.from_numpy(_images(rng, 50_000).sum(0))
    hits = 0
    for i in range(200):
        found = interval_of_miou(_sums(_images(rng, 40)), resamples=300, seed=i)
        hits += found.low <= everything.miou() <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_width_of_the_mean_is_the_normal_one_on_many_images():
    values = np.random.default_rng(2).normal(3, 2, 2000)
    found = interval_of_mean(values, resamples=4000)
    expected = 1.96 * values.std() / math.sqrt(2000)
    assert found.value == pytest.approx(values.mean()) and found.spread is None
    assert found.high - found.value == pytest.approx(expected, rel=0.08)
    assert found.value - found.low == pytest.approx(expected, rel=0.08)


def test_miou_is_that_of_torchmetrics_and_scikit_learn():
    jaccard_score = pytest.importorskip("sklearn.metrics").jaccard_score
    rng = np.random.default_rng(3)
    truth, prediction = rng.integers(0, 5, (2, 12, 30))
    prediction = np.where(rng.random(truth.shape) < 0.5, truth, prediction)
    counts = np.zeros((12, 5, 5), np.int64)
    for image in range(12):
        np.add.at(counts[image], (truth[image], prediction[image]), 1)
    found = interval_of_miou(_sums(counts)).value
    theirs = MulticlassJaccardIndex(5)(torch.from_numpy(prediction), torch.from_numpy(truth))
    assert found == pytest.approx(float(theirs), abs=1e-6)
    expected = jaccard_score(truth.ravel(), prediction.ravel(), average="macro")
    assert found == pytest.approx(expected, abs=1e-12)


def test_draws_are_scored_as_sets_and_absent_classes_left_out():
    """Against a loop that sums whole confusion matrices, with the draws of the same seed."""
    rng = np.random.default_rng(4)
    counts = _images(rng, 7)
    counts[1:, :, 3] = counts[1:, 3, :] = 0  # only the first image has class 3
    found = interval_of_miou(_sums(counts), resamples=50, seed=5)
    draws = np.random.default_rng(5).integers(0, 7, (50, 7))
    scores = []
    for draw in draws:
        matrix = ConfusionMatrix(4)
        for image in draw:
            matrix.counts += torch.from_numpy(counts[image])
        scores.append(matrix.miou())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))


def test_memory_is_bounded_without_changing_the_draws(monkeypatch):
    values = np.random.default_rng(6).random(50)
    counts = _sums(_images(np.random.default_rng(6), 50))
    whole = interval_of_mean(values), interval_of_miou(counts)
    sizes, draw = [], intervals._draws
    monkeypatch.setattr(intervals, "_CHUNK", 700)
    monkeypatch.setattr(
        intervals, "_draws", lambda *a: (sizes.append(w.size) or w for w in draw(*a))
    )
    assert (interval_of_mean(values), interval_of_miou(counts)) == whole
    assert max(sizes) <= 700 and len(sizes) == 2 * math.ceil(2000 / 14)
    assert interval_of_mean(values, seed=1) != whole[0]


def test_seeds_share_the_images_and_are_told_apart_from_them():
    rng = np.random.default_rng(7)
    values = rng.random(30)
    shifted = np.stack([values - 0.1, values, values + 0.1])
    one, three = interval_of_mean(values), interval_of_mean(shifted)
    assert three.seeds == pytest.approx((one.value - 0.1, one.value, one.value + 0.1))
    assert three.spread == pytest.approx(0.1)
    # images drawn jointly: the same interval, neither wider nor narrower
    assert (three.value, three.low, three.high) == pytest.approx((one.value, one.low, one.high))
    counts = _sums(_images(rng, 30))
    one, two = interval_of_miou(counts), interval_of_miou(np.stack([counts, counts]))
    assert two.seeds == (one.value, one.value) and two.spread == 0
    assert (two.value, two.low, two.high) == pytest.approx((one.value, one.low, one.high))


def test_images_of_a_group_are_drawn_together():
    """Against a loop that draws whole sequences and scores their images as one set."""
    rng = np.random.default_rng(9)
    groups = ["a", "b", "a", "c", "b", "a"]  # unequal: the mean is of the images, not the groups
    values, counts = rng.random(6), _sums(_images(rng, 6))
    members = [[i for i, name in enumerate(groups) if name == group] for group in "abc"]
    means, mious = [], []
    for draw in np.random.default_rng(5).integers(0, 3, (50, 3)):
        drawn = [i for group in draw for i in members[group]]
        means.append(values[drawn].mean())
        mious.append(interval_of_miou(counts[drawn]).value)
    for run, table, scores in (
        (interval_of_mean, values, means), (interval_of_miou, counts, mious)
    ):  # fmt: skip
        found = run(table, resamples=50, seed=5, groups=groups)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))
        assert found.value == pytest.approx(run(table).value)
    copied = interval_of_mean(np.tile(values, 10), groups=list("abcdef") * 10)
    assert (copied.low, copied.high) == pytest.approx(
        (interval_of_mean(values).low, interval_of_mean(values).high)
    )  # ten copies tell no more than one
    outcome = Outcome({"J": 0.5}, values={"J": values}, items=[f"{g}/object" for g in groups])
    assert interval_of_outcomes([outcome], "J", groups=groups) == interval_of_mean(
        values, groups=groups
    )


def test_one_image_has_no_interval_and_is_never_better():
    for found in (interval_of_mean(np.array([0.7])), interval_of_miou(np.ones((1, 3, 3)))):
        assert found.value in (0.7, 1.0) and math.isnan(found.low) and math.isnan(found.high)
        low = Interval(0.1, 0.05, 0.15, (0.1,))
        assert not better(found, low) and not better(low, found)


def test_better_only_without_overlap():
    high, low = Interval(0.7, 0.65, 0.75, (0.68, 0.72)), Interval(0.5, 0.45, 0.55, (0.5,))
    assert better(high, low) and not better(low, high)
    assert better(low, high, larger_is_better=False)
    assert not better(high, Interval(0.6, 0.5, 0.66, (0.6,)))
    assert not better(high, Interval(0.5, 0.45, 0.55, (0.3, 0.7)))  # a seed of it beat one of high
    assert not better(high, high)


def test_outcomes():
    rng = np.random.default_rng(8)
    counts, values = _sums(_images(rng, 6)), rng.random(6)
    names = [f"image{i}" for i in range(6)]

    def outcome(**given):
        return Outcome({"miou": 0.5}, **({"counts": counts, "items": names} | given))

    both = [outcome(values={"J&F": values}), outcome(values={"J&F": values + 1})]
    assert interval_of_outcomes(both, "miou") == interval_of_miou(np.stack([counts, counts]))
    expected = interval_of_mean(np.stack([values, values + 1]))
    assert interval_of_outcomes(both, "J&F") == expected
    for one in both:
        one.scores["accuracy"] = 0.25  # nothing of single images: the seeds alone tell
    found = interval_of_outcomes(both, "accuracy")
    assert (found.value, found.seeds) == (0.25, (0.25, 0.25)) and math.isnan(found.low)
    for bad in ([], [outcome(), outcome(items=names[::-1])]):
        with pytest.raises(ValueError, match="not of the same images"):
            interval_of_outcomes(bad, "miou")


def _outcome(rng, names, counts=None, values=None):
    return Outcome({"miou": 0.5, "J": 0.5}, counts, {} if values is None else {"J": values}, names)


def test_a_difference_is_of_the_same_draws():
    """Against loops over the draws of the same seed, of single images and of whole groups."""
    rng = np.random.default_rng(10)
    names = [f"{group}/{i}" for i, group in enumerate("abacba")]
    groups = [name[0] for name in names]
    members = [[i for i, name in enumerate(groups) if name == group] for group in "abc"]
    a, b = (_outcome(rng, names, _sums(_images(rng, 6)), rng.random(6)) for _ in range(2))
    found = interval_of_difference([a], [b], "miou")
    gaps = []
    for draw in np.random.default_rng(0).integers(0, 6, (2000, 6)):
        one, two = (interval_of_miou(x.counts[draw], resamples=1).value for x in (a, b))
        gaps.append(one - two)
    assert found.value == pytest.approx(
        interval_of_miou(a.counts).value - interval_of_miou(b.counts).value
    )
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(gaps, [0.025, 0.975])))
    found = interval_of_difference([a], [b], "J", groups)
    gaps = []
    for draw in np.random.default_rng(0).integers(0, 3, (2000, 3)):
        drawn = [i for group in draw for i in members[group]]
        gaps.append((a.values["J"] - b.values["J"])[drawn].mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(gaps, [0.025, 0.975])))
    turned = interval_of_difference([b], [a], "J", groups)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_a_difference_tells_apart_what_two_intervals_cannot():
    rng = np.random.default_rng(11)
    names, hard = list(map(str, range(60))), rng.random(60)  # images differ far more than encoders
    a = _outcome(rng, names, values=hard + 0.02 + rng.normal(0, 0.01, 60))
    b = _outcome(rng, names, values=hard)
    assert not better(interval_of_outcomes([a], "J"), interval_of_outcomes([b], "J"))
    assert interval_of_difference([a], [b], "J").low > 0
    again = interval_of_difference([a, a], [b], "J")  # seeds of one row are averaged
    assert again.low == pytest.approx(interval_of_difference([a], [b], "J").low)
    assert interval_of_difference([a], [b], "miou") is None  # nothing of single images
    with pytest.raises(ValueError, match="the two encoders' outcomes are not of the same images"):
        interval_of_difference([a], [_outcome(rng, names[::-1], values=hard)], "J")
    one = [_outcome(rng, ["x"], values=np.array([v])) for v in (0.25, 0.5)]
    assert math.isnan(interval_of_difference(one[:1], one[1:], "J").low)


def test_memory_is_linear_in_the_groups():
    """A set of images has as many groups as images: a table of both would be gigabytes."""
    names = [f"class/{i}.jpg" for i in range(3000)]
    tracemalloc.start()
    interval_of_mean(np.arange(3000.0), resamples=10, groups=names)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6  # bytes; 3000 x 3000 numbers are 72e6


def test_bad_input():
    for bad in (np.array([0.1, np.nan]), np.array([])):
        with pytest.raises(ValueError, match=r"expected finite values \(N,\)"):
            interval_of_mean(bad)
    for bad in (np.ones((3, 3)), np.ones((1, 2, 4, 3)), np.ones((0, 3, 3)), np.zeros((2, 3, 3))):
        with pytest.raises(ValueError, match=r"expected \(S, N, 3, K\) with counted pixels"):
            interval_of_miou(bad)
