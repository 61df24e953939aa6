"""Typed code that uses the public names: `.ci/run` has mypy check it against the wheel."""

import numpy as np
from torch import Tensor
from typing_extensions import assert_type

import ssl_flow
from ssl_flow.models import Encoder, TileEncoder, load_tile_encoder


def loss_of(spec: str, frame: np.ndarray, following: np.ndarray, images: Tensor) -> Tensor:
    flow = ssl_flow.optical_flow(frame, following, method="dis")
    encoder = ssl_flow.load_encoder(spec)
    assert_type(encoder, Encoder)
    assert_type(encoder.features(images), list[Tensor])
    assert_type(encoder.channels, list[int])
    embedding = encoder.embed(encoder.normalize(images))
    ssl_flow.save_encoder(encoder, "folder")
    assert_type(load_tile_encoder("run"), TileEncoder)
    loss = ssl_flow.CrossPixelFlowLoss(objective="regression", backend="chunked")
    value: Tensor = loss(embedding, embedding.new_tensor(flow).movedim(-1, 0)[None])
    return value
