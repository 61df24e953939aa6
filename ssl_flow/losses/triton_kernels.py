"""Triton kernels over all pairs of pixels, which :mod:`ssl_flow.losses.triton_pairwise` runs.

A program owns a tile of rows u of one image and walks over all columns v; the two kernel matrices
live in registers only, a tile at a time. No program writes what another one reads or writes, so
results are the same bit for bit each time. The own tile, the only one with self pairs, comes first
and outside the loop, which then needs no masks.

What a GPU is short of here are exponentials: three a pair and pass (one for the products). So all
else is kept off them and small: powers of two; scales folded into the operands; cosines are
bounded, so there is no running maximum.

Matrix products run on the tensor cores in float16 with the rounding error carried along:
``x = hi + lo`` and ``x y = hi hi + hi lo + lo hi``, 22 of float32's 24 bits, summed in float32.
"""

# Device functions have no types that a checker could read.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _load_operand(hi, lo, pixel, n, WIDTH: tl.constexpr):
    """Rows ``pixel`` of the two halves of an (n, WIDTH) matrix, zeros beyond its end."""
    offset = pixel[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (pixel < n)[:, None]
    return tl.load(hi + offset, inside, 0.0), tl.load(lo + offset, inside, 0.0)


@triton.jit
def _load_flow(points, pixel, n):
    return tl.load(points + pixel, pixel < n, 0.0), tl.load(points + n + pixel, pixel < n, 0.0)


@triton.jit
def _other_tile(own, i, tiles):
    """The i-th tile after ``own``, round the end."""
    tile = own + i
    return tl.where(tile < tiles, tile, tile - tiles)


@triton.jit
def _gaussian(x_u, y_u, x_v, y_v, rate):
    """From differences, and scaled after: else a motion common to all pixels would cost digits."""
    dx = x_u[:, None] - x_v[None, :]
    dy = y_u[:, None] - y_v[None, :]
    return tl.exp2((dx * dx + dy * dy) * -rate)


@triton.jit
def _split(matrix):
    """float16 and what its rounding lost, in float16."""
    hi = matrix.to(tl.float16)
    return hi, (matrix - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def _add_product(total, matrix, hi, lo):
    """``total + matrix (hi + lo)``.

    Tensor cores truncate as they add up, so they get one tile each; the tiles are added in float32.
    """
    matrix_hi, matrix_lo = _split(matrix)
    product = tl.dot(matrix_lo, hi)
    product = tl.dot(matrix_hi, lo, product)
    return total + tl.dot(matrix_hi, hi, product)


@triton.jit
def _exponents(hi_u, lo_u, x_u, y_u, hi_v, lo_v, x_v, y_v, rate, amplitude):
    """Powers of two of the two kernels, (rows, columns)."""
    e = tl.dot(lo_u, tl.trans(hi_v))
    e = tl.dot(hi_u, tl.trans(lo_v), e)
    e = tl.dot(hi_u, tl.trans(hi_v), e)
    f = amplitude * _gaussian(x_u, y_u, x_v, y_v, rate) - 0.5 * amplitude
    return e, f


@triton.jit
def _row_sums(e, f, w_v):
    """The part of ``z, y`` and of the cross term that these columns give, each (rows,)."""
    p = tl.exp2(f) * w_v[None, :]
    # Joined, they are summed in the layout of e; apart, the compiler takes two and works out each
    # exponential of f twice.
    y, cross = tl.split(tl.sum(tl.join(p, p * e), 1))
    return tl.sum(tl.exp2(e) * w_v[None, :], 1), y, cross


@triton.jit
def sums_kernel(
    hi,  # (B, n, WIDTH) float16, with lo: ê sqrt(s log2(e) / tau_e), then zeros
    lo,
    points,  # (B, 2, n): flow
    weight,  # (B, n)
    sums,  # out, (B, 3, n)
    n,
    rate,  # log2(e) / (2 sigma^2)
    amplitude,  # log2(e) / tau_f
    drop_e,  # what self pairs lose in the exponent
    drop_f,
    SIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``z``, ``y`` and the cross term ``sum_v m w_v F_uv log2(E_uv)`` of each row."""
    own, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    hi, lo = hi + image * n * WIDTH, lo + image * n * WIDTH
    points, weight, sums = points + image * 2 * n, weight + image * n, sums + image * 3 * n
    u = own * SIDE + tl.arange(0, SIDE)
    hi_u, lo_u = _load_operand(hi, lo, u, n, WIDTH)
    x_u, y_u = _load_flow(points, u, n)
    w_u = tl.load(weight + u, u < n, 0.0)
    e, f = _exponents(hi_u, lo_u, x_u, y_u, hi_u, lo_u, x_u, y_u, rate, amplitude)
    self_pair = u[:, None] == u[None, :]
    e, f = tl.where(self_pair, e - drop_e, e), tl.where(self_pair, f - drop_f, f)
    z, y, cross = _row_sums(e, f, w_u)
    tiles = tl.cdiv(n, SIDE)
    for i in tl.range(1, tiles, num_stages=STAGES):
        v = _other_tile(own, i, tiles) * SIDE + tl.arange(0, SIDE)
        hi_v, lo_v = _load_operand(hi, lo, v, n, WIDTH)
        x_v, y_v = _load_flow(points, v, n)
        w_v = tl.load(weight + v, v < n, 0.0)
        e, f = _exponents(hi_u, lo_u, x_u, y_u, hi_v, lo_v, x_v, y_v, rate, amplitude)
        more_z, more_y, more_cross = _row_sums(e, f, w_v)
        z, y, cross = z + more_z, y + more_y, cross + more_cross
    tl.store(sums + u, z, u < n)
    tl.store(sums + n + u, y, u < n)
    tl.store(sums + 2 * n + u, cross, u < n)


@triton.jit
def _pull(e, f, w_u, a_u, b_u, w_v, a_v, b_v):
    """How strongly v draws u, (rows, columns): the bracket of the gradient."""
    to_e = a_u[:, None] * w_v[None, :] + w_u[:, None] * a_v[None, :]
    to_f = b_u[:, None] * w_v[None, :] + w_u[:, None] * b_v[None, :]
    return tl.exp2(e) * to_e - tl.exp2(f) * to_f


@triton.jit
def gradient_kernel(
    hi,  # as in sums_kernel
    lo,
    points,
    factors,  # (B, 3, n): w, lifted w / z and w / y
    finish,  # (B,): what the whole image's gradient is multiplied by
    gradient,  # out, (B, n, WIDTH)
    n,
    rate,
    amplitude,
    drop_e,
    drop_f,
    SIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient in ê: what each row's pixel is drawn by, from all columns."""
    own, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    hi, lo = hi + image * n * WIDTH, lo + image * n * WIDTH
    points, factors = points + image * 2 * n, factors + image * 3 * n
    gradient += image * n * WIDTH
    u = own * SIDE + tl.arange(0, SIDE)
    hi_u, lo_u = _load_operand(hi, lo, u, n, WIDTH)
    x_u, y_u = _load_flow(points, u, n)
    w_u = tl.load(factors + u, u < n, 0.0)
    a_u = tl.load(factors + n + u, u < n, 0.0)
    b_u = tl.load(factors + 2 * n + u, u < n, 0.0)
    e, f = _exponents(hi_u, lo_u, x_u, y_u, hi_u, lo_u, x_u, y_u, rate, amplitude)
    self_pair = u[:, None] == u[None, :]
    e, f = tl.where(self_pair, e - drop_e, e), tl.where(self_pair, f - drop_f, f)
    pull = _pull(e, f, w_u, a_u, b_u, w_u, a_u, b_u)
    total = _add_product(tl.zeros((SIDE, WIDTH), tl.float32), pull, hi_u, lo_u)
    tiles = tl.cdiv(n, SIDE)
    for i in tl.range(1, tiles, num_stages=STAGES):
        v = _other_tile(own, i, tiles) * SIDE + tl.arange(0, SIDE)
        hi_v, lo_v = _load_operand(hi, lo, v, n, WIDTH)
        x_v, y_v = _load_flow(points, v, n)
        w_v = tl.load(factors + v, v < n, 0.0)
        a_v = tl.load(factors + n + v, v < n, 0.0)
        b_v = tl.load(factors + 2 * n + v, v < n, 0.0)
        e, f = _exponents(hi_u, lo_u, x_u, y_u, hi_v, lo_v, x_v, y_v, rate, amplitude)
        pull = _pull(e, f, w_u, a_u, b_u, w_v, a_v, b_v)
        total = _add_product(total, pull, hi_v, lo_v)
    total *= tl.load(finish + image)
    offset = u[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(gradient + offset, total, (u < n)[:, None])


@triton.jit
def products_kernel(
    hi,  # (B, n, WIDTH) float16, with lo: ê, then zeros
    lo,
    points,  # as in sums_kernel
    weight,  # (B, n)
    product,  # out, (B, n, WIDTH): K_f (w ê)
    n,
    rate,
    SIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The flow kernel times the weighted embedding."""
    own, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    hi, lo = hi + image * n * WIDTH, lo + image * n * WIDTH
    points, weight = points + image * 2 * n, weight + image * n
    product += image * n * WIDTH
    u = own * SIDE + tl.arange(0, SIDE)
    hi_u, lo_u = _load_operand(hi, lo, u, n, WIDTH)
    x_u, y_u = _load_flow(points, u, n)
    w_u = tl.load(weight + u, u < n, 0.0)
    self_pair = u[:, None] == u[None, :]
    kernel = tl.where(self_pair, 0.0, _gaussian(x_u, y_u, x_u, y_u, rate)) * w_u[None, :]
    total = _add_product(tl.zeros((SIDE, WIDTH), tl.float32), kernel, hi_u, lo_u)
    tiles = tl.cdiv(n, SIDE)
    for i in tl.range(1, tiles, num_stages=STAGES):
        v = _other_tile(own, i, tiles) * SIDE + tl.arange(0, SIDE)
        hi_v, lo_v = _load_operand(hi, lo, v, n, WIDTH)
        x_v, y_v = _load_flow(points, v, n)
        w_v = tl.load(weight + v, v < n, 0.0)
        kernel = _gaussian(x_u, y_u, x_v, y_v, rate) * w_v[None, :]
        total = _add_product(total, kernel, hi_v, lo_v)
    offset = u[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(product + offset, total, (u < n)[:, None])
