"""What a CNN that is taught a map's labels finds where `ssl-flow eval loc2vec` judges: a yardstick.

    python benchmarks/tile_labels.py --map map:PATH@satellite --metres 75000

An encoder that has seen no label is judged by neighbours among the tiles of the train blocks. How
much is there to be found at all? The same small network (`tile_cnn`), on the same tiles of the same
blocks, turned and mirrored at random, by cross-entropy; the judged tiles are those of the protocol.
Prints shares of right tiles, 95 % intervals over blocks, and the paired difference to histograms +
kNN (`ssl_flow.evaluation.loc2vec`). Nothing is chosen by the judged tiles: it is the last step's.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import timm
import torch
import torch.nn.functional as F
from machine import describe, footer
from torch import Tensor

from ssl_flow.data.open_map import open_map_spec
from ssl_flow.evaluation.intervals import interval_of_difference, interval_of_outcomes
from ssl_flow.evaluation.loc2vec import Judged, Loc2Vec, judged_tiles, load_judged, run_loc2vec
from ssl_flow.evaluation.outcome import Outcome


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--map", required=True, help="map:PATH or map:PATH@NAME,NAME")
    parser.add_argument("--metres", type=float, required=True)
    parser.add_argument("--train-tiles", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    tile_map = open_map_spec(options.map)
    protocol = Loc2Vec(metres=options.metres, pixels=32)
    floor = run_loc2vec(load_judged("histograms", 0, tile_map), tile_map, protocol)
    taught = Loc2Vec(metres=options.metres, pixels=32, train_tiles=options.train_tiles)
    train, test, _ = judged_tiles(tile_map, taught)
    blocks = [item.split("/")[0] for item in floor.items]
    print("| label | taught | histograms, kNN | difference |\n|---|---|---|---|")
    for label in test.labels:
        outcomes = [teach(train, test, label, options.steps, s) for s in range(options.seeds)]
        for outcome in outcomes:
            outcome.items = floor.items
        score = f"knn_{label}"
        found = [interval_of_outcomes(some, score, blocks) for some in (outcomes, [floor])]
        apart = interval_of_difference(outcomes, [floor], score, blocks)
        cells = [f"{x.value:.3f} [{x.low:.3f}, {x.high:.3f}]" for x in (*found, apart) if x]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)
    print("\n" + footer(describe("tile_labels.py", sys.argv[1:])), end="")


def teach(train: Judged, test: Judged, label: str, steps: int, seed: int) -> Outcome:
    """Train on the labels of `train`; what is right of `test`, under the name of the kNN score."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    channels, classes = train.tiles.shape[-1], int(train.labels[label].max()) + 1
    model = timm.create_model("tile_cnn", in_chans=channels, num_classes=classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    labels = torch.from_numpy(train.labels[label]).long()
    for _ in range(steps):
        chosen = torch.randint(len(labels), (128,), generator=draw)
        x = as_input(train.tiles[chosen.numpy()])
        x = x.rot90(int(torch.randint(4, (), generator=draw)), (2, 3))
        x = x.flip(3) if torch.rand((), generator=draw) < 0.5 else x
        loss = F.cross_entropy(model(x), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.inference_mode():
        parts = np.array_split(test.tiles, 8)
        found = torch.cat([model(as_input(part)).argmax(1) for part in parts])
    right = (found.numpy() == test.labels[label]).astype(np.float64)
    return Outcome({f"knn_{label}": float(right.mean())}, values={f"knn_{label}": right})


def as_input(tiles: np.ndarray) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32 about 0."""
    return torch.from_numpy(tiles).permute(0, 3, 1, 2).float().div(127.5).sub(1)


if __name__ == "__main__":
    main()
