import pickle
import sys

import cv2
import numpy as np
import pytest

from ssl_flow.data.georeference import great_circle
from ssl_flow.data.open_map import open_map


def write(path, image, system="EPSG:32632", pixel=10.0, dtype="uint8", **options):
    rasterio = pytest.importorskip("rasterio", reason="needs ssl-flow[geo]")
    from rasterio.transform import from_origin

    height, width, bands = image.shape
    if system:
        options |= {"crs": system, "transform": from_origin(540000, 5220000, pixel, pixel)}
    with rasterio.open(path, "w", driver="GTiff", width=width, height=height, count=bands,
                       dtype=dtype, **options) as file:  # fmt: skip
        file.write(image.transpose(2, 0, 1).astype(dtype))
        for i in range(bands):
            file.set_band_description(i + 1, f"layer{i}")
    return path


def test_a_picture_in_utm(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    tile_map = open_map(write(tmp_path / "utm.tif", image))
    assert tile_map.channels == ["utm.red", "utm.green", "utm.blue"] and tile_map.colour.all()
    np.testing.assert_array_equal(tile_map.cut(40, 30, 9), image[26:35, 36:45])
    assert not tile_map.cut(0, 0, 5)[:2].any()
    xy = np.array([[0.0, 0.0], [79.0, 59.0]])
    np.testing.assert_allclose(tile_map.locate(tile_map.lonlat(xy)), xy, atol=1e-5)
    # Zone 32 is centred on 9 degrees east: 540000 is 40 km east of it, 10 m a pixel.
    place = tile_map.lonlat(np.array([-0.5, -0.5]))
    across = great_circle(place, [9.0, place[1]])
    assert across == pytest.approx(40e3, rel=3e-3)
    np.testing.assert_allclose(tile_map.metres_per_pixel(xy), 10, rtol=5e-3)
    again = pickle.loads(pickle.dumps(tile_map))
    np.testing.assert_array_equal(again.cut(40, 30, 9), image[26:35, 36:45])


def test_no_data_is_nothing_and_alpha_no_band(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="needs ssl-flow[geo]")
    image = np.random.default_rng(0).integers(1, 256, (30, 40, 4)).astype(np.uint8)
    with rasterio.open(write(tmp_path / "four.tif", image), "r+") as file:
        file.nodata = int(image[5, 5, 0])
        file.colorinterp = [
            rasterio.enums.ColorInterp[c] for c in ("red", "green", "blue", "alpha")
        ]
    tile_map = open_map(tmp_path / "four.tif")
    assert tile_map.channels == ["four.red", "four.green", "four.blue"]
    found = tile_map.cut(8, 8, 9)
    expected = image[4:13, 4:13, :3]
    np.testing.assert_array_equal(found, np.where(expected == image[5, 5, 0], 0, expected))
    assert (found == 0).any()


def test_other_numbers_of_bands_are_layers(tmp_path):
    image = np.random.default_rng(0).integers(0, 2, (30, 40, 6)) * 255
    tile_map = open_map(write(tmp_path / "six.tif", image, "EPSG:4326", 1e-3))
    assert tile_map.channels == [f"layer{i}" for i in range(6)] and not tile_map.colour.any()
    np.testing.assert_array_equal(tile_map.cut(20, 15, 9, rotation=90)[..., 5],
                                  np.rot90(image[11:20, 16:25, 5]))  # fmt: skip


def test_a_world_map_whose_corners_lie_off_the_globe(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="needs ssl-flow[geo]")
    image = np.random.default_rng(0).integers(0, 256, (90, 180, 3)).astype(np.uint8)
    place = {"crs": "ESRI:54009", "transform": rasterio.Affine(200e3, 0, -18e6, 0, -200e3, 9e6)}
    with rasterio.open(tmp_path / "w.tif", "w", driver="GTiff", width=180, height=90, count=3,
                       dtype="uint8", **place) as file:  # fmt: skip
        file.write(image.transpose(2, 0, 1))
    tile_map = open_map(tmp_path / "w.tif")
    assert np.isnan(tile_map.lonlat(np.array([[0.0, 0.0]]))).all()
    xy, _ = tile_map.draw_centres(40, 8, metres=1.6e6, rng=np.random.default_rng(0))
    assert np.isfinite(tile_map.lonlat(xy)).all()
    np.testing.assert_allclose(tile_map.locate([[9.0, 47.0]])[0], [93, 16], atol=3)


def test_bad_geotiffs_are_named(tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio", reason="needs ssl-flow[geo]")
    image = np.zeros((30, 40, 3), np.uint8)
    plain = write(tmp_path / "plain.tif", image, None)
    with pytest.raises(ValueError, match=r"plain.tif has no georeference: add one"):
        open_map(plain)
    with pytest.raises(ValueError, match=r"deep.tif holds uint16, expected 8-bit: gdal_translate"):
        open_map(write(tmp_path / "deep.tif", image, dtype="uint16"))
    with rasterio.open(write(tmp_path / "palette.tif", image[..., :1]), "r+") as file:
        file.colorinterp = [rasterio.enums.ColorInterp.palette]
        file.write_colormap(1, {0: (0, 0, 0), 1: (255, 0, 0)})
    with pytest.raises(ValueError, match=r"palette.tif has a palette: gdal_translate -expand rgb"):
        open_map(tmp_path / "palette.tif")
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3))
    torn = write(tmp_path / "torn.tif", noise, compress="deflate")
    data = bytearray(torn.read_bytes())
    data[1000:-5000] = bytes(len(data) - 6000)
    torn.write_bytes(data)
    with pytest.raises(ValueError, match=r"torn.tif is damaged"):
        open_map(torn).cut(200, 150, 90)
    (tmp_path / "broken.tif").write_bytes(b"II*\0nothing")
    with pytest.raises(ValueError, match=r"broken.tif cannot be read"):
        open_map(tmp_path / "broken.tif")


def test_without_rasterio_the_extra_is_named(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "map.tif"), np.zeros((30, 40, 3), np.uint8))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ImportError, match=r"map.tif: .*pip install 'ssl-flow\[geo\]'"):
        open_map(tmp_path / "map.tif")
