import math

import cv2
import numpy as np
import pytest
import torch

from ssl_flow.models import load_encoder


def _features(image):
    """Levels of an (H, W, 3) uint8 image: colour, position, gradients of each."""
    encoder = load_encoder("handmade")
    levels = encoder.features(encoder.normalize(torch.from_numpy(image)[None]))
    return [level[0].split([6, 2, 36]) for level in levels]


def _noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(32, 48), (37, 53), (5, 3)])
def test_shapes_for_any_image_size_and_no_weights(size):
    encoder = load_encoder("handmade")
    assert not list(encoder.parameters()) and not encoder.state_dict()
    levels = encoder.features(encoder.normalize(torch.from_numpy(_noise(*size))[None]))
    for level, stride, channels in zip(levels, encoder.strides, encoder.channels, strict=True):
        assert level.shape == (1, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert level.isfinite().all() and level.abs().max() < 5


def test_colours_are_those_of_opencv():
    image = _noise(16, 32)
    rgb = image.astype(np.float32) / 255
    expected = np.concatenate([rgb, cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB) / 100], axis=2)
    cells = expected.reshape(4, 4, 8, 4, 6).mean((1, 3))
    colour = _features(image)[0][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(colour, cells, atol=2e-3)  # OpenCV's Lab uses a table


def test_position_is_that_of_the_cells_centre():
    x, y = _features(_noise(24, 40))[1][1]  # stride 8
    torch.testing.assert_close(x[0], torch.tensor([-0.8, -0.4, 0.0, 0.4, 0.8]), atol=1e-6, rtol=0)
    torch.testing.assert_close(y[:, 0], torch.tensor([-2 / 3, 0, 2 / 3]), atol=1e-6, rtol=0)


def test_gradients_equal_loops_in_float64():
    """Dalal & Triggs, pixel by pixel; cells of 8 pixels."""
    image = _noise(16, 16).astype(float) / 255
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    cells = np.zeros((2, 2, 9))
    for i in range(16):
        for j in range(16):
            dx, dy = (
                padded[i + 1, j + 2] - padded[i + 1, j],
                padded[i + 2, j + 1] - padded[i, j + 1],
            )
            c = np.argmax(np.hypot(dx, dy))
            degrees = math.degrees(math.atan2(dy[c], dx[c])) % 180
            for b in range(9):  # centred on 10, 30, ... degrees; they wrap around
                distance = abs(degrees - (20 * b + 10))
                share = max(0, 1 - min(distance, 180 - distance) / 20)
                cells[i // 8, j // 8, b] += share * np.hypot(dx[c], dy[c]) / 64
    energy = np.pad((cells**2).sum(2), 1, mode="edge")
    expected = [
        np.minimum(
            cells[i, j] / (np.sqrt(energy[i + a : i + a + 2, j + b : j + b + 2].sum()) + 1e-2), 0.2
        )
        for i in range(2) for j in range(2) for a in (0, 1) for b in (0, 1)
    ]  # fmt: skip
    found = _features(_noise(16, 16))[1][2].permute(1, 2, 0)
    np.testing.assert_allclose(found.reshape(16, 9).numpy(), expected, atol=1e-5)


def test_an_edge_votes_for_its_orientation():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 18:] = 200
    across = _features(image)[1][2][:9, 1, 2]  # the cell of the edge: its gradient is horizontal
    down = _features(image.transpose(1, 0, 2).copy())[1][2][:9, 2, 1]
    assert across.argsort()[-2:].sort().values.tolist() == [0, 8]  # 0 degrees lies between them
    assert down.argmax() == 4 and down[:4].max() == 0
