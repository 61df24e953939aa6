"""Image classification sets: `imagefolder:PATH` with one folder a class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl_flow.data.labelled import IMAGE_SUFFIXES, Split, read_image, short_list, split_details

_LAYOUT = "imagefolder: train/CLASS/NAME.jpg and {test or val}/CLASS/NAME.jpg"


class Classified(NamedTuple):
    """One image with its class."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    label: int
    name: str


@dataclass(frozen=True)
class ClassificationSet:
    """One split; `set[i]` reads one image from the disk (nothing is cached)."""

    name: str
    classes: list[str]
    names: list[str]  # CLASS/NAME.jpg
    files: list[Path]
    labels: np.ndarray  # (N,) int64
    protocol: dict[str, Any]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> Classified:
        """Image `index`, its class and name."""
        return Classified(read_image(self.files[index]), int(self.labels[index]), self.names[index])


def open_classification(spec: str, split: Split) -> ClassificationSet:
    """Open one split of `imagefolder:PATH`; the classes are the folders of train/, by name.

    The test split is test/ where that has folders of classes (ImageNet's has not), else val/.

    Raises:
        ValueError: another spec, a training class or a split without images, a test class that
            train/ has not.
        FileNotFoundError: something of the layout is missing; the message names it.
    """
    kind, _, path = spec.partition(":")
    if kind != "imagefolder" or not path:
        raise ValueError(f"unknown classification data {spec!r}; known: imagefolder:PATH")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; known: train, test")
    root = Path(path).expanduser()
    held_out = next((f for f in ("test", "val") if _classes(root / f)), None)
    classes = _classes(root / "train")
    for folder, found in (("train", classes), ("test/ or val", held_out)):
        if not found:
            raise FileNotFoundError(f"{root}/{folder} has no class folders. Expected {_LAYOUT}")
    wanted = "train" if split == "train" else str(held_out)
    unknown = sorted(set(_classes(root / wanted)) - set(classes))
    if unknown:
        raise ValueError(f"{root / wanted} has classes that train/ has not: {short_list(unknown)}")
    images = [_images(root / wanted / c) for c in classes]
    empty = [c for c, files in zip(classes, images, strict=True) if not files]
    if len(empty) == len(classes) or (split == "train" and empty):
        raise ValueError(f"{root / wanted} has no images in {short_list(empty)}")
    files = [file for part in images for file in part]
    labels = np.repeat(np.arange(len(classes)), [len(part) for part in images])
    names = [f"{file.parent.name}/{file.name}" for file in files]
    protocol = {"rule": f"the folder {wanted}/", **split_details(spec, split, names)}
    return ClassificationSet(root.resolve().name, classes, names, files, labels, protocol)


def _classes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
