"""The inner loop of TV-L1 (`tvl1.TorchSolver`) as one Triton kernel an iteration, for CUDA.

Each program works on a tile. The dual step at a pixel needs u as the primal step leaves it there,
to the right and below, so the primal step is done for all three: arithmetic is free, and the 17
planes that one iteration reads and writes are all that it costs. Results go to a second pair of
buffers, because neighbouring tiles still read the first.

On a CPU it runs in Triton's interpreter (TRITON_INTERPRET=1 before the start), for tests.
"""

# Device functions have no types that a checker could read.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_H, TILE_W = 4, 128  # wide: a row's neighbours lie together in memory
OPTIONS = {"num_warps": 4}


class TritonSolver:
    """Does what `tvl1.TorchSolver` does; the interface is the same."""

    def __init__(
        self, flow: Tensor, lambda_: float, theta: float, tau: float, iterations: int
    ) -> None:
        """See `tvl1.TorchSolver`."""
        self.numbers = (lambda_ * theta, theta, tau / theta)
        self.iterations = iterations
        batch, _, height, width = flow.shape
        self.dual = flow.new_zeros(batch, 4, height, width)  # p of u_1: d/dx, d/dy; of u_2
        self.next_dual, self.next_flow = torch.empty_like(self.dual), torch.empty_like(flow)

    def __call__(self, flow: Tensor, gradient: Tensor, scaled: Tensor, rest: Tensor) -> None:
        """See `tvl1.TorchSolver`."""
        batch, _, height, width = flow.shape
        grid = (triton.cdiv(width, TILE_W), triton.cdiv(height, TILE_H), batch)
        now, then = (flow, self.dual), (self.next_flow, self.next_dual)
        with torch.cuda.device_of(flow):
            for _ in range(self.iterations):
                iteration_kernel[grid](
                    *now, *then, gradient, scaled, rest, height, width, *self.numbers,
                    TILE_H=TILE_H, TILE_W=TILE_W, **OPTIONS,
                )  # fmt: skip
                now, then = then, now
        self.dual, self.next_dual = now[1], then[1]
        if now[0] is not flow:
            flow.copy_(now[0])


@triton.jit
def _primal(flow, dual, gradient, scaled, rest, b, y, x, height, width, limit, theta):
    """u_1 and u_2 after the primal step at the pixels (y, x) of pair b."""
    plane = height * width
    here = (y < height) & (x < width)
    at = y * width + x
    pair = b.to(tl.int64) * plane  # a batch may hold more than 2^31 values
    u = tl.load(flow + 2 * pair + at, here, 0.0)
    v = tl.load(flow + 2 * pair + plane + at, here, 0.0)
    # rho / |gradient|^2, clamped: how far to go along the gradient.
    d = tl.load(rest + pair + at, here, 0.0)
    d += tl.load(scaled + 2 * pair + at, here, 0.0) * u
    d += tl.load(scaled + 2 * pair + plane + at, here, 0.0) * v
    d = tl.minimum(tl.maximum(d, -limit), limit)
    u -= d * tl.load(gradient + 2 * pair + at, here, 0.0)
    v -= d * tl.load(gradient + 2 * pair + plane + at, here, 0.0)
    # theta div p, p = 0 outside.
    p = dual + 4 * pair + at
    left, above = here & (x > 0), here & (y > 0)
    u += theta * (tl.load(p, here, 0.0) - tl.load(p - 1, left, 0.0))
    p += plane
    u += theta * (tl.load(p, here, 0.0) - tl.load(p - width, above, 0.0))
    p += plane
    v += theta * (tl.load(p, here, 0.0) - tl.load(p - 1, left, 0.0))
    p += plane
    v += theta * (tl.load(p, here, 0.0) - tl.load(p - width, above, 0.0))
    return u, v


@triton.jit
def _dual(dual, new_dual, offset, plane, u, right, below, inner_x, inner_y, here, ratio):
    """Update p of one component of u."""
    p_x = tl.load(dual + offset, here, 0.0) + ratio * tl.where(inner_x, right - u, 0.0)
    p_y = tl.load(dual + offset + plane, here, 0.0) + ratio * tl.where(inner_y, below - u, 0.0)
    scale = 1.0 / tl.maximum(tl.sqrt(p_x * p_x + p_y * p_y), 1.0)
    tl.store(new_dual + offset, p_x * scale, here)
    tl.store(new_dual + offset + plane, p_y * scale, here)


@triton.jit
def iteration_kernel(
    flow, dual, new_flow, new_dual, gradient, scaled, rest, height, width, limit, theta, ratio,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """One iteration on a tile of one pair: flow and dual -> new_flow and new_dual."""
    b = tl.program_id(2)
    y = (tl.program_id(1) * TILE_H + tl.arange(0, TILE_H))[:, None]
    x = (tl.program_id(0) * TILE_W + tl.arange(0, TILE_W))[None, :]
    u, v = _primal(flow, dual, gradient, scaled, rest, b, y, x, height, width, limit, theta)
    u_right, v_right = _primal(
        flow, dual, gradient, scaled, rest, b, y, x + 1, height, width, limit, theta
    )
    u_below, v_below = _primal(
        flow, dual, gradient, scaled, rest, b, y + 1, x, height, width, limit, theta
    )
    plane = height * width
    here = (y < height) & (x < width)
    pair = b.to(tl.int64) * plane
    offset = pair * 2 + y * width + x
    tl.store(new_flow + offset, u, here)
    tl.store(new_flow + offset + plane, v, here)
    inner_x, inner_y = x < width - 1, y < height - 1
    offset = pair * 4 + y * width + x
    _dual(dual, new_dual, offset, plane, u, u_right, u_below, inner_x, inner_y, here, ratio)
    offset += 2 * plane
    _dual(dual, new_dual, offset, plane, v, v_right, v_below, inner_x, inner_y, here, ratio)
