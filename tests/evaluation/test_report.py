import json
import re

import cv2
import numpy as np
import pytest

from ssl_flow.evaluation.report import write_report


def test_a_whole_run(tmp_path):
    probe = {
        "protocol": {"steps": 3},
        "random": {"miou": 0.25, "per_class": {"sky": 0.5, "car": None}},
        "pretrained": {"miou": 0.5, "miou_std": 0.01, "per_class": {"sky": 0.75, "car": 0.25}},
    }
    (tmp_path / "results.json").write_text(json.dumps({"linear_probe": probe}))
    lines = [
        {"step": s, "loss": 3 - s / 10, "target_entropy": 1, "constant_loss": 3} for s in range(9)
    ]
    lines += [{"step": 9, "loss": float("nan")}, {"note": "no step"}]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 10, "lo'  # cut by a crash
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.yaml").write_text("model: <resnet18>\n")
    (tmp_path / "pictures").mkdir()
    cv2.imwrite(str(tmp_path / "pictures/embedding.png"), np.zeros((4, 4, 3), np.uint8))
    html = write_report(tmp_path).read_text()
    assert "0.2500" in html and "0.5000 ± 0.0100" in html and "<td>-</td>" in html
    assert "<td>protocol" not in html and "model: &lt;resnet18&gt;" in html
    assert html.count("data:image/png;base64,") == 2 and "<h2>embedding</h2>" in html
    assert not re.search(r'(src|href)="(?!data:)', html)  # nothing from outside


def test_an_empty_run_still_has_a_report(tmp_path):
    html = write_report(tmp_path).read_text()
    assert "No probe" in html and "No losses" in html and "No config" in html


def test_bad_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is not JSON"):
        write_report(tmp_path)
