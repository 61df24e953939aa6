"""Pairs of frames with the true flow between them.

    pairs = open_flow_pairs("middlebury:data/flow/middlebury")
    first, second, flow, known, name = pairs[0]

Middlebury (Baker et al., IJCV 2011) here is NAME/frame10.png, frame11.png and flow10.png, the flow
in KITTI's encoding: a 16-bit PNG with u * 64 + 32768, v * 64 + 32768 and 1 where it is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ssl_flow.data.labelled import ItemSet, parse_spec


class FlowPair(NamedTuple):
    """Two frames and the true flow from the first to the second, pixels, x right, y down."""

    first: np.ndarray  # (H, W, 3) uint8 RGB
    second: np.ndarray  # (H, W, 3) uint8 RGB
    flow: np.ndarray  # (H, W, 2) float32, 0 where unknown
    known: np.ndarray  # (H, W) bool
    name: str


FlowPairs = ItemSet[FlowPair]


def open_flow_pairs(spec: str) -> FlowPairs:
    """Open `middlebury:PATH` (folders of pairs), or `synthetic`, which needs no data.

    Raises:
        ValueError: another kind.
        FileNotFoundError: no pair there, or a frame of one is missing; the message names it.
    """
    kind, root = parse_spec(spec, "flow pairs", ("middlebury:PATH", "synthetic"), "test")
    if kind == "synthetic":
        names = [f"synthetic-{3_000_000 + i}" for i in range(20)]  # seeds no other set has
        rule = "the middle frame and the next of the synthetic videos with these seeds"
        about = {"spec": spec, "rule": rule}
        return FlowPairs(kind, [], names, lambda i: _synthetic(names[i]), about)
    folders = sorted(file.parent for file in root.glob("*/flow10.png"))
    if not folders:
        raise FileNotFoundError(f"no pair in {root}. Expected NAME/flow10.png, frame10.png, ...11")
    files = [f / f"{name}.png" for f in folders for name in ("flow10", "frame10", "frame11")]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing, a frame of {file.parent / 'flow10.png'}")
    names = [folder.name for folder in folders]
    protocol = {"spec": spec, "rule": "every folder with flow10.png", "names": names}
    return FlowPairs(kind, [], names, lambda i: read_flow_pair(folders[i]), protocol, files)


def read_flow_pair(folder: Path) -> FlowPair:
    """Read a Middlebury pair.

    Raises:
        ValueError: a file cannot be read, or is not of the encoding or size expected.
    """
    first, second = (_read(folder / f"frame{i}.png", cv2.IMREAD_COLOR) for i in (10, 11))
    code = _read(folder / "flow10.png", cv2.IMREAD_UNCHANGED)  # read as known, v, u
    if code.dtype != np.uint16 or not first.shape == second.shape == code.shape:
        found = f"{code.dtype} {code.shape}, the frames {first.shape} and {second.shape}"
        raise ValueError(f"{folder}: flow10.png is {found}; expected uint16 (H, W, 3) as they are")
    known = code[..., 0] > 0
    flow = (code[..., :0:-1].astype(np.float32) - 32768) / 64 * known[..., None]
    first, second = (np.ascontiguousarray(frame[..., ::-1]) for frame in (first, second))
    return FlowPair(first, second, flow, known, folder.name)


def _read(path: Path, mode: int) -> np.ndarray:
    image = cv2.imread(str(path), mode)
    if image is None:
        raise ValueError(f"{path} cannot be read as an image")
    return image


def _synthetic(name: str) -> FlowPair:
    from ssl_flow.data.synthetic import SyntheticVideo

    video = SyntheticVideo(int(name.removeprefix("synthetic-")))
    t = video.frames // 2
    known = np.ones((video.size, video.size), bool)
    return FlowPair(video.frame(t), video.frame(t + 1), video.flow(t), known, name)
