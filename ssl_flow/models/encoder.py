"""The encoder: a timm backbone as a pyramid of feature maps, a per-pixel embedding on top."""

from __future__ import annotations

import difflib
import itertools
import math
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_flow.models.head import PixelEmbeddingHead, to_stride

EMBEDDING_STRIDE = 4


class WeightsError(RuntimeError):
    """Pretrained weights cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of images with values in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, images: Tensor) -> Tensor:
        """(B, H, W, C) uint8 -> (B, C, H, W) float32."""
        constants = 255 * torch.tensor([self.mean, self.std])
        # Without non_blocking the host would wait for all that a GPU still has to do.
        mean, std = constants.view(2, 1, -1, 1, 1).to(images.device, non_blocking=True)
        normalized: Tensor = (images.permute(0, 3, 1, 2).float() - mean) / std
        return normalized


class Encoder(nn.Module):
    """A timm backbone whose levels are data (`channels`, `strides`), and an optional head.

    The backbone is timm's plain model, so that its keys are the ones timm loads; the pyramid
    comes from `forward_intermediates`, as in timm's `features_only`. Hierarchical backbones give
    all their levels, isotropic ones (ViT: one stride throughout) four evenly spaced blocks, each
    after the final norm, as DINO, DINOv2 and DINOv3 are evaluated (`get_intermediate_layers`).
    Images of any size are accepted: they are padded at the right and bottom to a multiple of the
    coarsest stride, and every map is cropped back to ceil(size / stride). `normalization` and
    `input_size` (height and width of the images it was trained on) are saved with the weights;
    `report` says how weights from elsewhere were matched.
    """

    report = ""

    def __init__(
        self,
        backbone: nn.Module,
        architecture: str,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        """`architecture` and `model_args` are what `timm.create_model` needs to build it again."""
        super().__init__()
        self.backbone = backbone
        self.architecture = architecture
        self.model_args = dict(model_args or {})
        self.head: PixelEmbeddingHead | None = None
        levels = _levels(backbone.feature_info)
        self._indices = [index for index, _, _ in levels]
        self.channels: list[int] = [channels for _, channels, _ in levels]
        self.strides: list[int] = [stride for _, _, stride in levels]
        self._norm = len(self.strides) > 1 == len(set(self.strides))
        config: Any = backbone.pretrained_cfg
        self.normalization = Normalization(tuple(config["mean"]), tuple(config["std"]))
        self.input_size: tuple[int, ...] = tuple(config["input_size"][1:])

    def _padded_features(self, images: Tensor) -> list[Tensor]:
        multiple = math.lcm(*self.strides)
        height, width = images.shape[-2:]
        pad = (0, -width % multiple, 0, -height % multiple)
        return self._maps(F.pad(images, pad, mode="replicate") if any(pad) else images)

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The backbone's levels for images whose sides are multiples of all strides."""
        backbone: Any = self.backbone
        maps: list[Tensor] = backbone.forward_intermediates(
            images,
            indices=self._indices,
            norm=self._norm,
            intermediates_only=True,
            output_fmt="NCHW",
        )
        return maps

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised images -> (B, C_i, ceil(H/s_i), ceil(W/s_i)), fine to coarse."""
        maps = self._padded_features(images)
        return [
            _crop(level, images, stride) for level, stride in zip(maps, self.strides, strict=True)
        ]

    def hypercolumn(self, images: Tensor) -> Tensor:
        """All levels brought to stride 4 and concatenated: (B, sum C_i, ceil(H/4), ceil(W/4)).

        Finer levels are averaged, coarser ones upsampled bilinearly (hypercolumns: Hariharan et
        al., CVPR 2015). For frozen evaluation; `embed` never builds this large tensor.
        """
        maps = self._padded_features(images)
        columns = [
            to_stride(level, stride, EMBEDDING_STRIDE)
            for level, stride in zip(maps, self.strides, strict=True)
        ]
        return _crop(torch.cat(columns, dim=1), images, EMBEDDING_STRIDE)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, D, ceil(H/4), ceil(W/4)), unit length over D."""
        return F.normalize(self(images).float(), dim=1)

    def forward(self, images: Tensor, level: int = 0) -> Tensor | tuple[Tensor, Tensor]:
        """The embedding before it is brought to unit length, which is what the loss takes.

        With a stride `level` also the head's projection of that level, (B, M, H/level, W/level);
        the images' sides have to be multiples of all strides then.
        """
        if self.head is None:
            raise RuntimeError(
                f"this encoder ({self.architecture}) has no embedding head: only features() and "
                "hypercolumn() are there. Encoders trained by ssl_flow have one (head.safetensors)."
            )
        projected = self.head.project(self._padded_features(images))
        coarse = projected.get(level)
        embedding = _crop(self.head.combine(projected), images, EMBEDDING_STRIDE)
        return embedding if coarse is None else (embedding, coarse)

    def normalize(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 RGB -> (B, 3, H, W) float32, normalised as the backbone expects."""
        return self.normalization.apply(images)


def device_of(encoder: nn.Module) -> torch.device:
    """Where its weights are; the CPU when it has none."""
    weights = next(itertools.chain(encoder.parameters(), encoder.buffers()), None)
    return torch.device("cpu") if weights is None else weights.device


def pick_device(name: str) -> torch.device:
    """`auto` = cuda where there is one, else cpu; other names as torch knows them.

    Raises:
        ValueError: no such device, or none here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except Exception as error:
        raise ValueError(
            f"device {name!r} cannot be used here ({error}); use --device cpu"
        ) from error
    return torch.device(name)


def create_encoder(
    architecture: str,
    embedding_dim: int | None = None,
    hidden_dim: int = 128,
    pretrained: bool = False,
    model_args: dict[str, Any] | None = None,
) -> Encoder:
    """Build an encoder around `timm.create_model(architecture)`.

    Args:
        architecture: any timm model with `forward_intermediates`.
        embedding_dim: D of the per-pixel embedding; None for a bare backbone.
        hidden_dim: channels to which the head projects every level.
        pretrained: start from timm's weights.
        model_args: for `timm.create_model`, beside what lets it take images of any size.

    Raises:
        ValueError: unknown architecture, or one without a feature pyramid.
        WeightsError: `pretrained` and the weights cannot be had.
    """
    backbone, model_args = create_backbone(architecture, pretrained, model_args)
    if not hasattr(backbone, "forward_intermediates"):
        raise ValueError(f"{architecture!r} gives no feature pyramid (no forward_intermediates)")
    encoder = Encoder(backbone, architecture, model_args)
    if embedding_dim is not None:
        encoder.head = PixelEmbeddingHead(
            encoder.channels, encoder.strides, embedding_dim, hidden_dim
        )
    return encoder


def create_backbone(
    architecture: str,
    pretrained: bool = False,
    model_args: dict[str, Any] | None = None,
    in_chans: int = 3,
) -> tuple[nn.Module, dict[str, Any]]:
    """timm's plain model without a classifier, and the `model_args` that it was built with.

    `in_chans` counts where there are no `model_args`. For the rest see `create_encoder`.
    """
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        raise ValueError(
            f"timm has no model {architecture!r}; near it: {', '.join(close) or 'none'}"
        )
    if model_args is None:
        model_args = {} if in_chans == 3 else {"in_chans": in_chans}
    # Transformers take one image size only unless told otherwise, in timm's two ways.
    for any_size in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
        arguments = any_size | model_args
        try:
            return timm.create_model(
                architecture, pretrained=pretrained, num_classes=0, **arguments
            ), arguments
        except Exception as error:
            if any_size and isinstance(error, TypeError):
                continue  # an argument that this architecture does not have
            if not pretrained:
                raise ValueError(f"timm cannot build {architecture!r}: {error}") from error
            raise WeightsError(
                f"could not get timm's weights for {architecture!r} ({error}). Use a network "
                f"connection, or random:{architecture} if random weights are meant."
            ) from error
    raise AssertionError("the last attempt returns or raises")


def _levels(feature_info: Any) -> list[tuple[int, int, int]]:  # noqa: ANN401 (list or FeatureInfo)
    """(index, channels, stride) of the levels to use."""
    infos = feature_info if isinstance(feature_info, list | tuple) else feature_info.info
    levels = [(i, info["num_chs"], info["reduction"]) for i, info in enumerate(infos)]
    strides = {stride for _, _, stride in levels}
    if len(strides) == 1 and len(levels) > 4:
        step = len(levels) / 4
        return [levels[round(step * (i + 1)) - 1] for i in range(4)]
    return levels


def _crop(level: Tensor, images: Tensor, stride: int) -> Tensor:
    height, width = images.shape[-2:]
    return level[..., : -(-height // stride), : -(-width // stride)]
