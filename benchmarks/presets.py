"""What each preset takes on this machine: seconds a step, and memory.

    python benchmarks/presets.py > benchmarks/results/presets.md

`ssl-flow train PRESET` in a process of its own with one thread, for some steps on a small store
(synthetic videos, or --store). The presets for GPUs with 8 crops a step instead of theirs. Seconds
are those between the logged lines of the later half, without starting up; memory is the process's
largest resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from machine import describe, footer

from ssl_flow.config import load_config, preset_files
from ssl_flow.data.synthetic import synthetic_sources
from ssl_flow.flow import extract

GPU = ("default", "vit_small", "multi_gpu", "paper_alexnet")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, help="a flow store (default: synthetic videos)")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    print("| preset | backbone | crops a step | side | seconds a step | memory, GiB | steps |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        store = options.store or Path(scratch, "store")
        if options.store is None:
            extract(synthetic_sources(8, seed=0), store, method="dis", size=256, gap=0.1)
        for name in preset_files():
            config = load_config(name)
            if config.data.store.startswith("map:"):
                continue
            batch = 8 if name in GPU else config.train.batch_size
            seconds, memory = measure(name, batch, store, options.steps, Path(scratch, name))
            cells = [f"`{name}`", config.model.backbone, str(batch), str(config.data.crop)]
            cells += [f"{seconds:.2f}", f"{memory:.1f}", str(config.train.steps)]
            print(f"| {' | '.join(cells)} |", flush=True)
    print("\n" + footer(describe("presets.py", sys.argv[1:], threads=1)), end="")


def measure(preset: str, batch: int, store: Path, steps: int, out: Path) -> tuple[float, float]:
    """Seconds a step and GiB of one short run."""
    command = [sys.executable, "-m", "ssl_flow.cli", "train", preset, "--out", str(out)]
    for key, value in {
        "data.store": store,
        "data.workers": 0,
        "train.steps": steps,
        "train.batch-size": batch,
        "train.log-every": 2,
        "evaluation.data": "none",
    }.items():
        command += [f"--{key}", str(value)]
    log = os.open(out.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
    actions = [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = os.posix_spawn(sys.executable, command, environment, file_actions=actions)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{preset}: {out.with_suffix('.log').read_text()[-2000:]}")
    (metrics,) = out.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines[len(lines) // 2 :]]
    return batch / statistics.median(rates), usage.ru_maxrss / 2**20


if __name__ == "__main__":
    main()
