"""The evaluation protocols by name, and the labelled data that each kind of them takes."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from ssl_flow.data.classification import open_classification
from ssl_flow.data.davis import open_videos
from ssl_flow.data.flow_pairs import open_flow_pairs
from ssl_flow.data.labelled import ItemSet
from ssl_flow.data.open_map import open_map_spec
from ssl_flow.data.segmentation import SegmentationSet, open_segmentation
from ssl_flow.evaluation.classification import Classification, run_classification
from ssl_flow.evaluation.clustering import Clustering, run_clustering
from ssl_flow.evaluation.correspondence import Correspondence, run_correspondence
from ssl_flow.evaluation.dense_knn import DenseKnn, run_dense_knn
from ssl_flow.evaluation.feature_cache import data_digest
from ssl_flow.evaluation.fine_tune import FineTune, run_fine_tune
from ssl_flow.evaluation.label_propagation import LabelPropagation, run_label_propagation
from ssl_flow.evaluation.linear_probe import LinearProbe, run_linear_probe
from ssl_flow.evaluation.linear_probe_bn import BnProbe
from ssl_flow.evaluation.linear_probe_plain import PlainProbe
from ssl_flow.evaluation.loc2vec import Loc2Vec, files_of, run_loc2vec
from ssl_flow.evaluation.outcome import Outcome, Settings
from ssl_flow.evaluation.segmentation_head import run_segmentation_head
from ssl_flow.models import Encoder


class Entry(NamedTuple):
    """A protocol of the suite."""

    settings: type[Settings]
    run: Callable[..., Outcome]
    kind: str = "segmentation"  # of the data: or videos, images, pairs, maps
    seeded: bool = True  # something in it is drawn; else one run says it all of one encoder
    cached: bool = False  # it can keep its features on the disk
    extra: bool = False  # needs scikit-learn and SciPy


PROTOCOLS = {
    entry.settings.name: entry
    for entry in (
        Entry(LinearProbe, run_linear_probe, cached=True),
        Entry(BnProbe, run_segmentation_head),
        Entry(PlainProbe, run_segmentation_head),
        Entry(DenseKnn, run_dense_knn),
        Entry(Clustering, run_clustering, extra=True),
        Entry(FineTune, run_fine_tune),
        Entry(LabelPropagation, run_label_propagation, "videos", seeded=False),
        Entry(Classification, run_classification, "images", seeded=False),
        Entry(Correspondence, run_correspondence, "pairs", seeded=False),
        Entry(Loc2Vec, run_loc2vec, "maps", seeded=False, extra=True),
    )
}
# What a spec must begin with; segmentation takes all but those that are no images with masks.
_PREFIXES = {
    "videos": ("davis", "davis2016"),
    "images": ("imagefolder",),
    "pairs": ("middlebury", "synthetic"),
    "maps": ("map",),
}


def fits(kind: str, spec: str) -> bool:
    """Whether protocols of a kind take this data."""
    prefix = spec.partition(":")[0]
    if kind == "segmentation":
        return prefix not in ("davis2016", "imagefolder", "middlebury", "map")
    return prefix in _PREFIXES[kind]


@dataclass(frozen=True, eq=False)
class Data:
    """One labelled set, opened for the protocols of one kind."""

    spec: str
    name: str
    kind: str
    sets: tuple[Any, ...]  # what the protocols of this kind take after the encoder
    shown: SegmentationSet  # the images that are scored; a mask of zeros where there is none
    seen: SegmentationSet  # the images that give a random encoder its BatchNorm statistics
    about: dict[str, Any]
    unit: str  # over what intervals are taken: images, sequences, pairs, blocks of a map
    digest: str

    def unit_of(self, item: str) -> str:
        """Scored items of the same name here belong together (frames or objects of a sequence)."""
        return item.rpartition("/")[0] if self.unit in ("sequences", "blocks") else item


def open_data(kind: str, spec: str) -> Data:
    """Open and check a labelled set; ValueError, FileNotFoundError as its adapter says."""
    sets: tuple[Any, ...]
    about: dict[str, Any]
    unit = {"segmentation": "images", "videos": "sequences", "maps": "blocks"}.get(kind, kind)
    if kind == "segmentation":
        sets = seen, shown = open_segmentation(spec, "train"), open_segmentation(spec, "test")
        unit = "sequences" if spec.startswith("davis:") else unit
        about = {"classes": shown.classes, "train": seen.protocol, "test": shown.protocol}
    elif kind == "images":
        train, test = sets = open_classification(spec, "train"), open_classification(spec, "test")
        seen, shown = _unlabelled(train), _unlabelled(test)
        about = {"train": train.protocol, "test": test.protocol}
    elif kind == "pairs":
        sets = (pairs,) = (open_flow_pairs(spec),)
        seen = shown = _unlabelled(pairs)
        about = {"test": pairs.protocol}
    elif kind == "videos":
        videos = open_videos(spec)
        sets, about = (videos.videos,), {"test": videos.protocol}
        frames = [(video, i) for video in videos.videos for i in range(len(video))]
        files = [path for video in videos.videos for path in (*video.files, *video.mask_files)]
        names = [video.names[i] for video, i in frames]
        load = lambda k: frames[k][0][frames[k][1]][:2]  # noqa: E731
        seen = shown = SegmentationSet(videos.name, [], names, load, files=files)
    else:
        tile_map = open_map_spec(spec)
        rule = "blocks of 8 x 8 tiles, 30 %, less a strip of 2 tiles; train: the other blocks"
        sets, about = (tile_map,), {"channels": tile_map.channels, "test": {"rule": rule}}
        name, files = tile_map.path.name, files_of(tile_map)
        seen = shown = SegmentationSet(name, tile_map.channels, [], lambda _: (), files=files)
    # Reads some images, which also says what is wrong with them before any work.
    parts = [kind, shown.classes, *(data_digest(part, masks=True) for part in (seen, shown))]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return Data(spec, shown.name, kind, sets, shown, seen, about, unit, digest)


def _unlabelled(found: ItemSet) -> SegmentationSet:
    """The (first) images of a set's items, with zeros for a mask."""

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        image = found[index][0]
        return image, np.zeros(image.shape[:2], np.uint8)

    return SegmentationSet(found.name, [], found.names, load, found.protocol, found.files)


def run_protocol(
    settings: Settings, encoder: Encoder, data: Data, seed: int, cache: Path | None = None
) -> Outcome:
    """Run one protocol on one encoder; `cache` is a folder for features, where it keeps any."""
    entry = PROTOCOLS[settings.name]
    options: dict[str, Any] = {"seed": seed} if entry.seeded else {}
    options |= {"cache": cache} if entry.cached else {}
    start = time.perf_counter()
    outcome = entry.run(encoder, *data.sets, protocol=settings, **options)
    numbers = [*outcome.scores.values(), *(value for x in outcome.values.values() for value in x)]
    if not np.isfinite(numbers).all():
        raise ValueError(f"a score is not finite: {outcome.scores}")
    outcome.details["seconds"] = round(time.perf_counter() - start, 1)
    return outcome


def check_installed(protocols: Iterable[str]) -> None:
    """ImportError when one of the protocols needs an extra that is not installed."""
    needing = [name for name in protocols if PROTOCOLS[name].extra]
    if needing and not all(find_spec(name) for name in ("sklearn", "scipy")):
        raise ImportError(
            f"{', '.join(needing)}: scikit-learn is missing, pip install 'ssl-flow[eval]' (or "
            "choose other protocols)"
        )


def parse_settings(protocols: Sequence[str], changes: Sequence[str]) -> dict[str, Settings]:
    """Protocol -> its settings, with changes such as `dense-knn.neighbours=20`.

    ValueError for an unknown protocol or setting; SystemExit by the parser for a wrong value.
    """
    for unknown in [name for name in protocols if name not in PROTOCOLS]:
        raise ValueError(f"unknown protocol {unknown!r}; known: {', '.join(PROTOCOLS)}")
    flags: dict[str, list[str]] = {name: [] for name in protocols}
    for change in changes:
        left, _, value = change.partition("=")
        name, _, key = left.partition(".")
        if name not in flags:
            raise ValueError(f"--set {change}: {name!r} is not among the protocols of this call")
        known = [f.name for f in fields(PROTOCOLS[name].settings)]
        if key not in known or not value:
            raise ValueError(f"--set {change}: write {name}.KEY=VALUE; keys: {', '.join(known)}")
        flags[name] += [f"--{key}", *shlex.split(value)]
    return {
        name: tyro.cli(PROTOCOLS[name].settings, args=words, prog=f"ssl-flow eval {name}")
        for name, words in flags.items()
    }
