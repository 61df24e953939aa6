"""Reading a store of frame and flow pairs: one tar a video, and an index of each.

The format is described in docs/store.md.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .codec import decode_flow
from .estimators import flow_validity
from .shard import MEND, VERSION, StoreError, check_size, member_names, read_index, shard_path

SETTINGS_FILE = "store.json"


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

    Args:
        path: the store's folder.
        include: names of sources, or patterns such as "clips/*" (one or several); None takes all.

    Raises:
        StoreError: no store at `path`, a newer version, a shard that is incomplete, or an entry of
            `include` that matches no source.
    """

    settings: dict[str, Any]
    sources: list[str]

    def __init__(self, path: str | Path, include: str | Sequence[str] | None = None) -> None:
        """Read the settings and the indexes of all shards."""
        include = [include] if isinstance(include, str) else include
        self.path = Path(path)
        self.settings = read_settings(self.path)
        indexes = [read_index(file) for file in sorted(self.path.glob("shards/**/*.index.json"))]
        names = [index["source"] for index in indexes]
        for pattern in include or ():
            if not any(_matches(name, pattern) for name in names):
                raise StoreError(f"{path}: no source matches {pattern!r}; there are {names[:10]}")
        self.sources = []
        rows = [np.empty((0, 1 + 2 * len(self._members)), np.int64)]
        for index in indexes:
            name = index["source"]
            if include is not None and not any(_matches(name, pattern) for pattern in include):
                continue
            check_size(self.path, index)
            if index["samples"]:
                table = np.array([sample[1:] for sample in index["samples"]], np.int64)
                rows.append(np.insert(table, 0, len(self.sources), axis=1))
            self.sources.append(name)
        # One row a sample: number of the source, then offset and size of each member.
        self._rows = np.concatenate(rows)

    @property
    def _members(self) -> list[str]:
        return member_names(bool(self.settings["consistency"]))

    @property
    def source_numbers(self) -> NDArray[np.int64]:
        """(len(self),): which of `sources` each pair is from."""
        numbers: NDArray[np.int64] = self._rows[:, 0]
        return numbers

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Read and decode one pair.

        Raises:
            IndexError: no pair of this number.
            StoreError: the shard has been damaged since the store was opened.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of a store with {len(self)} pairs")
        number, *places = (int(value) for value in self._rows[index])
        shard = shard_path(self.path, self.sources[number])
        start, end = places[0], places[-2] + places[-1]  # the members of a sample are adjacent
        with shard.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        try:
            if len(data) < end - start:
                raise ValueError("the file is too short")
            offsets, sizes = places[::2], places[1::2]
            members = {
                name: data[offset - start : offset - start + size]
                for name, offset, size in zip(self._members, offsets, sizes, strict=True)
            }
            return _decode(members)
        except ValueError as error:
            raise StoreError(f"{shard} is damaged ({error}): {MEND}") from error


def _decode(members: Mapping[str, bytes]) -> Sample:
    bgr = cv2.imdecode(np.frombuffer(members["jpg"], np.uint8), cv2.IMREAD_COLOR)
    if bgr is None:
        raise ValueError("not a JPEG frame")
    flow = decode_flow(members["flow.png"])
    valid = flow_validity(flow)
    if "valid.png" in members:
        mask = cv2.imdecode(np.frombuffer(members["valid.png"], np.uint8), cv2.IMREAD_GRAYSCALE)
        if mask is None:
            raise ValueError("not a PNG mask")
        valid &= mask > 0
    frame = np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)
    return Sample(frame, flow, valid, json.loads(members["json"]))


def read_settings(store: Path) -> dict[str, Any]:
    """Read store.json.

    Raises:
        StoreError: there is none, or it has a newer version.
    """
    try:
        settings: dict[str, Any] = json.loads((store / SETTINGS_FILE).read_text(encoding="utf-8"))
        version = settings["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{store} is not a flow store: no readable {SETTINGS_FILE} in it "
            "(`ssl-flow flow VIDEOS --out STORE` makes a store)"
        ) from error
    if version > VERSION:
        raise StoreError(
            f"{store} has format version {version}, this ssl_flow reads up to {VERSION}: update it"
        )
    return settings


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)
