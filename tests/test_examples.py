"""The examples run as their first lines say, and write what they promise."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ssl_flow
from ssl_flow.data.synthetic import SyntheticVideo

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object) -> str:
    """What an example prints."""
    words = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """`folder:PATH`: three labelled frames to learn from, three to judge."""
    root = tmp_path_factory.mktemp("labelled")
    for split, first in (("train", 0), ("test", 10)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for seed in range(first, first + 3):
            video = SyntheticVideo(seed, frames=2, size=64)
            Image.fromarray(video.frame(0)).save(root / split / f"images/{seed}.png")
            Image.fromarray(video.mask(0)).save(root / split / f"masks/{seed}.png")
    return f"folder:{root}"


def test_own_videos(tmp_path, labelled):
    """Folders of frames -> a store, a run with a score, an encoder that embeds."""
    for seed in range(2):
        video = SyntheticVideo(seed, frames=4, size=64)
        (tmp_path / f"videos/{seed}").mkdir(parents=True)
        for t in range(video.frames):
            Image.fromarray(video.frame(t)).save(tmp_path / f"videos/{seed}/{t}.png")
    shown = run("own_videos.py", tmp_path / "videos", "--out", tmp_path, "--size", 64,
                "--crop", 64, "--steps", 2, "--backbone", "test_resnet",
                "--labelled", labelled)  # fmt: skip
    (folder,) = (path.parent for path in tmp_path.glob("*/encoder"))
    encoder = ssl_flow.load_encoder(folder)
    assert encoder.architecture == "test_resnet" and encoder.head is not None
    assert (folder / "report.html").exists() and (folder / "pictures/training.png").exists()
    assert "linear probe, pretrained: mIoU" in shown and "linear probe, random: mIoU" in shown


def test_benchmark_two_encoders(tmp_path, labelled):
    shown = run("benchmark_two_encoders.py", "random:test_resnet", "plain=handmade", "--data",
                labelled, "--protocols", "linear-probe", "--set", "linear-probe.steps=5",
                "--out", tmp_path)  # fmt: skip
    with (tmp_path / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["score"] == "miou"]
    assert [row["encoder"] for row in rows] == ["random:test_resnet", "plain"]
    for row in rows:
        assert f"| {row['encoder']} | " in shown and f"{float(row['value']):.3f}" in shown
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("encoder", ["handmade", "embedding"])
def test_use_encoder(tmp_path, encoder):
    """An image given as both images gets its own mask back, but for the borders."""
    if encoder == "embedding":
        from ssl_flow.models import create_encoder, save_encoder

        encoder = save_encoder(create_encoder("test_resnet", 8, 16), tmp_path / "encoder")
    video, out = SyntheticVideo(3, size=64), tmp_path / "segmented.png"
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.fromarray(video.frame(0)).save(image)
    Image.fromarray(video.mask(0)).save(mask)
    run("use_encoder.py", "--encoder", encoder, "--labelled", image, "--mask", mask, "--image",
        image, "--out", out)  # fmt: skip
    sheet = np.array(Image.open(out))
    assert sheet.shape == (64, 4 * 64 + 3 * 4, 3)  # four pictures, gaps of 4 pixels
    drawn, found = sheet[:, 68:132], sheet[:, 204:]
    right, background = (drawn == found).all(-1).mean(), (drawn == 0).all(-1).mean()
    assert right > max(0.8, background)


def test_use_encoder_by_default(tmp_path):
    """Better than calling everything background, on a frame that it has no mask of."""
    shown = run("use_encoder.py", "--out", tmp_path / "segmented.png")
    line = next(line for line in shown.splitlines() if line.startswith("pixel accuracy"))
    found, background = (float(part.split()[-1]) for part in line.split(","))
    assert found > background
