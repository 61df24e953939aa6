"""Loc2Vec end to end on a small map whose two classes differ in their pattern alone."""

import json
import shutil
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tile_run import JUDGE, METRES, QUICK, SIDE, few_places, finished, place, train, write_map  # noqa: F401
from tiny import lines, stop_at_step
from torch import nn

from ssl_flow.cli import main
from ssl_flow.config import load_config
from ssl_flow.data.georeference import great_circle
from ssl_flow.data.open_map import open_map, open_map_spec
from ssl_flow.data.sphere import tile_blocks
from ssl_flow.evaluation import loc2vec_pictures, suite_command
from ssl_flow.evaluation.loc2vec import (
    Histograms,
    judged_tiles,
    run_loc2vec,
)
from ssl_flow.models import load_tile_encoder
from ssl_flow.training import train_command
from ssl_flow.training.score import score_run
from ssl_flow.training.tile_task import OBJECTIVES, TileObjective, TileTask


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
