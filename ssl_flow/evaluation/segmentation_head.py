"""Train a segmentation head on a frozen encoder's maps by a published recipe, and score it.

Unlike `linear-probe`, whose features are extracted once, these recipes augment the images, so the
encoder sees every image of every step: 640,000 with `BnProbe()`, 25 times the set with
`PlainProbe()`. The head works at each level's own resolution; its scores are read bilinearly at the
mask's pixels, summed over levels, image by image: for a 1x1 convolution that is the same function
as on the upsampled, concatenated features, and little memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_flow.data.segmentation import IGNORE, SegmentationSet
from ssl_flow.evaluation.linear_probe_bn import BnProbe
from ssl_flow.evaluation.linear_probe_plain import PlainProbe
from ssl_flow.evaluation.metrics import SegmentationScores
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.pixel_features import bar, check_input, feature_levels, frozen, resize_map
from ssl_flow.models.encoder import Encoder, device_of

Probe = BnProbe | PlainProbe


def run_segmentation_head(
    encoder: Encoder,
    train_set: SegmentationSet,
    test_set: SegmentationSet,
    protocol: Probe | None = None,
    seed: int = 0,
) -> Outcome:
    """Train the protocol's head on one split, score it on another.

    `seed` is that of the head's first weights, its dropout, the batches and the augmentation.
    """
    protocol = protocol or BnProbe()
    check_input(encoder, protocol.features, train_set, test_set, labelled=True)
    scores = SegmentationScores(test_set)
    with frozen(encoder), torch.random.fork_rng():
        torch.manual_seed(seed)  # the head's weights and dropout draw from the global generator
        head, losses = _train(encoder, train_set, protocol, seed)
        head.eval()

        def classify(image: np.ndarray, size: tuple[int, int]) -> Tensor:
            levels, strides = _encode(encoder, [image], protocol, [item.name])
            return _read(head(levels), strides, protocol.input_size, size)

        with torch.inference_mode():
            for item in bar(test_set, "test"):
                prediction, mask = protocol.predict(classify, item)
                scores.add(item, prediction.byte().cpu().numpy(), mask)
    last = float(np.mean(losses[-100:]))
    return scores.outcome(seed=seed, steps=len(losses), train_loss=last)


class LevelHead(nn.Module):
    """One 1x1 convolution on several levels: each meets its own columns of the weight."""

    def __init__(self, protocol: Probe, channels: list[int], classes: int) -> None:
        """`channels` of the levels."""
        super().__init__()
        self.channels = channels
        self.convolution, before = protocol.layers(channels, classes)
        self.before = nn.ModuleList(before)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """(B, C_i, h_i, w_i) -> (B, K, h_i, w_i); their sum at a pixel is its scores."""
        weights = self.convolution.weight.split(self.channels, dim=1)
        biases = [self.convolution.bias, *[None] * len(levels)]
        parts = zip(self.before, levels, weights, biases, strict=False)
        return [F.conv2d(before(level), weight, bias) for before, level, weight, bias in parts]


def _read(scores: list[Tensor], strides: list[int], side: int, size: tuple[int, int]) -> Tensor:
    """Sum of the levels' scores of a (side, side) image at (H', W') pixels: (B, K, H', W')."""
    total, *others = (
        resize_map(s, stride, (side, side), size) for s, stride in zip(scores, strides, strict=True)
    )
    return sum(others, total)


@torch.enable_grad()
def _train(
    encoder: Encoder, dataset: SegmentationSet, protocol: Probe, seed: int
) -> tuple[LevelHead, list[float]]:
    """The head, and the loss of every step."""
    steps, losses = protocol.total_steps(len(dataset)), []
    head, optimizer = None, None
    examples = _examples(dataset, protocol, np.random.default_rng(seed))
    for step, (images, masks, names) in zip(bar(range(steps), "train"), examples, strict=False):
        levels, strides = _encode(encoder, images, protocol, names)
        if head is None or optimizer is None:  # the first maps tell the numbers of channels
            channels = [level.shape[1] for level in levels]
            head = LevelHead(protocol, channels, len(dataset.classes)).to(levels[0].device).train()
            optimizer = protocol.optimizer(head)
        scores = head(levels)
        # At the masks' resolution one image at a time; the head's own graph is walked once.
        leaves = [score.detach().requires_grad_() for score in scores]
        targets = torch.from_numpy(np.stack(masks)).to(scores[0].device).long()
        counted = targets.numel() if protocol.ignored_count else int((targets != IGNORE).sum())
        loss = torch.zeros((), device=targets.device)
        for i, target in enumerate(targets.split(1)):
            own = [leaf[i : i + 1] for leaf in leaves]
            logits = _read(own, strides, protocol.input_size, (len(masks[i]), len(masks[i])))
            part = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
            part = part / max(1, counted)
            part.backward()
            loss += part.detach()
        if not loss.isfinite():
            raise ValueError(f"the training loss is {loss.item()}: lower lr = {protocol.lr}")
        for group in optimizer.param_groups:
            group["lr"] = protocol.learning_rate(step, len(dataset))
        optimizer.zero_grad()
        torch.autograd.backward(scores, [leaf.grad for leaf in leaves])
        optimizer.step()
        losses.append(float(loss))
    assert head is not None  # there is at least one step
    return head, losses


@torch.no_grad()
def _encode(
    encoder: Encoder, images: Sequence[np.ndarray], protocol: Probe, names: Sequence[str]
) -> tuple[list[Tensor], list[int]]:
    """Levels (B, C_i, h_i, w_i) of images, padded with 0 to input_size once normalised; strides."""
    parts, strides, size = [], [0], protocol.forward_images
    for start in range(0, len(images), size):
        padded = []
        for image in images[start : start + size]:
            pixels = torch.from_numpy(image.copy()).to(device_of(encoder))[None]
            below, right = (protocol.input_size - side for side in image.shape[:2])
            padded.append(F.pad(encoder.normalize(pixels), (0, right, 0, below)))
        batch = torch.cat(padded).contiguous(memory_format=torch.channels_last)
        some = names[start : start + size]
        levels, strides = feature_levels(encoder, batch, protocol.features, some)
        parts.append(levels)
    return [torch.cat(level) for level in zip(*parts, strict=True)], strides


def _examples(
    dataset: SegmentationSet, protocol: Probe, rng: np.random.Generator
) -> Iterator[tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], tuple[str, ...]]]:
    """Without end: augmented images, masks, names of a batch; the next one is read meanwhile.

    The images are in a random order; an epoch's incomplete last batch is left out.
    """

    def read(index: int, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
        item = dataset[index]
        own = np.random.default_rng(seed)  # the threads' order has no influence
        return *protocol.augment(item.image, item.mask, own), item.name

    size, ready = min(protocol.batch_images, len(dataset)), None
    with ThreadPoolExecutor() as pool:
        while True:
            order = rng.permutation(len(dataset))
            for start in range(0, len(dataset) - size + 1, size):
                seeds = rng.integers(0, 2**63, size).tolist()
                coming = pool.map(read, order[start : start + size].tolist(), seeds)
                if ready is not None:
                    images, masks, names = zip(*ready, strict=True)
                    yield images, masks, names
                ready = coming
