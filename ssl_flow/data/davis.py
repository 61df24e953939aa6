"""DAVIS as images (foreground / background) and as videos (one mask per object, for propagation).

    for video in open_videos("davis:data/DAVIS").videos:
        image, mask, name = video[0]      # (H, W, 3), (H, W) with 0 = background, 1..video.objects

Layouts: the official one (JPEGImages/480p, Annotations/480p, and ImageSets/YEAR/{train,val}.txt or,
in the 2016 release, ImageSets/480p), or frames/SEQUENCE/N.jpg with masks/SEQUENCE/N.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_flow.data.labelled import (
    IGNORE,
    Files,
    SegmentationSet,
    Split,
    class_table,
    paired,
    parse_spec,
    read_lines,
    read_mask,
    require,
    set_of_files,
)

_LAYOUT = (
    "davis: the official JPEGImages/480p, Annotations/480p, ImageSets/{2017,2016,480p}/"
    "{train,val}.txt, or frames/SEQUENCE/N.jpg, masks/SEQUENCE/N.png"
)
# Any non-zero value is foreground: object indices, or 255 as in the masks of 2016.
_FOREGROUND = class_table({0: 0} | dict.fromkeys(range(1, 256), 1))


@dataclass
class Video(SegmentationSet):
    """A sequence with a mask on every frame: 0 = background, 1..objects."""

    objects: int = 0  # those of the first mask: what is to be followed


@dataclass(frozen=True)
class VideoSet:
    """One split of a set of labelled videos."""

    name: str
    videos: list[Video]
    protocol: dict[str, Any]  # how the split was made, which sequences


def davis(root: Path, split: Split) -> SegmentationSet:
    """Foreground / background. The official split, or every third sequence is for the test."""
    sequences, rule, _ = _sequences(root, split, ("480p", "2016", "2017"))
    files = [file for part in sequences.values() for file in part]
    protocol = {"rule": rule, "sequences": list(sequences)}
    classes = ["background", "foreground"]
    return set_of_files("davis", classes, _FOREGROUND, files, _LAYOUT, protocol)


def open_videos(spec: str, split: Split = "test") -> VideoSet:
    """Open labelled videos.

    Args:
        spec: `davis:PATH`, with the objects of DAVIS 2017 (Pont-Tuset et al., 2017) where its list
            or frames/ and masks/ are there, or `davis2016:PATH`, with all that is not background
            as one object (Perazzi et al., CVPR 2016).
        split: `train` or `test` (the official val).

    As in the official evaluation the objects are those of the first mask; other values, and 255
    (void), are background.

    Raises:
        ValueError: unknown kind, an empty split, a first mask without an object.
        FileNotFoundError: something of the layout is missing; the message names it.
    """
    kind, root = parse_spec(spec, "videos", ("davis:PATH", "davis2016:PATH"), split)
    lists = ("480p", "2016") if kind == "davis2016" else ("2017", "480p", "2016")
    sequences, rule, used = _sequences(root, split, lists)
    merged = kind == "davis2016" or used in ("480p", "2016")
    videos = [_video(name, files, merged) for name, files in sequences.items()]
    if not videos:
        raise ValueError(f"{spec}: the {split} split is empty ({rule})")
    rule += "; foreground as one object" if merged else "; the objects of the first mask"
    protocol = {
        "rule": rule,
        "spec": spec,
        "split": split,
        "sequences": list(sequences),
        "objects": sum(video.objects for video in videos),
        "frames": sum(len(video) for video in videos),
    }
    return VideoSet("davis2016" if merged else "davis", videos, protocol)


def _video(name: str, files: list[Files], merged: bool) -> Video:
    if not files:
        raise ValueError(f"the sequence {name} has no frames")
    first = read_mask(files[0].mask)
    found = [1] if merged and first.any() else sorted(set(np.unique(first).tolist()) - {0, IGNORE})
    if not found:
        raise ValueError(
            f"{files[0].mask}: the first mask has no object (0 is background, 255 is void; "
            "davis2016:PATH takes every non-zero value as the object)"
        )
    table = np.zeros(256, np.int16)
    table[found] = range(1, len(found) + 1)
    frames = set_of_files(name, [], _FOREGROUND if merged else table, files, _LAYOUT, {})
    return Video(**vars(frames), objects=len(found))


def _sequences(
    root: Path, split: Split, lists: Sequence[str]
) -> tuple[dict[str, list[Files]], str, str | None]:
    """Files of each sequence (named SEQUENCE/FRAME), the split's rule, and the list that was used.

    The first of `lists` that exists decides; without any, `frames/` and `masks/` must be there.
    """
    official = {"train": "train", "test": "val"}[split]
    used = next((n for n in lists if (root / f"ImageSets/{n}/{official}.txt").exists()), None)
    images, masks = ("JPEGImages/480p", "Annotations/480p") if used else ("frames", "masks")
    require(_LAYOUT, root / images, root / masks)
    if used:
        # A line is "/JPEGImages/480p/bear/00000.jpg /Annotations/..." (2016) or "bear" (2017).
        lines = read_lines(root / f"ImageSets/{used}/{official}.txt", _LAYOUT)
        names = sorted({Path(x).parent.name if "/" in x else x for x in lines})
        rule = f"the official list ImageSets/{used}/{official}.txt"
    else:
        every = sorted(p.name for p in (root / images).iterdir() if p.is_dir())
        names = [s for i, s in enumerate(every) if (i % 3 == 1) == (split == "test")]
        rule = "sequences sorted by name, index % 3 == 1 is test, the others are train"
    found = {name: paired(root / images / name, root / masks / name, _LAYOUT) for name in names}
    for name, files in found.items():
        found[name] = [f._replace(name=f"{name}/{f.name}") for f in files]
    return found, rule, used
