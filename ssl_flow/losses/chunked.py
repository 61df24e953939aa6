"""The cross-pixel losses tile by tile, on any device: nothing of size N x N is kept.

The formulas and the interface are those of :mod:`ssl_flow.losses.reference`; memory is O(B N D),
forward and backward.

Cross-entropy. Both exponentiated kernels are symmetric, so with the row sums ``z, y`` known

    dL/dê_u = (s w_u / (W tau_e)) sum_v m w_v
              [ exp(K'_e/tau_e) (1/z_u + 1/z_v) - exp(K'_f/tau_f) (1/y_u + 1/y_v) ] ê_v.

The terms in ``1/z_u`` and ``1/y_u`` need no more than the products of the exponentiated kernels
with ``w ê``, which the forward pass makes beside ``z, y``; the others are the same products with
``w ê / z`` and ``w ê / y``. So the forward and the backward pass are one call each of
:func:`_kernel_products`, which visits the tiles on and above the diagonal and uses each for its
mirror image too.

Alignment and regression need ``<K_e, K_f> = s (w ê)^T K_f (w ê)``, a quadratic form in a constant
matrix, ``|K_f|^2``, and ``|K_e|^2 = s^2 |ê^T diag(w) ê|^2``, a D x D matrix, less the self pairs.

For speed on CPUs: powers of two (``exp2`` takes a third of the time of ``exp``), and in this file
vectors lie as (B, D, N), the layout in which the products are fastest.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_flow.losses.reference import InnerProducts, Options, row_coefficients, unit_sum

# (embedding (B, N, D), flow (B, N, 2), weight (B, N), sigma) -> K_f (w ê) (B, N, D), |K_f|^2 (B,)
GaussianProducts = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
_LOG2E = math.log2(math.e)
# Side and numbers of a tile: a CPU core's cache holds two of 2^18 (1 MiB of float32), a GPU wants
# large launches.
_CPU_TILE, _GPU_TILE = (256, 2**18), (1024, 2**24)
_MANY_TILES = 16  # a side: from here on tiles twice as wide, for calls cost more than caches save


def cross_entropy(
    embedding: Tensor, scale: float | Tensor, flow: Tensor, weight: Tensor, options: Options
) -> Tensor:
    """Cross-entropy of the embedding's row softmax against the flow's, (B,)."""
    loss: Tensor = _CrossEntropy.apply(embedding.mT, scale, flow.mT.contiguous(), weight, options)
    return loss


def target_entropy(flow: Tensor, weight: Tensor, options: Options) -> Tensor:
    """Entropy H of the flow's row softmax, (B,): what the cross-entropy can't go below."""
    points, row = flow.mT.contiguous(), weight[:, None]
    half = 0.5 / options.flow_temperature
    y, yk = torch.zeros_like(row), torch.zeros_like(row)
    for tile in _tiles(points):
        exponent = _target_exponent(tile, points, options)
        target = torch.exp2(exponent, out=tile.scratch[1])
        _accumulate(tile, y, target, row, options.exclude)
        # From the kernel's top, so that its many pixels of equal flow add no rounding.
        target.mul_(exponent.sub_(half * _LOG2E))
        _accumulate(tile, yk, target, row, options.exclude)
    valid, coefficient = row_coefficients(weight)
    y = torch.where(valid, y[:, 0], 1)
    return (coefficient * (y.log() - half - yk[:, 0] / y / _LOG2E)).sum(-1)


class _CrossEntropy(torch.autograd.Function):
    """The cross-entropy of each image, with the gradient in the embedding and the scale."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        e: Tensor,  # (B, D, N)
        scale: float | Tensor,
        points: Tensor,  # (B, 2, N)
        weight: Tensor,  # (B, N)
        options: Options,
    ) -> Tensor:
        tau = options.embedding_temperature
        row = weight[:, None]
        x = torch.cat([row, row * e], 1)  # (B, 1 + D, N)
        sum_e, sum_f = _kernel_products(e, scale, points, x, x, options)
        valid, coefficient = row_coefficients(weight)
        z, y = (torch.where(valid, t[:, 0], 1) for t in (sum_e, sum_f))
        mean_f = sum_f[:, 1:] / y[:, None]  # the target's mean of ê around each pixel
        rows = z.log() - (e * mean_f).sum(1) * (scale / tau)
        if not options.exclude:
            # K'_e is K_e less 1 for the pixel itself, whose target weight is exp(0) w_u / y_u.
            rows += math.exp(-0.5 / options.flow_temperature) / tau * weight / y
        pull = sum_e[:, 1:] / z[:, None] - mean_f  # (B, D, N)
        ctx.save_for_backward(e, points, weight, coefficient, z, y, pull)
        ctx.scale = scale.detach() if isinstance(scale, Tensor) else scale
        ctx.options = options
        return (coefficient * rows).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        e, points, weight, coefficient, z, y, pull = ctx.saved_tensors
        scale, options = ctx.scale, ctx.options
        row_grad = grad[:, None] * coefficient / options.embedding_temperature  # (B, N)
        grad_e = grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = (row_grad * (e * pull).sum(1)).sum().to(scale.dtype)
        if ctx.needs_input_grad[0]:
            x_e, x_f = (e * (weight / t)[:, None] for t in (z, y))
            with torch.autocast(e.device.type, enabled=False):
                from_e, from_f = _kernel_products(e, scale, points, x_e, x_f, options)
            grad_e = (scale * row_grad)[:, None] * (pull + from_e - from_f)
        return grad_e, grad_scale, None, None, None


def _kernel_products(
    e: Tensor, scale: float | Tensor, points: Tensor, x_e: Tensor, x_f: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """``exp(K'_e/tau_e) x_e`` and ``exp((K'_f - 1/2)/tau_f) x_f``; x_e, x_f are (B, any, N)."""
    out_e, out_f = torch.zeros_like(x_e), torch.zeros_like(x_f)
    unit = _LOG2E / options.embedding_temperature
    left = (e * (scale * unit)).mT
    for tile in _tiles(e):
        g, r, c = tile.images, tile.rows, tile.columns
        exponent = torch.bmm(left[g, r], e[g, :, c], out=tile.scratch[0])
        if r == c and not options.exclude:
            exponent.diagonal(dim1=1, dim2=2).sub_(unit)
        _accumulate(tile, out_e, exponent.exp2_(), x_e, options.exclude)
        kernel = _target_exponent(tile, points, options).exp2_()
        _accumulate(tile, out_f, kernel, x_f, options.exclude)
    return out_e, out_f


def _gaussian_products(
    e: Tensor, flow: Tensor, weight: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    """``K_f (w ê)`` (B, N, D) and ``|K_f|^2`` (B,), without the self pairs."""
    row, points = weight[:, None], flow.mT.contiguous()
    x = row * e.mT
    product, squared = torch.zeros_like(x), torch.zeros_like(row[:, :1, :1])
    for tile in _tiles(points):
        g, r, c = tile.images, tile.rows, tile.columns
        kernel = _gaussian(tile, points, sigma, 1.0)
        _accumulate(tile, product, kernel, x, exclude=True)
        pairs = row[g, :, r] @ kernel.square_() @ row[g, :, c].mT
        squared[g] += pairs if r == c else 2 * pairs
    return product.mT, squared[:, 0, 0]


def inner_products(
    embedding: Tensor,
    flow: Tensor,
    weight: Tensor,
    options: Options,
    products: GaussianProducts = _gaussian_products,
) -> InnerProducts:
    """The sums over pairs that alignment and regression are made of."""
    w = unit_sum(weight)
    product, f_f = products(embedding.detach(), flow, w, options.flow_sigma)
    # The form x^T K x, ``product = K x`` a constant: its value once, its gradient in x twice.
    form = (w[..., None] * embedding * product).sum((1, 2))
    e_f = 2 * form - form.detach()
    e = embedding.mT
    # Taking the self pairs from a sum over all pairs cancels where few pixels count: do it in
    # double precision, wherever the device has it (these are O(N) sums).
    if e.device.type != "mps":
        w, e = unit_sum(weight.double()), e.double()
    x = w.sqrt()[:, None] * e
    half = x @ x.detach().mT  # (B, D, D); as above, the other factor's gradient is the same
    gram = 2 * half - half.detach()
    e_e = gram.square().sum((1, 2)) - x.square().sum(1).square().sum(-1)
    pairs = w.sum(-1).square() - w.square().sum(-1)
    return InnerProducts(e_f, e_e.to(weight.dtype), f_f, pairs.to(weight.dtype))


class _Tile(NamedTuple):
    """One tile of some images' N x N matrices, and two scratch tensors of its shape."""

    images: slice
    rows: slice
    columns: slice  # the same as rows on the diagonal
    scratch: tuple[Tensor, Tensor]


def _tiles(like: Tensor) -> Iterator[_Tile]:
    """The tiles on and above the diagonal for ``like`` (B, any, N). They share their scratch."""
    b, _, n = like.shape
    side, numbers = _CPU_TILE if like.device.type == "cpu" else _GPU_TILE
    side = min(n, 2 * side if n > _MANY_TILES * side else side)
    images = min(b, max(1, numbers // side**2))
    buffers = [like.new_empty(images * side * side) for _ in range(2)]
    sides = _slices(n, side)
    for g in _slices(b, images):
        for i, r in enumerate(sides):
            for c in sides[i:]:
                shape = (g.stop - g.start, r.stop - r.start, c.stop - c.start)
                first, second = (t[: math.prod(shape)].view(shape) for t in buffers)
                yield _Tile(g, r, c, (first, second))


def _slices(length: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def _accumulate(tile: _Tile, out: Tensor, kernel: Tensor, x: Tensor, exclude: bool) -> None:
    """Add to ``out = K x`` (B, any, N) what this tile and its mirror image give."""
    g, r, c = tile.images, tile.rows, tile.columns
    if r == c and exclude:
        kernel.diagonal(dim1=1, dim2=2).zero_()
    out[g, :, r].baddbmm_(x[g, :, c], kernel.mT)
    if r != c:
        out[g, :, c].baddbmm_(x[g, :, r], kernel)


def _gaussian(tile: _Tile, points: Tensor, sigma: float, amplitude: float) -> Tensor:
    """``amplitude K_f`` in the first scratch tensor.

    From differences of each component: |f_u|^2 + |f_v|^2 - 2 <f_u, f_v> would lose the small
    distances between large flows to rounding.
    """
    out, difference = tile.scratch
    rate = _LOG2E / (2 * sigma**2)
    exponent = points.new_full((), math.log2(amplitude))
    for i in (0, 1):
        u = points[tile.images, i, tile.rows, None]
        v = points[tile.images, i, None, tile.columns]
        torch.sub(u, v, out=difference)
        exponent = torch.addcmul(exponent, difference, difference, value=-rate, out=out)
    return out.exp2_()


def _target_exponent(tile: _Tile, points: Tensor, options: Options) -> Tensor:
    """``(K'_f - 1/2) log2(e) / tau_f``: less 1/2, since N exp(80) is too large for float32."""
    unit = _LOG2E / options.flow_temperature
    exponent = _gaussian(tile, points, options.flow_sigma, unit)
    if tile.rows == tile.columns and not options.exclude:
        exponent.diagonal(dim1=1, dim2=2).sub_(unit)
    return exponent.sub_(unit / 2)
