import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from fakes import FakeEncoder
from scipy.spatial.distance import cdist

from ssl_flow.cli import main
from ssl_flow.evaluation import embedding_command
from ssl_flow.evaluation.embedding_command import frame_rate, write_video
from ssl_flow.evaluation.embedding_pictures import (
    Shown,
    draw,
    draw_segments,
    fit_look,
    pixel_maps,
    sample_frames,
    shown_frames,
)
from ssl_flow.evaluation.pictures import fit_colors
from ssl_flow.flow import FlowStore, Source, extract, read_frames
from ssl_flow.flow.video import Frame
from ssl_flow.models import create_encoder, save_encoder

RED, GREEN, BLUE = (220, 20, 20), (20, 220, 20), (20, 20, 220)


def halves(left, right, height=48, width=64):
    image = np.full((height, width, 3), left, np.uint8)
    image[:, width // 2 :] = right
    return image


def texture(shift=0):
    noise = np.random.default_rng(0).integers(0, 256, (80, 160, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 3)[8:72, 8 + shift : 96 + shift]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(create_encoder("test_resnet", 8, hidden_dim=16), folder)
    return str(folder)


def write_folder(folder, images):
    folder.mkdir()
    for number, image in enumerate(images):
        cv2.imwrite(str(folder / f"{number}.png"), image[..., ::-1])
    return str(folder)


def show(*words):
    return main(["show", "embedding", *map(str, words)])


def test_colors_are_the_principal_components():
    pixels = torch.randn(500, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)
    weight, bias = fit_colors(pixels)
    colors = (pixels @ weight.T + bias).numpy()
    _, _, axes = np.linalg.svd(pixels.numpy() - pixels.numpy().mean(0))
    for color, axis in zip(colors.T, axes, strict=False):
        assert abs(np.corrcoef(color, pixels.numpy() @ axis)[0, 1]) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(
        np.quantile(colors, [0.01, 0.99], axis=0), [[0] * 3, [1] * 3], atol=1e-4
    )


def test_colors_of_many_dimensions_are_those_of_the_exact_decomposition():
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(600, 4, generator=generator) * torch.tensor([8.0, 4, 2, 1])
    turn = torch.linalg.qr(torch.randn(300, 4, generator=generator))[0].T  # (4, 300)
    exact, large = (x @ fit_colors(x)[0].T for x in (few, few @ turn))
    for a, b in zip(exact.T, large.T, strict=True):
        assert abs(np.corrcoef(a, b)[0, 1]) == pytest.approx(1, abs=1e-4)


def test_a_collapsed_embedding_is_drawn_flat():
    pixels = torch.full((100, 4), 0.5) + 1e-8 * torch.randn(100, 4)
    weight, bias = fit_colors(pixels)
    colors = pixels @ weight.T + bias
    assert (colors.max(0).values - colors.min(0).values).max() < 0.1


def test_one_look_is_shared_by_all_frames():
    """Green has one colour and one group, wherever it is, whatever is beside it."""
    network = FakeEncoder().eval()
    frames = [Shown(halves(RED, GREEN)), Shown(halves(GREEN, BLUE))]
    look = fit_look(network, frames, 3)
    first, second = (draw(network, shown, look, (48, 64)) for shown in frames)
    for panel in (1, 2):  # of width 64 and a gap of 4: colours, groups
        left, right = panel * 68 + 10, panel * 68 + 54
        np.testing.assert_array_equal(first[24, right], second[24, left])
        assert (first[24, left] != first[24, right]).any()
        assert (second[24, right] != first[24, left]).any()
    np.testing.assert_array_equal(first, draw(network, frames[0], look, (48, 64)))


def test_groups_are_those_of_kmeans_and_find_two_colours():
    network, image = FakeEncoder().eval(), halves(RED, GREEN)
    look = fit_look(network, [Shown(image)], 2)
    maps, stride = pixel_maps(network, image)
    vectors = maps[0].flatten(1).T.numpy()
    centres = look.weight[3:].numpy()
    nearest = cdist(vectors, centres).argmin(1).reshape(maps.shape[2:])
    scores = torch.einsum("bchw,kc->kbhw", maps, look.weight[3:])[:, 0] + look.bias[3:, None, None]
    np.testing.assert_array_equal(nearest, scores.argmax(0))
    assert len(set(nearest[:, : 32 // stride].ravel())) == 1
    assert len(set(nearest[:, 32 // stride :].ravel())) == 1
    assert nearest[0, 0] != nearest[0, -1]
    segments = draw(network, Shown(image), look, (48, 64))[:, 2 * 68 :]
    white = np.flatnonzero((segments == 255).all((0, 2)))
    assert len(white) == 1 and abs(white[0] - 32) <= 1


def test_mean_shift_finds_how_many_colours_there_are():
    network, image = FakeEncoder().eval(), halves(RED, GREEN)
    image[:24] = BLUE
    look = fit_look(network, [Shown(image)], "mean-shift")
    segments = draw(network, Shown(image), look, (48, 64))[:, 2 * 68 :]
    places = {tuple(segments[row, column]) for row, column in ((8, 8), (8, 56), (40, 8), (40, 56))}
    assert len(places) == 3 == len(look.weight) - 3


def test_borders_lie_between_segments():
    labels = np.zeros((6, 6), int)
    labels[2:4, 3:5] = 1
    white = (draw_segments(np.zeros((6, 6, 3), np.uint8), labels) == 255).all(2)
    expected = [[2, 3], [2, 4], [2, 5], [3, 3], [3, 5], [4, 3], [4, 4]]  # all but its inside
    assert np.argwhere(white).tolist() == expected


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
def test_a_sample_is_spread_over_a_stream(count):
    frames = (Shown(np.full((1, 1, 3), i, np.uint8), i / 10) for i in range(count))
    kept, times = sample_frames(frames, most=8)
    assert times == [i / 10 for i in range(count)]
    places = [int(shown.image[0, 0, 0]) for shown in kept]
    step = np.diff(places)
    assert places[0] == 0 and len(set(step)) <= 1
    assert min(count, 4) <= len(kept) <= 8 and count - places[-1] <= max([1, *step])


@pytest.mark.parametrize("codecs", [None, "mpeg4"])
def test_written_videos_can_be_read(codecs, tmp_path, monkeypatch):
    if codecs:
        only = {"none": {}, codecs: embedding_command._CODECS[codecs]}
        monkeypatch.setattr(embedding_command, "_CODECS", only)
    pictures = [halves(c, BLUE, 47, 65) for c in (RED, GREEN, RED, GREEN, RED)]
    codec = write_video(tmp_path / "a.mp4", iter(pictures), frame_rate([0, 0.1, 0.2]))
    assert codec == (codecs or codec)
    frames = list(read_frames(tmp_path / "a.mp4"))
    assert [frame.image.shape for frame in frames] == [(48, 66, 3)] * 5
    assert [round(frame.time, 2) for frame in frames] == [0, 0.1, 0.2, 0.3, 0.4]
    for frame, picture in zip(frames, pictures, strict=True):
        inner = np.abs(frame.image[4:40, 4:28].astype(int) - picture[4:40, 4:28])
        assert inner.mean() < 25  # colours of video
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_that_fails_leaves_the_old_one(tmp_path):
    (tmp_path / "a.mp4").write_text("old")

    def broken():
        yield halves(RED, BLUE)
        raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"):
        write_video(tmp_path / "a.mp4", broken(), frame_rate([]))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_frame_rates():
    assert frame_rate([0, 0.04, 0.08, 0.0, 0.04]) == 25  # two videos of a store
    assert frame_rate([1.0]) == 10
    assert frame_rate([0, 1e-4]) == 60


def test_a_still_video_keeps_its_colours(encoder, tmp_path):
    folder = write_folder(tmp_path / "still", [texture()] * 8)
    out = tmp_path / "still.mp4"
    assert show(folder, "--encoder", encoder, "--out", out, "--groups", 3) == 0
    frames = [frame.image.astype(int) for frame in read_frames(out)]
    assert len(frames) == 5  # of 24 a second; the last ones have no partner 0.1 s later
    assert frames[0].shape == (64, 4 * 88 + 3 * 4, 3)
    assert max(np.abs(frame - frames[0]).max() for frame in frames) <= 12  # of the codec


def test_a_moving_video_shows_its_flow(encoder, tmp_path):
    folder = write_folder(tmp_path / "moving", [texture(3 * i) for i in range(8)])
    frames = list(shown_frames(Path(folder), 256, 0.1, ()))
    assert len(frames) == 5
    u, v = np.median(frames[2].flow(), axis=(0, 1))
    assert (round(u), round(v)) == (-6, 0)  # two frames of three pixels, to the left
    assert show(folder, "--encoder", encoder, "--out", tmp_path / "a.png", "--max-frames", 3) == 0
    sheet = cv2.imread(str(tmp_path / "a.png"))
    assert sheet.shape == (3 * 64 + 2 * 4, 4 * 88 + 3 * 4, 3)


def test_a_store_gives_its_own_flow(encoder, tmp_path):
    def source(name, step):
        frames = [Frame(i / 10, texture(step * i)) for i in range(6)]
        return Source(name, lambda short_side: iter(frames))

    extract([source("one.mp4", 1), source("two.mp4", 4)], tmp_path / "store", workers=0, every=0)
    store = FlowStore(tmp_path / "store", "two.mp4")
    shown = list(shown_frames(tmp_path / "store", 256, 0.1, ("two.mp4",)))
    assert len(shown) == len(store) > 0
    np.testing.assert_array_equal(shown[0].flow(), store[0].flow)
    np.testing.assert_array_equal(shown[0].image, store[0].frame)
    words = [tmp_path / "store", "--encoder", encoder, "--out", tmp_path / "a.mp4", "--groups", 0]
    assert show(*words) == 0
    assert len(list(read_frames(tmp_path / "a.mp4"))) == len(FlowStore(tmp_path / "store"))


def test_an_image_has_no_flow(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), texture())
    out = tmp_path / "out.png"
    assert show(tmp_path / "a.png", "--encoder", "random:test_resnet", "--out", out) == 0
    assert cv2.imread(str(out)).shape == (64, 3 * 88 + 2 * 4, 3)


def test_damage_is_told_and_the_rest_shown(encoder, tmp_path, capsys):
    folder = write_folder(tmp_path / "torn", [texture()] * 6)
    (tmp_path / "torn" / "9.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="torn: 1 unusable image"):
        assert show(folder, "--encoder", encoder, "--out", tmp_path / "a.mp4") == 0
    assert len(list(read_frames(tmp_path / "a.mp4"))) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.avi"], "expected a .mp4 or .png in a folder"),
        (["--out", "none/a.mp4"], "expected a .mp4 or .png in a folder"),
        (["--max-frames", "0"], "--max-frames 0: expected 1 to"),
        (["--groups", "256"], "--groups 256: expected 0 to 254"),
        (["--size", "8"], "--size 8: expected 16 to"),
        (["--gap", "0"], "--gap 0.0: expected seconds above 0"),
        (["--gap", "9"], "no two frames 9 s apart"),
        (["--device", "none"], "cannot be used here"),
    ],
)
def test_wrong_input_is_told(words, message, encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path / "frames", [texture()] * 3)
    assert show(folder, "--encoder", encoder, *words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.glob("*.mp4")) == []


def test_missing_things_are_named(encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert show("none.mp4", "--encoder", encoder) == 2
    assert "no such video, folder, store or image: none.mp4" in capsys.readouterr().err
    folder = write_folder(tmp_path / "frames", [texture()] * 6)
    assert show(folder, "--encoder", "nothing") == 2
    assert "no encoder at" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    assert show(folder, "--encoder", encoder) == 2
    assert "pip install 'ssl-flow[eval]', or --groups 0" in capsys.readouterr().err
    assert show(folder, "--encoder", encoder, "--groups", 0) == 0
