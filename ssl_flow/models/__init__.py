"""Encoders: timm backbones with a per-pixel embedding head, saved and loaded as folders."""

from ssl_flow.models import alexnet as _alexnet  # noqa: F401 (tells timm of alexnet_bn)
from ssl_flow.models.encoder import (
    Encoder,
    Normalization,
    WeightsError,
    create_encoder,
    pick_device,
)
from ssl_flow.models.folder import load_encoder, save_encoder
from ssl_flow.models.head import PixelEmbeddingHead

__all__ = [
    "Encoder",
    "Normalization",
    "PixelEmbeddingHead",
    "WeightsError",
    "create_encoder",
    "load_encoder",
    "pick_device",
    "save_encoder",
]
