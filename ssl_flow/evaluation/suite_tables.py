"""Tables of a suite: one for each set and protocol, as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ssl_flow.evaluation.intervals import (
    Interval,
    better,
    interval_of_difference,
    interval_of_outcomes,
)
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.protocols import Data
from ssl_flow.evaluation.suite import Cell

NOTE = (
    "Brackets: 95 % bootstrap interval over the test images (or sequences, blocks, pairs, as "
    "said below a table), which are taken as independent; where they are frames of one video, or "
    "few, it is too narrow. ±: standard deviation over runs. Bold: the best value. One encoder is "
    "called better than another only where neither their intervals nor their runs overlap. "
    "Differences are paired, of the same draws of test images, and so have narrower intervals."
)


def tables(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One table for each set and protocol, in the order of the cells; JSON values only."""
    groups: dict[tuple[Data, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.data, cell.settings.name), []).append(cell)
    return [_table(data, part) for (data, _), part in groups.items()]


def _table(data: Data, cells: list[Cell]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    headlines: dict[str, Interval] = {}
    found: dict[str, list[Outcome]] = {}
    units, headline = 0, ""
    for label in dict.fromkeys(cell.label for cell in cells):
        mine = [cell for cell in cells if cell.label == label]
        outcomes = [cell.outcome for cell in mine if cell.outcome is not None]
        row: dict[str, Any] = {
            "encoder": label,
            "runs": [
                {"spec": c.spec, "seed": c.seed, "sha256": c.about["encoder"], "cell": c.path.name,
                 "error": c.error, "details": c.outcome.details if c.outcome else {}}
                for c in mine
            ],
            "scores": {}, "per_class": {}, "best": False, "better_than": [],
            "best_less_this": {},
        }  # fmt: skip
        rows.append(row)
        if not outcomes:
            continue
        found[label] = outcomes
        groups = [data.unit_of(item) for item in outcomes[0].items]
        units, headline = len(set(groups)), next(iter(outcomes[0].scores))
        for name in outcomes[0].scores:
            # One number a run of the suite, where counts are of several k-means runs in each.
            seeds = tuple(outcome.scores[name] for outcome in outcomes)
            x = interval_of_outcomes(outcomes, name, groups)
            x = replace(x, value=float(np.mean(seeds)), seeds=seeds)
            headlines.setdefault(label, x)
            low, high = (None if math.isnan(end) else end for end in (x.low, x.high))
            row["scores"][name] = {"value": x.value, "low": low, "high": high, "std": x.spread,
                                   "seeds": list(seeds)}  # fmt: skip
        for name in outcomes[0].per_class:
            known = [v for outcome in outcomes if (v := outcome.per_class[name]) is not None]
            row["per_class"][name] = float(np.mean(known)) if known else None
    larger = not smaller_is_better(headline)
    best = (max if larger else min)((x.value for x in headlines.values()), default=None)
    for row in (row for row in rows if row["encoder"] in headlines):
        own = headlines[row["encoder"]]
        row["best"] = own.value == best
        row["better_than"] = [k for k, other in headlines.items() if better(own, other, larger)]
    first = next((row["encoder"] for row in rows if row["best"]), "")
    for row in (row for row in rows if row["encoder"] in headlines and not row["best"]):
        for name in row["scores"]:
            gap = interval_of_difference(found[first], found[row["encoder"]], name, groups)
            if gap and not math.isnan(gap.low):
                ends = {"value": gap.value, "low": gap.low, "high": gap.high}
                row["best_less_this"][name] = ends
    return {"data": data.name, "spec": data.spec, "data_sha256": data.digest, "about": data.about,
            "protocol": cells[0].settings.describe(), "headline": headline, "unit": data.unit,
            "units": units, "rows": rows}  # fmt: skip


def smaller_is_better(score: str) -> bool:
    """Whether a score is an error."""
    return "error" in score or "decay" in score


def as_csv(found: Sequence[dict[str, Any]]) -> str:
    """One line for each set, protocol, encoder and score; the classes' scores are `class NAME`.

    `best_less_this`: the score of the best by the headline less this one's, paired.
    """
    file = io.StringIO()
    columns = ["data", "protocol", "version", "encoder", "score", "value", "low", "high", "std",
               "best_less_this", "paired_low", "paired_high", "runs", "failed", "best",
               "better_than"]  # fmt: skip
    writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for table in found:
        protocol, headline = table["protocol"], table["headline"]
        for row in table["rows"]:
            line = {
                "data": table["data"], "protocol": protocol["name"], "encoder": row["encoder"],
                "version": protocol["version"], "runs": len(row["runs"]),
                "failed": sum(bool(run["error"]) for run in row["runs"]),
            }  # fmt: skip
            marks = {"best": int(row["best"]), "better_than": "; ".join(row["better_than"])}
            for name, score in (row["scores"] or {headline: {}}).items():
                mark = marks if score and name == headline else {}
                if gap := row["best_less_this"].get(name):
                    ends = {"paired_low": gap["low"], "paired_high": gap["high"]}
                    mark = mark | {"best_less_this": gap["value"]} | ends
                writer.writerow(line | {"score": name} | score | mark)
            for name, value in row["per_class"].items():
                writer.writerow(line | {"score": f"class {name}", "value": value})
    return file.getvalue()


def as_markdown(found: Sequence[dict[str, Any]]) -> str:
    """A table for each set and protocol, with the protocol below it."""
    lines: list[str] = []
    for table in found:
        heads, rows = cells_of(table, "**{}**".format)
        lines += [f"### {table['data']}: {table['protocol']['name']}", ""]
        lines += ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
        for row in rows:  # an error may have several lines
            cells = (" ".join(cell.split()).replace("|", "\\|") for cell in row)
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", verdict(table), "", f"Protocol: {settings_text(table)}. {split_text(table)}"]
        lines.append("")
    return "\n".join([*lines, NOTE])


def cells_of(table: dict[str, Any], bold: Callable[[str], str]) -> tuple[list[str], list[Any]]:
    """Heads and cells of a table: encoder, scores, and the classes where there are but two."""
    names = list(next((row["scores"] for row in table["rows"] if row["scores"]), {}))
    classes = next((list(row["per_class"]) for row in table["rows"] if row["per_class"]), [])
    classes = classes if len(classes) <= 2 else []
    heads = ["encoder", *map(pretty, names or [table["headline"]]), *classes, "runs"]
    rows = []
    for row in table["rows"]:
        shown = [number(row["scores"][name]) if row["scores"] else "-" for name in names] or ["-"]
        shown[0] = bold(shown[0]) if row["best"] else shown[0]
        shown += [short(row["per_class"].get(name)) for name in classes]
        runs, errors = str(len(row["runs"])), [r["error"] for r in row["runs"] if r["error"]]
        runs = f"{len(errors)} of {runs} failed: {errors[0]}" if errors else runs
        rows.append([row["encoder"], *shown, runs])
    return heads, rows


def pretty(score: str) -> str:
    """The name of a score for people."""
    return score.replace("miou", "mIoU").replace("_", " ")


def number(score: dict[str, Any]) -> str:
    """A score with its interval and its spread, as far as it has them."""
    text = f"{score['value']:.3f}"
    if score["low"] is not None:
        text += f" [{score['low']:.3f}, {score['high']:.3f}]"
    return text if score["std"] is None else f"{text} ± {score['std']:.3f}"


def verdict(table: dict[str, Any]) -> str:
    """Which encoder is better than which, and how far the best is from each, in two sentences."""
    said = [f"{row['encoder']} is better than {', '.join(row['better_than'])}"
            for row in table["rows"] if row["better_than"]]  # fmt: skip
    if len([row for row in table["rows"] if row["scores"]]) < 2:
        return ""
    headline = table["headline"]
    text = f"By {pretty(headline)}: {'; '.join(said) or 'no encoder is better'}."
    gaps = [f"{row['encoder']} {number(row['best_less_this'][headline] | {'std': None})}"
            for row in table["rows"] if headline in row["best_less_this"]]  # fmt: skip
    best = next((row["encoder"] for row in table["rows"] if row["best"]), "")
    return f"{text} {best} less the others, paired: {'; '.join(gaps)}." if gaps else text


def settings_text(table: dict[str, Any]) -> str:
    """The protocol's name, version and settings in a line."""
    protocol = dict(table["protocol"])
    name, version = protocol.pop("name"), protocol.pop("version")
    if protocol.get("features", "") is None:  # chosen for each encoder
        runs = {row["encoder"]: row["runs"][0]["details"] for row in table["rows"]}
        chosen = [f"{about['features']} of {label}" for label, about in runs.items() if about]
        protocol["features"] = "; ".join(chosen) or "by the encoder"
    return f"{name} version {version}; " + ", ".join(f"{k} {v}" for k, v in protocol.items())


def split_text(table: dict[str, Any]) -> str:
    """Which images, by which rule."""
    parts = []
    for key in ("train", "test"):
        if split := table["about"].get(key):
            count = next((f"{split[k]} {k}, " for k in ("images", "frames") if k in split), "")
            parts.append(f"{key}: {count}{split.get('rule', '')}")
    over = f"Intervals over {table['units']} {table['unit']}."
    return f"Data: {table['spec']}; {'; '.join(parts)}. {over}"


def short(value: float | None) -> str:
    """A number for a cell of a table."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
