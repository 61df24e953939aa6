"""What a run learns from a map (Loc2Vec): its batches, its loss, its numbers and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ssl_flow.config import Config, refuse_without_effect
from ssl_flow.data.open_map import open_map_spec
from ssl_flow.data.sphere import far_apart, tile_blocks
from ssl_flow.data.tile_pairs import TilePair, TilePairs
from ssl_flow.evaluation.loc2vec_pictures import neighbour_sheet, tile_rgb
from ssl_flow.evaluation.metrics import effective_rank
from ssl_flow.losses import InfoNCELoss, SoftmaxRatioLoss, SoftPNLoss, TripletMarginLoss
from ssl_flow.losses.mining import batch_hard, semi_hard
from ssl_flow.models import TileEncoder, create_tile_encoder, save_tile_encoder
from ssl_flow.training.monitors import embedding_std

OBJECTIVES = ("triplet_margin", "softmax_ratio", "soft_pn", "info_nce")
_OF_VIDEOS = (
    "data.start_crop", "data.min_scale", "model.hidden_dim", "loss.embedding_scale",
    "loss.deep_weight", "loss.flow_sigma", "loss.flow_temperature", "loss.self_pairs",
    "loss.flow_normalization", "loss.ridge_weight", "evaluation.every",
)  # fmt: skip
PLACES = 10_000
"""Places that anchors are taken from; positives lie all around them."""


class TileBatch(NamedTuple):
    """What a step learns from."""

    tiles: Tensor
    """(B, 2, C, H, W) normalised: anchor, positive."""
    places: Tensor
    """(B, 2, 2) float64: longitude and latitude."""


class TileObjective(nn.Module):
    """Pairs of tiles -> loss and embedding; negatives are mined among the far places of the batch.

    The margin loss takes semi-hard negatives, for with the hardest it collapses; the two ratios,
    which saturate, the hardest; InfoNCE all. With several processes, the batch is each one's share.
    """

    def __init__(
        self,
        encoder: TileEncoder,
        objective: str,
        far: float,
        temperature: float,
        amp_type: torch.dtype | None,
    ) -> None:
        """`far`: metres beyond which a place is a negative; `temperature`: of InfoNCE."""
        super().__init__()
        self.encoder, self.objective, self.far, self.amp_type = encoder, objective, far, amp_type
        losses = (TripletMarginLoss(), SoftmaxRatioLoss(), SoftPNLoss(), InfoNCELoss(temperature))
        self.loss: nn.Module = dict(zip(OBJECTIVES, losses, strict=True))[objective]

    def forward(self, tiles: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        """A scalar, (B, 2, D), and (1,) the share of the mined triplets in the wrong order."""
        on = self.amp_type is not None
        with torch.autocast(tiles.device.type, self.amp_type, enabled=on):
            embedding = self.encoder(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])
        loss, wrong = self.compare(embedding, places)
        return loss, embedding, wrong[None]

    def compare(self, embedding: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and share of wrong triplets of embeddings (B, 2, D); 0 where no place is far."""
        rows = embedding.transpose(0, 1).flatten(0, 1)  # anchors, then positives
        lonlat = places.cpu().numpy().swapaxes(0, 1).reshape(-1, 2)
        apart = torch.from_numpy(far_apart(lonlat, self.far)).to(rows.device)
        if not apart.any():
            return rows.float().sum() * 0, rows.new_zeros(())
        if self.objective == "info_nce":
            mined = batch_hard(rows, apart)
            loss = self.loss(*embedding.unbind(1), apart=apart)
        else:
            mined = (semi_hard if self.objective == "triplet_margin" else batch_hard)(rows, apart)
            loss = self.loss(*(rows[index] for index in mined))
        anchor, positive, negative = (rows.detach().float()[index] for index in mined)
        near, far = (anchor - positive).norm(dim=1), (anchor - negative).norm(dim=1)
        return loss, (near >= far).float().mean()


class TileTask:
    """A map -> an encoder of its tiles, trained on the train blocks of `tile_blocks`."""

    collate = staticmethod(default_collate)
    terms: ClassVar[dict[str, float]] = {"wrong_triplets": 0.0}
    """The third output of the objective, and its weight in the first: it is only counted."""

    def __init__(self, config: Config) -> None:
        """Open the map and draw places; ValueError, FileNotFoundError: it can't be used."""
        self.config = config
        if config.loss.objective not in OBJECTIVES:
            raise ValueError(
                f"loss.objective is {config.loss.objective}, which compares flow; for a map take "
                f"one of {', '.join(OBJECTIVES)} (preset loc2vec)"
            )
        refuse_without_effect(config, _OF_VIDEOS, "of a map")
        if config.train.accumulate > 1:
            raise ValueError(
                f"train.accumulate is {config.train.accumulate}; expected 1 for a map: negatives "
                "come from the same part of a batch, so parts would change what is learned"
            )
        data, self.tile_map = config.data, open_map_spec(config.data.store)
        self.blocks = tile_blocks(data.metres)
        self.centres, _ = self.tile_map.draw_centres(
            PLACES, data.crop, metres=data.metres, rng=np.random.default_rng(config.seed),
            where=self._learned_from,
        )  # fmt: skip
        sample = self.tile_map.lonlat(self.centres[:256])
        if not far_apart(sample, data.far * data.metres).any(1).all():
            raise ValueError(
                f"{self.tile_map.path} has places without any other that is data.far ({data.far:g})"
                f" tiles of data.metres ({data.metres:g} m) away: lower one of them"
            )

    def _learned_from(self, xy: np.ndarray) -> np.ndarray:
        """(N, 2) pixels -> (N,) bool: land in train blocks."""
        train = self.blocks.train(self.tile_map.lonlat(xy))
        learned: np.ndarray = train & self.tile_map.is_land(xy)
        return learned

    def prepare(self, run: Path) -> str:
        """What is learned from, in words."""
        shown = ", ".join(self.tile_map.channels)
        return f"{len(self.centres)} places of {self.tile_map.path} ({shown})"

    def examples(self, run: Path) -> TilePairs:
        """The examples of the whole run; example k belongs to step k // batch_size."""
        data, train = self.config.data, self.config.train
        return TilePairs(
            self.tile_map, self.centres, train.steps * train.batch_size, data.crop,
            metres=data.metres, shift=data.shift * data.metres, allowed=self._learned_from,
            color_jitter=data.color_jitter, drop_layers=data.color_jitter / 2,
            seed=self.config.seed,
        )  # fmt: skip

    def encoder(self, start: str) -> TileEncoder:
        """A new one, with weights from `start` (`create_tile_encoder`) if it is not empty."""
        model, data = self.config.model, self.config.data
        encoder = create_tile_encoder(
            start or f"random:{model.backbone}", self.tile_map.channels, model.embedding_dim,
            tile={"side": data.crop, "metres": data.metres},
            unit_length=self.config.loss.objective == "info_nce",
        )  # fmt: skip
        if encoder.architecture != model.backbone:
            raise ValueError(
                f"{start} is a {encoder.architecture}: set model.backbone to it, not "
                f"{model.backbone}"
            )
        return encoder

    def objective(self, encoder: TileEncoder, amp_type: torch.dtype | None) -> TileObjective:
        """What `loss` says."""
        loss, data = self.config.loss, self.config.data
        far, temperature = data.far * data.metres, loss.embedding_temperature
        return TileObjective(encoder, loss.objective, far, temperature, amp_type)

    def trial(self, count: int, side: int, device: torch.device) -> TileBatch:
        """A batch of noise, scattered over the Earth."""
        channels = len(self.tile_map.channels)
        places = torch.linspace(0, 80, 2 * count, dtype=torch.float64).view(count, 1, 2)
        return TileBatch(
            torch.rand(count, 2, channels, side, side, device=device), places.expand(-1, 2, -1)
        )

    def batch(self, pairs: TilePair, side: int, encoder: TileEncoder) -> TileBatch:
        """What the loader gives, as the step takes it, on the device."""
        device = next(encoder.parameters()).device
        tiles = pairs.tiles.to(device, non_blocking=True)
        normalized = encoder.normalize(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])
        return TileBatch(normalized, pairs.places)

    @torch.no_grad()
    def measure(
        self, objective: TileObjective, batch: TileBatch, embedding: Tensor
    ) -> dict[str, float]:
        """What to read the loss against, and whether the embedding lives."""
        noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
        others = {"constant_loss": torch.zeros_like(embedding), "random_loss": noise.to(embedding)}
        rows = embedding.nan_to_num().float().flatten(0, 1)
        return {
            **{k: float(objective.compare(v, batch.places)[0]) for k, v in others.items()},
            "effective_rank": effective_rank(rows),
            "embedding_std": embedding_std(rows),
        }

    def sheet(self, encoder: TileEncoder, pairs: TilePair) -> np.ndarray:
        """Rows of anchors, their positives and their nearest others of the batch, (H, W, 3)."""
        tiles = pairs.tiles.flatten(0, 1).to(next(encoder.parameters()).device)
        rows = encoder(encoder.normalize(tiles)).float().cpu()
        distances = torch.cdist(rows[::2], rows[::2]).fill_diagonal_(torch.inf)
        shown = tile_rgb(tiles.cpu().numpy(), self.tile_map)
        nearest = 2 * distances.argmin(1).numpy()
        columns = np.arange(0, len(rows), 2)
        return neighbour_sheet(shown, np.stack([columns, columns + 1, nearest]))

    def save(self, encoder: TileEncoder, folder: Path) -> None:
        """Write the encoder's folder."""
        save_tile_encoder(encoder, folder)
