"""A raster in one file or in a grid of files, read where it is looked at."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from PIL import Image

CACHE_BYTES = 64 << 20
"""A raster in many files keeps as much of what it has read; one in a single file keeps it whole."""


class Raster(Protocol):
    """Some aligned channels of a map."""

    @property
    def channels(self) -> list[str]:
        """Their names."""

    @property
    def colour(self) -> bool:
        """They are red, green, blue of a picture; else layers."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""

    def read(self, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """Pixels [y0, y1) x [x0, x1) as (h, w, bands) uint8, 0 outside of the map."""


@dataclass
class Mosaic:
    """8-bit pixels of `width` x `height`, grey or RGB, in blocks of `block` (width, height).

    A block that has no file is empty (0). Layers of 0 and 1 are read as 0 and 255; labels (where
    `names` says what the values mean) as they are.
    """

    name: str
    folder: Path
    template: str  # a block's file in the folder, with {row} and {col}
    size: tuple[int, int]
    block: tuple[int, int]
    colour: bool = False
    names: Mapping[int, str] | None = None
    first: tuple[int, int] = (0, 0)  # row and column that the file of the first block is named by
    _cache: OrderedDict[tuple[int, int], np.ndarray] = field(
        default_factory=OrderedDict, init=False, repr=False
    )

    @property
    def channels(self) -> list[str]:
        """NAME, or NAME.red, NAME.green, NAME.blue."""
        colours = [f"{self.name}.{colour}" for colour in ("red", "green", "blue")]
        return colours if self.colour else [self.name]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return math.ceil(self.size[1] / self.block[1]), math.ceil(self.size[0] / self.block[0])

    def read(self, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """Pixels [y0, y1) x [x0, x1) as (h, w, 1 or 3) uint8, 0 outside; ValueError: bad file."""
        width, height = self.block
        out = np.zeros((y1 - y0, x1 - x0, 3 if self.colour else 1), np.uint8)
        right, bottom = min(x1, self.size[0]), min(y1, self.size[1])
        for row in range(max(y0, 0) // height, -(-bottom // height)):
            for col in range(max(x0, 0) // width, -(-right // width)):
                left, top = col * width, row * height
                a, b = max(x0, left), max(y0, top)
                c, d = min(right, left + width), min(bottom, top + height)
                part = self._block(row, col)[b - top : d - top, a - left : c - left]
                out[b - y0 : d - y0, a - x0 : c - x0] = part
        return out

    def at(self, xy: np.ndarray) -> np.ndarray:
        """The nearest pixels to (N, 2) coordinates: (N, bands) uint8, 0 outside."""
        x, y = np.floor(np.asarray(xy, np.float64).T + 0.5).astype(np.int64)
        out = np.zeros((len(x), 3 if self.colour else 1), np.uint8)
        inside = (x >= 0) & (y >= 0) & (x < self.size[0]) & (y < self.size[1])
        rows, cols = y // self.block[1], x // self.block[0]
        for row, col in np.unique(np.stack([rows, cols], -1)[inside], axis=0).tolist():
            here = inside & (rows == row) & (cols == col)
            block = self._block(row, col)
            out[here] = block[y[here] - row * self.block[1], x[here] - col * self.block[0]]
        return out

    def path(self, row: int, col: int) -> Path:
        """The file of a block, which need not exist."""
        row, col = row + self.first[0], col + self.first[1]
        return self.folder / self.template.format(row=row, col=col)

    def _block(self, row: int, col: int) -> np.ndarray:
        if (row, col) in self._cache:
            self._cache.move_to_end((row, col))
            return self._cache[row, col]
        width = min(self.block[0], self.size[0] - col * self.block[0])
        height = min(self.block[1], self.size[1] - row * self.block[1])
        path = self.path(row, col)
        if path.exists():
            pixels = read_pixels(path, self.colour)
            self._check(path, pixels, (width, height))
        else:
            pixels = np.zeros((height, width, 3 if self.colour else 1), np.uint8)
        if self.names is None and not self.colour and pixels.max() == 1:
            pixels = pixels * np.uint8(255)
        self._cache[row, col] = pixels
        while self.grid != (1, 1) and len(self._cache) > max(1, CACHE_BYTES // pixels.nbytes):
            self._cache.popitem(last=False)
        return pixels

    def _check(self, path: Path, pixels: np.ndarray, expected: tuple[int, int]) -> None:
        if pixels.shape[1::-1] != expected:
            raise ValueError(f"{path} is {_by(pixels.shape[1::-1])}, expected {_by(expected)}")
        if self.names is not None:
            unknown = sorted(set(np.unique(pixels).tolist()) - set(self.names))
            if unknown:
                raise ValueError(
                    f"{path} holds {unknown[:10]}, not among the labels {sorted(self.names)}: "
                    "name these values in meta.json"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Without what has been read: a worker process reads its own."""
        return self.__dict__ | {"_cache": OrderedDict()}


def read_pixels(path: Path, colour: bool) -> np.ndarray:
    """(H, W, 3) uint8 RGB, or (H, W, 1) uint8; ValueError names the file and what it is instead."""
    data = np.fromfile(path, np.uint8)  # not imread, which cannot open every name on Windows
    flags = cv2.IMREAD_COLOR if colour else cv2.IMREAD_UNCHANGED
    pixels = cv2.imdecode(data, flags) if data.size else None
    if pixels is None:
        raise ValueError(f"{path} cannot be read as an image; make it anew")
    if not colour and (pixels.ndim != 2 or pixels.dtype != np.uint8):
        found = f"{pixels.dtype} with {1 if pixels.ndim == 2 else pixels.shape[2]} channels"
        raise ValueError(f"{path}: expected one grey channel of 8 bit, found {found}")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if colour else pixels[..., None]


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as the file's head states them; ValueError when it is no readable image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                return file.size
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path} is too large to be read whole ({error}): give a tiled GeoTIFF, or cut it into "
            "a folder of z/x/y tiles"
        ) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"
