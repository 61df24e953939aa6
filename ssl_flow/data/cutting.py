"""Tiles out of a raster at any centre, scale and rotation, without aliasing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from ssl_flow.data.mosaic import Raster

_FEW = 8  # samples a side of a tile's pixel; beyond, the raster is averaged down beforehand


def tile_matrix(
    centre: tuple[float, float], side: int, step: tuple[float, float], rotation: float
) -> np.ndarray:
    """(2, 3) float64: pixels of the tile -> pixels of the map.

    `step` is how many map pixels along x and y a pixel of the tile is wide and high. The tile's x
    axis points `rotation` degrees clockwise from the map's, so what is shown turns anticlockwise. A
    tile of step 1 at a quarter turn is moved by at most half a pixel onto the map's own pixels,
    which are then copied as they are.
    """
    half = (side - 1) / 2
    x, y = centre
    if step == (1, 1) and rotation % 90 == 0:
        x, y = (math.floor(c - half + 0.5) + half for c in (x, y))
    sin, cos = math.sin(math.radians(rotation)), math.cos(math.radians(rotation))
    if rotation % 90 == 0:
        sin, cos = round(sin), round(cos)
    turn = np.array([[step[0] * cos, -step[0] * sin], [step[1] * sin, step[1] * cos]], np.float64)
    origin = np.array([x, y]) - turn @ (half, half)
    return np.column_stack([turn, origin])


def sample(
    rasters: Sequence[Raster], matrix: np.ndarray, side: int, labels: bool = False
) -> np.ndarray:
    """(side, side, bands of all rasters) uint8 at the places that `matrix` (`tile_matrix`) says.

    Pictures bilinear, layers and labels nearest. Where the tile is coarser than the map, the mean
    over each of its pixels (layers become shares of area); labels stay nearest. 0 outside.
    """
    coarse = 1 if labels else max(1, math.ceil(np.linalg.norm(matrix[:, :2], axis=0).max() - 1e-6))
    corners = matrix @ np.array([[-1, -1, side, side], [-1, side, -1, side], [1, 1, 1, 1]])
    x0, y0 = (np.floor(corners.min(1)).astype(int) - 1).tolist()
    x1, y1 = (np.ceil(corners.max(1)).astype(int) + 2).tolist()
    if coarse == 1 and np.array_equal(matrix[:, :2], np.eye(2)) and not (matrix[:, 2] % 1).any():
        left, top = matrix[:, 2].astype(int).tolist()
        tiles = [raster.read(left, top, left + side, top + side) for raster in rasters]
        return np.concatenate(tiles, -1)
    reduce = 2 * coarse // _FEW if coarse > _FEW else 1
    x1, y1 = x0 + -(-(x1 - x0) // reduce) * reduce, y0 + -(-(y1 - y0) // reduce) * reduce
    matrix = (matrix - [[0, 0, x0], [0, 0, y0]]) / reduce
    matrix[:, 2] += 0.5 / reduce - 0.5
    coarse = math.ceil(coarse / reduce)
    fine = matrix / (coarse, coarse, 1)
    fine[:, 2] += matrix[:, :2] @ np.full(2, 0.5 / coarse - 0.5)
    tiles = []
    for raster in rasters:
        window = raster.read(x0, y0, x1, y1)
        if reduce > 1:
            size = ((x1 - x0) // reduce, (y1 - y0) // reduce)
            window = cv2.resize(window, size, interpolation=cv2.INTER_AREA)
        linear = not labels and (raster.colour or coarse > 1 or reduce > 1)
        flags = (cv2.INTER_LINEAR if linear else cv2.INTER_NEAREST) | cv2.WARP_INVERSE_MAP
        tile = cv2.warpAffine(window, fine, (side * coarse, side * coarse), flags=flags)
        if coarse > 1:
            tile = cv2.resize(tile, (side, side), interpolation=cv2.INTER_AREA)
        tiles.append(tile.reshape(side, side, -1))
    return np.concatenate(tiles, -1)


def content(tiles: np.ndarray, colour: bool) -> np.ndarray:
    """How much a tile shows, 0 to 1; (..., H, W, C) uint8 -> (...).

    Layers: the share of pixels where any layer is not 0. Pictures: the share of pixels of which a
    channel is more than 6 of 255 from the tile's median (sea, cloud, sand or paper is all median).
    """
    if not colour:
        return np.asarray((tiles > 0).any(-1).mean((-2, -1)))
    middle = np.median(tiles, axis=(-3, -2), keepdims=True)
    return np.asarray((np.abs(tiles - middle).max(-1) > 6).mean((-2, -1)))
