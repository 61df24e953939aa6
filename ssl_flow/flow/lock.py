"""One call at a time writes to a store, and cleans up behind one that was killed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .shard import StoreError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_PATIENCE = 3.0  # seconds: the processes of a killed call end within one


@contextmanager
def store_lock(store: Path, shared: bool) -> Iterator[None]:
    """Keep other calls out of a store; the lock ends with the process, however that ends.

    Args:
        store: its folder.
        shared: let in others that share it as well: parts of the same work.

    Raises:
        StoreError: another call is writing there.
        OSError: the store cannot be written.
    """
    with (store / LOCK_FILE).open("a+", encoding="utf-8") as file:
        held = fcntl is not None and _take(file, store, shared)
        if held and not shared:
            _remove_leftovers(store)
            with suppress(OSError):  # a full disk: only the name of this process will be missing
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
        try:
            yield
        finally:
            if held and not shared:
                _remove_leftovers(store)  # of workers that were ended in their work
                file.truncate(0)


def _take(file: IO[str], store: Path, shared: bool) -> bool:
    """Lock the file; False where the file system has no locks."""
    start = time.monotonic()
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() - start > _PATIENCE:
                file.seek(0)
                holder = file.read().strip() or "a part of the work (--shard)"
                raise StoreError(
                    f"{store} is being written by another call ({holder}): wait until it ends, or "
                    "choose another --out; parts of one work (--shard) may share a store"
                ) from None
            time.sleep(0.1)
        except OSError:
            return False


def _remove_leftovers(store: Path) -> None:
    """Remove the temporary files that no living process writes to."""
    for path in store.rglob(".*.tmp"):
        with suppress(OSError), path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
