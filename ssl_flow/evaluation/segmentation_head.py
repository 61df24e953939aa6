"""Train a segmentation head on a frozen encoder's maps by a published recipe, and score it.

    outcome = run_segmentation_head(encoder, train_set, test_set, BnProbe(), seed=0)
    outcome = run_segmentation_head(encoder, train_set, test_set, PlainProbe(), seed=0)

Unlike `linear-probe`, whose features are extracted once, these recipes augment the images, so the
encoder sees every image of every step: 640,000 with `BnProbe()`, 25 times the set with
`PlainProbe()`. The head works at the map's resolution; its scores are read bilinearly at the pixels
of the mask image by image, which is the same function for a 1x1 convolution and little memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ssl_flow.data.segmentation import IGNORE, SegmentationSet
from ssl_flow.evaluation.linear_probe_bn import BnProbe
from ssl_flow.evaluation.linear_probe_plain import PlainProbe
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.patch_features import (
    check_classes,
    evaluating,
    joined_features,
    resize_map,
    shrink_mask,
)
from ssl_flow.evaluation.pixel_features import check_features
from ssl_flow.evaluation.segmentation_scores import SegmentationScores
from ssl_flow.models.encoder import Encoder


def run_segmentation_head(
    encoder: Encoder,
    train_set: SegmentationSet,
    test_set: SegmentationSet,
    protocol: BnProbe | PlainProbe | None = None,
    seed: int = 0,
    examples: int = 6,
    progress: bool = True,
) -> Outcome:
    """Train the protocol's head on one split, score it on another; the encoder stays as it is.

    Args:
        encoder: any with `features`, `channels`, `strides`, `normalize`.
        train_set: labelled images for the head.
        test_set: labelled images to score; the same classes.
        protocol: `BnProbe()` by default.
        seed: of the head's first weights, its dropout, the batches and the augmentation.
        examples: test images kept in the outcome.
        progress: show progress bars.

    Raises:
        ValueError: unknown features, different classes, features that are not finite or do not
            fit their stride (names the image).
    """
    protocol = protocol or BnProbe()
    check_features(encoder, protocol.features)
    check_classes(train_set, test_set)
    scores = SegmentationScores(test_set, examples)
    with evaluating(encoder), torch.random.fork_rng():
        torch.manual_seed(seed)  # the head's weights and dropout draw from the global generator
        head, losses = _train(encoder, train_set, protocol, seed, progress)
        head.eval()
        with torch.inference_mode():
            for item in tqdm(test_set, "test", disable=not progress, leave=False):

                def classify(image: np.ndarray, name: str = item.name) -> tuple[Tensor, int]:
                    maps, stride = _encode(encoder, [image], protocol, [name])
                    return head(maps), stride

                prediction, mask = protocol.predict(classify, item)
                scores.add(item, prediction.byte().cpu().numpy(), mask)
    last = float(np.mean(losses[-100:]))
    return scores.outcome(seed=seed, steps=len(losses), train_loss=last)


def _train(
    encoder: Encoder,
    dataset: SegmentationSet,
    protocol: BnProbe | PlainProbe,
    seed: int,
    progress: bool,
) -> tuple[nn.Module, list[float]]:
    """The head, and the loss of every step."""
    size, steps = protocol.input_size, protocol.total_steps(len(dataset))
    head, optimizer, losses = None, None, []
    examples = _examples(dataset, protocol, steps, np.random.default_rng(seed))
    bar = tqdm(examples, "train", steps, disable=not progress, leave=False)
    for step, (images, masks, names) in enumerate(bar):
        maps, stride = _encode(encoder, images, protocol, names)
        targets = torch.from_numpy(np.stack(masks)).to(maps.device).long()
        if head is None or optimizer is None:  # the first map tells the number of channels
            head = protocol.head(maps.shape[1], len(dataset.classes)).to(maps.device).train()
            optimizer = protocol.optimizer(head)
        scores = head(maps)
        # At the masks' resolution one image at a time; the head's own graph is walked once.
        leaf = scores.detach().requires_grad_()
        counted = targets.numel() if protocol.ignored_count else int((targets != IGNORE).sum())
        loss = maps.new_zeros(())
        for one, target in zip(leaf.split(1), targets.split(1), strict=True):
            logits = resize_map(one, stride, (size, size), target.shape[1:])
            part = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
            part = part / max(1, counted)
            part.backward()
            loss += part.detach()
        for group in optimizer.param_groups:
            group["lr"] = protocol.learning_rate(step, len(dataset))
        optimizer.zero_grad()
        scores.backward(leaf.grad)
        optimizer.step()
        losses.append(float(loss))
    assert head is not None  # there is at least one step
    return head, losses


@torch.no_grad()
def _encode(
    encoder: Encoder, images: list[np.ndarray], protocol: BnProbe | PlainProbe, names: list[str]
) -> tuple[Tensor, int]:
    """One map (B, C, h, w) of images, padded with 0 to input_size after normalisation."""
    device = next(encoder.parameters()).device
    maps, stride = [], 0
    for start in range(0, len(images), protocol.forward_images):
        padded = []
        for image in images[start : start + protocol.forward_images]:
            pixels = torch.from_numpy(image.copy()).to(device)[None]
            missing = [protocol.input_size - side for side in image.shape[1::-1]]
            padded.append(F.pad(encoder.normalize(pixels), (0, missing[0], 0, missing[1])))
        batch = torch.cat(padded).contiguous(memory_format=torch.channels_last)
        some = names[start : start + protocol.forward_images]
        one, stride = joined_features(encoder, batch, protocol.features, some)
        maps.append(one)
    return torch.cat(maps), stride


Examples = tuple[list[np.ndarray], list[np.ndarray], list[str]]


def _examples(
    dataset: SegmentationSet, protocol: BnProbe | PlainProbe, steps: int, rng: np.random.Generator
) -> Iterator[Examples]:
    """Augmented images, masks at target_size, names of a batch; the next one is read meanwhile."""

    def read(index: int, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
        item = dataset[index]
        own = np.random.default_rng(seed)  # the threads' order has no influence
        image, mask = protocol.augment(item.image, item.mask, own)
        return image, shrink_mask(mask, protocol.target_size), item.name

    def submit(batch: np.ndarray) -> list[Future]:
        seeds = rng.integers(0, 2**63, len(batch))
        return [pool.submit(read, int(i), int(s)) for i, s in zip(batch, seeds, strict=True)]

    batches = _batches(len(dataset), protocol.batch_images, rng)
    with ThreadPoolExecutor() as pool:
        coming = submit(next(batches))
        for step in range(steps):
            ready, coming = coming, submit(next(batches)) if step + 1 < steps else []
            images, masks, names = zip(*(future.result() for future in ready), strict=True)
            yield list(images), list(masks), list(names)


def _batches(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Without end: batches of a random order; an epoch's incomplete last one is left out."""
    size = min(size, count)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
