"""Vectors of places, their neighbours, and the pictures of a map."""

import os
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from tile_run import JUDGE, METRES, QUICK, SIDE, few_places, finished, place, train, write_map  # noqa: F401

from ssl_flow.cli import main
from ssl_flow.data.open_map import open_map
from ssl_flow.evaluation import loc2vec_command, loc2vec_pictures
from ssl_flow.evaluation.loc2vec import (
    Judged,
    embed_tiles,
    judged_tiles,
    load_judged,
)
from ssl_flow.evaluation.loc2vec_command import read_places, read_vectors, write_vectors
from ssl_flow.evaluation.loc2vec_pictures import draw_pictures, tile_rgb, walks
from ssl_flow.models import load_tile_encoder


def points_file(tmp_path, count=9):
    rng = np.random.default_rng(1)
    places = np.stack([rng.uniform(10.2, 13, count), rng.uniform(-1.4, 1.4, count)], -1)
    lines = [f"p{i},{lat},{lon}" for i, (lon, lat) in enumerate(places.tolist())]
    (tmp_path / "points.csv").write_text("\n".join(["name,lat,lon", *lines]))
    return tmp_path / "points.csv", places


@pytest.mark.parametrize("kind", ["csv", "npy", "parquet"])
def test_a_vector_for_each_place_and_on_after_a_stop(finished, place, tmp_path, monkeypatch, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="needs ssl-flow[parquet]")
    points, places = points_file(tmp_path)
    out = tmp_path / f"vectors.{kind}"
    words = ["loc2vec", "embed", "--lonlat", str(points), "--map", str(place), "--encoder",
             str(finished), "--out", str(out), "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(loc2vec_command, "_PART", 4)
    out.with_name(out.name + ".parts").mkdir()  # killed before anything was in it
    real, calls = loc2vec_command.embed_tiles, []

    def stop_at_two(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loc2vec_command, "embed_tiles", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert not out.exists()
    if kind == "npy":
        os.utime(place / "layers" / "path.png", (1, 1))  # another map: what was made is not used
    assert main(words) == 0
    assert len(calls) == (5 if kind == "npy" else 4)  # three parts, what was stopped twice
    found, vectors = read_vectors(out)
    encoder, tile_map = load_tile_encoder(finished), open_map(place)
    tiles = [tile_map.cut(x, y, **encoder.tile) for x, y in tile_map.locate(places).tolist()]
    np.testing.assert_allclose(vectors, embed_tiles(encoder, np.stack(tiles)), atol=1e-5)
    if kind != "npy":
        np.testing.assert_allclose(found, places, rtol=1e-8)
    assert list(tmp_path.glob("*.parts")) == []


def test_neighbours_are_the_nearest_vectors(tmp_path, capsys):
    rng = np.random.default_rng(0)
    places, vectors = rng.uniform(0, 9, (30, 2)), rng.normal(size=(30, 3)).astype(np.float32)
    write_vectors(tmp_path / "v.csv", places, vectors)
    order = np.linalg.norm(vectors - vectors[7], axis=1).argsort()[:4]
    for query, told in (["--row", "7"], ""), (["--lonlat", *map(str, places[7] + 1e-4)], " m away"):
        assert main(["loc2vec", "neighbours", "--vectors", str(tmp_path / "v.csv"), *query,
                     "--count", "3"]) == 0  # fmt: skip
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert told in err and bool(told) == bool(err)
        assert [int(line.split(",")[0]) for line in lines[1:]] == order.tolist()
    assert main(["loc2vec", "neighbours", "--vectors", str(tmp_path / "v.csv"), "--row", "30"]) == 2
    assert "has 30" in capsys.readouterr().err
    (tmp_path / "points.csv").write_text("lon,lat\n1,2\n")
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    for name, reason in (
        ("points.csv", "2 columns, expected lon, lat and a vector"),
        ("broken.npy", ""),
    ):
        wrong = str(tmp_path / name)
        assert main(["loc2vec", "neighbours", "--vectors", wrong, "--row", "0"]) == 2
        assert f"{name} is not what `loc2vec embed` writes ({reason}" in capsys.readouterr().err


def test_places_where_the_map_shows_nothing_have_no_vector(finished, tmp_path, capsys):
    bare = write_map(tmp_path / "bare")
    for file in (bare / "layers").iterdir():
        layer = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
        layer[:, :300] = 0
        cv2.imwrite(str(file), layer)
    (tmp_path / "points.csv").write_text("10.5,0\n12.5,0\n12.6,0.3\n")
    out = str(tmp_path / "v.csv")
    assert main(["loc2vec", "embed", "--lonlat", str(tmp_path / "points.csv"), "--map", str(bare),
                 "--encoder", str(finished), "--out", out, "--device", "cpu"]) == 0  # fmt: skip
    assert (
        "1 of 3 places have nan for a vector, as the map shows nothing there: row 0: 10.5, 0"
        in (capsys.readouterr().err)
    )
    assert np.isnan(read_vectors(tmp_path / "v.csv")[1]).any(1).tolist() == [True, False, False]
    words = ["loc2vec", "neighbours", "--vectors", out]
    assert main([*words, "--lonlat", "10.5", "0"]) == 0  # the nearest that has a vector
    assert [line.split(",")[0] for line in capsys.readouterr().out.split()[1:]] == ["1", "2"]
    assert main([*words, "--row", "0"]) == 2
    assert "row 0 of" in capsys.readouterr().err


def test_the_whole_map_is_read_in_strips(place, monkeypatch):
    tile_map = open_map(place)
    whole = np.concatenate([raster.read(0, 0, 640, 640) for raster in tile_map.rasters], -1)
    read = []
    for raster in tile_map.rasters:
        real = raster.read
        monkeypatch.setattr(
            raster, "read", lambda *w, real=real: (read.append(w[3] - w[1]), real(*w))[1]
        )
    small = loc2vec_pictures._overview(tile_map, (320, 320))
    assert small.shape == (320, 320, 2) and max(read) < 40
    truth = whole.reshape(320, 2, 320, 2, 2).mean((1, 3))
    assert np.abs(small - truth).mean() < 30  # strips begin at whole pixels


def test_bad_places_and_files_are_told(finished, place, tmp_path, capsys, monkeypatch):
    points, _ = points_file(tmp_path)

    def embed(out="v.npy", points=points):
        status = main(["loc2vec", "embed", "--lonlat", str(points), "--map", str(place),
                       "--encoder", str(finished), "--out", str(tmp_path / out)])  # fmt: skip
        assert status == 2
        return capsys.readouterr().err

    assert ".csv, .npy, .parquet" in embed("v.txt")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'ssl-flow[parquet]'" in embed("v.parquet")
    wrong = tmp_path / "wrong.csv"
    for text, message in [("lon,lat\n11,0.5\n50,0.5", "row 1: 50, 0.5"),
                          ("x,y\n11,0.5", "expected lon and lat"), ("11,0.5\n11,", "line 2"),
                          ("lon,lat", "no places"), ("11,nan", "not finite"),
                          ("lon,lat\n\n11,0.5\n11,x", "line 4"),
                          ("0.5,110", "line 1: latitude 110 is not")]:  # fmt: skip
        wrong.write_text(text)
        assert message in embed(points=wrong), text
    wrong.write_bytes(b"lon,lat\n11,\xff")
    assert "wrong.csv is no CSV file in UTF-8" in embed(points=wrong)
    wrong.write_text("11,0.5\n")
    assert read_places(wrong).tolist() == [[11, 0.5]]


def test_sums_answer_with_other_tiles():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 60)
    points = rng.normal(size=(60, 4)) + 3 * np.eye(4)[classes]
    judged = Judged(np.zeros((60, 2)), np.zeros((60, 2)), np.zeros(60), {"cover": classes})
    labels = SimpleNamespace(labels={"cover": SimpleNamespace(names={})})
    heads, grid = loc2vec_pictures._sums(points, judged, labels)
    assert len(heads) == 6 and all(row[0] not in row[2:] for row in grid.tolist())
    assert len(set(grid[:, 0].tolist())) == 6


def test_pictures_of_layers_and_of_points(place, monkeypatch):
    monkeypatch.setattr(loc2vec_pictures, "CELLS", 100)
    tile_map = open_map(place)
    tiles = np.zeros((1, 4, 4, 2), np.uint8)
    tiles[0, 0, 0] = (255, 0)
    tiles[0, 1, 1] = 255
    shown = tile_rgb(tiles, tile_map)[0]
    assert shown[3, 3].tolist() == [248] * 3 and shown[0, 0].tolist() == shown[1, 1].tolist()
    rng = np.random.default_rng(0)
    points = rng.normal(size=(50, 3))
    for line in walks(points, rng):
        assert len(set(line.tolist())) == len(line) == 9
    drawn = draw_pictures(load_judged("histograms", 0, tile_map), tile_map, QUICK,
                          judged_tiles(tile_map, QUICK)[1])  # fmt: skip
    assert [name for name, _, _ in drawn] == ["neighbours", "map"]
