"""The command `ssl-flow flow`: from videos to a store of flow, or what that would be."""

from __future__ import annotations

import ast
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import tyro

from . import pool
from .estimators import OPTIONS, Option
from .extract import ProblemError, Summary, check_settings, extract
from .job import Settings, extract_source, with_signs
from .shard import finished
from .sources import Source, find_sources, part_of
from .store import DUPLICATES_FILE, PROBLEMS_FILE, FlowStore
from .video import Frame

_NAMED = 50  # problems that are printed
_SAMPLES = 12.0  # seconds that a dry run spends on computing pairs at most
_ONE = 1.5  # of these, on one video


@dataclass
class FlowCommand:
    """Compute the optical flow of videos and store the pairs of frame and flow."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Video files, folders to search for videos, folders of images."""
    out: Path
    """Folder of the store. An interrupted call is continued by repeating it."""
    method: Annotated[str, tyro.conf.arg(metavar="|".join(OPTIONS))] = "dis"
    """dis: fast and accurate. tvl1: the most accurate, slower. farneback: the classic."""
    option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An option of the method as NAME=VALUE, e.g. preset=fast; may be repeated."""
    size: int = 256
    """Shorter side in pixels of the frames and the flow."""
    gap: float | Literal["auto"] = 0.1
    """Seconds between the two frames of a pair; auto: chosen for each video by its motion."""
    every: float | None = None
    """Seconds between the starts of two pairs; None: as the gap, so that pairs do not overlap."""
    consistency: bool = False
    """Also compute the backward flow (twice the time) and store where both agree."""
    codec: Literal["q16", "png"] = "q16"
    """How flow is stored. q16: the smallest. png: KITTI's, which other tools read."""
    workers: int = 2
    """Number of processes."""
    device: str = "cpu"
    """Where flow is computed: cpu, or cuda for tvl1, farneback and raft."""
    shard: str = "1/1"
    """i/n: only part i of n (i from 1) of the videos, for job arrays. Parts may write to one store
    at once (at the end, repeat the command without --shard: it does what a killed part left, and
    writes manifest and duplicates), or to several for `ssl-flow merge-flow`."""
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine. ray: tasks of Ray, on one machine or a cluster."""
    strict: bool = False
    """Stop at the first video that cannot be used completely, with exit code 1."""
    timeout: float = pool.TIMEOUT
    """Seconds in which not even a damaged packet is read, and no pair made, after which a video is
    given up; 0: never."""
    dry_run: bool = False
    """Only say what there is to do, how long it would take and how large the store would be."""


def flow_command(argv: Sequence[str]) -> int:
    """Run `ssl-flow flow`; returns the exit code, see docs/store.md."""
    command = tyro.cli(FlowCommand, args=list(argv), prog="ssl-flow flow")

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, interrupt)  # ends the call as Ctrl-C does
    try:
        return _run(command)
    except KeyboardInterrupt as interruption:
        kept = "videos that were finished are kept, repeat the call to go on"
        _say(f"ssl-flow flow: stopped; {kept}", error=True)
        return 128 + (interruption.args[0] if interruption.args else signal.SIGINT)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        _say(f"ssl-flow flow: error: {error}", error=True)
        return 1 if isinstance(error, ProblemError) else 2
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: FlowCommand) -> int:
    if command.workers < 1 or command.timeout < 0:
        raise ValueError(
            f"--workers must be at least 1, --timeout 0; got {command.workers}, {command.timeout:g}"
        )
    number, slash, count = command.shard.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(
            f"--shard expects i/n with i from 1 to n, such as 2/8, got {command.shard!r}"
        )
    part = int(number), int(count)
    sources, problems = find_sources(command.paths)
    options = dict(_parse_option(text) for text in command.option)
    chosen: dict[str, Any] = {
        field.name: getattr(command, field.name, options) for field in fields(Settings)
    }
    how: dict[str, Any] = {key: getattr(command, key) for key in ("workers", "device", "timeout")}
    if command.dry_run:
        settings = check_settings(Settings(**chosen), command.device)
        _say(make_plan(part_of(sources, *part), command.out, settings, **how))
        return 0
    summary = extract(
        sources,
        command.out,
        **chosen,
        **how,
        part=part,
        engine=command.engine,
        strict=command.strict,
        problems=problems if part[0] == 1 else (),  # else each part would name them
        progress=True,
    )
    _print_summary(summary, command.out)
    if part[1] > 1:
        last = "the same command without --shard, or merge-flow for stores of their own"
        _say(f"manifest and duplicates are written when all parts are done, by {last}")
    elif summary.pairs + summary.known_pairs == 0 and len(FlowStore(command.out)) == 0:
        _say(f"ssl-flow flow: error: {command.out} holds no pair", error=True)
        return 1
    return 0


def _parse_option(text: str) -> tuple[str, Option]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option expects NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word, such as "fast"


def _print_summary(summary: Summary, out: Path) -> None:
    for problem in summary.problems[:_NAMED]:
        _say(f"problem: {problem.source}: {problem.reason}")
    if len(summary.problems) > _NAMED:
        _say(f"and {len(summary.problems) - _NAMED} more problems, see {out / PROBLEMS_FILE}")
    if summary.done == 0 and summary.already_done > 0:
        _say("nothing to do: every usable video is already in the store")
    if summary.duplicates:
        _say(f"{len(summary.duplicates)} videos are copies of others, see {out / DUPLICATES_FILE}")
    pairs, seconds, rate = summary.pairs, summary.seconds, ""
    if pairs:
        rate = f" ({pairs / seconds:.1f} pairs/s, {summary.bytes / pairs / 1000:.1f} kB a pair)"
    skipped = ", ".join(f"{number} {reason}" for reason, number in sorted(summary.skipped.items()))
    _say(
        f"{out}: {summary.done} videos done, {summary.already_done} already done, "
        f"{len(summary.problems)} problems\n"
        f"{pairs} pairs written in {seconds:.1f} s{rate}; skipped: {skipped or 'none'}"
    )


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


def _say(text: str, error: bool = False) -> None:
    """Print, whatever bytes the name of a file has and whatever the terminal can show."""
    file = sys.stderr if error else sys.stdout
    encoding = file.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file)
