"""One shard of a store: a tar in WebDataset's layout with the pairs of one video, and its index.

Also what writes files so that they are there completely or not at all. Format: docs/store.md.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows, which lets nobody rename or remove a file that is open
    fcntl = None  # type: ignore[assignment]

VERSION = 2
MEND = "delete this file and run the same `ssl-flow flow` command again"
INDEX_SUFFIX = ".index.json"
LOCK_FILE, TURN_FILE = ".lock", ".turn.tmp"
_BLOCK = 512  # a tar is made of blocks of this many bytes
# Bytes of a file name: most systems allow 255; ours get up to 25 more (".", ".index.json", ".tmp").
_LONGEST_NAME = 200
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class StoreError(ValueError):
    """A store is missing, damaged, or made with other settings; the message says what to do."""


def member_names(codec: str, consistency: bool) -> list[str]:
    """Return the file name extensions of one sample's members, in their order in the tar."""
    return ["jpg", f"flow.{codec}", *(["valid.png"] if consistency else []), "json"]


def safe_name(source: str) -> str:
    """Return the relative path, without extension, of a source's files in a store.

    It is the source's own name, but that a part which is too long for a file name or holds what
    other systems refuse (control characters, bytes that are not UTF-8) is cleaned, shortened, and
    made unique by a hash of the whole name. ValueError: the name would lead out of the store.
    """
    parts = PurePosixPath(source).parts
    if not parts or source.startswith("/") or ".." in parts or "\0" in source:
        raise ValueError(f"{source!r} cannot name a source: it must be a relative path")
    digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def safe(part: str) -> str:
        clean = _UNSAFE.sub("_", part)
        if clean == part and len(part.encode()) <= _LONGEST_NAME:
            return part
        room = _LONGEST_NAME - len(digest) - 1
        return f"{clean.encode()[:room].decode('utf-8', 'ignore')}-{digest}"

    return "/".join(map(safe, parts))


def shard_path(store: Path, source: str) -> Path:
    """Return where the shard of a source lies; ValueError if that would be out of the store."""
    return store / "shards" / f"{safe_name(source)}.tar"


def index_path(store: Path, source: str) -> Path:
    """Return where the index of a source's shard lies."""
    return shard_path(store, source).with_suffix(INDEX_SUFFIX)


def index_files(store: Path) -> list[Path]:
    """Return the indexes of all finished shards of a store, in the order of their names."""
    return sorted(store.glob(f"shards/**/*{INDEX_SUFFIX}"))


def shard_of(index_file: Path) -> Path:
    """Return the shard that an index file belongs to."""
    return index_file.with_name(index_file.name.removesuffix(INDEX_SUFFIX) + ".tar")


def read_index(file: Path) -> dict[str, Any]:
    """Read the index of one shard; StoreError if it is damaged.

    Of version 1, which has no checksums, `sha256` is None and each sample's CRC -1.
    """
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for key, kind in {"source": str, "tar_bytes": int, "pairs": int, "samples": list}.items():
            if not isinstance(index[key], kind):
                raise ValueError(f"{key} is {index[key]!r}")
        if index.setdefault("version", 1) == 1:
            index |= {"sha256": None, "samples": [[*row, -1] for row in index["samples"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file} is damaged ({error}): {MEND}") from error
    return index


def check_size(shard: Path, index: Mapping[str, Any]) -> None:
    """Raise StoreError unless a shard is there and as long as its index says."""
    found = shard.stat().st_size if shard.exists() else 0
    if found != index["tar_bytes"]:
        raise StoreError(f"{shard} has {found} bytes instead of {index['tar_bytes']}: {MEND}")


def check_sum(shard: Path, index: Mapping[str, Any]) -> None:
    """Raise StoreError unless a shard has the checksum of its index."""
    digest = hashlib.sha256()
    with shard.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if index["sha256"] not in (None, digest.hexdigest()):
        raise StoreError(f"{shard} is damaged (its sha256 is not that of the index): {MEND}")


def finished(store: Path, source: str) -> dict[str, Any] | None:
    """Return the index of a source that is complete in the store, else None."""
    try:
        index = read_index(index_path(store, source))
        check_size(shard_path(store, source), index)
    except (StoreError, FileNotFoundError, NotADirectoryError):
        return None  # damaged: computed again
    return index


@contextmanager
def store_lock(store: Path, shared: bool = False) -> Iterator[None]:
    """Keep other calls out of a store, and clean up behind one that was killed.

    The lock ends with the process, however that ends. A `shared` one lets in others that are shared
    as well: parts of the same work. StoreError: another call is writing there.
    """
    alone = fcntl is not None and not shared

    def remove_leftovers() -> None:
        for path in store.rglob(".*.tmp") if alone else ():
            path.unlink(missing_ok=True)

    with (store / LOCK_FILE).open("a+") as file:  # NFS locks for reading what can be read
        try:
            if fcntl is not None:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"{store} is being written by another call: wait until it ends, or use another "
                "folder; parts of one work (--shard) may share a store"
            ) from None
        except OSError:  # a file system without locks
            alone = False
        try:
            remove_leftovers()  # of a killed call
            yield
        finally:
            remove_leftovers()  # of workers that were ended in their work


@contextmanager
def own_turn(store: Path) -> Iterator[None]:
    """Let calls that share a store into the block one after the other.

    Only within `store_lock`: of those that do not share, the next one removes the file.
    """
    with (store / TURN_FILE).open("a") as file:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_temporary(path: Path) -> IO[bytes]:
    """Open a file of its own beside `path`, to be written and then renamed to it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp").open("xb")


def put_in_place(file: IO[bytes], path: Path) -> None:
    """Rename what `open_temporary` opened to `path`, so that it survives a loss of power."""
    file.flush()
    os.fsync(file.fileno())
    if fcntl is None:
        file.close()
    Path(file.name).replace(path)
    if fcntl is None:  # Windows syncs no folder
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the new name may be lost
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # "cannot", not "failed"
            raise
    finally:
        os.close(folder)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears at `path` complete, at the end of the block, or not at all."""
    file = open_temporary(path)
    try:
        yield file
        put_in_place(file, path)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise
    finally:
        file.close()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or not at all, whenever the power fails."""
    with replacing(path) as file:
        file.write(data)


class ShardWriter:
    """Writes the tar of one source, then its index: a tar without index is not finished.

    The bytes depend on the samples alone (no times, no owner). Use as a context manager; what has
    not been committed is removed at its end.
    """

    def __init__(self, store: Path, source: str) -> None:
        """Open a temporary file beside the shard's place."""
        self._source, self._path = source, shard_path(store, source)
        self._index = index_path(store, source)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_temporary(self._path)
        self._committed = False
        self._position = 0
        self._sha256 = hashlib.sha256()
        self._samples: list[list[str | int]] = []

    def __enter__(self) -> ShardWriter:
        """Return the writer."""
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the temporary file, if `commit` has not renamed it."""
        if not self._committed:
            Path(self._file.name).unlink(missing_ok=True)
        with suppress(OSError):  # a full disk, said already by the write that failed
            self._file.close()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample: extension -> contents."""
        row: list[str | int] = [key]
        block = io.BytesIO()
        start = end = 0  # of what is read at once: the contents of all members
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")  # owner and time are 0 by default
            info.size = len(data)
            block.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
            start, end = start or block.tell(), block.tell() + len(data)
            row += [self._position + block.tell(), len(data)]
            block.write(data + bytes(-len(data) % _BLOCK))
        row.append(zlib.crc32(block.getbuffer()[start:end]))
        self._write(block.getvalue())
        self._samples.append(row)

    def commit(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Put the tar in its place and write the index, with `facts` in it; return the index."""
        self._write(bytes(2 * _BLOCK))  # the end of a tar
        self._index.unlink(missing_ok=True)  # that of an older tar
        put_in_place(self._file, self._path)
        self._committed = True
        index = {
            "version": VERSION,
            "source": self._source,
            "tar_bytes": self._position,
            "sha256": self._sha256.hexdigest(),
            "pairs": len(self._samples),
            **facts,
            "samples": self._samples,
        }
        write_atomically(self._index, json.dumps(index, separators=(",", ":")).encode())
        return index

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._position += len(data)
