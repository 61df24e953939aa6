"""Labelled segmentation sets: one `SegmentationSet` for every `kind:PATH` spec.

    train = open_segmentation("camvid:data/camvid", "train")
    image, mask, name = train[0]          # (H, W, 3) uint8, (H, W) uint8 with 255 = ignore, str

An adapter checks the layout first and raises before any long work. Masks are read with PIL: it
gives the indices of palette PNGs (DAVIS, VOC), where OpenCV gives their colours turned to grey.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator
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


@dataclass
class SegmentationSet:
    """One split of a labelled set; `set[i]` reads one image from the disk (nothing is cached)."""

    name: str  # for tables and file names
    classes: list[str]  # the scored classes, in the order of the mask's indices
    names: list[str]  # one a labelled image
    load: Callable[[int], tuple[np.ndarray, np.ndarray]]  # index -> image, mask
    protocol: dict[str, Any] = field(default_factory=dict)  # how the split was made, which files
    files: list[Path] = field(default_factory=list)  # the images, where they are files

    def __len__(self) -> int:
        """The number of labelled images."""
        return len(self.names)

    def __getitem__(self, index: int) -> Labelled:
        """Image `index`; ValueError (with the file's name) when its mask does not fit."""
        if not -len(self) <= index < len(self):  # IndexError also ends `for item in set`
            raise IndexError(f"{self.name} has {len(self)} images, asked for index {index}")
        index %= len(self)
        return Labelled(*self.load(index), self.names[index])

    def __iter__(self) -> Iterator[Labelled]:
        """All images in order."""
        return (self[i] for i in range(len(self)))


def open_segmentation(spec: str, split: Split) -> SegmentationSet:
    """Open `camvid:PATH`, `davis:PATH`, `folder:PATH` or `synthetic`.

    Args:
        spec: kind and folder; `synthetic` needs no folder.
        split: `train` or `test` (`val` where a set has no labelled test split).

    Raises:
        ValueError: unknown kind, an empty split, a malformed classes.csv.
        FileNotFoundError: something of the expected layout is missing; the message names it.
    """
    kind, _, path = spec.partition(":")
    if kind not in _KINDS:
        raise ValueError(
            f"unknown data kind {kind!r} in {spec!r}; known: "
            + ", ".join(k if k == "synthetic" else f"{k}:PATH" for k in _KINDS)
        )
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; known: train, test")
    if kind != "synthetic" and not path:
        raise ValueError(f"{spec!r} has no folder; write {kind}:PATH")
    opened = _KINDS[kind](Path(path).expanduser(), split)
    if not len(opened):
        raise ValueError(f"{spec}: the {split} split is empty ({opened.protocol['rule']})")
    digest = hashlib.sha256("\n".join(opened.names).encode()).hexdigest()[:16]
    opened.protocol |= {"spec": spec, "split": split, "images": len(opened), "names_sha256": digest}
    return opened


def _camvid(root: Path, split: Split) -> SegmentationSet:
    judged = "test" if (root / "test").is_dir() else "val"
    folder = {"train": "train", "test": judged}[split]
    layout = f"camvid: classes.csv, {{train,{judged}}}/images/NAME.jpg, .../masks/NAME.png"
    for needed in ("classes.csv", f"{folder}/images", f"{folder}/masks"):
        _require(root / needed, layout)
    classes, table = _read_classes(root / "classes.csv")
    pairs = _paired(root / folder / "images", root / folder / "masks", layout)
    return _from_files("camvid", classes, table, pairs, {"rule": f"the folder {folder}/"})


def _davis(root: Path, split: Split) -> SegmentationSet:
    """Foreground / background. The official split, or every third sequence is for the test."""
    official = {"train": "train", "test": "val"}[split]
    listing = root / "ImageSets/480p" / f"{official}.txt"
    if listing.exists():
        images, masks, layout = "JPEGImages/480p", "Annotations/480p", "the official DAVIS folders"
    else:
        images, masks, layout = "frames", "masks", "frames/SEQUENCE/N.jpg, masks/SEQUENCE/N.png"
    layout = (
        f"davis: {layout} (official: ImageSets/480p/{{train,val}}.txt, JPEGImages, Annotations)"
    )
    for needed in (images, masks):
        _require(root / needed, layout)
    if listing.exists():
        # A line is "/JPEGImages/480p/bear/00000.jpg /Annotations/..." (2016) or "bear" (2017).
        lines = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
        sequences = sorted({Path(x).parent.name if x.endswith(".jpg") else x for x in lines})
        rule = f"the official list {listing.relative_to(root)}"
    else:
        every = sorted(p.name for p in (root / images).iterdir() if p.is_dir())
        sequences = [s for i, s in enumerate(every) if (i % 3 == 1) == (split == "test")]
        rule = "sequences sorted by name, index % 3 == 1 is test, the others are train"
    pairs = []
    for sequence in sequences:
        folders = root / images / sequence, root / masks / sequence
        for folder in folders:
            _require(folder, layout)
        pairs += [(f"{sequence}/{name}", i, m) for name, i, m in _paired(*folders, layout)]
    table = np.ones(256, np.int16)  # any non-zero value is foreground (the 2016 masks hold 255)
    table[0] = 0
    protocol = {"rule": rule, "sequences": sequences}
    return _from_files("davis", ["background", "foreground"], table, pairs, protocol)


def _folder(root: Path, split: Split) -> SegmentationSet:
    layout = "folder: {train,val or test}/{images,masks}, or {images,masks}; classes.csv optional"
    _require(root, layout)
    if (root / "train").is_dir():
        held_out = next((f for f in ("test", "val") if (root / f).is_dir()), None)
        if held_out is None:
            raise FileNotFoundError(f"{root}: train/ but neither test/ nor val/. Expected {layout}")
        wanted = "train" if split == "train" else held_out
        halves = {f: _paired(root / f / "images", root / f / "masks", layout)
                  for f in ("train", held_out)}  # fmt: skip
        pairs, rule = halves[wanted], f"the folder {wanted}/"
        every = halves["train"] + halves[held_out]
    else:
        every = _paired(root / "images", root / "masks", layout)
        pairs = [pair for i, pair in enumerate(every) if (i % 5 == 4) == (split == "test")]
        rule = "sorted by name, every 5th file is test, the others are train"
    if (root / "classes.csv").exists():
        classes, table = _read_classes(root / "classes.csv")
    else:  # both splits decide, so that both have the same classes
        present = set().union(*(np.unique(_read_mask(mask)).tolist() for _, _, mask in every))
        found = sorted(present - {IGNORE})
        classes, table = [str(i) for i in found], np.full(256, -1, np.int16)
        table[found] = range(len(found))
        table[IGNORE] = IGNORE
        rule += "; classes: the indices found in all masks, 255 = ignore"
    return _from_files(root.resolve().name, classes, table, pairs, {"rule": rule})


def _synthetic(path: Path, split: Split) -> SegmentationSet:
    """Stills of synthetic videos whose seeds no training video has."""
    from ssl_flow.data.synthetic import CLASSES, SyntheticVideo

    first, count = {"train": (1_000_000, 200), "test": (2_000_000, 60)}[split]

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        video = SyntheticVideo(first + index)
        return video.frame(video.frames // 2), video.mask(video.frames // 2)

    rule = f"the middle frames of the synthetic videos with seeds {first} to {first + count - 1}"
    names = [f"synthetic-{first + i}" for i in range(count)]
    return SegmentationSet("synthetic", list(CLASSES), names, load, {"rule": rule})


_KINDS = {"camvid": _camvid, "davis": _davis, "folder": _folder, "synthetic": _synthetic}


def _require(path: Path, layout: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. Expected layout of {layout}")


def _read_classes(path: Path) -> tuple[list[str], np.ndarray]:
    """Names of the scored classes; table of 256: mask value -> class index, 255 ignore, -1 none."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"id", "name"} <= rows[0].keys():
        raise ValueError(f"{path}: expected the columns id,name[,ignore] and at least one row")
    table = np.full(256, -1, np.int16)
    table[IGNORE] = IGNORE  # unless listed, the usual value of "no label"
    classes: list[str] = []
    for row in rows:
        ignored = int(row.get("ignore") or 0)
        if not 0 <= int(row["id"]) <= 255:
            raise ValueError(f"{path}: id {row['id']} is not the value of an 8-bit mask, 0 to 255")
        table[int(row["id"])] = IGNORE if ignored else len(classes)
        classes += [] if ignored else [row["name"]]
    return classes, table


def _paired(images: Path, masks: Path, layout: str) -> list[tuple[str, Path, Path]]:
    """(name, image, mask) of every image of a folder; FileNotFoundError where a mask is missing."""
    for folder in (images, masks):
        _require(folder, layout)
    files = sorted(p for p in images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    pairs = [(p.stem, p, masks / f"{p.stem}.png") for p in files]
    for _, image, mask in pairs:
        if not mask.exists():
            raise FileNotFoundError(f"{image} has no mask {mask}. Expected layout of {layout}")
    return pairs


def _read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        mask = np.asarray(file)
    if mask.ndim != 2 or mask.dtype not in (np.uint8, np.bool_):
        found = f"{mask.dtype} of shape {mask.shape}"
        raise ValueError(f"{path}: expected a single-channel 8-bit mask of class indices, {found}")
    return mask.astype(np.uint8)


def _from_files(
    name: str,
    classes: list[str],
    table: np.ndarray,
    pairs: list[tuple[str, Path, Path]],
    protocol: dict[str, Any],
) -> SegmentationSet:
    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        _, image_path, mask_path = pairs[index]
        with Image.open(image_path) as file:
            image = np.asarray(file.convert("RGB"))
        raw = _read_mask(mask_path)
        if raw.shape != image.shape[:2]:
            raise ValueError(f"{mask_path} is {raw.shape}, {image_path} is {image.shape[:2]}")
        mask = table[raw]
        if (mask < 0).any():
            unknown = np.unique(raw[mask < 0]).tolist()
            raise ValueError(f"{mask_path} holds {unknown}, not among the classes {classes}")
        return image, mask.astype(np.uint8)

    names, images = [p[0] for p in pairs], [p[1] for p in pairs]
    return SegmentationSet(name, classes, names, load, protocol, images)
