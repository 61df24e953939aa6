"""An OpenStreetMap extract -> a folder of layers with meta.json, as `open_map` reads it.

One pass over the extract sorts its geometry by block of the map into files; then each block is
drawn by itself. So the memory holds one block and osmium's node index, however large the country.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from ssl_flow.data.georeference import WebMercator, metres_per_pixel
from ssl_flow.data.osm_drawing import BLOCK, INSIDE, SHIFT, Shape, Spool, draw
from ssl_flow.data.osm_style import CHANNELS, LANDCOVER, STYLES, Matcher


def rasterize(
    extract: Path,
    out: Path,
    zoom: int = 15,
    box: Sequence[float] | None = None,
    admin_level: int = 2,
    node_index: str = "flex_mem",
) -> dict[str, Any]:
    """Draw the extract in Web Mercator; returns what meta.json says.

    Args:
        extract: .osm.pbf, or another format that osmium reads.
        out: a new folder: layers/CHANNEL/ROW_COL.png, landcover/, inside/, meta.json.
        zoom: 15 is 4.8 m a pixel at the equator, 3.2 m at 47 degrees.
        box: longitude left, latitude bottom, longitude right, latitude top; None = the extract's.
        admin_level: `inside` is the area of complete boundaries of this level (2 = countries); when
            the extract has none, all is inside.
        node_index: osmium's store of node places; "sparse_file_array,FILE" where memory is short.

    Raises:
        ImportError: osmium is not installed.
        FileNotFoundError, FileExistsError, ValueError: the extract is missing, broken or without
            anything to draw; `out` is there already; no box.
    """
    try:
        import osmium
    except ImportError as error:
        raise ImportError(f"{extract}: an extract needs pip install 'ssl-flow[osm]'") from error
    if not extract.exists():
        raise FileNotFoundError(f"{extract} is missing")
    if out.exists():
        raise FileExistsError(f"{out} is there already: name a new folder, or delete it")
    if not 1 <= zoom <= 20:
        raise ValueError(f"zoom {zoom}: expected 1 to 20 (15 is about 3 to 5 metres a pixel)")
    try:
        grid, (width, height) = _extent(osmium, extract, zoom, box)
    except RuntimeError as error:
        raise ValueError(f"{extract} cannot be read as an extract ({error})") from error
    widths = _widths(grid, (width, height))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        spool = Spool(partial / "spool", (width, height))
        try:
            for shape in _shapes(osmium, extract, grid, admin_level, node_index):
                spool.add(shape, math.ceil(widths[shape.style]))
        except RuntimeError as error:
            raise ValueError(f"{extract} cannot be read as an extract ({error})") from error
        counts = _draw_blocks(spool, partial, widths, (width, height))
        if not any(counts[name] for name in CHANNELS):
            raise ValueError(
                f"{extract} has nothing to draw in its box: is it the right region, and are its "
                "nodes complete? (--box, osm_style.py)"
            )
        meta = _meta(extract, grid, (width, height), counts)
        (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        shutil.rmtree(partial / "spool")
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return meta


def _extent(
    osmium: Any,  # noqa: ANN401 - an extra without types
    extract: Path,
    zoom: int,
    box: Sequence[float] | None,
) -> tuple[WebMercator, tuple[int, int]]:
    """The map's place in the world's pixel grid, and its width and height."""
    if box is None:
        found = osmium.FileProcessor(str(extract), osmium.osm.NODE).header.box()
        if not found.valid():  # not stated: then that of all nodes
            for node in osmium.FileProcessor(str(extract), osmium.osm.NODE):
                found.extend(node.location)
        if not found.valid():
            raise ValueError(f"{extract} has no nodes, so nothing to draw")
        low, high = found.bottom_left, found.top_right
        box = (low.lon, low.lat, high.lon, high.lat)
    if not (box[0] < box[2] and box[1] < box[3] and max(abs(box[1]), abs(box[3])) < 85.06):
        raise ValueError(
            f"box {tuple(box)}: expected longitude left, latitude bottom, longitude right, "
            "latitude top, within 85 degrees north and south"
        )
    corners = WebMercator(zoom, 0, 0).pixel(np.array([[box[0], box[3]], [box[2], box[1]]])) + 0.5
    x0, y0 = (math.floor(v) for v in corners[0])
    return WebMercator(zoom, x0, y0), (math.ceil(corners[1, 0]) - x0, math.ceil(corners[1, 1]) - y0)


def _shapes(
    osmium: Any,  # noqa: ANN401
    extract: Path,
    grid: WebMercator,
    admin_level: int,
    node_index: str,
) -> Iterator[Shape]:
    """All that is to be drawn, in the order of the extract."""
    matcher = Matcher()
    wanted = osmium.filter.KeyFilter(*matcher.keys, "boundary")
    objects = osmium.FileProcessor(str(extract)).with_locations(node_index).with_areas(wanted)
    for thing in tqdm(objects.with_filter(wanted), unit=" objects", disable=None):
        tags = thing.tags
        if thing.is_node():
            for style in matcher.styles(tags, ("dot",)):
                yield Shape(style, 0, [_points(grid, [thing.location])])
        elif thing.is_way():
            if tags.get("tunnel", "no") == "no" and tags.get("area") != "yes":
                for style in matcher.styles(tags, ("line",)):
                    for piece in _pieces([node.location for node in thing.nodes]):
                        yield Shape(style, 0, [_points(grid, piece)])
        elif thing.is_area():
            styles = list(matcher.styles(tags, ("fill", "dot")))
            if tags.get("boundary") == "administrative":
                styles += [INSIDE] * (tags.get("admin_level") == str(admin_level))
            for outer in thing.outer_rings() if styles else ():
                rings = [outer, *thing.inner_rings(outer)]
                lines = [_points(grid, [node.location for node in ring]) for ring in rings]
                area = int(np.prod(np.ptp(lines[0], axis=0) / (1 << SHIFT)))
                for style in styles:
                    if style != INSIDE and STYLES[style].draw == "dot":
                        middle = (lines[0].min(0) + lines[0].max(0)) // 2
                        yield Shape(style, 0, [middle[None].astype(np.int32)])
                    else:
                        yield Shape(style, min(area, 2**31 - 1), lines)


def _pieces(places: list[Any]) -> Iterator[list[Any]]:
    """The parts of a way of which the extract has the nodes: a cut way misses some."""
    piece: list[Any] = []
    for place in [*places, None]:
        if place is not None and place.valid():
            piece.append(place)
        else:
            if len(piece) > 1:
                yield piece
            piece = []


def _points(grid: WebMercator, places: list[Any]) -> np.ndarray:
    lonlat = np.array([(place.lon, place.lat) for place in places])
    points: np.ndarray = np.rint(grid.pixel(lonlat) * (1 << SHIFT)).astype(np.int32)
    return points


def _widths(grid: WebMercator, size: tuple[int, int]) -> list[float]:
    """Pixels that lines and dots of each style are wide, at the map's middle; 0 = filled."""
    metres = float(metres_per_pixel(grid, np.array(size) / 2)[1])
    widths = [0 if style.draw == "fill" else max(1, style.metres / metres) for style in STYLES]
    return [*widths, 0]


def _draw_blocks(
    spool: Spool, out: Path, widths: list[float], size: tuple[int, int]
) -> dict[str, int]:
    """Write the files of all blocks that are not empty; how many pixels each layer has."""
    folders = {name: out / "layers" / name for name in CHANNELS}
    folders |= {name: out / name for name in ("landcover", "inside")}
    for name, folder in folders.items():
        if name != "inside":
            folder.mkdir(parents=True)
    counts = dict.fromkeys(folders, 0)
    blocks = [(row, col) for row in range(spool.rows) for col in range(spool.cols)]
    for row, col in tqdm(blocks, unit=" blocks", disable=None):
        x, y = col * BLOCK, row * BLOCK
        shape = (min(BLOCK, size[1] - y), min(BLOCK, size[0] - x))
        planes = draw(spool.shapes(row, col), (x, y), shape, widths)
        for name, plane in planes.items():
            filled = int(np.count_nonzero(plane))
            counts[name] += filled
            if filled:
                folders[name].mkdir(exist_ok=True)
                flags = [] if name == "landcover" else [cv2.IMWRITE_PNG_BILEVEL, 1]
                _, data = cv2.imencode(".png", plane, flags)
                (folders[name] / f"{row}_{col}.png").write_bytes(data.tobytes())
    return counts


def _meta(
    extract: Path, grid: WebMercator, size: tuple[int, int], counts: dict[str, int]
) -> dict[str, Any]:
    width, height = size
    (west, north), (east, south) = grid.lonlat(
        np.array([[-0.5, -0.5], [width - 0.5, height - 0.5]])
    ).tolist()
    pixels = width * height
    return {
        "projection": "Web Mercator (EPSG:3857) global pixel grid",
        "zoom": grid.zoom,
        "tile_size": grid.tile_size,
        "global_x0": grid.x0,
        "global_y0": grid.y0,
        "width": width,
        "height": height,
        "block": BLOCK,
        "bbox_lonlat": [west, south, east, north],
        "metres_per_pixel": round(float(metres_per_pixel(grid, np.array(size) / 2)[1]), 4),
        "layers": list(CHANNELS),
        "landcover": {str(i): name for i, name in enumerate(LANDCOVER)},
        "share_of_pixels": {name: round(count / pixels, 6) for name, count in counts.items()},
        "style": [
            {"channel": style.channel, "draw": style.draw, "tags": dict(style.tags),
             "metres": style.metres, "landcover": style.landcover}
            for style in STYLES
        ],
        "source": extract.name,
        "licence": "ODbL 1.0, (c) OpenStreetMap contributors",
    }  # fmt: skip
