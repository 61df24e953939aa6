"""A contrastive peer: SimCLR, SimSiam or DenseCL on the frames of a flow store, through lightly.

    pip install ssl-flow[bench]         # lightly (MIT)
    python benchmarks/peers/contrastive.py --store STORE --out OUT --method simclr --minutes 5
    ssl-flow eval linear-probe --encoder OUT --data camvid:CAMVID --out OUT/eval

Heads, losses, memory banks, augmentations and LARS are lightly's, unchanged; the steps are those
of lightly's examples. Ours are what a fair comparison shares: the frames, each video equally often,
the backbone from random weights, channels_last, autocast and the learning rate's shape. Frames are
decoded once, before the clock starts, and kept (4 bytes a pixel). OUT gets encoder/, metrics.jsonl
and tensorboard/.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ssl_flow.config import Config, TrainConfig
from ssl_flow.data.pairs import FlowPairs
from ssl_flow.flow import FlowStore
from ssl_flow.models import Encoder, create_encoder, pick_device, save_encoder
from ssl_flow.training.monitors import Metrics
from ssl_flow.training.step import amp_type, learning_rate

try:
    from lightly.loss import NegativeCosineSimilarity, NTXentLoss
    from lightly.models import modules
    from lightly.models import utils as lightly_utils
    from lightly.transforms import DenseCLTransform, SimCLRTransform, SimSiamTransform
    from lightly.utils.lars import LARS
    from lightly.utils.scheduler import cosine_schedule
except ImportError as error:
    raise ImportError(
        f"the contrastive peer needs lightly ({error}): pip install ssl-flow[bench]"
    ) from error

DIM = 128  # of what SimCLR and DenseCL compare, as in both papers


class SimCLR(nn.Module):
    """Chen et al., ICML 2020 (arXiv 2002.05709)."""

    transform = SimCLRTransform

    def __init__(self, backbone: nn.Module, channels: int, options: argparse.Namespace) -> None:
        """`channels` of the backbone's last map."""
        super().__init__()
        self.backbone = backbone
        self.head = modules.SimCLRProjectionHead(channels, channels, DIM)
        self.criterion = NTXentLoss(options.temperature)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 128)."""
        projection: Tensor = self.head(pooled(self.backbone.forward_features(images)))
        return projection

    def loss(self, views: list[Tensor], done: float) -> tuple[Tensor, Tensor]:
        """Two views, and the share of the run that is done -> the loss, (B, D) projections."""
        first, second = (self(view).float() for view in views)
        with no_autocast(first):
            return self.criterion(first, second), first


class SimSiam(nn.Module):
    """Chen & He, CVPR 2021 (arXiv 2011.10566)."""

    transform = SimSiamTransform

    def __init__(self, backbone: nn.Module, channels: int, options: argparse.Namespace) -> None:
        """`channels` of the backbone's last map; the heads' widths are the paper's."""
        super().__init__()
        self.backbone = backbone
        self.projection_head = modules.SimSiamProjectionHead(channels, 2048, 2048)
        self.prediction_head = modules.SimSiamPredictionHead(2048, 512, 2048)
        self.criterion = NegativeCosineSimilarity()

    def loss(self, views: list[Tensor], done: float) -> tuple[Tensor, Tensor]:
        """As `SimCLR.loss`."""
        z = [self.projection_head(pooled(self.backbone.forward_features(v))) for v in views]
        p = [self.prediction_head(one).float() for one in z]
        z = [one.detach().float() for one in z]
        loss = 0.5 * (self.criterion(z[0], p[1]) + self.criterion(z[1], p[0]))
        return loss, z[0]


class DenseCL(nn.Module):
    """Wang et al., CVPR 2021 (arXiv 2011.09157): MoCo v2 on images and on cells of the map."""

    transform = DenseCLTransform

    def __init__(self, backbone: nn.Module, channels: int, options: argparse.Namespace) -> None:
        """`channels` of the backbone's last map."""
        super().__init__()
        self.start = options.momentum
        self.backbone = backbone
        self.query = nn.ModuleDict(
            {
                "backbone": backbone,
                "image": modules.DenseCLProjectionHead(channels, channels, DIM),
                "cells": modules.DenseCLProjectionHead(channels, channels, DIM),
            }
        )
        self.key = copy.deepcopy(self.query)
        lightly_utils.deactivate_requires_grad(self.key)
        bank = (options.queue, DIM)
        self.criterion_image = NTXentLoss(options.temperature, bank)
        self.criterion_cells = NTXentLoss(options.temperature, bank)

    def loss(self, views: list[Tensor], done: float) -> tuple[Tensor, Tensor]:
        """As `SimCLR.loss`."""
        momentum = cosine_schedule(int(1000 * done), 1000, self.start, 1.0)
        lightly_utils.update_momentum(self.query, self.key, momentum)
        cells, image, local = self._project(self.query, views[0])
        with torch.no_grad():
            key_cells, key_image, key_local = self._project(self.key, views[1])
        with no_autocast(image):
            key_local = lightly_utils.select_most_similar(cells, key_cells, key_local)
            loss = 0.5 * self.criterion_image(image, key_image)
            loss = loss + 0.5 * self.criterion_cells(local.flatten(0, 1), key_local.flatten(0, 1))
        return loss, image

    @staticmethod
    def _project(parts: nn.ModuleDict, images: Tensor) -> list[Tensor]:
        """(B, HW, C) cells of the map, (B, D) image, (B, HW, D) projected cells."""
        features = parts["backbone"].forward_features(images)
        cells = features.flatten(2).transpose(1, 2)
        maps = cells, parts["image"](pooled(features)), parts["cells"](cells)
        return [one.float() for one in maps]


# (optimiser, learning rate, temperature): see docs/experiments.md, "The contrastive peer".
METHODS: dict[str, tuple[type, str, float, float]] = {
    "simclr": (SimCLR, "adamw", 1e-3, 0.2),
    "simsiam": (SimSiam, "sgd", 0.05, 0.0),
    "densecl": (DenseCL, "sgd", 0.06, 0.2),
}


def pooled(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C)."""
    return features.mean((2, 3))


def no_autocast(like: Tensor) -> torch.autocast:
    """Where the losses are computed: in float32."""
    return torch.autocast(like.device.type, enabled=False)


def main(argv: list[str] | None = None) -> None:
    """Read the options, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="flow store; its frames are used")
    parser.add_argument("--out", required=True, type=Path, help="a new folder")
    parser.add_argument("--method", choices=METHODS, default="simclr")
    parser.add_argument("--backbone", default="resnet18", help="a convolutional timm model")
    parser.add_argument(
        "--minutes", type=float, help="CPU time of the process; on a GPU, time by the clock"
    )
    parser.add_argument("--steps", type=int, help="end after so many (or --minutes, if earlier)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--min-scale", type=float, default=0.2, help="smallest crop, area share")
    parser.add_argument("--jitter", type=float, default=0.5, help="lightly's cj_strength")
    parser.add_argument("--temporal", action="store_true", help="views of neighbouring frames")
    parser.add_argument("--optimizer", choices=("adamw", "sgd", "lars"), help="per method")
    parser.add_argument("--lr", type=float, help="per method")
    parser.add_argument("--weight-decay", type=float, help="adamw 0.05, sgd 1e-4, lars 1e-6")
    parser.add_argument("--temperature", type=float, help="0.2; SimSiam has none")
    parser.add_argument("--momentum", type=float, default=0.99, help="of DenseCL's keys at first")
    parser.add_argument("--queue", type=int, default=4096, help="DenseCL's negatives")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    if options.minutes is None and options.steps is None:
        parser.error("give --minutes or --steps")
    if options.batch_size < 2:
        parser.error("--batch-size must be 2 or more: BatchNorm and the losses compare images")
    if options.out.exists():
        parser.error(f"{options.out} exists already; give --out a new folder")
    _, optimizer, rate, temperature = METHODS[options.method]
    options.optimizer = options.optimizer or optimizer
    options.lr = rate if options.lr is None else options.lr
    options.temperature = temperature if options.temperature is None else options.temperature
    train(options)
    print(f"encoder: {options.out / 'encoder'}")


def train(options: argparse.Namespace) -> Encoder:
    """Train as the options of `main` say; the encoder is written to OUT/encoder and returned."""
    random.seed(options.seed)
    np.random.seed(options.seed)  # noqa: NPY002 (lightly's blur draws from it)
    torch.manual_seed(options.seed)
    device = pick_device(options.device)
    encoder = create_encoder(options.backbone)
    channels = encoder.backbone.num_features
    method = METHODS[options.method][0]
    model = method(encoder.backbone, channels, options)
    model.to(device=device, memory_format=torch.channels_last)
    optimizer = _optimizer(model, options)
    schedule = TrainConfig(steps=10**6, learning_rate=options.lr)
    config = Config(train=schedule)
    autocast_type = amp_type(config, device)
    store = FlowStore(options.store)
    # As pictures, since turning an array into one would cost a fifth of a view at each use.
    decoding = tqdm(range(len(store)), desc="decoding frames", unit="")
    frames = [Image.fromarray(store[i].frame) for i in decoding]
    batches = _batches(store, frames, method, encoder, options)
    options.out.mkdir(parents=True)
    metrics = Metrics(options.out)

    model.train()
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started, waited, step, done = clock(), 0.0, 0, 0.0
    progress = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    while done < 1:
        waiting = clock()
        views = [
            view.to(device).contiguous(memory_format=torch.channels_last) for view in next(batches)
        ]
        waited += clock() - waiting
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, int(1e6 * done))
        with torch.autocast(device.type, autocast_type, enabled=autocast_type is not None):
            loss, projection = model.loss(views, done)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        done = step / options.steps if options.steps else 0.0
        if options.minutes:
            done = max(done, (clock() - started) / (60 * options.minutes))
        if step % 10 == 0 or done >= 1:
            values = {
                "step": step,
                "loss": loss.item(),
                "spread": spread(projection),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds_per_step": (clock() - started) / step,
                "data_wait": waited / (clock() - started),
            }
            if not np.isfinite(values["loss"]):
                raise FloatingPointError(f"the loss is not finite at step {step}: lower --lr")
            metrics.write(values)
            progress.set_postfix_str(f"step {step}, loss {values['loss']:.3f}")
            progress.update(min(100, 100 * done) - progress.n)
    progress.close()
    metrics.close()
    save_encoder(encoder, options.out / "encoder")
    return encoder.eval()


@torch.no_grad()
def spread(projection: Tensor) -> float:
    """1 = spread over the sphere, 0 = collapsed (SimSiam, section 4.1). (B, D) of any length."""
    unit = F.normalize(projection.float(), dim=1)
    return float(unit.std(0).mean() * unit.shape[1] ** 0.5)


def _optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    kind = options.optimizer
    decay = {"adamw": 0.05, "sgd": 1e-4, "lars": 1e-6}[kind]
    decay = decay if options.weight_decay is None else options.weight_decay
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr)
    optimizer = LARS if kind == "lars" else torch.optim.SGD
    return optimizer(groups, lr=options.lr, momentum=0.9)


def _batches(
    store: FlowStore,
    frames: list[Image.Image],
    method: type,
    encoder: Encoder,
    options: argparse.Namespace,
) -> Iterator[list[Tensor]]:
    """Without end: two views of a batch, (B, 3, crop, crop) each; every video equally often."""
    normalize = {"mean": encoder.normalization.mean, "std": encoder.normalization.std}
    transform: Any = method.transform(  # type: ignore[attr-defined]
        input_size=options.crop,
        cj_strength=options.jitter,
        min_scale=options.min_scale,
        normalize=normalize,
    )
    order, k = FlowPairs(store, length=0, seed=options.seed), 0
    while True:
        views: list[list[Tensor]] = [[], []]
        for _ in range(options.batch_size):
            first = second = order.pair_index(k)
            if options.temporal:
                second = neighbour(store.source_numbers, first)
            for out, one, i in zip(views, transform.transforms, (first, second), strict=True):
                out.append(one(frames[i]))
            k += 1
        yield [torch.stack(view) for view in views]


def neighbour(numbers: np.ndarray, index: int) -> int:
    """The next frame of the same video, or the one before the last; itself if it is alone."""
    for other in (index + 1, index - 1):
        if 0 <= other < len(numbers) and numbers[other] == numbers[index]:
            return other
    return index


if __name__ == "__main__":
    main()
