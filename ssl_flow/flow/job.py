"""What is done with one source: frames -> pairs -> flow -> a shard."""

from __future__ import annotations

import errno
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from .codec import encode_flow, png
from .duplicates import RepeatedPairs, Thumbnail
from .estimators import (
    MIN_SIZE,
    OPENCV_METHODS,
    Flow,
    Image,
    Option,
    flow_validity,
    grey,
    optical_flows,
)
from .pairs import (
    PROBE_SIZE,
    choose_gap,
    is_cut,
    is_motionless,
    is_still,
    pair_frames,
    still_thumbnail,
)
from .pool import Tick
from .shard import ShardWriter, finished, index_path, member_names, safe_name
from .sources import Source, fingerprint
from .video import Frame, VideoError, read_frames

_JPEG_QUALITY = 92
_GROUP = 32  # pairs at once on a GPU
# What the name of a source can do to its place in the store; all else is wrong with the store.
_NAME_ERRORS = (
    errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ, errno.EINVAL,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What all pairs of a store have in common; the command `ssl-flow flow` explains each."""

    method: str
    options: dict[str, Option]
    size: int
    gap: float | Literal["auto"]
    every: float | None  # None: as the gap of the video
    consistency: bool
    codec: str = "q16"


class _Passing(Exception):
    """What may be over the next time (no memory, a sick GPU, a lost disk): nothing is stored."""


def extract_source(
    source: Source, tick: Tick, store: Path, settings: Settings, device: str = "cpu"
) -> tuple[dict[str, Any] | None, str | None]:
    """Write one source's shard; return its index (None: nothing was stored) and the problem."""
    try:
        before = fingerprint(source)
    except OSError as error:
        return None, f"cannot be reached: {error.strerror}"
    try:
        writer = ShardWriter(store, source.name)
    except OSError as error:
        if error.errno in _NAME_ERRORS:
            return None, f"its name cannot be stored: {error.strerror}"
        raise
    facts: dict[str, Any] = {"frames": 0}
    skipped: Counter[str] = Counter()
    problems: list[str] = []
    hashes: list[str] = []
    with writer, _one_thread(settings.method):
        index = finished(store, source.name)
        if index is not None:  # by another call, since this one looked
            return index, index["problem"]
        # A damaged one, which would be met if the source cannot be read any more.
        index_path(store, source.name).unlink(missing_ok=True)
        samples = _samples(source, tick, settings, device, facts, skipped, problems)
        try:
            for key, members, picture in _survive(samples, problems):
                writer.add(key, members)
                hashes.append(f"{picture:016x}")
                tick(pairs=1)
        except _Passing as error:
            return None, f"{error}: not stored, repeat the call"
        if facts["frames"] == 0:
            return None, "; ".join(problems) or "no frame could be read"
        try:
            changed = fingerprint(source) != before
        except OSError:
            changed = True
        if changed:
            return None, "it was changed while it was read: not stored, repeat the call"
        gap = {"gap": facts.pop("gap")}
        if not hashes and not problems:
            problems.append(_why_no_pair(facts["frames"], skipped, gap["gap"]))
        facts |= {
            "skipped": dict(sorted(skipped.items())),
            "problem": "; ".join(problems) or None,
            "source_bytes": before[0],
            "source_files": before[1],
            "hashes": hashes,
        }
        index = writer.commit(facts | (gap if settings.gap == "auto" else {}))
    return index, index["problem"]


def _survive(samples: Iterator[Any], problems: list[str]) -> Iterator[Any]:
    """Turn whatever a stranger's file makes go wrong into a problem of that file alone."""
    try:
        yield from samples
    except (ImportError, _Passing):
        raise  # a missing library is no fault of the file
    except (MemoryError, RuntimeError, OSError) as error:
        raise _Passing(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        problems.append(str(error) or type(error).__name__)


def _why_no_pair(frames: int, skipped: Counter[str], gap: float) -> str:
    if skipped:
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items()))
        advice = ": frames are too far apart in time, try a larger gap" if skipped["hole"] else ""
        return f"no usable pair in {frames} frames ({reasons}){advice}"
    return f"no two frames {gap:g} s apart in {frames} frame(s)"


def _samples(
    source: Source,
    tick: Tick,
    settings: Settings,
    device: str,
    facts: dict[str, Any],
    skipped: Counter[str],
    problems: list[str],
) -> Iterator[tuple[str, dict[str, bytes], int]]:
    """Yield key, members and hash of each pair worth keeping; note frames and gap in `facts`."""
    method, options, number = settings.method, settings.options, 0
    facts["gap"] = gap = (
        choose_gap(_watched(source, PROBE_SIZE, tick)) if settings.gap == "auto" else settings.gap
    )

    def frames() -> Iterator[Frame]:
        for frame in _watched(source, settings.size, tick):
            facts["frames"] += 1
            yield frame

    every = gap if settings.every is None else settings.every
    # Here, too: what was read before damage must get through the groups.
    pairs = _survive(_moving(pair_frames(frames(), gap, every, skipped), skipped), problems)
    for group in _groups(pairs, 1 if device == "cpu" else _GROUP):
        first, second = (np.stack([pair[i].grey for pair in group]) for i in (0, 1))
        flows = optical_flows(first, second, method, device, **options)
        kept = []
        for i, flow in enumerate(flows):
            reason = _why_useless(first[i], second[i], flow)
            if reason is None:
                kept.append(i)
            else:
                skipped[reason] += 1
        if settings.consistency and kept:
            backward = optical_flows(second[kept], first[kept], method, device, **options)
        for j, i in enumerate(kept):
            one, other = group[i]
            key = f"{safe_name(source.name)}/{number:06d}"
            number += 1
            meta: dict[str, Any] = {
                "key": key,
                "video": source.name,
                "time": round(one.frame.time, 6),
                "gap": round(other.frame.time - one.frame.time, 6),
                "method": method,
                "size": list(one.grey.shape),
            }
            contents = [_jpeg(one.frame.image), encode_flow(flows[i], settings.codec)]
            if settings.consistency:
                valid = flow_validity(flows[i], backward[j])
                meta["consistent"] = round(float(valid.mean()), 4)
                mask = valid.astype(np.uint8) * 255
                contents.append(png(mask, [cv2.IMWRITE_PNG_BILEVEL, 1]))
            contents.append(json.dumps(meta).encode())
            names = member_names(settings.codec, settings.consistency)
            yield key, dict(zip(names, contents, strict=True)), one.thumbnail.hash


def _why_useless(first: Image, second: Image, flow: Flow) -> str | None:
    if not np.isfinite(flow).all():
        return "not_finite"
    if is_motionless(flow):
        return "static"
    return "cut" if is_cut(first, second, flow) else None


def _watched(source: Source, short_side: int, tick: Tick) -> Iterator[Frame]:
    """Read a source, with a sign of life at each frame."""
    for number, frame in enumerate(with_signs(source, tick)(short_side)):
        tick(frame.share)
        if number == 0:  # of the others only those in a pair: most are never made, see Frame
            _check_large(frame)
        yield frame


def _check_large(frame: Frame) -> None:
    height, width = frame.image.shape[:2]
    if min(height, width) < MIN_SIZE:
        raise VideoError(
            f"frames of {width} x {height} pixels: flow needs at least {MIN_SIZE} a side"
        )


def with_signs(source: Source, tick: Tick) -> Callable[[int | None], Iterator[Frame]]:
    """Return `source.frames` with a sign of life at each packet, if it is a video's."""
    frames = source.frames
    if isinstance(frames, partial) and frames.func is read_frames:
        return partial(frames, alive=tick)  # a long damaged part has no frames to tell of
    return frames


class _Picture:
    """What is made of a frame to compare it: once, though it mostly ends a pair and begins one."""

    def __init__(self, frame: Frame) -> None:
        _check_large(frame)  # it may have become smaller
        self.frame = frame
        self.grey = grey(frame.image)
        self.still = still_thumbnail(self.grey)
        self.thumbnail = Thumbnail(self.grey)


_Pair = tuple[_Picture, _Picture]


def _moving(pairs: Iterator[tuple[Frame, Frame]], skipped: Counter[str]) -> Iterator[_Pair]:
    """Leave out what shows itself to teach nothing before any flow is computed."""
    repeated = RepeatedPairs()
    b: _Picture | None = None
    for first, second in pairs:
        a = b if b is not None and b.frame is first else _Picture(first)
        b = _Picture(second)
        if is_still(a.still, b.still):
            skipped["static"] += 1
        elif repeated.seen(a.thumbnail, b.thumbnail):
            skipped["duplicate"] += 1
        else:
            yield a, b


def _groups(pairs: Iterator[_Pair], size: int) -> Iterator[list[_Pair]]:
    """Collect up to `size` pairs of one shape."""
    group: list[_Pair] = []
    for pair in pairs:
        if group and (len(group) == size or group[0][0].grey.shape != pair[0].grey.shape):
            yield group
            group = []
        group.append(pair)
    if group:
        yield group


@contextmanager
def _one_thread(method: str) -> Iterator[None]:
    """Let OpenCV and PyTorch use one thread: more gain nothing on small frames.

    The workers fill the processor already, and sums in another order would change the bytes.
    """
    # Half of the methods do without torch, and it takes a second to import.
    torch = None if method in (*OPENCV_METHODS, "farneback") else importlib.import_module("torch")
    before = cv2.getNumThreads(), torch.get_num_threads() if torch else 0
    cv2.setNumThreads(1)
    if torch:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        if torch:
            torch.set_num_threads(before[1])


def _jpeg(image: Image) -> bytes:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
