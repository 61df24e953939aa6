import os
from functools import partial

import cv2
import numpy as np
import pytest
from clips import moving, texture, write_video

from ssl_flow.flow import VideoError, find_sources, read_frames

av = pytest.importorskip("av")


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


def test_unusable_files_are_named_problems(tmp_path):
    files = {}
    for name, content in [("empty.mp4", b""), ("text.mp4", b"no video\n" * 99)]:
        (tmp_path / name).write_bytes(content)
        files[name] = "cannot be opened"
    whole = write_video(tmp_path / "whole.mp4", moving(30)).read_bytes()
    (tmp_path / "no_index.mp4").write_bytes(whole[: len(whole) * 6 // 10])  # the moov is at the end
    files["no_index.mp4"] = "cannot be opened"
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        for start in range(0, 8192, 1024):
            sound = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            sound.sample_rate, sound.pts = 16000, start
            out.mux(stream.encode(sound))
        out.mux(stream.encode(None))
    files["sound.mp4"] = "no video stream"
    for name, message in files.items():
        with pytest.raises(VideoError, match=message):
            list(read_frames(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4"):
        next(read_frames(tmp_path / "absent.mp4"))


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


def test_damage_in_the_middle_is_survived(tmp_path):
    data = bytearray(write_video(tmp_path / "a.mp4", moving(60)).read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 10] = bytes(len(data) // 10)
    (tmp_path / "a.mp4").write_bytes(data)
    frames, error = until_damage(tmp_path / "a.mp4")
    times = np.array([frame.time for frame in frames])
    assert 40 <= len(frames) < 60
    assert (np.diff(times) > 0).all()
    assert times[-1] == pytest.approx(5.9, abs=0.01)  # reading went on behind the damage
    assert "damaged" in error or "could not be decoded" in error


def test_a_stream_without_times_is_counted_by_the_frame_rate(tmp_path):
    path = write_video(tmp_path / "a.h264", moving(8), fps=25)
    times = [frame.time for frame in read_frames(path)]
    assert len(times) == 8
    assert (np.diff(times) > 0).all()


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
    assert [f.time for f in read_frames(tmp_path, folder_fps=10)][3] == pytest.approx(0.3)
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX pipes")
def test_pipes_and_dangling_links_do_not_hang(tmp_path):
    write_video(tmp_path / "a.mp4", moving(2))
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "gone.mp4")
    sources, problems = find_sources([tmp_path])
    assert len(sources) == 1
    assert {problem.source for problem in problems} == {
        f"{tmp_path.name}/pipe.mp4",
        f"{tmp_path.name}/link.mp4",
    }
    with pytest.raises(VideoError, match="not a regular file"):
        next(read_frames(tmp_path / "pipe.mp4"))
