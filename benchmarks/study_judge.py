"""A score for choosing settings, from labelled images that no final test uses.

DAVIS: the training sequences, each in turn held out of the fit of a linear probe. CamVid: the
training split, fitted on two drives and scored on the third. Hypercolumn at stride 4, masks at the
same grid, so the figures are not those of `ssl-flow eval linear-probe`.

The encoder must not have learned from DAVIS at all, without labels either: held-out scenes whose
frames it has seen score far higher than unseen ones (docs/experiments.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_flow.data.segmentation import SegmentationSet, open_segmentation
from ssl_flow.evaluation.metrics import ConfusionMatrix
from ssl_flow.evaluation.pixel_features import estimate_on
from ssl_flow.models import Encoder

Pixels = tuple[Tensor, Tensor]  # features (N, C), class (N,)


def judge(encoder: Encoder, data: Path, estimate: bool) -> dict[str, float]:
    """Foreground IoU over all held-out sequences and its mean over them; mIoU of CamVid's drive.

    Args:
        encoder: with or without a head.
        data: the folder of davis/ and camvid/.
        estimate: BatchNorm's statistics on the data first: of an encoder that was not trained.
    """
    davis = open_segmentation(f"davis:{data / 'davis'}", "train")
    if estimate:
        estimate_on(encoder, davis, 64)
    encoder.eval()
    sequences: dict[str, list[Pixels]] = {}
    for i in range(0, len(davis), 7):
        sequences.setdefault(davis.names[i].split("/")[0], []).append(pixels(encoder, davis, i))
    total, single = ConfusionMatrix(2), []
    for held_out, images in sequences.items():
        fitted = [p for name, some in sequences.items() if name != held_out for p in some]
        held = score(fit(fitted, 2, 800, 400), images, ConfusionMatrix(2))
        total.counts += held.counts
        single.append(float(held.iou()[1]))
    scores = {"davis": float(total.iou()[1]), "davis mean": float(np.mean(single))}

    camvid = open_segmentation(f"camvid:{data / 'camvid'}", "train")
    scored = [i for i in range(0, len(camvid), 4) if "0016E5" in camvid.names[i]]
    fitted = [pixels(encoder, camvid, i) for i in range(0, len(camvid), 4) if i not in scored]
    predict = fit(fitted, len(camvid.classes), 1500, 600)
    later = (pixels(encoder, camvid, i) for i in scored)
    table = score(predict, later, ConfusionMatrix(len(camvid.classes)))
    present = table.counts.sum(1).numpy() > 0
    scores["camvid"] = float(table.iou()[present].mean())
    return {name: round(value, 4) for name, value in scores.items()}


@torch.no_grad()
def pixels(encoder: Encoder, images: SegmentationSet, index: int) -> Pixels:
    """Hypercolumn and class of each cell of one image; ignored cells are left out."""
    image, mask, _ = images[index]
    batch = encoder.normalize(torch.from_numpy(image.copy())[None])
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder.hypercolumn(batch.contiguous(memory_format=torch.channels_last))[0]
    classes = torch.from_numpy(mask[2::4, 2::4].astype(np.int64))
    height, width = classes.shape
    rows = features[:, :height, :width].float().flatten(1).T
    known = classes.flatten() < len(images.classes)
    return rows[known], classes.flatten()[known]


def fit(images: list[Pixels], classes: int, each: int, steps: int) -> Callable[[Tensor], Tensor]:
    """Fit a linear classifier to so many pixels of each image; what predicts the classes."""
    draw = torch.Generator().manual_seed(0)
    some = [torch.randperm(len(y), generator=draw)[:each] for _, y in images]
    x = torch.cat([x[i] for (x, _), i in zip(images, some, strict=True)])
    y = torch.cat([y[i] for (_, y), i in zip(images, some, strict=True)])
    mean, deviation = x.mean(0), x.std(0) + 1e-5
    torch.manual_seed(0)
    linear = nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=3e-3, weight_decay=1e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1.5e-3 * (1 + math.cos(math.pi * step / steps))
        i = torch.randint(len(x), (4096,))
        loss = F.cross_entropy(linear((x[i] - mean) / deviation), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lambda features: linear((features - mean) / deviation).argmax(1)


def score(
    predict: Callable[[Tensor], Tensor], images: Iterable[Pixels], scores: ConfusionMatrix
) -> ConfusionMatrix:
    """Count all pixels of the images."""
    for x, y in images:
        scores.update(predict(x), y)
    return scores
