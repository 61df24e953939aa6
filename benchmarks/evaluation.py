"""Where the time of a linear probe goes: computed features, extraction, cached features.

    python benchmarks/evaluation.py camvid:DATA/camvid > benchmarks/results/evaluation.md

The same probe (`LinearProbe()`, both splits of the set) runs three times: without a cache, while
filling a new one, and out of it. Wall and processor time (all threads) of the whole and of its
parts; the share of the wall time inside the backbone. The cache lies in a temporary folder (--cache
FOLDER keeps it: then the second run reads what an earlier call left). On a machine that others use,
OMP_WAIT_POLICY=PASSIVE keeps threads from spinning while they wait for each other, which made some
parts ten times as slow.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe, footer

from ssl_flow.data.segmentation import open_segmentation
from ssl_flow.evaluation import LinearProbe, feature_cache, linear_probe
from ssl_flow.evaluation.pixel_features import estimate_on
from ssl_flow.models import load_encoder

PARTS = {  # functions of linear_probe.py and feature_cache.py
    "run_linear_probe": "the whole probe",
    "cache_features": "extraction into the cache, or finding it done",
    "draw_pixels": "drawing training pixels, with their extraction",
    "fit_probe": "fitting",
}


class Clock:
    """Wall and processor seconds spent in functions, and how often they were called."""

    def __init__(self) -> None:
        """Nothing has been measured yet."""
        self.seconds: dict[str, list[float]] = {}

    def wrap(self, owner: Any, name: str) -> None:  # noqa: ANN401
        """Measure `owner.name` from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            begun = time.perf_counter(), time.process_time()
            result = function(*arguments, **options)
            total = self.seconds.setdefault(name, [0.0, 0.0, 0.0])
            total[0] += time.perf_counter() - begun[0]
            total[1] += time.process_time() - begun[1]
            total[2] += 1
            return result

        setattr(owner, name, timed)

    def take(self) -> dict[str, list[float]]:
        """What was measured since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="as ssl-flow eval linear-probe takes it")
    parser.add_argument("--encoder", default="random:resnet18")
    parser.add_argument("--features", default="hypercolumn")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--cache", type=Path, help="a folder that stays; default: a temporary one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        print(measure(options, options.cache or Path(scratch)))


def measure(options: argparse.Namespace, folder: Path) -> str:
    """Run the probes and return the report."""
    train, test = (open_segmentation(options.data, split) for split in ("train", "test"))
    encoder = load_encoder(options.encoder).to(options.device)
    protocol = LinearProbe(features=options.features)
    if options.encoder.startswith("random:"):
        estimate_on(encoder, train, 64)
    clock = Clock()
    for name in PARTS:
        clock.wrap(feature_cache if name == "cache_features" else linear_probe, name)
    clock.wrap(encoder, "features")
    runs = [("computed", None), ("into a cache", folder), ("out of it", folder)]
    lines = [
        "| features | part | wall s | processor s | of the wall time |",
        "|---|---|---|---|---|",
    ]
    scores = []
    for label, cache in runs:
        result = linear_probe.run_linear_probe(encoder, train, test, protocol, cache=cache)
        scores.append(f"{label} {result.scores['miou']:.4f}")
        seconds = clock.take()
        rows = [(text, seconds[name]) for name, text in PARTS.items() if name in seconds]
        backbone = seconds.get("features", [0.0, 0.0, 0.0])
        rows.append((f"in the backbone ({backbone[2]:.0f} forward passes)", backbone))
        lines += [
            f"| {label} | {part} | {wall:.1f} | {processor:.1f} | {wall / rows[0][1][0]:.3f} |"
            for part, (wall, processor, _) in rows
        ]
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    about = describe("evaluation.py", sys.argv[1:], options.device)
    if "OMP_WAIT_POLICY" in os.environ:
        about["command"] = f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']} {about['command']}"
    return "\n".join(
        [
            f"Linear probe of {options.encoder} ({options.features}) on {train.name}: {len(train)} "
            f"training and {len(test)} test images.\n",
            *lines,
            f"\nFeatures on the disk: {size / 2**30:.2f} GiB. mIoU: {', '.join(scores)}. Load "
            f"of the machine at the end: {os.getloadavg()[0]:.1f}.",
            f"\n{footer(about)}",
        ]
    )


if __name__ == "__main__":
    main()
