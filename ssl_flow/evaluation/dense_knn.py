"""Dense kNN: segmentation by retrieval from a memory of labelled patch features, nothing trained.

Balažević et al., "Towards In-context Scene Understanding" (Hummingbird), NeurIPS 2023: the memory
holds L2-normalised patch features of the training images and the share of each class in the patch;
a test patch takes its k nearest ones (cosine) and averages their labels with the weights
softmax(cosine / temperature); the class probabilities are upsampled bilinearly, then argmax.

Numbers and the choice of patches: vpariza's open-hummingbird-eval (hbird/hbird_eval.py, README):
memory_size // images patches of each training image, those with the smallest u * (sum of f_c over
the classes c in the patch), f_c being the number of the image's patches that hold c and u uniform
in [0, 1): rare classes come first.

Ours: exact search instead of ScaNN's approximate one; float16 features in the memory; one pass over
the training images as they are (theirs: two passes with random crops and colour jitter); ignored
pixels have no share in a patch's label and a patch of nothing else is left out (theirs count as
class 0); scored at the mask's own resolution (theirs: at 512 x 512).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_flow.data.segmentation import IGNORE, Labelled, SegmentationSet
from ssl_flow.evaluation.metrics import SegmentationScores
from ssl_flow.evaluation.outcome import Outcome, Settings
from ssl_flow.evaluation.pixel_features import (
    best_class,
    check_input,
    frozen,
    image_features,
    resize_map,
    resize_mask,
)
from ssl_flow.models.encoder import Encoder


@dataclass(frozen=True)
class DenseKnn(Settings):
    """The protocol; what is published and what is ours is said above."""

    name: ClassVar[str] = "dense-knn"
    features: str = "last"  # last level; or hypercolumn (all, at the finest's stride), stage1, ...
    image_size: int | None = 512  # images are brought to a square of this side; None: as they are
    memory_size: int = 1_024_000  # patch features; the paper has up to 10,240,000
    neighbours: int = 30  # k
    temperature: float = 0.02
    memory_gib: float = 3.0  # for the memory; when short, it holds fewer patches (ours)
    search: Literal["torch", "faiss"] = "torch"  # both exact; faiss keeps float32
    batch_images: int = 8  # images per forward pass of the encoder (no influence on the result)


def run_dense_knn(
    encoder: Encoder,
    train_set: SegmentationSet,
    test_set: SegmentationSet,
    protocol: DenseKnn | None = None,
    seed: int = 0,
) -> Outcome:
    """Fill the memory from one split, segment another with it; `seed`: of the choice of patches.

    ImportError for search = faiss without faiss.
    """
    protocol = protocol or DenseKnn()
    check_input(encoder, protocol.features, train_set, test_set)
    index = _faiss_index(1) if protocol.search == "faiss" else None  # missing: before long work
    scores = SegmentationScores(test_set)
    with frozen(encoder), torch.inference_mode():
        features, labels = _fill(encoder, train_set, protocol, seed)
        if index is not None:
            index = _faiss_index(features.shape[1])
            for part in features.split(65536):
                index.add(part.float().cpu().numpy())
        k = min(protocol.neighbours, len(features))
        for some in _together(image_features(encoder, test_set, protocol, "test")):
            cells = [patches.flatten(1).T for _, patches, _ in some]
            queries = F.normalize(torch.cat(cells), dim=1)
            if index is None:
                cosine, rows = nearest(features, queries, k)
            else:
                found = index.search(queries.cpu().numpy(), k)
                cosine, rows = (torch.from_numpy(x).to(queries.device) for x in found)
            shares = vote(cosine, rows, labels, protocol.temperature).split([len(x) for x in cells])
            for (item, patches, stride), share in zip(some, shares, strict=True):
                probabilities = share.T.reshape(1, -1, *patches.shape[1:])
                full = resize_map(probabilities, stride, item.image.shape[:2], item.mask.shape)
                scores.add(item, best_class(full[0]).byte().cpu().numpy())
    return scores.outcome(seed=seed, memory=len(features), channels=features.shape[1])


def _fill(
    encoder: Encoder, dataset: SegmentationSet, protocol: DenseKnn, seed: int
) -> tuple[Tensor, Tensor]:
    """The memory: unit features (M, C) and shares of the classes (M, K), both float16."""
    generator = torch.Generator().manual_seed(seed)
    features, labels = torch.empty(0), torch.empty(0)
    classes, limit, filled = len(dataset.classes), 0, 0
    for item, patches, stride in image_features(encoder, dataset, protocol, "memory"):
        channels, height, width = patches.shape
        if not limit:  # the first image tells the number of channels
            each = (6 if protocol.search == "faiss" else 2) * channels + 2 * classes
            rows = min(protocol.memory_size, int(protocol.memory_gib * 2**30 / each))
            limit = max(1, rows // len(dataset))
            # What stays unused costs address space only (on a GPU: at most memory_gib).
            features = patches.new_empty(limit * len(dataset), channels, dtype=torch.float16)
            labels = patches.new_empty(len(features), classes, dtype=torch.float16)
        mask = resize_mask(item.mask, item.image.shape[:2])
        counts = label_counts(mask, stride, (height, width), classes)
        chosen = _choose(counts, limit, generator)
        shares = counts[chosen] / counts[chosen].sum(1, keepdim=True)
        features[filled : filled + len(chosen)] = F.normalize(patches.flatten(1).T[chosen], dim=1)
        labels[filled : filled + len(chosen)] = shares
        filled += len(chosen)
    if not filled:
        raise ValueError(f"{dataset.name}: no training patch has a label")
    return features[:filled], labels[:filled]


def _together(
    found: Iterable[tuple[Labelled, Tensor, int]], patches: int = 4096
) -> Iterator[list[tuple[Labelled, Tensor, int]]]:
    """Consecutive images with so many patches together, since each search reads all the memory."""
    some: list[tuple[Labelled, Tensor, int]] = []
    for image in found:
        some.append(image)
        if sum(each.shape[1:].numel() for _, each, _ in some) >= patches:
            yield some
            some = []
    if some:
        yield some


def label_counts(mask: np.ndarray, stride: int, cells: tuple[int, int], classes: int) -> Tensor:
    """Pixels of each class (h * w, K) int64 in the (h, w) cells of a mask (H, W), 255 left out."""
    rows, columns = np.nonzero(mask != IGNORE)
    cell = rows // stride * cells[1] + columns // stride
    minimum = cells[0] * cells[1] * classes
    counts = np.bincount(cell * classes + mask[rows, columns], minlength=minimum)
    return torch.from_numpy(counts).view(-1, classes)


def _choose(counts: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Rows of at most `limit` labelled patches of an image; (patches, K) pixels of each class."""
    present = (counts > 0).double()
    score = present @ present.sum(0)  # of each patch: how common its classes are in this image
    score *= torch.rand(len(score), generator=generator, dtype=torch.float64)
    score[counts.sum(1) == 0] = torch.inf
    return score.argsort()[: min(limit, int(present.any(1).sum()))]


def nearest(
    memory: Tensor, queries: Tensor, k: int, rows: int = 32768, block: int = 1024
) -> tuple[Tensor, Tensor]:
    """The k (at most M) largest inner products of queries (Q, C) float32 with a memory (M, C).

    Exact and in float32, whatever the memory's type; `rows` x `block` products are held at a time.
    Returns products (Q, k), largest first, and the rows (Q, k) of the memory that they are with.
    """
    best = queries.new_empty(len(queries), 0)
    index = torch.empty_like(best, dtype=torch.long)
    # One buffer for all: memory that is new each time costs a CPU more than few channels' products.
    buffer = queries.new_empty(min(block, len(queries)), min(rows, len(memory)))
    for start in range(0, len(memory), rows):
        part = memory[start : start + rows].to(queries.dtype)
        found = []
        for some in queries.split(block):
            inner = torch.mm(some, part.T, out=buffer[: len(some), : len(part)])
            found.append(_largest(inner, k))
        top, where = (torch.cat(each) for each in zip(*found, strict=True))
        best, index = torch.cat([best, top], 1), torch.cat([index, where + start], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, order)
    return best, index


def _largest(products: Tensor, k: int, group: int = 64) -> tuple[Tensor, Tensor]:
    """`topk` of (Q, M) along its rows, of all M where they are fewer than k, with less sorting.

    What is among the k largest lies in one of the k groups of columns with the largest maxima.
    """
    count = products.shape[1] // group
    if count <= k:
        return products.topk(min(k, products.shape[1]), dim=1)
    grouped = products[:, : count * group].unflatten(1, (count, group))
    groups = grouped.amax(2).topk(k, dim=1).indices
    columns = torch.arange(products.shape[1], device=products.device)
    inside = (groups[:, :, None] * group + columns[:group]).flatten(1)  # (Q, k * group)
    rest = columns[count * group :].expand(len(products), -1)
    chosen = torch.cat([inside, rest], dim=1)
    top, order = products.gather(1, chosen).topk(k, dim=1)
    return top, chosen.gather(1, order)


def vote(cosine: Tensor, rows: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Labels (Q, K) float32: those (M, K) of the neighbours `rows` (Q, k), softmax-weighted."""
    weights = (cosine / temperature).softmax(1)  # (Q, k)
    shares = torch.zeros(len(rows), labels.shape[1], device=labels.device)
    for weight, row in zip(weights.T, rows.T, strict=True):  # (Q, k, K) at once would be large
        shares += weight[:, None] * labels[row]
    return shares


def _faiss_index(channels: int) -> Any:  # noqa: ANN401 (faiss has no types)
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "search = faiss needs the package faiss-cpu (pip install faiss-cpu); "
            "search = torch needs nothing and finds the same neighbours"
        ) from error
    return faiss.IndexFlatIP(channels)
