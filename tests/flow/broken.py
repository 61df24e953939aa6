"""Broken and unusual videos, made for the tests."""

import struct
import zlib
from fractions import Fraction

import cv2
import numpy as np
import pytest
from clips import moving, texture, write_video


def cut_at_60_percent(path, **options):
    whole = write_video(path, moving(50), **options).read_bytes()
    path.write_bytes(whole[: len(whole) * 6 // 10])


def flip_bits(path):
    data = bytearray(write_video(path, moving(60)).read_bytes())
    rng = np.random.default_rng(0)
    start, end = data.index(b"mdat") + 4, data.index(b"moov")  # the pictures
    for place in rng.integers(start + (end - start) // 4, start + (end - start) // 2, 30):
        data[place] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def zero_the_middle(path):
    data = bytearray(write_video(path, moving(60)).read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 10] = bytes(len(data) // 10)
    path.write_bytes(data)


def place_of_pictures(data):
    """Return where each picture of an MP4 lies, and behind the last."""
    sizes = data.index(b"stsz")
    count = struct.unpack_from(">I", data, sizes + 12)[0]
    first = struct.unpack_from(">I", data, data.index(b"stco") + 12)[0]
    return np.cumsum([first, *np.frombuffer(data, ">u4", count, sizes + 16)], dtype=np.int64)


def point_into_nowhere(path, number=20):
    """Say of one picture of an MP4 that it lies where no file has anything."""
    data = bytearray(write_video(path, moving(40)).read_bytes())
    places = place_of_pictures(data)[:-1].astype(">u8")
    places[number] = 2**50
    table = struct.pack(">I4sII", 16 + 8 * len(places), b"co64", 0, len(places)) + places.tobytes()
    old = data.index(b"stco") - 4  # one place, of all pictures
    data[old : old + 20] = table
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        start = data.index(box) - 4
        size = struct.unpack_from(">I", data, start)[0] + len(table) - 20
        struct.pack_into(">I", data, start, size)
    struct.pack_into(">I", data, data.index(b"stsc") + 16, 1)  # pictures a place
    path.write_bytes(data)


def claim_a_huge_size(path):
    images = moving(3, height=260, width=300)
    data = write_video(path, images, codec="rawvideo").read_bytes()
    width = b"\xb0\x82" + struct.pack(">H", 300)  # PixelWidth
    assert data.count(width) == 1
    data = data.replace(width, b"\xb0\x82" + struct.pack(">H", 20_000))
    path.write_bytes(data)


def claim_a_huge_image(path):
    folder = path.parent / "huge"
    folder.mkdir()
    for i, image in enumerate(moving(5)):
        cv2.imwrite(str(folder / f"{i}.png"), image)
    data = bytearray((folder / "2.png").read_bytes())
    data[16:24] = struct.pack(">II", 20_000, 60)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (folder / "2.png").write_bytes(data)


def claim_many_frames(path):
    data = bytearray(write_video(path, moving(20), codec="mpeg4").read_bytes())
    for chunk, place in ((b"avih", 8 + 16), (b"strh", 8 + 32)):
        start = data.index(chunk) + place
        data[start : start + 4] = struct.pack("<I", 1_000_000)
    path.write_bytes(data)


def unknown_codec(path):
    data = write_video(path, moving(5)).read_bytes()
    assert data.count(b"V_MPEG4/ISO/AVC") == 1
    path.write_bytes(data.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XYZ"))


def change_size(path):
    for name, height in (("a", 64), ("b", 96)):
        write_video(path.with_name(name + ".h264"), moving(8, height=height))
    parts = [path.with_name(name + ".h264") for name in "ab"]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()


def without_times(path):
    write_video(path.with_suffix(".h264"), moving(8), fps=10)
    path.with_suffix(".h264").rename(path)


def times_in_disorder(path):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for i, image in enumerate(moving(8)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            for packet in stream.encode(frame):
                packet.dts, packet.pts = i - 5, (0, 1, 4, 3, 2, 5, 6, 7)[i]
                out.mux(packet)


def write_gif(path):
    write_video(path, moving(6), codec="gif", pix_fmt="rgb8")


def jpeg(path):
    path.write_bytes(cv2.imencode(".jpg", texture(0))[1].tobytes())


def frames_with(**options):
    return lambda path: write_video(path, moving(6), **options)


def still_frames(image):
    return lambda path: write_video(path, [image] * 8)


def cut_scene(path):
    y, x = np.indices((64, 96))
    circles = [np.hypot(x - 40 - 2 * i, y - 30) // 8 % 2 * 255 for i in range(5)]
    write_video(path, moving(5) + [np.repeat(c[..., None], 3, 2).astype(np.uint8) for c in circles])


def noise(path):
    rng = np.random.default_rng(0)
    write_video(path, [rng.integers(0, 256, (64, 96, 3), np.uint8) for _ in range(6)])


def flash(path):
    images = moving(9)
    images[4] = np.full_like(images[4], 255)
    write_video(path, images)
