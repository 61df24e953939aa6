"""The benchmark of extraction counts what it says, and writes its tables."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "flow"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import flow
import flow_accuracy
from clips import moving, write_video


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data/video").mkdir(parents=True)
    for seed in (1, 2):
        frames = moving(12, seed)
        write_video(tmp_path / f"data/video/{seed}.mp4", frames)
    return tmp_path / "data"


@pytest.fixture
def work(data, tmp_path):
    return flow.Work(sorted(data.glob("video/*")), 3, tmp_path)


def test_a_reduced_pair_has_shorter_vectors_of_known_pixels(tmp_path):
    code = np.full((20, 40, 3), (1, -8 * 64 + 32768, 4 * 64 + 32768), np.uint16)  # known, v, u
    code[:, ::2, 0] = 0  # half of every cell: the mean of the others stays
    for name in ("frame10", "frame11"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((20, 40, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "flow10.png"), code)
    pair = flow_accuracy.read_reduced(tmp_path, 5)
    assert pair.first.shape == (5, 10, 3)
    np.testing.assert_allclose(pair.flow, np.broadcast_to([1, -2], (5, 10, 2)), atol=1e-6)


def test_the_loop_does_the_pairs_that_extraction_does(work):
    assert len(work.decoded) == 6
    extracted = work.extract("dis-ultrafast", 0, "cpu")
    loop = work.loop("dis-ultrafast", "cpu")
    for entry in (loop, extracted):
        assert entry["pairs/s"] * entry["seconds"] == pytest.approx(6)
    assert extracted["start"] >= 1 > extracted["seconds"]  # the warm-up is not counted
    assert extracted["bytes"] > 0


def test_the_stages_add_up(work):
    stages = work.stages("dis-medium", "cpu")
    assert set(stages) == set(flow.STAGES)
    for stage in set(stages) - {"rest"}:
        assert stages[stage] > 0, f"no function of this stage was seen: {stage}"
    assert stages["rest"] >= 0


def test_the_command_writes_table_and_numbers(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flow, "endpoint_error", lambda *_: 0.5)
    argv = ["flow.py", str(data), "--methods", "dis-ultrafast", "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", [*argv, "--rounds", "1", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(flow, "GOALS", {"1 worker": 0.0, "2 workers": 99.0})
    flow.main()
    text = (tmp_path / "out/flow.md").read_text()
    assert text in capsys.readouterr().out
    assert "| dis-ultrafast | 0.500 |" in text
    assert "0.0 x loop with 1 worker: dis-ultrafast." in text
    assert "99.0 x loop with 2 workers: none." in text
    numbers = json.loads((tmp_path / "out/flow.json").read_text())
    rounds = numbers["results"]["dis-ultrafast"]["rounds"]
    assert [len(entries) for entries in rounds.values()] == [1, 1, 1]
    assert all(np.isfinite(entry["pairs/s"]) for entries in rounds.values() for entry in entries)
    assert numbers["command"].startswith("python benchmarks/flow.py DATA --methods")
