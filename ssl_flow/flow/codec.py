"""Flow as a few kilobytes of 16-bit fixed point, `q16` (compact) or `png` (KITTI's); as a picture.

`q16` rounds to 1/16 pixel, far below the error of the estimators (0.25 px and more). Flow is
smooth: its second difference, across and down, is mostly within some steps of zero. Zigzag coding
(0, -1, 1, -2, ...) makes that small without a sign, so that nearly all high bytes are zero; stored
apart from the low ones, they cost nothing. Bytes and measurements: docs/store.md.

`png` is the paper's own choice ("fixed point 16bit PNG files similar to KITTI", Mahendran et al.,
ACCV 2018, footnote 1) and what other flow tools read.
"""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
from numpy.typing import NDArray

CODECS = ("q16", "png")
MAX_PIXELS = 2**25  # of a flow that is decoded; an 8K frame has 33.2 million

_MAGIC, _Q16_VERSION, _STEPS = b"SFQ", 1, 16  # steps per pixel
_HEADER = struct.Struct("<3sBHHHH")  # magic, version, height, width, steps per pixel, 0
_CRC = struct.Struct("<I")
_LEVEL = 3  # of zstd; 9 saves another tenth in five times the time
_KITTI_STEPS, _KITTI_ZERO = 64, 2**15


def encode_flow(flow: NDArray[np.float32], codec: str = "q16") -> bytes:
    """Encode a flow (H, W, 2) in pixels, x right, y down.

    "q16" rounds to 1/16 pixel, "png", KITTI's, to 1/64. Values beyond -2048 ... +2047.9375 pixels
    (`png`: -512 ... +511.98) are stored as those limits. ValueError: unknown codec, the shape is
    not (H, W, 2), empty or larger than `MAX_PIXELS`, or a value is not finite.
    """
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}; known: {', '.join(CODECS)}")
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow must be (H, W, 2), got {flow.shape}")
    _check_size(*flow.shape[:2])
    if not np.isfinite(flow).all():
        raise ValueError("flow has values that are not finite: mask or drop them before encoding")
    return _encode_q16(flow) if codec == "q16" else _encode_kitti(flow)


def decode_flow(data: bytes) -> NDArray[np.float32]:
    """Decode what `encode_flow` made, recognised by its first bytes: (H, W, 2) float32, pixels.

    Also read are the 16-bit grey PNGs of version-1 stores, and KITTI's own files, where a pixel
    marked as unknown becomes NaN. Memory is bounded by `MAX_PIXELS` whatever the data say.
    ValueError: `data` is none of these, or damaged.
    """
    if data.startswith(_MAGIC):
        return _decode_q16(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _decode_png(data)
    raise ValueError("not an encoded flow: neither q16 nor a 16-bit PNG")


def png(image: NDArray, options: list[int]) -> bytes:
    """Encode an image, grey or BGR, as PNG with OpenCV's `options`."""
    return cv2.imencode(".png", image, options)[1].tobytes()


def _check_size(height: int, width: int) -> None:
    if not (0 < height < 2**16 and 0 < width < 2**16 and height * width <= MAX_PIXELS):
        raise ValueError(
            f"a flow of {height} x {width} pixels is not possible: 1 to {MAX_PIXELS} in all, "
            "at most 65535 a side"
        )


def _fixed(flow: NDArray[np.float32], steps: int) -> NDArray[np.int16]:
    """(H, W, 2) pixels -> (2, H, W) steps, saturated."""
    planes = np.clip(flow.transpose(2, 0, 1), -32768 / steps, 32767 / steps, order="C")
    planes *= np.float32(steps)
    return np.rint(planes, out=planes).astype(np.int16)


def _encode_q16(flow: NDArray[np.float32]) -> bytes:
    import zstandard  # here: methods of flow work without it

    # Everything is modulo 2^16: what wraps around here does so again when it is undone.
    delta = _fixed(flow, _STEPS)
    delta[:, :, 1:] -= delta[:, :, :-1].copy()
    delta[:, 1:] -= delta[:, :-1].copy()
    zigzag = (delta << 1) ^ (delta >> 15)
    halves = zigzag.astype("<i2", copy=False).view(np.uint8).reshape(-1, 2)
    payload: bytes = zstandard.ZstdCompressor(level=_LEVEL).compress(halves.T.tobytes())
    header = _HEADER.pack(_MAGIC, _Q16_VERSION, *flow.shape[:2], _STEPS, 0)
    return header + _CRC.pack(zlib.crc32(payload, zlib.crc32(header))) + payload


def _decode_q16(data: bytes) -> NDArray[np.float32]:
    import zstandard

    start = _HEADER.size + _CRC.size
    if len(data) < start:
        raise ValueError("damaged q16 flow: shorter than its header")
    _, version, height, width, steps, _ = _HEADER.unpack_from(data)
    if version != _Q16_VERSION:
        raise ValueError(f"q16 flow of version {version}, this ssl_flow reads {_Q16_VERSION}")
    payload = data[start:]
    crc = zlib.crc32(payload, zlib.crc32(data[: _HEADER.size]))
    if _CRC.unpack_from(data, _HEADER.size) != (crc,):
        raise ValueError("damaged q16 flow: its checksum is wrong")
    # The checksum stops accidents, not malice: what is allocated is bounded before it is.
    _check_size(height, width)
    try:
        if steps == 0 or zstandard.frame_content_size(payload) != 4 * height * width:
            raise ValueError("damaged q16 flow: its header and its contents disagree")
        raw = zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged q16 flow: {error}") from error
    low, high = np.frombuffer(raw, np.uint8).reshape(2, 2, height, width)
    zigzag = high.astype(np.uint16) << 8 | low
    delta = ((zigzag >> 1) ^ -(zigzag & 1)).astype(np.int16, copy=False)
    planes = np.add.accumulate(delta, axis=1, dtype=np.int16)
    np.add.accumulate(planes, axis=2, dtype=np.int16, out=planes)
    # OpenCV interleaves planes in a sixth of NumPy's time.
    scaled = planes.astype(np.float32) * np.float32(1 / steps)
    return np.asarray(cv2.merge([scaled[0], scaled[1]]), dtype=np.float32)


def _encode_kitti(flow: NDArray[np.float32]) -> bytes:
    image = np.ones((*flow.shape[:2], 3), np.uint16)  # OpenCV's order: valid, v, u
    image[..., 2], image[..., 1] = _fixed(flow, _KITTI_STEPS).astype(np.int32) + _KITTI_ZERO
    # Measured on real flow: the RLE strategy makes smaller files than the default one in the same
    # time, because little but runs is left once neighbours are subtracted.
    strategy = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    return png(image, [cv2.IMWRITE_PNG_COMPRESSION, 1, *strategy])


def _decode_png(data: bytes) -> NDArray[np.float32]:
    if len(data) < 33:  # signature, then the chunk IHDR, which begins with the size
        raise ValueError("not an encoded flow: a PNG without a header")
    width, height = struct.unpack_from(">II", data, 16)
    _check_size((height + 1) // 2, width)  # a grey one has two planes
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16:
        raise ValueError("not an encoded flow: a damaged PNG, or one that is not 16-bit")
    if image.ndim == 2 and len(image) % 2 == 0:  # version 1: u above v, 1/16 pixel
        planes = image.reshape(2, len(image) // 2, -1).astype(np.float32)
        return np.ascontiguousarray((planes - np.float32(2**15)).transpose(1, 2, 0) / 16)
    if image.ndim == 3 and image.shape[2] == 3:
        flow = (image[..., :0:-1].astype(np.float32) - _KITTI_ZERO) / _KITTI_STEPS
        flow[image[..., 0] == 0] = np.nan
        return np.ascontiguousarray(flow)
    raise ValueError("not an encoded flow: the PNG is neither KITTI's nor a version-1 store's")


def flow_to_rgb(flow: NDArray[np.float32], max_magnitude: float | None = None) -> NDArray[np.uint8]:
    """Colour a flow (H, W, 2) by the Middlebury wheel: hue is direction, saturation length.

    `max_magnitude` is the length in pixels drawn fully saturated, to which longer vectors are
    shortened; None takes the longest of this flow. Returns (H, W, 3) RGB uint8, white where nothing
    moves. ValueError: the shape is not (H, W, 2), or `max_magnitude` is not positive.
    """
    import torch
    from torchvision.utils import flow_to_image

    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow must be (H, W, 2), got {flow.shape}")
    if max_magnitude is not None:
        if max_magnitude <= 0:
            raise ValueError(f"max_magnitude must be positive, got {max_magnitude}")
        length = np.linalg.norm(flow, axis=-1, keepdims=True)
        flow = flow / np.maximum(length / max_magnitude, 1)
        # flow_to_image scales by the longest vector: one pixel outside the picture sets the scale.
        flow = np.pad(flow, ((0, 1), (0, 0), (0, 0)))
        flow[-1, 0] = (max_magnitude, 0)
    picture = flow_to_image(torch.from_numpy(np.ascontiguousarray(flow)).permute(2, 0, 1).float())
    rgb = picture.permute(1, 2, 0).numpy()
    return np.ascontiguousarray(rgb[:-1] if max_magnitude is not None else rgb)
