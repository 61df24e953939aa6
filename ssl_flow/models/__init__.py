"""Encoders: timm backbones with an embedding head, per pixel or per tile, saved as folders."""

from ssl_flow.models import alexnet as _alexnet  # noqa: F401 (tells timm of alexnet_bn)
from ssl_flow.models import tile_cnn as _tile_cnn  # noqa: F401 (tells timm of tile_cnn)
from ssl_flow.models.encoder import (
    Encoder,
    Normalization,
    WeightsError,
    create_encoder,
    pick_device,
)
from ssl_flow.models.folder import load_encoder, save_encoder
from ssl_flow.models.head import PixelEmbeddingHead
from ssl_flow.models.tile_encoder import (
    TileEncoder,
    create_tile_encoder,
    load_tile_encoder,
    save_tile_encoder,
)

__all__ = [
    "Encoder",
    "Normalization",
    "PixelEmbeddingHead",
    "TileEncoder",
    "WeightsError",
    "create_encoder",
    "create_tile_encoder",
    "load_encoder",
    "load_tile_encoder",
    "pick_device",
    "save_encoder",
    "save_tile_encoder",
]
