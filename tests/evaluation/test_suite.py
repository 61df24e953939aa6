"""The suite end to end on a few small images: tables, resuming, failures, bad input."""

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ssl_flow.cli import main
from ssl_flow.evaluation import suite, suite_report
from ssl_flow.evaluation.protocols import PROTOCOLS

NETWORKS = """
import torch
def colours():
    return lambda images: torch.nn.functional.avg_pool2d(images, 4)
def broken():
    network = torch.nn.Conv2d(3, 4, 4, 4)
    network.forward = lambda images: torch.nn.functional.conv2d(
        images, network.weight, stride=4) * (float("nan") if len(images) > 1 else 1)
    return network
"""
QUICK = ["--set", "linear-probe.steps=20", "linear-probe.pixels_per_image=64",
         "dense-knn.image_size=64"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for i in range(15):
        mask = rng.integers(0, 2, (2, 2)).repeat(32, 0).repeat(32, 1).astype(np.uint8)
        image = (mask[..., None] * 120 + rng.integers(0, 90, (64, 64, 3))).astype(np.uint8)
        for kind, array in (("images", image), ("masks", mask)):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{i}.png")
    return root


@pytest.fixture
def networks(tmp_path, monkeypatch):
    (tmp_path / "suite_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "suite_networks", raising=False)
    return "python:suite_networks:"


@pytest.fixture
def calls(monkeypatch):
    """The (protocol, seed) that were really run."""
    made, real = [], suite.run_protocol

    def counted(settings, encoder, data, seed, *rest):
        made.append((settings.name, seed))
        return real(settings, encoder, data, seed, *rest)

    monkeypatch.setattr(suite, "run_protocol", counted)
    return made


def arguments(data, out, *encoders, protocols=("linear-probe", "dense-knn"), seeds=1):
    return ["eval", "suite", "--encoders", *encoders, "--data", f"folder:{data}", "--out", str(out),
            "--protocols", *protocols, "--seeds", str(seeds), *QUICK]  # fmt: skip


def test_end_to_end(data, networks, tmp_path, capsys):
    out = tmp_path / "out"
    words = arguments(data, out, f"colours={networks}colours", "random:resnet18", seeds=2)
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "[8/8]" in printed.err and "min left" in printed.err
    assert printed.out == (out / "results.md").read_text()
    results = json.loads((out / "results.json").read_text())
    assert results["command"].startswith("ssl-flow eval suite --encoders colours=python:")
    probe, knn = results["tables"]
    assert (probe["protocol"]["steps"], knn["protocol"]["image_size"]) == (20, 64)
    assert (probe["units"], probe["unit"], probe["headline"]) == (3, "images", "miou")
    colours, random = probe["rows"]
    assert [run["seed"] for run in random["runs"]] == [0, 1]
    assert len({run["sha256"] for run in random["runs"]}) == 2  # two initialisations
    assert len({run["sha256"] for run in colours["runs"]}) == 1
    miou = random["scores"]["miou"]
    assert miou["value"] == pytest.approx(np.mean(miou["seeds"]))
    assert miou["std"] == pytest.approx(np.std(miou["seeds"], ddof=1))
    assert miou["low"] <= miou["value"] <= miou["high"]
    assert colours["scores"]["miou"]["value"] > 0.9 and colours["best"]
    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    line = next(x for x in lines if x["encoder"] == "random:resnet18" and x["score"] == "miou")
    assert float(line["value"]) == pytest.approx(miou["value"]) and line["runs"] == "2"
    assert {x["score"] for x in lines} == {"miou", "pixel_accuracy", "class 0", "class 1"}
    page = (out / "report.html").read_text()
    assert "http" not in page  # nothing is fetched
    for part in ('alt="', "Hardest images", "Principal components", "linear-probe version 1"):
        assert part in page, part
    assert page.count('onclick="choose(this)"') >= 3


def test_finished_cells_are_not_computed_again(data, networks, tmp_path, calls):
    words = arguments(data, tmp_path / "out", f"{networks}colours")
    assert main(words) == 0 and len(calls) == 2
    first = json.loads((tmp_path / "out/results.json").read_text())["tables"]
    assert main(words) == 0 and len(calls) == 2
    assert json.loads((tmp_path / "out/results.json").read_text())["tables"] == first
    # another setting, another seed, other data: other cells
    assert main([*words, "linear-probe.lr=0.02"]) == 0 and calls[2:] == [("linear-probe", 0)]
    assert main([*words, "--seeds", "2"]) == 0 and {seed for _, seed in calls[3:]} == {1}
    os.utime(data / "masks" / "3.png", (1, 1))
    assert main(words) == 0 and len(calls) == 7


def test_kill_9_costs_the_cell_at_hand_alone(data, networks, tmp_path, calls):
    words = arguments(data, tmp_path / "out", f"{networks}colours")
    code = (
        "import os, sys\n"
        "from ssl_flow.cli import main\n"
        "from ssl_flow.evaluation import suite\n"
        "real = suite.run_protocol\n"
        "def run(settings, *rest):\n"
        "    if settings.name == 'dense-knn': os.kill(os.getpid(), 9)\n"
        "    return real(settings, *rest)\n"
        "suite.run_protocol = run\n"
        "main(sys.argv[1:])\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out/cells").glob("*.json"))) == 1
    assert main(words) == 0
    assert calls == [("dense-knn", 0)]


def test_a_failing_cell_is_named_and_costs_no_other(data, networks, tmp_path, capsys):
    words = arguments(data, tmp_path / "out", f"{networks}broken", f"{networks}colours")
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "1 of 1 failed: ValueError" in shown.out and "not finite" in shown.out
    assert shown.err.count("failed: ValueError") == 2
    tables = json.loads((tmp_path / "out/results.json").read_text())["tables"]
    for table in tables:
        broken, colours = table["rows"]
        assert not broken["scores"] and colours["scores"]["miou"]["value"] > 0.5
        assert colours["better_than"] == []
    assert 'class="failed"' in (tmp_path / "out/report.html").read_text()


def test_one_protocol_with_flags_and_encoders_of_one_method(data, networks, tmp_path, capsys):
    words = ["--encoder", f"{networks}colours,random:resnet18", "--data", f"folder:{data}",
             "--out", str(tmp_path / "out"), "--steps", "5", "--features", "stage1",
             "--json"]  # fmt: skip
    assert main(["eval", "linear-probe", *words]) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert table["protocol"]["features"] == "stage1" and table["protocol"]["steps"] == 5
    (row,) = table["rows"]
    assert len(row["runs"]) == len(row["scores"]["miou"]["seeds"]) == 2


def test_every_segmentation_protocol_takes_an_encoder_without_weights(data, networks, tmp_path):
    names = [name for name, entry in PROTOCOLS.items() if entry.kind == "segmentation"]
    words = arguments(data, tmp_path / "out", f"{networks}colours", protocols=names)
    words += ["linear-probe-bn.steps=2", "linear-probe-bn.warmup_steps=0",
              "linear-probe-bn.input_size=64", "linear-probe-bn.stride=64",
              "linear-probe-plain.epochs=1", "linear-probe-plain.batch_images=4",
              "linear-probe-plain.input_size=64", "clustering.image_size=64",
              "clustering.overclusters=4", "clustering.runs=1", "fine-tune.steps=2",
              "fine-tune.crop=32"]  # fmt: skip
    assert main(words) == 0
    tables = json.loads((tmp_path / "out/results.json").read_text())["tables"]
    assert [table["protocol"]["name"] for table in tables] == names
    assert all(0 <= table["rows"][0]["scores"]["miou"]["value"] <= 1 for table in tables)


def test_data_of_two_kinds_is_shown_once_as_the_first(networks, tmp_path, monkeypatch, capsys):
    for folder, kind in ((f, k) for f in "abc" for k in ("frames", "masks")):
        (tmp_path / "davis" / kind / folder).mkdir(parents=True)
        for i in range(3):
            mask = np.zeros((64, 96), np.uint8)
            mask[10:40, 10 + i : 40] = 1
            picture = mask if kind == "masks" else np.stack([mask * 200] * 3, -1)
            name = f"{i}.png" if kind == "masks" else f"{i}.jpg"
            Image.fromarray(picture).save(tmp_path / "davis" / kind / folder / name)
    shown, real = [], suite_report.feature_strips

    def counted(data, *rest):
        shown.append(data.kind)
        return real(data, *rest)

    monkeypatch.setattr(suite_report, "feature_strips", counted)
    words = ["--encoders", f"{networks}colours", "--data", f"davis:{tmp_path / 'davis'}", "--out",
             str(tmp_path / "out"), "--protocols", "dense-knn", "label-propagation", "--set",
             "dense-knn.image_size=64", "label-propagation.short_side=64"]  # fmt: skip
    assert main(["eval", "suite", *words]) == 0
    tables = json.loads((tmp_path / "out/results.json").read_text())["tables"]
    assert [(t["data"], t["unit"], t["units"]) for t in tables] == [("davis", "sequences", 1)] * 2
    assert shown == ["segmentation"]
    assert f"features stage1 of {networks}colours, short_side 64" in capsys.readouterr().out


def test_a_protocol_that_draws_nothing_runs_once(networks, tmp_path, calls, monkeypatch):
    words = ["--encoders", f"{networks}colours", "random:resnet18", "--data", "synthetic"]
    monkeypatch.setattr("ssl_flow.data.flow_pairs.range", lambda n: range(2), raising=False)
    words += ["--out", str(tmp_path / "out"), "--seeds", "2", "--query-step", "64"]
    assert main(["eval", "correspondence", *words]) == 0
    assert len(calls) == 3  # the same encoder once, two random ones


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--encoders": "nowhere"}, "no encoder at 'nowhere'"),
        ({"--encoders": "a=,"}, "empty encoder"),
        ({"--data": "imagenet:x"}, "unknown data 'imagenet"),
        ({"--data": "folder:/nowhere"}, "/nowhere is missing"),
        ({"--seeds": "0"}, "seeds = 0, expected 1 or more"),
        ({"--protocols": "guessing"}, "unknown protocol 'guessing'; known: linear-probe"),
        ({"--protocols": "label-propagation"}, "none of the protocols label-propagation takes"),
        ({"--set": "dense-knn.k=3"}, "keys: features, image_size"),
        ({"--set": "clustering.runs=3"}, "not among the protocols of this call"),
        ({"--set": "dense-knn.neighbours=0"}, "neighbours = 0, expected more than 0"),
        ({"--set": "linear-probe.features=stage9"}, "has no features 'stage9'"),
        ({"--device": "abacus"}, "device 'abacus' cannot be used here"),
    ],
)
def test_bad_input_is_told_before_any_work(data, tmp_path, capsys, calls, changed, message):
    options = {
        "--encoders": "random:resnet18", "--data": f"folder:{data}", "--out": str(tmp_path / "o"),
        "--protocols": "linear-probe dense-knn",
    }  # fmt: skip
    words = [w for key, value in (options | changed).items() for w in (key, *value.split())]
    try:
        assert main(["eval", "suite", *words]) == 2
    except SystemExit as stop:  # the parser's, for a value of a setting
        assert stop.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists() and not calls


def test_a_missing_extra_is_told_before_any_work(data, tmp_path, capsys, calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    words = arguments(data, tmp_path / "o", "random:resnet18", protocols=("clustering",))[:-4]
    assert main(words) == 2
    assert "clustering: scikit-learn is missing, pip install 'ssl-flow[eval]'" in (
        capsys.readouterr().err
    )
    assert not calls


def test_help_names_protocols_and_settings(capsys):
    for words, part in (
        (["eval"], "label-propagation: takes videos"),
        (["eval", "suite", "--help"], "dense-knn"),
        (["eval", "dense-knn", "--help"], "--neighbours"),
    ):
        try:
            assert main(words) == 0
        except SystemExit as stop:
            assert stop.code == 0
        assert part in capsys.readouterr().out
    assert main(["eval", "guessing"]) == 2
    assert "no protocol 'guessing'" in capsys.readouterr().err
