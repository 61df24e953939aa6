import json
import re
import sys

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_heatmap import picture

from ssl_flow.cli import main
from ssl_flow.data.classification import open_classification
from ssl_flow.data.labelled import read_image
from ssl_flow.evaluation.classification import run_classification
from ssl_flow.evaluation.heatmap import class_map
from ssl_flow.models import create_encoder, load_encoder, save_encoder

RED, GREEN = (200, 30, 30), (30, 200, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heat")
    torch.manual_seed(0)
    save_encoder(create_encoder("test_resnet", 8, hidden_dim=16), folder / "encoder")
    cv2.imwrite(str(folder / "image.png"), picture(height=96, width=144)[..., ::-1])
    rng = np.random.default_rng(0)
    for name, color in (("apple", GREEN), ("7", RED)):
        for split in ("train", "val"):
            (folder / "set" / split / name).mkdir(parents=True)
            for i in range(4):
                noise = np.array(color) + rng.integers(-30, 30, (48, 48, 3))
                cv2.imwrite(str(folder / "set" / split / name / f"{i}.png"), noise[..., ::-1])
    save_file({"weight": torch.randn(3, 9), "bias": torch.zeros(3)}, folder / "wrong.safetensors")
    save_file({"weight": torch.randn(3, 9), "bias": torch.zeros(2)}, folder / "torn.safetensors")
    return folder


def show(folder, *words, image="image.png", encoder="encoder"):
    return main(
        ["show", "heatmap", str(folder / image), "--encoder", str(folder / encoder), *words]
    )


def test_similarity_as_picture_and_array(folder, tmp_path, capsys):
    out = tmp_path / "map.png"
    assert show(folder, "--at", "100,60", "--size", "64", "--out", str(out)) == 0
    assert "wrote" in capsys.readouterr().out
    values, drawn = np.load(tmp_path / "map.npy"), cv2.imread(str(out))
    assert values.shape == (96, 144) and values.dtype == np.float32
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert abs(row - 60) <= 6 and abs(column - 100) <= 6  # cells of 4 in an image shrunk to 2/3
    assert drawn.shape == (96, 144, 3)
    assert show(folder, "--region", "90,50,110,70", "--out", str(tmp_path / "new")) == 0
    assert (tmp_path / "new" / "image_similarity.png").is_file()
    assert not np.allclose(np.load(tmp_path / "new" / "image_similarity.npy"), values)


def test_a_head_is_fitted_kept_and_read(folder, tmp_path, capsys):
    head = ["--head", f"imagefolder:{folder / 'set'}", "--method", "cam"]
    image = "set/val/7/0.png"
    assert show(folder, *head, "--out", str(tmp_path / "a.png"), image=image) == 0
    assert "cam of 7 (score" in capsys.readouterr().out  # the class of the highest score
    kept = tmp_path / "classifier.safetensors"
    with safe_open(kept, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["7", "apple"]
        weight = file.get_tensor("weight")
    encoder, pixels = load_encoder(folder / "encoder"), read_image(folder / image)
    assert weight.shape == (2, encoder.channels[-1])
    again = ["--head", str(kept), "--method", "cam"]
    for name, index in (("apple", 1), ("1", 1), ("0", 0)):
        out = tmp_path / f"{name}.png"
        assert show(folder, *again, "--class", name, "--out", str(out), image=image) == 0
        values = class_map(encoder, pixels, "cam", weight, weight[:, 0], index)
        np.testing.assert_allclose(np.load(out.with_suffix(".npy")), values, atol=1e-6)
    sets = [open_classification(head[1], split) for split in ("train", "test")]
    assert run_classification(encoder, *sets).scores["linear_top1"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--at", "144,10"], "144,10: not in the image of 144 x 96"),
        (["--at", "-1,10"], "expected x,y, whole pixels"),
        (["--at", "3"], "'3': expected x,y"),
        (["--region", "5,5,5,9"], "not in the image"),
        (["--region", "5,5,9"], "expected x0,y0,x1,y1"),
        ([], "needs exactly one of --at, --region"),
        (["--at", "1,1", "--region", "1,1,5,5"], "exactly one of"),
        (["--method", "cam"], "needs exactly one of --at, --region, --head"),
        (["--head", "{}/wrong.safetensors"], "similarity needs exactly one of --at, --region"),
        (["--at", "1,1", "--class", "2"], "--class needs a --head"),
        (["--method", "cam", "--head", "{}/wrong.safetensors"], "classifier of 9 channels"),
        (
            ["--method", "cam", "--head", "{}/wrong.safetensors", "--class", "3"],
            "of 3 classes none",
        ),
        (["--method", "cam", "--head", "{}/torn.safetensors"], r"bias \(K,\), K classes; found"),
        (["--method", "cam", "--head", "{}/image.png"], "is no head"),
        (["--method", "cam", "--head", "imagefolder:{}/none"], "does not exist|no class folders"),
        (["--method", "cam", "--head", "none"], "expected imagefolder:PATH or a .safetensors"),
        (["--at", "1,1", "--size", "4"], "expected 16 pixels"),
    ],
)
def test_wrong_input_is_told_before_the_work(words, message, folder, capsys):
    words = [f"{w}={v}" for w, v in zip(words[::2], words[1::2], strict=True)]
    assert show(folder, *(word.format(folder) for word in words)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ssl-flow show heatmap: error: ")
    assert re.search(message, captured.err), captured.err


def test_unreadable_files_are_named(folder, tmp_path, capsys):
    assert show(folder, "--at", "1,1", image="wrong.safetensors") == 2
    assert "cannot be read as an image" in capsys.readouterr().err
    assert show(folder, "--at", "1,1", image="none.png") == 2
    assert "none.png" in capsys.readouterr().err
    assert show(folder, "--at", "1,1", encoder="none") == 2
    assert "no encoder at" in capsys.readouterr().err


def test_without_captum_the_extra_is_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    assert show(folder, "--at", "1,1", "--method", "grad-cam") == 2
    assert "pip install 'ssl-flow[heatmap]'" in capsys.readouterr().err
