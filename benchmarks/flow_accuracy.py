"""Endpoint error and time of each flow method: Middlebury pairs, large motion, batches on a GPU.

    python benchmarks/flow_accuracy.py DATA/flow [--json FILE] > benchmarks/results/flow_accuracy.md
    python benchmarks/flow_accuracy.py [DATA/flow] --device cuda [--json FILE]

DATA/flow/middlebury/NAME/ holds pairs with the true flow (see ssl_flow/data/flow_pairs.py). Pairs
with large motion are made from DATA/davis/frames and DATA/davis/masks, where those are. With
another device than "cpu" the methods that run there are measured in batches of 64 pairs of
256 x 256 pixels, which needs no data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from machine import describe, footer

from ssl_flow.data.flow_pairs import FlowPair, read_flow_pair
from ssl_flow.flow import optical_flows
from ssl_flow.flow.estimators import OPENCV_METHODS

# Name of the row -> method, options.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "farneback": ("farneback", {}),
    "dis-ultrafast": ("dis-ultrafast", {}),
    "dis-fast": ("dis-fast", {}),
    "dis-medium (dis)": ("dis-medium", {}),
    "tvl1, warps=1": ("tvl1", {"warps": 1}),
    "tvl1": ("tvl1", {}),
    "tvl1, warps=2, scale_step=0.8, scales=30": (
        "tvl1",
        {"warps": 2, "scale_step": 0.8, "scales": 30},
    ),
    "tvl1, warps=5, iterations=30, scale_step=0.8, scales=30": (
        "tvl1",
        {"warps": 5, "iterations": 30, "scale_step": 0.8, "scales": 30},
    ),
    "tvl1-opencv": ("tvl1-opencv", {}),
    "tvl1-opencv, warps=2, outer_iterations=1, inner_iterations=20, scale_step=0.5": (
        "tvl1-opencv",
        {"warps": 2, "outer_iterations": 1, "inner_iterations": 20, "scale_step": 0.5},
    ),
}
MOTIONS = (8, 16, 32)  # pixels, of the objects in the made pairs


def read_reduced(folder: Path, short_side: int | None) -> FlowPair:
    """Read a Middlebury pair, reduced to a shorter side of so many pixels where given."""
    pair = read_flow_pair(folder)
    if short_side is None:
        return pair
    height, width = pair.known.shape
    scale = short_side / min(height, width)
    size = (round(width * scale), round(height * scale))
    first, second, flow, share = (
        cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        for image in (pair.first, pair.second, pair.flow, pair.known.astype(np.float32))
    )
    # Shorter vectors in a smaller picture; the mean over the known pixels only.
    factor = np.array([size[0] / width, size[1] / height], np.float32)
    flow = flow * factor / np.maximum(share, 1e-3)[..., None]
    return FlowPair(first, second, flow, share > 0.5, pair.name)


def large_motion(davis: Path, motion: float, count: int = 8) -> list[FlowPair]:
    """Make pairs of 480 x 270 pixels: a DAVIS object moves by `motion`, what is behind by half.

    Object and background come from different videos. Each moves in a direction of its own, with a
    turn of about 0.6 degrees and a zoom of about 2 %; both frames get noise of 2 grey levels.
    """
    generator = np.random.default_rng(0)
    videos = sorted(path.name for path in (davis / "frames").iterdir())
    width, height = size = (480, 270)
    y, x = np.mgrid[:height, :width].astype(np.float32)

    def read(kind: str, video: str, middle: bool) -> np.ndarray:
        files = sorted((davis / kind / video).iterdir())
        image = cv2.imread(str(files[len(files) // 2 if middle else 0]))
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA)

    def random_map(length: float) -> np.ndarray:
        direction, turn = generator.uniform(0, 2 * np.pi), generator.normal(0, 0.01)
        zoom = 1 + generator.normal(0, 0.02)
        centre = np.array([width / 2, height / 2])
        cos, sin = zoom * np.cos(turn), zoom * np.sin(turn)
        matrix = np.array([[cos, -sin], [sin, cos]])
        shift = centre - matrix @ centre
        shift += length * np.array([np.cos(direction), np.sin(direction)])
        return np.float32(np.c_[matrix, shift])

    def flow_of(a: np.ndarray) -> np.ndarray:
        u, v = (a[i, 0] * x + a[i, 1] * y + a[i, 2] for i in (0, 1))
        return np.stack([u - x, v - y], -1)

    def noisy(image: np.ndarray) -> np.ndarray:
        image = np.rint(image + generator.normal(0, 2, image.shape))
        return np.clip(image, 0, 255).astype(np.uint8)[..., ::-1].copy()

    pairs = []
    for k in range(count):
        video = videos[k % len(videos)]
        thing, behind = (
            read("frames", video, True),
            read("frames", videos[(k + 3) % len(videos)], False),
        )
        mask = (read("masks", video, True).max(-1, keepdims=True) > 0).astype(np.float32)
        map_behind, map_thing = random_map(motion / 2), random_map(motion)
        moved_behind = cv2.warpAffine(
            behind, map_behind, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
        )
        moved_thing = cv2.warpAffine(thing, map_thing, size, flags=cv2.INTER_CUBIC)
        moved_mask = cv2.warpAffine(mask, map_thing, size, flags=cv2.INTER_LINEAR)[..., None]
        first = behind * (1 - mask) + thing * mask
        second = moved_behind * (1 - moved_mask) + moved_thing * moved_mask
        flow = np.where(mask > 0.5, flow_of(map_thing), flow_of(map_behind))
        u, v = x + flow[..., 0], y + flow[..., 1]
        inside = (u >= 0) & (u <= width - 1) & (v >= 0) & (v <= height - 1)
        pairs.append(FlowPair(noisy(first), noisy(second), flow, inside, f"made {k}"))
    return pairs


def measure(row: str | None, pair: FlowPair, device: str, runs: int = 5) -> tuple[float, float]:
    """Return the mean endpoint error in pixels and the time in milliseconds of one pair."""
    clock = time.thread_time if device == "cpu" else time.perf_counter
    flow, times = np.zeros_like(pair.flow), []
    while row is not None and len(times) < runs and sum(times) < 2000:
        method, options = ROWS[row]
        start = clock()
        flow = optical_flows(pair.first[None], pair.second[None], method, device, **options)[0]
        times.append(1000 * (clock() - start))
    error = np.linalg.norm(flow - pair.flow, axis=-1)[pair.known]
    return float(error.mean()), min(times, default=0.0)


def throughput(row: str, device: str, batch: int = 64, side: int = 256) -> dict[str, float]:
    """Return pairs a second of batches, from arrays of bytes to arrays of flow, and the error."""
    method, options = ROWS[row]
    noise = np.random.default_rng(0).integers(0, 256, (side + 8, side + 8)).astype(np.float32)
    image = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)
    image = np.rint(image).astype(np.uint8)
    first = np.repeat(image[None, 4:-4, 4:-4], batch, 0)
    second = np.repeat(image[None, 2:-6, 1:-7], batch, 0)  # moved by (3, 2)
    flow = optical_flows(first, second, method, device, **options)  # kernels are compiled here
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 2 and len(times) < 50):
        start = time.perf_counter()
        flow = optical_flows(first, second, method, device, **options)
        times.append(time.perf_counter() - start)
    error = np.linalg.norm(flow - np.float32([3, 2]), axis=-1)[:, 8:-8, 8:-8].mean()
    return {
        "pairs a second": batch / statistics.median(times),
        "best": batch / min(times),
        "error": float(error),
    }


def main() -> None:
    """Measure all methods and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="the folder that holds middlebury/")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--json", type=Path, help="also write the numbers of each pair here")
    arguments = parser.parse_args()
    data, device = arguments.data, arguments.device
    if data is None and device == "cpu":
        parser.error("the folder of the data is needed, except for batches on another device")
    cv2.setNumThreads(1)
    rows = [row for row in ROWS if device == "cpu" or ROWS[row][0] not in OPENCV_METHODS]
    print("# Accuracy and time of the flow methods\n")
    results: dict[str, Any] = {}
    if data is not None:
        results |= accuracy(parser, data, device, rows)
    command = ["DATA/flow"]
    if device != "cpu":
        results["batches"] = batches(device, rows)
        command = ["--device", device]
    print("\n" + footer(describe("flow_accuracy.py", command, device)))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def accuracy(
    parser: argparse.ArgumentParser, data: Path, device: str, rows: list[str]
) -> dict[str, Any]:
    """Print the tables of errors; return the numbers of each pair."""
    folders = sorted(path.parent for path in data.glob("middlebury/*/flow10.png"))
    if not folders:
        parser.error(f"no middlebury/*/flow10.png in {data}")
    clock = "CPU time of one thread" if device == "cpu" else f"time of a single pair on {device}"
    print(
        f"Middlebury pairs: {', '.join(folder.name for folder in folders)}. Error: mean endpoint\n"
        f"error of a pair in pixels at the size named, mean over the pairs. Time: {clock},\n"
        "smallest of up to 5 runs, median over the pairs.\n"
        "256: frames and true flow are first reduced to a shorter side of 256 pixels.\n"
    )
    sizes = {"native": None, "256": 256}
    sets = {size: [read_reduced(f, short) for f in folders] for size, short in sizes.items()}
    results = {"middlebury": print_table(sets, ["zero flow", *rows], device)}
    davis = data.parent / "davis"
    if (davis / "masks").is_dir():
        print(
            "\nLarge motion: 8 pairs of 480 x 270 pixels. An object cut from a DAVIS frame moves\n"
            "by as many pixels as the column says, the background by half of it; noise of 2 grey\n"
            "levels. Error over the pixels that stay in the picture.\n"
        )
        quick = [row for row in rows if row != "tvl1-opencv"]  # 10 s a pair
        made = {f"{motion} px": large_motion(davis, motion) for motion in MOTIONS}
        results["large motion"] = print_table(made, ["zero flow", *quick], device)
    return results


def print_table(sets: dict[str, list[FlowPair]], rows: list[str], device: str) -> dict[str, Any]:
    """Measure and print Markdown, a row a method; return [error, ms] of each pair."""
    print("| method | " + " | ".join(f"error, {name} | ms" for name in sets) + " |")
    print("|---" * (1 + 2 * len(sets)) + "|")
    results: dict[str, Any] = {}
    for row in rows:
        cells, results[row] = [], {}
        for name, pairs in sets.items():
            found = [measure(row if row in ROWS else None, pair, device) for pair in pairs]
            errors, times = zip(*found, strict=True)
            cells += [f"{statistics.mean(errors):.3f}", f"{statistics.median(times):.1f}"]
            results[row][name] = found
        print(f"| {row} | {' | '.join(cells)} |", flush=True)
    return results


def batches(device: str, rows: list[str]) -> dict[str, Any]:
    """Measure and print pairs a second in batches."""
    print("\nBatches of 64 pairs of 256 x 256 grey pixels, from arrays of bytes in the computer's")
    print("memory to arrays of flow there, wall clock; a texture that moves by (3, 2).\n")
    print("| method | pairs/s, median | best | error |\n|---|---|---|---|")
    results = {}
    for row in rows:
        found = results[row] = throughput(row, device)
        speed, best, error = found.values()
        print(f"| {row} | {speed:.0f} | {best:.0f} | {error:.3f} |", flush=True)
    return results


if __name__ == "__main__":
    main()
