"""What is damage of a file and what an error of the disk, signs of life, limits of memory."""

import errno
import io
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from clips import moving, write_video

from ssl_flow.flow import VideoError, extract, find_sources, read_frames
from ssl_flow.flow import job as job_module
from ssl_flow.flow import video as video_module

pytest.importorskip("av")


def failing_disk(monkeypatch, name, number, good=0.5):
    """Let the disk fail with this error number after a share of the file."""

    class Failing(io.FileIO):
        def read(self, size=-1):
            if self.tell() > good * Path(self.name).stat().st_size:
                raise OSError(number, "the disk fails")
            return super().read(size)

    real = Path.open

    def open_(self, mode="r", *arguments, **options):
        if self.name == name and mode == "rb":
            return Failing(str(self))
        return real(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_)


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


def test_07_where_all_frames_are_damaged_there_are_signs_of_life(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving(60), g="1000")  # one key frame, the first
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov")  # the pictures
    begin, length = start + (end - start) // 3, (end - start) // 10
    data[begin : begin + length] = bytes(length)
    path.write_bytes(data)
    signs, count = [], 0
    source = find_sources([path])[0][0]
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
    with video_module._opened(path) as (_, stream):
        assert stream.codec_context.pix_fmt == "rgb24"
    monkeypatch.setattr(video_module, "MAX_PIXELS", 1000)
    with video_module._opened(path) as (_, stream):
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
