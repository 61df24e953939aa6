"""Several stores -> one: the command `ssl-flow merge-flow`, for flow computed on many machines."""

from __future__ import annotations

import filecmp
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from . import shard
from .shard import StoreError, index_files, read_index, shard_of, store_lock
from .store import (
    SETTINGS_FILE,
    differing,
    is_store,
    read_problems,
    read_settings,
    update_problems,
    write_lists,
)


def merge_stores(stores: Sequence[str | Path], out: str | Path) -> Counter[str]:
    """Join stores that were made with the same settings.

    The result has the same bytes as one store made at once; a store that is at `out` is added to.
    An interrupted call is continued by repeating it. Nothing is written before all stores have been
    looked at. Shards become hard links where the file system allows it: no time, no space, and
    safe, because a shard is never changed, only replaced. Elsewhere they are copied and compared
    with their checksums. Returns numbers of `sources` and `pairs`, and of
    shards `linked`, `copied` and `already_there`.

    StoreError: a store is missing, damaged or being written, two differ in a setting, the same
    source has different bytes in two of them, or `out` holds something else.
    """
    if not stores:
        raise StoreError("no store to merge is given")
    target = Path(out)
    given = [*map(Path, stores), *([target] if is_store(target) else [])]
    parts = list({part.resolve(): part for part in given}.values())
    settings = read_settings(parts[0])
    for part in parts[1:]:
        found = read_settings(part)
        if key := differing(settings, found):
            raise StoreError(
                f"{parts[0]} was made with {key} = {settings.get(key)!r}, {part} with "
                f"{found.get(key)!r}: only stores with the same settings can be merged"
            )
    with ExitStack() as locks:
        for part in parts:
            with suppress(OSError):  # it may only be read: then nobody writes there
                locks.enter_context(store_lock(part))
        files = _collect(parts)  # before the first thing is written
        if target.resolve() not in {part.resolve() for part in parts}:
            target.mkdir(parents=True, exist_ok=True)
            locks.enter_context(store_lock(target))
            if is_store(target):
                raise StoreError(f"{target} has just been made by another call: repeat this one")
            shard.write_atomically(target / SETTINGS_FILE, (parts[0] / SETTINGS_FILE).read_bytes())
        problems: dict[str, str | None] = {}
        for part in parts:
            problems = {**read_problems(part), **problems}
        merged = Counter(sources=len(files))
        for name, file in files.items():
            index = read_index(file)
            problems[index["source"]] = index.get("problem")  # what another store could not do
            merged["pairs"] += index["pairs"]
            merged[_transfer(file, index, target / name)] += 1
        update_problems(target, problems)
        write_lists(target)
    return merged


def _transfer(file: Path, index: Mapping[str, Any], place: Path) -> str:
    """Bring the shard of one index file, and then that, to `place`; say how."""
    tar, how = shard_of(file), "linked"
    with suppress(StoreError, FileNotFoundError):
        shard.check_size(shard_of(place), index)
        if place.read_bytes() == file.read_bytes():
            return "already_there"
    place.parent.mkdir(parents=True, exist_ok=True)
    if not _link(tar, shard_of(place)):
        how = "copied"
        shard.check_sum(tar, index)
        with tar.open("rb") as old, shard.replacing(shard_of(place)) as new:
            shutil.copyfileobj(old, new)
    shard.write_atomically(place, file.read_bytes())
    return how


def _collect(stores: Sequence[Path]) -> dict[Path, Path]:
    """Index file relative to its store -> the file in the first store that has it."""
    files: dict[Path, Path] = {}
    for store in stores:
        for file in index_files(store):
            index = read_index(file)
            shard.check_size(shard_of(file), index)
            known = files.setdefault(file.relative_to(store), file)
            same = known == file or (
                known.read_bytes() == file.read_bytes()
                and (index["sha256"] or filecmp.cmp(shard_of(known), shard_of(file), False))
            )
            if not same:
                raise StoreError(
                    f"{index['source']!r} has different contents in {shard_of(known)} and "
                    f"{shard_of(file)}: delete the one that is wrong"
                )
    return dict(sorted(files.items()))


def _link(tar: Path, place: Path) -> bool:
    """Make `place` a hard link to `tar`; False where that is not possible."""
    temporary = place.with_name(f".{place.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(tar, temporary)
    except OSError:  # another file system, one without links, too many of them
        return False
    temporary.replace(place)
    temporary.unlink(missing_ok=True)  # renaming a link to itself does nothing
    return True


@dataclass
class MergeCommand:
    """Join stores of flow that were made with the same settings, e.g. on several machines."""

    stores: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the stores; they are left as they are."""
    out: Path
    """Folder of the result. An interrupted call is continued by repeating it."""


def merge_command(argv: Sequence[str]) -> int:
    """Run `ssl-flow merge-flow`; returns the exit code: 0, or 2 if the stores cannot be merged."""
    command = tyro.cli(MergeCommand, args=list(argv), prog="ssl-flow merge-flow")
    try:
        merged = merge_stores(command.stores, command.out)
    except (ValueError, OSError) as error:
        print(f"ssl-flow merge-flow: error: {error}", file=sys.stderr)
        return 2
    linked, copied, there = (merged[key] for key in ("linked", "copied", "already_there"))
    print(
        f"{command.out}: {merged['sources']} sources, {merged['pairs']} pairs; shards: {linked} "
        f"linked, {copied} copied, {there} already there"
    )
    return 0
