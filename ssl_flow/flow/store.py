"""Reading a store of frame and flow pairs: one tar a video, and an index of each.

The format is described in docs/store.md.
"""

from __future__ import annotations

import fnmatch
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from . import shard
from .codec import CODECS, decode_flow
from .duplicates import find_duplicate_sources
from .estimators import flow_validity
from .shard import MEND, StoreError, index_files, read_index, shard_of

SETTINGS_FILE = "store.json"
MANIFEST_FILE = "manifest.jsonl"
DUPLICATES_FILE = "duplicates.json"  # source -> the one it is a copy of
PROBLEMS_FILE = "problems.jsonl"


@dataclass
class Sample:
    """One pair: the first frame, and the flow from it to the second.

    frame: (H, W, 3) RGB uint8. flow: (H, W, 2) float32, pixels, x right, y down. valid: (H, W)
    bool, where the flow can be relied on. meta: key, video, time and gap in seconds, method, size.
    """

    frame: NDArray[np.uint8]
    flow: NDArray[np.float32]
    valid: NDArray[np.bool_]
    meta: dict[str, Any]


class FlowStore:
    """Random access to the pairs of a store: `len(store)`, `store[i]`.

    No file stays open between two reads, so that an object can be pickled or forked at will.

    `include` is one or several names of sources, or patterns such as "clips/*"; None takes all.
    `duplicates=False` leaves out sources that the extraction takes for copies of another one that
    is taken (duplicates.json: scenes of one fixed camera can look like copies, too).

    StoreError: no store at `path`, a newer version, a shard that is incomplete, an entry of
    `include` that matches no source, or sources among which no duplicates were searched.
    """

    def __init__(
        self, path: str | Path, include: str | Sequence[str] | None = None, duplicates: bool = True
    ) -> None:
        """Read the settings and the indexes of all shards."""
        include = [include] if isinstance(include, str) else include
        self.path = Path(path)
        self.settings = read_settings(self.path)
        self._members = shard.member_names(self.settings["codec"], self.settings["consistency"])
        indexes = [(file, read_index(file)) for file in index_files(self.path)]
        names = [index["source"] for _, index in indexes]
        taken = set(names) if include is None else set()
        for pattern in include or ():
            matched = [n for n in names if n == pattern or fnmatch.fnmatchcase(n, pattern)]
            if not matched:
                raise StoreError(f"{path}: no source matches {pattern!r}; there are {names[:10]}")
            taken.update(matched)
        copies = {} if duplicates else _read_duplicates(self.path, len(indexes))
        self.sources: list[str] = []
        self._files: list[str] = []  # of the indexes, relative to the store
        rows = [np.empty((0, 2 + 2 * len(self._members)), np.int64)]
        for file, index in indexes:
            name = index["source"]
            if name not in taken or copies.get(name) in taken:
                continue
            shard.check_size(shard_of(file), index)
            table = _sample_table(self.path, file, index, self._members)
            rows.append(np.insert(table, 0, len(self.sources), axis=1))
            self.sources.append(name)
            self._files.append(str(file.relative_to(self.path)))
        # One row a sample: number of the source, offset and size of each member, checksum.
        self._rows = np.concatenate(rows)

    @property
    def source_numbers(self) -> NDArray[np.int64]:
        """(len(self),): which of `sources` each pair is from."""
        return np.asarray(self._rows[:, 0], np.int64)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Read and decode one pair; StoreError names shard and pair if a byte has changed."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of a store with {len(self)} pairs")
        source, *row = (int(value) for value in self._rows[index])
        number = index % len(self) - int(np.searchsorted(self._rows[:, 0], source))
        return _read_pair(self.path / self._files[source], number, row, self._members)


def verify(store: str | Path, deep: bool = True) -> dict[str, str]:
    """Look for damage in a store: shard or index, relative to the store -> what is wrong with it.

    `deep` reads everything and compares it with the checksums; in a version-1 store, which has
    none, it decodes each pair. Otherwise only the indexes and the shards' sizes are looked at.
    StoreError: no store there, or a newer version.
    """
    path = Path(store)
    settings = read_settings(path)
    members = shard.member_names(settings["codec"], settings["consistency"])
    damage = {}
    files = index_files(path)
    for file in files:
        place = file
        try:
            index = read_index(file)
            table = _sample_table(path, file, index, members)
            place = shard_of(file)
            shard.check_size(place, index)
            if deep:
                shard.check_sum(place, index)
            if deep and index["sha256"] is None:
                for number, row in enumerate(table.tolist()):
                    _read_pair(file, number, row, members)
        except (StoreError, OSError) as error:
            damage[str(place.relative_to(path))] = str(error)
    for tar in sorted({*path.glob("shards/**/*.tar")} - {shard_of(file) for file in files}):
        if tar.is_file():
            reason = f"{tar} is unfinished, it has no *{shard.INDEX_SUFFIX}: {MEND}"
            damage[str(tar.relative_to(path))] = reason
    return damage


def write_lists(store: Path) -> dict[str, str]:
    """Write manifest.jsonl and duplicates.json from the indexes; return the latter's content.

    The indexes are the truth: after a killed call the lists are merely older than they are.
    """
    hashes = {}
    with shard.replacing(store / MANIFEST_FILE) as manifest:
        for file in index_files(store):
            index = read_index(file)
            line = {
                "source": index["source"],
                "shard": str(shard_of(file).relative_to(store)),
                "bytes": index["tar_bytes"],
                "sha256": index["sha256"],
                "pairs": index["pairs"],
            }
            manifest.write(json.dumps(line).encode() + b"\n")
            # An array: 8 bytes a pair, Python's own numbers take 44.
            found = [int(text, 16) for text in index.get("hashes", ())]
            hashes[index["source"]] = np.unique(np.array(found, np.uint64))
        copies = find_duplicate_sources(hashes)
        if copies or (store / DUPLICATES_FILE).exists():
            data = json.dumps(copies, indent=2).encode() + b"\n"
            shard.write_atomically(store / DUPLICATES_FILE, data)
    return copies


def _read_duplicates(store: Path, sources: int) -> dict[str, str]:
    """Read source -> the one it is a copy of; StoreError if not all `sources` were searched."""
    file, manifest = store / DUPLICATES_FILE, store / MANIFEST_FILE
    searched = manifest.read_bytes().count(b"\n") if manifest.exists() else 0
    reason = (
        f"duplicates were looked for among {searched} sources of the {sources} in {store} "
        "(the parts of the work, --shard, do not look for them)"
    )
    if searched == sources:
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
        except ValueError as error:
            reason = f"{file} is damaged ({error})"
    raise StoreError(f"{reason}: run `ssl-flow merge-flow {store} --out {store}`")


def _sample_table(
    store: Path, file: Path, index: Mapping[str, Any], members: Sequence[str]
) -> NDArray[np.int64]:
    """Check an index; (pairs, 2 members + 1): offset and size of each member, checksum or -1."""
    columns = 2 * len(members)
    try:
        table = np.array([sample[1:] for sample in index["samples"]], np.int64)
        table = table.reshape(len(table), -1 if len(table) else columns + 1)
        if table.shape != (index["pairs"], columns + 1):
            raise ValueError(f"{index['pairs']} pairs of {len(members)} members expected")
        if index["version"] > 1 and shard.index_path(store, index["source"]) != file:
            raise ValueError(f"it is that of {index['source']!r}")
        end = table[:, columns - 2] + table[:, columns - 1]  # or a read would be too large
        if (table[:, :columns] < 0).any() or (end > index["tar_bytes"]).any():
            raise ValueError("a member lies outside the tar")
    except (ValueError, TypeError, OverflowError, IndexError) as error:
        raise StoreError(f"{file} is damaged ({error}): {MEND}") from error
    return table


def _read_pair(file: Path, number: int, row: Sequence[int], members: Sequence[str]) -> Sample:
    """Read pair `number` of the shard with index `file` by its row of a `_sample_table`."""
    tar = shard_of(file)
    *places, crc = row
    offsets, sizes = places[::2], places[1::2]
    start, end = offsets[0], offsets[-1] + sizes[-1]  # the members of a sample are adjacent
    try:
        with tar.open("rb") as opened:
            opened.seek(start)
            data = opened.read(end - start)
        if len(data) < end - start:
            raise ValueError("the file is too short")
        if crc >= 0 and zlib.crc32(data) != crc:
            raise ValueError("its checksum is wrong")
        parts = [data[o - start : o - start + n] for o, n in zip(offsets, sizes, strict=True)]
        return _decode(dict(zip(members, parts, strict=True)))
    except (ValueError, FileNotFoundError, cv2.error) as error:
        key = f"pair {number}"
        with suppress(OSError, StoreError):
            key = read_index(file)["samples"][number][0]
        raise StoreError(f"{tar} is damaged ({key}: {error}): {MEND}") from error


def _decode(members: Mapping[str, bytes]) -> Sample:
    frame = _image(members["jpg"], cv2.IMREAD_COLOR, "JPEG frame")
    flow = decode_flow(next(data for name, data in members.items() if name.startswith("flow.")))
    valid = flow_validity(flow)
    if "valid.png" in members:
        mask = _image(members["valid.png"], cv2.IMREAD_GRAYSCALE, "PNG mask")
        if mask.shape != valid.shape:
            raise ValueError(f"mask of {mask.shape}, flow of {valid.shape}")
        valid &= mask > 0
    if frame.shape[:2] != valid.shape:
        raise ValueError(f"frame of {frame.shape[:2]}, flow of {valid.shape}")
    rgb = np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)
    return Sample(rgb, flow, valid, json.loads(members["json"]))


def _image(data: bytes, kind: int, what: str) -> NDArray[Any]:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), kind) if data else None
    if image is None:
        raise ValueError(f"not a {what}")
    return image


def update_problems(store: Path, found: Mapping[str, str | None]) -> None:
    """Write what was `found` over what problems.jsonl says: one line a source, None removes it."""
    with shard.own_turn(store):
        rows = sorted({**read_problems(store), **found}.items())
        lines = [json.dumps({"source": s, "reason": why}) + "\n" for s, why in rows if why]
        if lines:
            shard.write_atomically(store / PROBLEMS_FILE, "".join(lines).encode())
        else:
            (store / PROBLEMS_FILE).unlink(missing_ok=True)


def read_problems(store: Path) -> dict[str, str]:
    """Return what problems.jsonl says, source -> reason; lines that are damaged are left out."""
    file, problems = store / PROBLEMS_FILE, {}
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for line in text.splitlines():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            problems[str(row["source"])] = str(row["reason"])
    return problems


def is_store(path: Path) -> bool:
    """Tell whether a store is there; StoreError if something else is."""
    if (path / SETTINGS_FILE).exists():
        return True
    # A call that was killed at its first step has left what looks so; another one may begin.
    ours = re.compile(rf"\.lock|\.turn\.tmp|{SETTINGS_FILE}|\.{SETTINGS_FILE}\..*tmp")
    if path.exists() and not (
        path.is_dir() and all(ours.fullmatch(f.name) for f in path.iterdir())
    ):
        raise StoreError(f"{path} exists and is no flow store: choose another folder")
    return False


def read_settings(store: Path) -> dict[str, Any]:
    """Read store.json; StoreError if there is none, or it has a newer version."""
    try:
        settings: dict[str, Any] = json.loads((store / SETTINGS_FILE).read_text(encoding="utf-8"))
        version = settings["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{store} is not a flow store: no readable {SETTINGS_FILE} in it "
            "(`ssl-flow flow VIDEOS --out STORE` makes a store)"
        ) from error
    if version > shard.VERSION:
        raise StoreError(
            f"{store} has format version {version}, this ssl_flow reads up to "
            f"{shard.VERSION}: update it"
        )
    if settings.setdefault("codec", "png") not in CODECS:  # version 1 knew this one alone
        raise StoreError(f"{store}: codec {settings['codec']!r} is unknown; known: {CODECS}")
    return settings


def differing(settings: Mapping[str, Any], others: Mapping[str, Any]) -> str | None:
    """Return the first key in which the settings of two stores differ."""
    keys = [*settings, *others]
    return next((key for key in keys if settings.get(key) != others.get(key)), None)
