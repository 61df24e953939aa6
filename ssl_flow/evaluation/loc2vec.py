"""Embeddings of a map's tiles, judged: what lies there, what is alike, what is near.

The split is spatial (`tile_blocks`): neighbours and the linear classifier come from tiles of the
train blocks, what is scored from the inner parts of the others, and no two such tiles share ground.
Training holds out the same blocks, so an encoder may be judged on the map that it has learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ssl_flow.data.georeference import great_circle, unit_vectors
from ssl_flow.data.sphere import around, tile_blocks
from ssl_flow.data.tiles import NO_LAND, TileMap
from ssl_flow.evaluation.metrics import effective_rank
from ssl_flow.evaluation.outcome import Outcome, Settings
from ssl_flow.evaluation.pixel_features import estimate_batchnorm, frozen
from ssl_flow.models import create_tile_encoder, load_tile_encoder
from ssl_flow.models.encoder import device_of

_BANDS = ((1, 4), (4, 16), (16, np.inf))  # of the distance to a negative, in sides of a tile


@dataclass(frozen=True)
class Loc2Vec(Settings):
    """The protocol; all of it is ours."""

    name: ClassVar[str] = "loc2vec"
    version: ClassVar[int] = 3  # 2: histograms of 8 ranges; 1: no spearman where all are alike
    metres: float = 200  # side of a tile on the ground, as the encoder was trained
    pixels: int = 64  # side of a tile, likewise
    train_tiles: int = 3000
    test_tiles: int = 1500
    neighbours: int = 20  # that vote, by Euclidean distance, all alike


class Judged(NamedTuple):
    """N tiles of a map to learn from or to score."""

    xy: np.ndarray  # (N, 2) pixels of their centres
    places: np.ndarray  # (N, 2) longitude and latitude
    tiles: np.ndarray  # (N, pixels, pixels, C) uint8
    labels: dict[str, np.ndarray]  # name -> (N,) the class that most of a tile's pixels have


class Histograms(nn.Module):
    """The floor: of every channel the shares of pixels in 32 equal ranges of values.

    With 8 ranges a dark satellite picture, most of which has values below 100, fills three.
    """

    def normalize(self, tiles: Tensor) -> Tensor:
        """(B, H, W, C) uint8, as they are."""
        return tiles

    def forward(self, tiles: Tensor) -> Tensor:
        """(B, H, W, C) uint8 -> (B, 32 C)."""
        shares = [(tiles // 8 == k).float().mean((1, 2)) for k in range(32)]
        return torch.cat(shares, 1)


def load_judged(spec: str, seed: int, tile_map: TileMap) -> nn.Module:
    """`histograms`, `random:NAME`, or a folder with an encoder of this map's channels.

    ValueError where it takes other channels; FileNotFoundError, WeightsError: `load_tile_encoder`.
    """
    if spec == "histograms":
        return Histograms()
    if spec.startswith(("random:", "timm:")):
        torch.manual_seed(seed)
        return create_tile_encoder(spec, tile_map.channels)
    encoder = load_tile_encoder(spec)
    taken, given = ([c.rpartition(".")[2] for c in part]  # satellite.red is red
                    for part in (encoder.channels, tile_map.channels))  # fmt: skip
    if taken != given:
        raise ValueError(
            f"{spec} takes the channels {', '.join(encoder.channels)}; {tile_map.path} has "
            f"{', '.join(tile_map.channels)}: choose some by map:PATH@NAME,NAME"
        )
    return encoder


def embed_tiles(encoder: Any, tiles: np.ndarray, size: int = 256) -> np.ndarray:  # noqa: ANN401
    """(N, H, W, C) uint8 -> (N, D) float32; ValueError where these are not finite."""
    device = device_of(encoder)
    with frozen(encoder):
        parts = torch.from_numpy(tiles).split(size)
        found = torch.cat([encoder(encoder.normalize(x.to(device))).float().cpu() for x in parts])
    if not found.isfinite().all():
        raise ValueError("the encoder's embeddings of the map's tiles are not finite")
    return found.numpy()


def run_loc2vec(encoder: nn.Module, tile_map: TileMap, protocol: Loc2Vec | None = None) -> Outcome:
    """Judge an encoder of tiles (`load_judged`); everything but the encoder is the same for all.

    Scores: `knn_LABEL` and `linear_LABEL`, shares of the tiles whose main class is found (k nearest
    neighbours; logistic regression of standardised embeddings); `triplets_...`, how often a tile is
    nearer to its shifted, turned self than to another 1-4, 4-16 or more tiles away;
    `effective_rank`; `silhouette_LABEL` of the classes; `spearman` of the distances of embeddings
    and on the ground (0 where all embeddings are alike). BatchNorm statistics of an untrained
    encoder are estimated on the train tiles. ValueError where the encoder was trained on other
    tiles, or too few can be judged.
    """
    from scipy.spatial.distance import cdist
    from scipy.stats import spearmanr
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import silhouette_samples
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    protocol = protocol or Loc2Vec()
    check_tile(encoder, protocol)
    train, test, again = judged_tiles(tile_map, protocol)
    estimate_untrained(encoder, train.tiles)
    known, found, seen_anew = (embed_tiles(encoder, t) for t in (train.tiles, test.tiles, again))
    values: dict[str, np.ndarray] = {}
    neighbours = min(protocol.neighbours, len(known))
    for label, truth in test.labels.items():
        knn = KNeighborsClassifier(neighbours).fit(known, train.labels[label])
        values[f"knn_{label}"] = knn.predict(found) == truth
        if len(np.unique(train.labels[label])) > 1:
            linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            linear.fit(known, train.labels[label])
            values[f"linear_{label}"] = linear.predict(found) == truth
    apart = great_circle(test.places[:, None], test.places[None]) / protocol.metres
    between = cdist(found, found)
    nearer = np.linalg.norm(found - seen_anew, axis=1)[:, None] < between
    for low, high in _BANDS:
        band = (apart >= low) & (apart < high)
        if band.any():
            share = (nearer & band).sum(1) / band.sum(1).clip(1)
            share[~band.any(1)] = share[band.any(1)].mean()  # leaves the mean as it is
            name = f"{low}-{high}" if np.isfinite(high) else f"{low}+"
            values[f"triplets_{name}_tiles"] = share
    for label, truth in test.labels.items():
        if 1 < len(np.unique(truth)) < len(truth):
            values[f"silhouette_{label}"] = silhouette_samples(found, truth)
    values = {name: value.astype(np.float64) for name, value in values.items()}
    pairs = np.triu_indices(len(found), 1)
    scores = {name: float(value.mean()) for name, value in values.items()}
    scores["effective_rank"] = effective_rank(torch.from_numpy(found))
    alike = np.ptp(between[pairs]) == 0  # collapsed
    scores["spearman"] = 0.0 if alike else float(spearmanr(between[pairs], apart[pairs]).statistic)
    blocks = tile_blocks(protocol.metres).cells(test.places).astype(int)
    per_class: dict[str, float | None] = {}
    for label, truth in list(test.labels.items())[:1]:
        for value, name in (tile_map.labels[label].names or {}).items():
            if (mine := truth == value).any():
                per_class[name] = float(values[f"knn_{label}"][mine].mean())
    items = [f"{row}_{column}/{i}" for i, (row, column) in enumerate(blocks.tolist())]
    common = {
        k: float(np.unique(x, return_counts=True)[1].max() / len(x)) for k, x in test.labels.items()
    }
    # What is near is alike: how much of a label the mere place tells, no strip takes away.
    by_place = KNeighborsClassifier(neighbours)
    spots, judged_spots = unit_vectors(train.places), unit_vectors(test.places)
    place = {
        k: float(by_place.fit(spots, train.labels[k]).score(judged_spots, x))
        for k, x in test.labels.items()
    }
    details = {"dimensions": found.shape[1], "train_tiles": len(known), "test_tiles": len(found),
               "most_common_class": common, "knn_of_place": place}  # fmt: skip
    return Outcome(scores, None, values, items, per_class, details)


def files_of(tile_map: TileMap) -> list[Path]:
    """What a map is read from; their sizes and times tell whether it is still the same."""
    return [p for p in sorted(tile_map.path.rglob("*")) if p.is_file()] or [tile_map.path]


def check_tile(encoder: nn.Module, protocol: Loc2Vec) -> None:
    """ValueError unless an encoder was trained on such tiles, or does not say on which."""
    tile: dict[str, Any] = getattr(encoder, "tile", {})
    wanted = {"side": protocol.pixels, "metres": protocol.metres}
    if tile and tile != wanted:
        raise ValueError(
            f"the encoder was trained on tiles of {tile['metres']:g} m and {tile['side']} pixels: "
            f"judge it by --metres {tile['metres']:g} --pixels {tile['side']}"
        )


def estimate_untrained(encoder: Any, tiles: np.ndarray, count: int = 1024) -> None:  # noqa: ANN401
    """Set BatchNorm statistics of an encoder that has never been trained to those of tiles."""
    counts = [b for name, b in encoder.named_buffers() if name.endswith("num_batches_tracked")]
    if not any(counts):
        parts = torch.from_numpy(tiles[:count]).split(256)
        estimate_batchnorm(encoder, (encoder.normalize(x.to(device_of(encoder))) for x in parts))


@lru_cache(maxsize=2)
def judged_tiles(tile_map: TileMap, protocol: Loc2Vec) -> tuple[Judged, Judged, np.ndarray]:
    """Tiles of the train blocks, tiles to score, and these shifted and turned (N, S, S, C).

    ValueError where fewer than 20 can be learned from, or scored.
    """
    blocks = tile_blocks(protocol.metres)
    train = _draw(tile_map, protocol, blocks.train, protocol.train_tiles, 0)
    test = _draw(tile_map, protocol, blocks.judge, protocol.test_tiles, 1)
    rng, again = np.random.default_rng(2), []
    for xy, place in zip(test.xy, test.places, strict=True):
        x, y = tile_map.georeference.pixel(around(rng, place, protocol.metres / 2))
        if not tile_map.contains(np.array([x, y])):
            x, y = xy
        angle = rng.uniform(0, 360)
        again.append(tile_map.cut(x, y, protocol.pixels, metres=protocol.metres, rotation=angle))
    return train, test, np.stack(again)


def _draw(tile_map: TileMap, protocol: Loc2Vec, chosen: Any, count: int, seed: int) -> Judged:  # noqa: ANN401
    side, metres = protocol.pixels, protocol.metres
    xy, _ = tile_map.draw_centres(
        count, side, metres=metres, rng=np.random.default_rng(seed),
        where=lambda xy: chosen(tile_map.lonlat(xy)) & tile_map.is_land(xy),
    )  # fmt: skip
    labels, known = {}, np.ones(len(xy), bool)
    for name, mosaic in tile_map.labels.items():
        cuts = [tile_map.cut_labels(name, x, y, side, metres=metres) for x, y in xy.tolist()]
        labels[name] = np.array([np.bincount(cut.ravel()).argmax() for cut in cuts])
        ignored = [v for v, n in (mosaic.names or {}).items() if n.lower() in NO_LAND]
        known &= ~np.isin(labels[name], ignored)
    xy = xy[known]
    if len(xy) < 20:
        raise ValueError(
            f"{tile_map.path}: only {len(xy)} of {count} tiles of {metres:g} m are mainly of a "
            f"class other than {', '.join(NO_LAND)}: change --metres"
        )
    tiles = np.stack([tile_map.cut(x, y, side, metres=metres) for x, y in xy.tolist()])
    return Judged(xy, tile_map.lonlat(xy), tiles, {k: v[known] for k, v in labels.items()})
