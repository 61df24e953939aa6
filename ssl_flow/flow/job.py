"""What is done with one source: frames -> pairs -> flow -> a shard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .codec import encode_flow, png
from .estimators import Option, flow_validity, grey, optical_flow
from .pairs import is_cut, is_motionless, is_still, pair_frames
from .shard import ShardWriter
from .sources import Source
from .video import Frame

_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Settings:
    """What all pairs of a store have in common; `extract` explains each."""

    method: str
    options: dict[str, Option]
    size: int
    gap: float
    every: float
    consistency: bool


def source_bytes(source: Source) -> int | None:
    """Return the size of the source's file; None if it is no single file."""
    return source.path.stat().st_size if source.path and source.path.is_file() else None


def extract_source(
    source: Source, tick: Callable[[], None], store: Path, settings: Settings
) -> tuple[dict[str, Any] | None, str | None]:
    """Write one source's shard; return its index (None: nothing could be read) and the problem."""
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    problems: list[str] = []
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # more threads gain nothing on small frames, workers fill the processor
    try:
        with ShardWriter(store, source.name) as writer:
            samples = _samples(source, settings, counts, skipped)
            for key, members in _survive(samples, problems):
                writer.add(key, members)
                tick()
            if counts["frames"] == 0:
                return None, "; ".join(problems) or "no frame could be read"
            if counts["pairs"] == 0 and not problems:
                problems.append(_why_no_pair(counts["frames"], skipped, settings.gap))
            facts = {
                "frames": counts["frames"],
                "skipped": dict(sorted(skipped.items())),
                "problem": "; ".join(problems) or None,
                "source_bytes": source_bytes(source),
            }
            index = writer.commit(facts)
    finally:
        cv2.setNumThreads(threads)
    return index, index["problem"]


def _samples(
    source: Source, settings: Settings, counts: Counter[str], skipped: Counter[str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members of each pair worth keeping."""

    def counted() -> Iterator[Frame]:
        for frame in source.frames(settings.size):
            counts["frames"] += 1
            yield frame

    for first, second in pair_frames(counted(), settings.gap, settings.every, skipped):
        a, b = (grey(frame.image) for frame in (first, second))
        if is_still(a, b):
            skipped["static"] += 1
            continue
        flow = optical_flow(a, b, settings.method, **settings.options)
        valid = flow_validity(flow)
        if is_motionless(flow):
            skipped["static"] += 1
            continue
        if not np.isfinite(flow).all():
            skipped["not_finite"] += 1
            continue
        if is_cut(a, b, flow, valid):
            skipped["cut"] += 1
            continue
        key = f"{source.name}/{counts['pairs']:06d}"
        meta: dict[str, Any] = {
            "key": key,
            "video": source.name,
            "time": round(first.time, 6),
            "gap": round(second.time - first.time, 6),
            "method": settings.method,
            "size": list(flow.shape[:2]),
        }
        members = {"jpg": _jpeg(first.image), "flow.png": encode_flow(flow)}
        if settings.consistency:
            backward = optical_flow(b, a, settings.method, **settings.options)
            valid = flow_validity(flow, backward)
            meta["consistent"] = round(float(valid.mean()), 4)
            mask = valid.astype(np.uint8) * 255
            members["valid.png"] = png(mask, [cv2.IMWRITE_PNG_BILEVEL, 1])
        members["json"] = json.dumps(meta).encode()
        counts["pairs"] += 1
        yield key, members


def _survive(samples: Iterator[Any], problems: list[str]) -> Iterator[Any]:
    """Turn whatever a stranger's file makes go wrong into a problem of that file alone."""
    try:
        yield from samples
    except ImportError:
        raise  # a missing library is no fault of the file
    except Exception as error:
        problems.append(str(error) or type(error).__name__)


def _why_no_pair(frames: int, skipped: Counter[str], gap: float) -> str:
    if skipped:
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items()))
        advice = ": frames are too far apart in time, try a larger gap" if skipped["hole"] else ""
        return f"no usable pair in {frames} frames ({reasons}){advice}"
    return f"no two frames {gap:g} s apart in {frames} frame(s)"


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
