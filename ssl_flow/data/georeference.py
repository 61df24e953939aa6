"""Where a map lies: pixel <-> longitude and latitude, distances and metres per pixel on the sphere.

Pixel coordinates are (x, y), x right, y down; whole numbers are pixel centres, as in OpenCV. Places
are (lon, lat) in degrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

EARTH_RADIUS = 6_371_008.8
"""Metres: the mean radius of WGS 84. One sphere for all distances; off the ellipsoid by < 0.6 %."""
PROJECTIONS = "'Web Mercator (EPSG:3857)' and 'equirectangular (EPSG:4326)'"
META = (
    'put a meta.json beside it, {"projection": "equirectangular (EPSG:4326)", "pixels_per_degree": '
    'P, "lon_left": L, "lat_top": T}'
)
"""What to do for a picture that does not say where it lies."""


class Georeference(Protocol):
    """How a map's pixels and places belong together; arrays are (..., 2) float64."""

    def lonlat(self, xy: np.ndarray) -> np.ndarray:
        """Pixels -> (lon, lat)."""

    def pixel(self, lonlat: np.ndarray) -> np.ndarray:
        """(lon, lat) -> pixels, also such that lie outside of the map."""


@dataclass(frozen=True)
class WebMercator:
    """A cut of the pixel grid that XYZ tiles share: 2^zoom tiles around the world."""

    zoom: int
    x0: float  # of the map's left upper corner, in pixels of the world's grid
    y0: float
    tile_size: int = 256

    def lonlat(self, xy: np.ndarray) -> np.ndarray:
        """Pixels (..., 2) -> (lon, lat) in degrees."""
        world = (np.asarray(xy, np.float64) + self._corner) / self._pixels
        lon = 360 * world[..., 0] - 180
        lat = np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * world[..., 1]))))
        return np.stack([lon, lat], -1)

    def pixel(self, lonlat: np.ndarray) -> np.ndarray:
        """(lon, lat) (..., 2) -> pixels; a pole is infinitely far, and what lies beyond is nan."""
        lon, lat = np.moveaxis(np.asarray(lonlat, np.float64), -1, 0)
        lat = np.where(np.abs(lat) <= 90, lat, np.nan)
        with np.errstate(divide="ignore"):
            gy = 0.5 - np.arctanh(np.sin(np.radians(lat))) / (2 * np.pi)
        world = np.stack([(lon + 180) / 360, gy], -1) * self._pixels
        return np.asarray(world - self._corner)

    @property
    def _corner(self) -> np.ndarray:
        return np.array([self.x0 + 0.5, self.y0 + 0.5])

    @property
    def _pixels(self) -> float:
        return float(self.tile_size * 2**self.zoom)


@dataclass(frozen=True)
class Equirectangular:
    """As many pixels a degree of longitude as of latitude (EPSG:4326, plate carrée)."""

    pixels_per_degree: float
    lon_left: float  # of the map's left upper corner
    lat_top: float

    def lonlat(self, xy: np.ndarray) -> np.ndarray:
        """Pixels (..., 2) -> (lon, lat) in degrees."""
        degrees = (np.asarray(xy, np.float64) + 0.5) / self.pixels_per_degree
        return np.asarray(degrees * (1, -1) + (self.lon_left, self.lat_top))

    def pixel(self, lonlat: np.ndarray) -> np.ndarray:
        """(lon, lat) (..., 2) -> pixels; longitudes 360 degrees apart are one place."""
        degrees = (np.asarray(lonlat, np.float64) - (self.lon_left, self.lat_top)) * (1, -1)
        # A map that crosses 180 degrees goes on to the right; its left border stays one.
        east = (degrees[..., 0] + 1e-9) % 360 - 1e-9
        return np.asarray(np.stack([east, degrees[..., 1]], -1) * self.pixels_per_degree - 0.5)


def unit_vectors(lonlat: np.ndarray) -> np.ndarray:
    """(lon, lat) (..., 2) in degrees -> points (..., 3) of the unit sphere."""
    lon, lat = np.moveaxis(np.radians(np.asarray(lonlat, np.float64)), -1, 0)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)


def great_circle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Metres between places (..., 2) and (..., 2) of (lon, lat), broadcast; haversine formula."""
    (lon_a, lat_a), (lon_b, lat_b) = (
        np.moveaxis(np.radians(np.asarray(place, np.float64)), -1, 0) for place in (a, b)
    )
    h = np.sin((lat_b - lat_a) / 2) ** 2
    h = h + np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2
    return np.asarray(2 * EARTH_RADIUS * np.arcsin(np.sqrt(np.clip(h, 0, 1))))


def metres_per_pixel(georeference: Georeference, xy: np.ndarray) -> np.ndarray:
    """Metres (..., 2) along x and along y that a pixel at (..., 2) is wide and high."""
    xy = np.asarray(xy, np.float64)
    sides = [
        great_circle(georeference.lonlat(xy - half), georeference.lonlat(xy + half))
        for half in ((0.5, 0.0), (0.0, 0.5))
    ]
    return np.stack(sides, -1)


def _number(meta: Mapping[str, Any], key: str) -> float:
    value = float(meta[key])
    if not np.isfinite(value):
        raise ValueError(f"{key} is {value}")
    return value


def read_georeference(meta: Mapping[str, Any], path: Path) -> Georeference:
    """The georeference that a meta.json states; ValueError names the file and what is missing."""
    projection = str(meta.get("projection", "")).lower()
    try:
        if "3857" in projection or "mercator" in projection:
            return WebMercator(
                int(meta["zoom"]),
                _number(meta, "global_x0"),
                _number(meta, "global_y0"),
                int(meta.get("tile_size", 256)),
            )
        if "4326" in projection or "equirectangular" in projection:
            scale, top = _number(meta, "pixels_per_degree"), _number(meta, "lat_top")
            if scale <= 0:
                raise ValueError(f"pixels_per_degree is {scale:g}, expected more than 0")
            if not -90 < top <= 90:
                raise ValueError(f"lat_top is {top:g}, expected degrees in (-90, 90]")
            return Equirectangular(scale, _number(meta, "lon_left"), top)
    except KeyError as error:
        raise ValueError(
            f"{path}: {error} is missing. Web Mercator needs zoom, global_x0, global_y0; "
            "equirectangular needs pixels_per_degree, lon_left, lat_top"
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: a number of the georeference is wrong ({error})") from error
    if not projection:
        raise ValueError(f"{path} has no projection: add one of {PROJECTIONS}, or give a GeoTIFF")
    raise ValueError(
        f"{path}: unknown projection {meta['projection']!r}. Known are {PROJECTIONS}; "
        "any other works as a GeoTIFF"
    )
