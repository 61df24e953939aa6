"""The contrastive peer takes steps, saves what evaluation reads, draws from the right videos."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_flow import load_encoder
from ssl_flow.data.synthetic import synthetic_sources
from ssl_flow.flow import FlowStore, extract
from ssl_flow.models import create_encoder

pytest.importorskip("lightly", reason="lightly is not installed: pip install ssl-flow[bench]")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/peers"))
import contrastive


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("contrastive") / "store"
    extract(synthetic_sources(3, seed=5), path, method="farneback", size=64, gap=0.1, workers=1)
    return path


def _run(store, out, *options):
    small = ["--device", "cpu", "--batch-size", "4", "--crop", "32", "--queue", "64"]
    contrastive.main(["--store", str(store), "--out", str(out), *small, *options])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", contrastive.METHODS)
def test_steps_give_a_finite_loss_and_an_encoder_that_loads(store, tmp_path, method):
    torch.manual_seed(0)
    before = create_encoder("resnet18").state_dict()
    options = ["--method", method, "--steps", "3", "--weight-decay", "0"]
    (row,) = _run(store, tmp_path / "run", *options)
    assert row["step"] == 3 and np.isfinite(row["loss"])
    encoder = load_encoder(tmp_path / "run")
    assert encoder.hypercolumn(torch.zeros(1, 3, 64, 64)).isfinite().all()
    # Residual branches start at zero, so their kernels move from the second step on.
    after = encoder.state_dict()
    trained = [k for k, v in before.items() if v.ndim == 4 or "running" in k]
    assert not [k for k in trained if torch.equal(after[k], before[k])]


def test_a_run_is_repeatable_and_follows_its_seed(store, tmp_path):
    options = ["--steps", "2", "--temporal", "--optimizer", "lars"]
    losses = [
        _run(store, tmp_path / name, *options, "--seed", seed)[-1]["loss"]
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_minutes_end_a_run(store, tmp_path):
    rows = _run(store, tmp_path / "run", "--minutes", "0.001", "--steps", "10000")
    assert rows[-1]["step"] < 10000


def test_neighbours_stay_in_the_video(store):
    numbers = FlowStore(store).source_numbers
    neighbours = [contrastive.neighbour(numbers, i) for i in range(len(numbers))]
    assert (numbers[neighbours] == numbers).all()
    assert (np.abs(np.array(neighbours) - np.arange(len(numbers))) == 1).all()
    assert contrastive.neighbour(np.array([0, 1, 2]), 1) == 1


def test_keys_follow_the_queries(store):
    options = contrastive.argparse.Namespace(momentum=0.75, queue=8, temperature=0.2)
    torch.manual_seed(0)
    model = contrastive.DenseCL(create_encoder("resnet18").backbone, 512, options)
    weight, key = (part["image"].layers[0].weight for part in (model.query, model.key))
    start = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    model.loss([torch.rand(2, 3, 32, 32)] * 2, done=0.0)
    torch.testing.assert_close(key, 0.75 * start + 0.25 * (start + 1))
    assert not any(p.requires_grad for p in model.key.parameters())


def test_spread_tells_collapse():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4096, 32, generator=generator)
    assert contrastive.spread(points) == pytest.approx(1, abs=0.02)
    assert contrastive.spread(points[:1].expand(64, 32)) == pytest.approx(0, abs=1e-4)


def test_bad_calls_are_refused_before_the_store_is_read(tmp_path, capsys):
    for options in ([], ["--steps", "1", "--batch-size", "1"]):
        with pytest.raises(SystemExit):
            contrastive.main(["--store", "nowhere", "--out", str(tmp_path / "new"), *options])
    with pytest.raises(SystemExit):
        contrastive.main(["--store", "nowhere", "--out", str(tmp_path), "--steps", "1"])
    assert "exists already" in capsys.readouterr().err
