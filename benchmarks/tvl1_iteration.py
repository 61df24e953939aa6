"""TV-L1's iteration on one CPU thread: calls of torch (ours), NumPy, a fused numba loop.

    pip install numba
    python benchmarks/tvl1_iteration.py

All start from the same random state of a 256 x 256 pair and must end at the same flow. 2026-11-23,
one thread of an AMD EPYC, torch 2.15, numba 0.68, two runs: torch 7.0 and 6.8 ms for 20 iterations,
NumPy 12.1 and 13.4, numba 4.7 and 5.0. The iterations are about half of a pair's time, so numba
would save a sixth of it: not worth a dependency.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssl_flow.flow.tvl1 import TorchSolver

SIDE, ITERATIONS, ROUNDS = 256, 20, 15
LIMIT, THETA, RATIO = np.float32(0.09), np.float32(0.3), np.float32(0.25 / 0.3)
Array = NDArray[np.float32]
Run = Callable[..., None]


def numpy_solve(u: Array, p: Array, gradient: Array, scaled: Array, rest: Array) -> None:
    """The equations as they are written, with arrays: u (2, H, W), p (2, 2, H, W)."""
    for _ in range(ITERATIONS):
        step = np.clip(rest + scaled[0] * u[0] + scaled[1] * u[1], -LIMIT, LIMIT)
        u -= step * gradient
        u += THETA * (p[0] + p[1])
        u[..., 1:] -= THETA * p[0][..., :-1]
        u[..., 1:, :] -= THETA * p[1][..., :-1, :]
        p[0][..., :-1] += RATIO * (u[..., 1:] - u[..., :-1])
        p[1][..., :-1, :] += RATIO * (u[..., 1:, :] - u[..., :-1, :])
        p /= np.maximum(np.sqrt(p[0] ** 2 + p[1] ** 2), 1)


def numba_solver() -> Run:
    """One pass over the picture an iteration: the dual of a row needs no more than the next row."""
    import numba

    @numba.njit(fastmath=True)  # type: ignore[untyped-decorator]
    def primal(y: int, u: Array, p: Array, gradient: Array, scaled: Array, rest: Array) -> None:
        for x in range(u.shape[2]):
            step = rest[y, x] + scaled[0, y, x] * u[0, y, x] + scaled[1, y, x] * u[1, y, x]
            step = min(max(step, -LIMIT), LIMIT)
            for c in range(2):
                divergence = p[0, c, y, x] + p[1, c, y, x]
                if x > 0:
                    divergence -= p[0, c, y, x - 1]
                if y > 0:
                    divergence -= p[1, c, y - 1, x]
                u[c, y, x] += THETA * divergence - step * gradient[c, y, x]

    @numba.njit(fastmath=True)  # type: ignore[untyped-decorator]
    def dual(y: int, u: Array, p: Array) -> None:
        _, height, width = u.shape
        for c in range(2):
            for x in range(width):
                a, b = p[0, c, y, x], p[1, c, y, x]
                if x + 1 < width:
                    a += RATIO * (u[c, y, x + 1] - u[c, y, x])
                if y + 1 < height:
                    b += RATIO * (u[c, y + 1, x] - u[c, y, x])
                scale = np.float32(1) / max(np.float32(1), np.float32(math.sqrt(a * a + b * b)))
                p[0, c, y, x], p[1, c, y, x] = a * scale, b * scale

    @numba.njit(fastmath=True)  # type: ignore[untyped-decorator]
    def solve(u: Array, p: Array, gradient: Array, scaled: Array, rest: Array) -> None:
        height = u.shape[1]
        for _ in range(ITERATIONS):
            # The primal step of a row reads the old dual of the row above: two passes in step.
            for y in range(height):
                primal(y, u, p, gradient, scaled, rest)
            for y in range(height):
                dual(y, u, p)

    return solve  # type: ignore[no-any-return]


def main() -> None:
    """Print the milliseconds of each, medians of interleaved rounds."""
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    u, gradient = (random.normal(size=(2, SIDE, SIDE)).astype(np.float32) for _ in range(2))
    scaled = gradient / ((gradient**2).sum(0) + 1)
    rest = random.normal(size=(SIDE, SIDE)).astype(np.float32)
    state: Any = [torch.from_numpy(a.copy())[None] for a in (u, gradient, scaled, rest[None])]

    def torch_solve(flow: Array, *_: Array) -> None:
        tensor = torch.from_numpy(flow)[None]
        TorchSolver(tensor, 0.3, 0.3, 0.25, ITERATIONS)(tensor, *state[1:])

    solvers: dict[str, Run] = {"torch": torch_solve, "NumPy": numpy_solve}
    try:
        solvers["numba"] = numba_solver()
    except ImportError:
        print("numba is not installed: left out")
    times: dict[str, list[float]] = {name: [] for name in solvers}
    results = {}
    for number in range(ROUNDS + 1):
        for name, solve in solvers.items():
            flow, dual = u.copy(), np.zeros((2, 2, SIDE, SIDE), np.float32)
            start = time.perf_counter()
            solve(flow, dual, gradient, scaled, rest)
            if number:  # the first compiles
                times[name].append(1000 * (time.perf_counter() - start))
            results[name] = flow
    for name, values in times.items():
        difference = float(np.abs(results[name] - results["NumPy"]).max())
        print(
            f"{name}: {np.median(values):.1f} ms for {ITERATIONS} iterations of {SIDE} x {SIDE} "
            f"(fastest {min(values):.1f}); largest difference to NumPy {difference:.1e} px"
        )


if __name__ == "__main__":
    main()
