"""Shapes on the pixel grid: kept by block in files, drawn block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ssl_flow.data.osm_style import CHANNELS, LANDCOVER, ON_TOP, STYLES

BLOCK = 1024  # pixels a side of the files that a layer is written in
SHIFT = 4  # coordinates are drawn in 1/16 pixel
INSIDE = len(STYLES)  # drawn like a style: the area of the country
_HELD_BYTES = 64 << 20


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
    shapes: list[Shape], corner: tuple[int, int], size: tuple[int, int], thickness: list[int]
) -> dict[str, np.ndarray]:
    """The layers, land cover and inside of a block: (H, W) uint8 each, layers 0 or 255."""
    planes = {name: np.zeros(size, np.uint8) for name in (*CHANNELS, "landcover", "inside")}
    offset = np.array(corner, np.int32) << SHIFT
    for shape in sorted(shapes, key=_order):  # a stable sort
        style = None if shape.style == INSIDE else STYLES[shape.style]
        targets = [(planes["inside" if style is None else style.channel], 255)]
        if style is not None and style.landcover is not None:
            targets.append((planes["landcover"], LANDCOVER.index(style.landcover)))
        rings = [ring - offset for ring in shape.rings]
        width = thickness[shape.style]
        for plane, value in targets:
            if style is None or style.draw == "fill":
                cv2.fillPoly(plane, rings, value, shift=SHIFT)
            elif style.draw == "line":
                cv2.polylines(plane, rings, False, value, width, shift=SHIFT)
            else:
                centre = (int(rings[0][0, 0]), int(rings[0][0, 1]))
                cv2.circle(plane, centre, width << SHIFT >> 1, value, -1, shift=SHIFT)
    return planes


def _order(shape: Shape) -> tuple[int, int]:
    """Land cover: large areas below small ones, and what stands on the land above them."""
    cover = None if shape.style == INSIDE else STYLES[shape.style].landcover
    return (ON_TOP.index(cover) + 1, 0) if cover in ON_TOP else (0, -shape.area)
