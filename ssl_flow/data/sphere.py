"""Places on the sphere: distances, uniform draws around a place, blocks that do not leak.

A place is (longitude, latitude) in degrees, float64, and a set of N places (N, 2); distances are
metres along great circles of a sphere of the Earth's mean radius (an ellipsoid's differ by 0.5 %).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssl_flow.data.georeference import EARTH_RADIUS, great_circle


def far_apart(places: np.ndarray, metres: float) -> np.ndarray:
    """(N, 2) -> (N, N) bool: which pairs are more than `metres` apart, so valid negatives."""
    return great_circle(places[:, None], places[None]) > metres


def travel(
    place: np.ndarray, bearing: np.ndarray | float, metres: np.ndarray | float
) -> np.ndarray:
    """Where one gets from places (..., 2) by a bearing (radians from north, clockwise)."""
    lon, lat = np.moveaxis(np.radians(place), -1, 0)
    angle = np.asarray(metres) / EARTH_RADIUS
    # With vectors, since formulas of longitude and latitude break down at the poles.
    outward = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
    north = np.stack([-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)])
    east = np.stack([-np.sin(lon), np.cos(lon), np.zeros_like(lat)])
    heading = np.cos(bearing) * north + np.sin(bearing) * east
    x, y, z = np.cos(angle) * outward + np.sin(angle) * heading
    return np.asarray(np.degrees(np.stack([np.arctan2(y, x), np.arctan2(z, np.hypot(x, y))], -1)))


def around(rng: np.random.Generator, place: np.ndarray, metres: float) -> np.ndarray:
    """A place (2,) uniform by area among those within `metres` of a place (2,)."""
    # The area within an angle t is proportional to sin(t / 2)^2.
    half = np.arcsin(np.sqrt(rng.uniform()) * np.sin(metres / EARTH_RADIUS / 2))
    return travel(place, rng.uniform(0, 2 * np.pi), 2 * EARTH_RADIUS * half)


@dataclass(frozen=True)
class SpatialBlocks:
    """Train and judge on blocks of the Earth, with a strip in between: neighbours do not leak.

    A row of blocks is `block` metres high, and is cut from the meridian 180 degrees on into equal
    blocks at least as wide on its poleward side. Whether a block judges depends on (seed, row,
    column) alone, whatever the places. All of a train block may be trained on; of the others,
    places more than `buffer` from every train block are judged.

    Tiles share no ground if the buffer is the side of a tile times sqrt(2), since they are rotated,
    plus the largest shift of a judged one.
    """

    block: float
    """Metres; at least 4 buffers, else little of a lone block is left to judge."""
    buffer: float
    """Metres."""
    judged: float = 0.3
    """Share of the blocks."""
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError where the numbers leave nothing to train on or to judge."""
        if not (0 <= 4 * self.buffer <= self.block <= EARTH_RADIUS / 2):
            raise ValueError(
                f"blocks of {self.block:g} m with a buffer of {self.buffer:g} m; expected blocks "
                f"of at least 4 buffers and at most {EARTH_RADIUS / 2:.0f} m"
            )
        if not 0 < self.judged < 1:
            raise ValueError(f"judged is a share between 0 and 1, found {self.judged}")

    def train(self, places: np.ndarray) -> np.ndarray:
        """(N, 2) -> (N,) bool: which may be trained on."""
        return ~self._judges(places)

    def judge(self, places: np.ndarray) -> np.ndarray:
        """(N, 2) -> (N,) bool: which may be judged."""
        lon, lat = np.asarray(places, np.float64).T
        inner = np.ones(len(lon), bool)
        high = self.buffer / EARTH_RADIUS
        # A degree of longitude is shortest at the poleward side of the square around a place.
        shortest = np.cos(np.minimum(np.abs(np.radians(lat)) + high, np.pi / 2)).clip(1e-9)
        wide = np.minimum(
            np.degrees(2 * np.arcsin(np.minimum(np.sin(high / 2) / shortest, 1))), 180
        )
        for north in (-1, 0, 1):
            for east in (-1, 0, 1):
                corner = [_wrapped(lon + east * wide), lat + north * np.degrees(high)]
                inner &= self._judges(np.stack(corner, -1))
        return inner

    def cells(self, places: np.ndarray) -> np.ndarray:
        """(N, 2) -> (N, 2): row and column of the block that each place is in."""
        lon, lat = np.asarray(places, np.float64).T
        angle = self.block / EARTH_RADIUS
        row = np.floor(np.radians(lat.clip(-90, 90)) / angle)
        poleward = np.maximum(np.abs(row), np.abs(row + 1)) * angle
        columns = np.floor(2 * np.pi * np.cos(np.minimum(poleward, np.pi / 2)) / angle).clip(1)
        return np.stack([row, np.floor((_wrapped(lon) + 180) / 360 * columns)], -1)

    def _judges(self, places: np.ndarray) -> np.ndarray:
        row, column = self.cells(places).T
        # A lattice that fills the unit interval evenly along both axes (Roberts' R2 sequence): even
        # of a few blocks of a region about the wanted share judges, which chance would miss.
        start = np.random.default_rng(self.seed).uniform()
        draw = (start + 0.7548776662466927 * row + 0.5698402909980532 * column) % 1
        judges: np.ndarray = draw < self.judged
        return judges


def tile_blocks(metres: float) -> SpatialBlocks:
    """The blocks by which Loc2Vec is trained and judged on tiles of a side of `metres`.

    8 tiles high, with a strip of 2: more than sqrt(2) for rotated tiles and half a tile by which
    judged ones are shifted. What is learned from, positives too, has its centre in train blocks.
    Nothing else decides, so an encoder is never judged where it was trained.

    Raises ValueError for a side of which 8 do not fit on the sphere.
    """
    if not 0 < 8 * metres <= EARTH_RADIUS / 2:
        raise ValueError(
            f"a tile of {metres:g} m; expected more than 0 and at most {EARTH_RADIUS / 16:.0f} "
            "metres (data.metres, --metres)"
        )
    return SpatialBlocks(block=8 * metres, buffer=2 * metres)


def _wrapped(lon: np.ndarray) -> np.ndarray:
    """Longitudes in -180 .. 180."""
    return (lon + 180) % 360 - 180
