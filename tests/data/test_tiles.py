import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from ssl_flow.data import mosaic
from ssl_flow.data.cutting import content
from ssl_flow.data.georeference import Equirectangular, WebMercator, great_circle
from ssl_flow.data.open_map import open_map

REAL = Path(__file__).parents[3] / "shared" / "data" / "tiles"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real maps are not there")
PLATE = {"projection": "equirectangular (EPSG:4326)", "pixels_per_degree": 10, "lon_left": 5,
         "lat_top": 50}  # fmt: skip


def write_map(folder, size=(90, 70), **meta):
    """Two layers of blobs, a smooth picture, labels; returns (H, W, C) picture, layers, labels."""
    rng = np.random.default_rng(0)
    (folder / "layers").mkdir(parents=True)
    smooth = cv2.GaussianBlur(rng.normal(size=(size[1], size[0], 6)), (0, 0), 3)
    smooth = (127.5 + 400 * smooth).clip(1, 255).astype(np.uint8)
    picture, layers, cover = (
        smooth[..., :3],
        (smooth[..., 3:5] > 127) * np.uint8(255),
        smooth[..., 5],
    )
    cover = cover // 86
    for i in range(2):
        cv2.imwrite(str(folder / "layers" / f"layer{i}.png"), layers[..., i])
    cv2.imwrite(str(folder / "picture.png"), picture[..., ::-1])
    cv2.imwrite(str(folder / "cover.png"), cover)
    stated = {"layers": ["layer0", "layer1"], "images": {"picture.png": "smooth noise"},
              "labels": {"cover.png": {"0": "sea", "1": "land", "2": "ice"}}}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(PLATE | stated | meta))
    return picture, layers, cover


def reference(image, centre, side, step, degrees, fine, nearest):
    """Each pixel of the tile is the mean of `fine` x `fine` samples, in float64, 0 outside."""
    angle, pad = np.radians(degrees), 100
    offsets = (np.arange(side * fine) + 0.5) / fine - side / 2
    i, j = np.meshgrid(offsets, offsets)
    x = centre[0] + step[0] * (i * np.cos(angle) - j * np.sin(angle)) + pad
    y = centre[1] + step[1] * (i * np.sin(angle) + j * np.cos(angle)) + pad
    padded = np.pad(image.astype(np.float64), ((pad, pad), (pad, pad), (0, 0)))
    if nearest:
        values = padded[np.floor(y + 0.5).astype(int), np.floor(x + 0.5).astype(int)]
    else:
        left, top = np.floor(x).astype(int), np.floor(y).astype(int)
        u, v = (x - left)[..., None], (y - top)[..., None]
        a, b, c, d = (padded[top + p, left + q] for p in (0, 1) for q in (0, 1))
        values = (a * (1 - u) + b * u) * (1 - v) + (c * (1 - u) + d * u) * v
    return values.reshape(side, fine, side, fine, -1).mean((1, 3))


@pytest.mark.parametrize(
    ("side", "scale", "metres", "rotation"),
    [(21, 1, None, 17), (32, 0.4, None, 200), (20, 2.5, None, 33), (21, 3, None, 0),
     (20, 1.3, None, -90), (24, 1, 400e3, 60), (2, 20, None, 11), (1, 31, None, 45)],
)  # fmt: skip
@pytest.mark.parametrize("centre", [(40.3, 33.8), (7.2, 60.9)])
def test_cut_against_a_float64_reference(tmp_path, centre, side, scale, metres, rotation):
    picture, layers, _ = write_map(tmp_path)
    for names, image in ((["picture"], picture), (None, layers)):
        tile_map = open_map(tmp_path, names)
        step = np.array([scale, scale])
        if metres is not None:
            step = metres / side / tile_map.metres_per_pixel(np.array(centre))
            assert step[0] > 1.3 * step[1]  # a degree of longitude is shorter than one of latitude
        tile = tile_map.cut(*centre, side, scale=scale, metres=metres, rotation=rotation)
        assert tile.shape == (side, side, image.shape[2]) and tile.dtype == np.uint8
        fine = 1 if step.max() <= 1 else 64
        error = np.abs(tile - reference(image, centre, side, step, rotation, fine, names is None))
        # A sample on an edge may fall to either side; OpenCV places samples on 1/32 pixel.
        assert error.mean() < 3 and np.percentile(error, 80) < 6


def test_unturned_tiles_are_the_maps_own_pixels(tmp_path):
    picture, layers, cover = write_map(tmp_path)
    for names, image in ((["picture"], picture), (None, layers)):
        tile_map = open_map(tmp_path, names)
        np.testing.assert_array_equal(tile_map.cut(41.2, 32.8, 8), image[29:37, 38:46])
        for quarters in range(4):
            tile = tile_map.cut(41, 33, 9, rotation=90 * quarters)
            np.testing.assert_array_equal(tile, np.rot90(image[29:38, 37:46], quarters))
        corner = tile_map.cut(0, 0, 5)
        assert not corner[:2].any() and not corner[:, :2].any()  # outside is 0
        np.testing.assert_array_equal(corner[2:, 2:], image[:3, :3])
    label = tile_map.cut_labels("cover", 41, 33, 9, rotation=90)
    np.testing.assert_array_equal(label, np.rot90(cover[29:38, 37:46]))
    coarse = tile_map.cut_labels("cover", 41, 33, 9, scale=5, rotation=10)
    assert set(np.unique(coarse)) <= {0, 1, 2}
    xy = np.array([[3, 4], [88.6, 69.4], [-3, 0]])
    assert tile_map.label_at("cover", xy).tolist() == [cover[4, 3], cover[69, 89], 0]


def test_channels_say_whether_they_are_colour(tmp_path):
    write_map(tmp_path)
    both = open_map(tmp_path, ["layer1", "picture"])
    assert both.channels == ["layer1", "picture.red", "picture.green", "picture.blue"]
    assert both.colour.tolist() == [False, True, True, True]
    assert open_map(tmp_path / "picture.png").channels == both.channels[1:]
    assert open_map(tmp_path).size == (90, 70)


@pytest.mark.parametrize("grid", [WebMercator(15, 4414976, 2941184), Equirectangular(15, -170, 80)])
def test_pixels_and_places_are_inverse(grid):
    xy = np.random.default_rng(0).uniform(0, 2000, (50, 2))
    np.testing.assert_allclose(grid.pixel(grid.lonlat(xy)), xy, atol=1e-5)


def test_a_map_across_the_date_line():
    grid = Equirectangular(10, 170, 20)
    np.testing.assert_allclose(grid.pixel(np.array([-174.95, 0.0])), [150, 199.5], atol=1e-6)
    np.testing.assert_allclose(grid.pixel(np.array([185.05, 0.0])), [150, 199.5], atol=1e-6)
    np.testing.assert_allclose(grid.pixel(np.array([170.0, 20.0])), [-0.5, -0.5], atol=1e-6)
    world = Equirectangular(10, -180, 90)
    np.testing.assert_allclose(world.pixel(np.array([179.95, 0.0]))[0], 3599, atol=1e-6)


def test_places_of_web_mercator_that_are_known():
    world = WebMercator(0, 0, 0)
    np.testing.assert_allclose(world.lonlat(np.array([127.5, 127.5])), [0, 0], atol=1e-9)
    np.testing.assert_allclose(world.lonlat([255.5, -0.5]), [180, 85.0511287798], atol=1e-9)


def test_great_circle():
    quarter = 6371008.8 * np.pi / 2
    pole, equator = np.array([33.0, 90.0]), np.array([[0.0, 0.0], [90.0, 0.0]])
    np.testing.assert_allclose(great_circle(pole, equator), [quarter, quarter])
    np.testing.assert_allclose(great_circle(equator[0], [180.0, 0.0]), 2 * quarter)
    pairs = great_circle(equator[:, None], equator[None])
    np.testing.assert_allclose(pairs, [[0, quarter], [quarter, 0]])
    # Across the date line; and nearby, where the law of cosines would lose its digits.
    degree = quarter / 90
    np.testing.assert_allclose(great_circle([179.5, 0.0], [-179.5, 0.0]), degree)
    np.testing.assert_allclose(great_circle([9.5, 47.0], [9.5, 47.0 + 1e-7]), degree * 1e-7, 1e-6)
    # Paris to New York, 5837 km on the sphere.
    assert great_circle([2.3522, 48.8566], [-74.006, 40.7128]) == pytest.approx(5837e3, rel=1e-3)


def test_content_of_tiles():
    layers = np.zeros((2, 10, 10, 3), np.uint8)
    layers[1, :5, :, 0] = 255
    layers[1, :2, :, 2] = 9
    assert content(layers, colour=False).tolist() == [0, 0.5]
    noise = np.random.default_rng(0).integers(200, 210, (10, 10, 3)).astype(np.uint8)
    street = noise.copy()
    street[:3, :, 1] = 100
    assert content(noise, colour=True) == 0
    assert content(street, colour=True) == 0.3


def test_centres_are_where_the_map_shows_something(tmp_path):
    write_map(tmp_path, (400, 300), pixels_per_degree=0.2, lat_top=80, lon_left=-180)
    mask = np.zeros((300, 400), np.uint8)
    mask[:, :200] = 1
    cv2.imwrite(str(tmp_path / "inside.png"), mask)
    for i in range(2):
        plane = np.zeros((300, 400), np.uint8)
        plane[:, 100:] = 255
        cv2.imwrite(str(tmp_path / "layers" / f"layer{i}.png"), plane)
    tile_map = open_map(tmp_path)
    tile_map.georeference = Equirectangular(2, 0, 75)  # 75 to -75 degrees north
    xy, shown = tile_map.draw_centres(400, 16, rng=np.random.default_rng(0))
    assert 92 < xy[:, 0].min() < 94 and xy[:, 0].max() < 200 and (shown >= 0.05).all()
    assert tile_map.fits(xy, 16).all() and not tile_map.fits(np.array([[10, 150]]), 16)[0]
    lat = tile_map.lonlat(xy)[:, 1]
    assert np.mean(abs(lat) > 45) == pytest.approx(0.26, abs=0.05)  # of the ground; 0.4 of pixels
    north, _ = tile_map.draw_centres(9, 16, rng=np.random.default_rng(0),
                                     where=lambda xy: xy[:, 1] < 150)  # fmt: skip
    assert (north[:, 1] < 150).all()
    again, _ = tile_map.draw_centres(400, 16, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(again, xy)
    for i in range(2):
        cv2.imwrite(str(tmp_path / "layers" / f"layer{i}.png"), plane * 0)
    with pytest.raises(
        ValueError, match=r"random tiles of 16 pixels .* 0 lie where they may and show.*empty\?"
    ):
        open_map(tmp_path).draw_centres(5, 16, rng=np.random.default_rng(0))


def write_xyz(folder, suffix="png"):
    """Tiles 5/17-19/10-11 of 16 pixels, of which 5/18/11 is missing; and a lower zoom."""
    picture = np.random.default_rng(0).integers(1, 256, (32, 48, 3)).astype(np.uint8)
    picture[16:, 16:32] = 0
    for zoom, column, row in [(5, x, y) for x in (17, 18, 19) for y in (10, 11)] + [(4, 9, 5)]:
        (folder / str(zoom) / str(column)).mkdir(parents=True, exist_ok=True)
        x, y = (column - 17) * 16, (row - 10) * 16
        tile = picture[y : y + 16, x : x + 16] if zoom == 5 else picture[:16, :16]
        if (column, row) != (18, 11):
            path = folder / str(zoom) / str(column) / f"{row}.{suffix}"
            cv2.imwrite(str(path), tile[..., ::-1])
    return picture


def test_a_folder_of_tiles(tmp_path, monkeypatch):
    picture = write_xyz(tmp_path / "{row}")
    tile_map = open_map(tmp_path / "{row}")
    assert tile_map.size == (48, 32) and tile_map.colour.all()
    np.testing.assert_array_equal(tile_map.cut(23, 15, 21), picture[5:26, 13:34])
    # The left upper corner of tile 5/17/10: x / 32 of the way around.
    assert tile_map.bounds[0] == pytest.approx([17 / 32 * 360 - 180, 55.7765730], abs=1e-6)
    monkeypatch.setattr(mosaic, "CACHE_BYTES", 2 * 16 * 16 * 3)
    small = open_map(tmp_path / "{row}")
    np.testing.assert_array_equal(small.cut(23, 15, 21), picture[5:26, 13:34])
    assert len(small.rasters[0]._cache) == 2
    assert not pickle.loads(pickle.dumps(small)).rasters[0]._cache


def test_one_bit_and_blocks_are_read_alike(tmp_path):
    _, layers, cover = write_map(tmp_path / "whole")
    write_map(tmp_path / "blocks", block=40, width=90, height=70)
    folder = tmp_path / "blocks"
    planes = {"layers/layer0": layers[..., 0] // 255, "layers/layer1": layers[..., 1]}
    for name, plane in (planes | {"cover": cover}).items():
        (folder / f"{name}.png").unlink()
        (folder / name).mkdir()
        for row in (0, 1):
            for col in (0, 1, 2):
                part = plane[row * 40 : row * 40 + 40, col * 40 : col * 40 + 40]
                cv2.imwrite(str(folder / name / f"{row}_{col}.png"), part)
    whole, blocks = open_map(tmp_path / "whole"), open_map(folder)
    np.testing.assert_array_equal(
        blocks.cut(42, 38, 30, rotation=9), whole.cut(42, 38, 30, rotation=9)
    )
    np.testing.assert_array_equal(
        blocks.cut_labels("cover", 42, 38, 30), whole.cut_labels("cover", 42, 38, 30)
    )
    xy = np.random.default_rng(0).uniform(0, 69, (30, 2))
    np.testing.assert_array_equal(blocks.label_at("cover", xy), whole.label_at("cover", xy))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"side": 71}, "larger than .* 70 pixels high"), ({"scale": 9}, "larger"),
     ({"metres": 1e6}, "larger"), ({"x": 90}, "outside of .* 90x70"),
     ({"scale": 0}, "not positive"), ({"x": float("nan")}, "outside")],
)  # fmt: skip
def test_tiles_that_cannot_be_cut(tmp_path, options, message):
    write_map(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_map(tmp_path).cut(**{"x": 40, "y": 30, "side": 16} | options)


def test_points_outside_are_named(tmp_path):
    write_map(tmp_path)
    tile_map = open_map(tmp_path)
    np.testing.assert_allclose(
        tile_map.locate([[5.05, 49.95], [5.15, 49.95]]), [[0, 0], [1, 0]], atol=1e-9
    )
    with pytest.raises(ValueError, match=r"1 of 2 .*longitude 5 to 14.*row 1: 50, 6.*order"):
        tile_map.locate(np.array([[6.0, 49.0], [50.0, 6.0]]))
    with pytest.raises(ValueError, match="no labels 'climate'; it has: cover"):
        tile_map.label_at("climate", np.zeros((1, 2)))


def damage(folder, kind):
    meta = json.loads((folder / "meta.json").read_text())
    if kind == "unaligned":
        cv2.imwrite(str(folder / "layers" / "layer1.png"), np.zeros((70, 91), np.uint8))
    elif kind == "stated size":
        meta["width"] = 91
    elif kind == "projection":
        meta["projection"] = "Lambert 93"
    elif kind == "no projection":
        del meta["projection"]
    elif kind == "no corner":
        del meta["lat_top"]
    elif kind == "wrong number":
        meta["lon_left"] = "west"
    elif kind == "mask values":
        meta["labels"]["cover.png"].pop("2")
    elif kind == "label names":
        meta["labels"]["cover.png"]["all"] = "sea"
    elif kind == "blocks":
        meta["block"] = 10
        (folder / "layers" / "layer0").mkdir()
    elif kind == "labels":
        meta["labels"] = ["cover.png"]
    elif kind == "layer numbers":
        meta["layers"] = [1]
    elif kind == "no list":
        meta["layers"] = None
    elif kind == "block":
        meta["block"] = "x"
    elif kind == "infinite":
        meta["lon_left"] = float("nan")
    elif kind == "scale":
        meta["pixels_per_degree"] = -1
    elif kind == "top":
        meta["lat_top"] = 200
    elif kind == "missing layer":
        meta["layers"].append("road")
    elif kind == "no layers":
        meta["layers"], meta["images"] = [], {}
    elif kind == "colour layer":
        cv2.imwrite(str(folder / "layers" / "layer1.png"), np.zeros((70, 90, 3), np.uint8))
    elif kind == "two of a name":
        cv2.imwrite(str(folder / "layers" / "layer1.jpg"), np.zeros((70, 90), np.uint8))
    elif kind == "broken":
        file = folder / "layers" / "layer1.png"
        file.write_bytes(file.read_bytes()[:60])
    (folder / "meta.json").write_text("{" if kind == "json" else json.dumps(meta))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("unaligned", "not aligned: layer1 is 91x70, layer0 is 90x70"),
     ("stated size", "states 91x70 pixels, layer0 is 90x70"),
     ("projection", "meta.json: unknown projection 'Lambert 93'. Known .* GeoTIFF"),
     ("no projection", "meta.json has no projection: add"),
     ("no corner", "'lat_top' is missing"), ("wrong number", "number of the georeference"),
     ("mask values", r"cover.png holds \[2\], not among the labels \[0, 1\]"),
     ("missing layer", "no image road; meta.json names"),
     ("no layers", "neither layers nor images"),
     ("colour layer", "layer1.png: expected one grey channel"), ("json", "not valid JSON"),
     ("label names", "meta.json: the labels cover should be"), ("blocks", "need width and height"),
     ("labels", r"meta.json: labels is \['cover.png'\], expected an object"),
     ("layer numbers", "meta.json: layers should hold names"),
     ("no list", "meta.json: layers is None, expected a list"),
     ("block", "meta.json: block is 'x', expected a whole number"),
     ("infinite", "meta.json: a number of the georeference is wrong .lon_left is nan"),
     ("scale", "pixels_per_degree is -1, expected more than 0"),
     ("top", "lat_top is 200, expected degrees"),
     ("two of a name", r"images named layer1 \(layer1.jpg, layer1.png\): keep one"),
     ("broken", "layer1.png cannot be read as an image")],
)  # fmt: skip
def test_bad_maps_are_named(tmp_path, kind, message):
    write_map(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tile_map = open_map(tmp_path)
        tile_map.cut(40, 30, 60)
        tile_map.cut_labels("cover", 40, 30, 60)


def test_what_is_no_map(tmp_path):
    write_xyz(tmp_path / "tiles", "jpg")
    cv2.imwrite(str(tmp_path / "tiles" / "5" / "17" / "12.png"), np.zeros((16, 16, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "alone.png"), np.zeros((16, 16, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    for name, error, message in [
        ("nowhere", FileNotFoundError, "nowhere is missing. A map is"),
        ("alone.png", ValueError, "alone.png has no georeference: put a meta.json"),
        ("empty", ValueError, "no meta.json and no tiles"),
        ("tiles", ValueError, "mixes tiles of .jpg, .png"),
    ]:
        with pytest.raises(error, match=message):
            open_map(tmp_path / name)
    write_xyz(tmp_path / "uneven")
    cv2.imwrite(str(tmp_path / "uneven" / "5" / "17" / "10.png"), np.zeros((8, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"10.png is 16x8"):
        open_map(tmp_path / "uneven").cut(3, 3, 9)


@real
@pytest.mark.parametrize("name", ["osm_liechtenstein", "world_americas"])
def test_real_maps_lie_where_their_meta_says(name):
    tile_map = open_map(REAL / name)
    meta = json.loads((REAL / name / "meta.json").read_text())
    scope = {word: getattr(np, word) for word in ("arctan", "degrees", "sinh", "pi")}
    scope |= {"atan": np.arctan, **{k: v for k, v in meta.items() if isinstance(v, (int, float))}}
    for x, y in [(0, 0), (2000, 1), (17, 1999)]:
        names = dict(scope, x=x, y=y)
        for formula in meta["pixel_to_lonlat"].split(";"):
            variable, expression = formula.split("=", 1)
            names[variable.strip()] = eval(expression.strip(), {}, names)
        expected = [names["lon"], names["lat"]]
        np.testing.assert_allclose(tile_map.lonlat(np.array([x, y])), expected, atol=1e-9)
    middle = np.array(tile_map.size) / 2
    if "metres_per_pixel" in meta:
        assert tile_map.metres_per_pixel(middle) == pytest.approx(meta["metres_per_pixel"], 5e-3)
    tile = tile_map.cut(*middle, 64, rotation=20)
    assert tile.shape == (64, 64, {"osm_liechtenstein": 12, "world_americas": 3}[name])
    assert tile_map.labels["landcover"].names[1].endswith("forest")


@real
def test_real_places():
    world = open_map(REAL / "world_americas")
    lake, amazon = world.locate([[-87.0, 43.5], [-65.0, -5.0]])
    cover = world.labels["landcover"].names
    assert cover[world.label_at("landcover", [lake])[0]] == "water"
    assert cover[world.label_at("landcover", [amazon])[0]] == "evergreen_broadleaf_forest"
    country = open_map(REAL / "osm_liechtenstein")
    vaduz, davos = country.georeference.pixel(np.array([[9.521, 47.141], [9.83, 46.8]]))
    assert country.is_inside([vaduz, davos]).tolist() == [True, False]
    assert country.content(country.cut(*vaduz, 128)) > 0.5
