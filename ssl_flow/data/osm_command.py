"""`ssl-flow loc2vec rasterize`: an OpenStreetMap extract -> a folder of layers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ssl_flow.data.osm import rasterize


@dataclass
class RasterizeCommand:
    """Draw an OpenStreetMap extract as 12 layers with land cover, to cut tiles from."""

    extract: tyro.conf.Positional[Path]
    """EXTRACT.osm.pbf, e.g. of a country."""
    out: Path
    """A new folder for layers/, landcover/, inside/ and meta.json."""
    zoom: int = 15
    """Web Mercator zoom: 15 is 4.8 metres a pixel at the equator, each step halves it."""
    box: tuple[float, float, float, float] | None = None
    """Longitude left, latitude bottom, longitude right, latitude top; default: the extract's."""
    admin_level: int = 2
    """Boundaries of this level are the mask `inside`: 2 = countries, 4 = often states."""
    node_index: str = "flex_mem"
    """osmium's store of node places; sparse_file_array,FILE for extracts larger than memory."""


def rasterize_command(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status (2 for bad input, told on stderr)."""
    command = tyro.cli(RasterizeCommand, args=list(argv), prog="ssl-flow loc2vec rasterize")
    try:
        meta = rasterize(
            command.extract,
            command.out,
            command.zoom,
            command.box,
            command.admin_level,
            command.node_index,
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"ssl-flow loc2vec rasterize: error: {error}", file=sys.stderr)
        return 2
    shares = meta["share_of_pixels"]
    print(
        f"{command.out}: {meta['width']}x{meta['height']} pixels of {meta['metres_per_pixel']:.2f} "
        "m; share of pixels: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    )
    return 0
