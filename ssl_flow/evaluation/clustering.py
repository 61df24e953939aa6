"""Overclustering: do clusters of patch features, found without labels, fall into classes?

Ziegler & Asano (Leopart), "Self-Supervised Learning of Object Parts for Semantic Segmentation",
CVPR 2022; NeCo (Pariza et al., ICLR 2025) uses the same. As their code has it
(experiments/overcluster/sup_overcluster.py and experiments/utils.py of both): the test images
themselves are clustered, at 448 x 448; the last layer's patch features are standardised and reduced
to 50 dimensions by PCA; k-means of 100 iterations, the best of 5 starts from random patches, for
each of 5 seeds; clusters and masks are compared at 100 x 100 pixels, nearest. With K = classes the
clusters are matched one to one (Hungarian method on the IoU); with K = 500 each cluster becomes the
class with most of its pixels. mIoU is of the confusion matrix of the whole set, mean over seeds.
Their k-means is faiss's, which takes a random sample of 256 patches a cluster; so does this one,
with scikit-learn's Lloyd k-means.

Ours: standardisation and PCA are fitted on at most 256 x 500 patches (evenly from all images), not
on every patch of a large set; classes that are in no mask and no prediction are left out of the
mean (theirs: IoU 0); k-means may stop before its last iteration, when no centre moves any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ssl_flow.data.segmentation import IGNORE, SegmentationSet
from ssl_flow.evaluation.metrics import ConfusionMatrix, SegmentationScores
from ssl_flow.evaluation.outcome import Outcome, Settings
from ssl_flow.evaluation.pixel_features import (
    bar,
    check_input,
    frozen,
    image_features,
    resize_mask,
    shrink_mask,
)
from ssl_flow.models.encoder import Encoder

_KEPT_BYTES = 2**30  # of features between the two passes; what is more is computed twice


@dataclass(frozen=True)
class Clustering(Settings):
    """The protocol; what is published and what is ours is said above."""

    name: ClassVar[str] = "clustering"
    version: ClassVar[int] = 2  # 1: the same scores, mIoU's interval that of one k-means run alone
    features: str = "last"  # last level; or hypercolumn (all, at the finest's stride), stage1, ...
    image_size: int = 448  # images are brought to a square of this side
    mask_size: int = 100  # and masks and clusters to one of this
    components: int = 50  # of the PCA (fewer when the encoder has fewer channels)
    overclusters: int = 500  # K of the second clustering; the first has as many as classes
    runs: int = 5  # of k-means, each with its own sample and starts
    restarts: int = 5  # k-means starts a run, the best is taken
    iterations: int = 100  # at most, of k-means
    patches_per_cluster: int = 256  # sample that k-means is fitted on
    batch_images: int = 8  # images per forward pass of the encoder (no influence on the result)


def run_clustering(
    encoder: Encoder,
    train_set: SegmentationSet,
    test_set: SegmentationSet,
    protocol: Clustering | None = None,
    seed: int = 0,
) -> Outcome:
    """Cluster the patches of the test split, match clusters with classes; train_set is not used.

    `seed` is that of the first k-means run; the others have the seeds after it. Scores are means
    over the runs and their standard deviation; `counts` are those of K = classes in all runs,
    `per_class`, `examples` those of the seed of median mIoU (details["shown_seed"]). ValueError
    also for fewer patches than clusters; ImportError without scikit-learn.
    """
    protocol = protocol or Clustering()
    if find_spec("sklearn") is None:  # before any long work
        raise ImportError("clustering needs scikit-learn: pip install 'ssl-flow[eval]'")
    check_input(encoder, protocol.features, train_set, test_set)
    ks = len(test_set.classes), protocol.overclusters
    limit = -(-protocol.patches_per_cluster * max(ks) // len(test_set))  # of an image, to fit on
    generator, drawn = torch.Generator().manual_seed(seed), []
    masks: list[np.ndarray] = []
    kept: list[tuple[Tensor, int]] = []  # the second pass takes them, if all of them fit
    with frozen(encoder):
        for item, patches, stride in image_features(encoder, test_set, protocol, "sample"):
            masks.append(_small_mask(item.mask, protocol))
            if patches.nbytes * len(test_set) <= _KEPT_BYTES:
                kept.append((patches.cpu(), stride))
            features = patches.flatten(1).T
            chosen = torch.randperm(len(features), generator=generator)[:limit]
            drawn.append(features[chosen.to(features.device)].cpu().numpy())
        sample = np.concatenate(drawn)
        drawn.clear()
        if len(sample) < protocol.overclusters:
            raise ValueError(
                f"{test_set.name}: {len(sample)} patches cannot make overclusters = "
                f"{protocol.overclusters} clusters; use finer features or a larger image_size"
            )
        reduction, runs = _fit(sample, ks, protocol, seed)
        # A table (classes, K) for each run; every image's clusters in the runs of K = classes.
        tables = [np.zeros((ks[0], run.n_clusters), np.int64) for run in runs]
        clusters, lookup = [], np.empty(0, np.int64)
        pixels = np.arange(protocol.mask_size) * protocol.image_size // protocol.mask_size
        again = kept or (
            found[1:] for found in image_features(encoder, test_set, protocol, "assign")
        )
        for mask, (patches, stride) in zip(masks, again, strict=True):
            reduced = reduction.transform(patches.flatten(1).T.cpu().numpy())
            found = np.stack([run.predict(reduced) for run in runs])
            lookup = (pixels // stride)[:, None] * patches.shape[2] + pixels // stride
            for table, labels in zip(tables, found[:, lookup], strict=True):
                np.add.at(table, (mask[mask != IGNORE], labels[mask != IGNORE]), 1)
            clusters.append(found[: protocol.runs].astype(np.uint8))
    matches = [_match(table, one_to_one=i < protocol.runs) for i, table in enumerate(tables)]
    mious = [_miou(table, match) for table, match in zip(tables, matches, strict=True)]
    same, over = np.split(np.array(mious), 2)
    shown = int(np.argsort(same)[(len(same) - 1) // 2])
    scores = [SegmentationScores(test_set) for _ in same]
    for item, mask, found in zip(test_set, masks, clusters, strict=True):
        for one, match, labels in zip(scores, matches[: len(found)], found, strict=True):
            one.add(item, match[labels][lookup], mask)
    outcome = scores[shown].outcome(
        seed=seed, shown_seed=seed + shown, channels=sample.shape[1], patches=len(sample),
        miou_of_seeds=same.tolist(), overclustering_miou_of_seeds=over.tolist(),
    )  # fmt: skip
    outcome.counts = np.stack([np.stack(one.counts) for one in scores], 1)
    outcome.scores = {}
    for name, found in (("miou", same), ("overclustering_miou", over)):
        outcome.scores |= {name: float(found.mean()), f"{name}_std": float(found.std())}
    return outcome


def _small_mask(mask: np.ndarray, protocol: Clustering) -> np.ndarray:
    """(H, W) -> (mask_size, mask_size), by way of the encoder's input size, nearest both times."""
    large = resize_mask(mask, (protocol.image_size, protocol.image_size))
    return shrink_mask(large, protocol.mask_size)


def _fit(
    sample: np.ndarray, ks: Sequence[int], protocol: Clustering, seed: int
) -> tuple[Any, list[Any]]:
    """Standardisation and PCA, and the k-means runs: for each K, every seed."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    components = min(protocol.components, *sample.shape)
    pca = PCA(components, svd_solver="covariance_eigh")
    reduction = make_pipeline(StandardScaler(), pca)
    reduced, runs = reduction.fit_transform(sample), []
    jobs = [(k, run) for k in ks for run in range(seed, seed + protocol.runs)]
    for k, run in bar(jobs, "k-means"):
        rows = np.random.default_rng(run).permutation(len(reduced))
        kmeans = KMeans(k, init="random", n_init=protocol.restarts, max_iter=protocol.iterations,
                        random_state=run)  # fmt: skip
        runs.append(kmeans.fit(reduced[rows[: protocol.patches_per_cluster * k]]))
    return reduction, runs


def _match(table: np.ndarray, one_to_one: bool) -> np.ndarray:
    """Class (K,) of every cluster from the pixels (classes, K) that they share."""
    match: np.ndarray = table.argmax(0)
    if not one_to_one:
        return match
    from scipy.optimize import linear_sum_assignment

    union = table.sum(1, keepdims=True) + table.sum(0) - table
    rows, columns = linear_sum_assignment(table / np.maximum(union, 1), maximize=True)
    match[columns] = rows
    return match


def _miou(table: np.ndarray, match: np.ndarray) -> float:
    """mIoU after matching: the columns (clusters) of one class are added up."""
    matrix = ConfusionMatrix(len(table))
    matrix.counts.index_add_(1, torch.from_numpy(match), torch.from_numpy(table))
    return matrix.miou()
