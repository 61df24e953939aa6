"""A small map, a run on it, and how it is judged: for the tests of Loc2Vec."""

import json

import cv2
import numpy as np
import pytest

from ssl_flow.evaluation.loc2vec import (
    Loc2Vec,
)
from ssl_flow.training import train_command

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
