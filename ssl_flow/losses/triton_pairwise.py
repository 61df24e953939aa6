"""The cross-pixel losses over all pairs, fused for GPUs: exact, nothing of size N x N in memory.

The formulas and the interface are those of :mod:`ssl_flow.losses.reference`, the device code is in
:mod:`ssl_flow.losses.triton_kernels`.

Cross-entropy takes two passes. The forward pass sums ``z, y`` and the cross term of each row; the
backward pass needs rows only again, since both kernel matrices are symmetric:

    dL/dê_u = s / (W tau_e) sum_v m [ E_uv (a_u w_v + w_u a_v) - F_uv (b_u w_v + w_u b_v) ] ê_v
    E = exp(K'_e/tau_e)   F = exp((K'_f - 1/2)/tau_f)   a = w / z   b = w / y

The other objectives need one product with the flow kernel, ``K_f (w ê)``, and ``|K_f|^2``, both
free of gradients; the algebra around them is :mod:`ssl_flow.losses.chunked`'s, and so is the
target's entropy, which is asked for now and then, to watch.

Each is a ``torch.library`` operator, so ``torch.compile``, DDP and activation checkpointing work.
They run on CUDA devices; on a CPU under Triton's interpreter (``TRITON_INTERPRET=1``), for tests.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ssl_flow.losses import chunked
from ssl_flow.losses.reference import Options, row_coefficients
from ssl_flow.losses.triton_kernels import gradient_kernel, products_kernel, sums_kernel

_Context = Any  # autograd's contexts have no type that knows what was saved in them
_LOG2E = math.log2(math.e)
_DROP = 1e4  # taken from an exponent, leaves 2^-10000 = 0
_LIFT = 2.0**13  # brings weights of 1/N into the middle of float16's range, and 2 not out of it
# Pixels on a tile's side and stages of loads in flight, by the width of the operands. Fixed, so
# that the same shapes give the same bits on every GPU of a kind. Larger tiles spill registers:
# benchmarks/triton_resources.py reads it off the binaries.
_TILES = {16: (64, 2), 32: (64, 2), 64: (64, 2), 128: (32, 2), 256: (16, 1)}
_HOPPER_TILES = _TILES | {128: (64, 2)}  # its tensor cores read operands from shared memory
WIDTHS = tuple(_TILES)
# Without fused multiply-adds the loops have a fifth more instructions.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def obstacle(x: Tensor) -> str:
    """Why the kernels can't take x, (B, N, D); empty where they can."""
    if x.dtype != torch.float32:
        return f"computes in float32 and takes float32 or half precision, found {x.dtype}"
    if x.shape[-1] > max(WIDTHS):
        return f"takes embeddings of at most {max(WIDTHS)} channels, found {x.shape[-1]}"
    if isinstance(sums_kernel, InterpretedFunction):
        return ""
    if not x.is_cuda:
        return f"runs on CUDA devices (on a CPU, slowly, if TRITON_INTERPRET=1), found {x.device}"
    if torch.version.cuda is None or torch.cuda.get_device_capability(x.device) < (8, 0):
        name = torch.cuda.get_device_name(x.device)
        return f"needs an NVIDIA GPU of compute capability 8.0 or above, found {name}"
    return ""


def cross_entropy(
    embedding: Tensor, scale: float | Tensor, flow: Tensor, weight: Tensor, options: Options
) -> Tensor:
    """Cross-entropy of the embedding's row softmax against the flow's, (B,)."""
    s = scale if isinstance(scale, Tensor) else embedding.new_full((), scale)
    loss: Tensor = _cross_entropy(embedding.contiguous(), s, flow, weight, *options)[0]
    return loss


@torch.library.custom_op("ssl_flow::cross_entropy", mutates_args=())
def _cross_entropy(
    e: Tensor,  # (B, N, D) float32
    scale: Tensor,  # ()
    flow: Tensor,  # (B, N, 2)
    weight: Tensor,  # (B, N)
    embedding_temperature: float,
    flow_sigma: float,
    flow_temperature: float,
    exclude: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (B,) and, for the backward pass, z and y (B, N)."""
    options = Options(embedding_temperature, flow_sigma, flow_temperature, exclude)
    hi, lo = _halves(e * (scale * (_LOG2E / embedding_temperature)).sqrt())
    sums = weight.new_empty(len(weight), 3, weight.shape[1])
    tensors = (flow.mT.contiguous(), weight.contiguous(), sums)
    _launch(sums_kernel, hi, lo, *tensors, *_numbers(e, options))
    z, y, cross = sums.unbind(1)
    valid, coefficient = row_coefficients(weight)
    z, y = torch.where(valid, z, 1), torch.where(valid, y, 1)
    return (coefficient * (z.log() - cross / y / _LOG2E)).sum(-1), z, y


@_cross_entropy.register_fake
def _(e: Tensor, scale: Tensor, flow: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, ...]:
    return e.new_empty(e.shape[0]), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


@torch.library.custom_op("ssl_flow::cross_entropy_gradient", mutates_args=())
def _cross_entropy_gradient(
    grad: Tensor,  # (B,)
    e: Tensor,
    scale: Tensor,
    flow: Tensor,
    weight: Tensor,
    z: Tensor,
    y: Tensor,
    embedding_temperature: float,
    flow_sigma: float,
    flow_temperature: float,
    exclude: bool,
) -> Tensor:
    """The gradient in e, (B, N, D)."""
    options = Options(embedding_temperature, flow_sigma, flow_temperature, exclude)
    root = (scale * (_LOG2E / embedding_temperature)).sqrt()
    hi, lo = _halves(e * root)
    valid, _ = row_coefficients(weight)
    # Weights between 0 and _LIFT whatever their unit is, as float16 products need them.
    largest = torch.where(valid, weight.amax(-1, keepdim=True), 1)
    lifted = weight * (_LIFT / largest)
    factors = torch.stack([weight, lifted / z, lifted / y], 1)
    mean = torch.where(valid, largest / _LIFT / weight.sum(-1, keepdim=True), 0)[:, 0]
    finish = grad * mean * (scale / embedding_temperature / root)
    gradient = e.new_empty(hi.shape)
    tensors = (flow.mT.contiguous(), factors, finish, gradient)
    _launch(gradient_kernel, hi, lo, *tensors, *_numbers(e, options))
    return gradient[..., : e.shape[2]].contiguous()


@_cross_entropy_gradient.register_fake
def _(grad: Tensor, e: Tensor, *_: object) -> Tensor:
    return e.new_empty(e.shape)


def _save_for_gradient(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, z, y = output
    ctx.save_for_backward(*inputs[:4], z, y)
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(z, y)
    ctx.set_materialize_grads(False)


def _gradients(ctx: _Context, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    e, scale, flow, weight, z, y = ctx.saved_tensors
    grad_e = _cross_entropy_gradient(grad, e, scale, flow, weight, z, y, *ctx.options)
    grad_scale = None
    if ctx.needs_input_grad[1]:
        # The loss depends on s ê ê^T alone, so its slope along s is half its slope along ê.
        grad_scale = (grad_e * e).sum().to(scale.dtype) / (2 * scale)
    return grad_e, grad_scale, *(None,) * 6


_cross_entropy.register_autograd(_gradients, setup_context=_save_for_gradient)


@torch.library.custom_op("ssl_flow::gaussian_products", mutates_args=())
def _gaussian_products(
    e: Tensor, flow: Tensor, weight: Tensor, flow_sigma: float
) -> tuple[Tensor, Tensor]:
    """``K_f (w ê)`` (B, N, D) and ``|K_f|^2`` (B,) without the self pairs. No gradient."""
    largest = weight.amax(-1, keepdim=True)
    largest = torch.where(largest == 0, 1, largest) / _LIFT
    points, lifted = flow.mT.contiguous(), (weight / largest).contiguous()
    rate = _LOG2E / (2 * flow_sigma**2)
    results = []
    # A Gaussian's square is a Gaussian of twice the rate.
    for x, factor in ((e, 1), (e.new_ones(*weight.shape, 1), 2)):
        hi, lo = _halves(x)
        product = x.new_empty(hi.shape)
        _launch(products_kernel, hi, lo, points, lifted, product, x.shape[1], factor * rate)
        results.append(product[..., : x.shape[2]] * largest[..., None])
    return results[0].contiguous(), (results[1][..., 0] * weight).sum(-1)


@_gaussian_products.register_fake
def _(e: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return e.new_empty(e.shape), e.new_empty(e.shape[0])


inner_products = functools.partial(chunked.inner_products, products=_gaussian_products)
target_entropy = chunked.target_entropy


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, D) -> twice (B, N, width): float16 and what its rounding lost, zeros beyond D."""
    hi = x.half()
    lo = (x - hi).half()
    missing = max(16, triton.next_power_of_2(x.shape[-1])) - x.shape[-1]
    return F.pad(hi, (0, missing)).contiguous(), F.pad(lo, (0, missing)).contiguous()


def _numbers(e: Tensor, options: Options) -> tuple[float, ...]:
    """N, the Gaussian's rate, the target's amplitude, what self pairs lose in each exponent."""
    amplitude = _LOG2E / options.flow_temperature
    drops = (_LOG2E / options.embedding_temperature, amplitude)  # the identity's 1
    if options.exclude:
        drops = (_DROP, _DROP)
    return e.shape[1], _LOG2E / (2 * options.flow_sigma**2), amplitude, *drops


def _launch(
    kernel: triton.JITFunction, hi: Tensor, lo: Tensor, *arguments: Tensor | int | float
) -> None:
    """Run a kernel over the tiles of each image; ``hi``, ``lo`` (B, N, width)."""
    b, n, width = hi.shape
    capability = torch.cuda.get_device_capability(hi.device) if hi.is_cuda else (0, 0)
    side, stages = tile(width, capability)
    with torch.cuda.device_of(hi):
        kernel[(triton.cdiv(n, side), b)](
            hi, lo, *arguments, SIDE=side, WIDTH=width, STAGES=stages, **OPTIONS
        )


def tile(width: int, capability: tuple[int, int]) -> tuple[int, int]:
    """Pixels on a side, and stages, for operands of this width on a GPU of this capability."""
    return (_HOPPER_TILES if capability[0] == 9 else _TILES)[width]
