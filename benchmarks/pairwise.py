"""Time and memory of the cross-pixel loss, forward and backward, beside its rivals.

    python benchmarks/pairwise.py --device cpu        # about 8 minutes on 2 cores
    python benchmarks/pairwise.py --device cuda       # also the GPU's floor and a training step

Prints a table and writes pairwise_cpu (or pairwise_GPU'S-NAME) .md, .json and .png into
benchmarks/results. On a CPU each measurement is a process of its own, so that its peak memory is
its own, and the methods take turns, round by round, so that a slow spell of the machine hits them
all. On a GPU a process measures one method at all sizes. Ctrl-C reports what has been measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine import describe, footer
from pairwise_methods import METHODS, Job

from ssl_flow.losses.cross_pixel import OBJECTIVES

ONE_ROUND = 10.0  # seconds: a step expected to take longer is measured in one round only
Point = tuple[int, int]  # B, N
GRIDS: dict[str, list[Point]] = {
    "cpu": [(4, 784), (4, 3136), (1, 12544), (1, 50176)],
    "cuda": [(32, 784), (32, 3136), (8, 12544), (8, 50176)],
}
# How many times faster than a rival the library's own method is to be, and where.
GOALS: dict[str, tuple[Point, dict[str, float]]] = {
    "cpu": ((4, 3136), {"dense": 3, "compiled": 1}),
    "cuda": ((32, 3136), {"dense": 10, "compiled": 3, "flex": 2, "keops": 5}),
}


class Results:
    """What was measured: for each method and size one entry a round."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.entries: dict[tuple[str, Point], list[dict[str, Any]]] = {}
        self.unavailable: dict[str, str] = {}  # method: why
        self.gpu: dict[str, Any] = {}  # what pairwise_gpu.py says

    def add(self, method: str, points: list[Point], lines: list[dict[str, Any]]) -> None:
        """Enter a worker's lines; sizes that it didn't reach get the reason of its end."""
        for line in lines:
            if "unavailable" in line:
                self.unavailable[method] = line["unavailable"]
                return
        found = {(line["images"], line["pixels"]): line for line in lines if "images" in line}
        ended = {"note": next((line["ended"] for line in lines if "ended" in line), "no result")}
        for point in points:
            self.entries.setdefault((method, point), []).append(found.get(point, ended))

    def rows(self) -> list[dict[str, Any]]:
        """One a method and size: the median of the rounds' seconds, the most bytes, or a note."""
        rows = []
        for (method, (images, pixels)), entries in self.entries.items():
            row: dict[str, Any] = {"method": method, "images": images, "pixels": pixels}
            times = [entry["seconds"] for entry in entries if "seconds" in entry]
            if times:
                size = max(entry["bytes"] for entry in entries if "bytes" in entry)
                row |= {"seconds": statistics.median(times), "rounds": times, "bytes": size}
            else:
                row["note"] = entries[0]["note"]
            rows.append(row)
        order = list(METHODS)
        return sorted(rows, key=lambda r: (r["pixels"], r["images"], order.index(r["method"])))

    def expected(self, method: str, point: Point) -> float:
        """Seconds of a step by the growth of B N^2 from the largest size known, or 0."""
        known = [
            (images * pixels**2, entry["seconds"])
            for (name, (images, pixels)), entries in self.entries.items()
            for entry in entries
            if name == method and "seconds" in entry
        ]
        pairs, seconds = max(known, default=(1, 0.0))
        return float(seconds * point[0] * point[1] ** 2 / pairs)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and write the files."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    results = Results()
    try:
        collect(args, results)
    except KeyboardInterrupt:
        print("interrupted: reporting what has been measured", file=sys.stderr)
    name = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    parts = ["pairwise", re.sub(r"\W+", "_", name).lower()]
    parts += [args.dtype] * (args.dtype != "float32")
    parts += [args.objective] * (args.objective != "cross_entropy")
    parts += ["tf32"] * args.tf32 + [f"d{args.dim}"] * (args.dim != 16)
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / "_".join(parts)
    content = {
        **describe("pairwise.py", argv, args.device, args.threads),
        "rows": results.rows(),
        "unavailable": results.unavailable,
        "goals": goals(args, results),
        "gpu": results.gpu,
    }
    base.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    base.with_suffix(".md").write_text(text := table(args, content))
    plot(content, base.with_suffix(".png"))
    print(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; the grid and the methods depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--grid", type=point, nargs="+", metavar="BxN", help="sizes, N a square: 32x3136")
    add("--methods", nargs="+", choices=METHODS, help="default: all, less the reference")
    add("--dim", type=int, default=16, help="D, the length of an embedding")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the embedding")
    add("--tf32", action="store_true", help="let float32 matrix products be TensorFloat-32")
    add("--objective", choices=OBJECTIVES, default="cross_entropy", help="rivals have only this")
    add("--rounds", type=int, help="turns of all methods; default 3, on a GPU 1")
    add("--seconds", type=float, default=2.0, help="to fill with steps, a method, size and round")
    add("--max-seconds", type=float, default=60.0, help="leave out slower steps (CPU)")
    add("--timeout", type=float, default=600.0, help="seconds after which a worker is ended")
    add("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    add("--out", type=Path, default=Path(__file__).with_name("results"), help="folder")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device was found")
    args.grid = sorted(args.grid or GRIDS[args.device], key=lambda p: (p[1], p[0]))
    if args.methods is None:
        left_out = {"reference"} | ({"triton"} if args.device == "cpu" else set())
        args.methods = [method for method in METHODS if method not in left_out]
    args.rounds = args.rounds or (3 if args.device == "cpu" else 1)
    return args


def point(text: str) -> Point:
    """Read ``BxN``."""
    images, pixels = (int(number) for number in text.split("x"))
    if images < 1 or pixels < 4 or math.isqrt(pixels) ** 2 != pixels:
        raise ValueError(f"{text}: B must be at least 1, N a square")
    return images, pixels


def collect(args: argparse.Namespace, results: Results) -> None:
    """Measure every method at every size, ``args.rounds`` times."""
    on_gpu = args.device == "cuda"
    if on_gpu:
        options = ["--dim", str(args.dim), "--dtype", args.dtype]
        for line in run_worker("pairwise_gpu.py", options, args):
            results.gpu |= line
    groups = [args.grid] if on_gpu else [[point] for point in args.grid]
    turns = [(points, method) for points in groups for method in args.methods] * args.rounds
    for points, method in turns:
        if method in results.unavailable or settled(args, results, method, points[0]):
            continue
        names = ("device", "dtype", "dim", "objective", "threads", "seconds", "tf32")
        job = Job(method, points, **{name: getattr(args, name) for name in names})
        lines = run_worker("pairwise_methods.py", [json.dumps(job._asdict())], args)
        results.add(method, points, lines)


def settled(args: argparse.Namespace, results: Results, method: str, point: Point) -> bool:
    """Whether this size needs no further measuring: far too slow, once enough, or impossible."""
    entries = results.entries.get((method, point), [])
    expected = results.expected(method, point)
    if args.device == "cpu" and not entries and expected > args.max_seconds:
        note = f"not run: ~{expected:.0f} s expected, limit {args.max_seconds:.0f} s"
        results.entries[method, point] = [{"note": note}]
        return True
    return bool(entries) and (expected > ONE_ROUND or "note" in entries[0])


def run_worker(script: str, options: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of a script beside this one; those up to its end if it fails or takes too long."""
    print(f"measuring: {script} {' '.join(options)}", file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__).with_name(script)), *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    ended = []
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, timeout=args.timeout, check=True
        )
        output = run.stdout
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", [{"ended": f"ended after {args.timeout:.0f} s"}]
    except subprocess.CalledProcessError as error:
        output, errors = error.stdout, error.stderr.decode(errors="replace").strip()
        print(errors, file=sys.stderr)
        ended = [{"ended": f"failed: {errors.splitlines()[-1] if errors else error}"[:200]}]
    lines = output.decode(errors="replace").splitlines()
    return [json.loads(line[7:]) for line in lines if line.startswith("RESULT ")] + ended


def goals(args: argparse.Namespace, results: Results) -> list[dict[str, Any]]:
    """What is to be reached on this device, and what was found (None: not measured)."""
    size, rivals = GOALS[args.device]
    rows = {(row["method"], row["images"], row["pixels"]): row for row in results.rows()}
    own = own_method(results.rows())

    def ratio(key: str, above: str, below: str) -> float | None:
        a, b = (rows.get((method, *size), {}).get(key) for method in (above, below))
        return a / b if a and b else None

    at = f"at {size[0]} x {size[1]}"
    rows_of_goals: list[tuple[str, float | None, str, float]] = [
        (f"{own}: times as fast as {rival}, {at}", ratio("seconds", rival, own), "at least", bound)
        for rival, bound in rivals.items()
    ]
    if args.device == "cpu":
        extra = rows.get((own, 1, 12544), {}).get("bytes")
        text = f"{own}: extra MiB at 1 x 12544"
        rows_of_goals.append((text, extra and extra / 2**20, "at most", 64))
    else:
        seconds = rows.get((own, *size), {}).get("seconds")
        floor = floor_seconds(results.gpu, *size, args.dim)
        share = floor / seconds if floor and seconds else None
        text = "share of the loss in a ResNet-50 step, 32 images of 224 x 224"
        rows_of_goals += [
            (
                f"{own}: extra memory over dense's, {at}",
                ratio("bytes", own, "dense"),
                "at most",
                0.02,
            ),
            (f"{own}: the GPU's floor over the time, {at}", share, "at least", 0.5),
            (text, results.gpu.get("share"), "at most", 0.1),
        ]
    return [{"goal": g, "found": f, kind: bound} for g, f, kind, bound in rows_of_goals]


def floor_seconds(gpu: dict[str, Any], images: int, pixels: int, dim: int) -> float | None:
    """Least time of a step by the GPU's ceilings, None without them.

    A pair costs 1 + 2 dot products of length D and 3 + 3 exponentials (forward + backward). The
    tensor cores work beside the special function units, so the slower of the two counts.
    """
    if "exponentials_per_second" not in gpu:
        return None
    pairs = images * pixels**2
    exponentials = 6 * pairs / gpu["exponentials_per_second"]
    return float(max(exponentials, 3 * 2 * dim * pairs / gpu["tensor_flops_per_second"]))


def own_method(rows: list[dict[str, Any]]) -> str:
    """The library's own method to compare with: its kernel, or the tiles where it didn't run."""
    measured = {row["method"] for row in rows if "seconds" in row}
    return "triton" if "triton" in measured else "chunked"


def table(args: argparse.Namespace, content: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows, gpu = content["rows"], content["gpu"]
    own = own_method(rows)
    at = {
        (r["images"], r["pixels"]): r["seconds"]
        for r in rows
        if r.get("method") == own and "seconds" in r
    }
    lines = [
        "# Time and memory of the cross-pixel loss",
        "",
        f"Forward and backward of {args.objective}, D = {args.dim}, {args.dtype} embeddings"
        + (", matrix products of float32 in TensorFloat-32. ms:" if args.tf32 else ". ms:"),
        f"median over {args.rounds} round(s), each the median of its steps. Extra MiB: how much a",
        "step raises the peak of memory, its gradient included.",
        "",
        f"| B | N | method | ms | from .. to | extra MiB | time over that of {own} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['images']} | {row['pixels']} | {row['method']} |"
        if "note" in row:
            lines.append(f"{start} {row['note']} | | | |")
            continue
        low, middle, high = (
            milliseconds(t) for t in (min(row["rounds"]), row["seconds"], max(row["rounds"]))
        )
        base = at.get((row["images"], row["pixels"]))
        ratio = f"{row['seconds'] / base:.2f}" if base else ""
        lines.append(f"{start} {middle} | {low} .. {high} | {row['bytes'] / 2**20:.1f} | {ratio} |")
    for method, why in content["unavailable"].items():
        lines.append(f"| all | all | {method} | not available here: {why} | | | |")
    lines += ["", "| to reach | found | bound |", "|---|---|---|"]
    for goal in content["goals"]:
        kind = "at least" if "at least" in goal else "at most"
        found = "not measured" if goal["found"] is None else f"{goal['found']:.3g}"
        lines.append(f"| {goal['goal']} | {found} | {kind} {goal[kind]} |")
    if gpu:
        lines += ["", "| of this GPU, in the same run | |", "|---|---|"]
        for key, value in gpu.items():
            shown = value if isinstance(value, str) else f"{value:.4g}"
            lines.append(f"| {key.replace('_', ' ')} | {shown} |")
    lines += ["", *(f"- `{name}`: {text}" for name, text in METHODS.items()), ""]
    return "\n".join([*lines, footer(content)])


def milliseconds(seconds: float) -> str:
    """Three digits or more of a time, in milliseconds."""
    return f"{1000 * seconds:.0f}" if seconds >= 1 else f"{1000 * seconds:.3g}"


def plot(content: dict[str, Any], path: Path) -> None:
    """Draw time an image against N, both logarithmic, a line a method; not without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is missing", file=sys.stderr)
        return
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in METHODS:
        rows = [r for r in content["rows"] if r["method"] == method and "seconds" in r]
        x = [row["pixels"] for row in rows]
        y = [1000 * row["seconds"] / row["images"] for row in rows]
        if rows:
            axes.loglog(x, y, "o-", label=method)
    axes.set(xlabel="pixels N of an image", ylabel="forward + backward, ms an image")
    axes.set_title(content["machine"], fontsize="small")
    axes.grid(which="both", alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
