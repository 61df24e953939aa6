"""The field's segmentation benchmarks in their official layouts; nothing is ever downloaded."""

from __future__ import annotations

from pathlib import Path

from ssl_flow.data.benchmark_classes import ADE20K, CITYSCAPES, COCOSTUFF, VOC
from ssl_flow.data.labelled import (
    IGNORE,
    Files,
    SegmentationSet,
    Split,
    class_table,
    existing,
    paired,
    read_lines,
    require,
    set_of_files,
)


def voc(root: Path, split: Split) -> SegmentationSet:
    """PASCAL VOC 2012 (Everingham et al., 2010): 21 classes with background, 255 = border.

    Where SegmentationClassAug/ and trainaug.txt are (the annotations of Hariharan et al., ICCV
    2011), they are the train split; the test split is always the official val.
    """
    lists = root / "ImageSets/Segmentation"
    layout = (
        "voc: the folder VOC2012 with JPEGImages/NAME.jpg, SegmentationClass/NAME.png, "
        "ImageSets/Segmentation/{train,val}.txt (optional: SegmentationClassAug, trainaug.txt)"
    )
    for needed in ("JPEGImages", "SegmentationClass"):
        require(root / needed, layout)
    augmented = (root / "SegmentationClassAug").is_dir() and (lists / "trainaug.txt").exists()
    listing, masks = {"train": "train.txt", "test": "val.txt"}[split], "SegmentationClass"
    if split == "train" and augmented:
        listing, masks = "trainaug.txt", "SegmentationClassAug"
    # A line is NAME, or in some lists "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png".
    lines = read_lines(lists / listing, layout)
    names = [Path(s).stem if s.endswith(".jpg") else s for s in (ln.split()[0] for ln in lines)]
    files = [Files(n, root / f"JPEGImages/{n}.jpg", root / masks / f"{n}.png") for n in names]
    table = class_table({IGNORE: IGNORE} | {i: i for i in range(len(VOC))})
    rule = f"ImageSets/Segmentation/{listing} with the masks of {masks}/"
    return set_of_files("voc", VOC, table, existing(files, layout), {"rule": rule})


def cityscapes(root: Path, split: Split) -> SegmentationSet:
    """Cityscapes, fine annotations (Cordts et al., CVPR 2016): the 19 classes of its benchmark."""
    official = {"train": "train", "test": "val"}[split]
    images, masks = root / "leftImg8bit" / official, root / "gtFine" / official
    layout = (
        "cityscapes: leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png, "
        "gtFine/{train,val}/CITY/NAME_gtFine_{labelTrainIds or labelIds}.png"
    )
    for needed in (images, masks):
        require(needed, layout)
    kind = "labelTrainIds" if any(masks.glob("*/*_gtFine_labelTrainIds.png")) else "labelIds"
    files = []
    for image in sorted(images.glob("*/*_leftImg8bit.png")):
        city, name = image.parent.name, image.name.removesuffix("_leftImg8bit.png")
        files.append(Files(f"{city}/{name}", image, masks / city / f"{name}_gtFine_{kind}.png"))
    if kind == "labelTrainIds":
        values = {IGNORE: IGNORE} | {i: i for i in range(len(CITYSCAPES))}
    else:  # 34 labels, of which the benchmark scores 19
        values = {i: IGNORE for i in range(34)}
        values |= {label: i for i, label in enumerate(CITYSCAPES.values())}
    rule = f"leftImg8bit/{official} with gtFine/{official} ({kind})"
    return set_of_files(
        "cityscapes",
        list(CITYSCAPES),
        class_table(values),
        existing(files, layout),
        {"rule": rule},
    )


def ade20k(root: Path, split: Split) -> SegmentationSet:
    """ADE20K, the scene parsing benchmark (Zhou et al., CVPR 2017): 150 classes, 0 = ignore."""
    official = {"train": "training", "test": "validation"}[split]
    layout = (
        "ade20k: the folder ADEChallengeData2016 with images/{training,validation}/NAME.jpg, "
        "annotations/{training,validation}/NAME.png"
    )
    files = paired(root / "images" / official, root / "annotations" / official, layout)
    table = class_table({0: IGNORE} | {i + 1: i for i in range(len(ADE20K))})
    return set_of_files("ade20k", ADE20K, table, files, {"rule": f"the folder {official}/"})


def cocostuff(root: Path, split: Split) -> SegmentationSet:
    """COCO-Stuff (Caesar et al., CVPR 2018) with its 27 coarse classes, as IIC, PiCIE and STEGO.

    With their list curated/{train,val}2017/Coco164kFull_Stuff_Coarse_7.txt only its images are
    used, otherwise all: the rule in `protocol` says which. The images are whole, not cropped.
    """
    official = {"train": "train2017", "test": "val2017"}[split]
    layout = (
        "cocostuff: {images/ or here}/{train,val}2017/NAME.jpg, {annotations, stuffthingmaps, "
        "stuffthingmaps_trainval2017}/{train,val}2017/NAME.png (the pixel maps, 0-181 and 255)"
    )
    image_folders = [root / "images" / official, root / official]
    mask_folders = [
        root / name / official
        for name in ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017")
    ]
    images = next((f for f in image_folders if f.is_dir()), image_folders[0])
    masks = next((f for f in mask_folders if f.is_dir()), mask_folders[0])
    for needed in (images, masks):
        require(needed, layout)
    curated = f"curated/{official}/Coco164kFull_Stuff_Coarse_7.txt"
    if (root / curated).exists():
        names = read_lines(root / curated, layout)
        files = [Files(n, images / f"{n}.jpg", masks / f"{n}.png") for n in names]
        files, rule = existing(files, layout), f"{official}, the images of {curated}"
    else:
        files, rule = paired(images, masks, layout), f"{official}, all images"
    table = class_table(
        {IGNORE: IGNORE}
        | {value: i for i, values in enumerate(COCOSTUFF.values()) for value in values}
    )
    rule += "; 27 coarse classes"
    return set_of_files("cocostuff", list(COCOSTUFF), table, files, {"rule": rule})
