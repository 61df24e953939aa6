"""Videos -> a store of frame and flow pairs."""

from __future__ import annotations

import errno
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from . import pool
from .codec import CODECS
from .estimators import MIN_SIZE, Option, method_options, optical_flows
from .job import Settings, extract_source
from .shard import VERSION, StoreError, finished, own_turn, shard_path, store_lock, write_atomically
from .sources import Problem, Source, fingerprint, part_of
from .store import (
    SETTINGS_FILE,
    differing,
    is_store,
    read_settings,
    update_problems,
    write_lists,
)


class ProblemError(RuntimeError):
    """A source could not be used, or only in part, and problems were asked to be fatal."""


@dataclass
class Summary:
    """What `extract` did. Counts are of this call, except for `already_done` and `known_pairs`."""

    sources: int = 0  # given, of this part
    done: int = 0  # written by this call, with pairs or without
    already_done: int = 0  # found complete in the store
    pairs: int = 0  # written by this call
    known_pairs: int = 0  # of the sources that were already done
    skipped: Counter[str] = field(default_factory=Counter)  # pairs left out: reason -> number
    problems: list[Problem] = field(default_factory=list)
    duplicates: dict[str, str] = field(default_factory=dict)  # video -> the one it is a copy of
    bytes: int = 0  # of the shards written by this call
    seconds: float = 0.0


def extract(
    sources: Sequence[Source],
    out: str | Path,
    method: str = "dis",
    size: int = 256,
    gap: float | Literal["auto"] = 0.1,
    every: float | None = None,
    consistency: bool = False,
    workers: int = 0,
    options: Mapping[str, Option] | None = None,
    progress: bool = False,
    *,
    codec: str = "q16",
    device: str = "cpu",
    part: tuple[int, int] = (1, 1),
    engine: Literal["local", "ray"] = "local",
    strict: bool = False,
    timeout: float = pool.TIMEOUT,
    problems: Sequence[Problem] = (),
) -> Summary:
    """Compute the flow of pairs of frames and store both; repeat an interrupted call to go on.

    A source that is complete in the store is not computed again. One that cannot be read is
    reported and left out; of one that is damaged the good part is kept.

    Args:
        sources: what to read, see `find_sources`.
        out: the store's folder, made if it is not there.
        method, size, gap, every, consistency, codec, device, engine, strict, timeout: as those of
            the command `ssl-flow flow`.
        workers: number of worker processes; 0 works in this one, where a source that hangs or
            crashes ends the call. With workers, the calling script needs the usual
            `if __name__ == "__main__":`, and each `source.frames` must be picklable.
        options: of the method, see `OPTIONS`.
        progress: show a progress bar on stderr.
        part: (i, n) takes part i of n (i from 1) of the sources, see `part_of`; parts may write to
            one store at the same time, or to several that are merged later. With n > 1, manifest
            and duplicates are left for a call without `part`, or for the merge.
        problems: further problems, of `find_sources`, to be listed with those met here.

    Raises:
        ValueError: wrong method, option or number; two sources with the same name; `out` holds
            something else, or a store made with other settings, or is being written (StoreError).
        RuntimeError: OpenCV lacks the method; the first problem, if `strict` (ProblemError).
        OSError: the store cannot be written.
    """
    settings = Settings(method, dict(options or {}), size, gap, every, consistency, codec)
    settings = check_settings(settings, device)
    if workers < 0 or timeout < 0:
        raise ValueError(f"workers and timeout must be at least 0, got {workers} and {timeout}")
    double = [name for name, n in Counter(source.name for source in sources).items() if n > 1]
    if double:
        raise ValueError(f"source names must be unique, {double[0]!r} is given twice")
    sources = part_of(sources, *part)
    store = Path(out)
    start = time.perf_counter()
    job = partial(extract_source, store=store.absolute(), settings=settings, device=device)
    summary = Summary(sources=len(sources))
    try:
        is_store(store)  # raises where something else is
        store.mkdir(parents=True, exist_ok=True)
        with store_lock(store, shared=part[1] > 1):
            _open_store(store, settings)
            found: dict[str, str | None] = {}

            def note(source: str, reason: str | None) -> None:
                found[source] = reason
                if reason is not None:
                    summary.problems.append(Problem(source, reason))
                    if strict:
                        raise ProblemError(f"{source}: {reason} (problems are fatal with --strict)")

            try:
                for problem in problems:
                    note(problem.source, problem.reason)
                todo = _look_up(store, sources, summary, note)
                run = pool.run_on_ray if engine == "ray" else pool.run
                bar = Bar(todo, progress and bool(todo))
                with (
                    closing(bar.bar),
                    closing(run(list(todo), job, workers, bar.report, timeout)) as results,
                ):
                    for source, result, died in results:
                        bar.done(source)
                        index, reason = result or (None, died)
                        if index is not None:
                            summary.done += 1
                            summary.pairs += index["pairs"]
                            summary.bytes += index["tar_bytes"]
                            summary.skipped.update(index["skipped"])
                        note(source.name, reason)
            except BaseException:  # Ctrl-C too
                with suppress(OSError):  # a full disk: not in place of the first error
                    update_problems(store, found)
                raise
            update_problems(store, found)
            if part[1] == 1:  # else each of n parts would read the indexes of all
                summary.duplicates = write_lists(store)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room there" if full else "make it writable, or choose another --out"
        place = os.fspath(error.filename or store)
        raise OSError(
            f"{place} cannot be written ({error.strerror or error}): {advice}, and repeat the "
            "call; what was finished is kept"
        ) from error
    summary.seconds = time.perf_counter() - start
    return summary


class Bar:
    """A bar on stderr: work done and left by weight, videos, pairs and pairs a second.

    Videos count by their size in bytes and by how far each has been read, so that the time left is
    right for three films as it is for a thousand clips.
    """

    def __init__(self, weights: Mapping[Source, float], enabled: bool) -> None:
        """Show nothing if not `enabled`; `weights` is the size of each source."""
        from tqdm import tqdm  # here: workers do without

        self._weights = weights
        self._shares: dict[str, float] = {}
        self._done = self._pairs = 0
        self.bar = tqdm(
            total=sum(weights.values()),
            disable=not enabled,
            smoothing=0,  # the mean speed: that of the last seconds jumps from clip to clip
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            dynamic_ncols=True,
            miniters=0,
        )

    def report(self, source: Source, share: float, pairs: int) -> None:
        """Take note that `share` of a source is done, and of pairs that are new."""
        self._pairs += pairs
        known = self._shares.get(source.name, 0.0)
        self._shares[source.name] = max(share, known)
        rate = self._pairs / max(self.bar.format_dict["elapsed"], 1e-9)
        videos = f"{self._done}/{len(self._weights)} videos"
        text = f"{videos}, {self._pairs} pairs, {rate:.1f} pairs/s"
        self.bar.set_postfix_str(text, refresh=False)
        gain = max(share - known, 0.0) * self._weights[source]
        self.bar.update(min(gain, (self.bar.total or 0) - self.bar.n))  # the shares are rounded

    def done(self, source: Source) -> None:
        """Take note that nothing is left to do for a source."""
        self._done += 1
        self.report(source, 1.0, 0)


def check_settings(settings: Settings, device: str) -> Settings:
    """Complete what `extract` is called with, before any work; raises its ValueError etc."""
    method, size, gap, every = settings.method, settings.size, settings.gap, settings.every
    if isinstance(gap, str) and gap != "auto":
        raise ValueError(f"gap must be seconds or 'auto', got {gap!r}")
    if size < MIN_SIZE or (gap != "auto" and gap <= 0) or (every is not None and every < 0):
        raise ValueError(
            f"size must be at least {MIN_SIZE}, gap above 0, every at least 0; "
            f"got size {size}, gap {gap}, every {every}"
        )
    if settings.codec not in CODECS:
        raise ValueError(f"unknown codec {settings.codec!r}; known: {', '.join(CODECS)}")
    if gap != "auto":
        gap = float(gap)
        every = gap if every is None else float(every)
    if method == "farneback" and device != "cpu":
        method = "farneback-torch"  # in a store "farneback" is OpenCV's: never both in one
    options = method_options(method, settings.options)
    # One small pair up front: a value or a library that is wrong must not fail once a video.
    blank = np.zeros((1, 128, 128), np.uint8)
    try:
        optical_flows(blank, blank, method, device, **options)
    except (cv2.error, TypeError) as error:
        raise ValueError(f"{method} refuses the options {options}: {error}") from error
    return replace(settings, method=method, options=options, gap=gap, every=every)


def _open_store(store: Path, settings: Settings) -> None:
    """Make the store, or check that the one that is there was made with the same settings."""
    wanted: dict[str, Any] = {"version": VERSION, **asdict(settings)}
    with own_turn(store):
        if not is_store(store):
            write_atomically(store / SETTINGS_FILE, json.dumps(wanted, indent=2).encode())
    found = read_settings(store)
    if key := differing(wanted, found):
        raise StoreError(
            f"{store} was made with {key} = {found.get(key)!r}, now {wanted.get(key)!r} is asked "
            "for: one store has one setting; choose another --out, or delete the store"
        )


def _look_up(
    store: Path,
    sources: Sequence[Source],
    summary: Summary,
    note: Callable[[str, str | None], None],
) -> dict[Source, float]:
    """Return what is not done yet, with its weight (bytes) for the progress bar."""
    todo = {}
    for source in sources:
        try:
            now = size, files = fingerprint(source)
        except OSError as error:
            note(source.name, f"cannot be reached: {error.strerror}")
            continue
        index = finished(store, source.name)
        if index is None:
            todo[source] = float(size or 1)
        # Stores of version 1 do not say what image folders held.
        elif (index.get("source_bytes") or size, index.get("source_files") or files) != now:
            shard = shard_path(store, source.name)
            note(source.name, f"it has changed since {shard} was made: delete that to redo")
        else:
            summary.already_done += 1
            summary.known_pairs += index["pairs"]
            note(source.name, index["problem"])
    return todo
