"""How the commands of this folder refuse what they cannot use: a line on stderr, status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ssl_flow.models import WeightsError


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
