"""STORE/problems.jsonl: which sources could not be used, or only in part, and why."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
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
        self._store, self._strict = store, strict
        self._found: dict[str, str | None] = {}
        self._saved = time.monotonic()
        self.problems: list[Problem] = []

    def note(self, source: str, reason: str | None) -> None:
        """Take note of what is wrong with a source; None: nothing."""
        self._found[source] = reason
        if reason is not None:
            self.problems.append(Problem(source, reason))
            if self._strict:
                raise ProblemError(f"{source}: {reason} (problems are fatal with --strict)")
        if time.monotonic() - self._saved > _SAVE:
            self.save()

    def save(self) -> None:
        """Bring the file up to date; raises OSError if it cannot be written."""
        self._saved = time.monotonic()
        if self.problems or (self._store / PROBLEMS_FILE).exists():
            update_problems(self._store, self._found)


def update_problems(store: Path, found: Mapping[str, str | None]) -> None:
    """Write what was `found` over what the file says: one line a source, None removes it."""
    # Locked while it is read, too: another call may add its own problems.
    with replacing(store / PROBLEMS_FILE, keep_empty=False) as file:
        for source, reason in sorted({**read_problems(store), **found}.items()):
            if reason is not None:
                file.write(json.dumps({"source": source, "reason": reason}).encode() + b"\n")


def read_problems(store: Path) -> dict[str, str]:
    """Return what problems.jsonl says, source -> reason; lines that are damaged are left out."""
    file, problems = store / PROBLEMS_FILE, {}
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
            problems[str(row["source"])] = str(row["reason"])
        except (ValueError, KeyError, TypeError):
            continue
    return problems
