"""Labelled segmentation sets: one `SegmentationSet` for every `kind:PATH` spec.

    train = open_segmentation("camvid:data/camvid", "train")
    image, mask, name = train[0]          # (H, W, 3) uint8, (H, W) uint8 with 255 = ignore, str

An adapter checks the layout first and raises before any long work; nothing is ever downloaded. The
field's benchmarks are read in their official layouts.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from ssl_flow.data.benchmark_classes import ADE20K, CITYSCAPES, COCOSTUFF, VOC
from ssl_flow.data.davis import davis
from ssl_flow.data.labelled import (
    IGNORE,
    Files,
    Labelled,
    SegmentationSet,
    Split,
    class_table,
    describe_split,
    paired,
    parse_spec,
    read_lines,
    read_mask,
    require,
    set_of_files,
)

__all__ = ["IGNORE", "Labelled", "SegmentationSet", "Split", "open_segmentation"]


def open_segmentation(spec: str, split: Split) -> SegmentationSet:
    """Open one split of a labelled set.

    Args:
        spec: `camvid:PATH`, `voc:PATH`, `cityscapes:PATH`, `ade20k:PATH`, `cocostuff:PATH`,
            `davis:PATH`, `folder:PATH` or `synthetic`.
        split: `train` or `test` (`val` where a set has no labelled test split).

    Raises:
        ValueError: unknown kind, an empty split, a malformed classes.csv.
        FileNotFoundError: something of the expected layout is missing; the message names it.
    """
    kinds = {
        "camvid": _camvid,
        "voc": _voc,
        "cityscapes": _cityscapes,
        "ade20k": _ade20k,
        "cocostuff": _cocostuff,
        "davis": davis,
        "folder": _folder,
    }
    known = [*(f"{kind}:PATH" for kind in kinds), "synthetic"]
    kind, root = parse_spec(spec, "data", known, split)
    opened = kinds[kind](root, split) if kind in kinds else _synthetic(split)
    describe_split(opened, spec, split)
    return opened


def _camvid(root: Path, split: Split) -> SegmentationSet:
    """Judged on `test` where that is, else on `val`."""
    judged = "test" if (root / "test").is_dir() else "val"
    used = {"train": "train", "test": judged}[split]
    layout = f"camvid: classes.csv, {{train,{judged}}}/images/NAME.jpg, .../masks/NAME.png"
    require(layout, root / "classes.csv")
    classes, table = _read_classes(root / "classes.csv")
    files = paired(root / used / "images", root / used / "masks", layout)
    return set_of_files("camvid", classes, table, files, layout, {"rule": f"the folder {used}/"})


def _folder(root: Path, split: Split) -> SegmentationSet:
    """Any images with masks; classes are the indices found where there is no classes.csv."""
    layout = "folder: {train,val or test}/{images,masks}, or {images,masks}; classes.csv optional"
    require(layout, root)
    if (root / "train").is_dir():
        held_out = next((f for f in ("test", "val") if (root / f).is_dir()), None)
        if held_out is None:
            raise FileNotFoundError(f"{root}: train/ but neither test/ nor val/. Expected {layout}")
        halves = [paired(root / f / "images", root / f / "masks", layout)
                  for f in ("train", held_out)]  # fmt: skip
        files, every = halves[split == "test"], halves[0] + halves[1]
        rule = f"the folder {'train' if split == 'train' else held_out}/"
    else:
        every = paired(root / "images", root / "masks", layout)
        files = [pair for i, pair in enumerate(every) if (i % 5 == 4) == (split == "test")]
        rule = "sorted by name, every 5th file is test, the others are train"
    if (root / "classes.csv").exists():
        classes, table = _read_classes(root / "classes.csv")
    else:  # both splits decide, so that both have the same classes
        masks = [mask for _, _, mask in every if mask.exists()]
        found = sorted(set().union(*(np.unique(read_mask(m)).tolist() for m in masks)) - {IGNORE})
        classes = [str(value) for value in found]
        table = class_table({IGNORE: IGNORE} | {value: i for i, value in enumerate(found)})
        rule += "; classes: the indices found in all masks, 255 = ignore"
    return set_of_files(root.resolve().name, classes, table, files, layout, {"rule": rule})


def _read_classes(path: Path) -> tuple[list[str], np.ndarray]:
    """Names of the scored classes of a classes.csv, and its `class_table`."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"id", "name"} <= rows[0].keys():
        raise ValueError(f"{path}: expected the columns id,name[,ignore] and at least one row")
    values: dict[int, int] = {}
    classes: list[str] = []
    for row in rows:
        text, ignored = (row["id"] or "").strip(), (row.get("ignore") or "0").strip()
        if not text.isdecimal() or (value := int(text)) > 255:
            raise ValueError(f"{path}: id {text} is not the value of an 8-bit mask, 0 to 255")
        if value in values:
            raise ValueError(f"{path}: id {value} is there twice")
        if ignored not in ("0", "1"):
            raise ValueError(f"{path}: ignore = {ignored} of id {value}, expected 0 or 1")
        if ignored == "0" and row["name"] in (*classes, None, ""):
            raise ValueError(f"{path}: id {value} needs a name of its own, found {row['name']!r}")
        values[value] = IGNORE if ignored == "1" else len(classes)
        classes += [] if ignored == "1" else [row["name"]]
    if not classes:
        raise ValueError(f"{path}: every class is ignored")
    # unless listed, 255 is the usual value of "no label"
    return classes, class_table({IGNORE: IGNORE} | values)


def _synthetic(split: Split) -> SegmentationSet:
    """Stills of synthetic videos whose seeds no training video has."""
    from ssl_flow.data.synthetic import CLASSES, SyntheticVideo

    first, count = {"train": (1_000_000, 200), "test": (2_000_000, 60)}[split]

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        video = SyntheticVideo(first + index)
        return video.frame(video.frames // 2), video.mask(video.frames // 2)

    rule = f"the middle frames of the synthetic videos with seeds {first} to {first + count - 1}"
    names = [f"synthetic-{first + i}" for i in range(count)]
    return SegmentationSet("synthetic", list(CLASSES), names, load, {"rule": rule})


def _voc(root: Path, split: Split) -> SegmentationSet:
    """PASCAL VOC 2012 (Everingham et al., 2010): 21 classes with background, 255 = border.

    Where SegmentationClassAug/ and trainaug.txt are (the annotations of Hariharan et al., ICCV
    2011), they are the train split; the test split is always the official val.
    """
    lists = root / "ImageSets/Segmentation"
    layout = (
        "voc: the folder VOC2012 with JPEGImages/NAME.jpg, SegmentationClass/NAME.png, "
        "ImageSets/Segmentation/{train,val}.txt (optional: SegmentationClassAug, trainaug.txt)"
    )
    require(layout, root / "JPEGImages", root / "SegmentationClass")
    augmented = (root / "SegmentationClassAug").is_dir() and (lists / "trainaug.txt").exists()
    listing, masks = {"train": "train.txt", "test": "val.txt"}[split], "SegmentationClass"
    if split == "train" and augmented:
        listing, masks = "trainaug.txt", "SegmentationClassAug"
    # A line is NAME, or in some lists "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png".
    names = [Path(line).name for line in read_lines(lists / listing, layout)]
    files = [Files(n, root / f"JPEGImages/{n}.jpg", root / masks / f"{n}.png") for n in names]
    rule = f"ImageSets/Segmentation/{listing} with the masks of {masks}/"
    table = class_table({IGNORE: IGNORE} | {i: i for i in range(len(VOC))})
    return set_of_files("voc", VOC, table, files, layout, {"rule": rule})


def _cityscapes(root: Path, split: Split) -> SegmentationSet:
    """Cityscapes, fine annotations (Cordts et al., CVPR 2016): the 19 classes of its benchmark."""
    official = {"train": "train", "test": "val"}[split]
    images, masks = root / "leftImg8bit" / official, root / "gtFine" / official
    layout = (
        "cityscapes: leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png, "
        "gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png"
    )
    require(layout, images, masks)
    files = []
    for image in sorted(images.glob("*/*_leftImg8bit.png")):
        name = f"{image.parent.name}/{image.name.removesuffix('_leftImg8bit.png')}"
        files.append(Files(name, image, masks / f"{name}_gtFine_labelIds.png"))
    # 34 labels, of which the benchmark scores 19.
    scored = {label: i for i, label in enumerate(CITYSCAPES.values())}
    table = class_table(dict.fromkeys(range(34), IGNORE) | scored)
    rule = f"leftImg8bit/{official} with gtFine/{official} (labelIds)"
    return set_of_files("cityscapes", list(CITYSCAPES), table, files, layout, {"rule": rule})


def _ade20k(root: Path, split: Split) -> SegmentationSet:
    """ADE20K, the scene parsing benchmark (Zhou et al., CVPR 2017): 150 classes, 0 = ignore."""
    official = {"train": "training", "test": "validation"}[split]
    layout = (
        "ade20k: the folder ADEChallengeData2016 with images/{training,validation}/NAME.jpg, "
        "annotations/{training,validation}/NAME.png"
    )
    files = paired(root / "images" / official, root / "annotations" / official, layout)
    table = class_table({0: IGNORE} | {i + 1: i for i in range(len(ADE20K))})
    return set_of_files("ade20k", ADE20K, table, files, layout, {"rule": f"the folder {official}/"})


def _cocostuff(root: Path, split: Split) -> SegmentationSet:
    """COCO-Stuff (Caesar et al., CVPR 2018) with its 27 coarse classes, as IIC, PiCIE and STEGO.

    With their list curated/{train,val}2017/Coco164kFull_Stuff_Coarse_7.txt only its images are
    used, otherwise all: the rule in `protocol` says which. The images are whole, not cropped.
    """
    official = {"train": "train2017", "test": "val2017"}[split]
    layout = (
        "cocostuff: images/{train,val}2017/NAME.jpg, annotations/{train,val}2017/NAME.png "
        "(the pixel maps, 0-181 and 255)"
    )
    images, masks = root / "images" / official, root / "annotations" / official
    files, rule = paired(images, masks, layout), f"{official}, all images"
    curated = f"curated/{official}/Coco164kFull_Stuff_Coarse_7.txt"
    if (root / curated).exists():
        names = read_lines(root / curated, layout)
        files = [Files(n, images / f"{n}.jpg", masks / f"{n}.png") for n in names]
        rule = f"{official}, the images of {curated}"
    coarse = {value: i for i, values in enumerate(COCOSTUFF.values()) for value in values}
    table, rule = class_table({IGNORE: IGNORE} | coarse), f"{rule}; 27 coarse classes"
    return set_of_files("cocostuff", list(COCOSTUFF), table, files, layout, {"rule": rule})
