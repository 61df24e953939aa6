import numpy as np
import pytest
import torch
from fakes import FakeEncoder, lying

from ssl_flow.data.flow_pairs import FlowPair
from ssl_flow.evaluation.correspondence import Correspondence, run_correspondence

NAMES = ["pck_1px", "pck_3px", "pck_5px", "pck_0.05", "pck_0.1", "endpoint_error_px"]


def moved(flow, size=(64, 96), noise=None, name="fake"):
    """A canvas whose colours tell the place (or are noise), and another cut of it."""
    y, x = np.mgrid[:200, :200]
    canvas = np.stack([x, y, np.full_like(x, 255)], -1).astype(np.uint8)
    if noise is not None:
        canvas = np.random.default_rng(noise).integers(0, 256, canvas.shape, dtype=np.uint8)
    (u, v), (height, width) = flow, size
    first, second = (canvas[50 - dy :, 50 - dx :][:height, :width] for dx, dy in ((0, 0), (u, v)))
    truth = np.broadcast_to(np.float32(flow), (*size, 2))
    return FlowPair(first, second, truth, np.ones(size, bool), name)


def test_features_that_tell_every_pixel_find_its_match():
    pairs = [moved((5, -3)), moved((-20, 11), name="far")]
    result = run_correspondence(FakeEncoder(zero=0.5), pairs)
    assert list(result.scores) == NAMES
    assert [result.scores[name] for name in NAMES] == [1, 1, 1, 1, 1, 0]
    assert result.items == ["fake", "far"]
    zero = result.details["zero flow"]
    lengths = np.hypot([5, 20], [3, 11])
    assert zero["endpoint_error_px"] == pytest.approx(lengths.mean())
    assert zero["pck_0.1"] == 0.5 and zero["pck_3px"] == 0  # 9.6 pixels of the larger side 96
    assert result.details["floor"]["endpoint_error_px"] == 0


def test_values_are_those_of_the_pairs_and_scores_their_means():
    pairs = [moved((5, -3), noise=0), moved((2, 2), noise=1)]
    result = run_correspondence(FakeEncoder((2,), 0.5), pairs)
    alone = [run_correspondence(FakeEncoder((2,), 0.5), [pair]).scores for pair in pairs]
    for name in NAMES:
        expected = [scores[name] for scores in alone]
        np.testing.assert_allclose(result.values[name], expected)
        assert result.scores[name] == pytest.approx(np.mean(expected))
    assert 0 < result.scores["pck_1px"] < 1


def test_features_that_tell_nothing_are_at_chance():
    pair = moved((5, -3), noise=0)._replace(second=moved((0, 0), noise=1).second)
    result = run_correspondence(FakeEncoder(zero=0.5), [pair], Correspondence(query_step=4))
    area = np.pi * 5**2 / (64 * 96)  # of the pixels within 5 of the match
    assert result.scores["pck_5px"] < 4 * area and result.scores["endpoint_error_px"] > 20


def test_matches_are_those_of_a_search_over_all_pixels():
    """Against float64 cosines with all pixels."""
    pair = moved((6, 4), noise=0)
    pair = pair._replace(second=pair.second // 2)  # not all matches are right
    protocol = Correspondence(query_step=8)
    result = run_correspondence(FakeEncoder(zero=0.5), [pair], protocol)
    first, second = (x.astype(float) / 255 - 0.5 for x in (pair.first, pair.second))
    units = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (first, second)]
    ys, xs = (x.ravel() for x in np.mgrid[4:64:8, 4:96:8])
    inside = (xs + 6 < 96) & (ys + 4 < 64)
    best = (units[0][ys, xs] @ units[1].reshape(-1, 3).T).argmax(1)[inside]
    found = np.stack([best % 96, best // 96], 1)
    error = np.linalg.norm(found - np.stack([xs + 6, ys + 4], 1)[inside], axis=1)
    assert result.scores["endpoint_error_px"] == pytest.approx(error.mean()) and error.mean() > 1


def test_unknown_flow_and_matches_outside_are_not_asked_for():
    pair = moved((5, -3))
    known = np.zeros_like(pair.known)
    known[:, :40] = True
    flow = pair.flow.copy()
    flow[:, 40:] = (7, 7)  # wrong where it is not known
    result = run_correspondence(FakeEncoder(zero=0.5), [pair._replace(known=known, flow=flow)])
    assert result.scores["endpoint_error_px"] == 0
    gone = pair._replace(flow=np.full_like(flow, 100))
    with pytest.raises(ValueError, match="fake: no pixel of the grid has a known match"):
        run_correspondence(FakeEncoder(zero=0.5), [gone])


def test_flow_between_pixels_cannot_be_met_closer_than_the_floor():
    pair = moved((5, -3))
    result = run_correspondence(
        FakeEncoder(zero=0.5), [pair._replace(flow=pair.flow + np.float32(0.25))]
    )
    floor = result.details["floor"]["endpoint_error_px"]
    assert floor == pytest.approx(0.25 * 2**0.5) == result.scores["endpoint_error_px"]


def test_options_change_something():
    pair = moved((5, -3), noise=0)
    scores = [
        run_correspondence(FakeEncoder((4, 8), 0.5), [pair], Correspondence(**o)).scores
        for o in ({}, {"features": "stage2"}, {"query_step": 8})
    ]
    assert len({s["endpoint_error_px"] for s in scores}) == 3
    other = run_correspondence(
        FakeEncoder(zero=0.5), [pair], Correspondence(pixels=(2,), sides=(0.2,))
    )
    assert list(other.scores) == ["pck_2px", "pck_0.2", "endpoint_error_px"]


def test_bad_input():
    with pytest.raises(ValueError, match="query_step = 0, expected more than 0"):
        Correspondence(query_step=0)
    with pytest.raises(ValueError, match="no features 'stage2'"):
        run_correspondence(
            FakeEncoder(zero=0.5), [moved((0, 0))], Correspondence(features="stage2")
        )
    with pytest.raises(ValueError, match="no pairs"):
        run_correspondence(FakeEncoder(zero=0.5), [])
    pair = moved((0, 0))
    for change in ({"second": pair.second[:-1]}, {"flow": pair.flow[:, 1:]}):
        with pytest.raises(
            ValueError, match=r"fake: (second|flow) is \(\d+, \d+\), known \(64, 96\)"
        ):
            run_correspondence(FakeEncoder(), [pair._replace(**change)])
    with pytest.raises(ValueError, match=r"fake, first frame: the encoder's map has \(32, 48\)"):
        run_correspondence(lying(), [pair])
    broken = FakeEncoder()
    broken.scale.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="features of fake, first frame are not finite"):
        run_correspondence(broken, [moved((0, 0))])
    assert broken.training
