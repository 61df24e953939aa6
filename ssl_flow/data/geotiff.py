"""GeoTIFFs as maps, read window by window with rasterio (`pip install 'ssl-flow[geo]'`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ssl_flow.data.georeference import META, Georeference
from ssl_flow.data.tiles import TileMap


def open_geotiff(path: Path) -> TileMap:
    """A GeoTIFF of 8-bit bands in any projection; three bands are red, green and blue.

    A band that the file calls alpha is left out; pixels without data are 0.

    Raises:
        ImportError: rasterio is not installed.
        ValueError: it has no georeference, is not 8-bit or has a palette; the message says what to
            do.
    """
    file = _File(path)
    with file.open() as data:
        if data.crs is None or data.transform.is_identity:
            raise ValueError(
                f"{path} has no georeference: add one (gdal_translate -a_srs -a_ullr), or {META}"
            )
        if set(data.dtypes) != {"uint8"}:
            raise ValueError(
                f"{path} holds {data.dtypes[0]}, expected 8-bit: gdal_translate -ot Byte -scale"
            )
        if "palette" in [colour.name for colour in data.colorinterp]:
            raise ValueError(
                f"{path} has a palette: gdal_translate -expand rgb makes colours of it"
            )
        names = [text or f"band{i + 1}" for i, text in enumerate(data.descriptions)]
        meanings = [colour.name for colour in data.colorinterp]
        size = (data.width, data.height)
        georeference = _Projected(str(data.crs), tuple(data.transform)[:6])
    bands = [i + 1 for i, meaning in enumerate(meanings) if meaning != "alpha"]
    if len(bands) == 3:
        channels = [f"{path.stem}.{c}" for c in ("red", "green", "blue")]
        rasters = [_Bands(file, bands, channels, True, size)]
    else:
        rasters = [_Bands(file, [i], [names[i - 1]], False, size) for i in bands]
    return TileMap(path, rasters, georeference)


class _File:
    """An open GeoTIFF of this process: a handle survives neither a fork nor a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: tuple[int, Any] = (-1, None)

    def open(self) -> Any:  # noqa: ANN401 - rasterio has no types
        try:
            import rasterio
        except ImportError as error:
            raise ImportError(
                f"{self.path}: a GeoTIFF needs pip install 'ssl-flow[geo]'"
            ) from error
        try:
            return rasterio.open(self.path)
        except rasterio.errors.RasterioIOError as error:
            raise ValueError(f"{self.path} cannot be read as a GeoTIFF ({error})") from error

    def read(self, **which: Any) -> Any:  # noqa: ANN401
        if self._open[0] != os.getpid():
            self._open = (os.getpid(), self.open())
        try:
            return self._open[1].read(**which)
        except OSError as error:  # rasterio's is one
            raise ValueError(f"{self.path} is damaged: its pixels cannot be read") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_open": (-1, None)}


class _Bands:
    """Some bands of a file as a raster."""

    def __init__(
        self,
        file: _File,
        bands: list[int],
        channels: list[str],
        colour: bool,
        size: tuple[int, int],
    ) -> None:
        self.file, self.bands, self.channels = file, bands, channels
        self.colour, self.size = colour, size

    def read(self, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        from rasterio.windows import Window

        out = np.zeros((y1 - y0, x1 - x0, len(self.bands)), np.uint8)
        a, b, c, d = max(x0, 0), max(y0, 0), min(x1, self.size[0]), min(y1, self.size[1])
        if a < c and b < d:
            window = Window(a, b, c - a, d - b)
            part = self.file.read(indexes=self.bands, window=window, masked=True).filled(0)
            out[b - y0 : d - y0, a - x0 : c - x0] = part.transpose(1, 2, 0)
        return out


class _Projected(Georeference):
    """An affine transform into a reference system that rasterio knows."""

    def __init__(self, system: str, transform: tuple[float, ...]) -> None:
        self.system = system
        a, b, c, d, e, f = transform  # of the left upper corners of pixels
        self.matrix, self.origin = np.array([[a, b], [d, e]]), np.array([c, f])

    def lonlat(self, xy: np.ndarray) -> np.ndarray:
        plane = (np.asarray(xy, np.float64) + 0.5) @ self.matrix.T + self.origin
        return _transform(self.system, "EPSG:4326", plane)

    def pixel(self, lonlat: np.ndarray) -> np.ndarray:
        plane = _transform("EPSG:4326", self.system, np.asarray(lonlat, np.float64))
        return np.asarray((plane - self.origin) @ np.linalg.inv(self.matrix).T - 0.5)


def _transform(source: str, target: str, points: np.ndarray) -> np.ndarray:
    """(..., 2) -> (..., 2); nan for what the projection does not reach, as off the globe's rim."""
    from rasterio._err import CPLE_BaseError
    from rasterio.warp import transform

    flat = points.reshape(-1, 2)
    try:
        found = np.array(transform(source, target, *flat.T)).T
    except CPLE_BaseError:  # of one point, for all
        if len(flat) == 1:
            return np.full(points.shape, np.nan)
        found = np.concatenate(
            [_transform(source, target, half) for half in np.array_split(flat, 2)]
        )
    return np.where(np.isfinite(found), found, np.nan).reshape(points.shape)
