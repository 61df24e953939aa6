"""Loc2Vec end to end on a small map whose two classes differ in their pattern alone."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from tiny import lines, stop_at_step
from torch import nn

from ssl_flow.cli import main
from ssl_flow.config import load_config
from ssl_flow.data.georeference import great_circle
from ssl_flow.data.open_map import open_map, open_map_spec
from ssl_flow.data.sphere import tile_blocks
from ssl_flow.evaluation import loc2vec_command, loc2vec_pictures, suite_command
from ssl_flow.evaluation.loc2vec import (
    Histograms,
    Judged,
    Loc2Vec,
    embed_tiles,
    judged_tiles,
    load_judged,
    run_loc2vec,
)
from ssl_flow.evaluation.loc2vec_command import read_places, read_vectors, write_vectors
from ssl_flow.evaluation.loc2vec_pictures import draw_pictures, tile_rgb, walks
from ssl_flow.models import load_tile_encoder
from ssl_flow.training import train_command
from ssl_flow.training.score import score_run
from ssl_flow.training.tile_task import OBJECTIVES, TileObjective, TileTask

METRES, SIDE = 9000.0, 32
QUICK = Loc2Vec(metres=METRES, pixels=SIDE, train_tiles=150, test_tiles=60)
JUDGE = ["--metres", "9000", "--pixels", "32", "--train-tiles", "150", "--test-tiles", "60"]


def write_map(folder, layers=("forest", "path"), seed=0, size=640):
    """Stripes or dots of one density, each in its own parts; at the equator, 556 m a pixel."""
    rng = np.random.default_rng(seed)
    (folder / "layers").mkdir(parents=True)
    kind = cv2.GaussianBlur(rng.normal(size=(size, size)), (0, 0), 40) > 0
    y, x = np.mgrid[:size, :size]
    stripes, dots = x % 8 < 2, (x % 8 < 4) & (y % 8 < 4)
    forest = np.where(kind, stripes, dots)
    cover = 1 + kind.astype(np.uint8)
    cover[:40, :40] = 0
    for name, layer in zip(layers, (forest, rng.random((size, size)) < 0.02), strict=True):
        cv2.imwrite(str(folder / "layers" / f"{name}.png"), layer.astype(np.uint8))
    cv2.imwrite(str(folder / "cover.png"), cover)
    meta = {"projection": "equirectangular (EPSG:4326)", "pixels_per_degree": 200, "lon_left": 10,
            "lat_top": 1.6, "layers": layers,
            "labels": {"cover.png": {"0": "unknown", "1": "dots", "2": "stripes"}}}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_map(tmp_path_factory.mktemp("map") / "home")


def train(place, out, *options):
    return train_command(["loc2vec", "--data.store", f"map:{place}", "--data.metres", str(METRES),
        "--data.crop", str(SIDE), "--train.steps", "6", "--train.batch-size", "8",
        "--train.log-every", "2", "--train.checkpoint-every", "2", "--data.workers", "0",
        "--loss.objective", "triplet_margin", "--device", "cpu", "--out", str(out),
        *options])  # fmt: skip


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssl_flow.training.tile_task.PLACES", 300)
        assert train(place, out) == 0
    return next(out.iterdir())


@pytest.fixture(autouse=True)
def few_places(monkeypatch):
    monkeypatch.setattr("ssl_flow.training.tile_task.PLACES", 300)


def test_a_run_folder_holds_what_one_of_flow_does(finished, place):
    for name in ("config.yaml", "results.json", "report.html", "checkpoints/best.pt",
                 "pictures/training.png", "encoder/model.safetensors"):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    rows = lines(finished)
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert 1 <= row["effective_rank"] <= 16 and row["embedding_std"] > 0
        assert row["constant_loss"] == pytest.approx(1) and 0 <= row["wrong_triplets"] <= 1
    encoder = load_tile_encoder(finished)
    assert encoder.channels == ["forest", "path"]
    tile = open_map(place).cut(300, 300, **encoder.tile)
    assert encoder(encoder.normalize(torch.from_numpy(tile[None]))).shape == (1, 16)
    page = (finished / "report.html").read_text()
    assert "load_tile_encoder" in page and "Linear probe" not in page


def test_a_stopped_run_goes_on_to_the_same_bytes(finished, place, tmp_path, monkeypatch):
    stop_at_step(monkeypatch, TileTask, 3)
    assert train(place, tmp_path) == 128 + signal.SIGTERM
    (run,) = tmp_path.iterdir()
    assert train_command(["--resume", str(run)]) == 0
    for name in ("model", "head"):
        file = f"encoder/{name}.safetensors"
        assert (run / file).read_bytes() == (finished / file).read_bytes()


@pytest.mark.parametrize(
    ("objective", "constant"),
    [("triplet_margin", 1.0), ("softmax_ratio", 0.25), ("soft_pn", 0.25), ("info_nce", None)],
)
def test_losses_of_a_constant_embedding(objective, constant):
    module = TileObjective(nn.Identity(), objective, 1000.0, 0.1, None)
    places = torch.tensor([[0.0, 0.0], [0.0, 0.001], [1.0, 0.0], [1.0, 0.001], [9, 9], [9, 9]])
    loss, wrong = module.compare(torch.zeros(3, 2, 4), places.view(3, 2, 2).double())
    # InfoNCE: of six, all but itself and no near place but the other view: five keys alike.
    assert float(loss) == pytest.approx(np.log(5) if constant is None else constant)
    assert float(wrong) == 1
    points = torch.eye(3)[:, None].repeat(1, 2, 1) * 50
    loss, wrong = module.compare(points, places.view(3, 2, 2).double())
    assert float(loss) < 1e-3 and float(wrong) == 0


def test_near_places_are_no_negatives():
    module = TileObjective(nn.Identity(), "triplet_margin", 1000.0, 0.1, None)
    near = torch.tensor([[0, 0], [0, 0], [0.001, 0], [0.001, 0], [9, 9], [9, 9]])
    points = torch.tensor([0.0, 0, 0.1, 0.1, 5, 5]).view(3, 2, 1)  # the first two are alike
    loss, wrong = module.compare(points, near.view(3, 2, 2).double())
    assert float(loss) == 0 and float(wrong) == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_without_any_far_place_teaches_nothing(objective, place):
    module = TileObjective(nn.Identity(), objective, 1000.0, 0.1, None)
    points = torch.randn(3, 2, 4, requires_grad=True)
    loss, wrong = module.compare(points, torch.zeros(3, 2, 2).double())
    loss.backward()
    assert loss.item() == 0 and float(wrong) == 0 and not points.grad.any()


def test_the_trial_batch_is_of_places_and_of_the_same_seen_anew(place):
    config = load_config("loc2vec")
    task = TileTask(replace(config, data=replace(config.data, store=f"map:{place}", metres=METRES)))
    places = task.trial(3, SIDE, torch.device("cpu")).places
    assert places.shape == (3, 2, 2) and (places[:, 0] == places[:, 1]).all()
    assert len(places[:, 0].unique(dim=0)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss.objective", "cross_entropy"], "one of triplet_margin"),
        (["--data.store", "synthetic"], "give data.store map:PATH"),
        (["--data.store", "map:nowhere"], "nowhere"),
        (["--data.far", "100"], "lower one of them"),
        (["--data.metres", "3.9e5"], "larger than"),
        (["--evaluation.data", "camvid:nowhere"], "a map is judged on map:PATH"),
        (["--data.start-crop", "32", "--data.crop", "64"], "without effect"),
        (["--loss.ridge-weight", "1"], "of a map: loss.ridge_weight (1.0); leave it out"),
        (["--train.accumulate", "2"], "train.accumulate is 2; expected 1 for a map"),
    ],
)
def test_bad_input_is_told_before_any_work(place, tmp_path, capsys, options, message):
    assert train(place, tmp_path, *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_told_before_any_work(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert train(place, tmp_path, "--evaluation.data", f"map:{place}") == 2
    assert "pip install 'ssl-flow[eval]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class Oracle(nn.Module):
    """Knows the class, or nothing."""

    def __init__(self, points):
        super().__init__()
        self.points, self.weight = points, nn.Parameter(torch.zeros(1))

    def normalize(self, tiles):
        return tiles

    def forward(self, tiles):
        return self.points(tiles)


def test_judged_tiles_share_no_ground_with_those_that_are_learned_from(place):
    tile_map = open_map(place)
    learned, judged, _ = judged_tiles(tile_map, QUICK)
    apart = np.abs(learned.xy[:, None] - judged.xy[None]).max(-1)
    assert apart.min() * 556 > METRES * 2**0.5 + METRES / 2  # rotated and shifted, too
    blocks = tile_blocks(METRES)
    assert blocks.train(learned.places).all() and not blocks.train(judged.places).any()
    assert set(judged.labels["cover"]) == {1, 2}  # unknown is left out


def test_positives_of_a_wide_shift_are_learned_from_train_blocks(place, tmp_path):
    config = load_config("loc2vec")
    data = replace(config.data, store=f"map:{place}", metres=METRES, crop=SIDE, shift=4.0, far=6.0)
    pairs = TileTask(replace(config, data=data)).examples(tmp_path)
    places = np.concatenate([pairs[k].places.numpy() for k in range(200)])
    assert tile_blocks(METRES).train(places).all()


def test_scores_of_encoders_that_know_all_or_nothing(place):
    tile_map = open_map(place)
    constant = run_loc2vec(Oracle(lambda t: torch.zeros(len(t), 2)), tile_map, QUICK)
    assert constant.scores["effective_rank"] == pytest.approx(1)
    assert constant.scores["spearman"] == 0  # there, or a table of it and others could not be made
    assert constant.scores["knn_cover"] <= constant.details["most_common_class"]["cover"] + 1e-9
    assert constant.scores["triplets_1-4_tiles"] == 0
    truth = run_loc2vec(Histograms(), tile_map, QUICK)
    assert truth.scores["knn_cover"] < 0.9  # patterns have the same histograms
    assert truth.details["dimensions"] == 64
    learned, judged, _ = judged_tiles(tile_map, QUICK)
    nearest = great_circle(judged.places[:, None], learned.places).argsort(1)[:, :20]
    votes = (learned.labels["cover"][nearest] == 2).mean(1)  # of a tie, the lower class
    right = (np.where(votes > 0.5, 2, 1) == judged.labels["cover"]).mean()
    assert truth.details["knn_of_place"]["cover"] == pytest.approx(right)
    assert len(truth.items) == len(truth.values["knn_cover"]) == truth.details["test_tiles"]
    assert len({item.partition("/")[0] for item in truth.items}) > 2


def test_embeddings_that_are_not_finite_are_refused(place):
    with pytest.raises(ValueError, match="embeddings of the map's tiles are not finite"):
        run_loc2vec(Oracle(lambda t: torch.full((len(t), 2), torch.nan)), open_map(place), QUICK)


def test_the_command_judges_trained_random_and_floor(finished, place, tmp_path, monkeypatch):
    monkeypatch.setattr(loc2vec_pictures, "CELLS", 100)
    words = ["eval", "loc2vec", "--encoders", f"mine={finished}", "random:tile_cnn", "histograms"]
    words += ["--data", f"map:{place}", "--device", "cpu", "--out", str(tmp_path), *JUDGE]
    assert main(words) == 0
    (table,) = json.loads((tmp_path / "results.json").read_text())["tables"]
    assert [row["encoder"] for row in table["rows"]] == ["mine", "random:tile_cnn", "histograms"]
    scores = table["rows"][0]["scores"]
    assert next(iter(scores)) == "knn_cover" and table["unit"] == "blocks"
    assert scores["knn_cover"]["low"] <= scores["knn_cover"]["value"] <= scores["knn_cover"]["high"]
    for name in ("linear_cover", "effective_rank", "silhouette_cover", "spearman"):
        assert np.isfinite(scores[name]["value"]), name
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    for kind in ("neighbours", "map", "tsne", "walks", "sums", "filters"):
        assert f"home_mine_{kind}.png" in names
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/") == len(names) + 1  # and that of the intervals
    assert "failed:" not in page and "Hardest" not in page
    assert "what each dimension" in page.lower()


def test_an_encoder_is_judged_on_another_map(finished, tmp_path, capsys):
    other = write_map(tmp_path / "abroad", seed=3)
    words = ["eval", "loc2vec", "--encoders", str(finished), "--device", "cpu"]
    assert main([*words, "--data", f"map:{other}", "--out", str(tmp_path / "o"), *JUDGE]) == 0
    strange = write_map(tmp_path / "strange", layers=("forest", "rail"))
    capsys.readouterr()
    assert main([*words, "--data", f"map:{strange}", "--out", str(tmp_path / "o"), *JUDGE]) == 2
    assert "takes the channels forest, path" in capsys.readouterr().err
    wide = [*words, "--data", f"map:{other}", "--out", str(tmp_path / "o"), "--metres", "100"]
    assert main(wide) == 2
    assert "--metres 9000 --pixels 32" in capsys.readouterr().err
    both = [*words, "--data", f"map:{other}", "synthetic", "--out", str(tmp_path / "o"), *JUDGE]
    assert main(both) == 2


def test_a_run_is_judged_at_its_end(finished, place, tmp_path, monkeypatch):
    real = suite_command.eval_command
    out = ["--train-tiles", "150", "--test-tiles", "60", "--device", "cpu"]
    monkeypatch.setattr(suite_command, "eval_command", lambda words: real([*words, *out]))
    monkeypatch.setattr(loc2vec_pictures, "CELLS", 100)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = load_config(str(run / "config.yaml"))
    config = replace(config, evaluation=replace(config.evaluation, data=f"map:{place}"))
    score_run(config, torch.device("cpu"))(load_tile_encoder(run), run)
    (table,) = json.loads((run / "results.json").read_text())["loc2vec"]
    assert [row["encoder"] for row in table["rows"]] == ["trained", "random:tile_cnn", "histograms"]


def test_some_layers_of_a_map(place):
    assert open_map_spec(f"map:{place}@path").channels == ["path"]
    assert open_map_spec(str(place)).channels == ["forest", "path"]


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
