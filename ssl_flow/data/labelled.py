"""What a labelled set is, how its spec is read, and how its images and masks are read from files.

Masks are read with PIL: it gives the indices of palette PNGs (DAVIS, VOC), where OpenCV gives their
colours turned to grey.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

IGNORE = 255
Split = Literal["train", "test"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
Item = TypeVar("Item")


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
class ItemSet(Generic[Item]):
    """One split of a set; `set[i]` reads one item from the disk (nothing is cached)."""

    name: str  # for tables and file names
    classes: list[str]  # in the order of their indices; empty: any index
    names: list[str]  # one an item
    load: Callable[[int], Any]  # index -> item; of a SegmentationSet: image, mask
    protocol: dict[str, Any] = field(default_factory=dict)  # how the split was made, which files
    files: list[Path] = field(default_factory=list)  # of the images, where they are files
    mask_files: list[Path] = field(default_factory=list)

    def __len__(self) -> int:
        """The number of items."""
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        """Item `index`."""
        if not -len(self) <= index < len(self):  # IndexError also ends `for item in set`
            raise IndexError(f"{self.name} has {len(self)} items, asked for index {index}")
        item: Item = self.load(index % len(self))
        return item

    def __iter__(self) -> Iterator[Item]:
        """All items in order."""
        return (self[i] for i in range(len(self)))


class SegmentationSet(ItemSet[Labelled]):
    """One split of a set of images with masks."""

    def __getitem__(self, index: int) -> Labelled:
        """Image `index`; ValueError (with its name) when its mask does not fit."""
        image, mask, name = item = Labelled(*super().__getitem__(index)[:2], self.names[index])
        if mask.shape != image.shape[:2]:
            shapes = f"{mask.shape}, its image {image.shape[:2]}"
            raise ValueError(f"{self.name}: the mask of {name} is {shapes}")
        wrong = mask[(mask >= len(self.classes)) & (mask != IGNORE)]
        if self.classes and wrong.size:
            found = f"class {wrong[0]}, expected 0..{len(self.classes) - 1} or {IGNORE}"
            raise ValueError(f"{self.name}: the mask of {name} holds {found}")
        return item


def parse_spec(spec: str, what: str, known: Sequence[str], split: str) -> tuple[str, Path]:
    """`KIND:PATH` -> kind, folder; ValueError unless `known` has KIND:PATH, or KIND, of no path."""
    kind, _, path = spec.partition(":")
    if (f"{kind}:PATH" if path else kind) not in known:
        raise ValueError(f"unknown {what} {spec!r}; known: {', '.join(known)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; known: train, test")
    return kind, Path(path).expanduser()


def describe_split(opened: ItemSet[Any], spec: str, split: Split) -> None:
    """Add to a set's protocol what tells of its images; ValueError where it has none."""
    if not len(opened):
        raise ValueError(f"{spec}: the {split} split is empty ({opened.protocol['rule']})")
    digest = hashlib.sha256("\n".join(opened.names).encode()).hexdigest()[:16]
    opened.protocol |= {"spec": spec, "split": split, "images": len(opened)}
    opened.protocol["names_sha256"] = digest


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
    layout: str,
    protocol: dict[str, Any],
) -> SegmentationSet:
    """A set of image and mask files whose mask values `table` (see `class_table`) translates.

    Raises:
        FileNotFoundError: an image or a mask is not there.
    """
    for _, image, mask in files:
        require(layout, image)
        if not mask.exists():
            raise FileNotFoundError(f"{image} has no mask {mask}. Expected layout of {layout}")

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        _, image_path, mask_path = files[index]
        image, raw = read_image(image_path), read_mask(mask_path)
        if raw.shape != image.shape[:2]:
            raise ValueError(f"{mask_path} is {raw.shape}, {image_path} is {image.shape[:2]}")
        mask = table[raw]
        if (mask < 0).any():
            unknown = np.unique(raw[mask < 0]).tolist()
            raise ValueError(
                f"{mask_path} holds {unknown}, not among the classes {short_list(classes)} "
                f"(values {short_list(np.flatnonzero(table >= 0).tolist())})"
            )
        return image, mask.astype(np.uint8)

    names, images, masks = map(list, zip(*files, strict=True)) if files else ([], [], [])
    return SegmentationSet(name, list(classes), names, load, protocol, images, masks)


def paired(images: Path, masks: Path, layout: str) -> list[Files]:
    """Every image of a folder with its mask NAME.png, there or not."""
    require(layout, images, masks)
    files = sorted(p for p in images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    return [Files(p.stem, p, masks / f"{p.stem}.png") for p in files]


def require(layout: str, *paths: Path) -> None:
    """FileNotFoundError, with the expected layout, unless all of `paths` exist."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing. Expected layout of {layout}")


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB; ValueError, with the file's name, when it is broken."""
    return _read(path, "RGB")


def read_mask(path: Path) -> np.ndarray:
    """(H, W) uint8 of a single-channel 8-bit file, palette indices as they are; else ValueError."""
    mask = _read(path, None)
    if mask.ndim != 2 or mask.dtype not in (np.uint8, np.bool_):
        found = f"{mask.dtype} of shape {mask.shape}"
        raise ValueError(f"{path}: expected a single-channel 8-bit mask of class indices, {found}")
    return mask.astype(np.uint8)


def _read(path: Path, mode: str | None) -> np.ndarray:
    try:
        with Image.open(path) as file:
            return np.asarray(file.convert(mode) if mode else file)
    except FileNotFoundError:
        raise
    except OSError as error:  # PIL's own message does not always name the file
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def read_lines(path: Path, layout: str) -> list[str]:
    """The first word of each line of a list; of an image's path the name."""
    require(layout, path)
    words = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    return [word.removesuffix(".jpg") for word in words]


def short_list(items: Sequence[Any]) -> str:
    """The list as text, its middle left out where it is long."""
    shown = [str(item) for item in items]
    return ", ".join(shown if len(shown) <= 24 else [*shown[:20], "...", *shown[-2:]])
