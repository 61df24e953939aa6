"""One shard of a store: a tar in WebDataset's layout with the pairs of one video, and its index.

The format is described in docs/store.md.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

VERSION = 1
MEND = "delete this file and run the same `ssl-flow flow` command again"
_BLOCK = 512  # a tar is made of blocks of this many bytes


class StoreError(ValueError):
    """A store is missing, damaged, or made with other settings; the message says what to do."""


def member_names(consistency: bool) -> list[str]:
    """Return the file name extensions of one sample's members, in their order in the tar."""
    return ["jpg", "flow.png", *(["valid.png"] if consistency else []), "json"]


def shard_path(store: Path, source: str) -> Path:
    """Return where the shard of a source lies.

    Raises:
        ValueError: the name would lead out of the store.
    """
    parts = PurePosixPath(source).parts
    if not parts or source.startswith("/") or ".." in parts or "\0" in source:
        raise ValueError(f"{source!r} cannot name a source: it must be a relative path")
    return store / "shards" / f"{source}.tar"


def index_path(store: Path, source: str) -> Path:
    """Return where the index of a source's shard lies."""
    return shard_path(store, source).with_suffix(".index.json")


def read_index(file: Path) -> dict[str, Any]:
    """Read the index of one shard.

    Raises:
        StoreError: it is not readable.
    """
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return index
    except ValueError as error:
        raise StoreError(f"{file} is damaged ({error}): {MEND}") from error


def check_size(store: Path, index: Mapping[str, Any]) -> None:
    """Check that a shard is as long as its index says.

    Raises:
        StoreError: it is not, or there is none.
    """
    shard = shard_path(store, index["source"])
    found = shard.stat().st_size if shard.exists() else 0
    if found != index["tar_bytes"]:
        raise StoreError(f"{shard} has {found} bytes instead of {index['tar_bytes']}: {MEND}")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or not at all, whenever the power fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class ShardWriter:
    """Writes the tar of one source, then its index: a tar without index is not finished.

    The bytes depend on the samples alone (no times, no owner). Use as a context manager; what has
    not been committed is removed at its end.
    """

    def __init__(self, store: Path, source: str) -> None:
        """Open a temporary file beside the shard's place."""
        self._store, self._source = store, source
        self._path = shard_path(store, source)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        index_path(store, source).unlink(missing_ok=True)
        self._temporary = self._path.with_name(f".{self._path.name}.tmp")
        self._file = self._temporary.open("wb")
        self._samples: list[list[str | int]] = []

    def __enter__(self) -> ShardWriter:
        """Return the writer."""
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the temporary file, if `commit` has not renamed it."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample: extension -> contents."""
        row: list[str | int] = [key]
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")  # owner and time are 0 by default
            info.size = len(data)
            self._file.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
            row += [self._file.tell(), len(data)]
            self._file.write(data + bytes(-len(data) % _BLOCK))
        self._samples.append(row)

    def commit(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Put the tar in its place and write the index, with `facts` in it; return the index."""
        self._file.write(bytes(2 * _BLOCK))  # the end of a tar
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._temporary.replace(self._path)
        index = {
            "version": VERSION,
            "source": self._source,
            "tar_bytes": size,
            "pairs": len(self._samples),
            **facts,
            "samples": self._samples,
        }
        data = json.dumps(index, separators=(",", ":")).encode()
        write_atomically(index_path(self._store, self._source), data)
        return index
