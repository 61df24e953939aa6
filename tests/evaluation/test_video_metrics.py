"""J and F against loops written from the definition, and by hand."""

import math

import numpy as np
import pytest

from ssl_flow.evaluation.video_metrics import (
    boundary_f,
    davis_summary,
    region_similarity,
    sequence_scores,
)


def _naive_boundary(mask):
    """Pixels of which the neighbour to the right, below, or both, inside the image, differs."""
    height, width = mask.shape
    return [
        (y, x)
        for y in range(height)
        for x in range(width)
        if any(
            mask[y, x] != mask[min(y + dy, height - 1), min(x + dx, width - 1)]
            for dy, dx in ((0, 1), (1, 0), (1, 1))
        )
    ]


def _naive_f(prediction, truth, tolerance=0.008):
    radius = math.ceil(tolerance * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
    mine, theirs = _naive_boundary(prediction), _naive_boundary(truth)
    if not mine or not theirs:
        return 1.0 if not mine and not theirs else 0.0

    def matched(points, others):
        near = [any(math.dist(p, o) <= radius for o in others) for p in points]
        return sum(near) / len(near)

    precision, recall = matched(mine, theirs), matched(theirs, mine)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("tolerance", [0.008, 0.05, 0.1])
def test_boundary_f_against_loops(tolerance):
    rng = np.random.default_rng(0)
    for height, width in ((24, 31), (17, 40), (1, 9)):
        for density in (0.02, 0.3, 0.98):
            masks = rng.random((2, height, width)) < density
            smooth = np.zeros((2, height, width), bool)  # blobs that touch the border, too
            for i in range(2):
                top, left = rng.integers(0, height), rng.integers(0, width)
                smooth[i, top : top + 9, left : left + 12] = True
            for pair in (masks, smooth):
                expected = _naive_f(*pair, tolerance)
                assert boundary_f(*pair, tolerance) == pytest.approx(expected, abs=1e-12)


def _square(top, left, size=20, shape=(100, 100)):
    mask = np.zeros(shape, bool)
    mask[top : top + size, left : left + size] = True
    return mask


def test_by_hand():
    square, empty = _square(40, 40), np.zeros((100, 100), bool)
    assert region_similarity(square, square) == boundary_f(square, square) == 1
    assert region_similarity(empty, empty) == boundary_f(empty, empty) == 1
    assert region_similarity(square, empty) == boundary_f(square, empty) == 0
    assert boundary_f(empty, square) == 0
    assert region_similarity(square, _square(40, 50)) == pytest.approx(200 / 600)
    # ceil(0.008 * 141.4) = 2 pixels: a shift by 2 is inside the tolerance, one by 3 is not
    assert boundary_f(square, _square(40, 42)) == 1
    assert 0.4 < boundary_f(square, _square(40, 43)) < 1
    assert boundary_f(square, _square(0, 0)) == 0
    # a boundary runs along the image's border nowhere: the whole image has none
    assert boundary_f(~empty, empty) == 1 and region_similarity(~empty, empty) == 0


def test_first_and_last_frame_and_the_objects():
    truth = np.zeros((30, 30), np.uint8)
    truth[5:15, 5:15], truth[20:28, 20:28] = 1, 2
    only_first = np.where(truth == 2, 0, truth)
    nothing = np.zeros_like(truth)
    scores = sequence_scores(iter([nothing, truth, only_first, nothing]), [truth] * 4, objects=2)
    assert scores.tolist() == [[[1, 1], [1, 1]], [[1, 1], [0, 0]]]
    swapped = np.array([0, 2, 1], np.uint8)[truth]  # the identity of the objects counts
    assert sequence_scores([truth, swapped, truth], [truth] * 3, objects=2).max() == 0


def test_mean_recall_decay_over_objects():
    falling = np.stack([np.linspace(1, 0, 9), np.full(9, 0.25)], -1)  # J falls, F stays
    perfect = np.ones((2, 5, 2))  # another sequence with two objects and fewer frames
    summary = davis_summary([falling[None], perfect])
    assert next(iter(summary)) == "J&F mean"
    assert summary["J mean"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert summary["F mean"] == pytest.approx((0.25 + 1 + 1) / 3)
    assert summary["J&F mean"] == pytest.approx((summary["J mean"] + summary["F mean"]) / 2)
    assert summary["J recall"] == pytest.approx((4 / 9 + 1 + 1) / 3)  # 0.5 itself is not above
    # 9 frames: the first quarter is frames 0..2, the last 6..8: 0.875 - 0.125
    assert summary["J decay"] == pytest.approx(0.75 / 3)
    assert summary["F decay"] == 0


def test_bad_sequences():
    mask = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="2 frames: without the first and the last"):
        sequence_scores([mask] * 2, [mask] * 2, 1)
    with pytest.raises(ValueError, match=r"frame 1: prediction \(4, 4\), truth \(5, 4\) differ"):
        sequence_scores([mask] * 3, [mask, np.zeros((5, 4), np.uint8), mask], 1)
    with pytest.raises(ValueError, match="frame 0 predicts object 2 of 1"):
        sequence_scores([mask + 2] * 3, [mask] * 3, 1)
    with pytest.raises(ValueError, match="longer"):
        sequence_scores([mask] * 3, [mask] * 4, 1)
