"""Fine-tuning: the encoder is where training starts, not what is judged as it is.

    result = run_fine_tune(encoder, train_set, test_set, FineTune(decoder="fcn"), seed=0)
    result.scores["miou"]

A copy of the encoder is trained with a decoder on top: `fcn`, a head on the last map whose logits
are upsampled (after Long et al., CVPR 2015, without their skips), or `unet`, which goes back up
through all maps (after Ronneberger et al., MICCAI 2015). There is no published standard for this
comparison: the settings are ours, meant for small sets and small machines.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ssl_flow.data.segmentation import IGNORE, Labelled, SegmentationSet
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.patch_features import check_classes, check_labelled
from ssl_flow.evaluation.pixel_features import (
    check_shapes,
    feature_levels,
    normalized_batches,
    require_positive,
    several_values,
)
from ssl_flow.evaluation.segmentation_scores import SegmentationScores
from ssl_flow.models.encoder import Encoder


@dataclass(frozen=True)
class FineTune:
    """The protocol; printed with every result and stored beside it."""

    name: ClassVar[str] = "fine-tune"
    version: ClassVar[int] = 1
    decoder: str = "unet"  # or fcn
    channels: int = 64  # of the decoder's maps
    steps: int = 500  # optimisation steps
    batch_images: int = 8  # images a step
    crop: int = 256  # side of the square cut at a random place; smaller images are padded
    flip: bool = True  # left and right are changed in half of the crops
    lr: float = 1e-3  # AdamW's peak learning rate of the decoder, cosine to 0
    encoder_lr: float = 1e-4  # the encoder's
    weight_decay: float = 1e-2  # AdamW's

    def __post_init__(self) -> None:
        """ValueError for a value with which nothing could be trained."""
        if self.decoder not in ("fcn", "unet"):
            raise ValueError(f"unknown decoder {self.decoder!r}; known: fcn, unet")
        require_positive(self, "channels", "steps", "batch_images", "crop", "lr")


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
            x = block(torch.cat([_upsampled(x, stride, target, skip.shape[-2:]), skip], dim=1))
            stride = target
        return _upsampled(self.classify(x), stride, 1, size)


def _block(channels: int, width: int) -> nn.Module:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def _upsampled(x: Tensor, stride: int, target: int, size: tuple[int, ...]) -> Tensor:
    """A map of one stride bilinearly at a finer one; cells past (h, w) = `size` are cut off."""
    full = [round(side * stride / target) for side in x.shape[-2:]]
    return F.interpolate(x, full, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]


def run_fine_tune(
    encoder: Encoder,
    train_set: SegmentationSet,
    test_set: SegmentationSet,
    protocol: FineTune | None = None,
    seed: int = 0,
    examples: int = 6,
    progress: bool = True,
) -> Outcome:
    """Train a copy of the encoder with a decoder, score it; the encoder itself stays as it is.

    Args:
        encoder: `features`, `channels`, `strides`, `normalize`; its weights are where it starts.
        train_set: labelled images to train on.
        test_set: labelled images to score at full resolution; the same classes.
        protocol: `FineTune()` by default.
        seed: of the decoder's weights, the images, crops and flips.
        examples: test images kept in the result as (image, truth, prediction), spread evenly.
        progress: show progress bars.

    Raises:
        ValueError: different classes, no labelled pixel to train on, a loss or features that are
            not finite (both name the images).
    """
    protocol = protocol or FineTune()
    check_classes(train_set, test_set)
    check_labelled(train_set)
    scores = SegmentationScores(test_set, examples)
    model = copy.deepcopy(encoder).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the decoder's weights, and the encoder's dropout if it has some
        decoder = Decoder(model, len(train_set.classes), protocol)
        loss = _train(model, decoder, train_set, protocol, seed, progress)
    _score(model, decoder, test_set, scores, progress)
    parameters = sum(p.numel() for m in (model, decoder) for p in m.parameters())
    return scores.outcome(seed=seed, train_images=len(train_set), loss=loss, parameters=parameters)


def _train(
    model: Encoder,
    decoder: Decoder,
    dataset: SegmentationSet,
    protocol: FineTune,
    seed: int,
    progress: bool,
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
    loss = torch.zeros(())
    crops = _crops(dataset, protocol, np.random.default_rng(seed))
    batches = normalized_batches(model, crops, protocol.batch_images)
    steps = tqdm(range(protocol.steps), desc="fine-tune", disable=not progress, leave=False)
    for step, (items, images) in zip(steps, batches, strict=False):
        names = [item.name for item in items]
        decoder.to(images.device)
        masks = torch.from_numpy(np.stack([item.mask for item in items])).to(images.device).long()
        with several_values("a larger crop or more images a step"):
            levels = model.features(images)
            check_shapes(levels, model.strides, images, names)
            logits = decoder(levels, masks.shape[1:])
        count = int((masks != IGNORE).sum())  # a batch may have none: its loss is then 0
        total = F.cross_entropy(logits.float(), masks, ignore_index=IGNORE, reduction="sum")
        loss = total / max(1, count)
        if not loss.isfinite():
            found = f"the loss is {loss.item()} after {step} steps"
            raise ValueError(f"{found}, of crops of {', '.join(names)}")
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
            item = dataset[int(index)]
            image, mask = item.image, item.mask
            short = [(0, max(0, side - length)) for length in mask.shape]
            if any(after for _, after in short):
                image = np.pad(image, [*short, (0, 0)], mode="edge")
                mask = np.pad(mask, short, constant_values=IGNORE)
            y, x = (int(rng.integers(length - side + 1)) for length in mask.shape)
            window = slice(y, y + side), slice(x, x + side)
            image, mask = image[window], mask[window]
            if protocol.flip and rng.random() < 0.5:
                image, mask = image[:, ::-1], mask[:, ::-1]
            yield Labelled(image, mask, item.name)


@torch.no_grad()
def _score(
    model: Encoder,
    decoder: Decoder,
    dataset: SegmentationSet,
    scores: SegmentationScores,
    progress: bool,
) -> None:
    model.eval()
    decoder.eval()
    batches = normalized_batches(model, dataset, 1)  # logits at full resolution are large
    for items, images in tqdm(
        batches, desc="test", total=len(dataset), disable=not progress, leave=False
    ):
        item = items[0]
        levels, _ = feature_levels(model, images, "hypercolumn", [item.name])
        logits = decoder(levels, item.mask.shape)
        scores.add(item, logits[0].argmax(0).byte().cpu().numpy())
