import pickle

import cv2
import numpy as np
import pytest

from ssl_flow.data.synthetic import CLASSES, SyntheticVideo, synthetic_sources


def _eroded_objects(video, t):
    """Which layer is seen, -1 near any edge between layers (occlusion may begin there)."""
    seen = video.visible(t).astype(np.uint8)
    inner = np.zeros(seen.shape, bool)
    for index in np.unique(seen):
        inside = cv2.copyMakeBorder((seen == index).astype(np.uint8), *[1] * 4, cv2.BORDER_CONSTANT)
        inner |= cv2.erode(inside, np.ones((9, 9)))[1:-1, 1:-1] > 0
    return np.where(inner, seen, -1)


def test_same_seed_same_pixels_other_seed_other_pixels():
    a, b, c = SyntheticVideo(3), SyntheticVideo(3), SyntheticVideo(4)
    assert np.array_equal(a.frame(5), b.frame(5)) and np.array_equal(a.flow(5), b.flow(5))
    assert np.array_equal(a.frame(5), a.frame(5))  # whatever was asked before
    assert not np.array_equal(a.frame(5), c.frame(5))


def test_shapes_and_classes():
    video = SyntheticVideo(0, frames=4, size=96)
    assert video.frame(0).shape == (96, 96, 3) and video.frame(0).dtype == np.uint8
    assert video.mask(0).shape == (96, 96) and video.mask(0).dtype == np.uint8
    assert video.flow(0).shape == (96, 96, 2) and video.flow(0).dtype == np.float32
    shares = np.bincount(
        np.concatenate([SyntheticVideo(s).mask(6).ravel() for s in range(40)]), minlength=5
    )
    assert len(shares) == len(CLASSES) == 5
    assert (shares / shares.sum() > 0.02).all() and shares[0] / shares.sum() < 0.92


@pytest.mark.parametrize("seed", [0, 7])
def test_true_flow_takes_a_frame_to_the_next(seed):
    video = SyntheticVideo(seed)
    flow = video.flow(4)
    y, x = np.mgrid[:128, :128].astype(np.float32)
    there = x + flow[..., 0], y + flow[..., 1]
    back = cv2.remap(video.frame(5).astype(np.float32), *there, cv2.INTER_LINEAR).mean(2)
    still = video.frame(5).astype(np.float32).mean(2)
    now = video.frame(4).astype(np.float32).mean(2)
    seen, then = _eroded_objects(video, 4), _eroded_objects(video, 5)
    followed = cv2.remap(then.astype(np.float32), *there, cv2.INTER_NEAREST, borderValue=-1)
    for layer in set(np.unique(seen)) - {-1}:
        inner = (seen == layer) & (followed == layer)
        if inner.sum() < 50:
            continue
        error, unmoved = abs(back - now)[inner].mean(), abs(still - now)[inner].mean()
        assert error < 12  # noise, resampling and the fixed light
        assert error < 0.6 * unmoved or unmoved < 12


def test_estimated_flow_agrees_with_the_true_one():
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    errors = []
    for seed in range(4):
        video = SyntheticVideo(seed)
        a, b = (cv2.cvtColor(video.frame(t), cv2.COLOR_RGB2GRAY) for t in (5, 6))
        errors.append(np.linalg.norm(dis.calc(a, b, None) - video.flow(5), axis=2).ravel())
    assert np.median(np.concatenate(errors)) < 0.3


def test_objects_move_on_their_own():
    video = SyntheticVideo(1)
    flow, seen = video.flow(6), video.visible(6)
    means = [flow[seen == layer].mean(0) for layer in np.unique(seen)]
    assert len(means) >= 3
    assert min(np.linalg.norm(m - means[0]) for m in means[1:]) > 0.3
    speeds = np.concatenate(
        [np.linalg.norm(SyntheticVideo(s).flow(6), axis=2).ravel() for s in range(5)]
    )
    assert speeds.max() < 6


def test_sources_are_picklable_and_disjoint_from_the_stills():
    sources = synthetic_sources(3, seed=1)
    assert len({s.name for s in sources}) == 3
    assert {s.name for s in sources}.isdisjoint(s.name for s in synthetic_sources(3, seed=2))
    frames = list(pickle.loads(pickle.dumps(sources[0])).frames(64))
    assert len(frames) == 12 and frames[0].image.shape == (64, 64, 3)
    assert frames[3].time == pytest.approx(0.3)
    seed = int(sources[0].name.removeprefix("synthetic-"))
    full = next(iter(sources[0].frames(None)))
    assert seed < 1_000_000 and np.array_equal(full.image, SyntheticVideo(seed).frame(0))
    with pytest.raises(ValueError, match="count"):
        synthetic_sources(0, seed=0)
