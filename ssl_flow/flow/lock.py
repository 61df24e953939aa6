"""One call at a time writes to a store, and cleans up behind one that was killed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import shard

LOCK_FILE = ".lock"


@contextmanager
def store_lock(store: Path, shared: bool = False) -> Iterator[None]:
    """Keep other calls out of a store; the lock ends with the process, however that ends.

    A `shared` lock lets in others that are shared as well: parts of the same work.

    Raises:
        StoreError: another call is writing there.
        OSError: the store cannot be written.
    """
    with (store / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            alone = shard.take_lock(file, shard.PATIENCE, shared) and not shared
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "a part of the work (--shard)"
            raise shard.StoreError(
                f"{store} is being written by another call ({holder}): wait until it ends, or use "
                "another folder; parts of one work (--shard) may share a store"
            ) from None
        if alone:
            _remove_leftovers(store)
            with suppress(OSError):  # a full disk: only the name of this process will be missing
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
        try:
            yield
        finally:
            if alone:
                _remove_leftovers(store)  # of workers that were ended in their work
                file.truncate(0)


def _remove_leftovers(store: Path) -> None:
    """Remove the temporary files that no living process writes to."""
    for path in store.rglob(".*.tmp"):
        with suppress(OSError), path.open("ab") as file:
            if shard.take_lock(file, patience=0):
                path.unlink()
