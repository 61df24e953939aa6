"""Which negative a triplet gets: hard ones out of the batch, found in its matrix of distances.

Rows are B anchors, then their B positives, so that row i's own view is row (i + B) mod 2B and
every row is an anchor once. Indices are what is mined, without gradient; any loss of
`ssl_flow.losses.triplet` then takes `embedding[anchor], embedding[positive], embedding[negative]`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Mined(NamedTuple):
    """Rows of the T triplets, (T,) int64 each; a row without any valid negative is left out."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


@torch.no_grad()
def batch_hard(embedding: Tensor, apart: Tensor) -> Mined:
    """For each row the nearest valid negative (Hermans et al., 2017, arXiv 1703.07737, eq. 5).

    A place has two views, so its hardest positive is its only one.

    Args:
        embedding: (2B, D).
        apart: (2B, 2B) bool: which pairs are valid negatives, those of places far apart.

    Raises:
        ValueError: shapes that do not fit together, or an odd number of rows.
    """
    distances, _ = _distances(embedding, apart)
    return _mined(distances.masked_fill(~apart, math.inf).argmin(1), apart)


@torch.no_grad()
def semi_hard(embedding: Tensor, apart: Tensor) -> Mined:
    """For each row the nearest valid negative that is farther than the positive.

    Schroff et al., "FaceNet", CVPR 2015, section 3.2: the hardest negatives can collapse a young
    embedding. A row whose valid negatives are all nearer than its positive gets the farthest.

    Args: as in `batch_hard`.

    Raises:
        ValueError: shapes that do not fit together, or an odd number of rows.
    """
    distances, positive = _distances(embedding, apart)
    beyond = apart & (distances > positive[:, None])
    nearest = distances.masked_fill(~beyond, math.inf).argmin(1)
    farthest = distances.masked_fill(~apart, -math.inf).argmax(1)
    return _mined(torch.where(beyond.any(1), nearest, farthest), apart)


def _distances(embedding: Tensor, apart: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs, (2B, 2B), and of each row with its other view, (2B,)."""
    rows = len(embedding)
    if embedding.ndim != 2 or rows % 2 or apart.shape != (rows, rows):
        raise ValueError(
            "embedding must be (2B, D), anchors and then positives, and apart (2B, 2B), found "
            f"{tuple(embedding.shape)} and {tuple(apart.shape)}"
        )
    with torch.autocast(embedding.device.type, enabled=False):
        points = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
        # By a matrix product distances near 0 would be rounding noise.
        distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distances, distances.diagonal(rows // 2).repeat(2)


def _mined(negative: Tensor, apart: Tensor) -> Mined:
    anchor = apart.any(1).nonzero()[:, 0]
    return Mined(anchor, (anchor + len(apart) // 2) % len(apart), negative[anchor])
