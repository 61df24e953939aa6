import json

import cv2
import numpy as np
import pytest

from ssl_flow.cli import main
from ssl_flow.data import osm_drawing
from ssl_flow.data.georeference import great_circle
from ssl_flow.data.open_map import open_map
from ssl_flow.data.osm import rasterize
from ssl_flow.data.osm_drawing import Shape, Spool, draw
from ssl_flow.data.osm_style import CHANNELS, LANDCOVER, ON_TOP, STYLES, Matcher

BOX = (9.50, 47.10, 9.53, 47.12)


class Extract:
    """Builds a small extract with osmium's own writer."""

    def __init__(self):
        self.osmium = pytest.importorskip("osmium", reason="needs ssl-flow[osm]")
        self.nodes, self.ways, self.relations = [], [], []

    def node(self, lon, lat, **tags):
        new = self.osmium.osm.mutable.Node(id=len(self.nodes) + 1, location=(lon, lat), tags=tags)
        self.nodes.append(new)
        return new.id

    def way(self, nodes, **tags):
        new = self.osmium.osm.mutable.Way(id=len(self.ways) + 1, nodes=nodes, tags=tags)
        self.ways.append(new)
        return new.id

    def box(self, west, south, east, north, **tags):
        corners = [(west, south), (east, south), (east, north), (west, north)]
        nodes = [self.node(*corner) for corner in corners]
        return self.way([*nodes, nodes[0]], **tags)

    def area(self, outer, inner, **tags):
        members = [("w", way, "outer") for way in outer] + [("w", way, "inner") for way in inner]
        tags = {"type": "multipolygon"} | tags
        new = self.osmium.osm.mutable.Relation(
            id=len(self.relations) + 1, members=members, tags=tags
        )
        self.relations.append(new)

    def write(self, path, box=BOX):
        header = self.osmium.io.Header()
        if box is not None:
            header.add_box(self.osmium.osm.Box(*box))
        with self.osmium.SimpleWriter(str(path), header=header) as writer:
            for add, things in ((writer.add_node, self.nodes), (writer.add_way, self.ways),
                                (writer.add_relation, self.relations)):  # fmt: skip
                for thing in things:
                    thing.version = 1
                    add(thing)
        return path


def village():
    """A wood with a clearing, houses, roads, a stream, a cafe, in a country."""
    extract = Extract()
    extract.box(9.502, 47.102, 9.528, 47.118, boundary="administrative", admin_level="2")
    extract.box(9.508, 47.101, 9.516, 47.119, boundary="administrative", admin_level="4")
    wood = extract.box(9.503, 47.103, 9.515, 47.115)
    clearing = extract.box(9.507, 47.107, 9.511, 47.111)
    extract.area([wood], [clearing], natural="wood")
    extract.box(9.508, 47.108, 9.510, 47.110, landuse="meadow")
    extract.box(9.518, 47.104, 9.526, 47.112, landuse="residential")
    extract.box(9.520, 47.106, 9.521, 47.107, building="yes", shop="bakery")
    extract.box(9.523, 47.106, 9.524, 47.107, building="no")
    west, east = extract.node(9.504, 47.1166), extract.node(9.526, 47.1166)
    extract.way([west, east], highway="primary")
    extract.way([west, extract.node(9.504, 47.102)], waterway="stream", tunnel="culvert")
    south = extract.node(9.522, 47.102)
    extract.way([south, extract.node(9.522, 47.11), 9999, east], highway="residential")
    extract.node(9.527, 47.104, amenity="cafe")
    extract.node(9.527, 47.108, amenity="bench")
    return extract


def read(tile_map, name):
    width, height = tile_map.size
    every = {raster.name: raster for raster in tile_map.rasters} | dict(tile_map.labels)
    every["inside"] = tile_map.inside
    return every[name].read(0, 0, width, height)[..., 0]


def square_metres(tile_map, plane):
    height, width = plane.shape
    return np.count_nonzero(plane) * tile_map.metres_per_pixel(np.array([width, height]) / 2).prod()


def expected_square_metres(west, south, east, north):
    middle = (south + north) / 2
    sides = great_circle([[west, middle], [west, south]], [[east, middle], [west, north]])
    return sides.prod()


def test_an_extract_becomes_a_map(tmp_path, capsys):
    path = village().write(tmp_path / "village.osm.pbf")
    command = ["loc2vec", "rasterize", str(path), "--out", str(tmp_path / "map"), "--zoom", "17"]
    assert main(command) == 0
    assert "forest" in capsys.readouterr().out
    assert not (tmp_path / "map.partial").exists()
    tile_map = open_map(tmp_path / "map")
    assert tuple(tile_map.channels) == CHANNELS and len(CHANNELS) == 12
    np.testing.assert_allclose(tile_map.bounds, [[BOX[0], BOX[3]], [BOX[2], BOX[1]]], atol=3e-5)

    wood = expected_square_metres(9.503, 47.103, 9.515, 47.115)
    wood -= expected_square_metres(9.507, 47.107, 9.511, 47.111)
    assert square_metres(tile_map, read(tile_map, "forest")) == pytest.approx(wood, rel=0.005)
    road = 16 * great_circle([9.504, 47.1166], [9.526, 47.1166])
    assert square_metres(tile_map, read(tile_map, "road_major")) == pytest.approx(road, rel=0.03)
    street = 8 * great_circle([9.522, 47.102], [9.522, 47.11])  # up to the node that is missing
    assert square_metres(tile_map, read(tile_map, "road_minor")) == pytest.approx(street, rel=0.04)
    country = expected_square_metres(9.502, 47.102, 9.528, 47.118)
    assert square_metres(tile_map, read(tile_map, "inside")) == pytest.approx(country, rel=0.003)
    assert not read(tile_map, "water").any()  # in a tunnel
    house = expected_square_metres(9.520, 47.106, 9.521, 47.107)  # and not the one that is no more
    assert square_metres(tile_map, read(tile_map, "building")) == pytest.approx(house, rel=0.02)

    places = {"forest": (9.505, 47.105), "unknown": (9.5075, 47.1075),
              "grass_farm": (9.509, 47.109), "residential": (9.519, 47.105),
              "building": (9.5203, 47.1063), "road": (9.522, 47.105)}  # fmt: skip
    xy = tile_map.locate(np.array(list(places.values())))
    names = tile_map.labels["landcover"].names
    assert [names[value] for value in tile_map.label_at("landcover", xy).tolist()] == list(places)
    dots, _, boxes, middles = cv2.connectedComponentsWithStats(read(tile_map, "amenity"))
    found = tile_map.lonlat(middles[1:])
    np.testing.assert_allclose(found, [[9.5205, 47.1065], [9.527, 47.104]][::1], atol=2e-5)
    assert dots == 3 and (abs(boxes[1:, 2] * 0.811 - 13) < 1).all()
    tile = tile_map.cut(*xy[0], 64, rotation=45)
    assert tile[..., CHANNELS.index("forest")].all()


def test_zoom_box_and_admin_level(tmp_path):
    path = village().write(tmp_path / "village.osm.pbf", box=None)
    rasterize(path, tmp_path / "all", zoom=14)
    rasterize(path, tmp_path / "state", zoom=14, admin_level=4)
    rasterize(path, tmp_path / "part", zoom=15, box=(9.503, 47.103, 9.507, 47.107), admin_level=9)
    every, state, part = (open_map(tmp_path / name) for name in ("all", "state", "part"))
    # Without a box in its head, the extract is as large as its nodes lie apart.
    np.testing.assert_allclose(every.bounds, [[9.502, 47.119], [9.528, 47.101]], atol=2e-4)
    assert not every.is_inside(every.locate([[9.51, 47.1012]]))[0]
    assert state.is_inside(state.locate([[9.51, 47.1012]]))[0]
    assert part.inside is None and read(part, "forest").mean() > 250
    assert (read(part, "forest") == 0).mean() < 0.03
    scale = every.metres_per_pixel(np.zeros(2)) / part.metres_per_pixel(np.zeros(2))
    np.testing.assert_allclose(scale, 2, rtol=1e-3)


def test_small_blocks_give_the_same_map(tmp_path, monkeypatch):
    path = village().write(tmp_path / "village.osm.pbf")
    rasterize(path, tmp_path / "one", zoom=16)
    for module in ("ssl_flow.data.osm", "ssl_flow.data.osm_drawing"):
        monkeypatch.setattr(f"{module}.BLOCK", 100)
    monkeypatch.setattr(osm_drawing, "_HELD_BYTES", 500)
    rasterize(path, tmp_path / "many", zoom=16)
    one, many = open_map(tmp_path / "one"), open_map(tmp_path / "many")
    assert many.rasters[0].grid[0] > 4 and not (tmp_path / "many" / "spool").exists()
    for name in (*CHANNELS, "landcover", "inside"):
        np.testing.assert_array_equal(read(one, name), read(many, name), err_msg=name)
    assert json.loads((tmp_path / "many" / "meta.json").read_text())["block"] == 100


def test_bad_extracts(tmp_path, capsys):
    good = village().write(tmp_path / "good.osm.pbf")
    (tmp_path / "broken.osm.pbf").write_bytes(good.read_bytes()[:300])
    (tmp_path / "text.osm.pbf").write_text("no extract")
    bare = Extract()
    bare.node(9.51, 47.11, amenity="bench")
    bare.write(tmp_path / "bare.osm.pbf")
    Extract().write(tmp_path / "void.osm.pbf", box=None)
    (tmp_path / "there").mkdir()
    cases = [
        ("missing.osm.pbf", "out", [], "missing.osm.pbf is missing"),
        ("broken.osm.pbf", "out", [], "broken.osm.pbf cannot be read"),
        ("text.osm.pbf", "out", [], "text.osm.pbf cannot be read"),
        ("bare.osm.pbf", "out", [], "nothing to draw in its box"),
        ("void.osm.pbf", "out", [], "has no nodes"),
        ("good.osm.pbf", "there", [], "there is there already"),
        ("good.osm.pbf", "out", ["--zoom", "25"], "zoom 25: expected 1 to 20"),
        ("good.osm.pbf", "out", ["--box", "9", "48", "10", "47"], "longitude left, latitude"),
        ("good.osm.pbf", "out", ["--box", "1", "1", "1.1", "1.1"], "nothing to draw"),
    ]
    for name, out, options, message in cases:
        line = [str(tmp_path / name), "--out", str(tmp_path / out), *options]
        assert main(["loc2vec", "rasterize", *line]) == 2, name
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_without_osmium_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "osmium", None)
    assert main(["loc2vec", "rasterize", "x.osm.pbf", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'ssl-flow[osm]'" in capsys.readouterr().err


def test_the_table():
    matcher = Matcher()

    def found(kinds, **tags):
        return [STYLES[i].channel for i in matcher.styles(tags, kinds)]

    assert found(("line",), highway="motorway_link") == ["road_major"]
    assert found(("fill", "dot"), building="house", shop="bakery") == ["building", "amenity"]
    assert found(("fill",), natural="water", landuse="reservoir") == ["water"]
    assert not found(("fill",), building="no") and not found(("line",), landuse="forest")
    for style in STYLES:
        assert style.landcover is None or style.landcover in LANDCOVER
        assert (style.metres > 0) == (style.draw != "fill")
    assert set(ON_TOP) <= set(LANDCOVER)


def test_the_smaller_area_shows_whatever_the_order():
    channels = [style.channel for style in STYLES]
    forest, grass = channels.index("forest"), channels.index("grass_farm")
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.int32) << 4
    large, small = Shape(forest, 3600, [square * 60]), Shape(grass, 400, [square * 20])
    pond = Shape(channels.index("water"), 0, [square[:2] * 60])
    widths = [3.0] * (len(STYLES) + 1)
    for shapes in ([large, small, pond], [pond, small, large]):
        planes = draw(shapes, (0, 0), (64, 64), widths)
        assert LANDCOVER[planes["landcover"][10, 10]] == "grass_farm"
        assert LANDCOVER[planes["landcover"][30, 30]] == "forest"
        assert LANDCOVER[planes["landcover"][0, 10]] == "water"
        assert planes["forest"][10, 10] == 255  # the layers hide nothing
    shifted = draw([large, small], (7, 5), (40, 40), widths)
    for name, plane in draw([large, small], (0, 0), (64, 64), widths).items():
        np.testing.assert_array_equal(shifted[name], plane[5:45, 7:47])


@pytest.mark.parametrize("width", [1.0, 2.5, 4.0])
def test_shapes_have_their_size(width):
    """Squares of every place and lines of every direction, in 1/16 pixels."""
    channels, widths = [style.channel for style in STYLES], [width] * len(STYLES)
    corner = np.random.default_rng(0).integers(400, 600, (40, 2))
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * round(16 * width)
    house = [draw([Shape(channels.index("building"), 9, [(square + at).astype(np.int32)])],
                  (0, 0), (64, 64), widths)["building"] for at in corner]  # fmt: skip
    assert np.count_nonzero(house) / 40 == pytest.approx((width + 0.25) ** 2, rel=0.2)
    drawn = []
    for angle, start in zip(np.linspace(0, 3, 40), corner, strict=True):
        way = start + 2000 + 16 * 100 * np.array([[np.cos(angle), np.sin(angle)]]) * [[-1], [1]]
        shape = Shape(channels.index("path"), 0, [way.round().astype(np.int32)])
        plane = draw([shape], (0, 0), (300, 300), widths)["path"]
        drawn.append(np.count_nonzero(plane) / 200)
        assert cv2.connectedComponents(plane)[0] == 2  # without gaps
    assert np.mean(drawn) == pytest.approx(width, abs=0.35)


def test_the_spool_keeps_shapes(tmp_path):
    spool = Spool(tmp_path / "spool", (3000, 1500))
    rng = np.random.default_rng(0)
    rings = [rng.integers(2000 * 16, 2100 * 16, (n, 2)).astype(np.int32) for n in (5, 3)]
    rings[0][:, 1] -= 1000 * 16
    spool.add(Shape(4, 77, rings), 0)
    spool.add(Shape(2, 0, rings[:1]), 3)
    first, second = spool.shapes(0, 2)
    assert (first.style, first.area, second.style) == (4, 77, 2)
    for kept, ring in zip(first.rings, rings, strict=True):
        np.testing.assert_array_equal(kept, ring)
    assert not spool.shapes(0, 0)
