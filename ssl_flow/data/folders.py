"""Labelled sets without lists: `camvid:`, `folder:` (both with a classes.csv) and `synthetic`."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from ssl_flow.data.labelled import (
    IGNORE,
    SegmentationSet,
    Split,
    class_table,
    paired,
    read_mask,
    require,
    set_of_files,
)


def camvid(root: Path, split: Split) -> SegmentationSet:
    """Judged on `test` where that is, else on `val`."""
    judged = "test" if (root / "test").is_dir() else "val"
    folder = {"train": "train", "test": judged}[split]
    layout = f"camvid: classes.csv, {{train,{judged}}}/images/NAME.jpg, .../masks/NAME.png"
    for needed in ("classes.csv", f"{folder}/images", f"{folder}/masks"):
        require(root / needed, layout)
    classes, table = read_classes(root / "classes.csv")
    files = paired(root / folder / "images", root / folder / "masks", layout)
    return set_of_files("camvid", classes, table, files, {"rule": f"the folder {folder}/"})


def folder(root: Path, split: Split) -> SegmentationSet:
    """Any images with masks; classes are the indices found where there is no classes.csv."""
    layout = "folder: {train,val or test}/{images,masks}, or {images,masks}; classes.csv optional"
    require(root, layout)
    if (root / "train").is_dir():
        held_out = next((f for f in ("test", "val") if (root / f).is_dir()), None)
        if held_out is None:
            raise FileNotFoundError(f"{root}: train/ but neither test/ nor val/. Expected {layout}")
        wanted = "train" if split == "train" else held_out
        halves = {f: paired(root / f / "images", root / f / "masks", layout)
                  for f in ("train", held_out)}  # fmt: skip
        files, rule = halves[wanted], f"the folder {wanted}/"
        every = halves["train"] + halves[held_out]
    else:
        every = paired(root / "images", root / "masks", layout)
        files = [pair for i, pair in enumerate(every) if (i % 5 == 4) == (split == "test")]
        rule = "sorted by name, every 5th file is test, the others are train"
    if (root / "classes.csv").exists():
        classes, table = read_classes(root / "classes.csv")
    else:  # both splits decide, so that both have the same classes
        present = set().union(*(np.unique(read_mask(mask)).tolist() for _, _, mask in every))
        found = sorted(present - {IGNORE})
        classes = [str(value) for value in found]
        table = class_table({IGNORE: IGNORE} | {value: i for i, value in enumerate(found)})
        rule += "; classes: the indices found in all masks, 255 = ignore"
    return set_of_files(root.resolve().name, classes, table, files, {"rule": rule})


def synthetic(path: Path, split: Split) -> SegmentationSet:
    """Stills of synthetic videos whose seeds no training video has."""
    from ssl_flow.data.synthetic import CLASSES, SyntheticVideo

    first, count = {"train": (1_000_000, 200), "test": (2_000_000, 60)}[split]

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        video = SyntheticVideo(first + index)
        return video.frame(video.frames // 2), video.mask(video.frames // 2)

    rule = f"the middle frames of the synthetic videos with seeds {first} to {first + count - 1}"
    names = [f"synthetic-{first + i}" for i in range(count)]
    return SegmentationSet("synthetic", list(CLASSES), names, load, {"rule": rule})


def read_classes(path: Path) -> tuple[list[str], np.ndarray]:
    """Names of the scored classes; table of 256: mask value -> class index, 255 ignore, -1 none."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"id", "name"} <= rows[0].keys():
        raise ValueError(f"{path}: expected the columns id,name[,ignore] and at least one row")
    values: dict[int, int] = {}
    classes: list[str] = []
    for row in rows:
        text, ignored = (
            (row.get(key) or none).strip() for key, none in (("id", ""), ("ignore", "0"))
        )
        if not text.isdecimal() or (value := int(text)) > 255:
            raise ValueError(f"{path}: id {text} is not the value of an 8-bit mask, 0 to 255")
        if value in values:
            raise ValueError(f"{path}: id {value} is there twice")
        if ignored not in ("0", "1"):
            raise ValueError(f"{path}: ignore = {ignored} of id {value}, expected 0 or 1")
        values[value] = IGNORE if ignored == "1" else len(classes)
        classes += [] if ignored == "1" else [row["name"]]
    if not classes:
        raise ValueError(f"{path}: every class is ignored")
    # unless listed, 255 is the usual value of "no label"
    return classes, class_table({IGNORE: IGNORE} | values)
