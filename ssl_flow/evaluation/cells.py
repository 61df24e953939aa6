"""Finished outcomes on the disk, so that a suite that was killed goes on where it was.

A cell is one protocol on one set with one encoder and one seed: FOLDER/PROTOCOL-KEY.npz (counts,
values, examples) and FOLDER/PROTOCOL-KEY.json (all else), which is written last: without it there
is no cell. KEY is a hash of everything that decides the outcome.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.flow.shard import write_atomically

_VERSION = 2  # of the files and of what is hashed
_HEIGHT = 240  # of the example images that are kept


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
        height, width = image.shape[:2]
        size = (round(width * _HEIGHT / height), _HEIGHT)
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        arrays[f"image {index}"] = cv2.imencode(".jpg", small[..., ::-1])[1]
        for name, labels in (("truth", truth), ("prediction", prediction)):
            arrays[f"{name} {index}"] = cv2.resize(
                labels.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST
            )
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path.with_suffix(".npz"), buffer.getvalue())
    rest = {
        "about": about,
        "scores": outcome.scores,
        "items": outcome.items,
        "per_class": outcome.per_class,
        "details": outcome.details,
    }
    write_atomically(path, json.dumps(rest, indent=1).encode())


def load_cell(path: Path) -> Outcome | None:
    """The outcome, or None when it is not there.

    Raises:
        ValueError: it is there and cannot be read.
    """
    if not path.exists():
        return None
    try:
        rest = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
            arrays = dict(file)
        examples = [
            (
                np.asarray(cv2.imdecode(arrays[f"image {i}"], cv2.IMREAD_COLOR))[..., ::-1],
                arrays[f"truth {i}"],
                arrays[f"prediction {i}"],
            )
            for i in range(sum(name.startswith("image ") for name in arrays))
        ]
        return Outcome(
            scores=rest["scores"],
            counts=arrays.get("counts"),
            values={k.removeprefix("value "): v for k, v in arrays.items() if k[:6] == "value "},
            items=rest["items"],
            per_class=rest["per_class"],
            details=rest["details"],
            examples=examples,
        )
    except Exception as error:  # whatever a damaged file makes of it
        raise ValueError(f"{path} cannot be read ({error}); delete it, and it is redone") from error
