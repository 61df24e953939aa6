"""A linear classifier on the mean of an encoder's last level: a file, or images to fit it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ssl_flow.data.classification import open_classification
from ssl_flow.evaluation.classification import fit_classifier
from ssl_flow.flow.shard import write_atomically
from ssl_flow.models.encoder import Encoder, device_of


class Head(NamedTuple):
    """The names of K classes, and what gives weight (K, C) and bias (K,) for an encoder."""

    classes: list[str]
    fit: Callable[[Encoder], tuple[Tensor, Tensor]]

    def index_of(self, name: str) -> int:
        """The class of this name, else of this number; ValueError if there is none."""
        if name in self.classes:
            return self.classes.index(name)
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        known = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        raise ValueError(f"--class {name}: of {len(self.classes)} classes none is that: {known}")


def open_head(spec: str) -> Head:
    """`imagefolder:PATH` (fitted on its train/ when asked) or FILE.safetensors, as `save_head`.

    Raises:
        FileNotFoundError: nothing there. ValueError: no such set, or no such file.
    """
    if spec.startswith("imagefolder:"):
        train_set = open_classification(spec, "train")
        return Head(train_set.classes, partial(fit_classifier, train_set=train_set))
    if not Path(spec).is_file():
        raise FileNotFoundError(f"--head {spec}: expected imagefolder:PATH or a .safetensors file")
    try:
        with safe_open(spec, "pt") as file:
            weight, bias = (file.get_tensor(name).float() for name in ("weight", "bias"))
            told = (file.metadata() or {}).get("classes")
        classes = [str(name) for name in json.loads(told)] if told else None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{spec} is no head, safetensors with weight and bias: {error}") from error
    classes = classes or [str(index) for index in range(len(weight))]
    if weight.ndim != 2 or bias.shape != (len(classes),) or len(weight) != len(classes):
        shapes = f"{tuple(weight.shape)}, {tuple(bias.shape)}, {len(classes)} classes"
        raise ValueError(f"{spec}: expected weight (K, C), bias (K,), K classes; found {shapes}")
    return Head(
        classes, lambda encoder: (weight.to(device_of(encoder)), bias.to(device_of(encoder)))
    )


def save_head(path: Path, weight: Tensor, bias: Tensor, classes: list[str]) -> None:
    """Write weight (K, C), bias (K,) and, as metadata, the names of the classes (JSON)."""
    tensors = {"weight": weight.cpu().contiguous(), "bias": bias.cpu().contiguous()}
    write_atomically(path, save(tensors, metadata={"classes": json.dumps(classes)}))
