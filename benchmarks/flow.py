"""Speed of `ssl-flow flow` with each method, beside a bare loop of flow calls on decoded frames.

    python benchmarks/flow.py DATA                  # about 5 minutes on 2 cores
    python benchmarks/flow.py DATA --device cuda    # the methods that run there, in batches

DATA/video holds clips, DATA/flow/middlebury pairs with true flow (see flow_accuracy.py). Writes
flow.md and flow.json (flow_cuda with that device) into benchmarks/results. Loop, one worker and two
workers take turns, round by round, so that a slow spell of the machine hits all three.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from flow_accuracy import read_reduced
from machine import describe, footer

from ssl_flow.flow import OPTIONS, Frame, Source, extract, optical_flow, read_frames
from ssl_flow.flow.estimators import OPENCV_METHODS, grey, optical_flows
from ssl_flow.flow.pairs import is_still, pair_frames

SIZE, GAP, BATCH = 256, 0.1, 32
GOALS = {"1 worker": 0.95, "2 workers": 1.9}  # times the loop's pairs/s, to be reached
# Another name of dis-medium; what `farneback` is on a CPU and on CUDA; needs weights.
LEFT_OUT = ("dis", "farneback-opencv", "farneback-torch", "raft")
Pair = tuple[np.ndarray, np.ndarray]  # two grey pictures (H, W)
# Stage of each function: its time with all that it calls, or, for what yields to other stages and
# for the small ones, by itself.
WITH_CALLS = {
    "optical_flow": "flow",
    "optical_flows": "flow",
    "flow_validity": "checks",
    "is_still": "checks",
    "is_motionless": "checks",
    "is_cut": "checks",
    "seen": "checks",
    "still_thumbnail": "checks",
    "_hash": "checks",
    "encode_flow": "encode flow",
    "_jpeg": "encode frame",
    "add": "write",
    "commit": "write",
    "_to_rgb": "resize",
    "grey": "resize",
}
ITSELF = {"_decode": "decode", "_read_video": "decode"}
STAGES = ["decode", "resize", "flow", "encode flow", "encode frame", "write", "checks", "rest"]


def first_frames(path: Path, seconds: float, log: Path, short_side: int | None) -> Iterator[Frame]:
    """Yield the frames of the first `seconds` of a video; note the time in `log` before."""
    with log.open("a") as file:
        file.write(f"{time.time()}\n")
    for frame in read_frames(path, short_side):
        if frame.time > seconds:
            return
        yield frame


def warm_up(short_side: int | None) -> Iterator[Frame]:
    """Yield a pair after a second: long enough for each worker to get one of these."""
    time.sleep(1)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    yield Frame(0.0, noise)
    yield Frame(GAP, np.roll(noise, 1, axis=1))


class Work:
    """The same pairs for the loop and for extraction: of each clip the first few."""

    def __init__(self, clips: list[Path], pairs: int, scratch: Path) -> None:
        """Take so many pairs of each clip; decode them for the loop."""
        self.clips, self.scratch = clips, scratch
        self.seconds = (pairs + 0.5) * GAP
        self.log = scratch / "begun"
        self.decoded: list[Pair] = []
        for source in self.sources(1):
            for first, second in pair_frames(source.frames(SIZE), GAP, GAP, Counter()):
                pair = grey(first.image), grey(second.image)
                if not is_still(*pair):  # extraction computes no flow of these
                    self.decoded.append(pair)

    def sources(self, copies: int) -> list[Source]:
        """Return each clip so many times."""
        return [
            Source(f"{i}/{clip.name}", partial(first_frames, clip, self.seconds, self.log), clip)
            for i in range(copies)
            for clip in self.clips
        ]

    def loop(self, method: str, device: str) -> dict[str, float]:
        """Time the flow calls alone."""
        wall, cpu = time.perf_counter(), time.process_time()
        if device == "cpu":
            for a, b in self.decoded:
                optical_flow(a, b, method)
        else:
            for shape in {a.shape for a, _ in self.decoded}:
                same = [pair for pair in self.decoded if pair[0].shape == shape]
                for i in range(0, len(same), BATCH):
                    prev, next = (np.stack(side) for side in zip(*same[i : i + BATCH], strict=True))
                    optical_flows(prev, next, method, device)
        return self._rate(1, time.perf_counter() - wall, time.process_time() - cpu)

    def extract(self, method: str, workers: int, device: str) -> dict[str, float]:
        """Time extraction, from the first video that a worker opens to the end of the call."""
        self.log.unlink(missing_ok=True)
        warm = [Source(f"-/{i}", warm_up) for i in range(max(workers, 1))]
        sources = warm + self.sources(max(workers, 1))
        start = time.time()
        with tempfile.TemporaryDirectory(dir=self.scratch) as store:
            cpu = time.process_time()
            summary = extract(sources, store, method, SIZE, GAP, workers=workers, device=device)
            cpu = time.process_time() - cpu
            end = time.time()
        begun = min(float(line) for line in self.log.read_text().split())
        rate = self._rate(max(workers, 1), end - begun, cpu)
        return rate | {"start": begun - start, "bytes": summary.bytes / summary.pairs}

    def _rate(self, copies: int, wall: float, cpu: float) -> dict[str, float]:
        pairs = copies * len(self.decoded)
        return {"pairs/s": pairs / wall, "cpu ms": 1000 * cpu / pairs, "seconds": wall}

    def stages(self, method: str, device: str) -> dict[str, float]:
        """Return the processor milliseconds a pair of each stage, in this process."""
        profiler = cProfile.Profile(time.process_time)
        with tempfile.TemporaryDirectory(dir=self.scratch) as store:
            profiler.runcall(
                extract, self.sources(1), store, method, SIZE, GAP, workers=0, device=device
            )
        statistic: Any = pstats.Stats(profiler)
        stages = dict.fromkeys(STAGES, 0.0)
        for (file, _, name), (_, _, itself, whole, _) in statistic.stats.items():
            if file == "~" and " of 'av" in name and "'reformat'" not in name:
                stages["decode"] += itself
            elif "ssl_flow" in file and name in WITH_CALLS:
                stages[WITH_CALLS[name]] += whole
            elif "ssl_flow" in file and name in ITSELF:
                stages[ITSELF[name]] += itself
        stages["rest"] = statistic.total_tt - sum(stages.values())
        return {stage: 1000 * s / len(self.decoded) for stage, s in stages.items()}


def measure(
    method: str, clips: list[Path], seconds: float, rounds: int, device: str
) -> dict[str, Any]:
    """Measure one method in all ways."""
    with tempfile.TemporaryDirectory() as folder:
        small = Work(clips[:1], 1, Path(folder))
        if method != "tvl1-opencv":
            small.loop(method, device)  # imports and compiles
        one = 1 / small.loop(method, device)["pairs/s"]
        if one > 1:  # OpenCV's TV-L1 with its own parameters
            work, rounds = Work(clips[:2], 1, Path(folder)), 1
        else:
            # At least 8 pairs a clip, or opening the files would count too much.
            wanted = min(seconds / one, 20 * len(clips))
            some = clips[:: max(1, round(len(clips) * 8 / max(wanted, 32)))]
            work = Work(some, max(8, round(wanted / len(some))), Path(folder))
        workers = [1, 2] if device == "cpu" else [0]
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(rounds):
            found.setdefault("loop", []).append(work.loop(method, device))
            for number in workers:
                entry = work.extract(method, number, device)
                found.setdefault(f"{number or 1} worker{'s' * (number > 1)}", []).append(entry)
        stages = work.stages(method, device)
    return {"pairs": len(work.decoded), "rounds": found, "cpu ms": stages}


def endpoint_error(method: str, data: Path, device: str) -> float:
    """Return the mean endpoint error over the Middlebury pairs, reduced to shorter side 256."""
    errors = []
    for file in sorted(data.glob("flow/middlebury/*/flow10.png")):
        pair = read_reduced(file.parent, SIZE)
        flow = optical_flows(pair.first[None], pair.second[None], method, device)[0]
        errors.append(np.linalg.norm(flow - pair.flow, axis=-1)[pair.known].mean())
    return float(np.mean(errors))


def middle(result: dict[str, Any], way: str, key: str) -> float:
    """Return the median of the rounds."""
    return statistics.median(entry[key] for entry in result["rounds"][way])


def ratio(result: dict[str, Any], way: str) -> float:
    """Return pairs/s over those of the loop in the same round: the median of the rounds."""
    pairs = zip(result["rounds"][way], result["rounds"]["loop"], strict=True)
    return statistics.median(a["pairs/s"] / b["pairs/s"] for a, b in pairs)


def report(results: dict[str, Any], device: str) -> str:
    """Return the tables as Markdown."""
    ways = [way for way in next(iter(results.values()))["rounds"] if way != "loop"]
    lines = [
        "# Speed of extraction\n",
        f"Clips of 240 to 480 lines, frames shrunk to a shorter side of {SIZE} pixels (mostly 455",
        f"x 256), pairs {GAP} s apart, no backward flow. Loop: nothing but the flow calls, in one",
        "thread, on decoded grey frames in memory. Workers: all of `extract`, from the video file",
        "to the finished store, without the start of the processes. x loop: pairs/s over those of",
        "the loop in the same round, median of the rounds. Error: mean endpoint error of the",
        "Middlebury pairs at this size.\n",
        "| method | error, px | loop, pairs/s | "
        + " | ".join(f"{way}, pairs/s | x loop" for way in ways)
        + " | KB a pair |",
        "|---" * (4 + 2 * len(ways)) + "|",
    ]
    for method, result in results.items():
        cells = [f"{result['error']:.3f}", f"{middle(result, 'loop', 'pairs/s'):.1f}"]
        for way in ways:
            cells += [f"{middle(result, way, 'pairs/s'):.1f}", f"{ratio(result, way):.2f}"]
        cells.append(f"{middle(result, ways[0], 'bytes') / 1000:.1f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines.append("")
    for way, goal in GOALS.items():
        if way in ways:
            reached = [name for name, result in results.items() if ratio(result, way) >= goal]
            lines.append(f"{goal} x loop with {way}: {', '.join(reached) or 'none'}.  ")
    lines += [
        "\nWhere the time goes: processor milliseconds a pair, in one process. flow / all is what",
        "part of the loop's speed could be reached at most. Processor time hardly depends on what",
        "else the machine does.\n",
        "| method | loop | all | flow / all | " + " | ".join(STAGES) + " |",
        "|---" * (4 + len(STAGES)) + "|",
    ]
    for method, result in results.items():
        stages = result["cpu ms"]
        total = sum(stages.values())
        cells = [f"{middle(result, 'loop', 'cpu ms'):.1f}", f"{total:.1f}"]
        cells.append(f"{stages['flow'] / total:.2f}")
        cells += [f"{stages[stage]:.2f}" for stage in STAGES]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def main() -> None:
    """Measure all methods, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder that holds video/ and flow/")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--methods", nargs="+", help="these only")
    parser.add_argument("--seconds", type=float, default=2.0, help="of the loop, each time")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    device = arguments.device
    clips = sorted(file for file in arguments.data.glob("video/*") if file.is_file())
    if not clips:
        parser.error(f"no video/* in {arguments.data}")
    methods = arguments.methods or [
        method
        for method in OPTIONS
        if method not in LEFT_OUT and (device == "cpu" or method not in OPENCV_METHODS)
    ]
    cv2.setNumThreads(1)
    import torch

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for method in methods:
        start = time.perf_counter()
        try:
            results[method] = measure(method, clips, arguments.seconds, arguments.rounds, device)
        except (RuntimeError, ImportError, cv2.error) as error:
            print(f"{method} is left out: {error}", file=sys.stderr)
            continue
        results[method]["error"] = endpoint_error(method, arguments.data, device)
        print(f"{method}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    machine = describe("flow.py", ["DATA", *sys.argv[2:]], device)
    text = report(results, device) + footer(machine)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "flow" if device == "cpu" else f"flow_{device.split(':')[0]}"
    (arguments.out / f"{name}.md").write_text(text)
    (arguments.out / f"{name}.json").write_text(
        json.dumps({**machine, "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
