"""What a suite writes: results.json, results.csv, results.md, report.html."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import cv2
import numpy as np
import timm
import torch
from jinja2 import Environment

import ssl_flow
from ssl_flow.evaluation import feature_pictures as features
from ssl_flow.evaluation import suite_tables as text
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.pictures import palette
from ssl_flow.evaluation.protocols import Data
from ssl_flow.evaluation.suite import Cell, Options, prepared
from ssl_flow.evaluation.suite_page import PAGE
from ssl_flow.flow.shard import write_atomically

# Okabe & Ito, told apart with any colour vision.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888"]
_HEIGHT = 150  # of a tile


def write_results(
    cells: Sequence[Cell], options: Options, command: str
) -> tuple[dict[str, Any], str]:
    """Write the four files into the output folder; results.json and the Markdown as returned."""
    tables = text.tables(cells)
    results = {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "ssl_flow": ssl_flow.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "device": options.device,
        },
        "tables": tables,
    }
    markdown = text.as_markdown(tables)
    page = _page(cells, options, results)
    for name, content in {
        "results.json": json.dumps(results, indent=2) + "\n",
        "results.csv": text.as_csv(tables),
        "results.md": markdown + "\n",
        "report.html": page,
    }.items():
        write_atomically(options.out / name, content.encode(errors="replace"))
    return results, markdown


def _page(cells: Sequence[Cell], options: Options, results: dict[str, Any]) -> str:
    tables = results["tables"]
    labels = list(dict.fromkeys(cell.label for cell in cells))
    groups: dict[tuple[Data, str], dict[str, Cell]] = {}
    sets: dict[str, Data] = {}
    for cell in cells:  # the first run of each encoder is the one that is shown
        groups.setdefault((cell.data, cell.settings.name), {}).setdefault(cell.label, cell)
        sets.setdefault(cell.data.spec, cell.data)
    parts = [
        _section(table, data, {k: c.outcome for k, c in firsts.items() if c.outcome})
        for table, ((data, _), firsts) in zip(tables, groups.items(), strict=True)
    ]
    return Environment(autoescape=True, trim_blocks=True).from_string(PAGE).render(
        title=f"Transfer of {len(labels)} frozen encoder{'s' * (len(labels) > 1)}",
        summary=_summary(tables, labels),
        summary_text="The headline of each table below, bold in its own table where it is the "
        "best; brackets: 95 % bootstrap interval.",
        failures=[f"{c.data.name}, {c.settings.name}, {c.label} ({c.spec}, seed {c.seed}): "
                  f"{c.error}" for c in cells if c.error],
        tables=parts,
        pictures=[_features(data, cells, options) for data in sets.values()],
        command=results["command"],
        date=results["date"],
        versions=", ".join(f"{k} {v}" for k, v in results["versions"].items()),
        encoders=(["encoder", "weights from", "seed", "SHA-256"], _unique(
            [c.label, c.spec, str(c.seed), c.about["encoder"][:16]] for c in cells)),
        data_sets=(["data", "from", "SHA-256"], _unique(
            [c.data.name, c.data.spec, c.data.digest[:16]] for c in cells)),
    )  # fmt: skip


def _unique(rows: Any) -> list[list[str]]:  # noqa: ANN401 (an iterable of rows)
    return [list(row) for row in dict.fromkeys(tuple(row) for row in rows)]


def _summary(tables: Sequence[dict[str, Any]], labels: Sequence[str]) -> tuple[list[str], Any]:
    heads = [f"{t['data']}, {t['protocol']['name']}: {text.pretty(t['headline'])}" for t in tables]
    rows = []
    for label in labels:
        found = [next((r for r in t["rows"] if r["encoder"] == label), {}) for t in tables]
        rows.append([label] + [
            text.number(row["scores"][table["headline"]] | {"std": None}) if row.get("scores")
            else "-" for row, table in zip(found, tables, strict=True)
        ])  # fmt: skip
    return ["encoder", *heads], rows


def _section(table: dict[str, Any], data: Data, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    heads, rows = text.cells_of(table)
    classes = list(next(iter(outcomes.values())).per_class) if outcomes else []
    return {
        "title": f"{table['data']}: {table['protocol']['name']}",
        "heads": heads,
        "rows": rows,
        "verdict": text.verdict(table),
        "settings": text.settings_text(table),
        "split": text.split_text(table),
        "note": text.NOTE.format(**table),
        "bars": _bars(table),
        "per_class": (
            ["class", *(row["encoder"] for row in table["rows"])],
            [[name] + [_short(row["per_class"].get(name)) for row in table["rows"]]
             for name in classes],
        ) if classes else None,
        "strips": _predictions(data, outcomes),
        "legend": [(name, "rgb({}, {}, {})".format(*color)) for name, color in
                   zip(classes, palette(len(classes)), strict=False)] if len(classes) <= 40 else [],
        "hardest": _hardest(table, data, outcomes),
    }  # fmt: skip


def _bars(table: dict[str, Any]) -> dict[str, Any]:
    """Places of everything in the bar plot, in its pixels."""
    scored = [(i, r["encoder"], r["scores"][table["headline"]])
              for i, r in enumerate(table["rows"]) if r["scores"]]  # fmt: skip
    top = max((max(s["high"] or 0, *s["seeds"], 1e-9) for _, _, s in scored), default=1.0)
    step = next(s for s in (f * 10.0**e for e in range(-9, 9) for f in (1, 2, 5)) if top / s <= 6)
    left, width = 230, 760

    def x(value: float) -> float:
        return round(left + max(value, 0) / top * (width - left - 30), 1)

    rows = [
        {"label": label, "y": 20 + 26 * n, "length": x(s["value"]) - left,
         "color": _COLORS[i % len(_COLORS)], "low": s["low"] and x(s["low"]),
         "high": s["high"] and x(s["high"]),
         "seeds": [x(v) for v in s["seeds"]] if len(s["seeds"]) > 1 else []}
        for n, (i, label, s) in enumerate(scored)
    ]  # fmt: skip
    ticks = [{"x": x(k * step), "text": f"{k * step:g}"} for k in range(int(top / step) + 1)]
    bottom = 12 + 26 * len(rows)
    return {"rows": rows, "ticks": ticks, "left": left, "width": width, "bottom": bottom,
            "height": bottom + 36, "name": text.pretty(table["headline"])}  # fmt: skip


def _predictions(data: Data, outcomes: dict[str, Outcome]) -> list[tuple[str, str]]:
    shown = {label: o.examples for label, o in outcomes.items() if o.examples}
    if not shown:
        return []
    first = next(iter(shown.values()))
    classes = len(data.shown.classes) or 1 + max(int(t[t != 255].max(initial=0)) for _, t, _ in first)
    colors = palette(classes)
    tile = _tile(first[0][0])
    rows = [("image", _uri(features.strip([image for image, _, _ in first], tile)))]
    rows += [("truth", _uri(features.strip([colors[t] for _, t, _ in first], tile, True), True))]
    for label, examples in shown.items():
        maps = [colors[np.where(truth == 255, 255, found)] for _, truth, found in examples]
        rows.append((label, _uri(features.strip(maps, tile, True), True)))
    return rows


def _hardest(
    table: dict[str, Any], data: Data, outcomes: dict[str, Outcome], count: int = 6
) -> dict[str, Any] | None:
    """The images that are worst in the mean over the encoders, at most one of a sequence."""
    score, columns = table["headline"], {}
    for label, outcome in outcomes.items():
        if outcome.counts is not None:
            columns[label] = _miou_of_each(outcome.counts)
        elif score in outcome.values:
            columns[label] = outcome.values[score]
    if not columns:
        return None
    items = next(iter(outcomes.values())).items
    mean = np.mean(list(columns.values()), axis=0)
    order = np.argsort(mean if not text.smaller_is_better(score) else -mean, kind="stable")
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
        "score": text.pretty(score),
        "strips": strips,
        "heads": ["", *(items[i] for i in worst)],
        "rows": [[label, *(_short(values[i]) for i in worst)] for label, values in columns.items()],
    }


def _miou_of_each(counts: np.ndarray) -> np.ndarray:
    """(N, K, K) -> (N,) the mIoU of each image; nan where every label is ignored."""
    hits = np.diagonal(counts, axis1=1, axis2=2).astype(float)
    union = counts.sum(1) + counts.sum(2) - hits
    iou = np.divide(hits, union, out=np.zeros_like(hits), where=union > 0)
    with np.errstate(invalid="ignore"):
        return np.asarray(iou.sum(1) / (union > 0).sum(1))


def _features(data: Data, cells: Sequence[Cell], options: Options) -> dict[str, Any]:
    """PCA and similarity of every encoder on the same images of a set."""
    images, masks = features.pick_images(data.shown, data.unit_of)
    marks, tile = features.mark_pixels(masks), _tile(images[0])
    image = _uri(features.strip(list(images), tile))
    height, width = images.shape[1:3]
    total = len(images) * (tile[1] + 4) - 4
    placed: list[dict[str, Any]] = [
        {"number": n, "rows": [], "top": round(100 * row / height, 2),
         "left": round(100 * (index * (tile[1] + 4) + column / width * tile[1]) / total, 2)}
        for n, (index, row, column) in enumerate(marks, start=1)
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


def _tile(image: np.ndarray) -> tuple[int, int]:
    return _HEIGHT, round(_HEIGHT * image.shape[1] / image.shape[0])


def _uri(picture: np.ndarray, flat: bool = False) -> str:
    """A picture as a data URI: PNG for few flat colours, else JPEG."""
    kind, options = ("png", []) if flat else ("jpeg", [cv2.IMWRITE_JPEG_QUALITY, 88])
    data = cv2.imencode(f".{kind}", picture[..., ::-1], options)[1].tobytes()
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def _short(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"
