"""The pictures of a suite's report, as data URIs: predictions, hardest images, features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl_flow.evaluation import feature_pictures as features
from ssl_flow.evaluation.metrics import miou_of
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.pictures import data_uri, palette, strip, tile_of
from ssl_flow.evaluation.protocols import Data
from ssl_flow.evaluation.suite import Cell, Options, prepared
from ssl_flow.evaluation.suite_tables import pretty, short, smaller_is_better

Strips = list[tuple[str, str]]  # label, data URI


def _truths(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], colors: np.ndarray
) -> Strips:
    tile = tile_of(images[0])
    truth = data_uri(strip([colors[mask] for mask in masks], tile, True), True)
    return [("image", data_uri(strip(images, tile))), ("truth", truth)]


def predictions(data: Data, outcomes: dict[str, Outcome]) -> Strips:
    """Strips of images, truth, and what each encoder predicts."""
    shown = {label: o.examples for label, o in outcomes.items() if o.examples}
    if not shown:
        return []
    images, truths, _ = zip(*next(iter(shown.values())), strict=True)
    found = 1 + max(int(t[t != 255].max(initial=0)) for t in truths)
    colors, tile = palette(len(data.shown.classes) or found), tile_of(images[0])
    rows = _truths(images, truths, colors)
    for label, examples in shown.items():
        maps = [colors[np.where(truth == 255, 255, guess)] for _, truth, guess in examples]
        rows.append((label, data_uri(strip(maps, tile, True), True)))
    return rows


def hardest(
    table: dict[str, Any], data: Data, outcomes: dict[str, Outcome], count: int = 6
) -> dict[str, Any] | None:
    """The images that are worst in the mean over the encoders, at most one of a sequence."""
    score, columns = table["headline"], {}
    for label, outcome in outcomes.items():
        if outcome.counts is not None:
            columns[label] = miou_of(outcome.counts)
        elif score in outcome.values:
            columns[label] = outcome.values[score]
    if not columns:
        return None
    items = next(iter(outcomes.values())).items
    mean = np.mean(list(columns.values()), axis=0)
    order = np.argsort(-mean if smaller_is_better(score) else mean, kind="stable")
    chosen: dict[str, int] = {}
    for index in order[~np.isnan(mean[order])].tolist():
        chosen.setdefault(data.unit_of(items[index]), index)
    worst = list(chosen.values())[:count]
    names = data.shown.names
    examples = [data.shown[names.index(items[i])] for i in worst if items[i] in names]
    strips = []
    if examples:
        images, masks, _ = zip(*examples, strict=True)
        classes = len(data.shown.classes)
        strips = _truths(images, masks, palette(classes))[: 2 if classes else 1]
    return {
        "what": "images" if data.kind == "segmentation" else table["unit"],
        "score": pretty(score),
        "strips": strips,
        "heads": ["", *(items[i] for i in worst)],
        "rows": [[label, *(short(values[i]) for i in worst)] for label, values in columns.items()],
    }


def feature_strips(data: Data, cells: Sequence[Cell], options: Options) -> dict[str, Any]:
    """PCA and similarity of every encoder on the same images of a set."""
    images, masks = features.pick_images(data.shown, data.unit_of)
    marks, tile = features.mark_pixels(masks), tile_of(images[0])
    image = data_uri(strip(list(images), tile))
    height, width = images.shape[1:3]
    total = len(images) * (tile[1] + 4) - 4
    placed: list[dict[str, Any]] = [
        {"rows": [], "top": round(100 * row / height, 2),
         "left": round(100 * (index * (tile[1] + 4) + column / width * tile[1]) / total, 2)}
        for index, row, column in marks
    ]  # fmt: skip
    pca = [("image", image)]
    firsts: dict[str, Cell] = {}
    for cell in (cell for cell in cells if cell.data.spec == data.spec):
        firsts.setdefault(cell.label, cell)
    for label, cell in firsts.items():
        try:
            maps, stride = features.joint_maps(prepared(cell, options).eval(), images)
            pca.append((label, data_uri(strip(features.pca_tiles(maps, tile), tile))))
            for mark, place in zip(marks, placed, strict=True):
                tiles = features.similarity_tiles(maps, stride, mark, tile)
                place["rows"].append((label, data_uri(strip(tiles, tile))))
        except Exception as error:  # a picture must not cost the report
            pca.append((label, f"failed: {error}"))
    return {"name": data.name, "image": image, "pca": pca, "marks": placed}
