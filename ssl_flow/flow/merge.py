"""Several stores -> one: the command `ssl-flow merge-flow`, for flow computed on many machines."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import json
import os
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from .extract import write_duplicates
from .lock import LOCK_FILE, store_lock
from .problems import PROBLEMS_FILE, read_problems
from .shard import (
    MEND,
    StoreError,
    check_shard_size,
    index_files,
    index_path,
    read_index,
    replacing,
    shard_of,
    write_atomically,
)
from .sources import Problem
from .store import SETTINGS_FILE, read_settings, write_manifest

_PIECE = 2**20  # bytes copied at once


@dataclass
class Merged:
    """What `merge_stores` did, counted in shards; `sources` and `pairs` are those of the result."""

    sources: int = 0
    pairs: int = 0
    linked: int = 0
    copied: int = 0
    already_there: int = 0


def merge_stores(stores: Sequence[str | Path], out: str | Path, copy: bool = False) -> Merged:
    """Join stores that were made with the same settings.

    The result has the same bytes as one store made at once. An interrupted call is continued by
    repeating it. Nothing is written before all stores have been looked at.

    Args:
        stores: folders of stores; left as they are.
        out: folder of the result, made if it is not there; a store that is there is added to.
        copy: copy the shards, comparing them with their checksums. Otherwise they are hard links
            where the file system allows it: no time, no space, and safe, because a shard is never
            changed, only replaced.

    Raises:
        StoreError: a store is missing or damaged, two differ in a setting, the same source has
            different bytes in two of them, or `out` holds something else.
        OSError: `out` cannot be written.
    """
    if not stores:
        raise StoreError("no store to merge is given")
    target = Path(out)
    parts = [Path(store) for store in stores]
    settings = read_settings(parts[0])
    ours = {LOCK_FILE, f".{SETTINGS_FILE}.tmp"}  # a call was killed at its beginning
    if (target / SETTINGS_FILE).exists():
        parts.append(target)
    elif target.exists() and (not target.is_dir() or {p.name for p in target.iterdir()} - ours):
        raise StoreError(f"{target} exists and is no flow store: choose another folder")
    for part in parts[1:]:
        _check_settings(parts[0], settings, part)
    _collect(parts)  # before the first thing is written
    target.mkdir(parents=True, exist_ok=True)
    with store_lock(target, shared=False):
        if not (target / SETTINGS_FILE).exists():
            write_atomically(target / SETTINGS_FILE, (parts[0] / SETTINGS_FILE).read_bytes())
        files = _collect(parts)
        # First, because afterwards it is not seen any more where a source was done.
        _merge_problems(parts, files, target)
        merged = _transfer(files, target, copy)
        write_manifest(target)
        write_duplicates(target)
    return merged


def _transfer(files: Mapping[Path, Path], target: Path, copy: bool) -> Merged:
    merged = Merged(sources=len(files))
    for name, file in files.items():
        index = read_index(file)
        merged.pairs += index["pairs"]
        place = target / name
        if place == file or _is_done(file, place, index):
            merged.already_there += 1
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if copy or not _link(shard_of(file), shard_of(place)):
            _copy(shard_of(file), shard_of(place), index)
            merged.copied += 1
        else:
            merged.linked += 1
        write_atomically(place, file.read_bytes())
    return merged


def _check_settings(first: Path, wanted: dict[str, Any], store: Path) -> None:
    found = read_settings(store)
    for key in sorted({*wanted, *found}):
        if wanted.get(key) != found.get(key):
            raise StoreError(
                f"{first} was made with {key} = {wanted.get(key)!r}, {store} with "
                f"{found.get(key)!r}: only stores with the same settings can be merged"
            )


def _collect(stores: Sequence[Path]) -> dict[Path, Path]:
    """Index file relative to its store -> the file in the first store that has it."""
    files: dict[Path, Path] = {}
    for store in stores:
        for file in index_files(store):
            index = read_index(file)
            check_shard_size(shard_of(file), index)
            known = files.setdefault(file.relative_to(store), file)
            if known != file and not _is_same(known, file):
                raise StoreError(
                    f"{index['source']!r} has different contents in {shard_of(known)} and "
                    f"{shard_of(file)}: delete the one that is wrong"
                )
    return dict(sorted(files.items()))


def _is_same(first: Path, second: Path) -> bool:
    """Compare two finished shards, given by their indexes."""
    if first.read_bytes() != second.read_bytes():
        return False
    if "sha256" in read_index(first):
        return True
    return filecmp.cmp(shard_of(first), shard_of(second), shallow=False)


def _is_done(file: Path, place: Path, index: dict[str, Any]) -> bool:
    try:
        check_shard_size(shard_of(place), index)
        return place.read_bytes() == file.read_bytes()
    except (StoreError, FileNotFoundError):
        return False


def _link(shard: Path, place: Path) -> bool:
    """Make `place` a hard link to `shard`; False where that is not possible."""
    # Not the name that `open_temporary` empties: it would empty the shard this one is linked to.
    temporary = place.with_name(f".{place.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(shard, temporary)
    except OSError as error:
        # Another file system, one without links, too many links, or a system that forbids them.
        if error.errno in (errno.EXDEV, errno.ENOTSUP, errno.EPERM, errno.EMLINK, errno.ENOSYS):
            return False
        raise
    temporary.replace(place)
    temporary.unlink(missing_ok=True)  # renaming a link to itself does nothing
    return True


def _copy(shard: Path, place: Path, index: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    with shard.open("rb") as source, replacing(place) as copy:
        while piece := source.read(_PIECE):
            digest.update(piece)
            copy.write(piece)
        if index.get("sha256", digest.hexdigest()) != digest.hexdigest():
            raise StoreError(f"{shard} is damaged (its sha256 is not that of the index): {MEND}")


def _merge_problems(stores: Sequence[Path], files: Container[Path], target: Path) -> None:
    """Join the lists of problems, but for sources that another store could do."""
    problems: dict[str, Problem] = {}
    for store in stores:
        for problem in read_problems(store / PROBLEMS_FILE):
            try:
                place = index_path(Path(), problem.source)
            except ValueError:  # a name that no store can have
                place = Path()
            if place not in files or (store / place).exists():
                problems.setdefault(problem.source, problem)
    if problems or (target / PROBLEMS_FILE).exists():
        lines = [json.dumps(asdict(problems[source])) + "\n" for source in sorted(problems)]
        write_atomically(target / PROBLEMS_FILE, "".join(lines).encode())


@dataclass
class MergeCommand:
    """Join stores of flow that were made with the same settings, e.g. on several machines."""

    stores: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the stores; they are left as they are."""
    out: Path
    """Folder of the result. An interrupted call is continued by repeating it."""
    copy: bool = False
    """Copy the shards and compare their checksums; otherwise they are hard links where possible."""


def merge_command(argv: Sequence[str]) -> int:
    """Run `ssl-flow merge-flow` with the arguments that follow these two words.

    Returns:
        The exit code: 0, or 2 if the stores cannot be merged.

    Raises:
        SystemExit: by the parser: 0 after --help, 2 for a wrong flag.
    """
    command = tyro.cli(MergeCommand, args=list(argv), prog="ssl-flow merge-flow")
    try:
        merged = merge_stores(command.stores, command.out, command.copy)
    except (ValueError, OSError) as error:
        print(f"ssl-flow merge-flow: error: {error}", file=sys.stderr)
        return 2
    print(
        f"{command.out}: {merged.sources} sources, {merged.pairs} pairs; shards: {merged.linked} "
        f"linked, {merged.copied} copied, {merged.already_there} already there"
    )
    return 0
