"""Videos -> a store of frame and flow pairs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from .estimators import MIN_SIZE, Option, method_options, optical_flow
from .job import Settings, extract_source, source_bytes
from .pool import Bar, run
from .shard import (
    VERSION,
    StoreError,
    check_size,
    index_path,
    read_index,
    shard_path,
    write_atomically,
)
from .sources import Problem, Source
from .store import SETTINGS_FILE, read_settings

PROBLEMS_FILE = "problems.jsonl"


@dataclass
class Summary:
    """What `extract` did. Counts are of this call, except for `already_done` and `known_pairs`."""

    sources: int = 0  # given
    done: int = 0  # written by this call, with pairs or without
    already_done: int = 0  # found complete in the store
    pairs: int = 0  # written by this call
    known_pairs: int = 0  # of the sources that were already done
    skipped: Counter[str] = field(default_factory=Counter)  # pairs left out: reason -> number
    problems: list[Problem] = field(default_factory=list)
    bytes: int = 0  # of the shards written
    seconds: float = 0.0


def extract(
    sources: Sequence[Source],
    out: str | Path,
    method: str = "dis",
    size: int = 256,
    gap: float = 0.1,
    every: float | None = None,
    consistency: bool = False,
    workers: int = 1,
    options: dict[str, Option] | None = None,
    progress: bool = False,
) -> Summary:
    """Compute the flow of pairs of frames and store both.

    A source that is complete in the store is not computed again: an interrupted call is continued
    by repeating it. A source that cannot be read is reported and left out; of one that is damaged
    the good part is kept.

    Args:
        sources: what to read, see `find_sources`.
        out: the store's folder, made if it is not there.
        method: "dis" (accurate and fast, hence the default), "farneback" or "tvl1".
        size: frames are shrunk to this shorter side in pixels before the flow is computed; frames
            and flow are stored at that size. Smaller videos keep theirs.
        gap: seconds between the two frames of a pair. At 0.1 most objects move by 1 to 10 pixels,
            where the methods are accurate; one frame at 10 frames a second, three at 30.
        every: seconds between the starts of two pairs; None: as `gap`, pairs then follow each other
            without overlap.
        consistency: also compute the backward flow (twice the time) and store where both agree.
        workers: number of processes. With more than one, the calling script needs the usual
            `if __name__ == "__main__":`, and each `source.frames` must be picklable.
        options: of the method, see `OPTIONS`.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: wrong method, option or number; two sources with the same name.
        RuntimeError: the method is not available in the installed OpenCV.
        StoreError: `out` holds something else, or a store made with other settings.
        OSError: the store cannot be written.
    """
    if size < MIN_SIZE or gap <= 0 or workers < 1 or (every is not None and every < 0):
        raise ValueError(
            f"size must be at least {MIN_SIZE}, gap above 0, every at least 0, workers at least 1; "
            f"got size {size}, gap {gap}, every {every}, workers {workers}"
        )
    double = [name for name, n in Counter(source.name for source in sources).items() if n > 1]
    if double:
        raise ValueError(f"source names must be unique, {double[0]!r} is given twice")
    every = gap if every is None else every
    settings = Settings(
        method, method_options(method, options or {}), size, float(gap), float(every), consistency
    )
    # One small pair up front: a value or a library that is wrong must not fail once a video.
    blank = np.zeros((64, 64), np.uint8)
    try:
        optical_flow(blank, blank, method, **settings.options)
    except (cv2.error, TypeError) as error:
        raise ValueError(f"{method} refuses the options {settings.options}: {error}") from error

    store = Path(out)
    _open_store(store, settings)
    start = time.perf_counter()
    summary = Summary(sources=len(sources))
    todo = []
    for source in sources:
        index = _finished(store, source)
        if index is None:
            todo.append(source)
        elif index["source_bytes"] != source_bytes(source):
            shard = shard_path(store, source.name)
            reason = f"the file has changed since {shard} was made: delete that to redo it"
            summary.problems.append(Problem(source.name, reason))
        else:
            summary.already_done += 1
            summary.known_pairs += index["pairs"]
    workers = min(workers, len(todo))
    job = partial(extract_source, store=store, settings=settings)
    with Bar(len(todo), enabled=progress and bool(todo)) as bar:
        for source, result, died in run(todo, job, workers, bar.pairs):
            bar.source_done()
            index, problem = result or (None, died)
            if problem is not None:
                summary.problems.append(Problem(source.name, problem))
            if index is not None:
                summary.done += 1
                summary.pairs += index["pairs"]
                summary.bytes += index["tar_bytes"]
                summary.skipped.update(index["skipped"])
    record_problems(store, summary.problems)
    summary.seconds = time.perf_counter() - start
    return summary


def record_problems(store: Path, problems: Sequence[Problem]) -> None:
    """Append problems to the store's problems.jsonl, each once only."""
    file = store / PROBLEMS_FILE
    known = set(file.read_text(encoding="utf-8").splitlines()) if file.exists() else set()
    lines = [json.dumps(asdict(problem)) for problem in problems]
    new = [line for line in dict.fromkeys(lines) if line not in known]
    if new:
        with file.open("a", encoding="utf-8") as out:
            out.write("\n".join(new) + "\n")


def _open_store(store: Path, settings: Settings) -> None:
    """Make the store, or check that the one that is there was made with the same settings."""
    wanted = {"version": VERSION, **asdict(settings)}
    if not (store / SETTINGS_FILE).exists():
        if store.exists() and (not store.is_dir() or any(store.iterdir())):
            raise StoreError(f"{store} exists and is no flow store: choose another folder")
        store.mkdir(parents=True, exist_ok=True)
        write_atomically(store / SETTINGS_FILE, json.dumps(wanted, indent=2).encode())
    found = read_settings(store)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise StoreError(
                f"{store} was made with {key} = {found.get(key)!r}, now {value!r} is asked for: "
                "one store has one setting; choose another --out, or delete the store"
            )


def _finished(store: Path, source: Source) -> dict[str, Any] | None:
    """Return the index of a source that is complete in the store, else None."""
    file = index_path(store, source.name)
    if not file.exists():
        return None
    try:
        index = read_index(file)
        check_size(store, index)
    except StoreError:
        return None  # damaged: computed again
    return index
