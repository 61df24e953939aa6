"""The evaluation protocols by name, and the labelled data that each kind of them takes."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from ssl_flow.data.classification import ClassificationSet, open_classification
from ssl_flow.data.davis import open_videos
from ssl_flow.data.flow_pairs import open_flow_pairs
from ssl_flow.data.segmentation import SegmentationSet, open_segmentation
from ssl_flow.evaluation.classification import Classification, run_classification
from ssl_flow.evaluation.clustering import Clustering, run_clustering
from ssl_flow.evaluation.correspondence import Correspondence, run_correspondence
from ssl_flow.evaluation.dense_knn import DenseKnn, run_dense_knn
from ssl_flow.evaluation.fine_tune import FineTune, run_fine_tune
from ssl_flow.evaluation.label_propagation import LabelPropagation, run_label_propagation
from ssl_flow.evaluation.linear_probe import LinearProbe, run_linear_probe
from ssl_flow.evaluation.linear_probe_bn import BnProbe
from ssl_flow.evaluation.linear_probe_plain import PlainProbe
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.segmentation_head import run_segmentation_head


@dataclass(frozen=True)
class Entry:
    """A protocol of the suite."""

    settings: type[Any]
    run: Callable[..., Outcome]
    kind: str = "segmentation"
    """Of the data: segmentation, videos, images, pairs."""
    seeded: bool = True
    """Whether something in it is drawn. If not, one run says it all, but for random encoders."""
    cached: bool = False
    """Whether it can keep its features on the disk."""


PROTOCOLS = {
    entry.settings.name: entry
    for entry in (
        Entry(LinearProbe, run_linear_probe, cached=True),
        Entry(BnProbe, run_segmentation_head),
        Entry(PlainProbe, run_segmentation_head),
        Entry(DenseKnn, run_dense_knn),
        Entry(Clustering, run_clustering),
        Entry(FineTune, run_fine_tune),
        Entry(LabelPropagation, run_label_propagation, "videos", seeded=False),
        Entry(Classification, run_classification, "images", seeded=False),
        Entry(Correspondence, run_correspondence, "pairs", seeded=False),
    )
}
# What a spec must begin with; segmentation takes all that no other kind has for itself.
_PREFIXES = {
    "videos": ("davis", "davis2016"),
    "images": ("imagefolder",),
    "pairs": ("middlebury", "synthetic"),
}


@dataclass(frozen=True, eq=False)
class Data:
    """One labelled set, opened for the protocols of one kind."""

    spec: str
    name: str
    kind: str
    sets: tuple[Any, ...]
    """What the protocols of this kind take after the encoder."""
    shown: SegmentationSet
    """The images that are scored, for pictures; a mask of zeros where there is none."""
    seen: SegmentationSet
    """The images that give a random encoder its BatchNorm statistics."""
    about: dict[str, Any]
    unit: str
    """Over what intervals are taken: images, sequences, pairs."""
    digest: str

    def unit_of(self, item: str) -> str:
        """Scored items of the same name here belong together (frames or objects of a sequence)."""
        return item.rpartition("/")[0] if self.unit == "sequences" else item


def fits(kind: str, spec: str) -> bool:
    """Whether protocols of a kind take this data."""
    prefix = spec.partition(":")[0]
    if kind == "segmentation":
        return prefix not in ("davis2016", "imagefolder", "middlebury")
    return prefix in _PREFIXES[kind]


def open_data(kind: str, spec: str) -> Data:
    """Open and check a labelled set.

    Raises:
        ValueError, FileNotFoundError: as its adapter says.
    """
    if kind == "segmentation":
        train, test = open_segmentation(spec, "train"), open_segmentation(spec, "test")
        unit = "sequences" if spec.startswith("davis:") else "images"
        about = {"classes": test.classes, "train": train.protocol, "test": test.protocol}
        files = [p for part in (train, test) for p in (*part.files, *part.mask_files)]
        return _data(spec, kind, (train, test), test, train, about, unit, files)
    if kind == "videos":
        videos = open_videos(spec)
        frames = [(video, i) for video in videos.videos for i in range(len(video))]
        files = [p for video in videos.videos for p in (*video.files, *video.mask_files)]
        names = [name for video in videos.videos for name in video.names]
        shown = _images(videos.name, names, lambda k: frames[k][0][frames[k][1]][:2])
        about = {"test": videos.protocol}
        return _data(spec, kind, (videos.videos,), shown, shown, about, "sequences", files)
    if kind == "images":
        sets = open_classification(spec, "train"), open_classification(spec, "test")
        seen, shown = (_images(s.name, s.names, partial(_image_of, s)) for s in sets)
        about = {"train": sets[0].protocol, "test": sets[1].protocol}
        files = [*sets[0].files, *sets[1].files]
        return _data(spec, kind, sets, shown, seen, about, "images", files)
    pairs = open_flow_pairs(spec)
    shown = _images(pairs.name, pairs.names, lambda k: pairs[k][:1])
    return _data(spec, kind, (pairs,), shown, shown, {"test": pairs.protocol}, "pairs", [])


def run_protocol(
    settings: Any,  # noqa: ANN401 (a protocol's dataclass)
    encoder: Any,  # noqa: ANN401
    data: Data,
    seed: int,
    cache: Path | None = None,
    progress: bool = False,
) -> Outcome:
    """Run one protocol on one encoder; `cache` is a folder for features, where it keeps any."""
    entry = PROTOCOLS[settings.name]
    options: dict[str, Any] = {"seed": seed} if entry.seeded else {}
    if data.kind in ("segmentation", "videos"):
        options["examples"] = 6
    if entry.cached:
        options["cache"] = cache
    return entry.run(encoder, *data.sets, protocol=settings, progress=progress, **options)


def parse_settings(protocols: Sequence[str], changes: Sequence[str]) -> dict[str, Any]:
    """Protocol -> its settings, with changes such as `dense-knn.neighbours=20`.

    Raises:
        ValueError: an unknown protocol or setting.
        SystemExit: a value that does not fit, told by the parser.
    """
    flags: dict[str, list[str]] = {name: [] for name in protocols}
    for unknown in [name for name in protocols if name not in PROTOCOLS]:
        raise ValueError(f"unknown protocol {unknown!r}; known: {', '.join(PROTOCOLS)}")
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
        name: tyro.cli(PROTOCOLS[name].settings, args=words, prog=f"--set {name}")
        for name, words in flags.items()
    }


def describe(settings: Any) -> dict[str, Any]:  # noqa: ANN401
    """A protocol's name, version and all its settings, for JSON."""
    return {"name": settings.name, "version": settings.version, **asdict(settings)}


def _images(name: str, names: list[str], load: Callable[[int], Any]) -> SegmentationSet:
    """Images as a labelled set; the mask is zero where `load` gives none."""

    def labelled(index: int) -> tuple[np.ndarray, np.ndarray]:
        image, *mask = load(index)
        return image, mask[0] if mask else np.zeros(image.shape[:2], np.uint8)

    return SegmentationSet(name, [], names, labelled)


def _image_of(dataset: ClassificationSet, index: int) -> tuple[np.ndarray]:
    return (dataset[index].image,)


def _data(
    spec: str,
    kind: str,
    sets: tuple[Any, ...],
    shown: SegmentationSet,
    seen: SegmentationSet,
    about: dict[str, Any],
    unit: str,
    files: Sequence[Path],
) -> Data:
    """The set with its digest: names, sizes and times of files, pixels where there are no files."""
    digest = hashlib.sha256(repr((kind, seen.names, shown.names, shown.classes)).encode())
    for file in files:
        status = Path(file).stat()
        digest.update(f"{Path(file).name} {status.st_size} {status.st_mtime_ns} ".encode())
    for index in sorted({0, len(shown) // 2, len(shown) - 1}):
        item = shown[index]  # also says what is wrong with it before any work
        digest.update(item.image.tobytes() + item.mask.tobytes())
    return Data(spec, shown.name, kind, sets, shown, seen, about, unit, digest.hexdigest())
