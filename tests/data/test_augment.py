"""Joint geometry: augmenting frames and recomputing flow agrees with augmenting the flow."""

import cv2
import numpy as np
import pytest
import torch

from ssl_flow.data.augment import augment, normalize_flow, resize
from ssl_flow.data.pairs import Window, collate
from ssl_flow.flow import optical_flow


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


def window(frame, flow=None, valid=None, flip=False, color=None):
    """A window as the loader's processes cut it out, of numpy arrays."""
    height, width = frame.shape[:2]
    flow = np.zeros((height, width, 2), np.float32) if flow is None else flow.copy()
    if valid is not None:
        flow[~valid] = np.nan
    color = np.eye(3, 4) if color is None else color
    return Window(torch.from_numpy(frame), torch.from_numpy(flow).half(), flip, color)


def augment_flow(flow, valid=None, side=None, flip=False, stride=4):
    """(H, W, 2) -> (side/stride, side/stride, 2) flow and weight of a batch of one."""
    side = side or len(flow)
    frame = np.zeros((*flow.shape[:2], 3), np.uint8)
    pair = augment(collate([window(frame, flow, valid, flip)]), (side, side), stride)
    return pair.flow[0].permute(1, 2, 0).numpy(), pair.weight[0].numpy()


@pytest.mark.parametrize(
    ("top", "left", "height", "width", "shape", "flip"),
    [
        (10, 20, 128, 128, (128, 128), False),
        (10, 20, 128, 128, (128, 128), True),
        (5, 30, 96, 128, (128, 128), False),  # another aspect ratio: u and v scale differently
        (0, 0, 160, 200, (96, 96), True),
        (40, 40, 64, 64, (128, 128), True),
        (10, 10, 120, 180, (96, 160), True),
    ],
)
def test_augmented_flow_is_the_flow_of_augmented_frames(top, left, height, width, shape, flip):
    first, second, flow = moving_pair()
    cut = np.s_[top : top + height, left : left + width]
    batch = collate([window(frame[cut], flow[cut], flip=flip) for frame in (first, second)])
    pair = augment(batch, shape, stride=1)
    recomputed = optical_flow(*pair.image.numpy(), method="dis")
    transformed = pair.flow[0].permute(1, 2, 0).numpy()
    assert transformed.shape == recomputed.shape == (*shape, 2)
    torch.testing.assert_close(pair.weight, torch.ones_like(pair.weight))
    error = np.linalg.norm(recomputed - transformed, axis=-1)[12:-12, 12:-12]
    motion = np.linalg.norm(transformed, axis=-1).mean()
    assert np.median(error) < 0.1 * motion, (np.median(error), motion)


@pytest.mark.parametrize(
    ("height", "width", "shape"),
    [(90, 121, (64, 64)), (150, 140, (32, 32)), (64, 64, (64, 64)), (90, 121, (32, 96))],
)
def test_shrinking_averages_areas_as_opencv_does(height, width, shape):
    frame = textured(height, width)
    flow = np.random.default_rng(0).normal(0, 3, (height, width, 2)).astype(np.float32)
    pair = augment(collate([window(frame, flow)]), shape)
    expected = cv2.resize(frame, shape[::-1], interpolation=cv2.INTER_AREA).astype(int)
    assert abs(pair.image[0].numpy().astype(int) - expected).max() <= 1
    grid = cv2.resize(flow, (shape[1] // 4, shape[0] // 4), interpolation=cv2.INTER_AREA)
    grid *= np.array([shape[1] / width, shape[0] / height], np.float32)
    np.testing.assert_allclose(pair.flow[0].permute(1, 2, 0), grid, atol=1e-3)  # float16 holds less


def test_growing_interpolates_linearly():
    images = torch.rand(2, 3, 20, 17)
    size, flip = torch.tensor([[20.0, 17.0]]).expand(2, 2), torch.tensor([False, True])
    expected = torch.nn.functional.interpolate(images, (48, 48), mode="bilinear")
    expected[1] = expected[1].flip(-1)
    torch.testing.assert_close(resize(images, size, flip, (48, 48)), expected)


def random_windows(shapes):
    rng = np.random.default_rng(0)
    windows = []
    for height, width, flip in shapes:
        flow = rng.normal(0, 5, (height, width, 2)).astype(np.float32)
        valid = rng.uniform(size=(height, width)) > 0.3
        color = rng.uniform(0, 0.6, (3, 4))
        windows.append(window(textured(height, width), flow, valid, flip, color))
    return windows


def test_a_window_is_the_same_whatever_else_is_in_the_batch():
    windows = random_windows([(40, 50, True), (64, 33, False), (30, 70, False)])
    together = augment(collate(windows), (48, 48))
    for i, one in enumerate(windows):
        alone = augment(collate([one]), (48, 48))
        assert (alone.image[0].int() - together.image[i].int()).abs().max() <= 1
        torch.testing.assert_close(alone.flow[0], together.flow[i])
        torch.testing.assert_close(alone.weight[0], together.weight[i])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_same_crops():
    windows = random_windows([(40, 50, True), (150, 133, False), (30, 170, True)])
    batch = collate(windows)
    here, there = (augment(b, (64, 64)) for b in (batch, batch.to(torch.device("cuda"))))
    assert (here.image.int() - there.image.cpu().int()).abs().max() <= 1
    torch.testing.assert_close(there.flow.cpu(), here.flow, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(there.weight.cpu(), here.weight, rtol=0, atol=1e-4)


def test_grid_flow_is_the_area_average_of_the_pixel_flow():
    flow = np.random.default_rng(0).integers(-99, 99, (64, 64, 2)).astype(np.float32) / 16
    grid, _ = augment_flow(flow)
    expected = flow.reshape(16, 4, 16, 4, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(grid, expected, atol=1e-5)


def test_untrusted_flow_is_left_out_and_its_cells_weigh_less():
    flow = np.ones((32, 32, 2), np.float32)
    valid = np.ones((32, 32), bool)
    flow[:4, :4], valid[:4, :4] = np.nan, False  # a whole cell of the grid
    flow[8, 8], valid[8, 8] = 1e6, False  # one pixel of sixteen
    grid, weight = augment_flow(flow, valid)
    assert weight[0, 0] == 0
    assert weight[2, 2] == pytest.approx(15 / 16)
    assert (weight[weight > 0] > 0.5).all()
    np.testing.assert_allclose(grid[weight > 0], 1, rtol=1e-5)


def test_flip_negates_u_and_mirrors_both():
    flow = np.zeros((32, 32, 2), np.float32)
    flow[:, :16] = (3, 1)
    grid, _ = augment_flow(flow, flip=True)
    np.testing.assert_allclose(grid[:, 4:], np.broadcast_to([-3, 1], (8, 4, 2)))
    np.testing.assert_allclose(grid[:, :4], 0)


def test_colour_is_a_matrix_and_a_part_of_the_mean():
    frame = textured(32, 32)
    color = np.random.default_rng(0).uniform(-0.3, 0.9, (3, 4))
    image = augment(collate([window(frame, color=color)]), (32, 32)).image[0].numpy()
    expected = frame @ color[:, :3].T + color[:, 3] * frame.mean()
    assert expected.max() > 255  # saturates
    assert abs(image - expected.clip(0, 255)).max() <= 0.51


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
