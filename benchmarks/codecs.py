"""The two encodings of flow (docs/store.md), and what a pair of a store consists of.

    python benchmarks/codecs.py STORE

200 pairs spread over a store, their flow resized to 224 x 224: bytes a pair, error in pixels,
milliseconds of one thread. Then the mean bytes a pair of each kind of member as it is stored.
"""

from __future__ import annotations

import argparse
import tarfile
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

from ssl_flow.flow import FlowStore
from ssl_flow.flow.codec import CODECS, decode_flow, encode_flow

SIDE, PAIRS = 224, 200


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    known = parser.parse_args()
    cv2.setNumThreads(1)
    store = FlowStore(known.store)
    flows = []
    for index in np.linspace(0, len(store) - 1, PAIRS).astype(int):
        flow = store[int(index)].flow
        scale = np.array([SIDE / flow.shape[1], SIDE / flow.shape[0]], np.float32)
        flows.append(cv2.resize(flow, (SIDE, SIDE), interpolation=cv2.INTER_AREA) * scale)
    print("| codec | bytes a pair, mean (least, most) | error, mean (most) | encode | decode |")
    print("|---|---|---|---|---|")
    for codec in CODECS:
        start = time.process_time()
        data = [encode_flow(flow, codec) for flow in flows]
        middle = time.process_time()
        back = [decode_flow(text) for text in data]
        ms = [1000 * t / PAIRS for t in (middle - start, time.process_time() - middle)]
        errors = [np.linalg.norm(a - b, axis=-1) for a, b in zip(flows, back, strict=True)]
        sizes = [len(text) for text in data]
        print(
            f"| `{codec}` | {np.mean(sizes):.0f} ({min(sizes)}, {max(sizes)}) "
            f"| {np.mean(errors):.3f} ({np.max(errors):.3f}) | {ms[0]:.1f} ms | {ms[1]:.1f} ms |"
        )
    members: Counter[str] = Counter()
    for file in known.store.rglob("*.tar"):
        with tarfile.open(file) as tar:
            for member in tar:
                members[Path(member.name).name.split(".", 1)[1]] += member.size
    for kind, size in members.items():
        print(f"{kind}: {size / len(store):.0f} bytes a pair")


if __name__ == "__main__":
    main()
