from functools import partial

import cv2
import numpy as np
import pytest
from clips import moving, texture, write_video

from ssl_flow.flow import VideoError, find_sources, read_frames

pytest.importorskip("av")


def until_damage(path):
    """Return all frames that can be read, and the text of the error after them (or None)."""
    frames = []
    try:
        for frame in read_frames(path):
            frames.append(frame)
    except VideoError as error:
        return frames, str(error)
    return frames, None


def test_frames_come_in_order_with_their_times(tmp_path):
    images = moving(12)
    frames = list(read_frames(write_video(tmp_path / "a.mp4", images, fps=12)))
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(12) / 12, atol=2e-3)
    for frame, image in zip(frames, images, strict=True):
        assert frame.image.dtype == np.uint8
        assert np.abs(frame.image.astype(int) - image).mean() < 12  # RGB, not BGR


def test_variable_frame_rate_keeps_the_true_times(tmp_path):
    times = [0, 0.04, 0.08, 0.5, 0.54, 1.5]
    frames = list(read_frames(write_video(tmp_path / "a.mkv", moving(6), times=times)))
    np.testing.assert_allclose([frame.time for frame in frames], times, atol=2e-3)


@pytest.mark.parametrize(
    ("short_side", "shape"), [(None, (64, 96)), (32, (32, 48)), (64, (64, 96)), (500, (64, 96))]
)
def test_resizing_keeps_the_aspect_and_never_enlarges(tmp_path, short_side, shape):
    path = write_video(tmp_path / "a.mp4", moving(2))
    assert {frame.image.shape for frame in read_frames(path, short_side)} == {(*shape, 3)}


@pytest.mark.parametrize(("angle", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_display_rotation_is_applied(tmp_path, angle, turns):
    image = texture(0, 64, 96)
    image[:24, :24] = (255, 0, 0)  # the top left corner is red
    path = write_video(tmp_path / "a.mp4", [image] * 3, rotation=angle)
    upright = np.rot90(image, turns)  # both turn counter-clockwise
    first = next(read_frames(path)).image
    assert first.shape == upright.shape
    assert np.abs(first.astype(int) - upright).mean() < 12
    # A second opinion: OpenCV's reader turns the picture by itself.
    other = cv2.VideoCapture(str(path)).read()[1][..., ::-1]
    assert np.abs(first.astype(int) - other).mean() < 12
    assert next(read_frames(path, 32)).image.shape[:2] in {(32, 48), (48, 32)}


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4"):
        next(read_frames(tmp_path / "absent.mp4"))


def test_frames_tell_how_much_lies_behind_them(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving(12), fps=8)
    shares = [frame.share for frame in read_frames(path)]
    assert shares == pytest.approx(np.arange(12) / 12, abs=0.01)
    (tmp_path / "frames").mkdir()
    for i in range(6):
        cv2.imwrite(str(tmp_path / f"frames/{i}.png"), texture(i, 16, 16))
    assert [frame.share for frame in read_frames(tmp_path / "frames")][-1] == 1
    # Its header gives no length: by the bytes that were read.
    path = write_video(tmp_path / "a.mjpeg", moving(60), codec="mjpeg", pix_fmt="yuvj420p")
    shares = [frame.share for frame in read_frames(path)]
    assert shares == pytest.approx(np.arange(60) / 60, abs=0.1)


def test_of_a_truncated_file_the_good_frames_come_first(tmp_path):
    options = {"movflags": "+faststart"}
    whole = write_video(tmp_path / "whole.mp4", moving(50), options=options).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    frames, error = until_damage(cut)
    assert 20 <= len(frames) < 50
    assert error
    good = [frame.image for frame in read_frames(tmp_path / "whole.mp4")]
    for frame, image in zip(frames, good, strict=False):
        assert np.abs(frame.image.astype(int) - image).mean() < 1


@pytest.mark.parametrize("name", ["a:b.mp4", "-x.mp4", "%05d.mp4", "ü 文.mp4", "new\nline.mp4"])
def test_odd_file_names(tmp_path, name, monkeypatch):
    source = write_video(tmp_path / "plain.mp4", moving(3))
    source.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(list(read_frames(name))) == 3


def test_a_folder_of_images(tmp_path):
    images = moving(11)
    for i, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f"frame{i}.png"), image[..., ::-1])  # frame10 after frame9
    (tmp_path / "notes.txt").write_text("no image")
    frames = list(read_frames(tmp_path))
    assert [frame.time for frame in frames] == pytest.approx(np.arange(11) / 24)
    for frame, image in zip(frames, images, strict=True):
        np.testing.assert_array_equal(frame.image, image)
    assert next(read_frames(tmp_path, 32)).image.shape == (32, 48, 3)
    (tmp_path / "frame4.png").write_bytes(b"damaged")
    frames, error = until_damage(tmp_path)
    assert [frame.time for frame in frames] == pytest.approx(np.delete(np.arange(11), 4) / 24)
    assert "frame4.png" in error


def make_tree(root):
    for name in ("tom/a.mp4", "ann/a.mp4", "ann/a.mkv", ".hidden/a.mp4", "ann/._a.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "davis/bear").mkdir(parents=True)
    (root / "davis/bear/00000.jpg").write_bytes(b"x")
    (root / "tom/cover.jpg").write_bytes(b"x")  # beside a video: no frame folder
    (root / "notes.txt").write_text("x")


def test_sources_are_found_below_folders(tmp_path):
    make_tree(tmp_path / "clips")
    sources, problems = find_sources([tmp_path / "clips"])
    names = ["clips/ann/a.mkv", "clips/ann/a.mp4", "clips/davis/bear", "clips/tom/a.mp4"]
    assert [source.name for source in sources] == names
    assert problems == []
    assert isinstance(sources[0].frames, partial)
    assert sources[2].path == tmp_path / "clips/davis/bear"
    # The same file given in another way has the same name; given twice it is one source.
    file = tmp_path / "clips/tom/a.mp4"
    assert [s.name for s in find_sources([file])[0]] == ["tom/a.mp4"]
    assert len(find_sources([tmp_path / "clips", tmp_path / "clips"])[0]) == 4


def test_missing_and_useless_paths_are_errors(tmp_path):
    make_tree(tmp_path / "clips")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_sources([tmp_path / "clips", tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"notes\.txt: not a known video extension .*\.mp4"):
        find_sources([tmp_path / "clips/notes.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no video found in .*\.mp4.*\.jpg"):
        find_sources([tmp_path / "empty"])
    make_tree(tmp_path / "other/clips")
    with pytest.raises(ValueError, match="would both be named"):
        find_sources([tmp_path / "clips", tmp_path / "other/clips"])
