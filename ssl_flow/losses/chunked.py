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
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ssl_flow.losses.reference import cosine, has_pairs, unit_sum

# (embedding (B, N, D), flow (B, N, 2), weight (B, N), sigma) -> K_f (w ê) (B, N, D), |K_f|^2 (B,)
GaussianProducts = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
_LOG2E = math.log2(math.e)
# A CPU core's cache holds two tiles of 2^18 numbers (1 MiB of float32); a GPU wants large launches.
_TILE_SIDE = {"cpu": 256, "cuda": 1024}
_TILE_NUMBERS = {"cpu": 2**18, "cuda": 2**24}
_MANY_TILES = 16  # a side: from here on tiles twice as wide, for calls cost more than caches save


class _Options(NamedTuple):
    embedding_temperature: float
    flow_sigma: float
    flow_temperature: float
    self_pairs: str


def cross_entropy(
    embedding: Tensor,
    scale: float | Tensor,
    flow: Tensor,
    weight: Tensor,
    *,
    embedding_temperature: float,
    flow_sigma: float,
    flow_temperature: float,
    self_pairs: str,
) -> Tensor:
    """Cross-entropy of the embedding's row softmax against the flow's, (B,)."""
    options = _Options(embedding_temperature, flow_sigma, flow_temperature, self_pairs)
    learns_scale = isinstance(scale, Tensor) and scale.requires_grad
    needs_grad = torch.is_grad_enabled() and (embedding.requires_grad or learns_scale)
    e, points = embedding.transpose(1, 2), flow.transpose(1, 2).contiguous()
    loss: Tensor = _CrossEntropy.apply(e, scale, points, weight, options, needs_grad)
    return loss


def target_entropy(
    flow: Tensor,
    weight: Tensor,
    *,
    flow_sigma: float,
    flow_temperature: float,
    self_pairs: str,
) -> Tensor:
    """Entropy H of the flow's row softmax, (B,): what the cross-entropy can't go below."""
    options = _Options(1.0, flow_sigma, flow_temperature, self_pairs)
    points, row = flow.transpose(1, 2).contiguous(), weight[:, None]
    half = 0.5 / flow_temperature
    y, yk = torch.zeros_like(row), torch.zeros_like(row)
    for tile in _tiles(points):
        exponent = _target_exponent(tile, points, options)
        target = torch.exp2(exponent, out=tile.scratch[1])
        _drop_self_pairs(tile, target, options.self_pairs)
        _accumulate(tile, y, target, row)
        # From the kernel's top, so that its many pixels of equal flow add no rounding.
        _accumulate(tile, yk, target.mul_(exponent.sub_(half * _LOG2E)), row)
    valid, coefficient = row_coefficients(weight)
    y = torch.where(valid, y[:, 0], 1)
    return (coefficient * (y.log() - half - yk[:, 0] / y / _LOG2E)).sum(-1)


def kernel_alignment(
    embedding: Tensor,
    scale: float | Tensor,
    flow: Tensor,
    weight: Tensor,
    *,
    flow_sigma: float,
    gaussian_products: GaussianProducts | None = None,
) -> Tensor:
    """One minus the cosine between the two kernel matrices, (B,). ``scale`` cancels."""
    products = gaussian_products or _gaussian_products
    e_f, e_e, f_f, _ = _inner_products(embedding, flow, weight, flow_sigma, products)
    return torch.where(has_pairs(weight), 1 - cosine(e_f, e_e, f_f), 0)


def regression(
    embedding: Tensor,
    scale: float | Tensor,
    flow: Tensor,
    weight: Tensor,
    *,
    flow_sigma: float,
    gaussian_products: GaussianProducts | None = None,
) -> Tensor:
    """Mean squared difference of the two kernels over pairs, (B,)."""
    products = gaussian_products or _gaussian_products
    e_f, e_e, f_f, pairs = _inner_products(embedding, flow, weight, flow_sigma, products)
    valid = has_pairs(weight)
    total = scale**2 * e_e - 2 * scale * e_f + f_f
    return torch.where(valid, total / torch.where(valid, pairs, 1), 0)


class _CrossEntropy(torch.autograd.Function):
    """The cross-entropy of each image, with the gradient in the embedding and the scale."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        e: Tensor,  # (B, D, N)
        scale: float | Tensor,
        points: Tensor,  # (B, 2, N)
        weight: Tensor,  # (B, N)
        options: _Options,
        needs_grad: bool,
    ) -> Tensor:
        tau = options.embedding_temperature
        row = weight[:, None]
        x_f = torch.cat([row, row * e], 1)  # (B, 1 + D, N)
        x_e = x_f if needs_grad else row
        sum_e, sum_f = _kernel_products(e, scale, points, x_e, x_f, options)
        valid, coefficient = row_coefficients(weight)
        z = torch.where(valid, sum_e[:, 0], 1)
        y = torch.where(valid, sum_f[:, 0], 1)
        mean_f = sum_f[:, 1:] / y[:, None]  # the target's mean of ê around each pixel
        rows = z.log() - (e * mean_f).sum(1) * (scale / tau)
        if options.self_pairs == "subtract_identity":
            # K'_e is K_e less 1 for the pixel itself, whose target weight is exp(0) w_u / y_u.
            rows += math.exp(-0.5 / options.flow_temperature) / tau * weight / y
        if needs_grad:
            pull = sum_e[:, 1:] / z[:, None] - mean_f  # (B, D, N)
            ctx.save_for_backward(e, points, weight, coefficient, z, y, pull)
            ctx.scale = scale.detach() if isinstance(scale, Tensor) else scale  # type: ignore
            ctx.options = options  # type: ignore[attr-defined]
        return (coefficient * rows).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        e, points, weight, coefficient, z, y, pull = ctx.saved_tensors  # type: ignore[attr-defined]
        scale, options = ctx.scale, ctx.options  # type: ignore[attr-defined]
        needs_e, needs_scale, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
        row_grad = grad[:, None] * coefficient / options.embedding_temperature  # (B, N)
        grad_e = grad_scale = None
        if needs_scale:
            grad_scale = (row_grad * (e * pull).sum(1)).sum().to(scale.dtype)
        if needs_e:
            x_e, x_f = (e * (weight / t)[:, None] for t in (z, y))
            with torch.autocast(e.device.type, enabled=False):
                from_e, from_f = _kernel_products(e, scale, points, x_e, x_f, options)
            grad_e = (scale * row_grad)[:, None] * (pull + from_e - from_f)
        return grad_e, grad_scale, None, None, None, None


def _inner_products(
    embedding: Tensor, flow: Tensor, weight: Tensor, sigma: float, products: GaussianProducts
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """<K_e, K_f> / s, |K_e|^2 / s^2, |K_f|^2 and the sum of pair weights, each (B,).

    Over pairs of different pixels, with weights of sum 1.
    """
    w = unit_sum(weight)
    product, f_f = products(embedding.detach(), flow, w, sigma)
    # The form x^T K x, ``product = K x`` a constant: its value once, its gradient in x twice.
    form = (w[..., None] * embedding * product).sum((1, 2))
    e_f = 2 * form - form.detach()
    e = embedding.transpose(1, 2)
    # Taking the self pairs from a sum over all pairs cancels where few pixels count: do it in
    # double precision, wherever the device has it (these are O(N) sums).
    if e.device.type != "mps":
        w, e = unit_sum(weight.double()), e.double()
    gram = (w[:, None] * e) @ e.transpose(1, 2)  # (B, D, D)
    e_e = gram.square().sum((1, 2)) - (w * e.square().sum(1)).square().sum(-1)
    pairs = w.sum(-1).square() - w.square().sum(-1)
    return e_f, e_e.to(weight.dtype), f_f, pairs.to(weight.dtype)


def _kernel_products(
    e: Tensor, scale: float | Tensor, points: Tensor, x_e: Tensor, x_f: Tensor, options: _Options
) -> tuple[Tensor, Tensor]:
    """``exp(K'_e/tau_e) x_e`` and ``exp((K'_f - 1/2)/tau_f) x_f``; x_e, x_f are (B, any, N)."""
    out_e, out_f = torch.zeros_like(x_e), torch.zeros_like(x_f)
    unit = _LOG2E / options.embedding_temperature
    left = (e * (scale * unit)).transpose(1, 2)
    for tile in _tiles(e):
        g, r, c = tile.images, tile.rows, tile.columns
        exponent = torch.bmm(left[g, r], e[g, :, c], out=tile.scratch[0])
        if tile.on_diagonal and options.self_pairs == "subtract_identity":
            exponent.diagonal(dim1=1, dim2=2).sub_(unit)
        kernel = exponent.exp2_()
        _drop_self_pairs(tile, kernel, options.self_pairs)
        _accumulate(tile, out_e, kernel, x_e)
        kernel = _target_exponent(tile, points, options).exp2_()
        _drop_self_pairs(tile, kernel, options.self_pairs)
        _accumulate(tile, out_f, kernel, x_f)
    return out_e, out_f


def _gaussian_products(
    e: Tensor, flow: Tensor, weight: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    """``K_f (w ê)`` (B, N, D) and ``|K_f|^2`` (B,), without the self pairs."""
    row, points = weight[:, None], flow.transpose(1, 2).contiguous()
    x = row * e.transpose(1, 2)
    product = torch.zeros_like(x)
    squared = torch.zeros_like(row)
    for tile in _tiles(points):
        kernel = _gaussian(tile, points, sigma, 1.0)
        _drop_self_pairs(tile, kernel, "exclude")
        _accumulate(tile, product, kernel, x)
        _accumulate(tile, squared, kernel.square_(), row)
    return product.transpose(1, 2), (squared * row).sum((1, 2))


class _Tile(NamedTuple):
    """One tile of some images' N x N matrices, and two scratch tensors of its shape."""

    images: slice
    rows: slice
    columns: slice
    scratch: tuple[Tensor, Tensor]

    @property
    def on_diagonal(self) -> bool:
        return self.rows == self.columns


def _tiles(like: Tensor) -> Iterator[_Tile]:
    """The tiles on and above the diagonal for ``like`` (B, any, N). They share their scratch."""
    b, _, n = like.shape
    side = _TILE_SIDE.get(like.device.type, 1024)
    side = min(n, 2 * side if n > _MANY_TILES * side else side)
    images = min(b, max(1, _TILE_NUMBERS.get(like.device.type, 2**24) // side**2))
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


def _accumulate(tile: _Tile, out: Tensor, kernel: Tensor, x: Tensor) -> None:
    """Add to ``out = K x`` (B, any, N) what this tile and its mirror image give."""
    g, r, c = tile.images, tile.rows, tile.columns
    out[g, :, r].baddbmm_(x[g, :, c], kernel.transpose(1, 2))
    if not tile.on_diagonal:
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


def _target_exponent(tile: _Tile, points: Tensor, options: _Options) -> Tensor:
    """``(K'_f - 1/2) log2(e) / tau_f``: less 1/2, since N exp(80) is too large for float32."""
    unit = _LOG2E / options.flow_temperature
    exponent = _gaussian(tile, points, options.flow_sigma, unit)
    if tile.on_diagonal and options.self_pairs == "subtract_identity":
        exponent.diagonal(dim1=1, dim2=2).sub_(unit)
    return exponent.sub_(unit / 2)


def _drop_self_pairs(tile: _Tile, kernel: Tensor, self_pairs: str) -> None:
    if tile.on_diagonal and self_pairs == "exclude":
        kernel.diagonal(dim1=1, dim2=2).zero_()


def row_coefficients(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Which images have pairs, (B, 1), and each row's part of its image's mean, (B, N)."""
    valid = has_pairs(weight)[:, None]
    total = torch.where(valid, weight.sum(-1, keepdim=True), 1)
    return valid, torch.where(valid, weight / total, 0)
