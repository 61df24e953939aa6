"""The encoder of map tiles: a timm backbone with any channels, pooled, one vector a tile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_flow.models.encoder import Normalization, create_backbone
from ssl_flow.models.folder import load_encoder, load_tensors, read_folder, write_folder


class TileEncoder(nn.Module):
    """A timm backbone and its own pooling, then a linear layer: a tile -> D numbers.

    `channels` names the channels of the tiles it takes, in order; `tile` holds the arguments with
    which they were cut (`tile_map.cut(x, y, **encoder.tile)`), empty where nobody said. With
    `unit_length` embeddings are brought to it, so that Euclidean distances order as cosines do.
    """

    def __init__(
        self,
        backbone: nn.Module,
        architecture: str,
        model_args: dict[str, Any],
        channels: Sequence[str],
        embedding_dim: int,
        normalization: Normalization,
        tile: dict[str, Any] | None = None,
        unit_length: bool = False,
    ) -> None:
        """`architecture` and `model_args` are what `timm.create_model` needs to build it again."""
        super().__init__()
        self.backbone = backbone
        self.architecture, self.model_args = architecture, dict(model_args)
        self.channels, self.normalization = list(channels), normalization
        self.tile, self.unit_length = dict(tile or {}), unit_length
        # They differ where a hidden layer follows the pooling (MobileNetV3).
        width: Any = getattr(backbone, "head_hidden_size", None) or backbone.num_features
        self.head = nn.Linear(width, embedding_dim)

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.head.out_features

    def extra_repr(self) -> str:
        """What the weights do not tell, for ``print``."""
        return f"unit_length={self.unit_length}, tile={self.tile}"

    def features(self, tiles: Tensor) -> Tensor:
        """(B, C, H, W) normalised tiles -> the backbone's pooled features, (B, F)."""
        pooled: Tensor = self.backbone(tiles)
        return pooled

    def forward(self, tiles: Tensor) -> Tensor:
        """(B, C, H, W) normalised tiles -> embeddings (B, D)."""
        embedding: Tensor = self.head(self.features(tiles))
        return F.normalize(embedding.float(), dim=1) if self.unit_length else embedding

    def embed(self, tiles: Tensor) -> Tensor:
        """The same; `Encoder` has it too."""
        embedding: Tensor = self(tiles)
        return embedding

    def normalize(self, tiles: Tensor) -> Tensor:
        """(B, H, W, C) uint8, as maps are cut -> (B, C, H, W) float32, as the backbone expects."""
        return self.normalization.apply(tiles)


def create_tile_encoder(
    spec: str | Path,
    channels: Sequence[str],
    embedding_dim: int = 16,
    normalization: Normalization | None = None,
    tile: dict[str, Any] | None = None,
    unit_length: bool = False,
) -> TileEncoder:
    """Build an encoder of tiles to train.

    Args:
        spec: where the backbone comes from: `random:NAME` (`random:tile_cnn` is the small network
            of Loc2Vec's kind), `timm:NAME`, or a cross-pixel encoder: a run folder, an encoder
            folder, a `.safetensors` with a `config.json` beside it. Kernels of the first
            convolution for other than 3 channels are made as timm does for `in_chans`
            (`adapt_input_conv`): repeated along the channels, scaled by 3 / C; summed for one.
        channels: names of the map's channels.
        embedding_dim: D.
        normalization: of the channels; None = the backbone's for 3 channels, else values in 0..1
            as they are.
        tile: how tiles are cut, to be kept with the weights.
        unit_length: bring embeddings to it.

    Raises:
        FileNotFoundError, ValueError, WeightsError: see `load_encoder`.
        ValueError: no channels, or a normalization of another number.
    """
    count, spec = len(channels), str(spec)
    if count == 0 or (normalization and len(normalization.mean) != count):
        found = len(normalization.mean) if normalization else 0
        raise ValueError(f"{count} channels and a normalization of {found}; expected as many")
    kind, _, architecture = spec.partition(":")
    if kind in ("random", "timm"):
        backbone, model_args = create_backbone(architecture, kind == "timm", in_chans=count)
        config: Any = backbone.pretrained_cfg
        own = Normalization(tuple(config["mean"]), tuple(config["std"]))
    else:
        start = load_encoder(spec)
        architecture, own = start.architecture, start.normalization
        model_args = {**start.model_args, "in_chans": count}
        backbone, model_args = create_backbone(architecture, model_args=model_args)
        backbone.load_state_dict(_adapted(start.backbone, backbone, spec))
    if normalization is None:
        normalization = own if count == 3 else Normalization((0.0,) * count, (1.0,) * count)
    return TileEncoder(
        backbone,
        architecture,
        model_args,
        channels,
        embedding_dim,
        normalization,
        tile,
        unit_length,
    )


def save_tile_encoder(encoder: TileEncoder, folder: str | Path) -> Path:
    """Write a folder as `save_encoder` does; the backbone in it loads with timm too."""
    own = {name: getattr(encoder, name) for name in ("channels", "embedding_dim", "tile",
                                                     "unit_length")}  # fmt: skip
    return write_folder(encoder, folder, encoder.head, {"tile_encoder": own})


def load_tile_encoder(folder: str | Path) -> TileEncoder:
    """Load what `save_tile_encoder` wrote, or a run folder that holds it, in evaluation mode.

    Raises:
        FileNotFoundError: nothing usable there.
        ValueError: another kind of encoder, or weights that do not fit.
    """
    found, weights, config = read_folder(Path(folder))
    if "tile_encoder" not in config:
        raise ValueError(
            f"{found / 'config.json'} is no encoder of tiles (no 'tile_encoder' in it): give a "
            "folder that save_tile_encoder wrote; load_encoder reads the other kind"
        )
    own, pixels = config["tile_encoder"], config["pretrained_cfg"]
    backbone, model_args = create_backbone(config["architecture"], model_args=config["model_args"])
    load_tensors(backbone, weights)
    encoder = TileEncoder(
        backbone,
        config["architecture"],
        model_args,
        own["channels"],
        own["embedding_dim"],
        Normalization(tuple(pixels["mean"]), tuple(pixels["std"])),
        own["tile"],
        own.get("unit_length", False),
    )
    load_tensors(encoder.head, found / "head.safetensors")
    return encoder.eval()


def _adapted(source: nn.Module, target: nn.Module, spec: str) -> dict[str, Tensor]:
    """The source's weights; those that differ in their number of input channels, as timm does."""
    weights, wanted = source.state_dict(), target.state_dict()
    for name, value in weights.items():
        shape = wanted[name].shape
        if value.shape != shape:
            try:
                weights[name] = adapt_input_conv(shape[1], value)
            except (AssertionError, NotImplementedError, ValueError) as error:
                raise ValueError(
                    f"{spec}: {name} is {tuple(value.shape)} and cannot be made {tuple(shape)}; "
                    "start from an encoder of 3 channels"
                ) from error
    return weights
