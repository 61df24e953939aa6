import json

import numpy as np
import pytest
from PIL import Image

from ssl_flow.evaluation import linear_probe_command
from ssl_flow.models import create_encoder, save_encoder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for i in range(10):
        mask = rng.integers(0, 2, (2, 2)).repeat(32, 0).repeat(32, 1).astype(np.uint8)
        image = (mask[..., None] * 120 + rng.integers(0, 90, (64, 64, 3))).astype(np.uint8)
        for kind, array in (("images", image), ("masks", mask)):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(create_encoder("resnet18"), tmp_path_factory.mktemp("runs") / "a")


def test_one_table_for_several_encoders_and_seeds(data, encoder, tmp_path, capsys):
    arguments = [
        "--encoder", "random:resnet18", f"{encoder},{encoder}", "--data", f"folder:{data}",
        "--out", str(tmp_path), "--seeds", "3", "--steps", "20", "--pixels-per-image", "64",
    ]  # fmt: skip
    assert linear_probe_command(arguments) == 0
    report = json.loads((tmp_path / "linear_probe.json").read_text())
    random, folder = report["results"]
    assert [r["runs"] for r in (random["summary"], folder["summary"])] == [3, 2]
    scores = [run["miou"] for run in random["runs"]]
    assert len(set(scores)) == 3  # three initialisations
    spread = random["summary"]["miou"]
    assert spread["mean"] == pytest.approx(np.mean(scores))
    assert spread["std"] == pytest.approx(np.std(scores, ddof=1))
    assert (spread["min"], spread["max"]) == (min(scores), max(scores))
    assert [run["batchnorm_images"] for run in random["runs"]] == [8, 8, 8]
    assert [run["batchnorm_images"] for run in folder["runs"]] == [0, 0]
    assert report["protocol"]["steps"] == 20 and report["protocol"]["features"] == "hypercolumn"
    assert set(report["versions"]) >= {"ssl_flow", "torch", "timm"}
    ((name, sets),) = report["data"].items()
    assert sets["test"]["images"] == 2 and "every 5th" in sets["test"]["rule"]
    assert set(random["runs"][0]["per_class"]) == {"0", "1"}
    table = capsys.readouterr().out
    assert table.strip() == (tmp_path / "linear_probe.md").read_text().strip()
    assert "| random:resnet18 | 3 |" in table and "±" in table
    pictures = list((tmp_path / "predictions").iterdir())
    assert len(pictures) == 2 and all(p.name.startswith(name) for p in pictures)
    assert Image.open(pictures[0]).size == (3 * 180, 2 * 180)


def test_json_on_stdout(data, encoder, tmp_path, capsys):
    arguments = ["--encoder", str(encoder), "--data", f"folder:{data}", "--out", str(tmp_path)]
    options = ["--steps", "5", "--features", "stage2", "--json"]
    assert linear_probe_command([*arguments, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["results"][0]["summary"]["miou"]["std"] is None
    assert report["results"][0]["runs"][0]["channels"] == 64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--features": "stage9"}, "no features 'stage9'; it has hypercolumn"),
        ({"--encoder": "nowhere"}, "no encoder at 'nowhere'"),
        ({"--data": "imagenet:x"}, "unknown data kind 'imagenet'"),
        ({"--seeds": "0"}, "expected 1 or more"),
        ({"--steps": "0"}, "steps = 0, expected more than 0"),
    ],
)
def test_bad_input_is_told_before_any_work(data, encoder, tmp_path, capsys, changed, message):
    options = {"--encoder": str(encoder), "--data": f"folder:{data}", "--out": str(tmp_path / "o")}
    arguments = [word for pair in (options | changed).items() for word in pair]
    assert linear_probe_command(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
