import cv2
import numpy as np
import pytest
import torch
from clips import texture

from ssl_flow.flow import OPTIONS
from ssl_flow.flow.farneback import GAUSSIAN, _expansion, farneback


def shifted(dx, dy, height=64, width=96):
    """A grey pair (1, H, W) whose picture moves by (dx, dy)."""
    big = cv2.cvtColor(texture(1, height + 64, width + 64), cv2.COLOR_RGB2GRAY)
    parts = [big[32 - y : 32 - y + height, 32 - x : 32 - x + width] for x, y in ((0, 0), (dx, dy))]
    return [torch.from_numpy(part.copy())[None] for part in parts]


def test_the_expansion_is_the_weighted_least_squares_fit():
    radius, sigma = 3, 1.1
    image = np.random.default_rng(0).uniform(0, 255, (12, 13))
    got = _expansion(torch.from_numpy(image)[None, None].float(), radius, sigma)[0].numpy()
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    weight = np.exp(-(x * x + y * y) / (2 * sigma**2)).ravel()
    basis = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], -1).reshape(-1, 6)
    for row, column in ((3, 3), (5, 8), (8, 9)):
        part = image[row - radius : row + radius + 1, column - radius : column + radius + 1]
        fit = np.linalg.solve(basis.T * weight @ basis, basis.T * weight @ part.ravel())
        expected = [fit[1], fit[2], fit[3], fit[4], fit[5] / 2]
        np.testing.assert_allclose(got[:, row, column], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("dx", "dy"), [(1.5, 0), (-0.25, 2), (3.3, -1.7)])
def test_the_shift_of_a_quadratic_is_found_exactly(dx, dy):
    y, x = np.mgrid[:60, :70] - np.array([30, 35])[:, None, None]

    def quadratic(x, y):
        return torch.from_numpy(2 * x * x - x * y + 1.5 * y * y + x)[None]

    flow = farneback(quadratic(x, y), quadratic(x - dx, y - dy), levels=0, iterations=2)
    inside = flow[0, :, 16:-16, 16:-16]
    expected = torch.tensor([dx, dy]).float()[:, None, None].expand_as(inside)
    torch.testing.assert_close(inside, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("flags", [0, GAUSSIAN])
@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (0, 2), (-12, 9)])
def test_translation_has_the_right_sign_and_axis_order(dx, dy, flags):
    flow = farneback(*shifted(dx, dy, 128, 160), flags=flags)[0, :, 24:-24, 24:-24]
    median = flow.flatten(1).median(1).values
    torch.testing.assert_close(median, torch.tensor([dx, dy]).float(), rtol=0, atol=0.1)


@pytest.mark.parametrize("flags", [0, GAUSSIAN])
def test_flow_is_near_opencvs_with_the_same_options(flags):
    first = cv2.cvtColor(texture(1, 128, 160), cv2.COLOR_RGB2GRAY)
    second = cv2.warpAffine(first, cv2.getRotationMatrix2D((80, 64), 2, 1.02), (160, 128))
    options = {**OPTIONS["farneback"], "flags": flags}
    expected = cv2.calcOpticalFlowFarneback(first, second, None, **options)
    pair = (torch.from_numpy(image)[None] for image in (first, second))
    flow = farneback(*pair, **options)[0].permute(1, 2, 0).numpy()
    difference = np.linalg.norm(flow - expected, axis=-1)[16:-16, 16:-16]
    assert difference.mean() < 0.1
    assert np.linalg.norm(expected, axis=-1).mean() > 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pyr_scale", 0.8),
        ("levels", 1),
        ("winsize", 9),
        ("iterations", 1),
        ("poly_n", 7),
        ("poly_sigma", 1.5),
        ("flags", GAUSSIAN),
    ],
)
def test_every_option_changes_the_flow(name, value):
    pair = shifted(5, 3)
    assert not torch.equal(farneback(*pair), farneback(*pair, **{name: value}))


def test_every_option_is_tested():
    values = test_every_option_changes_the_flow.pytestmark[0].args[1]
    assert {name for name, _ in values} == set(OPTIONS["farneback"])


def test_a_batch_gives_the_flow_of_its_pairs():
    pairs = [shifted(*d) for d in ((3, 0), (0, 2), (-2, 1))]
    together = farneback(*(torch.cat(images) for images in zip(*pairs, strict=True)))
    for flow, pair in zip(together, pairs, strict=True):
        torch.testing.assert_close(flow, farneback(*pair)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 17, 31), (1, 101, 63), (0, 32, 48)])
def test_any_size_works(shape):
    torch.manual_seed(0)
    flow = farneback(*(255 * torch.rand(shape) for _ in range(2)))
    assert flow.shape == (shape[0], 2, *shape[1:])
    assert flow.isfinite().all()


def test_no_texture_gives_no_flow():
    flat = torch.full((1, 32, 32), 90)
    assert farneback(flat, flat).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pyr_scale": 1.0}, "step of 1.0"),
        ({"levels": -1}, "levels 0"),
        ({"winsize": 0}, "winsize 0"),
        ({"iterations": 0}, "iterations 0"),
        ({"poly_n": 0}, "poly_n 0"),
        ({"poly_sigma": 0.0}, "poly_sigma must be above 0"),
        ({"flags": 4}, "flags 0 or 256"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        farneback(*shifted(1, 0), **options)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"two tensors \(B, H, W\)"):
        farneback(torch.zeros(1, 32, 32), torch.zeros(1, 32, 33))


def test_endpoint_error_on_middlebury_is_opencvs_or_less(data):
    errors = []
    for folder in sorted((data / "flow/middlebury").iterdir()):
        first, second = (
            cv2.imread(str(folder / f"frame{i}.png"), cv2.IMREAD_GRAYSCALE) for i in (10, 11)
        )
        truth = cv2.imread(str(folder / "flow10.png"), cv2.IMREAD_UNCHANGED)  # known, v, u
        true_flow = (truth[..., :0:-1].astype(np.float32) - 32768) / 64
        pair = (torch.from_numpy(image)[None] for image in (first, second))
        flows = (
            farneback(*pair)[0].permute(1, 2, 0).numpy(),
            cv2.calcOpticalFlowFarneback(first, second, None, **OPTIONS["farneback"]),
        )
        known = truth[..., 0] > 0
        errors.append([np.linalg.norm(f - true_flow, axis=-1)[known].mean() for f in flows])
    ours, opencvs = np.mean(errors, axis=0)
    assert ours < opencvs + 0.02


def test_what_leaves_the_picture_has_no_weight():
    flow = farneback(*shifted(6, 0, 96, 128))[0, :, 16:-16, -12:]  # moves beyond the right edge
    assert (flow - torch.tensor([6.0, 0])[:, None, None]).norm(dim=0).median() < 0.3
