import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
import zstandard

from ssl_flow.flow import decode_flow, encode_flow
from ssl_flow.flow.codec import MAX_PIXELS

STEP = {"q16": 1 / 16, "png": 1 / 64}
LIMIT = {"q16": 2048, "png": 512}
codecs = pytest.mark.parametrize("codec", ["q16", "png"])


def smooth_flow(height, width):
    noise = np.random.default_rng(0).normal(0, 1, (height, width, 2)).astype(np.float32)
    flow = cv2.GaussianBlur(noise, (0, 0), 16)
    return flow * (5 / np.abs(flow).max())


@codecs
def test_round_trip_is_within_half_a_step(codec):
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (1, 7), (9, 1), (2, 2), (37, 53)]
    shapes += [tuple(rng.integers(1, 60, 2)) for _ in range(60)]
    for height, width in shapes:
        scale = 10 ** rng.uniform(-3, np.log10(LIMIT[codec]))
        flow = rng.uniform(-scale, scale, (height, width, 2)).astype(np.float32)
        flow = flow[:, ::-1] if rng.uniform() < 0.5 else flow  # not contiguous
        decoded = decode_flow(encode_flow(flow, codec))
        assert decoded.dtype == np.float32
        assert decoded.shape == flow.shape
        assert decoded.flags.c_contiguous
        limited = np.clip(flow, -LIMIT[codec], LIMIT[codec] - STEP[codec])
        assert np.abs(decoded - limited).max() <= STEP[codec] / 2 + 1e-4
        # What is on the grid comes back exactly, and so does everything the second time.
        np.testing.assert_array_equal(decode_flow(encode_flow(decoded, codec)), decoded)


@codecs
def test_every_value_of_the_grid_comes_back(codec):
    values = np.arange(-(2**15), 2**15) * np.float32(STEP[codec])
    orders = [values, np.random.default_rng(0).permutation(values)]  # the largest differences too
    flow = np.stack([order.reshape(256, 256) for order in orders], axis=-1).astype(np.float32)
    np.testing.assert_array_equal(decode_flow(encode_flow(flow, codec)), flow)


@codecs
def test_values_beyond_the_range_become_its_limits(codec):
    high = LIMIT[codec] - STEP[codec]
    flow = np.float32([[[1e9, -1e9], [high, -LIMIT[codec]], [3e38, -3e38]]])
    expected = [[[high, -LIMIT[codec]]] * 3]
    np.testing.assert_array_equal(decode_flow(encode_flow(flow, codec)), expected)


def test_q16_is_the_default_and_small_and_accurate():
    flow = smooth_flow(224, 224)
    data = encode_flow(flow)
    assert data == encode_flow(flow, "q16")
    assert len(data) < 20_000
    assert len(data) < len(encode_flow(flow, "png")) / 2
    error = np.linalg.norm(decode_flow(data) - flow, axis=-1)
    assert error.mean() < 0.03
    assert error.max() < 0.045  # the diagonal of half a step


@codecs
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value, codec):
    flow = np.zeros((4, 4, 2), np.float32)
    flow[1, 2, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        encode_flow(flow, codec)


@pytest.mark.parametrize("shape", [(2, 4, 4), (4, 4), (0, 3, 2), (1, 70_000, 2), (9000, 4000, 2)])
def test_impossible_shapes_are_refused(shape):
    flow = np.broadcast_to(np.float32(0), shape)
    with pytest.raises(ValueError, match=r"\(H, W, 2\)|not possible"):
        encode_flow(flow)


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match="'jpg'; known: q16, png"):
        encode_flow(np.zeros((4, 4, 2), np.float32), "jpg")


def test_png_is_kittis_encoding():
    flow = np.zeros((3, 5, 2), np.float32)
    flow[..., 0], flow[..., 1] = 1.5, -2
    data = encode_flow(flow, "png")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # B, G, R
    assert image.dtype == np.uint16
    assert image.shape == (3, 5, 3)
    assert (image == [1, 2**15 - 2 * 64, 2**15 + 96]).all()
    image[1, 2, 0] = 0  # KITTI marks what is not known
    decoded = decode_flow(cv2.imencode(".png", image)[1].tobytes())
    assert np.isnan(decoded[1, 2]).all()
    decoded[1, 2] = flow[1, 2]
    np.testing.assert_array_equal(decoded, flow)


def test_the_grey_png_of_version_1_is_read():
    flow = np.round(smooth_flow(20, 31) * 16) / 16
    grey = (flow * 16 + 32768).transpose(2, 0, 1).reshape(40, 31).astype(np.uint16)
    data = cv2.imencode(".png", grey)[1].tobytes()
    np.testing.assert_array_equal(decode_flow(data), flow.astype(np.float32))


def test_the_header_is_as_documented():
    data = encode_flow(np.zeros((3, 5, 2), np.float32))
    magic, version, height, width, steps, zero, crc = struct.unpack("<3sBHHHHI", data[:16])
    assert (magic, version, height, width, steps, zero) == (b"SFQ", 1, 3, 5, 16, 0)
    assert crc == zlib.crc32(data[:12] + data[16:])
    assert zstandard.ZstdDecompressor().decompress(data[16:]) == bytes(3 * 5 * 4)


def test_other_data_are_refused():
    eight_bit = cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()
    odd = cv2.imencode(".png", np.zeros((5, 4), np.uint16))[1].tobytes()
    for data in (b"", b"no image", eight_bit, odd, eight_bit[:20], b"SFQ"):
        with pytest.raises(ValueError, match="flow"):
            decode_flow(data)


def test_a_changed_or_missing_byte_never_passes():
    data = encode_flow(smooth_flow(12, 17))
    for i in range(len(data)):
        changed = bytearray(data)
        changed[i] ^= 1 << (i % 8)
        with pytest.raises(ValueError):
            decode_flow(bytes(changed))
        with pytest.raises(ValueError):
            decode_flow(data[:i])
    with pytest.raises(ValueError):
        decode_flow(data + b"\0")


def forged(payload, height=4, width=4, steps=16):
    """A q16 flow whose checksum is right, as somebody with bad intentions would make it."""
    header = struct.pack("<3sBHHHH", b"SFQ", 1, height, width, steps, 0)
    return header + struct.pack("<I", zlib.crc32(header + payload)) + payload


def test_a_hostile_file_is_refused_before_memory_is_spent():
    bomb = zstandard.ZstdCompressor().compress(bytes(2**28))
    height = MAX_PIXELS // 8192 + 1  # contents as the header says, but too many
    stream = zstandard.ZstdCompressor().compressobj(size=height * 8192 * 4)
    large = b"".join(stream.compress(bytes(8192 * 4)) for _ in range(height)) + stream.flush()
    stream = zstandard.ZstdCompressor().compressobj()
    unsized = stream.compress(bytes(2**24)) + stream.flush()
    good = zstandard.ZstdCompressor().compress(bytes(64))
    huge_png = bytearray(encode_flow(np.zeros((4, 4, 2), np.float32), "png"))
    huge_png[16:24] = struct.pack(">II", 2**15, 2**15)
    huge_png[29:33] = struct.pack(">I", zlib.crc32(huge_png[12:29]))
    hostile = [
        forged(bomb),
        forged(bomb, 65535, 65535),
        forged(large, 8192, height),
        forged(unsized),
        forged(good, 0, 4),
        forged(good, steps=0),
        forged(good + good),
        forged(good[:-3]),
        forged(b""),
        forged(b"not zstd at all"),
    ]
    assert decode_flow(forged(good)).shape == (4, 4, 2)
    tracemalloc.start()
    try:
        for data in hostile:
            with pytest.raises(ValueError):
                decode_flow(data)
        with pytest.raises(ValueError, match="32768 pixels is not possible"):
            decode_flow(bytes(huge_png))  # told before OpenCV, whose memory is not seen here
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
