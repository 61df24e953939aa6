"""What a GPU can do at best, and the loss's share of a training step; for benchmarks/pairwise.py.

    python benchmarks/pairwise_gpu.py [--dtype bfloat16]

Prints the exponentials a second of its special function units, the operations a second of its
tensor cores in a large matrix product, and the time of a ResNet-50 training step with and without
the loss: bfloat16 autocast, channels_last, 32 images of 224 x 224, embeddings of 56 x 56 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from pairwise_methods import first_line, report, time_steps
from torch import Tensor

from ssl_flow.losses import CrossPixelFlowLoss

SECONDS = 1.0  # to fill with repetitions of each measurement
IMAGES, SIDE = 32, 224  # of the training step


@triton.jit
def _exponentials(out, REPEATS: tl.constexpr, BLOCK: tl.constexpr) -> None:  # noqa: ANN001
    """2^-x over and over in registers: it converges, so nothing overflows."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = offsets.to(tl.float32) / BLOCK
    for _ in range(REPEATS):
        # The bare instruction: exp2() may add a treatment of denormal numbers.
        x = tl.inline_asm_elementwise(
            "{ .reg .f32 n; neg.f32 n, $1; ex2.approx.ftz.f32 $0, n; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    tl.store(out + offsets, x)


def exponentials_per_second() -> float:
    """Of the special function units: many programs, each with independent chains."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    programs, block, repeats = 8 * 16 * processors, 2048, 1024
    out = torch.empty(programs * block, device="cuda")

    def step() -> None:
        _exponentials[(programs,)](out, repeats, block, num_warps=8)

    step()  # compiles
    return programs * block * repeats / time_steps(step, SECONDS, "cuda")


def tensor_flops_per_second(dtype: torch.dtype) -> float:
    """Of the tensor cores: a large matrix product of random numbers; float32 as TensorFloat-32."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.mm(a, b)
    seconds = time_steps(lambda: torch.mm(a, b), SECONDS, "cuda")
    torch.set_float32_matmul_precision(before)
    return 2 * size**3 / seconds


def available_loss() -> CrossPixelFlowLoss:
    """The loss with the fastest of the library's back ends that works here."""
    try:
        loss = CrossPixelFlowLoss(backend="triton")
        embedding = torch.randn(1, 16, 8, 8, device="cuda", requires_grad=True)
        loss(embedding, torch.randn(1, 2, 8, 8, device="cuda")).backward()
        return loss
    except (ImportError, RuntimeError, ValueError):
        return CrossPixelFlowLoss(backend="chunked")


def seconds_in_a_graph(dim: int, images: int = 32, side: int = 56) -> float:
    """Seconds of the loss, forward + backward, replayed as a CUDA graph: without launch gaps."""
    loss = available_loss()
    embedding = torch.randn(images, dim, side, side, device="cuda", requires_grad=True)
    flow = torch.randn(images, 2, side, side, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss(embedding, flow), embedding)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.autograd.grad(loss(embedding, flow), embedding)
    return time_steps(graph.replay, SECONDS, "cuda")


def training_step(dim: int) -> dict[str, float | str]:
    """Seconds of a step with the loss, with a trivial one in its place, and of the loss alone.

    ``share``: what the step gets shorter by without the loss, over the step.

    Raises:
        ImportError: timm or another package of the encoder is missing.
    """
    from ssl_flow.models import create_encoder

    torch.backends.cudnn.benchmark = True
    encoder = create_encoder("resnet50", embedding_dim=dim).cuda().train()
    encoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    images = torch.randn(IMAGES, 3, SIDE, SIDE, device="cuda")
    images = images.contiguous(memory_format=torch.channels_last)
    flow = torch.randn(IMAGES, 2, SIDE // 4, SIDE // 4, device="cuda")
    loss = available_loss()

    def embed() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            embedding: Tensor = encoder(images)
        return embedding

    def step(objective: Callable[[Tensor], Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(embed()).backward()
        optimizer.step()

    alone = embed().detach().requires_grad_()
    steps: dict[str, Callable[[], object]] = {
        "step_seconds": lambda: step(lambda embedding: loss(embedding, flow)),
        "step_seconds_without_loss": lambda: step(lambda e: e.float().square().mean()),
        "loss_seconds": lambda: torch.autograd.grad(loss(alone, flow), alone),
    }
    times: dict[str, float | str] = {"loss_backend": loss.backend}
    for name, function in steps.items():
        for _ in range(3):
            function()
        times[name] = time_steps(function, SECONDS, "cuda")
    with_loss, without = (float(times[name]) for name in list(steps)[:2])
    return times | {"share": 1 - without / with_loss}


def main() -> None:
    """Print a line of JSON for each part, so that a failure leaves the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=16, help="D, the length of an embedding")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device was found")
    parts: list[Callable[[], dict[str, float | str]]] = [
        lambda: {"exponentials_per_second": exponentials_per_second()},
        lambda: {"tensor_flops_per_second": tensor_flops_per_second(getattr(torch, args.dtype))},
        lambda: {"loss_seconds_in_a_graph_32_x_3136": seconds_in_a_graph(args.dim)},
        lambda: training_step(args.dim),
    ]
    for name, part in zip(
        ("exponentials", "tensor cores", "graph", "training step"), parts, strict=True
    ):
        try:
            report(part())
        except (ImportError, RuntimeError, ValueError) as error:
            report({name: f"not measured: {first_line(error)}"})


if __name__ == "__main__":
    main()
