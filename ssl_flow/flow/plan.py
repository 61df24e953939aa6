"""`ssl-flow flow --dry-run`: what an extraction would do, how long and how large, before it."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .extract import finished
from .gap import PROBE_SIZE, choose_gap
from .job import Settings, make_samples, one_thread
from .pairs import pair_frames
from .sources import Source, fingerprint
from .video import Frame, VideoError, read_header

_HEADERS = 5.0  # seconds spent on reading headers at most
_SAMPLES = 10.0  # seconds spent on computing pairs at most
_ONE = 2.0  # of these, on one video
_BLOCK = 512  # of a tar


@dataclass
class Plan:
    """What is to do. Video time is read from headers, the rest is estimated from a few pairs."""

    sources: int  # of this part
    already_done: int
    unusable: int  # of the sampled ones
    video_seconds: float  # of those that are not done
    pairs: float
    bytes: float
    seconds: float  # with the given number of workers
    sampled: int  # videos of which pairs were computed
    sampled_pairs: int


def make_plan(
    sources: Sequence[Source],
    out: str | Path,
    settings: Settings,
    workers: int = 1,
    device: str = "cpu",
    seconds: float = _SAMPLES,
) -> Plan:
    """Estimate what `extract` would do; nothing is written.

    Lengths come from headers, of a random choice of videos where there are very many. Then the
    first pairs of some videos are computed, for as long as `seconds`. That is exact to some ten
    percent where the videos are alike, and to a factor of two where they are not.
    """
    todo = [source for source in sources if finished(Path(out), source) is None]
    random.Random(0).shuffle(todo)
    video_seconds = _video_seconds(todo)
    spent = covered = size = 0.0
    pairs = sampled = unusable = 0
    begin = time.perf_counter()
    for source in todo:
        left = seconds - (time.perf_counter() - begin)
        if left <= 0:
            break
        try:
            one = _sample(source, settings, min(left, _ONE), device)
        except (VideoError, OSError):
            unusable += 1
            continue
        sampled += 1
        spent, covered = spent + one[0], covered + one[1]
        pairs, size = pairs + one[2], size + one[3]
    scale = video_seconds / covered if covered else 0.0
    together = max(1, min(workers, os.cpu_count() or 1, len(todo)))
    return Plan(
        sources=len(sources),
        already_done=len(sources) - len(todo),
        unusable=unusable,
        video_seconds=video_seconds,
        pairs=pairs * scale,
        bytes=size * scale,
        seconds=spent * scale / together,
        sampled=sampled,
        sampled_pairs=pairs,
    )


def _video_seconds(sources: Sequence[Source]) -> float:
    """Add up the lengths; those that no header gives are taken to be as the others, by bytes."""
    known_seconds = known_bytes = 0.0
    unknown: list[float] = []
    begin = time.perf_counter()
    for source in sources:
        length: float | None = None
        try:
            weight = float(fingerprint(source).bytes or 1)
            if source.path is not None and time.perf_counter() - begin < _HEADERS:
                length = read_header(source.path).seconds
        except (VideoError, OSError):
            continue
        if length is None:
            unknown.append(weight)
        else:
            known_seconds, known_bytes = known_seconds + length, known_bytes + weight
    if not known_bytes:
        return 0.0
    return known_seconds * (1 + sum(unknown) / known_bytes)


def _sample(
    source: Source, settings: Settings, limit: float, device: str
) -> tuple[float, float, int, float]:
    """Compute pairs for `limit` seconds: seconds spent and of video, pairs, bytes in the tar."""
    begin = time.perf_counter()
    first: float | None = None
    last = 0.0

    def frames(short_side: int) -> Iterator[Frame]:
        nonlocal first, last
        for frame in source.frames(short_side):
            first = frame.time if first is None else first
            last = frame.time
            yield frame
            if time.perf_counter() - begin > limit:
                return

    with one_thread(settings.method):
        gap = settings.gap
        if gap == "auto":
            gap = choose_gap(source.frames(PROBE_SIZE))
        every = gap if settings.every is None else settings.every
        pairs, size = 0, 0.0
        skipped: Counter[str] = Counter()
        found = pair_frames(frames(settings.size), gap, every, skipped)
        for _, members, _ in make_samples(source.name, found, settings, skipped, device):
            pairs += 1
            size += sum(_BLOCK + _BLOCK * -(-len(data) // _BLOCK) for data in members.values())
    return time.perf_counter() - begin, last - (first or 0.0), pairs, size
