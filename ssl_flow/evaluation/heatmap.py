"""Where in a picture an encoder sees something: maps (H, W) of one number a pixel.

`similarity` asks which pixels look alike to the encoder: the cosine of their embedding to that of a
chosen pixel or region. It needs nothing else, and is what a per-pixel embedding is made for.

The others explain the score of a class, s_k = w_k . mean(A) + b_k, with A (C, h, w) the last level
of the encoder (of a ViT the tokens of its patches) and w (K, C) a linear classifier: a fitted one
(`classification.fit_classifier`), a saved one, or that of one example (`region_classifier`).

- cam: sum_c w_c A_c. Zhou et al., "Learning Deep Features for Discriminative Localization", 2016.
- grad-cam: relu(sum_c a_c A_c) with a_c the mean of ds / dA_c over the cells. Selvaraju et al.,
  "Grad-CAM", ICCV 2017. As the mean of A is all that the classifier sees, a = w / (h w): the
  positive part of CAM, but for the factor (their appendix A).
- grad-cam++: Chattopadhay et al., "Grad-CAM++", WACV 2018: the class score is exp(s), and
  a_c = sum_ij alpha_ij relu(g), alpha_ij = g^2 / (2 g^2 + g^3 sum A_c), g = ds/dA_c = w_c / (h w).
  Meant for A >= 0, as a ReLU leaves it: else the denominator can come near to 0.
- guided-backprop: ds / d(image), where each ReLU lets only positive gradients through, of positive
  inputs. Springenberg et al., "Striving for Simplicity", ICLR 2015 workshop.
- deconvolution: as before, of any input. Zeiler & Fergus, "Visualizing and Understanding
  Convolutional Networks", ECCV 2014.

Of the last two the largest magnitude over the three colours is the map. They are defined by ReLUs
alone: encoders without (GELU, SiLU) are refused. That a map looks like the picture says little:
both restore edges nearly whatever the weights are (Adebayo et al., "Sanity Checks for Saliency
Maps", NeurIPS 2018).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_flow.evaluation.embedding_pictures import pixel_maps
from ssl_flow.evaluation.pixel_features import frozen, project_levels
from ssl_flow.evaluation.refusal import import_extra
from ssl_flow.models.encoder import Encoder, device_of

METHODS = ("similarity", "cam", "grad-cam", "grad-cam++", "guided-backprop", "deconvolution")
Region = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the image: x0 <= x < x1, y0 <= y < y1."""


def similarity(encoder: Encoder, image: np.ndarray, region: Region) -> np.ndarray:
    """Cosine (H, W) of every pixel's embedding to the mean one of the region's cells.

    `image` is (H, W, 3) uint8. See `pixel_maps` for encoders without an embedding.
    """
    maps, stride = pixel_maps(encoder, image)
    chosen = F.normalize(_mean_of(maps, stride, region), dim=0)
    return _full(maps, stride, chosen, image)


@torch.no_grad()
def region_classifier(encoder: Encoder, image: np.ndarray, region: Region) -> tuple[Tensor, Tensor]:
    """Weight (1, C), bias (1,) of the class of which a region is the one example.

    Nearest class mean with two classes, the region and the whole picture: the weight is the
    difference of their mean features in the last level.

    Raises:
        ValueError: they do not differ (the region's cells are the whole picture).
    """
    maps = encoder.features(_input(encoder, image))[-1]
    weight = _mean_of(maps, encoder.strides[-1], region) - maps[0].mean((1, 2))
    if weight.norm() <= 1e-6 * maps.norm():
        raise ValueError(
            f"in the last level (stride {encoder.strides[-1]}) the region does not differ from the "
            "whole picture: choose a smaller one, or --method similarity"
        )
    return weight[None], weight.new_zeros(1)


@torch.no_grad()
def class_scores(encoder: Encoder, image: np.ndarray, weight: Tensor, bias: Tensor) -> Tensor:
    """Scores (K,) of an image (H, W, 3) uint8; ValueError: the classifier is for other channels."""
    if weight.shape[1] != encoder.channels[-1]:
        raise ValueError(
            f"a classifier of {weight.shape[1]} channels; the last level of this encoder has "
            f"{encoder.channels[-1]}"
        )
    return F.linear(encoder.features(_input(encoder, image))[-1].mean((2, 3)), weight, bias)[0]


def class_map(
    encoder: Encoder, image: np.ndarray, method: str, weight: Tensor, bias: Tensor, index: int
) -> np.ndarray:
    """The map (H, W) of class `index` for an image (H, W, 3) uint8, by one of `METHODS`[1:].

    Raises:
        ValueError: `check_method`, and a gradient of the image where the encoder gives none.
        ImportError: captum is missing.
    """
    check_method(encoder, method)
    images, stride = _input(encoder, image), encoder.strides[-1]
    with frozen(encoder), torch.enable_grad():
        if method in ("cam", "grad-cam++"):
            maps = encoder.features(images)[-1].detach()
            chosen = weight[index]
            if method == "cam":
                return _full(maps, stride, chosen, image)
            g = chosen / math.prod(maps.shape[2:])
            bottom = 2 * g**2 + g**3 * maps[0].sum((1, 2))
            alpha = torch.where(bottom == 0, 0, g**2 / bottom)
            # The sum over the cells of what is the same in each: relu(w_c).
            combined = F.conv2d(maps, (alpha * chosen.relu())[None, :, None, None]).relu()
            return _full(combined, stride, combined.new_ones(1), image)
        captum, classifier = _captum(), _Classifier(encoder, weight, bias)
        images.requires_grad_()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Setting backward hooks")
            if method == "grad-cam":
                explain = captum.LayerGradCam(classifier, classifier.last)
                found = explain.attribute(images, index, relu_attributions=True).detach()
                return _full(found, stride, found.new_ones(1), image)
            # Padded here, or the last line would be given the gradient of its copies below.
            sides = [-side % math.lcm(*encoder.strides) for side in image.shape[:2]]
            images = F.pad(images.detach(), (0, sides[1], 0, sides[0]), mode="replicate")
            images.requires_grad_()
            kind = "GuidedBackprop" if method == "guided-backprop" else "Deconvolution"
            gradient = getattr(captum, kind)(classifier).attribute(images, index)
    largest: np.ndarray = gradient[0].detach().abs().amax(0).cpu().numpy()
    return largest[: image.shape[0], : image.shape[1]]


def check_method(encoder: Encoder, method: str) -> None:
    """Look for what a method needs before any work is done.

    Raises:
        ImportError: captum is missing, which all but similarity, cam and grad-cam++ need.
        ValueError: guided-backprop or deconvolution, and the encoder has no ReLU (as a module).
    """
    if method in ("similarity", "cam", "grad-cam++"):
        return
    _captum()
    if method == "grad-cam":
        return
    modules = list(getattr(encoder, "backbone", encoder).modules())
    others = {type(m).__name__ for m in modules if "activation" in type(m).__module__}
    others -= {"ReLU", "MultiheadAttention"}
    if not any(isinstance(module, nn.ReLU) for module in modules):
        raise ValueError(
            f"{method} changes the gradient of ReLUs, and this encoder has none (activations: "
            f"{', '.join(sorted(others)) or 'none that are modules'}); use similarity or grad-cam"
        )
    if others:
        left = ", ".join(sorted(others))
        warnings.warn(f"{method} leaves the gradient of these as it is: {left}", stacklevel=2)


class _Classifier(nn.Module):
    """(B, 3, H, W) images -> (B, K) scores."""

    def __init__(self, encoder: Encoder, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.encoder, self.weight, self.bias = encoder, weight, bias
        self.last = nn.Identity()  # captum takes a level as a module

    def forward(self, images: Tensor) -> Tensor:
        maps = self.last(self.encoder.features(images)[-1])
        if not maps.requires_grad:
            raise ValueError("this encoder has no gradient; use similarity or a CAM")
        return F.linear(maps.mean((2, 3)), self.weight, self.bias)


def _captum() -> Any:  # noqa: ANN401 (a module)
    return import_extra("captum.attr", "this method needs captum: pip install 'ssl-flow[heatmap]'")


def _input(encoder: Encoder, image: np.ndarray) -> Tensor:
    return encoder.normalize(torch.from_numpy(image[None].copy()).to(device_of(encoder)))


def _mean_of(maps: Tensor, stride: int, region: Region) -> Tensor:
    """Mean (D,) of the cells (1, D, h, w) that a region touches."""
    x, y = (
        slice(int(low / stride), max(math.ceil(high / stride), int(low / stride) + 1))
        for low, high in (region[::2], region[1::2])
    )
    return maps[0, :, y, x].mean((1, 2))


def _full(maps: Tensor, stride: int, weight: Tensor, image: np.ndarray) -> np.ndarray:
    """weight (D,) . maps (1, D, h, w), brought to the image's resolution: (H, W) float32."""
    size = (image.shape[0], image.shape[1])
    full = project_levels([maps], [stride], weight[None], weight.new_zeros(1), size)
    values: np.ndarray = full[0, 0].cpu().numpy()
    return values
