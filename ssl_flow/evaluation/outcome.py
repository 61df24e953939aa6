"""What every protocol takes and returns, and how finished outcomes are kept on the disk.

A protocol is a dataclass of `Settings` and one function of a frozen encoder of any origin (it needs
`features`, `channels`, `strides`, `normalize`; `embed` where there is an embedding), the labelled
data, the settings (by default the protocol's own) and, where something is drawn, a seed:

    run_dense_knn(encoder, train_set, test_set, DenseKnn(neighbours=20), seed=0) -> Outcome

The encoder stays as it is. All raise ValueError, with the name of the image, set or setting, for
features that the encoder has not, that are not finite or do not fit their stride, for splits of
different classes, and for masks without labels.

A cell is one outcome on the disk: FOLDER/PROTOCOL-KEY.npz (counts, values, examples) and .json (all
else), which is written last. KEY is a hash of all that decides it.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import cv2
import numpy as np

from ssl_flow.flow.shard import write_atomically

_VERSION = 2  # of the files and of what is hashed
_HEIGHT = 240  # of the example images that are kept


@dataclass(frozen=True)
class Settings:
    """A protocol; printed with every result and stored beside it."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    may_be_zero: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """ValueError for a number that is not more than 0 (or, of a few, less), an unknown word."""
        for key, hint in get_type_hints(type(self)).items():
            value = getattr(self, key)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"{key} = {value!r}, expected {' or '.join(get_args(hint))}")
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if not (value > 0 or (value == 0 and key in self.may_be_zero)):
                least = "0 or more" if key in self.may_be_zero else "more than 0"
                raise ValueError(f"{key} = {value}, expected {least}")

    def describe(self) -> dict[str, Any]:
        """Name, version and all settings, for JSON."""
        return {"name": self.name, "version": self.version, **asdict(self)}


@dataclass
class Outcome:
    """Scores of one encoder on one set with one seed."""

    scores: dict[str, float]
    """Name -> value, the headline first, as a fraction or, where the name says so, in pixels."""
    counts: np.ndarray | None = None
    """(N, 3, K) of each test image: pixels of each class that are right, of the truth, of the
    prediction, for intervals of mIoU; (N, R, 3, K) where mIoU is the mean over R runs."""
    values: dict[str, np.ndarray] = field(default_factory=dict)
    """Score -> (N,) its value for each test image, where the score is their mean: intervals."""
    items: list[str] = field(default_factory=list)
    """N names of the test images (or sequences) in the order of `counts` and `values`."""
    per_class: dict[str, float | None] = field(default_factory=dict)
    """Class -> its score; None: in no truth and no prediction."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else a reader needs, as JSON: seed, features a pixel, memory size."""
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(
        default_factory=list, repr=False
    )
    """(image, truth, prediction) of a few test images; class indices, 255 = ignore."""

    def as_dict(self) -> dict[str, Any]:
        """Scores, scores of the classes and details, for JSON."""
        return self.scores | {"per_class": self.per_class} | self.details


def cell_path(folder: Path, about: dict[str, Any]) -> Path:
    """Where the outcome lies (.json) that `about`, all that decides it, leads to."""
    text = json.dumps({"cell": _VERSION, **about}, sort_keys=True)
    name = about["protocol"]["name"]
    return folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def save_cell(path: Path, outcome: Outcome, about: dict[str, Any]) -> None:
    """Write an outcome; examples shrunk to 240 rows, their images as JPEG."""
    arrays = {f"value {name}": values for name, values in outcome.values.items()}
    if outcome.counts is not None:
        arrays["counts"] = outcome.counts.astype(np.uint32)
    for index, (image, truth, prediction) in enumerate(outcome.examples):
        size = (round(image.shape[1] * _HEIGHT / len(image)), _HEIGHT)
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        arrays[f"image {index}"] = cv2.imencode(".jpg", small[..., ::-1])[1]
        for name, labels in (("truth", truth), ("prediction", prediction)):
            labels = labels.astype(np.uint8)
            arrays[f"{name} {index}"] = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path.with_suffix(".npz"), buffer.getvalue())
    rest = {key: getattr(outcome, key) for key in ("scores", "items", "per_class", "details")}
    write_atomically(path, json.dumps({"about": about} | rest, indent=1).encode())


def load_cell(path: Path) -> Outcome | None:
    """The outcome, or None when it is not there; ValueError when it cannot be read."""
    if not path.exists():
        return None
    try:
        rest = json.loads(path.read_text())
        del rest["about"]
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
            arrays = dict(file)
        examples = []
        for i in range(sum(name.startswith("image ") for name in arrays)):
            image = np.asarray(cv2.imdecode(arrays[f"image {i}"], cv2.IMREAD_COLOR))[..., ::-1]
            examples.append((image, arrays[f"truth {i}"], arrays[f"prediction {i}"]))
        values = {k.removeprefix("value "): v for k, v in arrays.items() if k[:6] == "value "}
        return Outcome(counts=arrays.get("counts"), values=values, examples=examples, **rest)
    except Exception as error:  # whatever a damaged file makes of it
        raise ValueError(f"{path} cannot be read ({error}); delete it, and it is redone") from error
