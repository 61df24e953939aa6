"""What a suite writes: results.json, results.csv, results.md, report.html."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import timm
import torch
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

import ssl_flow
from ssl_flow.evaluation import suite_tables as text
from ssl_flow.evaluation.curves import COLORS
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.pictures import data_uri, palette
from ssl_flow.evaluation.protocols import Data
from ssl_flow.evaluation.suite import Cell, Options
from ssl_flow.evaluation.suite_page import PAGE
from ssl_flow.evaluation.suite_pictures import (
    feature_strips,
    hardest,
    map_sheets,
    predictions,
)
from ssl_flow.flow.shard import write_atomically
from ssl_flow.models import pick_device


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
            "device": str(pick_device(options.device)),
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
    tables, bold = results["tables"], Markup("<b>{}</b>").format
    labels = list(dict.fromkeys(cell.label for cell in cells))
    groups: dict[tuple[Data, str], dict[str, Outcome | None]] = {}
    for cell in cells:  # the first run of each encoder is the one that is shown
        group = groups.setdefault((cell.data, cell.settings.name), {})
        group.setdefault(cell.label, cell.outcome)
    summary, sections = [], []
    for table, ((data, name), firsts) in zip(tables, groups.items(), strict=True):
        outcomes = {label: outcome for label, outcome in firsts.items() if outcome}
        headline, rows = table["headline"], table["rows"]
        found = {}
        for row in rows:
            score = row["scores"].get(headline)
            shown = text.number(score | {"std": None}) if score else "-"
            found[row["encoder"]] = bold(shown) if row["best"] else shown
        line = [table["data"], name, text.pretty(headline)]
        summary.append([*line, *(found.get(label, "-") for label in labels)])
        classes = list(next(iter(outcomes.values())).per_class) if outcomes else []
        legend = zip(classes, palette(len(classes)).tolist(), strict=False)
        sections.append({
            "title": f"{table['data']}: {name}",
            "grid": text.cells_of(table, bold),
            "verdict": text.verdict(table),
            "settings": text.settings_text(table),
            "split": text.split_text(table),
            "bars": _bars(table),
            "per_class": (
                ["class", *found],
                [[k, *(text.short(row["per_class"].get(k)) for row in rows)] for k in classes],
            ),
            "strips": predictions(data, outcomes),
            "legend": list(legend) if len(classes) <= 40 else [],
            "hardest": hardest(table, data, outcomes),
        })  # fmt: skip
    encoders = [(c.label, c.spec, str(c.seed), c.about["encoder"][:16]) for c in cells]
    sets: dict[str, Data] = {}
    for data, _ in groups:  # what is opened as two kinds is shown as the first
        sets.setdefault(data.spec, data)
    opened = [(d.name, d.kind, d.spec, d.digest[:16]) for d, _ in groups]
    return Environment(autoescape=True, trim_blocks=True).from_string(PAGE).render(
        title=f"Transfer of {len(labels)} frozen encoder{'s' * (len(labels) > 1)}",
        summary=(["data", "protocol", "score", *labels], summary),
        note=text.NOTE,
        failures=[f"{c.data.name}, {c.settings.name}, {c.label} ({c.spec}, seed {c.seed}): "
                  f"{c.error}" for c in cells if c.error],
        tables=sections,
        pictures=[feature_strips(data, cells, options) for data in sets.values()
                  if data.kind != "maps"],
        sheets=[sheet for data in sets.values() if data.kind == "maps"
                for sheet in map_sheets(data, cells, options)],
        results=results,
        encoders=(["encoder", "weights from", "seed", "SHA-256"], list(dict.fromkeys(encoders))),
        data_sets=(["data", "as", "from", "SHA-256"], list(dict.fromkeys(opened))),
    )  # fmt: skip


def _bars(table: dict[str, Any]) -> str:
    """The headline's values with their intervals, single runs as dots, as a picture."""
    rows = [(r["encoder"], r["scores"][table["headline"]]) for r in table["rows"] if r["scores"]]
    if not rows:
        return ""
    figure = Figure((7.6, 0.7 + 0.27 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for place, (_, score) in enumerate(rows):
        axes.barh(place, score["value"], color=COLORS[place % len(COLORS)], alpha=0.75)
        if score["low"] is not None:
            axes.plot([score["low"], score["high"]], [place, place], "k|-", linewidth=1.6)
        if len(score["seeds"]) > 1:
            axes.plot(score["seeds"], [place] * len(score["seeds"]), "o", mfc="w", mec="k", ms=4)
    labels = [label if len(label) <= 32 else label[:31] + "…" for label, _ in rows]
    axes.set_yticks(range(len(rows)), labels, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel(text.pretty(table["headline"]))
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return data_uri(buffer.getvalue())
