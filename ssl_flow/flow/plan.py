"""`ssl-flow flow --dry-run`: what an extraction would do, how long and how large, before it."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from . import pool
from .job import Settings, extract_source, with_signs
from .shard import finished
from .sources import Source
from .video import Frame

_SAMPLES = 12.0  # seconds spent on computing pairs at most
_ONE = 1.5  # of these, on one video


def make_plan(
    sources: Sequence[Source],
    out: str | Path,
    settings: Settings,
    workers: int = 1,
    device: str = "cpu",
    timeout: float = pool.TIMEOUT,
) -> str:
    """Say what `extract` would do, and estimate it; nothing is written to the store.

    The first pairs of some videos, a random choice, are computed for about twelve seconds, in a
    process that may hang or die. That is exact to some ten percent where the videos are alike, and
    to a factor of two where they are not.
    """
    todo = [source for source in sources if finished(Path(out), source.name) is None]
    random.Random(0).shuffle(todo)
    tried, good, begin = 0, [(0.0, 0.0, 0.0, 0, 0)], time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        job = partial(_sample, store=Path(scratch), settings=settings, device=device)
        with closing(pool.run(todo, job, 1, lambda *_: None, timeout)) as results:
            for _, result, _ in results:
                tried += 1
                good += [result] if result is not None else []
                if time.perf_counter() - begin > _SAMPLES:
                    break
    length, covered, spent, pairs, size = map(sum, zip(*good, strict=True))
    seconds = length / max(tried, 1) * len(todo)
    scale = seconds / covered if covered else 0.0
    spent_by_all = spent * scale / max(1, min(workers, os.cpu_count() or 1, len(todo)))
    lines = [
        f"{out}: {len(todo)} of {len(sources)} videos to do ({len(sources) - len(todo)} already "
        f"done), about {_hours(seconds)} of video"
    ]
    if len(good) > 1:
        lines += [
            f"about {pairs * scale:,.0f} pairs, {size * scale / 1e9:.3g} GB, "
            f"{_hours(spent_by_all)} with {workers} worker(s); estimated from {pairs} pairs of "
            f"{len(good) - 1} videos, {tried - len(good) + 1} more could not be read"
        ]
    elif todo:
        lines += ["none of those that were tried could be read: no estimate"]
    return "\n".join([*lines, "nothing was written (--dry-run)"])


def _hours(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _sample(
    source: Source, tick: pool.Tick, store: Path, settings: Settings, device: str
) -> tuple[float, float, float, int, int] | None:
    """Extract the beginning: seconds of video, of these read, spent; pairs, bytes of the tar."""
    begin, share = time.perf_counter(), 0.0
    times: list[float] = []

    def beginning(short_side: int | None) -> Iterator[Frame]:
        nonlocal share
        times.clear()  # gap "auto" looks at it first
        end = time.perf_counter() + _ONE
        for frame in with_signs(source, tick)(short_side):
            times.append(frame.time)
            share = frame.share
            yield frame
            if time.perf_counter() > end:
                return
        share = 1.0

    index, _ = extract_source(replace(source, frames=beginning), tick, store, settings, device)
    if index is None:
        return None
    covered = (times[-1] - times[0]) * len(times) / max(len(times) - 1, 1)
    length = covered / share if share else covered
    return length, covered, time.perf_counter() - begin, index["pairs"], index["tar_bytes"]
