"""Image classification sets: `imagefolder:PATH` with one folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssl_flow.data.labelled import (
    IMAGE_SUFFIXES,
    ItemSet,
    Split,
    describe_split,
    parse_spec,
    read_image,
    short_list,
)

_LAYOUT = "imagefolder: train/CLASS/NAME.jpg and {test or val}/CLASS/NAME.jpg"


class Classified(NamedTuple):
    """One image with its class."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    label: int
    name: str  # CLASS/NAME.jpg


ClassificationSet = ItemSet[Classified]


def open_classification(spec: str, split: Split) -> ClassificationSet:
    """Open one split of `imagefolder:PATH`; the classes are the folders of train/, by name.

    The test split is test/ where that has folders of classes (ImageNet's has not), else val/.

    Raises:
        ValueError: another spec, a training class or a split without images, a test class that
            train/ has not.
        FileNotFoundError: something of the layout is missing; the message names it.
    """
    _, root = parse_spec(spec, "classification data", ["imagefolder:PATH"], split)
    held_out = next((f for f in ("test", "val") if _classes(root / f)), None)
    classes = _classes(root / "train")
    for folder, found in (("train", classes), ("test/ or val", held_out)):
        if not found:
            raise FileNotFoundError(f"{root}/{folder} has no class folders. Expected {_LAYOUT}")
    wanted = root / ("train" if split == "train" else str(held_out))
    if unknown := sorted(set(_classes(wanted)) - set(classes)):
        raise ValueError(f"{wanted} has classes that train/ has not: {short_list(unknown)}")
    images = [
        sorted(p for p in (wanted / c).glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        for c in classes
    ]
    empty = [c for c, files in zip(classes, images, strict=True) if not files]
    if len(empty) == len(classes) or (split == "train" and empty):
        raise ValueError(f"{wanted} has no images in {short_list(empty)}")
    labelled = [(file, label) for label, part in enumerate(images) for file in part]
    files = [file for file, _ in labelled]
    names = [f"{file.parent.name}/{file.name}" for file in files]

    def load(index: int) -> Classified:
        file, label = labelled[index]
        return Classified(read_image(file), label, names[index])

    rule = {"rule": f"the folder {wanted.name}/"}
    opened = ClassificationSet(root.resolve().name, classes, names, load, rule, files)
    describe_split(opened, spec, split)
    return opened


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
