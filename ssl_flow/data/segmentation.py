"""Labelled segmentation sets: one `SegmentationSet` for every `kind:PATH` spec.

    train = open_segmentation("camvid:data/camvid", "train")
    image, mask, name = train[0]          # (H, W, 3) uint8, (H, W) uint8 with 255 = ignore, str

An adapter checks the layout first and raises before any long work; nothing is ever downloaded.
"""

from __future__ import annotations

from pathlib import Path

from ssl_flow.data.benchmarks import ade20k, cityscapes, cocostuff, voc
from ssl_flow.data.davis import davis
from ssl_flow.data.folders import camvid, folder, synthetic
from ssl_flow.data.labelled import IGNORE, Labelled, SegmentationSet, Split, split_details

__all__ = ["IGNORE", "Labelled", "SegmentationSet", "Split", "open_segmentation"]

_KINDS = {
    "camvid": camvid,
    "voc": voc,
    "cityscapes": cityscapes,
    "ade20k": ade20k,
    "cocostuff": cocostuff,
    "davis": davis,
    "folder": folder,
    "synthetic": synthetic,
}


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
    opened.protocol |= split_details(spec, split, opened.names)
    return opened
