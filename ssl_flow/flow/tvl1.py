"""TV-L1 optical flow with a cost known beforehand, for batches of pairs, on CPU and CUDA.

The flow u minimises, over the picture, |grad u_1| + |grad u_2| + lambda |I1(x + u(x)) - I0(x)|.
Written from the published equations:

- [Z] Zach, Pock, Bischof, "A Duality Based Approach for Realtime TV-L1 Optical Flow", DAGM 2007:
  the splitting into u and v, the thresholding step and the dual iteration.
- [S] Sanchez, Meinhardt-Llopis, Facciolo, "TV-L1 Optical Flow Estimation", IPOL 2013: bicubic
  warping, the discrete gradient and divergence, the pyramid.
- [W] Wedel, Pock, Zach, Bischof, Cremers, "An Improved Algorithm for TV-L1 Optical Flow", 2009:
  the projected dual step and the median filter between warps.

It differs from [S] in four more places: the numbers of warps and iterations are fixed; the dual
variable lives on from warp to warp; the gradient is the mean of the two images'; pixels that leave
the picture have no data term. Each was measured to lower the endpoint error.

There is no start from DIS: with a pyramid down to 16 pixels it helped at motion of about 16 pixels
only (0.64 for 0.76 px), changed nothing at 32 and harmed at 8 (0.27 for 0.24 px).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .pyramid import Places, check, pyramid, resized, sample

# Pixels solved at once. On a CPU one iteration touches 14 float32 planes, so 2^16 pixels are
# 3.7 MB: larger blocks fall out of the cache, smaller ones spend their time in Python. Elsewhere
# 2^23 pixels (128 pairs of 256x256) fill the device and take some 2 GB of its memory.
_CPU_BLOCK, _DEVICE_BLOCK = 2**16, 2**23
# Added to the squared image gradient (grey levels^2 / pixel^2), which [S] tests for zero.
_EPSILON = 1e-3


@torch.no_grad()
def tvl1(
    first: Tensor,
    second: Tensor,
    *,
    lambda_: float = 0.3,
    theta: float = 0.3,
    tau: float = 0.25,
    warps: int = 3,
    iterations: int = 20,
    scale_step: float = 0.5,
    scales: int = 8,
    min_side: int = 16,
    median: bool = True,
    engine: str = "auto",
) -> Tensor:
    """Estimate where each pixel of `first` is found in `second`.

    Args:
        first, second: grey images (B, H, W), values 0 to 255 in any type, on one device.
        lambda_: weight of the data term, 1 / grey level ([S] takes 0.15). Smaller is smoother.
        theta: how far u may be from its auxiliary v ([Z]); smaller is closer and slower.
        tau: time step of the dual update, at most 0.25: above, it does not converge.
        warps: how often each scale linearises the image anew.
        iterations: primal-dual iterations after each warp.
        scale_step: size ratio of neighbouring scales, between 0 and 1.
        scales: upper bound for the number of scales.
        min_side: no scale but the finest is smaller than this, pixels.
        median: filter the flow after each warp.
        engine: what iterates: "torch" runs everywhere, "triton" on CUDA (or interpreted); "auto" is
            "triton" where that runs. The results are the same to rounding.

    Returns:
        (B, 2, H, W) float32 on the device of `first`, in pixels, x to the right, y downwards:
        `first[b, y, x]` is seen at `second[b, y + flow[b, 1, y, x], x + flow[b, 0, y, x]]`.

    Raises ValueError where shapes are not as above, or an option is out of range.
    """
    check(first, second, scale_step, warps=warps, iterations=iterations, scales=scales)
    if not (lambda_ > 0 and theta > 0 and 0 < tau <= 0.25):
        raise ValueError(
            "lambda_ and theta must be above 0, tau above 0 and at most 0.25; got "
            f"{lambda_}, {theta}, {tau}"
        )
    batch, height, width = first.shape
    if first.numel() == 0:
        return torch.zeros(batch, 2, height, width, device=first.device)
    if engine not in ("auto", "torch", "triton"):
        raise ValueError(f"engine must be 'auto', 'torch' or 'triton', got {engine!r}")
    device = first.device
    kind: Any = TorchSolver
    if engine == "triton" or (engine == "auto" and device.type == "cuda" and _triton_runs(device)):
        kind = importlib.import_module(".tvl1_triton", __package__).TritonSolver
    solver = functools.partial(kind, lambda_=lambda_, theta=theta, tau=tau, iterations=iterations)
    levels = pyramid(torch.stack([first, second], 1).float(), scale_step, scales, min_side)
    flow = torch.zeros_like(levels[-1])
    block = _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK
    for images in reversed(levels):  # (B, 2, H, W), the coarsest first
        flow = resized(flow, images.shape[2:])
        step = max(1, block // (images.shape[2] * images.shape[3]))
        parts = zip(images.split(step), flow.split(step), strict=True)
        flow = torch.cat([_one_scale(*part, warps, median, solver) for part in parts])
    return flow


@functools.cache
def _triton_runs(device: torch.device) -> bool:
    """Try the kernel once: Triton compiles on the spot, which some machines cannot."""
    if importlib.util.find_spec("triton") is None or torch.version.cuda is None:
        return False
    try:
        from .tvl1_triton import TritonSolver

        zeros = torch.zeros(1, 2, 16, 16, device=device)
        TritonSolver(zeros, 0.3, 0.3, 0.25, 1)(zeros, zeros, zeros, zeros[:, :1].contiguous())
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever its compiler, the driver or the linker raise
        warnings.warn(f"TV-L1 runs without its Triton kernel, slower: {error}", stacklevel=2)
        return False
    return True


def _one_scale(
    images: Tensor, flow: Tensor, warps: int, median: bool, solver: Callable[[Tensor], Any]
) -> Tensor:
    """Refine `flow` (B, 2, H, W) of the two `images` (B, 2, H, W) at one scale."""
    first, second = images[:, :1], images[:, 1:]
    first_gradient, second_gradient = _gradient(first), _gradient(second)
    places = Places(flow)
    flow = flow.clone(memory_format=torch.contiguous_format)
    solve = solver(flow)
    for _ in range(warps):
        grid, inside = places.after(flow)
        # torch's cubic (a = -3/4) does not keep straight lines straight: on clean pictures flow of
        # a quarter of a pixel comes out 0.045 px too small. Keys' a = -1/2 mends that, and yet the
        # error on real frames with their noise is larger with it (Middlebury 0.240 for 0.228 px).
        warped = sample(second, grid, "bicubic")
        gradient = sample(second_gradient, grid, "bilinear")
        # A pixel that leaves the picture has nothing to be compared with: its neighbours decide.
        gradient.add_(first_gradient).mul_(inside * 0.5)  # (B, 2, H, W)
        # rho(u) = rest + <gradient, u>, divided by |gradient|^2 once and for all.
        rest = warped.sub_(first).sub_((gradient * flow).sum(1, keepdim=True))
        norm = gradient.square().sum(1, keepdim=True) + _EPSILON
        solve(flow, gradient, gradient / norm, rest.div_(norm))
        if median:
            flow = _median(flow)
    return flow


class TorchSolver:
    """The primal-dual iterations of [Z] at one scale; the dual variable lives on between calls."""

    def __init__(
        self, flow: Tensor, lambda_: float, theta: float, tau: float, iterations: int
    ) -> None:
        """Set the dual variable to 0 for flows shaped like `flow` (B, 2, H, W)."""
        self.theta, self.limit, self.ratio = theta, lambda_ * theta, tau / theta
        self.iterations = iterations
        self.dual = flow.new_zeros(2, *flow.shape)  # p: (d/dx or d/dy, B, u_1 or u_2, H, W)
        self.length = torch.empty_like(flow)
        self.step = torch.empty_like(flow[:, :1])

    def __call__(self, flow: Tensor, gradient: Tensor, scaled: Tensor, rest: Tensor) -> None:
        """Iterate on `flow` (B, 2, H, W), contiguous float32, in place.

        `gradient` is that of the image (B, 2, H, W), `scaled` is gradient / |gradient|^2
        (B, 2, H, W), `rest` the part of rho / |gradient|^2 that does not depend on u (B, 1, H, W).
        """
        theta, limit, ratio = self.theta, self.limit, self.ratio
        dual, length, step = self.dual, self.length, self.step
        # Views are made once: making one costs as much as a small tensor operation.
        u_1, u_2, scaled_1, scaled_2 = flow[:, :1], flow[:, 1:], scaled[:, :1], scaled[:, 1:]
        right, left = flow[..., 1:], flow[..., :-1]
        below, above = flow[..., 1:, :], flow[..., :-1, :]
        dual_x, dual_y = dual[0], dual[1]
        # The last column of dual_x and the last row of dual_y stay zero: no slope over the border.
        inner_x, inner_y = dual_x[..., :-1], dual_y[..., :-1, :]
        for _ in range(self.iterations):
            # v = u - clamp(rho / |gradient|^2, +-lambda theta) gradient: [Z]'s three cases in one.
            torch.addcmul(rest, scaled_1, u_1, out=step)
            step.addcmul_(scaled_2, u_2).clamp_(-limit, limit)
            flow.addcmul_(step, gradient, value=-1)
            # u = v + theta div p: backward differences, p = 0 outside.
            flow.add_(dual_x, alpha=theta).add_(dual_y, alpha=theta)
            right.sub_(inner_x, alpha=theta)
            below.sub_(inner_y, alpha=theta)
            # p = p + tau / theta grad u (forward differences), then the nearest with |p| <= 1.
            inner_x.add_(right, alpha=ratio).sub_(left, alpha=ratio)
            inner_y.add_(below, alpha=ratio).sub_(above, alpha=ratio)
            # 1 / |p| and not |p|: on a CPU the square root takes 5 times as long where p is 0.
            torch.mul(dual_x, dual_x, out=length)
            length.addcmul_(dual_y, dual_y).rsqrt_().clamp_(max=1)
            dual.mul_(length)


def _gradient(image: Tensor) -> Tensor:
    """Return d/dx and d/dy of (B, 1, H, W) as (B, 2, H, W): five-point differences."""
    padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
    rows, columns = padded[..., 2:-2, :], padded[..., 2:-2]
    x = (rows[..., 3:-1] - rows[..., 1:-3]) * 8 - (rows[..., 4:] - rows[..., :-4])
    y = (columns[..., 3:-1, :] - columns[..., 1:-3, :]) * 8
    y -= columns[..., 4:, :] - columns[..., :-4, :]
    return torch.cat([x, y], 1).div_(12)


def _median(flow: Tensor) -> Tensor:
    """Return the median of each pixel's 3x3 neighbourhood, (B, C, H, W).

    Of the columns' sorted values it is the middle one of: the largest of the smallest, the middle
    of the middle, the smallest of the largest.
    """
    padded = F.pad(flow, (1, 1, 1, 1), mode="replicate")
    a, b, c = padded[..., :-2, :], padded[..., 1:-1, :], padded[..., 2:, :]
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    top = torch.maximum(high, c)
    middle = torch.maximum(low, torch.minimum(high, c, out=high), out=high)
    torch.minimum(low, c, out=low)
    lows = torch.maximum(low[..., :-2], low[..., 1:-1])
    torch.maximum(lows, low[..., 2:], out=lows)
    tops = torch.minimum(top[..., :-2], top[..., 1:-1])
    torch.minimum(tops, top[..., 2:], out=tops)
    middles = _middle(middle[..., :-2], middle[..., 1:-1], middle[..., 2:])
    return _middle(lows, middles, tops)


def _middle(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return the middle one of three values; `out` because fresh memory costs more than this."""
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    return torch.maximum(low, torch.minimum(high, c, out=high), out=low)
