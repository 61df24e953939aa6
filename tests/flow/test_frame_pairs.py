from collections import Counter

import numpy as np
import pytest

from ssl_flow.flow import Frame, VideoError
from ssl_flow.flow.pairs import pair_frames


def pairs(times, gap, every=None, shapes=None):
    images = [
        np.zeros((*(shapes[i] if shapes else (16, 16)), 3), np.uint8) for i in range(len(times))
    ]
    frames = [Frame(float(t), image) for t, image in zip(times, images, strict=True)]
    skipped = Counter()
    found = pair_frames(frames, gap, gap if every is None else every, skipped)
    return [(round(a.time, 3), round(b.time, 3)) for a, b in found], dict(skipped)


@pytest.mark.parametrize("fps", [10, 20, 30, 60])
def test_the_gap_is_a_time_whatever_the_frame_rate(fps):
    found, skipped = pairs(np.arange(fps * 2 + 1) / fps, gap=0.1)
    assert len(found) == 20
    assert all(b - a == pytest.approx(0.1) for a, b in found)
    assert found[0] == (0, 0.1) and found[1] == (0.1, 0.2)
    assert skipped == {}


def test_the_nearest_frame_is_taken():
    found, _ = pairs(np.arange(26) / 25, gap=0.1)  # 0.08 and 0.12 are equally near
    assert found[0] == (0, 0.12)
    assert pairs([0, 0.09, 0.14], gap=0.1)[0][0] == (0, 0.09)
    assert pairs([0, 0.05, 0.11], gap=0.1)[0][0] == (0, 0.11)


def test_every_sets_the_distance_of_the_starts():
    times = np.arange(41) / 20
    assert [a for a, _ in pairs(times, 0.1, every=0.5)[0]] == [0, 0.5, 1, 1.5]
    assert len(pairs(times, 0.1, every=0)[0]) == 39
    # On a grid the mean distance is right even if no frame lies on it.
    assert len(pairs(np.arange(251) / 25, 0.1)[0]) == pytest.approx(100, abs=2)


def test_no_pair_across_a_hole_in_time():
    times = [0, 0.1, 0.2, 1.0, 1.1, 1.2]
    found, skipped = pairs(times, 0.1)
    assert found == [(0, 0.1), (0.1, 0.2), (1.0, 1.1), (1.1, 1.2)]
    assert skipped == {"hole": 1}
    assert pairs([0, 1, 2], 0.1) == ([], {"hole": 2})
    assert pairs([0, 0.2, 0.4], 0.1)[0] == [(0, 0.2), (0.2, 0.4)]  # up to twice the gap


def test_no_pair_across_a_change_of_size():
    found, skipped = pairs([0, 0.1, 0.2], 0.1, shapes=[(16, 16), (16, 16), (16, 24)])
    assert found == [(0, 0.1)]
    assert skipped == {"size_change": 1}


def test_only_a_short_window_is_held():
    alive = []

    def frames():
        import weakref

        for i in range(300):
            frame = Frame(i / 30, np.zeros((16, 16, 3), np.uint8))
            alive.append(weakref.ref(frame))
            yield frame

    most = 0
    for _ in pair_frames(frames(), 0.5, 0.5, Counter()):
        most = max(most, sum(ref() is not None for ref in alive))
    assert most <= 4  # the pair, the start of the next, the one before


def test_of_the_frames_that_wait_for_a_partner_only_the_small_pictures_are_held():
    """A decoded frame of 4K takes 12 MB; one that is to be in no pair is not even shrunk."""
    made, waiting = set(), []

    def frames():
        for i in range(61):
            yield Frame(i / 60, lambda i=i: made.add(i) or np.zeros((16, 16, 3), np.uint8))
            waiting.append({j for j in starts if j <= i} - made)

    starts = {0, 20, 40, 60}
    assert len(list(pair_frames(frames(), 0.5, 1 / 3, Counter()))) == 2
    assert waiting == [set()] * 61
    assert made == starts | {30, 50}


@pytest.mark.parametrize("every", [0, 1e-5])
def test_time_stamps_that_are_absurdly_dense_are_named(every, monkeypatch):
    monkeypatch.setattr("ssl_flow.flow.pairs._MOST", 1_000_000)
    image = np.zeros((16, 16, 3), np.uint8)
    frames = (Frame(i * 1e-5, image) for i in range(20_000))
    with pytest.raises(VideoError, match=r"1303 pairs begin within one gap \(0\.1 s\), too many"):
        list(pair_frames(frames, 0.1, every, Counter()))
    frames = (Frame(i * 1e-5, image) for i in range(20_001))
    assert [f.time for f, _ in pair_frames(frames, 0.1, 0.1, Counter())] == pytest.approx(
        [0, 0.1], abs=2e-4
    )


def test_a_start_at_each_frame_of_a_fast_camera_is_no_error():
    assert len(pairs(np.arange(2400) / 240, 5, every=0)[0]) == 1200
