"""The cross-pixel flow-similarity losses, dense: the definition the other back ends are tested on.

Mahendran, Thewlis and Vedaldi, "Cross Pixel Optical-Flow Similarity for Self-Supervised Learning"
(arXiv 1807.05636): the kernels and the three objectives are those of its method section (kernel
matching by cross-entropy, by alignment, by regression).

An image is N pixels; pixel u has an embedding ``ê_u`` of unit length, a flow vector ``f_u``
(pixels, x right, y down) and a weight ``w_u >= 0`` (0 = ignored). With

    K_e(u, v) = s <ê_u, ê_v>                            the embedding kernel, in [-s, s]
    K_f(u, v) = exp(-|f_u - f_v|^2 / (2 sigma^2))       the flow kernel, in (0, 1]

the losses of one image are

    cross-entropy   L = (1/W) sum_u w_u [ log z_u - (1/y_u) sum_v m w_v exp(K'_f/tau_f) K'_e/tau_e ]
                    z_u = sum_v m w_v exp(K'_e/tau_e)     y_u = sum_v m w_v exp(K'_f/tau_f)
                    W   = sum_u w_u
    alignment       L = 1 - <K_e, K_f> / (|K_e| |K_f|)    each sum over pairs carries m w_u w_v
    regression      L = sum m w_u w_v (K_e - K_f)^2 / sum m w_u w_v

Pairs of a pixel with itself say nothing. ``self_pairs="exclude"`` drops them (``m_uu = 0``, else
``m = 1``, ``K' = K``); ``"subtract_identity"``, for cross-entropy only, keeps them with
``K' = K - I`` as re-implementations of the paper do. The cross-entropy is ``-sum S_f log S_e`` of
the two row softmaxes S, less a constant; with the target's entropy in the same convention,

    H = (1/W) sum_u w_u [ log y_u - (1/y_u) sum_v m w_v exp(K'_f/tau_f) K'_f/tau_f ],

the divergence is ``KL = L - H >= 0``. An image with fewer than two weighted pixels has no pairs and
its loss is 0 (with a gradient of zeros).

The functions take ``embedding`` (B, N, D) of unit length, ``scale`` (s, a float or a tensor of no
dimensions), ``flow`` (B, N, 2) and ``weight`` (B, N), all finite and of one dtype, and return (B,).
A back end has ``cross_entropy``, ``target_entropy`` and ``inner_products``; those here make N x N
matrices and keep them for autograd.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """What a loss is computed with, whatever its back end."""

    embedding_temperature: float
    flow_sigma: float
    flow_temperature: float
    exclude: bool
    """Self pairs are left out; else the identity is subtracted from both kernels."""


class InnerProducts(NamedTuple):
    """Sums over pairs of different pixels with weights of sum 1, K_e of scale 1; each (B,)."""

    e_f: Tensor  # <K_e, K_f>
    e_e: Tensor  # |K_e|^2
    f_f: Tensor  # |K_f|^2
    pairs: Tensor  # of the weights alone


def cross_entropy(
    embedding: Tensor, scale: float | Tensor, flow: Tensor, weight: Tensor, options: Options
) -> Tensor:
    """Cross-entropy of the embedding's row softmax against the flow's, (B,)."""
    k_e, k_f, m = _kernels(embedding, scale, flow, options)
    # Only the ratio to y matters, so the exponent's range may be centred: exp(80) N overflows.
    target = (k_f - 0.5) / options.flow_temperature
    return _softmax_loss(k_e / options.embedding_temperature, target, m, weight)


def target_entropy(flow: Tensor, weight: Tensor, options: Options) -> Tensor:
    """Entropy H of the flow's row softmax, (B,): what the cross-entropy can't go below."""
    _, k_f, m = _kernels(flow, 1.0, flow, options)
    target = (k_f - 0.5) / options.flow_temperature
    return _softmax_loss(target, target, m, weight)


def inner_products(
    embedding: Tensor, flow: Tensor, weight: Tensor, options: Options
) -> InnerProducts:
    """The sums over pairs that alignment and regression are made of."""
    k_e, k_f, m = _kernels(embedding, 1.0, flow, options)
    w = unit_sum(weight)
    mww = m * w[:, :, None] * w[:, None, :]
    return InnerProducts(*((mww * p).sum((1, 2)) for p in (k_e * k_f, k_e**2, k_f**2, 1)))


def kernel_alignment(products: InnerProducts, weight: Tensor) -> Tensor:
    """One minus the cosine between the two kernel matrices, (B,); the scale cancels.

    A kernel whose root mean square is below 1e-6 counts as all zeros: rounding noise has no
    direction worth learning, so the cosine is about 0 there instead of anything from -1 to 1.
    """
    e_f, e_e, f_f, _ = products
    cosine = e_f / (e_e.clamp_min(1e-12) * f_f.clamp_min(1e-12)).sqrt()
    return torch.where(has_pairs(weight), 1 - cosine, 0)


def regression(products: InnerProducts, weight: Tensor, scale: float | Tensor) -> Tensor:
    """Mean squared difference of the two kernels over pairs, (B,)."""
    e_f, e_e, f_f, pairs = products
    valid = has_pairs(weight)
    total = scale**2 * e_e - 2 * scale * e_f + f_f
    return torch.where(valid, total / torch.where(valid, pairs, 1), 0)


def has_pairs(weight: Tensor) -> Tensor:
    """Which images of ``weight`` (B, N) have a pair of weighted pixels, (B,) bool."""
    return (weight != 0).sum(-1) >= 2


def unit_sum(weight: Tensor) -> Tensor:
    """``weight`` (B, N) divided by its sum; zeros stay zeros."""
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total == 0, 1, total)


def row_coefficients(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Which images have pairs, (B, 1), and each row's part of its image's mean, (B, N)."""
    valid = has_pairs(weight)[:, None]
    return valid, torch.where(valid, unit_sum(weight), 0)


def _kernels(
    embedding: Tensor, scale: float | Tensor, flow: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """K'_e, K'_f and m, each (B or 1, N, N)."""
    k_e = scale * embedding @ embedding.mT
    difference = flow[:, :, None, :] - flow[:, None, :, :]  # (B, N, N, 2)
    k_f = torch.exp(-difference.square().sum(-1) / (2 * options.flow_sigma**2))
    identity = torch.eye(flow.shape[1], dtype=flow.dtype, device=flow.device)[None]
    if options.exclude:
        return k_e, k_f, 1 - identity
    return k_e - identity, k_f - identity, torch.ones_like(identity)


def _softmax_loss(learned: Tensor, target: Tensor, m: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy of two row softmaxes with these exponents (B, N, N), weighted mean (B,)."""
    valid, coefficient = row_coefficients(weight)
    mw = m * weight[:, None, :]
    z, p = (mw * learned.exp()).sum(-1), mw * target.exp()
    z, y = (torch.where(valid, t, 1) for t in (z, p.sum(-1)))
    return (coefficient * (z.log() - (p * learned).sum(-1) / y)).sum(-1)
