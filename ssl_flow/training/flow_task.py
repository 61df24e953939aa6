"""What a run learns from videos' flow: its batches, its loss, its numbers and its picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_flow.config import Config, refuse_without_effect
from ssl_flow.data.augment import Pair, Windows, augment, normalize_flow
from ssl_flow.data.pairs import FlowPairs, collate
from ssl_flow.evaluation.metrics import effective_rank
from ssl_flow.evaluation.pictures import pca_rgb
from ssl_flow.flow import FlowStore, extract, flow_to_rgb
from ssl_flow.losses import CrossPixelFlowLoss, RidgeFlowLoss
from ssl_flow.models import Encoder, create_encoder, save_encoder
from ssl_flow.models.encoder import EMBEDDING_STRIDE
from ssl_flow.training.initial import initialize
from ssl_flow.training.monitors import embedding_std

OBJECTIVES = ("cross_entropy", "kernel_alignment", "regression")
DEEP_STRIDE = 16
"""Of the level that `loss.deep_weight` is about."""


class Batch(NamedTuple):
    """What a step learns from, as the encoder and the loss take it."""

    images: Tensor
    """(B, 3, H, W) normalised, channels last."""
    flow: Tensor
    """(B, 2, H/4, W/4), normalised as `loss.flow_normalization` says."""
    weight: Tensor
    """(B, H/4, W/4), 0 = ignore."""


class Objective(nn.Module):
    """Images and flow -> loss and embedding: the module that is distributed and differentiated."""

    def __init__(
        self,
        encoder: Encoder,
        loss: CrossPixelFlowLoss,
        amp_type: torch.dtype | None,
        ridge_weight: float = 0.0,
        deep_weight: float = 0.0,
    ) -> None:
        """`amp_type`: of the encoder's autocast, None = off; the losses take care of themselves.

        `deep_weight` asks for the same losses of a second embedding, made of the level of stride 16
        (or the coarsest below) alone: the finer levels, which find edges and textures soonest,
        cannot do that level's work for it (deep supervision, Lee et al., AISTATS 2015).
        """
        super().__init__()
        self.encoder, self.loss, self.amp_type = encoder, loss, amp_type
        self.ridge, self.ridge_weight = RidgeFlowLoss(), ridge_weight
        self.deep, self.deep_weight, self.level = None, deep_weight, 0
        if deep_weight and encoder.head:
            width = encoder.head.hidden_dim
            self.level = max(s for s in map(int, encoder.head.projections) if s <= DEEP_STRIDE)
            self.deep = nn.Sequential(
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, encoder.head.embedding_dim, 1),
            )

    def forward(self, images: Tensor, flow: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """Shapes as in `Batch`; a scalar, (B, D, H/4, W/4), (T,) further terms of the scalar."""
        on = self.amp_type is not None
        with torch.autocast(images.device.type, self.amp_type, enabled=on):
            if self.deep is None:
                embedding = self.encoder(images)
            else:
                embedding, coarse = self.encoder(images, self.level)
                second = self.deep(coarse)
        total = self.loss(embedding, flow, weight)
        terms = []
        if self.ridge_weight:
            terms.append(self.ridge(embedding, flow, weight))
            total = total + self.ridge_weight * terms[0]
        if self.deep is not None:
            target = pool_flow(flow, weight, self.level // EMBEDDING_STRIDE)
            deep = self.loss(second, *target)
            if self.ridge_weight:
                deep = deep + self.ridge_weight * self.ridge(second, *target)
            terms.append(deep)
            total = total + self.deep_weight * deep
        return total, embedding, torch.stack(terms).detach() if terms else total.new_zeros(0)


def pool_flow(flow: Tensor, weight: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Flow (B, 2, H, W) and weight (B, H, W), averaged over `factor` x `factor` cells."""
    share = F.avg_pool2d(weight[:, None], factor)
    known = torch.where(weight[:, None] > 0, flow, 0.0) * weight[:, None]
    return F.avg_pool2d(known, factor) / share.clamp(min=1e-6), share[:, 0]


class FlowTask:
    """A store, or synthetic videos -> an encoder of pixels."""

    collate = staticmethod(collate)

    def __init__(self, config: Config) -> None:
        """Open the store; ValueError, FileNotFoundError: it can't be used."""
        if config.loss.objective not in OBJECTIVES:
            raise ValueError(
                f"loss.objective is {config.loss.objective}, which compares places of a map; for "
                f"flow take one of {', '.join(OBJECTIVES)}, or give data.store map:PATH"
            )
        self.config = config
        weights = {"ridge": config.loss.ridge_weight, "deep": config.loss.deep_weight}
        self.terms = {name: weight for name, weight in weights.items() if weight}
        refuse_without_effect(config, ("data.metres", "data.shift", "data.far"), "of videos")
        self.store = None if _synthetic(config) else open_store(config.data.store)

    def prepare(self, run: Path) -> str:
        """Make synthetic videos, and say what is learned from."""
        if _synthetic(self.config) and not (run / "flow").exists():
            from ssl_flow.data.synthetic import synthetic_sources

            print("synthetic videos: computing optical flow from their frames", flush=True)
            sources = synthetic_sources(_synthetic(self.config), self.config.seed)
            extract(sources, run / "flow", method="farneback", size=128, gap=0.1, workers=2,
                    progress=True)  # fmt: skip
        return f"{len(self._opened(run))} pairs"

    def examples(self, run: Path) -> FlowPairs:
        """The examples of the whole run; example k belongs to step k // batch_size."""
        data, train = self.config.data, self.config.train
        length = train.steps * train.batch_size
        store = self._opened(run)
        return FlowPairs(store, length, data.min_scale, data.color_jitter, self.config.seed)

    def _opened(self, run: Path) -> FlowStore:
        self.store = self.store or open_store(str(run / "flow"))
        return self.store

    def encoder(self, start: str) -> Encoder:
        """A new one, with weights from `start` if it is not empty."""
        model = self.config.model
        encoder = create_encoder(model.backbone, model.embedding_dim, model.hidden_dim)
        encoder.input_size = (self.config.data.crop, self.config.data.crop)
        if start:
            print(initialize(encoder, start), flush=True)
        return encoder

    def objective(self, encoder: Encoder, amp_type: torch.dtype | None) -> Objective:
        """What `loss` says, where the encoder is."""
        others = ("flow_normalization", "ridge_weight", "deep_weight")
        options: Any = {k: v for k, v in asdict(self.config.loss).items() if k not in others}
        loss = CrossPixelFlowLoss(**options).to(next(encoder.parameters()).device)
        weights = self.config.loss.ridge_weight, self.config.loss.deep_weight
        return Objective(encoder, loss, amp_type, *weights).to(next(encoder.parameters()).device)

    def trial(self, count: int, side: int, device: torch.device) -> Batch:
        """A batch of noise."""
        grid = side // 4
        return Batch(
            torch.rand(count, 3, side, side, device=device),
            torch.randn(count, 2, grid, grid, device=device),
            torch.ones(count, grid, grid, device=device),
        )

    def batch(self, windows: Windows, side: int, encoder: Encoder) -> Batch:
        """What the loader gives -> crops of `side` pixels on the device, as the step takes them."""
        device = next(encoder.parameters()).device
        pair = augment(windows.to(device), (side, side))
        return Batch(
            encoder.normalize(pair.image).contiguous(memory_format=torch.channels_last),
            normalize_flow(pair.flow, pair.weight, self.config.loss.flow_normalization),
            pair.weight,
        )

    @torch.no_grad()
    def measure(self, objective: Objective, batch: Batch, embedding: Tensor) -> dict[str, float]:
        """What to read the loss against, and whether the embedding lives.

        A constant embedding and one random one above, the target's entropy below.
        """
        loss, (_, flow, weight) = objective.loss, batch
        embedding = embedding.nan_to_num()  # eigenvalues of NaN raise; the loss tells of it
        pixels = F.normalize(embedding.float(), dim=1)
        pixels = pixels.permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
        noise = torch.Generator().manual_seed(0)
        random = torch.randn(1, *embedding.shape[1:], generator=noise).to(flow).expand_as(embedding)
        values = {
            "constant_loss": float(loss.constant_loss(flow, weight).mean()),
            "random_loss": float(loss(random, flow, weight)),
            "effective_rank": effective_rank(pixels),
            "embedding_std": embedding_std(pixels),
        }
        if loss.objective == "cross_entropy":
            entropy = loss.target_entropy(flow, weight)
            values["target_entropy"] = float(entropy.mean())
            values["effective_neighbours"] = float(entropy.exp().mean())
        return values

    def sheet(self, encoder: Encoder, windows: Windows) -> np.ndarray:
        """See `embedding_sheet`."""
        device, crop = next(encoder.parameters()).device, self.config.data.crop
        return embedding_sheet(encoder, augment(windows.to(device), (crop, crop)))

    def save(self, encoder: Encoder, folder: Path) -> None:
        """Write the encoder's folder."""
        save_encoder(encoder, folder)


def open_store(path: str) -> FlowStore:
    """Open a store; ValueError when it holds no pairs."""
    store = FlowStore(path)
    if len(store) == 0:
        raise ValueError(f"the flow store {path} holds no pairs; its problems.jsonl says why")
    return store


def _synthetic(config: Config) -> int:
    """How many videos `synthetic:N` asks for; 0 for a store."""
    name, _, count = config.data.store.partition(":")
    if name != "synthetic":
        return 0
    if count and not (count.isdigit() and int(count)):
        raise ValueError(f"data.store is {config.data.store!r}; expected synthetic:N, N videos")
    return int(count or 150)


@torch.no_grad()
def embedding_sheet(encoder: Encoder, pair: Pair, tile: int = 128) -> np.ndarray:
    """Rows of frame, flow (colour wheel), embedding (PCA-RGB) for a batch: (3 tile, B tile, 3)."""
    flows = (pair.flow * (pair.weight > 0).unsqueeze(1)).permute(0, 2, 3, 1).cpu().numpy()
    rows: list[Iterable[np.ndarray]] = [
        pair.image.cpu().numpy(),
        [flow_to_rgb(flow) for flow in flows],
        pca_rgb(encoder.embed(encoder.normalize(pair.image))),
    ]
    return np.vstack([np.hstack([_resize(image, tile) for image in row]) for row in rows])


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_NEAREST)
