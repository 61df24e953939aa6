"""Farneback's optical flow for batches of pairs, on CPU and CUDA.

Written from the published equations: Farneback, "Two-Frame Motion Estimation Based on Polynomial
Expansion", SCIA 2003. Around each pixel an image is f(x) = x' A x + b' x + c (polynomial
expansion); a displacement d turns b into b - 2 A d, which gives two linear equations a pixel
(displacement estimation). They are averaged over a window and solved, again with the images shifted
by what was found (a priori displacement), from coarse to fine.

It differs from the paper in two places: the second image's coefficients are read between the
pixels, not at the nearest one, and a pixel that leaves the picture has weight 0. Options have the
names and the meaning of OpenCV's `calcOpticalFlowFarneback`, which runs on the CPU alone; there it
is faster than this.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .pyramid import Places, check, pyramid, resized, sample

GAUSSIAN = 256  # cv2.OPTFLOW_FARNEBACK_GAUSSIAN
_MIN_SIDE = 16  # no scale but the finest is smaller, pixels
# Added to the determinant, grey levels^4 / pixel^8: without texture there is no flow, not any flow.
_EPSILON = 1e-3


@torch.no_grad()
def farneback(
    first: Tensor,
    second: Tensor,
    *,
    pyr_scale: float = 0.5,
    levels: int = 3,
    winsize: int = 15,
    iterations: int = 3,
    poly_n: int = 5,
    poly_sigma: float = 1.2,
    flags: int = 0,
) -> Tensor:
    """Estimate where each pixel of `first` is found in `second`.

    Args:
        first, second: grey images (B, H, W), values 0 to 255 in any type, on one device.
        pyr_scale: size ratio of neighbouring scales, between 0 and 1.
        levels: upper bound for the number of scales below the finest.
        winsize: side of the window that the equations are averaged over, pixels; an even number
            counts as the next odd one.
        iterations: how often each scale solves for the displacement.
        poly_n: the polynomials are fitted to 2 `poly_n` + 1 pixels on each side.
        poly_sigma: deviation of the fit's Gaussian weight, pixels.
        flags: 256 (`cv2.OPTFLOW_FARNEBACK_GAUSSIAN`) weighs the window by a Gaussian, 0 equally.

    Returns:
        (B, 2, H, W) float32 on the device of `first`, in pixels, x to the right, y downwards:
        `first[b, y, x]` is seen at `second[b, y + flow[b, 1, y, x], x + flow[b, 0, y, x]]`.

    Raises ValueError where shapes are not as above, or an option is out of range.
    """
    counts = {"winsize": winsize, "iterations": iterations, "poly_n": poly_n}
    check(first, second, pyr_scale, levels=levels + 1, **counts)
    if poly_sigma <= 0 or flags not in (0, GAUSSIAN):
        raise ValueError(
            f"poly_sigma must be above 0 and flags 0 or {GAUSSIAN}, got {poly_sigma} and {flags}"
        )
    batch, height, width = first.shape
    if first.numel() == 0:
        return torch.zeros(batch, 2, height, width, device=first.device)
    images = torch.cat([first, second])[:, None].float()  # (2B, 1, H, W)
    scales = pyramid(images, pyr_scale, levels + 1, _MIN_SIDE)
    flow = scales[-1].new_zeros(batch, 2, *scales[-1].shape[2:])
    window = _window(winsize // 2, bool(flags), images)
    for images in reversed(scales):
        flow = resized(flow, images.shape[2:])
        before, after = _expansion(images, poly_n, poly_sigma).chunk(2)
        places = Places(flow)
        for _ in range(iterations):
            flow = _displacement(before, after, flow, window, places)
    return flow


def _window(radius: int, gaussian: bool, like: Tensor) -> Tensor:
    """Return the weights of the window's columns (2 radius + 1,), whose sum is 1."""
    x = torch.arange(-radius, radius + 1, device=like.device)
    sigma = max(0.3 * radius, 1e-3)  # OpenCV's deviation; of a single pixel any will do
    weight = torch.exp(-0.5 * (x / sigma) ** 2) if gaussian else torch.ones_like(x)
    return (weight / weight.sum()).to(like)


def _separable(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Convolve channel c of (N, C, H, W) with down[c] (C, K) in y, then right[c] in x; no padding.

    Each channel by itself, and as they lie in memory: CUDA's own kernels do that in float32, where
    cuDNN's would round to 10 bits (TF32), too few for the determinants of `_displacement`.
    """
    channels = images.shape[1]
    images = F.conv2d(images, down[:, None, :, None], groups=channels)
    return F.conv2d(images, right[:, None, None], groups=channels)


def _expansion(images: Tensor, radius: int, sigma: float) -> Tensor:
    """Fit a quadratic around each pixel of (N, 1, H, W): the paper's polynomial expansion.

    The fit is weighted least squares: coefficients = (B' W B)^-1 B' W f for the basis B = (1, x, y,
    x^2, y^2, xy). The weight is a Gaussian, so that the six sums of B' W f are separable, and all
    but a 3x3 part of B' W B is diagonal. Returns (N, 5, H, W): b_x, b_y, A_xx, A_yy, A_xy.
    """
    x = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    weight = torch.exp(-0.5 * (x / sigma) ** 2)
    weight = weight / weight.sum()
    second, fourth = (float((weight * x**power).sum()) for power in (2, 4))
    one, linear, square = weight, weight * x, weight * x * x
    padded = F.pad(images, (radius, radius, radius, radius), mode="replicate").repeat(1, 6, 1, 1)
    down = torch.stack([one, one, linear, one, square, linear])
    sums = _separable(padded, down, torch.stack([one, linear, one, square, one, linear]))
    f_1, f_x, f_y, f_xx, f_yy, f_xy = sums.unbind(1)
    # (B' W B)^-1 for x^2: sum of (x^2 - second) times f, over the variance of x^2.
    spread = fourth - second * second
    a_xx, a_yy = (f_xx - second * f_1) / spread, (f_yy - second * f_1) / spread
    # x' A x has 2 A_xy x y: half of the coefficient of xy.
    a_xy = f_xy / (2 * second * second)
    return torch.stack([f_x / second, f_y / second, a_xx, a_yy, a_xy], 1)


def _displacement(
    before: Tensor, after: Tensor, flow: Tensor, window: Tensor, places: Places
) -> Tensor:
    """Improve `flow` (B, 2, H, W) once, given the images' expansions (B, 5, H, W)."""
    grid, inside = places.after(flow)
    moved = sample(after, grid, "bilinear")
    # A = (A_1 + A_2) / 2 and db = (b_1 - b_2) / 2 + A d.
    a_xx, a_yy, a_xy = ((before[:, i] + moved[:, i]) * 0.5 for i in (2, 3, 4))
    db_x, db_y = ((before[:, i] - moved[:, i]) * 0.5 for i in (0, 1))
    u, v = flow[:, 0], flow[:, 1]
    db_x = db_x + a_xx * u + a_xy * v
    db_y = db_y + a_xy * u + a_yy * v
    # A'A and A'db, averaged over the window: the normal equations. Outside the picture all is 0.
    square = a_xy * a_xy
    normal = [a_xx * a_xx + square, a_yy * a_yy + square, a_xy * (a_xx + a_yy)]
    right = [a_xx * db_x + a_xy * db_y, a_xy * db_x + a_yy * db_y]
    terms = torch.stack(normal + right, 1)
    radius = window.numel() // 2
    terms = F.pad(terms * inside, (radius, radius, radius, radius))
    weights = window.expand(5, -1)
    g_xx, g_yy, g_xy, h_x, h_y = _separable(terms, weights, weights).unbind(1)
    determinant = g_xx * g_yy - g_xy * g_xy + _EPSILON
    u = (g_yy * h_x - g_xy * h_y) / determinant
    v = (g_xx * h_y - g_xy * h_x) / determinant
    return torch.stack([u, v], 1)
