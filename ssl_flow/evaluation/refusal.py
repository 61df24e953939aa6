"""How the commands of this folder refuse what they cannot use: a line on stderr, status 2."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from ssl_flow.models import WeightsError

_Command = TypeVar("_Command")


def run_command(
    prog: str, kind: type[_Command], argv: Sequence[str], work: Callable[[_Command], str | None]
) -> int:
    """Parse `argv` into the command's dataclass, do its work as `told` does; the exit status."""
    command = tyro.cli(kind, args=list(argv), prog=prog)
    return told(prog, lambda: work(command))


def told(prog: str, work: Callable[[], str | None]) -> int:
    """Do the work of the command `prog`, print what it returns; its exit status.

    Bad input (ValueError, OSError, ImportError, WeightsError) is told on stderr: 2. Else 0.
    """
    try:
        said = work()
    except (ValueError, OSError, ImportError, WeightsError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    if said:
        print(said)
    return 0


def import_extra(module: str, missing: str) -> Any:  # noqa: ANN401 (a module)
    """Import what an extra brings; ImportError with the text `missing`, which says what to do."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(missing) from error
