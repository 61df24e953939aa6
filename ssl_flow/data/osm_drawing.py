"""Shapes on the pixel grid: kept by block in files, drawn block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ssl_flow.data.osm_style import CHANNELS, LANDCOVER, ON_TOP, STYLES

BLOCK = 1024  # pixels a side of the files that a layer is written in
SHIFT = 4  # coordinates are kept in 1/16 pixel
INSIDE = len(STYLES)  # drawn like a style: the area of the country
_HELD_BYTES = 64 << 20
_FINE = 4  # pixels of the grid that is drawn on, along a pixel of the map
_MARGIN = 8  # pixels around a block, so that edges are not cut where it ends


@dataclass(frozen=True)
class Shape:
    """A line, a filled area (outer ring first) or a dot, in 1/16 pixels of the map."""

    style: int
    area: int  # of its box in square pixels: the larger is drawn first
    rings: list[np.ndarray]  # (N, 2) int32


class Spool:
    """Shapes by block, in files: int32 style, area, number of rings, their lengths, points."""

    def __init__(self, folder: Path, size: tuple[int, int]) -> None:
        """Start with an empty folder, for a map of this width and height."""
        self._folder = folder
        folder.mkdir()
        self.rows, self.cols = math.ceil(size[1] / BLOCK), math.ceil(size[0] / BLOCK)
        self._held: dict[tuple[int, int], list[np.ndarray]] = {}
        self._bytes = 0

    def add(self, shape: Shape, reach: int) -> None:
        """Keep a shape for all blocks that its box, with the line's width, touches."""
        head = [shape.style, shape.area, len(shape.rings), *(len(ring) for ring in shape.rings)]
        record = np.concatenate([np.array(head, np.int32), *(r.ravel() for r in shape.rings)])
        low = ((shape.rings[0].min(0) >> SHIFT) - reach - 1) // BLOCK
        high = ((shape.rings[0].max(0) >> SHIFT) + reach + 2) // BLOCK
        for row in range(max(0, low[1]), min(self.rows - 1, high[1]) + 1):
            for col in range(max(0, low[0]), min(self.cols - 1, high[0]) + 1):
                self._held.setdefault((row, col), []).append(record)
                self._bytes += record.nbytes
        if self._bytes > _HELD_BYTES:
            self._flush()

    def shapes(self, row: int, col: int) -> list[Shape]:
        """The shapes of a block, in the order in which they were added."""
        self._flush()
        path = self._folder / f"{row}_{col}.bin"
        data = np.fromfile(path, np.int32) if path.exists() else np.zeros(0, np.int32)
        found, at = [], 0
        while at < len(data):
            style, area, count = data[at : at + 3].tolist()
            lengths, at = data[at + 3 : at + 3 + count].tolist(), at + 3 + count
            rings = []
            for length in lengths:
                rings.append(data[at : at + 2 * length].reshape(-1, 2))
                at += 2 * length
            found.append(Shape(style, area, rings))
        return found

    def _flush(self) -> None:
        for (row, col), records in self._held.items():
            with (self._folder / f"{row}_{col}.bin").open("ab") as file:
                file.write(b"".join(record.tobytes() for record in records))
        self._held, self._bytes = {}, 0


def draw(
    shapes: list[Shape], corner: tuple[int, int], size: tuple[int, int], widths: list[float]
) -> dict[str, np.ndarray]:
    """The layers, land cover and inside of a block: (H, W) uint8 each, layers 0 or 255.

    A pixel is drawn where its centre is in the shape. OpenCV draws all pixels that a shape's edge
    touches and rounds widths up, so that a house of 3 pixels became 4: drawn on a finer grid, of
    which the pixels' centres are kept, what is too much is an eighth of a pixel.

    Args:
        shapes: what touches the block.
        corner: x and y of the block's first pixel.
        size: height and width.
        widths: pixels that the lines and dots of each style are wide.
    """
    canvas = np.zeros([(n + 2 * _MARGIN) * _FINE for n in size], np.uint8)
    kept = tuple(slice(_MARGIN * _FINE + _FINE // 2, (_MARGIN + n) * _FINE, _FINE) for n in size)
    offset = ((np.array(corner) - _MARGIN) << SHIFT) - (1 << SHIFT >> 1)
    planes = {}
    for name in (*CHANNELS, "landcover", "inside"):
        canvas[:] = 0
        for shape in sorted(shapes, key=_order) if name == "landcover" else shapes:
            value = _value(name, shape)
            if value:
                rings = [ring - offset.astype(np.int32) for ring in shape.rings]
                _draw(canvas, shape, rings, value, widths[shape.style] * _FINE)
        planes[name] = canvas[kept].copy()
    return planes


def _value(name: str, shape: Shape) -> int:
    """What the shape is drawn with in this plane; 0 = not at all."""
    if shape.style == INSIDE:
        return 255 * (name == "inside")
    style = STYLES[shape.style]
    if name == "landcover":
        return 0 if style.landcover is None else LANDCOVER.index(style.landcover)
    return 255 * (name == style.channel)


def _draw(
    canvas: np.ndarray, shape: Shape, rings: list[np.ndarray], value: int, width: float
) -> None:
    """Draw on the fine grid, on which the rings' 1/16 pixels are 1/4."""
    shift = SHIFT - _FINE.bit_length() + 1
    kind = "fill" if shape.style == INSIDE else STYLES[shape.style].draw
    if kind == "fill":
        cv2.fillPoly(canvas, rings, value, shift=shift)
    elif kind == "line":  # OpenCV draws an even thickness one pixel wider
        cv2.polylines(canvas, rings, False, value, 2 * round((width - 1) / 2), shift=shift)
    else:
        x, y = rings[0][0].tolist()
        cv2.circle(canvas, (x, y), round((width - 1) / 2 * (1 << shift)), value, -1, shift=shift)


def _order(shape: Shape) -> tuple[int, int]:
    """Land cover: large areas below small ones, and what stands on the land above them."""
    cover = None if shape.style == INSIDE else STYLES[shape.style].landcover
    return (ON_TOP.index(cover) + 1, 0) if cover in ON_TOP else (0, -shape.area)
