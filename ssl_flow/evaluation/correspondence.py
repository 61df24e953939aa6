"""Correspondence: is a pixel's nearest neighbour in the next frame where the true flow says?

No flow is estimated and nothing is trained. Pixels on a grid in the first frame whose true match is
known and inside the second frame are looked up among all pixels of the second frame. Features are
read bilinearly at pixels; every level has unit length, so the similarity of hypercolumns is the
mean of their levels' cosines. Protocol and defaults are ours; the scores are the field's: mean
endpoint error (Baker et al., IJCV 2011) and PCK, the share of matches within a distance (Yang and
Ramanan, PAMI 2013), in pixels or as a fraction of the frame's larger side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_flow.data.flow_pairs import FlowPair
from ssl_flow.data.segmentation import Labelled
from ssl_flow.evaluation.outcome import Outcome, Settings
from ssl_flow.evaluation.pixel_features import (
    bar,
    check_features,
    frozen,
    image_levels,
    sample_levels,
)
from ssl_flow.models.encoder import Encoder

_KEYS = 8192  # pixels compared with at once; no influence on the result


@dataclass(frozen=True)
class Correspondence(Settings):
    """The protocol; distances in pixels of the frames as they are."""

    name: ClassVar[str] = "correspondence"
    features: str = "hypercolumn"  # all levels; or embedding, or stage1 (finest), stage2, ...
    query_step: int = 16  # between the pixels of the first frame that are looked up
    pixels: tuple[float, ...] = (1, 3, 5)  # PCK: distances that count as right; first the headline
    sides: tuple[float, ...] = (0.05, 0.1)  # PCK: the same as fractions of the larger side


def run_correspondence(
    encoder: Encoder, pairs: Iterable[FlowPair], protocol: Correspondence | None = None
) -> Outcome:
    """Match every pair (as of `open_flow_pairs`) and compare with its true flow; nothing is random.

    Scores are means over the pairs of the means over their pixels. `details` holds the same scores
    of what every table should be read against: `zero flow` (nothing moves) and `floor` (the best
    that whole pixels can do). ValueError also for no pairs, a pair of different sizes or without a
    known match inside the frame (names it).
    """
    protocol = protocol or Correspondence()
    check_features(encoder, protocol.features)
    tables: dict[str, list[dict[str, float]]] = {"found": [], "zero flow": [], "floor": []}
    items = []
    with frozen(encoder):
        for pair in bar(pairs, "pairs"):
            height, width = pair.known.shape
            limits = {f"pck_{limit:g}px": limit for limit in protocol.pixels}
            limits |= {f"pck_{s:g}": s * max(height, width) for s in protocol.sides}
            queries, targets = _queries(pair, protocol.query_step)
            found = _match(encoder, pair, queries, protocol).numpy()
            rounded = np.clip(np.rint(targets), 0, (width - 1, height - 1))
            for name, guess in (("found", found), ("zero flow", queries), ("floor", rounded)):
                error = np.linalg.norm(guess - targets, axis=1)
                scores = {key: float((error <= limit).mean()) for key, limit in limits.items()}
                tables[name].append(scores | {"endpoint_error_px": float(error.mean())})
            items.append(pair.name)
    if not items:
        raise ValueError("no pairs of frames to match")
    values = {
        name: {key: np.array([row[key] for row in rows]) for key in rows[0]}
        for name, rows in tables.items()
    }
    means = {n: {key: float(x.mean()) for key, x in part.items()} for n, part in values.items()}
    return Outcome(means.pop("found"), values=values["found"], items=items, details={**means})


def _queries(pair: FlowPair, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) pixels (x, y) of the first frame, and where they truly are in the second."""
    height, width = pair.known.shape
    for what, array in (("first", pair.first), ("second", pair.second), ("flow", pair.flow)):
        if array.shape[:2] != (height, width):
            raise ValueError(f"{pair.name}: {what} is {array.shape[:2]}, known {(height, width)}")
    rows, columns = np.mgrid[step // 2 : height : step, step // 2 : width : step].reshape(2, -1)
    queries = np.stack([columns, rows], 1)
    targets = queries + pair.flow[rows, columns]
    inside = ((targets >= 0) & (targets <= (width - 1, height - 1))).all(1)
    kept = inside & pair.known[rows, columns]
    if not kept.any():
        raise ValueError(f"{pair.name}: no pixel of the grid has a known match inside the frame")
    return queries[kept], targets[kept]


def _match(
    encoder: Encoder, pair: FlowPair, queries: np.ndarray, protocol: Correspondence
) -> Tensor:
    """(N, 2) pixels (x, y) of the second frame that are nearest to the queries of the first."""
    names = [f"{pair.name}, {which} frame" for which in ("first", "second")]
    frames = map(Labelled, (pair.first, pair.second), (pair.known, pair.known), names)
    maps = [found[1:] for found in image_levels(encoder, frames, protocol.features, 2)]

    def sample(frame: int, pixels: Tensor) -> Tensor:
        """(N, sum C) with unit length over each level."""
        at = pixels.T.flip(0)
        read = (sample_levels([x[0]], [s], *at) for x, s in zip(*maps[frame], strict=True))
        return torch.cat([F.normalize(level, dim=1) for level in read], dim=1)

    device, (height, width) = maps[0][0][0].device, pair.known.shape
    pixels = torch.from_numpy(queries).to(device)
    asked = sample(0, pixels)  # (N, C)
    best, found = asked.new_full((len(asked),), -torch.inf), torch.zeros_like(pixels)
    for part in torch.arange(height * width, device=device).split(_KEYS):
        keys = torch.stack([part % width, part // width], 1)
        similarity, which = (asked @ sample(1, keys).T).max(1)
        found = torch.where((similarity > best)[:, None], keys[which], found)
        best = best.maximum(similarity)
    return found.cpu()
