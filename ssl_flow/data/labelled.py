"""What a labelled segmentation set is, and how its images and masks are read from files.

Masks are read with PIL: it gives the indices of palette PNGs (DAVIS, VOC), where OpenCV gives their
colours turned to grey.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

IGNORE = 255
Split = Literal["train", "test"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class Labelled(NamedTuple):
    """One image with its labels."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    mask: np.ndarray  # (H, W) uint8: class index, 255 = ignore
    name: str


class Files(NamedTuple):
    """Where one labelled image lies."""

    name: str
    image: Path
    mask: Path


@dataclass
class SegmentationSet:
    """One split of a labelled set; `set[i]` reads one image from the disk (nothing is cached)."""

    name: str  # for tables and file names
    classes: list[str]  # in the order of the mask's indices; empty: any index
    names: list[str]  # one a labelled image
    load: Callable[[int], tuple[np.ndarray, np.ndarray]]  # index -> image, mask
    protocol: dict[str, Any] = field(default_factory=dict)  # how the split was made, which files
    files: list[Path] = field(default_factory=list)  # of the images, where they are files
    mask_files: list[Path] = field(default_factory=list)

    def __len__(self) -> int:
        """The number of labelled images."""
        return len(self.names)

    def __getitem__(self, index: int) -> Labelled:
        """Image `index`; ValueError (with its name) when its mask does not fit."""
        if not -len(self) <= index < len(self):  # IndexError also ends `for item in set`
            raise IndexError(f"{self.name} has {len(self)} images, asked for index {index}")
        index %= len(self)
        image, mask, name = item = Labelled(*self.load(index), self.names[index])
        if mask.shape != image.shape[:2]:
            shapes = f"{mask.shape}, its image {image.shape[:2]}"
            raise ValueError(f"{self.name}: the mask of {name} is {shapes}")
        wrong = mask[(mask >= len(self.classes)) & (mask != IGNORE)]
        if self.classes and wrong.size:
            found = f"class {wrong[0]}, expected 0..{len(self.classes) - 1} or {IGNORE}"
            raise ValueError(f"{self.name}: the mask of {name} holds {found}")
        return item

    def __iter__(self) -> Iterator[Labelled]:
        """All images in order."""
        return (self[i] for i in range(len(self)))


def split_details(spec: str, split: Split, names: Sequence[str]) -> dict[str, Any]:
    """What a set's protocol tells of its images."""
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    return {"spec": spec, "split": split, "images": len(names), "names_sha256": digest}


def class_table(values: dict[int, int]) -> np.ndarray:
    """(256,) int16 of {mask value: class index or IGNORE}; -1 for a value that no mask may hold."""
    table = np.full(256, -1, np.int16)
    table[list(values)] = list(values.values())
    return table


def set_of_files(
    name: str,
    classes: Sequence[str],
    table: np.ndarray,
    files: Sequence[Files],
    protocol: dict[str, Any],
) -> SegmentationSet:
    """A set of image and mask files whose mask values `table` (see `class_table`) translates."""

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        _, image_path, mask_path = files[index]
        image, raw = read_image(image_path), read_mask(mask_path)
        require_same_size(raw, mask_path, image, image_path)
        mask = table[raw]
        if (mask < 0).any():
            unknown = np.unique(raw[mask < 0]).tolist()
            raise ValueError(
                f"{mask_path} holds {unknown}, not among the classes {short_list(classes)} "
                f"(values {short_list(np.flatnonzero(table >= 0).tolist())})"
            )
        return image, mask.astype(np.uint8)

    names, images, masks = zip(*files, strict=True) if files else ((), (), ())
    return SegmentationSet(
        name, list(classes), list(names), load, protocol, list(images), list(masks)
    )


def paired(images: Path, masks: Path, layout: str) -> list[Files]:
    """Every image of a folder with its mask NAME.png; FileNotFoundError where one is missing."""
    for folder in (images, masks):
        require(folder, layout)
    files = sorted(p for p in images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    return existing([Files(p.stem, p, masks / f"{p.stem}.png") for p in files], layout)


def existing(files: list[Files], layout: str) -> list[Files]:
    """The same files; FileNotFoundError names the first image or mask that is not there."""
    for _, image, mask in files:
        if not image.exists():
            raise FileNotFoundError(f"{image} is missing. Expected layout of {layout}")
        if not mask.exists():
            raise FileNotFoundError(f"{image} has no mask {mask}. Expected layout of {layout}")
    return files


def require(path: Path, layout: str) -> None:
    """FileNotFoundError, with the expected layout, unless `path` exists."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. Expected layout of {layout}")


def require_same_size(mask: np.ndarray, mask_path: Path, image: np.ndarray, path: Path) -> None:
    """ValueError, with both files, unless (H, W) of `mask` and of `image` agree."""
    if mask.shape != image.shape[:2]:
        raise ValueError(f"{mask_path} is {mask.shape}, {path} is {image.shape[:2]}")


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB; ValueError, with the file's name, when it is broken."""
    return _pixels(path, "RGB")


def read_mask(path: Path) -> np.ndarray:
    """(H, W) uint8 of a single-channel 8-bit file, palette indices as they are; else ValueError."""
    mask = _pixels(path, None)
    if mask.ndim != 2 or mask.dtype not in (np.uint8, np.bool_):
        found = f"{mask.dtype} of shape {mask.shape}"
        raise ValueError(f"{path}: expected a single-channel 8-bit mask of class indices, {found}")
    return mask.astype(np.uint8)


def _pixels(path: Path, mode: str | None) -> np.ndarray:
    try:
        with Image.open(path) as file:
            return np.asarray(file.convert(mode) if mode else file)
    except FileNotFoundError:
        raise
    except OSError as error:  # PIL's own message does not always name the file
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def read_lines(path: Path, layout: str) -> list[str]:
    """The lines of a list that are not blank."""
    require(path, layout)
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def short_list(items: Sequence[Any]) -> str:
    """The list as text, its middle left out where it is long."""
    shown = [str(item) for item in items]
    return ", ".join(shown if len(shown) <= 24 else [*shown[:20], "...", *shown[-2:]])
