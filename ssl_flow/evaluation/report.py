"""report.html of a run folder: one self-contained file, pictures inlined."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { border: 1px solid #ccc; padding: .2em .7em }
td { text-align: right } td:first-child, th { text-align: left }
img { max-width: 100% } pre { background: #f5f5f5; padding: 1em; overflow-x: auto }
</style></head><body>
<h1>{{ title }}</h1>
<h2>Linear probe</h2>
{% if rows %}
<table><tr><th>encoder</th><th>mIoU</th>{% for c in classes %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in rows %}<tr><td>{{ row.name }}</td><td><b>{{ row.miou }}</b></td>
{%- for value in row.per_class %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>Intersection over union over the whole test split; ± is the standard deviation over runs.</p>
{% else %}<p>No probe in results.json.</p>{% endif %}
<h2>Training</h2>
{% if curve %}<img alt="loss against step" src="{{ curve }}">
<p>The loss lies between its floor, the entropy of the target, and the loss of a constant embedding,
which has learned nothing.</p>
{% else %}<p>No losses in metrics.jsonl.</p>{% endif %}
{% for name, picture in pictures %}<h2>{{ name }}</h2><img alt="{{ name }}" src="{{ picture }}">
{% endfor %}
<h2>Configuration</h2>
<pre>{{ config or "No config.yaml." }}</pre>
</body></html>
"""

_CURVES = {
    "loss": "loss",
    "target_entropy": "floor: the target's entropy",
    "constant_loss": "constant embedding",
}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` from what a run folder holds; parts that are missing are left out.

    Reads results.json (`{"linear_probe": {NAME: {"miou": ..., "per_class": {...}}}}`),
    metrics.jsonl (an object a line with `step`, `loss`, and where known `target_entropy` and
    `constant_loss`), config.yaml and pictures/*.png.

    Raises:
        FileNotFoundError: the run folder does not exist.
        ValueError: results.json is not JSON (names the file).
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise FileNotFoundError(f"no run folder {run}")
    rows, classes = _probe_rows(run / "results.json")
    curve = _draw_curves(_read_metrics(run / "metrics.jsonl"))
    pictures = [(p.stem, _inline(p.read_bytes())) for p in sorted((run / "pictures").glob("*.png"))]
    config = run / "config.yaml"
    page = Environment(autoescape=True).from_string(_PAGE)
    text = page.render(
        title=f"Run {run.resolve().name}",
        rows=rows,
        classes=classes,
        curve=_inline(curve) if curve else None,
        pictures=pictures,
        config=config.read_text(encoding="utf-8") if config.exists() else None,
    )
    report = run / "report.html"
    report.write_text(text, encoding="utf-8")
    return report


def _probe_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per encoder, the names of the classes."""
    if not path.exists():
        return [], []
    try:
        probe = json.loads(path.read_text(encoding="utf-8")).get("linear_probe") or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    # Beside the encoders there are the protocol and the like, which have no score.
    scored = {k: v for k, v in probe.items() if isinstance(v, dict) and "miou" in v}
    classes = list(dict.fromkeys(c for v in scored.values() for c in v.get("per_class") or {}))
    rows = []
    for name, value in scored.items():
        std, found = value.get("miou_std"), value.get("per_class") or {}
        miou = f"{value['miou']:.4f}" + (f" ± {std:.4f}" if std is not None else "")
        cells = ["-" if found.get(c) is None else f"{found[c]:.3f}" for c in classes]
        rows.append({"name": name, "miou": miou, "per_class": cells})
    return rows, classes


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl with a step; a last line cut off by a crash is skipped."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict) and "step" in value:
            found.append(value)
    return found


def _draw_curves(metrics: list[dict[str, Any]]) -> bytes | None:
    """PNG of the loss and its two bounds, None when nothing was logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for key, label in _CURVES.items():
        points = [
            (m["step"], m[key])
            for m in metrics
            if isinstance(m.get(key), int | float) and math.isfinite(m[key])
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, ls="-" if key == "loss" else "--")
    if not axes.lines:
        return None
    axes.legend()
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
