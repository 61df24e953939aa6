"""An encoder of a few lines and sets whose images show their labels, for the protocols' tests."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ssl_flow.data.segmentation import SegmentationSet


class FakeEncoder(nn.Module):
    """Feature maps made from the image by average pooling; what a protocol needs, nothing more."""

    def __init__(self, strides=(1,), zero=0):
        super().__init__()
        self.strides, self.channels, self.zero = list(strides), [3] * len(strides), zero
        self.scale, self.norm = nn.Parameter(torch.ones(())), nn.BatchNorm2d(3)

    def normalize(self, images):
        return images.permute(0, 3, 1, 2).float() / 255 - self.zero

    def features(self, images):
        images = self.norm(images) * self.scale
        return [F.avg_pool2d(images, s, ceil_mode=True) for s in self.strides]


def lying(declared=(4,), real=(2,)):
    """An encoder whose maps do not have the strides that it says."""
    encoder = FakeEncoder(declared)
    encoder.features = FakeEncoder(real).eval().features
    return encoder


def label_set(labels, images=None, classes=3, name="fake"):
    """The image shows the label one-hot in R, G, B, unless given."""
    labels = [np.asarray(label, np.uint8) for label in labels]
    if images is None:
        images = [(np.eye(256, 3, dtype=np.uint8) * 255)[label] for label in labels]
    names = [f"{name}{i}" for i in range(len(labels))]
    classes = [f"class{i}" for i in range(classes)]
    return SegmentationSet(name, classes, names, lambda i: (images[i], labels[i]), {"rule": "fake"})


def masks(seed, count=6, size=24, cell=1):
    """(count, size, size) random classes 0..2, constant over cells of `cell` pixels."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 3, (count, size // cell, size // cell))
    return small.repeat(cell, 1).repeat(cell, 2)
