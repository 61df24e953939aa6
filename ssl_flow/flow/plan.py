"""`ssl-flow flow --dry-run`: what an extraction would do, how long and how large, before it."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from . import pool
from .container import VideoError
from .job import Settings, extract_source, with_signs
from .shard import finished
from .sources import Source, fingerprint
from .video import Frame, read_header

_HEADERS = 5.0  # seconds spent on reading headers at most
_SAMPLES = 10.0  # seconds spent on computing pairs at most
_ONE = 2.0  # of these, on one video


@dataclass
class Plan:
    """What is to do. Video time is read from headers, the rest is estimated from a few pairs."""

    sources: int  # of this part
    already_done: int
    video_seconds: float  # of those that are not done
    pairs: float
    bytes: float
    seconds: float  # with the given number of workers
    sampled: int  # videos of which pairs were computed
    sampled_pairs: int
    unusable: int  # that were tried, too


def make_plan(
    sources: Sequence[Source],
    out: str | Path,
    settings: Settings,
    workers: int = 1,
    device: str = "cpu",
    timeout: float = pool.TIMEOUT,
) -> Plan:
    """Estimate what `extract` would do; nothing is written to the store.

    Lengths come from headers, of a random choice of videos where there are very many. Then the
    first pairs of some videos are computed, for about ten seconds. That is exact to some ten
    percent where the videos are alike, and to a factor of two where they are not. A video that is
    given up after `timeout` seconds without a packet counts as one that cannot be used.
    """
    todo = [source for source in sources if finished(Path(out), source.name) is None]
    random.Random(0).shuffle(todo)
    video_seconds = _video_seconds(todo, timeout)
    with tempfile.TemporaryDirectory() as scratch:
        job = partial(_sample, store=Path(scratch), settings=settings, device=device)
        tried = [found for _, found in _try(todo, job, _SAMPLES, timeout)]
    good = [found for found in tried if found is not None]
    spent, covered, pairs, size = (sum(column) for column in zip((0, 0, 0, 0), *good, strict=True))
    scale = video_seconds / covered if covered else 0.0
    return Plan(
        sources=len(sources),
        already_done=len(sources) - len(todo),
        unusable=len(tried) - len(good),
        video_seconds=video_seconds,
        pairs=pairs * scale,
        bytes=size * scale,
        seconds=spent * scale / max(1, min(workers, os.cpu_count() or 1, len(todo))),
        sampled=len(good),
        sampled_pairs=int(pairs),
    )


def _try(
    sources: Sequence[Source],
    job: pool.Job[Source, pool.Result],
    seconds: float,
    timeout: float,
) -> Iterator[tuple[Source, pool.Result | None]]:
    """Do a job for as many sources as there is time for, in a process that may hang or die."""
    begin = time.perf_counter()
    with closing(pool.run(sources, job, 1, lambda *_: None, timeout)) as results:
        for source, result, _ in results:
            yield source, result
            if time.perf_counter() - begin > seconds:
                return


def _video_seconds(sources: Sequence[Source], timeout: float) -> float:
    """Add up the lengths; those that no header gives are taken to be as the others, by bytes."""
    found = _try(sources, _length, _HEADERS, timeout)
    lengths = {source.name: length for source, length in found if length is not None}
    all_bytes = known_bytes = 0.0
    for source in sources:
        try:
            weight = float(fingerprint(source).bytes or 1)
        except OSError:
            continue
        all_bytes += weight
        known_bytes += weight if source.name in lengths else 0
    return sum(lengths.values()) * all_bytes / known_bytes if known_bytes else 0.0


def _length(source: Source, tick: pool.Tick) -> float | None:
    try:
        return read_header(source.path).seconds if source.path else None
    except (VideoError, OSError):
        return 0.0


def _sample(
    source: Source, tick: pool.Tick, store: Path, settings: Settings, device: str
) -> tuple[float, float, int, int] | None:
    """Extract the beginning of a source: seconds spent and of video, pairs, bytes of the tar."""
    begin = time.perf_counter()
    first = last = 0.0

    def beginning(short_side: int | None) -> Iterator[Frame]:
        nonlocal first, last
        end = time.perf_counter() + _ONE
        for number, frame in enumerate(with_signs(source, tick)(short_side)):
            first, last = frame.time if number == 0 else first, frame.time
            yield frame
            if time.perf_counter() > end:
                return

    index, _ = extract_source(replace(source, frames=beginning), tick, store, settings, device)
    if index is None:
        return None
    return time.perf_counter() - begin, last - first, index["pairs"], index["tar_bytes"]
