"""Label propagation: how far features alone carry the mask of a video's first frame.

Every frame's cells take the soft labels of their nearest neighbours in the first frame and the few
before it, within a spatial neighbourhood. As Jabri et al. (NeurIPS 2020), with the settings and the
details of DINO (Caron et al., ICCV 2021; facebookresearch/dino: eval_video_segmentation.py).
Only the features of the context are kept, and similarities are made tile by tile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_flow.data.davis import Video
from ssl_flow.data.labelled import Labelled
from ssl_flow.evaluation.metrics import EXAMPLES
from ssl_flow.evaluation.outcome import Outcome, Settings
from ssl_flow.evaluation.pixel_features import (
    bar,
    best_class,
    check_features,
    frozen,
    image_levels,
    spread,
)
from ssl_flow.evaluation.video_metrics import davis_summary, sequence_scores
from ssl_flow.models.encoder import Encoder
from ssl_flow.models.head import to_stride

_TILE = 16  # side of the squares of cells that are looked up at once; no influence on the result


@dataclass(frozen=True)
class LabelPropagation(Settings):
    """The protocol; all but `features` are the published settings."""

    name: ClassVar[str] = "label-propagation"
    may_be_zero: ClassVar[tuple[str, ...]] = ("previous", "radius")
    # embedding, or stage1, stage2, ...; None: the last map of the coarsest stride up to 8, or of
    # the finest stride where all are coarser: a ViT's last layer, a ResNet's map of stride 8.
    features: str | None = None
    short_side: int = 480  # frames are resized to it, the other side to a multiple of 64 below
    previous: int = 7  # frames of context besides the first one
    neighbours: int = 5  # cells whose labels are averaged
    radius: int = 12  # cells to each side in which they are looked for
    temperature: float = 0.1  # of the softmax over their cosine similarities


def run_label_propagation(
    encoder: Encoder, videos: Sequence[Video], protocol: LabelPropagation | None = None
) -> Outcome:
    """Propagate the first mask of every video and score the others; nothing is random.

    Scores are DAVIS's at the masks' resolution; `values` and `items` are those of the objects, over
    which DAVIS takes the mean; the examples are the last frames of some sequences. ValueError also
    for no video, or one of fewer than 3 frames (the first is given, the last is not scored).
    """
    protocol = protocol or LabelPropagation()
    features = protocol.features or _default_features(encoder)
    check_features(encoder, features)
    if features == "hypercolumn":
        raise ValueError("labels are propagated on one map: name a stage or the embedding")
    short = [video.name for video in videos if len(video) < 3]
    if short or not videos:
        raise ValueError(f"no video of 3 frames to propagate along: {short or 'no video at all'}")
    scored, items, kept = [], [], []
    wanted = spread(len(videos), EXAMPLES)
    with frozen(encoder):
        for index, video in enumerate(bar(videos, "videos")):
            image, truth, prediction = _propagate_video(encoder, video, features, protocol)
            scored.append(sequence_scores(prediction, truth, video.objects))
            items += [f"{video.name}/object {i + 1}" for i in range(video.objects)]
            if index in wanted:
                kept.append((image, truth[-1], prediction[-1]))
    means = np.concatenate([scores.mean(1) for scores in scored])  # (all objects, 2)
    return Outcome(
        scores=davis_summary(scored),
        values={"J&F mean": means.mean(1), "J mean": means[:, 0], "F mean": means[:, 1]},
        items=items,
        details={"features": features},
        examples=kept,
    )


def _default_features(encoder: Encoder) -> str:
    strides = encoder.strides
    stride = max((s for s in strides if s <= 8), default=min(strides))
    return f"stage{len(strides) - strides[::-1].index(stride)}"


def _propagate_video(
    encoder: Encoder, video: Video, features: str, protocol: LabelPropagation
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last image (H, W, 3), and truth and prediction (T, H, W), the first mask being given."""
    image, truth, name = video[0]
    first, stride, size = _map(encoder, image, name, features, protocol)
    rows, columns = (
        # The mask's pixel at the middle of each cell, as PIL's nearest resizing takes it.
        np.minimum(((np.arange(cells) + 0.5) * stride * whole / side).astype(int), whole - 1)
        for cells, whole, side in zip(first.shape[1:], truth.shape, size, strict=True)
    )
    cells = torch.from_numpy(truth[rows][:, columns]).to(first.device).long()
    given = first, F.one_hot(cells, video.objects + 1).movedim(2, 0).to(first.dtype)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=protocol.previous)
    truths, predictions = [truth], [truth]
    for index in range(1, len(video)):
        image, truth, name = video[index]
        query, _, _ = _map(encoder, image, name, features, protocol)
        keys, labels = zip(given, *recent, strict=True)
        soft = propagate(query, torch.stack(keys), torch.stack(labels), protocol)
        recent.append((query, soft))
        truths.append(truth)
        predictions.append(_full_resolution(soft, stride, size, truth.shape))
    return image, np.stack(truths), np.stack(predictions)


def _map(
    encoder: Encoder, image: np.ndarray, name: str, features: str, protocol: LabelPropagation
) -> tuple[Tensor, int, tuple[int, int]]:
    """Unit features (C, h, w) of a frame, their stride, and the (H, W) it was resized to."""
    short, (height, width) = protocol.short_side, image.shape[:2]
    long = max(64, int(short * max(height, width) / min(height, width) / 64) * 64)
    size = (long, short) if height > width else (short, long)
    resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    item = Labelled(resized, resized, name)
    _, levels, strides = next(image_levels(encoder, [item], features))
    return F.normalize(levels[0][0], dim=0), strides[0], size


def propagate(query: Tensor, keys: Tensor, labels: Tensor, protocol: LabelPropagation) -> Tensor:
    """Soft labels (K, h, w) of a frame's cells from those of its context.

    Features (C, h, w) of the frame and (n, C, h, w) of the n frames of context have unit length
    over C, labels are (n, K, h, w). The mean of the neighbours' labels, over all n frames together,
    with weights softmax(cosine / temperature).
    """
    (height, width), radius = query.shape[1:], protocol.radius
    result = labels.new_empty(labels.shape[1:])
    axes = (torch.arange(side, device=query.device) for side in (height, width))
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (2, h, w)
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            tile = slice(top, top + _TILE), slice(left, left + _TILE)
            near = tuple(slice(max(0, s.start - radius), s.stop + radius) for s in tile)
            asked = query[:, tile[0], tile[1]].flatten(1)  # (C, q)
            found = keys[:, :, near[0], near[1]].flatten(2)  # (n, C, s)
            known = labels[:, :, near[0], near[1]].movedim(1, -1).flatten(0, 2)  # (n * s, K)
            similarity = torch.einsum("cq,ncs->qns", asked, found)
            here, there = (cells[:, s[0], s[1]].flatten(1) for s in (tile, near))
            far = (here[:, :, None] - there[:, None]).abs().amax(0) > radius
            similarity = similarity.masked_fill(far[:, None], -torch.inf).flatten(1)
            best, index = similarity.topk(min(protocol.neighbours, similarity.shape[1]), dim=1)
            weight = (best / protocol.temperature).softmax(1)  # (q, neighbours)
            soft = torch.einsum("qm,qmk->kq", weight, known[index])
            target = result[:, tile[0], tile[1]]
            target.copy_(soft.view_as(target))
    return result


def _full_resolution(
    soft: Tensor, stride: int, size: tuple[int, int], full: tuple[int, ...]
) -> np.ndarray:
    """Object of the highest label at every pixel of the (H, W) masks.

    As in DINO's script: bilinear to the resized frame, every channel stretched to 0..1, the highest
    one taken, and only then to the masks' size, by nearest neighbour.
    """
    labels = to_stride(soft[None], stride, 1)[0, :, : size[0], : size[1]]
    low = labels.amin((1, 2), keepdim=True)
    span = (labels.amax((1, 2), keepdim=True) - low).clamp_min(torch.finfo(soft.dtype).tiny)
    chosen = best_class((labels - low) / span).byte().cpu().numpy()
    nearest: np.ndarray = cv2.resize(chosen, full[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return nearest
