"""`gap="auto"`: how far apart in time the two frames of one video's pairs should be.

Motion a second differs a hundredfold between videos. At a gap that is too short nothing moves more
than the methods err; at one that is too long what moved is out of their reach, or out of the
picture. So the gap is chosen for each video, in seconds, from what moves in its first seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import NDArray

from .estimators import grey
from .pairs import STILL_MOTION, is_still
from .video import Frame

PROBE_SIZE = 128  # pixels: shorter side of the frames that `choose_gap` looks at
MAX_GAP = 0.5  # seconds: what moves later than in the first seconds must not be lost
# Pixels in a picture of shorter side 256, as STILL_MOTION; the methods' errors grow with the
# picture, so that one gap is right at each size. Measured on 31 clips with DIS: forward and
# backward flow agree in 96 % of the picture at motions of 4 to 6 pixels, 95 % at 6 to 8, 92 % at 8
# to 12, 84 % at 16 to 24, 74 % at 32 to 48. Below 1 pixel pairs are skipped as static; at 4 the
# motion is ten times the methods' error. Doubling from below 4 ends between 4 and 8.
USABLE_MOTION = 4.0
LARGEST_MOTION = 16.0
_SECONDS = 3.0  # of the video that are looked at
_SEARCHED = 15.0  # seconds read at most, to get behind a title or a black picture
_MOST = 1000  # pictures held, 30 MB: time stamps that are wrong can put 10^5 frames in a second
_PLACES = 9  # pairs probed at each gap
_PERCENTILE = 98  # of the lengths in a picture, as in is_motionless


def choose_gap(frames: Iterable[Frame], max_gap: float = MAX_GAP) -> float:
    """Choose the seconds between the two frames of a pair, from the first seconds of a video.

    The gap starts at one frame and is doubled until the median pair moves enough, though not so far
    that the methods lose it. The motion of a pair is what the fastest 2 % of its picture exceed, so
    that a small thing in front of a static camera counts and is not driven too far. Pairs in which
    nothing moves are left out of the median, as they are left out of the store.

    Args:
        frames: from the start of the video, best of shorter side `PROBE_SIZE` (larger ones are
            shrunk). Mostly 3 seconds are taken from it, 15 at most; damage ends it.
        max_gap: seconds; the answer for a video in which nothing moves.

    Returns:
        Seconds: the median time between two frames times a power of two, or `max_gap`.

    Raises:
        MemoryError, RuntimeError, OSError: of `frames`; another time there may be more of them.
    """
    times, pictures = _first_moving_seconds(frames)
    if len(pictures) < 2:
        return max_gap
    step = float(np.median(np.diff(times)))
    chosen = gap = step
    while gap < max_gap:
        motion = _median_motion(times, pictures, gap)
        if motion > LARGEST_MOTION:
            break  # the gap before it, or one frame where even that is much
        chosen = gap
        if motion >= USABLE_MOTION:
            break
        gap *= 2
    else:
        chosen = max_gap
    return round(min(chosen, max_gap), 6)


def _first_moving_seconds(
    frames: Iterable[Frame],
) -> tuple[NDArray[np.float64], list[NDArray[np.uint8]]]:
    """Return times and grey pictures (H, W) of the first seconds in which anything moves."""
    times: list[float] = []
    pictures: list[NDArray[np.uint8]] = []
    begin: float | None = None
    try:
        for frame in frames:
            begin = frame.time if begin is None else begin
            if times and (frame.time - times[0] >= _SECONDS or len(times) == _MOST):
                moving = any(not is_still(pictures[0], other) for other in pictures[1::10])
                if moving or frame.time - begin >= _SEARCHED:
                    break
                times, pictures = [], []
            picture = _small(grey(frame.image))
            if pictures and picture.shape != pictures[0].shape:
                break  # the video changes its size: a new start would gain little
            times.append(frame.time)
            pictures.append(picture)
    except (MemoryError, RuntimeError, OSError):
        raise
    except Exception:
        pass  # what could be read is enough; extraction meets what went wrong then and reports it
    return np.array(times), pictures


def _small(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    scale = PROBE_SIZE / min(image.shape)
    if scale >= 1:
        return image
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _median_motion(
    times: NDArray[np.float64], pictures: list[NDArray[np.uint8]], gap: float
) -> float:
    """Return the median motion of pairs `gap` seconds apart; 0 if nothing moves in any of them."""
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)  # type: ignore[attr-defined]
    dis.setFinestScale(0)  # it leaves out the two finest, and with them what is small
    last = int(np.searchsorted(times, times[-1] - gap, side="right")) - 1
    motions = []
    for first in sorted({round(place) for place in np.linspace(0, max(last, 0), _PLACES)}):
        second = int(np.argmin(np.abs(times - times[first] - gap)))
        a, b = pictures[first], pictures[second]
        if second <= first or is_still(a, b):
            continue
        length = np.linalg.norm(dis.calc(a, b, None), axis=-1)
        motion = float(np.percentile(length, _PERCENTILE)) * 256 / min(a.shape)
        if motion >= STILL_MOTION:
            motions.append(motion)
    return float(np.median(motions)) if motions else 0.0
