"""Image classification from pooled features: k nearest neighbours and a linear classifier.

An image is resized and cropped as for ImageNet, and is the mean of its last map over all cells.
Nearest neighbours vote as in Wu et al. (CVPR 2018), with the k of DINO (Caron et al., ICCV 2021;
facebookresearch/dino: eval_knn.py). The linear classifier is multinomial logistic regression on
standardised features, solved by L-BFGS (Kornblith et al., CVPR 2019, do so too, with a penalty
searched on a validation set); that its penalty is fixed is ours. Memory: one vector an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as V
from PIL import Image
from torch import Tensor

from ssl_flow.data.classification import ClassificationSet
from ssl_flow.data.segmentation import Labelled
from ssl_flow.evaluation.outcome import Outcome, Settings
from ssl_flow.evaluation.pixel_features import bar, check_input, frozen, image_levels
from ssl_flow.models.encoder import Encoder

_ROWS = 4096  # images compared or fitted at once; no influence on the result


@dataclass(frozen=True)
class Classification(Settings):
    """The protocol; images and neighbours as DINO's, the linear classifier's settings are ours."""

    name: ClassVar[str] = "classification"
    resize: int = 256  # shorter side of an image, bicubic
    crop: int = 224  # side of the square cut from its middle
    neighbours: int = 20  # or all training images where there are fewer
    temperature: float = 0.07  # a neighbour's vote weighs exp(cosine / temperature)
    ridge: float = 1e-3  # mean cross-entropy + ridge / 2 * squared weights, the bias left out
    iterations: int = 200  # of L-BFGS at most
    batch_images: int = 32  # images per forward pass (no influence on the result)

    def __post_init__(self) -> None:
        """ValueError also for a crop that does not fit."""
        super().__post_init__()
        if self.resize < self.crop:
            raise ValueError(f"resize = {self.resize} is less than crop = {self.crop}")


def run_classification(
    encoder: Encoder,
    train_set: ClassificationSet,
    test_set: ClassificationSet,
    protocol: Classification | None = None,
) -> Outcome:
    """Classify the test images by the training images; nothing is random.

    Scores are shares of the test images: `knn_top1`, `linear_top1` and, with more than 5 classes,
    `knn_top5`, `linear_top5`; `per_class` is the linear top-1. ValueError also for an empty set.
    """
    protocol, classes = protocol or Classification(), test_set.classes
    check_input(encoder, "last", train_set, test_set)
    with frozen(encoder):
        train, labels, _ = _pooled(encoder, train_set, protocol, "train features")
        test, truth, names = _pooled(encoder, test_set, protocol, "test features")
    votes = knn_votes(train, labels, test, len(classes), protocol)
    logits = F.linear(test, *fit_linear(train, labels, len(classes), protocol))
    values = {}
    for top in (1, 5) if len(classes) > 5 else (1,):
        for method, scores in (("knn", votes), ("linear", logits)):
            best = scores.topk(top, dim=1).indices  # (N, top)
            values[f"{method}_top{top}"] = (best == truth[:, None]).any(1).double().cpu().numpy()
    members = [truth.cpu().numpy() == i for i in range(len(classes))]
    right = [float(values["linear_top1"][m].mean()) if m.any() else None for m in members]
    return Outcome(
        scores={name: float(value.mean()) for name, value in values.items()},
        values=values,
        items=names,
        per_class=dict(zip(classes, right, strict=True)),
        details={"channels": train.shape[1], "train_images": len(train)},
    )


def _pooled(
    encoder: Encoder, images: ClassificationSet, protocol: Classification, what: str
) -> tuple[Tensor, Tensor, list[str]]:
    """Mean of the last map (N, C) float32, classes (N,) int64, names."""
    if not len(images):
        raise ValueError("no images to classify: the set is empty")
    labels: list[int] = []

    def cropped() -> Iterator[Labelled]:
        for image, label, name in bar(images, what):
            if not 0 <= label < len(images.classes):
                known = f"0..{len(images.classes) - 1}"
                raise ValueError(f"{name} is of class {label}, expected {known}")
            labels.append(label)
            image = center_crop(image, protocol.resize, protocol.crop)
            yield Labelled(image, image[..., 0], name)

    found = image_levels(encoder, cropped(), "last", protocol.batch_images)
    pooled, names = zip(*((x[0].mean((2, 3)), item.name) for item, x, _ in found), strict=True)
    return torch.cat(pooled), torch.tensor(labels, device=pooled[0].device), list(names)


def center_crop(image: np.ndarray, resize: int, crop: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (crop, crop, 3): shorter side to `resize`, bicubic, then the middle."""
    resized = V.resize(Image.fromarray(image), [resize], V.InterpolationMode.BICUBIC)
    return np.asarray(V.center_crop(resized, [crop, crop]))


def knn_votes(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, protocol: Classification
) -> Tensor:
    """(M, classes) sums of exp(cosine / temperature) over the nearest neighbours.

    Those of each test vector (M, C) among the training vectors (N, C) of classes `labels` (N,).
    """
    train, k = F.normalize(train, dim=1), min(protocol.neighbours, len(train))
    rows = []
    for part in F.normalize(test, dim=1).split(max(1, _ROWS**2 // len(train))):
        cosine, index = (part @ train.T).topk(k, dim=1)
        votes = part.new_zeros(len(part), classes)
        rows.append(votes.scatter_add_(1, labels[index], (cosine / protocol.temperature).exp()))
    return torch.cat(rows)


def fit_classifier(encoder: Encoder, train_set: ClassificationSet) -> tuple[Tensor, Tensor]:
    """Weight (K, C) and bias (K,) of the protocol's linear classifier; raises as all protocols."""
    protocol = Classification()
    with frozen(encoder):
        train, labels, _ = _pooled(encoder, train_set, protocol, "train features")
    return fit_linear(train, labels, len(train_set.classes), protocol)


def fit_linear(
    features: Tensor, labels: Tensor, classes: int, protocol: Classification
) -> tuple[Tensor, Tensor]:
    """Weight (K, C) and bias (K,) of the logistic regression, for the features as they are.

    The penalty is on the weights of standardised features; the statistics are folded in.
    """
    mean, deviation = features.mean(0), features.std(0, correction=0)
    # A channel that never varies carries nothing; dividing by its rounding error would be noise.
    scale = torch.where(deviation > 1e-5, 1 / deviation.clamp_min(1e-5), 0.0)
    weight = features.new_zeros(classes, features.shape[1]).requires_grad_()
    bias = features.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=protocol.iterations, tolerance_grad=1e-6, tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = protocol.ridge / 2 * weight.square().sum()
        total.backward()
        for x, y in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
            logits = F.linear((x - mean) * scale, weight, bias)
            loss = F.cross_entropy(logits, y, reduction="sum") / len(features)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    optimizer.step(closure)
    folded = (weight * scale).detach()
    return folded, bias.detach() - folded @ mean
