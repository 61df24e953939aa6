"""Joint geometry: augmenting frames and recomputing flow agrees with augmenting the flow."""

import cv2
import numpy as np
import pytest
import torch

from ssl_flow.data.pairs import (
    FlowPairs,
    Geometry,
    jitter_color,
    normalize_flow,
    sample_geometry,
    transform_flow,
    transform_frame,
)
from ssl_flow.flow import Sample, optical_flow


def textured(height, width, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.uniform(0, 255, (height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.0)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def moving_pair(height=160, width=200):
    """A frame, the next one under a known smooth affine motion, and its flow."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    x, y = columns - width / 2, rows - height / 2
    flow = np.dstack([2.5 + 0.02 * x - 0.01 * y, -1.5 + 0.015 * x + 0.01 * y]).astype(np.float32)
    first = textured(height, width)
    # second(p + flow(p)) = first(p): solve for the source of each pixel of the second frame.
    source = np.dstack([columns, rows])
    for _ in range(20):
        here = cv2.remap(flow, source[..., 0], source[..., 1], cv2.INTER_LINEAR)
        source = np.dstack([columns, rows]) - here
    second = cv2.remap(
        first, source[..., 0], source[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
    )
    return first, second, flow


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(10, 20, 128, 128, 128, False),
        Geometry(10, 20, 128, 128, 128, True),
        Geometry(5, 30, 96, 128, 128, False),  # another aspect ratio: u and v scale differently
        Geometry(0, 0, 160, 200, 96, True),
        Geometry(40, 40, 64, 64, 128, True),
    ],
)
def test_augmented_flow_is_the_flow_of_augmented_frames(geometry):
    first, second, flow = moving_pair()
    recomputed = optical_flow(
        transform_frame(first, geometry), transform_frame(second, geometry), method="dis"
    )
    transformed, weight = transform_flow(flow, np.ones(flow.shape[:2], bool), geometry, stride=1)
    assert transformed.shape == recomputed.shape
    np.testing.assert_allclose(weight, 1, atol=1e-6)
    error = np.linalg.norm(recomputed - transformed, axis=-1)[12:-12, 12:-12]
    motion = np.linalg.norm(transformed, axis=-1).mean()
    assert np.median(error) < 0.1 * motion, (np.median(error), motion)


def test_grid_flow_is_the_area_average_of_the_pixel_flow():
    rng = np.random.default_rng(0)
    flow = rng.normal(size=(64, 64, 2)).astype(np.float32)
    geometry = Geometry(0, 0, 64, 64, 64, False)
    grid, _ = transform_flow(flow, np.ones((64, 64), bool), geometry, stride=4)
    expected = flow.reshape(16, 4, 16, 4, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(grid, expected, atol=1e-5)


def test_untrusted_flow_is_left_out_and_its_cells_weigh_less():
    flow = np.ones((32, 32, 2), np.float32)
    valid = np.ones((32, 32), bool)
    flow[:4, :4], valid[:4, :4] = np.nan, False  # a whole cell of the grid
    flow[8, 8], valid[8, 8] = 1e6, False  # one pixel of sixteen
    grid, weight = transform_flow(flow, valid, Geometry(0, 0, 32, 32, 32, False))
    assert weight[0, 0] == 0
    assert weight[2, 2] == pytest.approx(15 / 16)
    assert (weight[weight > 0] > 0.5).all()
    np.testing.assert_allclose(grid[weight > 0], 1, rtol=1e-5)


def test_flip_negates_u_and_mirrors_both():
    flow = np.zeros((32, 32, 2), np.float32)
    flow[:, :16] = (3, 1)
    grid, _ = transform_flow(flow, np.ones((32, 32), bool), Geometry(0, 0, 32, 32, 32, True))
    np.testing.assert_allclose(grid[:, 4:], np.broadcast_to([-3, 1], (8, 4, 2)))
    np.testing.assert_allclose(grid[:, :4], 0)


def test_sampled_crops_lie_inside_and_respect_the_scale():
    rng = np.random.default_rng(0)
    for _ in range(500):
        g = sample_geometry(rng, 90, 160, 64, 0.25)
        assert 0 <= g.top <= 90 - g.height
        assert 0 <= g.left <= 160 - g.width
        assert 0.2 <= g.height * g.width / 90**2 <= 1.05
        assert 0.7 <= g.width / g.height <= 1.4


def test_color_jitter_changes_colours_only_and_can_be_off():
    frame = textured(32, 32)
    assert jitter_color(frame, np.random.default_rng(0), 0.0) is frame
    changed = jitter_color(frame, np.random.default_rng(0), 0.4)
    assert changed.shape == frame.shape
    assert changed.dtype == np.uint8
    assert not np.array_equal(changed, frame)
    grey = np.full((4, 4, 3), 128, np.uint8)
    still_grey = jitter_color(grey, np.random.default_rng(1), 0.4).astype(int)
    assert np.ptp(still_grey, axis=-1).max() <= 1


def test_standardised_flow_has_zero_mean_and_unit_deviation_over_trusted_pixels():
    torch.manual_seed(0)
    flow = 3 + 5 * torch.randn(2, 2, 16, 16)
    weight = (torch.rand(2, 16, 16) > 0.3).float()
    flow[:, :, 0, 0], weight[:, 0, 0] = float("nan"), 0
    out = normalize_flow(flow, weight)
    w = weight.unsqueeze(1)
    assert out.isfinite().all()
    torch.testing.assert_close((w * out).sum((2, 3)) / w.sum((2, 3)), torch.zeros(2, 2))
    spread = ((w * out.square()).sum((1, 2, 3)) / (2 * weight.sum((1, 2)))).sqrt()
    torch.testing.assert_close(spread, torch.ones(2))


def test_noise_of_a_still_image_is_not_blown_up():
    flow = 0.01 * torch.randn(1, 2, 16, 16)
    assert normalize_flow(flow, torch.ones(1, 16, 16)).abs().max() < 0.5


def test_log_and_none_normalisation():
    flow = torch.tensor([[-50.0, 0.0, 5.0]]).view(1, 1, 1, 3).expand(1, 2, 1, 3)
    weight = torch.ones(1, 1, 3)
    log = normalize_flow(flow, weight, "log")[0, 0, 0]
    torch.testing.assert_close(log, torch.tensor([-1.0, 0.0, np.log(6) / np.log(51)]).float())
    assert torch.equal(normalize_flow(flow, weight, "none"), flow)
    with pytest.raises(ValueError, match="standardize, log, none"):
        normalize_flow(flow, weight, "l2")


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
    pairs = FlowPairs(
        UnevenStore(), length=120, side=32, min_scale=1.0, color_jitter=0.0, **options
    )
    return [int(pairs[k].image[0, 0, 0]) for k in range(120)]


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


def test_an_empty_store_is_refused():
    class EmptyStore(UnevenStore):
        source_numbers = np.array([], int)

        def __len__(self):
            return 0

    with pytest.raises(ValueError, match="no pairs"):
        FlowPairs(EmptyStore(), length=1)
