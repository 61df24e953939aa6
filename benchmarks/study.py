"""One row of the study in docs/experiments.md: train a variant for equal processor time, judge it.

    python benchmarks/study.py --data DATA --out OUT --name kta --store STORE --lr 3e-3
    python benchmarks/study.py ... --name kta+ridge --terms kernel_alignment,ridge=0.5
    python benchmarks/study.py ... --name random --encoder random:resnet18      # judge only
    python benchmarks/study.py --out OUT --table                                # the rows so far

The loss is the sum of `--terms`, each with its weight. Beside the three objectives of
`CrossPixelFlowLoss` and `ridge` (`RidgeFlowLoss`): `edges` (the same of the flow's differences
between neighbouring pixels), `centered` (centred kernel alignment of 512 pixels), and, with
`--views 2` (two crops of each frame), `ridge_crop` (the map is fitted on the other crop),
`consistency` (the same place has the same embedding in both crops) and `contrast` (and another one
than other places: InfoNCE). With `--ema` the other crop is seen by the averaged encoder, which is
judged, too. Further stores (`--store A,B`) hold other gaps of the same frames: the loss is the mean
over them.

`--deep`: weight of the terms of flow for a second embedding, of the level of stride 16 alone.

Crops are `--crop` pixels high and `--width` (0: as many) wide; with `--start-crop` they grow.

Learns for so many processor minutes on one thread, whatever else the machine does. Judged is by
benchmarks/study_judge.py. Appends a line to OUT/rows.jsonl and prints it.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from study_judge import judge
from torch import Tensor, nn

from ssl_flow.config import Config, TrainConfig
from ssl_flow.data.augment import Pair, Windows, augment, normalize_flow
from ssl_flow.data.pairs import FlowPairs, Window, collate, cut, sample_color, sample_geometry
from ssl_flow.flow import FlowStore
from ssl_flow.flow.store import Sample
from ssl_flow.losses import CrossPixelFlowLoss, RidgeFlowLoss
from ssl_flow.losses.ridge import fit_ridge
from ssl_flow.models import Encoder, create_encoder, load_encoder, save_encoder
from ssl_flow.training.flow_task import pool_flow
from ssl_flow.training.step import Shadow, amp_type, learning_rate, make_optimizer, update_average

NUMBERS = {
    "cpu-minutes": 4.0, "lr": 1e-3, "weight-decay": 0.05, "ema": 0.0, "min-scale": 0.3,
    "jitter": 0.4, "scale": 1.0, "sigma": 0.5, "tau-e": 0.1, "tau-f": 0.1, "crop": 128, "batch": 16,
    "dim": 16, "deep": 0.0, "width": 0, "start-crop": 0, "hidden": 128, "views": 1, "samples": 0,
    "seed": 0,
}  # fmt: skip
OBJECTIVES = ("cross_entropy", "kernel_alignment", "regression")


class Views:
    """Example k: one or two crops of a frame, with the flow of each store."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Open the stores; a frame that a further one lacks keeps the flow of the first."""
        self.options = options
        self.stores = [FlowStore(path) for path in options.store.split(",")]
        self.order = FlowPairs(self.stores[0], length=0, seed=options.seed)
        self.places = [{place(store[i]): i for i in range(len(store))} for store in self.stores[1:]]

    def batch(self, first: int, count: int) -> tuple[list[Windows], Tensor]:
        """The windows with each store's flow, view by view; (B, 4): left, top, width, height."""
        windows: list[list[Window]] = [[] for _ in self.stores]
        boxes = []
        examples = [self._example(k) for k in range(first, first + count)]
        for view in range(self.options.views):
            for views in examples:
                box, flows = views[view]
                boxes.append(box)
                for mine, window in zip(windows, flows, strict=True):
                    mine.append(window)
        return [collate(some) for some in windows], torch.tensor(boxes)

    def _example(self, k: int) -> list[tuple[list[float], list[Window]]]:
        first = self.stores[0][self.order.pair_index(k)]
        key = place(first)
        samples = [first]
        for store, known in zip(self.stores[1:], self.places, strict=True):
            samples.append(store[known[key]] if key in known else first)
        rng = np.random.default_rng((self.options.seed, 2, k))
        views = []
        for _ in range(self.options.views):
            height, width = first.valid.shape
            aspect = (self.options.width or self.options.crop) / self.options.crop
            g = sample_geometry(rng, height, width, self.options.min_scale, aspect)
            color = sample_color(rng, self.options.jitter)
            windows = [cut(sample, g, color) for sample in samples]
            views.append(([float(v) for v in (g.left, g.top, g.width, g.height)], windows))
        return views


def place(sample: Sample) -> tuple[str, float]:
    """Which frame of which video a pair begins with."""
    return sample.meta["video"], round(sample.meta["time"], 3)


def same_places(boxes: Tensor, flip: Tensor, cells: int) -> Tensor:
    """Where the cells of each view are in the other: (B, cells, cells, 2) as `grid_sample` reads.

    Args:
        boxes: (B, 4), left, top, width, height in the frame; the second half are the other views.
        flip: (B,) bool.
        cells: side of the embedding.
    """
    line = (torch.arange(cells) + 0.5) / cells
    x, y = line.expand(len(boxes), cells), line.expand(len(boxes), cells)
    x = torch.where(flip[:, None], 1 - x, x) * boxes[:, 2:3] + boxes[:, 0:1]
    y = y * boxes[:, 3:4] + boxes[:, 1:2]
    other, other_flip = boxes.roll(len(boxes) // 2, 0), flip.roll(len(boxes) // 2, 0)
    x = (x - other[:, 0:1]) / other[:, 2:3] * 2 - 1
    y = (y - other[:, 1:2]) / other[:, 3:4] * 2 - 1
    x = torch.where(other_flip[:, None], -x, x)
    return torch.stack([x[:, None].expand(-1, cells, -1), y[..., None].expand(-1, -1, cells)], -1)


class Terms:
    """The terms of the loss of a batch."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Read `--terms`."""
        parts = [term.partition("=") for term in options.terms.split(",")]
        self.weights = {name: float(weight or 1) for name, _, weight in parts}
        self.options, self.ridge = options, RidgeFlowLoss()
        self.losses = {
            name: CrossPixelFlowLoss(
                objective=name,
                embedding_scale=options.scale,
                learn_scale=options.learn_scale,
                self_pairs=options.self_pairs,
                embedding_temperature=options.tau_e,
                flow_sigma=options.sigma,
                flow_temperature=options.tau_f,
            )
            for name in self.weights
            if name in OBJECTIVES
        }

    def flow_terms(self, embedding: Tensor, other: Tensor, pair: Pair, scale: Tensor) -> Tensor:
        """Those that one store's flow teaches; `other`: of the other view, in its order."""
        weight = pair.weight
        flow = normalize_flow(pair.flow, weight, self.options.norm)
        total = torch.zeros(())
        for name, share in self.weights.items():
            if name in self.losses:
                total = total + share * self.losses[name](*self._sampled(embedding, flow, weight))
            elif name == "ridge":
                total = total + share * self.ridge(embedding, flow, weight)
            elif name == "edges":
                total = total + share * edge_error(embedding, flow, weight)
            elif name == "centered":
                total = total + share * centered_alignment(embedding, flow, weight)
            elif name == "ridge_crop":
                both = both_views(pair.flow * scale[..., None, None], weight)
                half = len(weight) // 2
                fit = (other, both.roll(half, 0), weight.roll(half, 0))
                total = total + share * self.ridge(embedding, both, weight, fit)
        return total

    def image_terms(self, embedding: Tensor, other: Tensor, at: Tensor) -> Tensor:
        """Those that need no flow: `other` read at `at` should be like `embedding`."""
        total = torch.zeros(())
        inside = (at.abs() < 1).all(-1)
        if "consistency" in self.weights:
            seen = F.grid_sample(other.detach(), at, align_corners=False)
            error = (1 - F.cosine_similarity(embedding, seen)) * inside
            total = total + self.weights["consistency"] * error.sum() / inside.sum().clamp(min=1)
        if "contrast" in self.weights:
            seen = F.grid_sample(F.normalize(other), at, align_corners=False)
            some = inside.flatten().nonzero()[:, 0]
            some = some[torch.randperm(len(some))[:1024]]
            a, b = (
                F.normalize(e).permute(0, 2, 3, 1).flatten(0, 2)[some] for e in (embedding, seen)
            )
            total = total + self.weights["contrast"] * F.cross_entropy(
                a @ b.T / 0.1, torch.arange(len(some))
            )
        return total

    def _sampled(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """A random `--samples` of the pixels of each image (0: all), as one row."""
        count, cells = self.options.samples, maps[-1][0].numel()
        if not count:
            return maps
        some = torch.stack([torch.randperm(cells)[:count] for _ in maps[0]])
        rows = [m.unflatten(0, (-1, 1)) if m.ndim == 3 else m for m in maps]
        rows = [r.flatten(2).gather(2, some[:, None].expand(-1, r.shape[1], -1)) for r in rows]
        return rows[0][:, :, None], rows[1][:, :, None], rows[2]


def both_views(flow: Tensor, weight: Tensor) -> Tensor:
    """Standardise the flow of both views of a frame together, (B, 2, h, w) in one unit."""
    pairs = torch.cat(flow.chunk(2), 2), torch.cat(weight.chunk(2), 1)
    return torch.cat(normalize_flow(*pairs).chunk(2, 2))


def edge_error(embedding: Tensor, flow: Tensor, weight: Tensor, ridge: float = 0.1) -> Tensor:
    """The ridge map's L1 error on differences of neighbours, 1 = no edges (arXiv 2511.07696)."""
    e = F.normalize(embedding, dim=1)
    rows = [m.flatten(2).mT for m in (e, flow)]
    slope, _, _ = fit_ridge(*rows, weight.flatten(1), ridge)
    rest = flow - torch.einsum("bdhw,bdc->bchw", e, slope)
    errors, edges = torch.zeros(len(flow)), torch.full((len(flow),), 1e-6)
    for d in (2, 3):
        w = (weight.unfold(d - 1, 2, 1) > 0).all(-1)
        difference, true = (m.diff(dim=d).abs().sum(1) * w for m in (rest, flow))
        errors, edges = errors + difference.sum((1, 2)), edges + true.sum((1, 2))
    return (errors / edges).mean()


def centered_alignment(
    embedding: Tensor, flow: Tensor, weight: Tensor, sigma: float = 0.5
) -> Tensor:
    """1 - centred kernel alignment (Cortes et al., JMLR 2012) of 512 pixels an image, dense."""
    losses = []
    for e, f, w in zip(embedding, flow, weight, strict=True):
        some = w.flatten().nonzero()[:, 0]
        some = some[torch.randperm(len(some))[:512]]
        a = F.normalize(e.flatten(1)[:, some].T.float())
        b = f.flatten(1)[:, some].T
        kernels = a @ a.T, torch.exp(-torch.cdist(b, b).square() / (2 * sigma**2))
        k, t = (m - m.mean(0) - m.mean(1, keepdim=True) + m.mean() for m in kernels)
        losses.append(1 - (k * t).sum() / (k.norm() * t.norm()).clamp(min=1e-9))
    return torch.stack(losses).mean()


def train(options: argparse.Namespace) -> tuple[list[Path], int]:
    """Learn for the time given; the folders of the encoder and of the averaged one."""
    torch.manual_seed(options.seed)
    encoder = create_encoder(options.backbone, options.dim, options.hidden)
    encoder = encoder.to(memory_format=torch.channels_last)
    schedule = TrainConfig(steps=10**6, learning_rate=options.lr, weight_decay=options.weight_decay)
    config = Config(train=schedule)
    deep = nn.Sequential(
        nn.BatchNorm2d(options.hidden), nn.ReLU(), nn.Conv2d(options.hidden, options.dim, 1)
    )
    learned = nn.ModuleList([encoder, deep] if options.deep else [encoder])
    optimizer, terms, views = make_optimizer(config, learned), Terms(options), Views(options)
    if options.learn_scale:
        scales = [p for loss in terms.losses.values() for p in loss.parameters()]
        optimizer.add_param_group({"params": scales, "weight_decay": 0.0})
    averaged = copy.deepcopy(encoder)
    shadow = Shadow(encoder.state_dict().values(), averaged.state_dict().values())
    autocast, half, step = amp_type(config, torch.device("cpu")), options.batch, 0
    start, budget = time.process_time(), 60 * options.cpu_minutes
    while (done := (time.process_time() - start) / budget) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, int(1e6 * done))
        windows, boxes = views.batch(step * half, half)
        side = options.crop
        if options.start_crop:
            stages = (side - options.start_crop) // 32
            side = min(side, options.start_crop + 32 * int(done * 1.5 * stages))
        shape = (side, options.width or side)
        pairs = [augment(some, shape) for some in windows]
        images = encoder.normalize(pairs[0].image).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            embedding, level = (x.float() for x in encoder(images, 16))
            with torch.no_grad():
                other = averaged(images).float() if options.ema else embedding
        other = other if options.ema else embedding
        flip = windows[0].flip
        # Pixels of the crop -> of the frame, with a flip undone: one unit for both views.
        scale = boxes[:, 2:] / side * torch.stack([1 - 2.0 * flip, torch.ones(len(flip))], 1)
        other = other.roll(half, 0)
        loss = terms.flow_terms(embedding, other, pairs[0], scale)
        for pair in pairs[1:]:
            loss = loss + terms.flow_terms(embedding, other, pair, scale)
        loss = loss / len(pairs)
        if options.deep:
            second, (flow, weight) = deep(level), pool_flow(pairs[0].flow, pairs[0].weight, 4)
            pair = pairs[0]._replace(flow=flow, weight=weight)
            loss = loss + options.deep * terms.flow_terms(second, second, pair, scale)
        if options.views == 2:
            at = same_places(boxes, flip, side // 4)
            loss = loss + terms.image_terms(embedding, other, at)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if nn.utils.clip_grad_norm_(learned.parameters(), 1.0).isfinite():
            optimizer.step()
        if options.ema:
            update_average(shadow, options.ema, step)
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {done:.0%}: loss {loss.item():.4f}", flush=True)
    folders = [options.out / "encoders" / options.name]
    save_encoder(encoder, folders[0])
    if options.ema:
        folders.append(options.out / "encoders" / f"{options.name}+ema")
        save_encoder(averaged, folders[1])
    return folders, step


def table(out: Path) -> str:
    """The rows so far as Markdown."""
    lines = ["| name | options | steps | DAVIS | mean | CamVid |", "|---|---|---|---|---|---|"]
    for row in map(json.loads, (out / "rows.jsonl").read_text().splitlines()):
        call = row["call"] + " "
        call = re.sub(r"--(data|out|name) \S+ ", "", call)
        call = re.sub(r"[^\s,]*/", "", call)  # of stores and encoders the names alone
        scores = " | ".join(f"{row[key]:.3f}" for key in ("davis", "davis mean", "camvid"))
        lines.append(f"| {row['name']} | `{call.strip()}` | {row.get('steps', '')} | {scores} |")
    return "\n".join(lines)


def main() -> None:
    """Train (unless --encoder), judge, append, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True)
    if "--table" in sys.argv:
        add("--table", action="store_true")
        return print(table(parser.parse_args().out))
    add("--data", type=Path, required=True, help="the folder of davis/ and camvid/")
    add("--name", required=True)
    add("--store", help="one or several, see above")
    add("--terms", default="kernel_alignment")
    add("--encoder", help="judge this one instead of training")
    add("--backbone", default="resnet18")
    add("--norm", default="standardize")
    add("--self-pairs", default="exclude")
    add("--learn-scale", action="store_true")
    for name, value in NUMBERS.items():
        add(f"--{name}", type=type(value), default=value)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)

    def emit(name: str, encoder: Encoder, **row: object) -> None:
        scores = judge(
            encoder, options.data, estimate=(options.encoder or "").startswith("random:")
        )
        line = json.dumps({"name": name, **row, **scores, "call": " ".join(sys.argv[1:])})
        with (options.out / "rows.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    if options.encoder:
        emit(options.name, load_encoder(options.encoder, options.seed))
        return
    folders, steps = train(options)
    for folder in folders:
        emit(folder.name, load_encoder(str(folder)), steps=steps)


if __name__ == "__main__":
    main()
