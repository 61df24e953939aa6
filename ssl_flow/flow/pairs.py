"""Which two frames make a pair, and which pairs teach nothing."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from .container import VideoError
from .video import Frame

STILL_DIFFERENCE = 0.25  # grey levels, mean over a 64 x 64 picture: only coding noise below it
STILL_MOTION = 0.5  # pixels in a picture of shorter side 256: the error of a good estimator
# Share of the contrast; measured on 19 clips at gaps of 0.1 and 0.2 s: shot cuts 0.91 and more,
# all but the wildest camera swings 0.73 and less. Two unrelated pictures have about 1.1.
CUT_RESIDUAL = 0.8
_MOST = 2**29  # bytes of the pictures that wait for their partners: 1500 of 256 x 455 pixels
_MARGIN = 1e-4  # seconds: time stamps are rounded to 1 ms or finer, 0.1 is no binary fraction


def pair_frames(
    frames: Iterable[Frame], gap: float, every: float, skipped: Counter[str]
) -> Iterator[tuple[Frame, Frame]]:
    """Pair each start frame with the frame nearest to `gap` seconds later.

    Times decide, not frame numbers, so that videos of 10 and of 60 frames a second give the same
    kind of motion. A pair whose real distance is below half or above twice the gap (frames are
    missing there, or the video is slower than that) is left out. In memory are the frames that wait
    for their partners, already shrunk, and the one before the last: nobody else's can be nearest.

    Args:
        frames: in order of time.
        gap: seconds between the two frames of a pair.
        every: seconds between the first frames of two pairs; 0 starts one at every frame.
        skipped: counts what is left out: `hole`, or `size_change` between the two frames.

    Raises:
        VideoError: more frames begin pairs within one gap than the memory should hold.
    """
    starts: deque[Frame] = deque()  # that wait for their partners
    before: Frame | None = None
    next_start: float | None = None
    held = 0  # bytes
    for frame in frames:
        while starts and frame.time >= starts[0].time + gap - _MARGIN:
            start = starts.popleft()
            held -= start.image.nbytes
            partner = _nearest(start, before, frame, gap)
            if not gap / 2 - _MARGIN <= partner.time - start.time <= 2 * gap + _MARGIN:
                skipped["hole"] += 1
            elif partner.image.shape != start.image.shape:
                skipped["size_change"] += 1
            else:
                yield start, partner
        if next_start is None or frame.time >= next_start - _MARGIN:
            held += frame.image.nbytes  # made now: a decoded frame takes far more memory
            starts.append(frame)
            if held > _MOST:
                raise VideoError(
                    f"{len(starts)} pairs begin within one gap ({gap:g} s), too many to hold: "
                    "choose a smaller --gap or a larger --every, if its time stamps are right"
                )
            next_start = frame.time if next_start is None else next_start
            if every > 0:  # starts follow a fixed grid of times, else rounding would add up
                passed = max(frame.time - next_start + _MARGIN, 0.0)  # not -1e-17
                next_start += every * (1 + passed // every)
        before = frame


def _nearest(start: Frame, before: Frame | None, frame: Frame, gap: float) -> Frame:
    """Return `frame`, the first at or after the wanted time, or the one before if it is nearer."""
    wanted = start.time + gap
    if before is None or before is start:
        return frame
    return before if wanted - before.time < frame.time - wanted - _MARGIN else frame


def is_still(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> bool:
    """Tell, before any flow is computed, that two grey images (H, W) are practically the same.

    Their `still_thumbnail`s may be given instead.
    """
    difference = cv2.absdiff(still_thumbnail(first), still_thumbnail(second))
    return float(np.mean(difference)) < STILL_DIFFERENCE


def still_thumbnail(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return what `is_still` looks at of a grey image (H, W): (64, 64)."""
    return np.asarray(cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def is_motionless(flow: NDArray[np.float32]) -> bool:
    """Tell that not even the fastest 2 % of the picture move half a pixel (at shorter side 256)."""
    length = np.linalg.norm(flow[::4, ::4], axis=-1)  # every 4th pixel is enough for a percentile
    return bool(np.percentile(length, 98) < STILL_MOTION * min(flow.shape[:2]) / 256)


def is_cut(
    first: NDArray[np.uint8],
    second: NDArray[np.uint8],
    flow: NDArray[np.float32],
    valid: NDArray[np.bool_],
) -> bool:
    """Tell that the flow does not explain the second picture: a shot cut, or motion too fast.

    The second image, read where the flow points to, must look like the first one. Comparing frames
    without their motion would take a fast camera for a cut.

    Args:
        first: (H, W) grey.
        second: (H, W) grey.
        flow: (H, W, 2) from `first` to `second`, pixels.
        valid: (H, W), where the flow stays inside the picture.
    """
    height, width = first.shape
    x = flow[..., 0] + np.arange(width, dtype=np.float32)
    y = flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    warped = cv2.remap(second, x, y, cv2.INTER_LINEAR)
    inside = valid.view(np.uint8)
    residual = cv2.mean(cv2.absdiff(first, warped), mask=inside)[0]
    # The smaller contrast: a cut to black must count.
    contrast = min(float(cv2.meanStdDev(image)[1][0, 0]) for image in (first, second))
    few = cv2.countNonZero(inside) < 0.1 * inside.size
    return few or residual > CUT_RESIDUAL * contrast
