import json
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from ssl_flow.cli import main
from ssl_flow.evaluation.report import write_report

LINES = [{"step": s, "loss": 3 - s / 10, "target_entropy": 1, "skipped_steps": 2} for s in range(9)]


def make_run(folder, lines=LINES):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "config.yaml").write_text("model: {backbone: <b>net}\ntrain: {steps: 9}\n")
    return folder


def test_a_whole_run(tmp_path):
    run = make_run(tmp_path / "<run>", [*LINES, {"step": 9, "loss": float("nan")}])
    probe = {
        "data": {"spec": "camvid:X", "images": 7, "rule": "the folder <val>/"},
        "protocol": {"steps": 3},
        "random": {"miou": 0.25, "per_class": {"sky": 0.5, "car": None}},
        "pretrained": {"miou": 0.5, "miou_std": 0.01, "pixel_accuracy": 0.875, "runs": [{}, {}],
                       "per_class": {"sky": 0.75, "car": 0.125}},
    }  # fmt: skip
    (run / "results.json").write_text(json.dumps({"linear_probe": probe}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 10, "lo')  # cut by a crash
    for folder in ("pictures", "encoder"):
        (run / folder).mkdir()
    (run / "encoder/config.json").write_text("{}")
    for name in ("other", "training", "probe_random", "curves"):
        cv2.imwrite(str(run / f"pictures/{name}.png"), np.zeros((4, 4, 3), np.uint8))
    html = write_report(run).read_text()
    assert "0.2500" in html and "0.5000 ± 0.0100" in html and "<td>0.8750</td><td>2</td>" in html
    assert re.search(r"<td>car</td>\s*<td>-</td>\s*<td>0.1250</td>", html)
    assert "<td>protocol" not in html and "steps 3" in html and "camvid:X, 7 images" in html
    assert "<h1>&lt;run&gt;</h1>" in html and "<td>&lt;b&gt;net</td>" in html
    assert "&lt;val&gt;" in html and "<val>" not in html
    assert 'load_encoder("' in html.replace("&#34;", '"')
    assert html.index("<p>Frame, flow") < html.index("<p>Other") < html.index("<p>Random encoder")
    assert "not finite: 2." in html and "not finite: 1 of 10." in html and "unreadable: 1." in html
    assert "Not finished" not in html
    assert html.count("data:image/png;base64,") == 4  # curves, and three pictures
    assert not re.search(r'(src|href)="(?!data:)|@import|url\(|<script', html)  # nothing outside
    assert cv2.imread(str(run / "pictures/curves.png")).shape[0] > 100
    assert sorted(p.name for p in (run / "pictures").iterdir())[0] == "curves.png"  # no leftovers


def test_a_finished_run_that_is_made_longer_is_told_from_a_finished_one(tmp_path):
    run = make_run(tmp_path, [*LINES, {"step": 9, "loss": 2}])
    (run / "encoder").mkdir()
    (run / "encoder/config.json").write_text("{}")
    assert "Not finished" not in write_report(run).read_text()
    (run / "config.yaml").write_text("train: {steps: 20}\n")
    html = write_report(run).read_text()
    assert "being made longer: 9 of 20 steps" in html and "those of the shorter run" in html


def test_every_element_is_closed(tmp_path):
    stack = []

    class Check(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                stack.append(tag)

        def handle_endtag(self, tag):
            assert stack.pop() == tag

    Check().feed(write_report(make_run(tmp_path)).read_text())
    assert not stack


def test_an_empty_run_still_has_a_report(tmp_path):
    html = write_report(tmp_path).read_text()
    assert all(f"No {x}" in html for x in ("probe", "numbers", "config", "encoder"))
    assert "Not finished" in html and not (tmp_path / "pictures").exists()


def test_bad_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json is not JSON"):
        write_report(tmp_path)
    for text in ("a: [", "just text"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml .*put back"):
            write_report(tmp_path)


def test_show_one_run_and_several(tmp_path, capsys):
    first, second = (make_run(tmp_path / name) for name in "ab")
    assert main(["show", "run", str(first)]) == 0
    assert (first / "report.html").is_file() and (first / "pictures/curves.png").is_file()
    out = tmp_path / "both.png"
    assert main(["show", "run", str(first), str(second), "--out", str(out)]) == 0
    assert out.is_file() and str(out) in capsys.readouterr().out
    assert not (second / "report.html").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: None, "metrics.jsonl is missing; `ssl-flow train` prints"),
        (lambda run: make_run(run, []), "metrics.jsonl holds no numbers"),
        (lambda run: make_run(run, [{"step": 1}]), "metrics.jsonl holds no numbers"),
        (lambda run: (make_run(run) / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
    ],
)
def test_what_is_no_run_is_told_with_the_mend(tmp_path, capsys, make, message):
    make(tmp_path)
    assert main(["show", "run", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_no_run_at_all_is_told(capsys):
    assert main(["show", "run"]) == 2
    assert "give one or more run folders" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["nowhere/runs.png", "runs.jpg"])
def test_a_picture_that_cannot_be_written_is_told_first(tmp_path, capsys, out):
    run = str(make_run(tmp_path / "run"))
    assert main(["show", "run", run, run, "--out", str(tmp_path / out)]) == 2
    assert "expected a .png in a folder" in capsys.readouterr().err
