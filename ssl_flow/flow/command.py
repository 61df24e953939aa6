"""The command `ssl-flow flow`: from videos to a store of flow."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from .estimators import Option
from .extract import Summary, extract, record_problems
from .sources import find_sources
from .store import FlowStore


@dataclass
class FlowCommand:
    """Compute the optical flow of videos and store the pairs of frame and flow."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Video files, folders to search for videos, folders of images."""
    out: Path
    """Folder of the store. An interrupted call is continued by repeating it."""
    method: Literal["dis", "farneback", "tvl1"] = "dis"
    """dis: fast and accurate. farneback: the classic. tvl1: the most accurate, slow."""
    option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An option of the method as NAME=VALUE, e.g. preset=fast; may be repeated."""
    size: int = 256
    """Shorter side in pixels of the frames and the flow."""
    gap: float = 0.1
    """Seconds between the two frames of a pair."""
    every: float | None = None
    """Seconds between the starts of two pairs; None: as the gap, so that pairs do not overlap."""
    consistency: bool = False
    """Also compute the backward flow (twice the time) and store where both agree."""
    workers: int = 2
    """Number of processes."""


def flow_command(argv: Sequence[str]) -> int:
    """Run `ssl-flow flow` with the arguments that follow these two words.

    Returns:
        The exit code: 0, also if some videos could not be used (they are named); 1 if the store
        holds no pair at the end; 2 if the call was wrong.

    Raises:
        SystemExit: by the parser: 0 after --help, 2 for a wrong flag.
    """
    command = tyro.cli(FlowCommand, args=list(argv), prog="ssl-flow flow")
    try:
        sources, problems = find_sources(command.paths)
        summary = extract(
            sources,
            command.out,
            method=command.method,
            options=dict(_parse_option(text) for text in command.option),
            size=command.size,
            gap=command.gap,
            every=command.every,
            consistency=command.consistency,
            workers=command.workers,
            progress=True,
        )
        record_problems(command.out, problems)
        summary.problems[:0] = problems
        _print_summary(summary, command.out)
        empty = summary.pairs + summary.known_pairs == 0 and len(FlowStore(command.out)) == 0
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"ssl-flow flow: error: {error}", file=sys.stderr)
        return 2
    if empty:
        print(f"ssl-flow flow: error: {command.out} holds no pair", file=sys.stderr)
    return int(empty)


def _parse_option(text: str) -> tuple[str, Option]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option expects NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word, such as "fast"


def _print_summary(summary: Summary, out: Path) -> None:
    for problem in summary.problems:
        print(f"problem: {problem.source}: {problem.reason}")
    if summary.done == 0 and summary.already_done > 0:
        print("nothing to do: every usable video is already in the store")
    skipped = ", ".join(f"{number} {reason}" for reason, number in sorted(summary.skipped.items()))
    print(
        f"{out}: {summary.done} videos done, {summary.already_done} already done, "
        f"{len(summary.problems)} problems\n"
        f"{summary.pairs} pairs written in {summary.seconds:.1f} s"
        + (f" ({summary.pairs / summary.seconds:.1f} pairs/s" if summary.pairs else "")
        + (f", {summary.bytes / summary.pairs / 1000:.1f} kB a pair)" if summary.pairs else "")
        + f"; skipped: {skipped or 'none'}"
    )
