"""The order of examples, and the random windows and colours, depend on the seed alone."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from ssl_flow.data.pairs import FlowPairs, sample_color, sample_geometry
from ssl_flow.flow import Sample


@pytest.mark.parametrize(("aspect", "largest"), [(1, 90 * 90), (1.5, 90 * 135), (3, 160 * 53)])
def test_sampled_windows_lie_inside_and_respect_the_scale(aspect, largest):
    rng = np.random.default_rng(0)
    for _ in range(500):
        g = sample_geometry(rng, 90, 160, 0.25, aspect)
        assert 0 <= g.top <= 90 - g.height
        assert 0 <= g.left <= 160 - g.width
        assert 0.2 <= g.height * g.width / largest <= 1.05
        assert 0.7 <= g.width / g.height / aspect <= 1.4


def test_sampled_colours_keep_grey_grey_and_can_be_off():
    np.testing.assert_array_equal(sample_color(np.random.default_rng(0), 0.0), np.eye(3, 4))
    grey = np.array([128, 128, 128, 90])  # a colour, and the mean of its frame
    drawn = np.array([sample_color(np.random.default_rng(i), 0.4) for i in range(200)])
    np.testing.assert_allclose(np.ptp(drawn @ grey, axis=1), 0, atol=1e-9)
    # Without saturation all rows are equal; strength 0.4 makes a fifth of them so.
    dull = np.ptp(drawn[:, :, :3], axis=1).max(1) < 1e-9
    assert 0.1 < dull.mean() < 0.3


class UnevenStore:
    """Three videos of 2, 5 and 40 pairs; a pair knows its own number."""

    source_numbers = np.repeat([0, 1, 2], [2, 5, 40])

    def __len__(self):
        return 47

    def __getitem__(self, index):
        frame = np.full((32, 32, 3), index, np.uint8)
        flow = np.full((32, 32, 2), index, np.float32)
        return Sample(frame, flow, np.ones((32, 32), bool), {})


def drawn(**options):
    pairs = FlowPairs(UnevenStore(), length=120, min_scale=1.0, color_jitter=0.0, **options)
    return [int(pairs[k].frame[0, 0, 0]) for k in range(120)]


def test_every_video_is_seen_equally_often_and_every_pair_before_one_returns():
    order = drawn()
    videos = UnevenStore.source_numbers[order]
    assert all(sorted(videos[i : i + 3]) == [0, 1, 2] for i in range(0, 120, 3))
    for video, size in [(0, 2), (1, 5), (2, 40)]:
        mine = [index for index in order if UnevenStore.source_numbers[index] == video]
        assert len(mine) == 40
        assert len(set(mine[:size])) == size


def test_order_depends_on_the_seed_alone():
    assert drawn() == drawn()
    assert drawn() != drawn(seed=1)


def test_an_example_depends_on_its_number_alone():
    pairs, again = (FlowPairs(UnevenStore(), length=120) for _ in range(2))
    for k in (7, 100, 8, 7):
        one, other = pairs[k], again[k]
        assert one.flip == other.flip
        assert torch.equal(one.frame, other.frame)
        np.testing.assert_array_equal(one.color, other.color)
    assert not np.array_equal(pairs[7].color, pairs[8].color)


def test_untrusted_flow_is_marked():
    class HalfTrusted(UnevenStore):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            sample.valid[:, :16] = False
            return sample

    window = FlowPairs(HalfTrusted(), length=1, min_scale=1.0)[0]
    left = window.flow.shape[1] // 4
    assert window.flow[:, :left].isnan().all()
    assert window.flow[:, -1].isfinite().all()


def test_an_empty_store_is_refused():
    class EmptyStore(UnevenStore):
        source_numbers = np.array([], int)

        def __len__(self):
            return 0

    with pytest.raises(ValueError, match="no pairs"):
        FlowPairs(EmptyStore(), length=1)


def test_training_data_needs_no_video_decoder():
    check = "import sys, ssl_flow.data.pairs, ssl_flow.flow.store; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
