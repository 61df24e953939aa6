"""What makes places that serve alike lie close: losses of an anchor, a positive and a negative.

All take the embeddings of B triplets, (B, D) each, and give the mean over the batch. The first
three use the Euclidean distance of embeddings of any length, `p = |a - p|` and `n = |a - n|`;
Sentiance's "Loc2Vec" (V. Spruyt, 2018) compares them. They are computed in at least float32, also
under autocast, and hold for components up to about 1e18, where float32 squares overflow.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TripletMarginLoss(nn.Module):
    """`max(0, p - n + margin)`; Schroff et al., "FaceNet", CVPR 2015, there with squares.

    Example:
        >>> anchor, positive, negative = torch.randn(3, 8, 16)
        >>> loss = TripletMarginLoss()(anchor, positive, negative)
    """

    def __init__(self, margin: float = 1.0) -> None:
        """`margin`: how much farther than the positive a negative must be to cost nothing."""
        super().__init__()
        self.margin = _positive("margin", margin)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """(B, D) each -> scalar; ValueError where the shapes are not these."""
        _check(anchor, positive, negative)
        near, far = distance(anchor, positive), distance(anchor, negative)
        return (near - far + self.margin).relu().mean()


class SoftmaxRatioLoss(nn.Module):
    """`sigmoid(p - n)^2`, the square of `e^p / (e^p + e^n)`, which is never computed as such.

    Hoffer & Ailon, "Deep metric learning using triplet network", 2015, but for a constant factor.
    It saturates: a triplet that is wrong by far more than 1 has next to no gradient.
    """

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """(B, D) each -> scalar; ValueError where the shapes are not these."""
        _check(anchor, positive, negative)
        return _ratio(distance(anchor, positive), distance(anchor, negative))


class SoftPNLoss(nn.Module):
    """The softmax ratio with `n = min(|a - n|, |p - n|)`: the harder of the two negative pairs.

    Balntas et al., "PN-Net", 2016, but for a constant factor. The gradient goes through the smaller
    distance, and half through each where they are equal.
    """

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """(B, D) each -> scalar; ValueError where the shapes are not these."""
        _check(anchor, positive, negative)
        far = torch.minimum(distance(anchor, negative), distance(positive, negative))
        return _ratio(distance(anchor, positive), far)


class InfoNCELoss(nn.Module):
    """Softmax cross-entropy over the batch: which of all embeddings is a query's other view?

    Van den Oord et al., 2018, equation 4, in the form of SimCLR (Chen et al., ICML 2020, equation
    1): the cosine by a temperature, every anchor and every positive in turn the query, all but
    itself the keys.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        """`temperature`: what the cosine is divided by."""
        super().__init__()
        self.temperature = _positive("temperature", temperature)

    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        negative: Tensor | None = None,
        apart: Tensor | None = None,
    ) -> Tensor:
        """Mean over the 2B queries.

        Args:
            anchor: (B, D).
            positive: (B, D), the other view of each anchor.
            negative: (B, D), further keys, no queries.
            apart: (2B, K) bool, K = 2B or 3B keys in the order of the arguments: which keys may be
                negatives of a query, since a batch holds near places too. A query's own view
                counts in any case, and itself never. None = all others.

        Raises:
            ValueError: shapes that do not fit together.
        """
        given = [anchor, positive] if negative is None else [anchor, positive, negative]
        _check(*given)
        queries, keys = 2 * len(anchor), len(given) * len(anchor)
        if apart is not None and apart.shape != (queries, keys):
            raise ValueError(f"apart must be {(queries, keys)}, found {tuple(apart.shape)}")
        with torch.autocast(anchor.device.type, enabled=False):
            unit = F.normalize(_at_least_float32(torch.cat(given)), dim=1, eps=1e-6)
            logits = unit[:queries] @ unit.T / self.temperature  # (2B, K)
            own = torch.arange(queries, device=unit.device)
            target = own.roll(len(anchor))
            allowed = torch.ones_like(logits, dtype=torch.bool) if apart is None else apart.clone()
            allowed[own, own] = False
            allowed[own, target] = True
            return F.cross_entropy(logits.masked_fill(~allowed, -math.inf), target)


def distance(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distance of rows, (B, D) twice -> (B,); its gradient at distance 0 is 0.

    Half precision is computed in float32.
    """
    with torch.autocast(first.device.type, enabled=False):
        difference = _at_least_float32(first) - _at_least_float32(second)
        length: Tensor = torch.linalg.vector_norm(difference, dim=1)
        return length


def _ratio(near: Tensor, far: Tensor) -> Tensor:
    return (near - far).sigmoid().square().mean()


def _at_least_float32(embedding: Tensor) -> Tensor:
    return embedding.to(torch.promote_types(embedding.dtype, torch.float32))


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, found {value}")
    return float(value)


def _check(*embeddings: Tensor) -> None:
    shapes = [tuple(embedding.shape) for embedding in embeddings]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(f"embeddings must all be (B, D) of one shape, not empty, found {shapes}")
