"""STORE/problems.jsonl: which sources could not be used, or only in part, and why."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from .shard import replacing
from .sources import Problem

PROBLEMS_FILE = "problems.jsonl"
_SAVE = 10.0  # seconds between two savings; what a killed call did not save is found again


class ProblemError(RuntimeError):
    """A source could not be used, or only in part, and problems were asked to be fatal."""


class ProblemList:
    """The problems of one call, put in place of what the file said about the same sources."""

    def __init__(self, store: Path, strict: bool) -> None:
        """Start with nothing; if `strict`, the first problem raises `ProblemError`."""
        self._file = store / PROBLEMS_FILE
        self._strict = strict
        self._found: dict[str, str | None] = {}
        self._saved = time.monotonic()
        self.problems: list[Problem] = []

    def note(self, source: str, reason: str | None) -> None:
        """Take note of what is wrong with a source; None: nothing.

        Raises:
            ProblemError: the first problem, if they are to be fatal.
        """
        self._found[source] = reason
        if reason is not None:
            self.problems.append(Problem(source, reason))
            if self._strict:
                raise ProblemError(f"{source}: {reason} (problems are fatal with --strict)")
        if time.monotonic() - self._saved > _SAVE:
            self.save()

    def save(self) -> None:
        """Bring the file up to date: one line a source, in the order of their names.

        Raises:
            OSError: it cannot be written.
        """
        self._saved = time.monotonic()
        if not self.problems and not self._file.exists():
            return
        with replacing(self._file) as file:  # locked: another call may write its own problems
            rows = {problem.source: problem for problem in read_problems(self._file)}
            for source, reason in self._found.items():
                rows.pop(source, None)
                if reason is not None:
                    rows[source] = Problem(source, reason)
            file.write(b"".join(_line(rows[source]) for source in sorted(rows)))
        if not rows:
            self._file.unlink(missing_ok=True)


def read_problems(file: Path) -> Iterable[Problem]:
    """Return what a problems.jsonl says; lines that are damaged are left out."""
    if not file.exists():
        return []
    problems = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            problems.append(Problem(str(row["source"]), str(row["reason"])))
        except (ValueError, KeyError, TypeError):
            continue
    return problems


def _line(problem: Problem) -> bytes:
    return json.dumps(asdict(problem)).encode() + b"\n"
