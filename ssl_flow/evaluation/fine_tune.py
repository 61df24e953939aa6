"""Fine-tuning: the encoder is where training starts, not what is judged as it is.

A copy of the encoder is trained with a decoder on top: `fcn`, a head on the last map whose logits
are upsampled (after Long et al., CVPR 2015, without their skips), or `unet`, which goes back up
through all maps (after Ronneberger et al., MICCAI 2015). There is no published standard for this
comparison: the settings are ours, meant for small sets and small machines.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_flow.data.segmentation import IGNORE, Labelled, SegmentationSet
from ssl_flow.evaluation.metrics import SegmentationScores
from ssl_flow.evaluation.outcome import Outcome, Settings
from ssl_flow.evaluation.pixel_features import (
    bar,
    best_class,
    check_input,
    feature_levels,
    image_levels,
    normalized_batches,
)
from ssl_flow.models.encoder import Encoder
from ssl_flow.models.head import to_stride


@dataclass(frozen=True)
class FineTune(Settings):
    """The protocol; its settings are ours."""

    name: ClassVar[str] = "fine-tune"
    may_be_zero: ClassVar[tuple[str, ...]] = ("encoder_lr", "weight_decay")
    decoder: Literal["unet", "fcn"] = "unet"
    channels: int = 64  # of the decoder's maps
    steps: int = 500  # optimisation steps
    batch_images: int = 8  # images a step
    crop: int = 256  # side of the square cut at a random place; smaller images are padded
    flip: bool = True  # left and right are changed in half of the crops
    lr: float = 1e-3  # AdamW's peak learning rate of the decoder, cosine to 0
    encoder_lr: float = 1e-4  # the encoder's
    weight_decay: float = 1e-2  # AdamW's


class Decoder(nn.Module):
    """Logits at full resolution from an encoder's maps, fine to coarse."""

    def __init__(self, encoder: Encoder, classes: int, protocol: FineTune) -> None:
        """Untrained; the encoder tells channels and strides."""
        super().__init__()
        first = 0 if protocol.decoder == "unet" else len(encoder.channels) - 1
        self.strides, width = encoder.strides[first:], protocol.channels
        *skips, last = encoder.channels[first:]
        self.last = _block(last, width)
        self.up = nn.ModuleList(_block(width + skip, width) for skip in skips)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps (B, C_i, H_i, W_i) of images of `size` (H, W) -> (B, K, H, W)."""
        *skips, level = levels[-len(self.strides) :]
        *finer, stride = self.strides
        x = self.last(level)
        for block, skip, target in zip(self.up[::-1], skips[::-1], finer[::-1], strict=True):
            height, width = skip.shape[-2:]
            x = to_stride(x, stride, target)[..., :height, :width]
            x, stride = block(torch.cat([x, skip], dim=1)), target
        return to_stride(self.classify(x), stride, 1)[..., : size[0], : size[1]]


def _block(channels: int, width: int) -> nn.Module:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def run_fine_tune(
    encoder: Encoder,
    train_set: SegmentationSet,
    test_set: SegmentationSet,
    protocol: FineTune | None = None,
    seed: int = 0,
) -> Outcome:
    """Train a copy of the encoder with a decoder, score it at full mask resolution.

    `seed` is that of the decoder's weights, the images, crops and flips. ValueError also for a loss
    that is not finite (names the images).
    """
    protocol = protocol or FineTune()
    check_input(encoder, "hypercolumn", train_set, test_set, labelled=True)
    scores = SegmentationScores(test_set)
    model = copy.deepcopy(encoder).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the decoder's weights, and the encoder's dropout if it has some
        decoder = Decoder(model, len(train_set.classes), protocol)
        loss = _train(model, decoder, train_set, protocol, seed)
    model.eval()
    decoder.eval()
    with torch.no_grad():  # one image at a time: logits at full resolution are large
        for item, levels, _ in image_levels(model, bar(test_set, "test"), "hypercolumn", 1):
            logits = decoder(levels, item.mask.shape)
            scores.add(item, best_class(logits[0]).byte().cpu().numpy())
    parameters = sum(p.numel() for m in (model, decoder) for p in m.parameters())
    return scores.outcome(seed=seed, train_images=len(train_set), loss=loss, parameters=parameters)


def _train(
    model: Encoder, decoder: Decoder, dataset: SegmentationSet, protocol: FineTune, seed: int
) -> float:
    """Train both in place; the last step's loss."""
    groups = [
        {"params": list(model.parameters()), "lr": protocol.encoder_lr},
        {"params": list(decoder.parameters()), "lr": protocol.lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=protocol.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, protocol.steps)
    model.train()
    decoder.train()
    crops = _crops(dataset, protocol, np.random.default_rng(seed))
    batches = normalized_batches(model, crops, protocol.batch_images)
    steps = bar(range(protocol.steps), "fine-tune")
    for step, (items, images) in zip(steps, batches, strict=False):
        names = [item.name for item in items]
        decoder.to(images.device)
        masks = torch.from_numpy(np.stack([item.mask for item in items])).to(images.device).long()
        levels, _ = feature_levels(model, images, "hypercolumn", names, finite=False)
        logits = decoder(levels, masks.shape[1:])
        count = int((masks != IGNORE).sum())  # a batch may have none: its loss is then 0
        loss = F.cross_entropy(logits, masks, ignore_index=IGNORE, reduction="sum") / max(1, count)
        if not loss.isfinite():
            raise ValueError(
                f"the loss is {loss} after {step} steps, of crops of {', '.join(names)}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def _crops(
    dataset: SegmentationSet, protocol: FineTune, rng: np.random.Generator
) -> Iterator[Labelled]:
    """Crops without end: all images in a new random order, and again."""
    side = protocol.crop
    while True:
        for index in rng.permutation(len(dataset)):
            image, mask, name = dataset[int(index)]
            short = [(0, max(0, side - length)) for length in mask.shape]
            if any(after for _, after in short):
                image = np.pad(image, [*short, (0, 0)], mode="edge")
                mask = np.pad(mask, short, constant_values=IGNORE)
            y, x = (int(rng.integers(length - side + 1)) for length in mask.shape)
            image, mask = image[y : y + side, x : x + side], mask[y : y + side, x : x + side]
            if protocol.flip and rng.random() < 0.5:
                image, mask = image[:, ::-1], mask[:, ::-1]
            yield Labelled(image, mask, name)
