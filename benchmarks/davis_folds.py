"""DAVIS with each sequence held out in turn: more than a fixed split of few scenes can tell.

    python benchmarks/davis_folds.py --davis DAVIS --encoder runs/NAME random:resnet18

The linear probe of `ssl-flow eval linear-probe` (its code and default settings, masks at their own
resolution) learns on every sequence but one and is scored on that one. Foreground IoU over the
pixels of all of them, and the mean over sequences, as DAVIS takes it. The encoder must not have
learned from any frame of DAVIS: what it knows of a held-out scene would count. A random:NAME named
again gets the next seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from machine import describe, footer
from torch import Tensor

from ssl_flow.data.davis import open_videos
from ssl_flow.data.segmentation import Labelled
from ssl_flow.evaluation.linear_probe import LinearProbe, draw_pixels, fit_probe
from ssl_flow.evaluation.metrics import ConfusionMatrix
from ssl_flow.evaluation.pixel_features import estimate_on, frozen, image_levels, project_levels
from ssl_flow.models import Encoder, load_encoder

Sequences = dict[str, list[Labelled]]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--davis", type=Path, required=True, help="the folder of DAVIS-2016")
    parser.add_argument("--encoder", nargs="+", required=True)
    parser.add_argument("--every", type=int, default=5, help="of the frames, one in so many")
    parser.add_argument("--draw", choices=["uniform", "balanced"], default="uniform")
    options = parser.parse_args()
    sequences = {
        video.name: [video[i] for i in range(0, len(video), options.every)]
        for split in ("train", "test")
        for video in open_videos(f"davis2016:{options.davis}", split).videos
    }
    print(f"| encoder | foreground IoU | mean | {' | '.join(sequences)} |")
    print("|---" * (3 + len(sequences)) + "|")
    for place, spec in enumerate(options.encoder):
        seed = options.encoder[:place].count(spec)
        encoder = load_encoder(spec, seed)
        if spec.startswith("random:"):
            estimate_on(encoder, [item for items in sequences.values() for item in items], 64)
        every = held_out(encoder, sequences, LinearProbe(draw=options.draw))
        total = ConfusionMatrix(2)
        total.counts = torch.stack([scores.counts for scores in every]).sum(0)
        each = [float(scores.iou()[1]) for scores in every]
        figures = [float(total.iou()[1]), float(np.mean(each)), *each]
        name = f"{spec}, seed {seed}" if spec.startswith("random:") else spec
        print(f"| {name} | {' | '.join(f'{x:.3f}' for x in figures)} |", flush=True)
    print("\n" + footer(describe("davis_folds.py", sys.argv[1:])), end="")


def held_out(
    encoder: Encoder, sequences: Sequences, protocol: LinearProbe
) -> list[ConfusionMatrix]:
    """What is right of each sequence by the probe that has not learned on it."""
    seen: dict[str, list[tuple[Labelled, list[Tensor], list[int]]]] = {}
    with frozen(encoder):
        for name, items in sequences.items():
            found = image_levels(encoder, items, protocol.features)
            # float16 as in the feature cache: half the memory
            seen[name] = [(item, [x.half() for x in maps], s) for item, maps, s in found]
    tables = []
    for name, judged in seen.items():
        learned = [found for other, part in seen.items() if other != name for found in part]
        draw = torch.Generator().manual_seed(0)
        widened = ((item, [x.float() for x in maps], s) for item, maps, s in learned)
        features, labels, _ = draw_pixels(widened, len(learned), protocol, draw)
        weight, bias, _ = fit_probe(features, labels, 2, protocol, draw)
        table = ConfusionMatrix(2)
        with torch.inference_mode():
            for item, maps, strides in judged:
                levels = [x.float() for x in maps]
                logits = project_levels(levels, strides, weight, bias, item.mask.shape)
                table.update(logits[0].argmax(0), item.mask)
        tables.append(table)
    return tables


if __name__ == "__main__":
    main()
