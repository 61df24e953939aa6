"""Endpoint error and time of each flow method on the Middlebury pairs.

    python benchmarks/flow_accuracy.py DATA/flow [--json FILE] > benchmarks/results/flow_accuracy.md

DATA/flow/middlebury/NAME/ holds frame10.png, frame11.png and flow10.png, the true flow in KITTI's
encoding (16-bit PNG: u * 64 + 32768, v * 64 + 32768, known).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ssl_flow.flow import optical_flow

# OpenCV's own default parameters of TV-L1, where this library's default differs.
OPENCV_TVL1 = {"warps": 5, "outer_iterations": 10, "inner_iterations": 30, "scale_step": 0.8}
ROWS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "zero flow": None,
    "farneback": ("farneback", {}),
    "dis, preset=ultrafast": ("dis", {"preset": "ultrafast"}),
    "dis, preset=fast": ("dis", {"preset": "fast"}),
    "dis (preset=medium)": ("dis", {}),
    "tvl1": ("tvl1", {}),
    "tvl1, OpenCV's parameters": ("tvl1", OPENCV_TVL1),
}
SIZES = {"native": None, "256": 256}


def read_pair(folder: Path, short_side: int | None) -> tuple[np.ndarray, ...]:
    """Return both frames (H, W, 3), the true flow (H, W, 2) and where it is known (H, W)."""
    frames = [cv2.imread(str(folder / f"frame{i}.png"))[..., ::-1].copy() for i in (10, 11)]
    code = cv2.imread(str(folder / "flow10.png"), cv2.IMREAD_UNCHANGED)  # read as known, v, u
    known = (code[..., 0] > 0).astype(np.float32)
    flow = (code[..., :0:-1].astype(np.float32) - 32768) / 64 * known[..., None]
    if short_side is not None:
        height, width = known.shape
        scale = short_side / min(height, width)
        size = (round(width * scale), round(height * scale))
        frames = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]
        known = cv2.resize(known, size, interpolation=cv2.INTER_AREA)
        flow = cv2.resize(flow, size, interpolation=cv2.INTER_AREA)
        # Shorter vectors in a smaller picture; the mean over the known pixels only.
        flow *= np.float32([size[0] / width, size[1] / height]) / np.maximum(known, 1e-3)[..., None]
    return frames[0], frames[1], flow, known > 0.5


def measure(row: str, folder: Path, short_side: int | None) -> tuple[float, float]:
    """Return the mean endpoint error in pixels and the time in milliseconds of one pair."""
    first, second, truth, known = read_pair(folder, short_side)
    call = ROWS[row]
    flow, times = np.zeros_like(truth), []
    while call is not None and len(times) < 5 and sum(times) < 2000:
        start = time.thread_time()
        flow = optical_flow(first, second, call[0], **call[1])
        times.append(1000 * (time.thread_time() - start))
    error = np.linalg.norm(flow - truth, axis=-1)[known]
    return float(error.mean()), statistics.median(times or [0.0])


def main() -> None:
    """Measure all methods at both sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder that holds middlebury/")
    parser.add_argument("--json", type=Path, help="also write the numbers of each pair here")
    arguments = parser.parse_args()
    folders = sorted(path.parent for path in arguments.data.glob("middlebury/*/flow10.png"))
    if not folders:
        parser.error(f"no middlebury/*/flow10.png in {arguments.data}")
    cv2.setNumThreads(1)
    results = {
        row: {
            size: {folder.name: measure(row, folder, pixels) for folder in folders}
            for size, pixels in SIZES.items()
        }
        for row in ROWS
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    print_table(results, [folder.name for folder in folders])


def print_table(results: dict[str, Any], names: list[str]) -> None:
    """Print Markdown: a row a method."""
    print("# Accuracy and time of the flow methods\n")
    print(
        f"Middlebury pairs: {', '.join(names)}. Error: mean endpoint error of a pair in pixels at"
    )
    print(
        "the size named, mean over the pairs. Time: CPU time of one thread, median over the pairs."
    )
    print("256: frames and true flow are first reduced to a shorter side of 256 pixels.\n")
    print("| method | error, native | ms | error, 256 | ms |\n|---|---|---|---|---|")
    for row, sizes in results.items():
        cells = []
        for size in SIZES:
            errors, times = zip(*sizes[size].values(), strict=True)
            cells += [f"{statistics.mean(errors):.3f}", f"{statistics.median(times):.1f}"]
        print(f"| {row} | {' | '.join(cells)} |")
    print("\nCommand: `python benchmarks/flow_accuracy.py DATA/flow`  ")
    print(f"Date: {datetime.date.today()}  ")
    print(f"CPU: {cpu_model()}  ")
    versions = f"OpenCV {cv2.__version__}, NumPy {np.__version__}"
    print(f"Versions: Python {platform.python_version()}, {versions}")


def cpu_model() -> str:
    """Return the processor's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
