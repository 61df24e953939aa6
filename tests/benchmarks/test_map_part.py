"""A part of a map: the same pixels at the same places."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_flow.data.open_map import open_map

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from map_part import cut_rows

META = """{"projection": "equirectangular (EPSG:4326)", "pixels_per_degree": 2, "lon_left": 10,
"lat_top": 50, "lat_bottom": 30, "width": 30, "height": 40, "images": {"satellite.png": "?"},
"labels": {"landcover.png": {"0": "water", "1": "land"}}}"""


def test_a_part_lies_where_it_lay(tmp_path):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 255, (40, 30, 3), np.uint8), rng.integers(0, 2, (40, 30))
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    (whole / "meta.json").write_text(META)
    Image.fromarray(pixels).save(whole / "satellite.png")
    Image.fromarray(labels.astype(np.uint8)).save(whole / "landcover.png")
    cut_rows(whole, 12, 36, part)
    before, after = open_map(whole), open_map(part)
    here, there = np.array([[7.0, 20.0]]), np.array([[7.0, 8.0]])
    np.testing.assert_allclose(before.lonlat(here), after.lonlat(there))
    metres = 100_000.0
    tiles = [m.cut(x, y, 16, metres=metres) for m, (x, y) in ((before, here[0]), (after, there[0]))]
    assert np.array_equal(*tiles) and tiles[0].any()
    cuts = [
        m.cut_labels("landcover", x, y, 16, metres=metres)
        for m, (x, y) in ((before, here[0]), (after, there[0]))
    ]
    assert np.array_equal(*cuts)
    with pytest.raises(ValueError, match="rows 30 to 41 of 40"):
        cut_rows(whole, 30, 41, tmp_path / "none")
