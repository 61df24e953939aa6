"""Pictures and videos made for the tests."""

from fractions import Fraction

import cv2
import numpy as np
import pytest

from ssl_flow.flow import Frame, Source, extract


def texture(seed, height=96, width=128):
    """A smooth random RGB picture, larger than needed so that it can be shifted."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5).astype(np.float32)
    smooth = (smooth - smooth.mean()) * 6 + 128
    return np.clip(smooth, 0, 255).astype(np.uint8)


def moving(count, seed=0, step=2, height=64, width=96):
    """Frames of a picture that moves `step` pixels to the right and 1 down a frame."""
    big = texture(seed, height + count + 8, width + abs(step) * count + 8)
    return [
        big[count - i : count - i + height, step * (count - i) : step * (count - i) + width]
        for i in range(count)
    ]


def write_video(
    path,
    frames,
    fps=10,
    times=None,
    rotation=0,
    options=None,
    codec="libx264",
    pix_fmt="yuv420p",
    aspect=None,
    title=None,
    **encoder,
):
    """Write `frames`, H x W x 3 RGB, at `times` in seconds or evenly; `encoder`: its options."""
    av = pytest.importorskip("av")
    if codec == "libx264":
        encoder = {"crf": "10", "preset": "ultrafast", "bf": "0", "g": "5"} | encoder
    with av.open(str(path), "w", options=options or {}) as out:
        if title:
            out.metadata["title"] = title
        stream = out.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = encoder
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV cannot write the rotation of a video")
            stream.set_display_rotation(rotation)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = round(1000 * (i / fps if times is None else times[i]))
            frame.time_base = Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def write_sound(path):
    """Write half a second of silence."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        for start in range(0, 8192, 1024):
            sound = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            sound.sample_rate, sound.pts = 16000, start
            out.mux(stream.encode(sound))
        out.mux(stream.encode(None))
    return path


def shard_bytes(store):
    """Return what a store holds: name -> bytes, without the lock."""
    return {
        str(file.relative_to(store)): file.read_bytes()
        for file in sorted(store.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def living_source(short_side):
    """Yield the frames of a source for worker processes."""
    for i, image in enumerate(moving(4)):
        yield Frame(i / 10, image, (i + 1) / 4)


def make_store(frames, tmp_path, **options):
    """Extract a source of these frames, 10 a second, into tmp_path/made_store."""

    def source(short_side):
        return iter([Frame(i / 10, image) for i, image in enumerate(frames)])

    return extract([Source("made", source)], tmp_path / "made_store", **options)
