"""The methods that benchmarks/pairwise.py compares, and how one is measured.

Each method is a function ``(embedding (B, D, H, W), flow (B, 2, H, W), weight (B, H, W)) ->
scalar`` with the value of ``CrossPixelFlowLoss()`` and its default options: self pairs excluded,
the mean over the batch. For bfloat16 embeddings the rivals' matrix products are bfloat16 (KeOps has
none) and all else is float32. They expect at least two weighted pixels an image.

As a command this is a worker: it measures one method in a process of its own and prints JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from ssl_flow.losses import CrossPixelFlowLoss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# The options of CrossPixelFlowLoss(): scale, temperature of either kernel, width of the flow's.
SCALE, TAU_E, TAU_F, SIGMA = 1.0, 0.1, 0.1, 0.5

OWN = ("triton", "chunked", "reference")  # back ends of CrossPixelFlowLoss: any objective
# In the order in which they are measured: where time is short, the last ones are left out.
METHODS = {
    "triton": "this library's GPU kernel",
    "flex": "two FlexAttention calls, compiled: log-sum-exp of ê ê^T; Gaussian scores, value ê",
    "compiled": "torch.compile of dense, in its default mode",
    "dense": "N x N matrices in eager PyTorch, written to be fast",
    "keops": "two KeOps reductions",
    "chunked": "this library's tiles, in plain PyTorch",
    "reference": "this library's definition: the formulas with N x N matrices",
}

# Peak memory of a step, in B x N x N matrices of float32: 7.3, 4.1 and 3.1 were measured on a CPU.
# It tells beforehand what cannot run.
DENSE_MATRICES = {"reference": 7.5, "dense": 4.5, "compiled": 3.5}


def create(name: str, objective: str, device: str) -> Loss:
    """The method by its name in METHODS.

    Raises:
        ImportError, RuntimeError, ValueError: it cannot run here; the message says why.
    """
    if name == "triton" and device == "cpu":
        raise RuntimeError("needs a GPU")
    if name in OWN:
        own: Loss = CrossPixelFlowLoss(objective=objective, backend=name)
        return own
    if objective != "cross_entropy":
        raise ValueError("has the cross-entropy only")
    if name == "flex" and device == "cpu":
        raise RuntimeError(f"FlexAttention of torch {torch.__version__} has no backward on CPUs")
    if name == "flex":
        return compiled(flex)
    if name == "compiled":
        return compiled(dense)
    if name == "keops":
        try:
            import pykeops.torch  # noqa: F401
        except ImportError as error:
            raise ImportError("pykeops is missing: pip install ssl-flow[bench]") from error

        return keops
    return {"dense": dense}[name]


def compiled(loss: Loss) -> Loss:
    """``loss`` compiled anew for each shape: constants of the shape give the fastest code."""
    function: Any = torch.compile(loss, dynamic=False, fullgraph=True)
    return function


def dense(embedding: Tensor, flow: Tensor, weight: Tensor) -> Tensor:
    """With a few matrices of B N^2 numbers, in place where it can be; no graph for the target."""
    e, f, w = _rows(embedding, flow, weight)
    log_w, transposed = w.log()[:, None], e.transpose(1, 2)
    identity = torch.eye(w.shape[1], dtype=torch.bool, device=w.device)
    with torch.no_grad():
        squared = (f[:, :, None, 0] - f[:, None, :, 0]).square_()  # (B, N, N)
        squared += (f[:, :, None, 1] - f[:, None, :, 1]).square_()
        kernel = squared.mul_(-1 / (2 * SIGMA**2)).exp_()
        scores = kernel.div_(TAU_F).add_(log_w).masked_fill_(identity, -torch.inf)
        target = torch.softmax(scores, -1, dtype=e.dtype)
    scores = (e @ transposed).to(w.dtype).mul_(SCALE / TAU_E).add_(log_w)
    log_z = torch.logsumexp(scores.masked_fill_(identity, -torch.inf), -1)
    return _mean(log_z, target @ e, e, w)


def flex(embedding: Tensor, flow: Tensor, weight: Tensor) -> Tensor:
    """Two attentions over the pixels: one for ``log z``, one for the target's mean of ê."""
    rows, f, w = _rows(embedding, flow, weight)
    e = rows[:, None]  # one head: (B, 1, N, D)
    log_w, fx, fy = w.log(), f[..., 0].contiguous(), f[..., 1].contiguous()

    def cosine_scores(score: Tensor, b: Tensor, h: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return torch.where(u == v, -torch.inf, score + log_w[b, v])

    def gaussian_scores(score: Tensor, b: Tensor, h: Tensor, u: Tensor, v: Tensor) -> Tensor:
        squared = (fx[b, u] - fx[b, v]) ** 2 + (fy[b, u] - fy[b, v]) ** 2
        kernel = torch.exp(squared * (-1 / (2 * SIGMA**2)))
        return torch.where(u == v, -torch.inf, score + kernel / TAU_F + log_w[b, v])

    unit = SCALE / TAU_E
    _, log_z = flex_attention(
        e, e, e.detach(), score_mod=cosine_scores, scale=unit, return_lse=True
    )
    nothing = torch.zeros_like(e.detach())  # queries and keys without a say: a score of 0
    mean = flex_attention(nothing, nothing, e, score_mod=gaussian_scores, scale=1.0)
    return _mean(log_z[:, 0], mean[:, 0], rows, w)


def keops(embedding: Tensor, flow: Tensor, weight: Tensor) -> Tensor:
    """Sums over symbolic N x N matrices, reduced by generated code; always in float32."""
    from pykeops.torch import LazyTensor

    e, f, w = _rows(embedding.to(weight.dtype), flow, weight)
    index = torch.arange(w.shape[1], dtype=w.dtype, device=w.device)[None, :, None]

    def pair(rows: Tensor) -> tuple[Any, Any]:
        return LazyTensor(rows[:, :, None].contiguous()), LazyTensor(rows[:, None].contiguous())

    (e_u, e_v), (f_u, f_v), (i_u, i_v) = pair(e), pair(f), pair(index)
    others = (i_u - i_v).abs().sign()  # 0 for a pixel with itself, else 1
    # Both kernels less their largest value, so that no exponential overflows.
    cosine = (((e_u | e_v) - 1) * (SCALE / TAU_E)).exp() * others
    z = (cosine * pair(w[..., None])[1]).sum(dim=2)  # (B, N, 1)
    gaussian = (-((f_u - f_v) ** 2).sum(-1) / (2 * SIGMA**2)).exp()
    target = ((gaussian - 1) / TAU_F).exp() * others
    sums = (target * pair(torch.cat([w[..., None], w[..., None] * e], -1))[1]).sum(dim=2)
    log_z = z[..., 0].log() + SCALE / TAU_E
    return _mean(log_z, sums[..., 1:] / sums[..., :1], e, w)


def _rows(embedding: Tensor, flow: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ê (B, N, D) of unit length, in the embedding's dtype; flow (B, N, 2) and weight (B, N)."""
    e = F.normalize(embedding.flatten(2).transpose(1, 2).to(weight.dtype), dim=-1, eps=1e-6)
    return e.to(embedding.dtype), flow.flatten(2).transpose(1, 2), weight.flatten(1)


def _mean(log_z: Tensor, target_mean: Tensor, e: Tensor, w: Tensor) -> Tensor:
    """The loss from ``log z`` (B, N) and the target's mean of ê around each pixel, (B, N, D)."""
    rows = log_z - (target_mean * e).sum(-1) * (SCALE / TAU_E)
    return ((w * rows).sum(-1) / w.sum(-1)).mean()


class Job(NamedTuple):
    """What a worker measures."""

    method: str
    points: list[tuple[int, int]]  # B and N; N a square
    device: str = "cpu"  # or cuda
    dtype: str = "float32"  # of the embedding, or bfloat16
    dim: int = 16
    objective: str = "cross_entropy"
    threads: int = 1  # on a CPU
    seconds: float = 2.0  # to fill with steps
    tf32: bool = False  # let float32 matrix products be TensorFloat-32


def work(job: Job) -> None:
    """Measure a method at all its sizes and print a line of JSON for each."""
    if job.device == "cpu":
        torch.set_num_threads(job.threads)
    torch.set_float32_matmul_precision("high" if job.tf32 else "highest")
    try:
        loss = create(job.method, job.objective, job.device)
        # A tiny step first, so that libraries loaded on first use don't count as its memory.
        tensors = inputs(2, 64, job)
        torch.autograd.grad(loss(*tensors), tensors[0])
    except (ImportError, RuntimeError, ValueError) as error:
        report({"unavailable": first_line(error)})
        return
    for images, pixels in job.points:
        if job.device == "cuda":
            torch.cuda.empty_cache()
        report({"images": images, "pixels": pixels} | measure(loss, images, pixels, job))


def report(result: dict[str, Any]) -> None:
    """Print for the parent to read. The mark tells it from what libraries print."""
    print("RESULT", json.dumps(result), flush=True)


def inputs(images: int, pixels: int, job: Job) -> tuple[Tensor, ...]:
    """Embedding, which wants a gradient, flow and weight; nothing in them to exploit.

    Normal embeddings, flow of unit variance with independent pixels, weights in (0, 1), one in
    ten 0.
    """
    side, generator = math.isqrt(pixels), torch.Generator().manual_seed(0)
    embedding = torch.randn(images, job.dim, side, side, generator=generator)
    flow = torch.randn(images, 2, side, side, generator=generator)
    weight, kept = torch.rand(2, images, side, side, generator=generator)
    weight = (weight * (kept > 0.1)).to(job.device)
    embedding = embedding.to(job.device, getattr(torch, job.dtype)).requires_grad_()
    return embedding, flow.to(job.device), weight


def measure(loss: Loss, images: int, pixels: int, job: Job) -> dict[str, Any]:
    """``seconds`` and extra ``bytes`` of a step at this size, or a ``note`` that says why not."""
    on_gpu = job.device == "cuda"
    needed = DENSE_MATRICES.get(job.method, 0) * images * pixels**2 * 4
    if needed > free_memory(job.device):
        return {"note": f"needs ~{needed / 2**30:.0f} GiB"}
    tensors = inputs(images, pixels, job)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(*tensors), tensors[0])

    try:
        if on_gpu or job.method == "compiled":
            step()  # compiles, which is not to count
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak_memory()
        before = torch.cuda.memory_allocated() if on_gpu else peak_memory()
        step()
        extra = (torch.cuda.max_memory_allocated() if on_gpu else peak_memory()) - before
        return {"seconds": time_steps(step, job.seconds, job.device), "bytes": extra}
    except torch.OutOfMemoryError:
        return {"note": "out of memory"}
    except (RuntimeError, MemoryError) as error:
        return {"note": f"failed: {first_line(error)}"}


def time_steps(step: Callable[[], object], seconds: float, device: str) -> float:
    """Median seconds of a step, of as many as fill ``seconds`` (1 to 200); it has run before."""
    times: list[float] = []
    if device == "cpu":
        while not times or (sum(times) < seconds and len(times) < 200):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    count = min(200, max(1, round(seconds / (time.perf_counter() - start))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:  # no waiting in between: the GPU is kept busy, as in training
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median([float(a.elapsed_time(b)) / 1000 for a, b in events])


def reset_peak_memory() -> None:
    """Make the present resident size the peak, on Linux; elsewhere an earlier peak may hide one."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The process's largest resident size so far, in bytes.

    Linux's own counter where there is one: getrusage's begins with what the parent had.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    unit = 1 if sys.platform == "darwin" else 1024
    return found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: str) -> float:
    """Bytes that can still be had; infinite where nobody tells."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else math.inf


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a cell of a table."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).replace("|", "/")[:160]


if __name__ == "__main__":
    work(Job(**json.loads(sys.argv[1])))
