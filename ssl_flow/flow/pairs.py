"""Which two frames make a pair, how far apart in time, and which pairs teach nothing.

Motion a second differs a hundredfold between videos. At a gap that is too short nothing moves more
than the methods err; at one that is too long what moved is out of their reach, or out of the
picture. So `gap="auto"` chooses it for each video, in seconds, from what moves in its first ones.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from .estimators import Flow, Image, grey, optical_flow, targets
from .video import Frame, VideoError

STILL_DIFFERENCE = 0.25  # grey levels, mean over a 64 x 64 picture: only coding noise below it
STILL_MOTION = 0.5  # pixels in a picture of shorter side 256: the error of a good estimator
# Share of the contrast; measured on 19 clips at gaps of 0.1 and 0.2 s: shot cuts 0.91 and more,
# all but the wildest camera swings 0.73 and less. Two unrelated pictures have about 1.1.
CUT_RESIDUAL = 0.8
_MOST = 2**29  # bytes of the pictures that wait for their partners: 1500 of 256 x 455 pixels
_MARGIN = 1e-4  # seconds: time stamps are rounded to 1 ms or finer, 0.1 is no binary fraction
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
_MOST_PROBED = 1000  # pictures held, 30 MB: wrong time stamps can put 10^5 frames in a second
_PLACES = 9  # pairs probed at each gap
_PERCENTILE = 98  # of the lengths in a picture, as in is_motionless


def pair_frames(
    frames: Iterable[Frame], gap: float, every: float, skipped: Counter[str]
) -> Iterator[tuple[Frame, Frame]]:
    """Pair each start frame with the frame nearest to `gap` seconds later.

    Times decide, not frame numbers, so that videos of 10 and of 60 frames a second give the same
    kind of motion. In memory are the frames that wait for their partners, already shrunk, and the
    one before the last: nobody else's can be nearest.

    `every` is the seconds between the first frames of two pairs; 0 starts one at every frame.
    `skipped` counts what is left out: `hole`, where the real distance is below half or above twice
    the gap (frames are missing, or the video is slower than that), or `size_change` between the two
    frames. VideoError: more frames begin pairs within one gap than the memory should hold.
    """
    starts: deque[Frame] = deque()  # that wait for their partners
    before: Frame | None = None
    next_start: float | None = None
    held = 0  # bytes
    for frame in frames:
        while starts and frame.time >= starts[0].time + gap - _MARGIN:
            start = starts.popleft()
            held -= start.image.nbytes
            wanted, partner = start.time + gap, frame
            if before is not None and before is not start:  # it may be nearer
                late = frame.time - wanted - _MARGIN
                partner = before if wanted - before.time < late else frame
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


def is_still(first: Image, second: Image) -> bool:
    """Tell, before any flow is computed, that two grey images (H, W) are practically the same.

    Their `still_thumbnail`s may be given instead.
    """
    difference = cv2.absdiff(still_thumbnail(first), still_thumbnail(second))
    return float(np.mean(difference)) < STILL_DIFFERENCE


def still_thumbnail(grey: Image) -> Image:
    """Return what `is_still` looks at of a grey image (H, W): (64, 64)."""
    return np.asarray(cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def is_motionless(flow: Flow) -> bool:
    """Tell that not even the fastest 2 % of the picture move half a pixel (at shorter side 256)."""
    length = np.linalg.norm(flow[::4, ::4], axis=-1)  # every 4th pixel is enough for a percentile
    return bool(np.percentile(length, 98) < STILL_MOTION * min(flow.shape[:2]) / 256)


def is_cut(first: Image, second: Image, flow: Flow) -> bool:
    """Tell that the flow does not explain the second picture: a shot cut, or motion too fast.

    The second image (H, W), read where `flow` (H, W, 2) points to, must look like the first one
    wherever that is inside. Comparing frames without their motion would take a fast camera for one.
    """
    x, y, valid = targets(flow)
    warped = cv2.remap(second, x, y, cv2.INTER_LINEAR)
    inside = valid.view(np.uint8)
    residual = cv2.mean(cv2.absdiff(first, warped), mask=inside)[0]
    # The smaller contrast: a cut to black must count.
    contrast = min(float(cv2.meanStdDev(image)[1][0, 0]) for image in (first, second))
    few = cv2.countNonZero(inside) < 0.1 * inside.size
    return few or residual > CUT_RESIDUAL * contrast


def choose_gap(frames: Iterable[Frame]) -> float:
    """Choose the seconds between the two frames of a pair, from the first seconds of a video.

    The gap starts at one frame and is doubled until the median pair moves enough, though not so far
    that the methods lose it; `MAX_GAP` if nothing moves. The motion of a pair is what the fastest
    2 % of its picture exceed, so that a small thing in front of a static camera counts and is not
    driven too far. Pairs in which nothing moves are left out of the median, as they are left out of
    the store.

    Of `frames`, of shorter side `PROBE_SIZE`, mostly 3 seconds are taken, 15 at most. Damage ends
    them, but their MemoryError, RuntimeError and OSError are raised: they may pass.
    """
    times, pictures = _first_moving_seconds(frames)
    if len(pictures) < 2:
        return MAX_GAP
    step = float(np.median(np.diff(times)))
    chosen = gap = step
    while gap < MAX_GAP:
        motion = _median_motion(times, pictures, gap)
        if motion > LARGEST_MOTION:
            break  # the gap before it, or one frame where even that is much
        chosen = gap
        if motion >= USABLE_MOTION:
            break
        gap *= 2
    else:
        chosen = MAX_GAP
    return round(min(chosen, MAX_GAP), 6)


def _first_moving_seconds(
    frames: Iterable[Frame],
) -> tuple[NDArray[np.float64], list[Image]]:
    """Return times and grey pictures (H, W) of the first seconds in which anything moves."""
    times: list[float] = []
    pictures: list[Image] = []
    begin: float | None = None
    try:
        for frame in frames:
            begin = frame.time if begin is None else begin
            if times and (frame.time - times[0] >= _SECONDS or len(times) == _MOST_PROBED):
                moving = any(not is_still(pictures[0], other) for other in pictures[1::10])
                if moving or frame.time - begin >= _SEARCHED:
                    break
                times, pictures = [], []
            picture = grey(frame.image)
            if pictures and picture.shape != pictures[0].shape:
                break  # the video changes its size: a new start would gain little
            times.append(frame.time)
            pictures.append(picture)
    except (MemoryError, RuntimeError, OSError):
        raise
    except Exception:
        pass  # what could be read is enough; extraction meets what went wrong then and reports it
    return np.array(times), pictures


def _median_motion(times: NDArray[np.float64], pictures: list[Image], gap: float) -> float:
    """Return the median motion of pairs `gap` seconds apart; 0 if nothing moves in any of them."""
    last = int(np.searchsorted(times, times[-1] - gap, side="right")) - 1
    motions = []
    for first in sorted({round(place) for place in np.linspace(0, max(last, 0), _PLACES)}):
        second = int(np.argmin(np.abs(times - times[first] - gap)))
        a, b = pictures[first], pictures[second]
        if second <= first or is_still(a, b):
            continue
        # By itself it leaves out the two finest scales, and with them what is small.
        length = np.linalg.norm(optical_flow(a, b, "dis-ultrafast", finest_scale=0), axis=-1)
        motion = float(np.percentile(length, _PERCENTILE)) * 256 / min(a.shape)
        if motion >= STILL_MOTION:
            motions.append(motion)
    return float(np.median(motions)) if motions else 0.0
