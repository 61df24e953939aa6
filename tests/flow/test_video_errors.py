"""What is damage of a file and what an error of the disk, signs of life, limits of memory."""

import errno
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from broken import place_of_pictures, point_into_nowhere
from clips import moving, write_video

from ssl_flow.flow import VideoError, extract, find_sources, read_frames
from ssl_flow.flow import command as command_module
from ssl_flow.flow import job as job_module
from ssl_flow.flow import video as video_module
from ssl_flow.flow.job import Settings

pytest.importorskip("av")


def failing_disk(monkeypatch, name, number, good=0.5):
    """Let the disk fail with this error number after a share of the file."""

    class Failing(video_module._File):
        def read(self, size=-1):
            path = Path(self.name)
            if path.name == name and self.tell() > good * path.stat().st_size:
                raise OSError(number, "the disk fails")
            return super().read(size)

    real = Path.open

    def open_(self, mode="r", *arguments, **options):
        if self.name == name and mode == "rb":
            return Failing(str(self))
        return real(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(video_module, "_File", Failing)


def write_clip(path):
    noise = np.random.default_rng(0).integers(-20, 20, (50, 128, 192, 1))
    large = [np.kron(image, np.ones((2, 2, 1), np.uint8)) for image in moving(50)]
    images = [np.clip(a + b, 0, 255).astype(np.uint8) for a, b in zip(large, noise, strict=True)]
    # What says where the pictures are comes first.
    return write_video(path, images, options={"movflags": "+faststart"})


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("gap", [0.1, "auto"])
def test_24_after_an_error_of_the_disk_nothing_is_stored(tmp_path, monkeypatch, number, gap):
    sources, _ = find_sources([write_clip(tmp_path / "a.mp4")])
    arguments = {"out": tmp_path / "store", "size": 48, "gap": gap}
    with monkeypatch.context() as patch:
        failing_disk(patch, "a.mp4", number)
        summary = extract(sources, **arguments)
    assert summary.done == 0
    assert "the disk fails: not stored, repeat the call" in summary.problems[0].reason
    summary = extract(sources, **arguments)
    assert (summary.done, summary.problems) == (1, [])


def test_24_of_a_file_cut_off_the_good_part_is_stored(tmp_path):
    path = write_clip(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    summary = extract(find_sources([path])[0], tmp_path / "store", size=48)
    assert summary.done == 1 and summary.pairs > 10 and summary.problems


def test_24_an_image_that_the_disk_does_not_give_is_no_damaged_one(tmp_path, monkeypatch):
    for i, image in enumerate(moving(4)):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    failing_disk(monkeypatch, "2.png", errno.EIO, good=-1)
    with pytest.raises(OSError, match="the disk fails"):
        list(read_frames(tmp_path))
    failing_disk(monkeypatch, "2.png", errno.EACCES, good=-1)
    with pytest.raises(VideoError, match="unusable"):
        list(read_frames(tmp_path))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
@pytest.mark.parametrize("gap", [0.1, "auto"])
def test_24_a_disk_that_fails_once_does_not_choose_the_gap(tmp_path, monkeypatch, number, gap):
    sources, _ = find_sources([write_video(tmp_path / "a.mp4", moving(12))])
    failed, real = [], video_module._File

    def fails_once(path):
        if not failed:
            failed.append(path)
            raise OSError(number, "the disk fails")
        return real(path)

    monkeypatch.setattr(video_module, "_File", fails_once)
    summary = extract(sources, tmp_path / "store", gap=gap)
    assert summary.done == 0
    assert "the disk fails: not stored, repeat the call" in summary.problems[0].reason
    assert extract(sources, tmp_path / "store", gap=gap).done == 1


@pytest.mark.parametrize(
    ("number", "lasting"), [(errno.EIO, False), (errno.ESTALE, False), (errno.EACCES, True)]
)
def test_24_a_file_that_the_disk_does_not_find_is_no_bad_one(
    tmp_path, monkeypatch, number, lasting
):
    video = write_video(tmp_path / "a.mp4", moving(2))
    for i, image in enumerate(moving(3)):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    real = Path.stat

    def stat(path, **options):
        if path.name == "2.png" or (path == video and not options):
            raise OSError(number, "the disk fails")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    expected = VideoError if lasting else OSError
    with pytest.raises(expected, match="the disk fails"):
        list(read_frames(tmp_path))
    if lasting:
        assert "the disk fails" in video_module.why_no_file(video)
    else:
        with pytest.raises(OSError, match="the disk fails"):
            video_module.why_no_file(video)


def test_what_lies_before_a_place_that_no_file_has_is_stored(tmp_path):
    point_into_nowhere(tmp_path / "a.mp4")
    summary = extract(find_sources([tmp_path / "a.mp4"])[0], tmp_path / "store", size=48)
    assert (summary.done, summary.pairs) == (1, 19)
    assert "ends early" in summary.problems[0].reason


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.avi"])
def test_a_title_that_is_not_utf8_is_no_damage(tmp_path, name):
    path = write_video(tmp_path / name, moving(4), codec="mpeg4", title="cafQ")
    data = path.read_bytes()
    assert data.count(b"cafQ") == 1
    path.write_bytes(data.replace(b"cafQ", b"caf\xe9"))
    assert len(list(read_frames(path))) == 4


def test_a_session_description_opens_no_connection(tmp_path):
    lines = ["v=0", "o=- 0 0 IN IP4 127.0.0.1", "s=-", "c=IN IP4 127.0.0.1", "t=0 0"]
    lines += ["m=video 0 RTP/AVP 96", "a=rtpmap:96 H264/90000", ""]
    (tmp_path / "s.mp4").write_text("\r\n".join(lines))
    code = "import sys, ssl_flow.flow as f; next(f.read_frames(sys.argv[1]))"
    call = [sys.executable, "-c", code, str(tmp_path / "s.mp4")]
    ended = subprocess.run(call, capture_output=True, text=True, timeout=60)  # else it waits
    assert "VideoError: cannot be opened as video" in ended.stderr


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_04_a_file_cut_where_ffmpeg_takes_it_for_whole_is_named(tmp_path, name):
    options = {"movflags": "+faststart"} if name == "a.mp4" else {"cluster_time_limit": "500"}
    path = write_video(tmp_path / name, moving(60), options=options)
    assert len(list(read_frames(path))) == 60
    data = path.read_bytes()
    path.write_bytes(data[: place_of_pictures(data)[30] if name == "a.mp4" else len(data) // 2])
    summary = extract(find_sources([path])[0], tmp_path / "store", size=48)
    assert 20 < summary.pairs < 40
    assert "pictures end after" in summary.problems[0].reason
    assert "of 6.0 s" in summary.problems[0].reason


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_04_slides_of_different_lengths_are_whole(tmp_path, name):
    times = [0, 0.1, 0.2, 5.2, 5.3]
    path = write_video(tmp_path / name, moving(5), times=times)
    assert len(list(read_frames(path))) == 5


@pytest.mark.parametrize(
    ("kind", "streams", "tags", "expected"),
    [
        ("matroska,webm", 1, {}, 12),
        ("matroska,webm", 2, {}, None),  # it may be the sound's
        ("matroska,webm", 2, {"DURATION": "00:01:06.500000000"}, 66.5),
        ("matroska,webm", 2, {"DURATION": "long"}, None),
        ("mov,mp4", 1, {}, None),
        ("avi", 1, {}, None),
    ],
)
def test_04_only_headers_that_are_sure_say_where_pictures_end(kind, streams, tags, expected):
    format = SimpleNamespace(name=kind)
    container = SimpleNamespace(format=format, streams=[None] * streams, duration=12_000_000)
    stream = SimpleNamespace(duration=None, time_base=None, metadata=tags)
    assert video_module.promised_seconds(container, stream) == expected


def damaged_for_long(path):
    write_video(path, moving(60), g="1000")  # one key frame, the first
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov")  # the pictures
    begin, length = start + (end - start) // 3, (end - start) // 10
    data[begin : begin + length] = bytes(length)
    path.write_bytes(data)
    return find_sources([path])[0][0]


def test_07_damaged_parts_are_signs_of_life_in_a_dry_run_too(tmp_path):
    source, signs = damaged_for_long(tmp_path / "a.mp4"), []
    settings = Settings("dis", {}, 48, 0.1, 0.1, False)

    def tick(share=0.0, pairs=0):
        signs.append((share, pairs))

    assert command_module._sample(source, tick, tmp_path / "store", settings, "cpu")
    assert sum(sign == (0.0, 0) for sign in signs) >= 60  # packets


def test_07_where_all_frames_are_damaged_there_are_signs_of_life(tmp_path):
    signs, count = [], 0
    source = damaged_for_long(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match="damaged"):
        for _ in job_module._watched(source, 48, lambda share=0.0: signs.append(share)):
            count += 1
    assert 0 < count < 40
    assert len(signs) >= 60 + count  # one a packet, one a frame


def test_07_images_that_cannot_be_read_are_signs_of_life(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"damaged")
    signs = []
    with pytest.raises(VideoError, match="unusable"):
        list(read_frames(tmp_path, alive=lambda: signs.append(1)))
    assert len(signs) == 5


def test_13_the_limit_holds_while_the_header_is_made_out(tmp_path, monkeypatch):
    """Of a PNG in a MOV the format of pixels is known only when a frame has been decoded."""
    path = write_video(tmp_path / "a.mov", moving(2), codec="png", pix_fmt="rgb24")
    with video_module.opened(path) as (_, stream):
        assert stream.codec_context.pix_fmt == "rgb24"
    monkeypatch.setattr(video_module, "MAX_PIXELS", 1000)
    with video_module.opened(path) as (_, stream):
        assert stream.codec_context.pix_fmt is None
    with pytest.raises(VideoError):
        list(read_frames(path))


def test_what_is_made_of_a_frame_is_made_once(monkeypatch):
    made = []
    real = job_module.grey
    monkeypatch.setattr(job_module, "grey", lambda image: made.append(1) or real(image))
    frames = [video_module.Frame(i / 10, image) for i, image in enumerate(moving(5))]
    assert len(list(job_module._moving(pairwise(frames), job_module.Counter()))) == 4
    assert len(made) == 5
