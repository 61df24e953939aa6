"""Maps as sources of tiles for Loc2Vec: pixels, place and labels of any spot of a map.

    tile_map = open_map("tiles/osm_liechtenstein")           # or a GeoTIFF, or a folder of z/x/y
    x, y = tile_map.locate(np.array([[9.52, 47.14]]))[0]
    tile = tile_map.cut(x, y, 128, rotation=30)              # (128, 128, 12) uint8
    cover = tile_map.cut_labels("landcover", x, y, 128, rotation=30)

Nothing is read before it is looked at. Coordinates: see georeference.py. What lies outside of the
map is 0; a tile's centre has to lie inside, and the tile may not be larger than the map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssl_flow.data.cutting import content, sample, tile_matrix
from ssl_flow.data.georeference import Georeference, metres_per_pixel
from ssl_flow.data.mosaic import Mosaic, Raster

NO_LAND = ("unknown", "water", "ocean")
"""Names of classes that mean: nothing to learn from here."""
_PATIENCE = 20_000  # draws before a map that gave fewer than 10 in as many is called empty


@dataclass(eq=False)
class TileMap:
    """Aligned channels with a georeference, and what is known of each pixel."""

    path: Path
    rasters: Sequence[Raster]
    georeference: Georeference
    labels: Mapping[str, Mosaic] = field(default_factory=dict)  # each with `names`: value -> name
    inside: Mosaic | None = None  # not 0 where the map is filled; None = everywhere

    @property
    def channels(self) -> list[str]:
        """The names of a tile's channels."""
        return [name for raster in self.rasters for name in raster.channels]

    @property
    def colour(self) -> np.ndarray:
        """(C,) bool: channels that are red, green or blue of a picture; the others are layers."""
        return np.array([raster.colour for raster in self.rasters for _ in raster.channels])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.rasters[0].size

    def lonlat(self, xy: np.ndarray) -> np.ndarray:
        """Pixels (..., 2) -> (lon, lat) in degrees."""
        return self.georeference.lonlat(xy)

    def locate(self, lonlat: np.ndarray) -> np.ndarray:
        """(N, 2) longitudes and latitudes in degrees -> pixels; ValueError: some lie outside."""
        lonlat = np.asarray(lonlat, np.float64).reshape(-1, 2)
        xy = self.georeference.pixel(lonlat)
        outside = np.flatnonzero(~self.contains(xy))
        if len(outside):
            (west, north), (east, south) = self.bounds
            shown = ", ".join(f"row {i}: {lonlat[i, 0]:g}, {lonlat[i, 1]:g}" for i in outside[:3])
            raise ValueError(
                f"{len(outside)} of {len(lonlat)} points lie outside of {self.path} (longitude "
                f"{west:.6g} to {east:.6g}, latitude {south:.6g} to {north:.6g}): {shown}. "
                "Leave them out; the order is longitude, latitude"
            )
        return xy

    @property
    def bounds(self) -> np.ndarray:
        """(2, 2): (lon, lat) of the left upper and of the right lower corner."""
        width, height = self.size
        return self.lonlat(np.array([[-0.5, -0.5], [width - 0.5, height - 0.5]]))

    def contains(self, xy: np.ndarray) -> np.ndarray:
        """(N,) bool: the pixels (N, 2) lie on the map, though not all of their tiles need to."""
        xy = np.asarray(xy, np.float64)
        return np.asarray(((xy >= -0.5) & (xy < np.array(self.size) - 0.5)).all(-1))

    def fits(
        self, xy: np.ndarray, side: int, scale: float = 1.0, metres: float | None = None
    ) -> np.ndarray:
        """(N,) bool: a tile of `side` pixels around (N, 2) lies on the map at any rotation."""
        reach = side * self._step(xy, side, scale, metres) * 0.5**0.5 - 0.5
        return np.asarray(((xy >= reach) & (xy <= np.array(self.size) - 1 - reach)).all(-1))

    def is_inside(self, xy: np.ndarray) -> np.ndarray:
        """(N,) bool: on the map and, where it has a mask `inside`, in the part that is filled."""
        found = self.contains(xy)
        return found if self.inside is None else found & (self.inside.at(xy)[:, 0] > 0)

    def is_land(self, xy: np.ndarray) -> np.ndarray:
        """(N,) bool: none of the labels there is named as in `NO_LAND`; True without labels."""
        found = np.ones(len(xy), bool)
        for mosaic in self.labels.values():
            names = (mosaic.names or {}).items()
            found &= ~np.isin(mosaic.at(xy)[:, 0], [v for v, n in names if n.lower() in NO_LAND])
        return found

    def metres_per_pixel(self, xy: np.ndarray) -> np.ndarray:
        """(N, 2) pixels -> (N, 2) metres that a pixel is wide and high there."""
        return metres_per_pixel(self.georeference, xy)

    def label_at(self, name: str, xy: np.ndarray) -> np.ndarray:
        """(N,) uint8: the label of each of (N, 2) pixels; 0 outside."""
        return self._labels(name).at(xy)[:, 0]

    def cut(
        self,
        x: float,
        y: float,
        side: int,
        *,
        scale: float = 1.0,
        metres: float | None = None,
        rotation: float = 0.0,
    ) -> np.ndarray:
        """The tile around a pixel: (side, side, C) uint8.

        Args:
            x: the centre in pixels.
            y: the centre in pixels, downwards.
            side: pixels of the tile's side.
            scale: map pixels that a pixel of the tile is wide and high.
            metres: the tile's side on the ground instead, in which north-south and east-west then
                have the same scale, whatever the projection.
            rotation: degrees that the tile is turned clockwise on the map.

        Raises:
            ValueError: the tile is larger than the map, or its centre is outside.
        """
        matrix = self._matrix(x, y, side, scale, metres, rotation)
        return sample(self.rasters, matrix, side)

    def cut_labels(
        self,
        name: str,
        x: float,
        y: float,
        side: int,
        *,
        scale: float = 1.0,
        metres: float | None = None,
        rotation: float = 0.0,
    ) -> np.ndarray:
        """The labels of the pixels of the tile that `cut` gives: (side, side) uint8."""
        matrix = self._matrix(x, y, side, scale, metres, rotation)
        return sample([self._labels(name)], matrix, side, labels=True)[..., 0]

    def content(self, tile: np.ndarray) -> float:
        """How much a tile of this map shows, 0 (empty) to 1; see `cutting.content`."""
        colour = self.colour
        parts = [content(tile[..., kind], c) for kind, c in ((colour, True), (~colour, False))
                 if kind.any()]  # fmt: skip
        return float(max(parts))

    def draw_centres(
        self,
        count: int,
        side: int,
        *,
        scale: float = 1.0,
        metres: float | None = None,
        least_content: float = 0.05,
        where: Callable[[np.ndarray], np.ndarray] | None = None,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(count, 2) random centres, evenly over the ground, and the content (count,) there.

        Their tiles fit at any rotation and show `least_content`; the centres are inside and, if
        given, `where` pixels (N, 2) -> (N,) bool says so (such as labels of land).
        ValueError when such are too rare: the map is all empty.
        """
        width, height = self.size
        self._matrix((width - 1) / 2, (height - 1) / 2, side, scale, metres, 0.0)
        grid = np.stack(np.meshgrid(*(np.linspace(0, n - 1, 16) for n in self.size)), -1)
        largest = np.nanmax(self.metres_per_pixel(grid.reshape(-1, 2)).prod(-1))
        found: list[np.ndarray] = []
        shown: list[float] = []
        drawn = 0
        while drawn < _PATIENCE or len(found) * _PATIENCE > 10 * drawn:
            xy = rng.uniform(-0.5, np.array(self.size) - 0.5, (1024, 2))
            drawn += len(xy)
            keep = rng.uniform(size=len(xy)) * largest < self.metres_per_pixel(xy).prod(-1)
            xy = xy[keep & self.is_inside(xy)]
            xy = xy[self.fits(xy, side, scale, metres)]
            for centre in xy if where is None else xy[where(xy)]:
                tile = self.cut(centre[0], centre[1], side, scale=scale, metres=metres)
                amount = self.content(tile)
                if amount >= least_content:
                    found.append(centre)
                    shown.append(amount)
                if len(found) == count:
                    return np.array(found), np.array(shown)
        width_text = f"scale {scale:g}" if metres is None else f"{metres:g} m"
        raise ValueError(
            f"{self.path}: of {drawn} random tiles of {side} pixels ({width_text}), {len(found)} "
            f"lie where they may and show anything (content of {least_content:g} or more). "
            "Is the map empty? Else take smaller tiles, or a lower least_content"
        )

    def _labels(self, name: str) -> Mosaic:
        if name not in self.labels:
            known = ", ".join(self.labels) or "none"
            raise ValueError(f"{self.path} has no labels {name!r}; it has: {known}")
        return self.labels[name]

    def _matrix(
        self, x: float, y: float, side: int, scale: float, metres: float | None, rotation: float
    ) -> np.ndarray:
        if side < 1 or not scale > 0 or (metres is not None and not metres > 0):
            raise ValueError(f"a tile of side {side}, scale {scale}, metres {metres}: not positive")
        if not self.contains(np.array([x, y])):
            width, height = self.size
            raise ValueError(f"({x:g}, {y:g}) is outside of {self.path}, {width}x{height} pixels")
        step = self._step(np.array([x, y]), side, scale, metres)
        for length, axis, name in zip(self.size, step, ("wide", "high"), strict=True):
            if side * axis > length:
                raise ValueError(
                    f"a tile of {side * axis:.0f} map pixels is larger than {self.path}, "
                    f"{length} pixels {name}: take a smaller side, scale or number of metres"
                )
        return tile_matrix((x, y), side, (float(step[0]), float(step[1])), rotation)

    def _step(self, xy: np.ndarray, side: int, scale: float, metres: float | None) -> np.ndarray:
        """(..., 2): map pixels that a pixel of a tile around (..., 2) is wide and high."""
        if metres is None:
            return np.full(np.shape(xy), scale)
        return metres / side / self.metres_per_pixel(np.asarray(xy, np.float64))
