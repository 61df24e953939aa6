"""The pictures of a suite's report, as data URIs: predictions, hardest images, features."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from ssl_flow.evaluation import feature_pictures as features
from ssl_flow.evaluation.loc2vec import estimate_untrained, judged_tiles
from ssl_flow.evaluation.loc2vec_pictures import draw_pictures
from ssl_flow.evaluation.metrics import miou_of
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.pictures import palette
from ssl_flow.evaluation.protocols import Data
from ssl_flow.evaluation.suite import Cell, Options, prepared
from ssl_flow.evaluation.suite_tables import pretty, smaller_is_better

_HEIGHT = 150  # of a tile


def predictions(data: Data, outcomes: dict[str, Outcome]) -> list[tuple[str, str]]:
    """Strips of images, truth, and what each encoder predicts: (label, data URI)."""
    shown = {label: o.examples for label, o in outcomes.items() if o.examples}
    if not shown:
        return []
    first = next(iter(shown.values()))
    classes = len(data.shown.classes) or 1 + max(
        int(t[t != 255].max(initial=0)) for _, t, _ in first
    )
    colors = palette(classes)
    tile = _tile(first[0][0])
    rows = [("image", _uri(features.strip([image for image, _, _ in first], tile)))]
    rows += [("truth", _uri(features.strip([colors[t] for _, t, _ in first], tile, True), True))]
    for label, examples in shown.items():
        maps = [colors[np.where(truth == 255, 255, found)] for _, truth, found in examples]
        rows.append((label, _uri(features.strip(maps, tile, True), True)))
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
    order = np.argsort(mean if not smaller_is_better(score) else -mean, kind="stable")
    chosen: dict[str, int] = {}
    for index in order[~np.isnan(mean[order])].tolist():
        chosen.setdefault(data.unit_of(items[index]), index)
    worst = list(chosen.values())[:count]
    places = [data.shown.names.index(items[i]) for i in worst if items[i] in data.shown.names]
    strips = []
    if places:
        examples = [data.shown[place] for place in places]
        tile = _tile(examples[0].image)
        strips = [("image", _uri(features.strip([e.image for e in examples], tile)))]
        if data.shown.classes:
            colors = palette(len(data.shown.classes))
            truth = features.strip([colors[e.mask] for e in examples], tile, True)
            strips.append(("truth", _uri(truth, True)))
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
    marks, tile = features.mark_pixels(masks), _tile(images[0])
    image = _uri(features.strip(list(images), tile))
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
            maps, stride = features.joint_maps(prepared(cell, options), images)
            pca.append((label, _uri(features.strip(features.pca_tiles(maps, tile), tile))))
            for mark, place in zip(marks, placed, strict=True):
                tiles = features.similarity_tiles(maps, stride, mark, tile)
                place["rows"].append((label, _uri(features.strip(tiles, tile))))
        except Exception as error:  # a picture must not cost the report
            pca.append((label, f"failed: {error}"))
    return {"name": data.name, "image": image, "pca": pca, "marks": placed}


def map_sheets(
    data: Data, cells: Sequence[Cell], options: Options
) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each encoder of a map its pictures: (title, (caption, data URI)); also as files."""
    firsts: dict[str, Cell] = {}
    for cell in (cell for cell in cells if cell.data.spec == data.spec):
        firsts.setdefault(cell.label, cell)
    folder, sheets = options.out / "pictures", []
    folder.mkdir(exist_ok=True)
    for label, cell in firsts.items():
        shown = []
        try:
            train, judged, _ = judged_tiles(data.sets[0], cell.settings)
            encoder = prepared(cell, options)
            estimate_untrained(encoder, train.tiles)
            drawn = draw_pictures(encoder, data.sets[0], cell.settings, judged)
            for name, caption, picture in drawn:
                file = re.sub(r"[^\w.-]", "_", f"{data.name}_{label}_{name}.png")
                cv2.imwrite(str(folder / file), picture[..., ::-1])
                shown.append((caption, _uri(picture)))
        except Exception as error:  # a picture must not cost the report
            shown.append((f"failed: {error}", ""))
        sheets.append((f"{data.name}: {label}", shown))
    return sheets


def _tile(image: np.ndarray) -> tuple[int, int]:
    return _HEIGHT, round(_HEIGHT * image.shape[1] / image.shape[0])


def _uri(picture: np.ndarray, flat: bool = False) -> str:
    """A picture as a data URI: PNG for few flat colours, else JPEG."""
    kind, options = ("png", []) if flat else ("jpeg", [cv2.IMWRITE_JPEG_QUALITY, 88])
    data = cv2.imencode(f".{kind}", picture[..., ::-1], options)[1].tobytes()
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def short(value: float | None) -> str:
    """A number for a cell of a table."""
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"
