"""What is done with one source: frames -> pairs -> flow -> a shard."""

from __future__ import annotations

import errno
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from .codec import encode_flow, png
from .container import VideoError
from .duplicates import RepeatedPairs, Thumbnail
from .estimators import MIN_SIZE, Option, flow_validity, grey, optical_flow, optical_flows
from .gap import PROBE_SIZE, choose_gap
from .pairs import is_cut, is_motionless, is_still, pair_frames, still_thumbnail
from .pool import Tick
from .shard import BusyError, ShardWriter, finished, index_path, member_names, safe_name
from .sources import Source, fingerprint
from .video import Frame, read_frames

Flow = NDArray[np.float32]  # (H, W, 2)

_JPEG_QUALITY = 92
_GROUP = 32  # pairs at once on a GPU
# What the name of a source can do to its place in the store; all else is wrong with the store.
_NAME_ERRORS = (
    errno.ENAMETOOLONG,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EILSEQ,
    errno.EINVAL,
)


@dataclass(frozen=True)
class Settings:
    """What all pairs of a store have in common; `extract` explains each."""

    method: str
    options: dict[str, Option]
    size: int
    gap: float | Literal["auto"]
    every: float | None  # None: as the gap of the video
    consistency: bool
    codec: str = "q16"


def extract_source(
    source: Source, tick: Tick, store: Path, settings: Settings, device: str = "cpu"
) -> tuple[dict[str, Any] | None, str | None]:
    """Write one source's shard; return its index (None: nothing was stored) and the problem."""
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    problems: list[str] = []
    hashes: list[str] = []
    try:
        before = fingerprint(source)
    except OSError as error:
        return None, f"cannot be reached: {error.strerror}"
    try:
        writer = ShardWriter(store, source.name)
    except BusyError as error:
        return None, str(error)
    except OSError as error:
        if error.errno in _NAME_ERRORS:
            return None, f"its name cannot be stored: {error.strerror}"
        raise
    with writer, one_thread(settings.method):
        index = finished(store, source.name)
        if index is not None:  # by another call, since this one looked
            return index, index["problem"]
        # A damaged one, which would be met if the source cannot be read any more.
        index_path(store, source.name).unlink(missing_ok=True)

        def frames() -> Iterator[Frame]:
            for frame in _watched(source, settings.size, tick):
                counts["frames"] += 1
                yield frame

        try:
            gap = settings.gap
            if gap == "auto":
                with _passing():
                    gap = choose_gap(_watched(source, PROBE_SIZE, tick))
            every = gap if settings.every is None else settings.every
            pairs = pair_frames(frames(), gap, every, skipped)
            samples = make_samples(source.name, pairs, settings, skipped, device)
            for key, members, picture in _survive(samples, problems):
                writer.add(key, members)
                hashes.append(f"{picture:016x}")
                counts["pairs"] += 1
                tick(pairs=1)
        except _Passing as error:
            return None, f"{error}: not stored, repeat the call"
        if counts["frames"] == 0:
            return None, "; ".join(problems) or "no frame could be read"
        try:
            changed = fingerprint(source) != before
        except OSError:
            changed = True
        if changed:
            return None, "it was changed while it was read: not stored, repeat the call"
        if counts["pairs"] == 0 and not problems:
            problems.append(_why_no_pair(counts["frames"], skipped, gap))
        facts: dict[str, Any] = {
            "frames": counts["frames"],
            "skipped": dict(sorted(skipped.items())),
            "problem": "; ".join(problems) or None,
            "source_bytes": before.bytes,
            "source_files": before.files,
            "hashes": hashes,
        }
        if settings.gap == "auto":
            facts["gap"] = gap
        index = writer.commit(facts)
    return index, index["problem"]


def _watched(source: Source, short_side: int, tick: Tick) -> Iterator[Frame]:
    """Read a source, with a sign of life at each frame."""
    for number, frame in enumerate(with_signs(source, tick)(short_side)):
        tick(frame.share)
        if number == 0:  # of the others only those in a pair: most are never made, see Frame
            _check_large(frame)
        yield frame


def with_signs(source: Source, tick: Tick) -> Callable[[int | None], Iterator[Frame]]:
    """Return `source.frames` with a sign of life at each packet, if it is a video's."""
    frames = source.frames
    if isinstance(frames, partial) and frames.func is read_frames:
        return partial(frames, alive=tick)  # a long damaged part has no frames to tell of
    return frames


def _check_large(frame: Frame) -> None:
    height, width = frame.image.shape[:2]
    if min(height, width) < MIN_SIZE:
        raise VideoError(
            f"frames of {width} x {height} pixels: flow needs at least {MIN_SIZE} a side"
        )


def make_samples(
    name: str,
    pairs: Iterator[tuple[Frame, Frame]],
    settings: Settings,
    skipped: Counter[str],
    device: str = "cpu",
) -> Iterator[tuple[str, dict[str, bytes], int]]:
    """Yield key, members and `frame_hash` of each pair worth keeping; count the others."""
    names = member_names(settings.codec, settings.consistency)
    number = 0
    for one, other, flow, backward in _flows(pairs, settings, skipped, device):
        if not np.isfinite(flow).all():
            skipped["not_finite"] += 1
            continue
        if is_motionless(flow):
            skipped["static"] += 1
            continue
        valid = flow_validity(flow)
        if is_cut(one.grey, other.grey, flow, valid):
            skipped["cut"] += 1
            continue
        key = f"{safe_name(name)}/{number:06d}"
        meta: dict[str, Any] = {
            "key": key,
            "video": name,
            "time": round(one.frame.time, 6),
            "gap": round(other.frame.time - one.frame.time, 6),
            "method": settings.method,
            "size": list(flow.shape[:2]),
        }
        contents = [_jpeg(one.frame.image), encode_flow(flow, settings.codec)]
        if settings.consistency:
            if backward is None:
                backward = optical_flow(other.grey, one.grey, settings.method, **settings.options)
            valid = flow_validity(flow, backward)
            meta["consistent"] = round(float(valid.mean()), 4)
            mask = valid.astype(np.uint8) * 255
            contents.append(png(mask, [cv2.IMWRITE_PNG_BILEVEL, 1]))
        contents.append(json.dumps(meta).encode())
        number += 1
        yield key, dict(zip(names, contents, strict=True)), one.thumbnail.hash


class _Picture:
    """What is made of a frame to compare it: once, though it mostly ends a pair and begins one."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.grey = grey(frame.image)
        self.still = still_thumbnail(self.grey)
        self.thumbnail = Thumbnail(self.grey)


_Pair = tuple[_Picture, _Picture]


def _flows(
    pairs: Iterator[tuple[Frame, Frame]], settings: Settings, skipped: Counter[str], device: str
) -> Iterator[tuple[_Picture, _Picture, Flow, Flow | None]]:
    """Yield both pictures and the flow of each pair that is not still.

    The backward flow comes with it if it is wanted, on a GPU; elsewhere it is left for the pairs
    that are kept.
    """
    method, options = settings.method, settings.options
    for group in _groups(_moving(pairs, skipped), 1 if device == "cpu" else _GROUP):
        if device == "cpu":
            for a, b in group:
                yield a, b, optical_flow(a.grey, b.grey, method, **options), None
            continue
        prev, next = (np.stack([pair[i].grey for pair in group]) for i in (0, 1))
        forward = optical_flows(prev, next, method, device, **options)
        backward: list[Flow | None] = [None] * len(group)
        if settings.consistency:
            backward = list(optical_flows(next, prev, method, device, **options))
        for pair, there, back in zip(group, forward, backward, strict=True):
            yield (*pair, there, back)


def _moving(pairs: Iterator[tuple[Frame, Frame]], skipped: Counter[str]) -> Iterator[_Pair]:
    """Leave out what shows itself to teach nothing before any flow is computed."""
    repeated = RepeatedPairs()
    b: _Picture | None = None
    for first, second in pairs:
        _check_large(first)
        a = b if b is not None and b.frame is first else _Picture(first)
        b = _Picture(second)
        if is_still(a.still, b.still):
            skipped["static"] += 1
        elif repeated.seen(a.thumbnail, b.thumbnail):
            skipped["duplicate"] += 1
        else:
            yield a, b


def _groups(pairs: Iterator[_Pair], size: int) -> Iterator[list[_Pair]]:
    """Collect up to `size` pairs of one shape; those before an error come before it."""
    group: list[_Pair] = []
    try:
        for pair in pairs:
            if group and group[0][0].grey.shape != pair[0].grey.shape:
                yield group
                group = []
            group.append(pair)
            if len(group) == size:
                yield group
                group = []
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group


@contextmanager
def one_thread(method: str) -> Iterator[None]:
    """Let OpenCV and PyTorch use one thread: more gain nothing on small frames.

    The workers fill the processor already, and sums in another order would change the bytes.
    """
    if method in ("tvl1", "farneback-torch", "raft"):
        importlib.import_module("torch")  # before the method does, while it may still be told
    torch = sys.modules.get("torch")  # not imported for this: half of the methods do without
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


def _survive(samples: Iterator[Any], problems: list[str]) -> Iterator[Any]:
    """Turn whatever a stranger's file makes go wrong into a problem of that file alone."""
    try:
        with _passing():
            yield from samples
    except (ImportError, _Passing):
        raise  # a missing library is no fault of the file
    except Exception as error:
        problems.append(str(error) or type(error).__name__)


class _Passing(Exception):
    """What may be over the next time (no memory, a sick GPU, a lost disk): nothing is stored."""


@contextmanager
def _passing() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        raise _Passing(f"{type(error).__name__}: {error}") from error


def _why_no_pair(frames: int, skipped: Counter[str], gap: float) -> str:
    if skipped:
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items()))
        advice = ": frames are too far apart in time, try a larger gap" if skipped["hole"] else ""
        return f"no usable pair in {frames} frames ({reasons}){advice}"
    return f"no two frames {gap:g} s apart in {frames} frame(s)"


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
