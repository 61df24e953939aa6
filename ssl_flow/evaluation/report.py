"""report.html of a run folder, one self-contained file; the command `ssl-flow show run`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from jinja2 import Environment

from ssl_flow.evaluation.curves import (
    RunLog,
    draw_curves,
    drawable_panels,
    is_number,
    read_run,
)
from ssl_flow.evaluation.pictures import data_uri
from ssl_flow.evaluation.refusal import told
from ssl_flow.flow.shard import write_atomically

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ log.name }}</title><style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66em; margin: 1.5em auto; padding: 0 1em }
h1 { margin-bottom: 0; overflow-wrap: anywhere } h1 + p { margin-top: 0 }
table { border-collapse: collapse } td, th { border-bottom: 1px solid #8886; padding: .2em .7em }
td { text-align: right } td:first-child, th { text-align: left }
div, pre { overflow-x: auto } pre { background: #8882; padding: .7em 1em } code { font-size: .9em }
img { max-width: 100% }
.config td { text-align: left; overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) { .curves { filter: invert(.93) hue-rotate(180deg) } }
</style></head><body>
<h1>{{ log.name }}</h1>
<p>{{ log.summary }}</p>
{% if problems %}<h2>Problems</h2>
<ul>{% for problem in problems %}<li>{{ problem }}</li>{% endfor %}</ul>{% endif %}
{% if not on_map %}<h2>Linear probe</h2>{% endif %}
{% if rows %}
<div><table><tr><th>encoder</th><th>mIoU</th><th>pixel accuracy</th><th>runs</th></tr>
{% for name, row in rows.items() %}<tr><td>{{ name }}</td>
<td><b>{{ row.miou | cell }}{% if row.miou_std %} ± {{ row.miou_std | cell }}{% endif %}</b></td>
<td>{{ row.pixel_accuracy | cell }}</td><td>{{ (row.runs or [0]) | length }}</td></tr>
{% endfor %}</table></div>
<p>Over the whole test split; ± is the standard deviation over runs.
{% for key, done in (("train_data", "Trained"), ("data", "Scored")) if probe[key] %}
{{ done }} on {{ probe[key].spec }}, {{ probe[key].images }} images ({{ probe[key].rule }}).
{% endfor %}Protocol:
{% for key, value in probe.protocol.items() %}{{ key }} {{ value }}{{ ", " if not loop.last }}
{%- endfor %}.</p>
<details><summary>Intersection over union of each class</summary><div><table>
<tr><th>class</th>{% for name in rows %}<th>{{ name }}</th>{% endfor %}</tr>
{% for name in (rows.values() | first).per_class %}<tr><td>{{ name }}</td>
{%- for row in rows.values() %}<td>{{ row.per_class[name] | cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div></details>
{% elif not on_map %}<p>No probe in results.json.</p>{% endif %}
<h2>Training</h2>
{% if curves %}<img class="curves" alt="metrics against the step" src="{{ curves }}">
<p>Thin: as logged, of one batch. Bold: exponential mean. A constant embedding has learned nothing;
a cross entropy cannot fall below the entropy of its target.</p>
{% else %}<p>No numbers in metrics.jsonl.</p>{% endif %}
{% if pictures %}<h2>Pictures</h2>{% endif %}
{% for name, picture in pictures %}<p>{{ name | capitalize }}</p>
<div><img alt="{{ name }}" src="{{ picture }}"></div>
{% endfor %}
<h2>Use the encoder</h2>
{% if done %}<pre><code>encoder = ssl_flow.{{ loader }}("{{ log.folder }}/encoder")</code></pre>
{% else %}<p>No encoder yet: it is written when the training ends.</p>{% endif %}
<h2>Configuration</h2>
{% if log.config %}<details><summary>{{ log.config | length }} keys of config.yaml</summary><div>
<table class="config">{% for key, value in log.config.items() %}<tr><td>{{ key }}</td>
<td>{{ value }}</td></tr>{% endfor %}</table></div></details>
{% else %}<p>No config.yaml.</p>{% endif %}
</body></html>
"""
_CAPTIONS = {
    "training": "frame, flow (colour: direction), embedding (three principal components); or of a "
    "map anchors, their positives, the nearest other anchors",
    "probe_pretrained": "pretrained encoder, probed: image, truth, prediction",
    "probe_random": "random encoder, probed: image, truth, prediction",
}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` and `pictures/curves.png` from what a run folder holds.

    Reads results.json (`{"linear_probe": {NAME: {"miou": ..., "per_class": {...}}}}`),
    metrics.jsonl, config.yaml and pictures/*.png; parts that are missing are left out.
    FileNotFoundError without the run folder; ValueError names a file that cannot be read.
    """
    log = read_run(Path(run_dir))
    run, sheet, results = log.folder, draw_curves([log]), log.folder / "results.json"
    try:
        probe = json.loads(results.read_text()).get("linear_probe", {}) if results.exists() else {}
    except ValueError as error:
        raise ValueError(f"{results} is not JSON; delete it or put it back: {error}") from error
    if sheet is not None:
        (run / "pictures").mkdir(exist_ok=True)
        write_atomically(run / "pictures" / "curves.png", sheet)
    files = [p for p in (run / "pictures").glob("*.png") if p.stem != "curves"]
    files.sort(key=lambda p: (p.stem != "training", p.stem))
    on_map = str(log.config.get("data.store")).startswith("map:")
    environment = Environment(autoescape=True)
    environment.filters["cell"] = lambda x: f"{x:.4f}" if is_number(x) else "-"
    page = environment.from_string(_PAGE).render(
        log=log,
        problems=_problems(log),
        probe=probe,
        # Beside the encoders there are the protocol and the like, which have no score.
        rows={k: v for k, v in probe.items() if isinstance(v, dict) and "miou" in v},
        curves=data_uri(sheet) if sheet else None,
        pictures=[(_CAPTIONS.get(p.stem, p.stem), data_uri(p.read_bytes())) for p in files],
        done=(run / "encoder" / "config.json").exists(),
        on_map=on_map,
        loader="models.load_tile_encoder" if on_map else "load_encoder",
    )
    report = run / "report.html"
    write_atomically(report, page.encode(errors="replace"))
    return report


def _problems(log: RunLog) -> list[str]:
    found, mend = [], f"If it was interrupted: ssl-flow train --resume {log.folder}"
    if not (log.folder / "encoder" / "config.json").exists():
        found.append(f"Not finished (running, or interrupted): {log.summary}. {mend}")
    elif log.rows and log.rows[-1]["step"] < log.config.get("train.steps", 0):
        old = "The encoder and the linear probe are those of the shorter run."
        found.append(f"Not finished, being made longer: {log.summary}. {old} {mend}")
    if skipped := sum(log.curve("skipped_steps")[1][-1:]):
        found.append(f"Steps skipped because loss or gradient was not finite: {skipped:g}.")
    if bad := sum("loss" in row and not is_number(row["loss"]) for row in log.rows):
        found.append(f"Logged losses that are not finite: {bad} of {len(log.rows)}.")
    if log.unreadable:  # a killed run leaves its last one torn
        found.append(f"Lines of metrics.jsonl left out as unreadable: {log.unreadable}.")
    return found


@dataclass
class ShowRunCommand:
    """Draw the curves of a training run and refresh its report; or compare several runs."""

    runs: tyro.conf.Positional[list[Path]]
    """Run folders. One: RUN/pictures/curves.png and RUN/report.html; several: one picture."""
    out: Path = Path("runs.png")
    """The picture (PNG) of several runs."""


def show_run_command(argv: Sequence[str]) -> int:
    """Run `ssl-flow show run`; returns the exit code: 0, or 2 if a run cannot be shown."""
    command = tyro.cli(ShowRunCommand, args=list(argv), prog="ssl-flow show run")
    out, runs = command.out, command.runs

    def work() -> str:
        if not runs:
            raise ValueError("give one or more run folders; `ssl-flow train` prints them")
        if out.suffix != ".png" or not out.absolute().parent.is_dir():
            raise ValueError(f"--out {out}: expected a .png in a folder that is there")
        logs = [read_run(run) for run in runs]
        for log in logs:
            if not drawable_panels([log]):
                metrics = log.folder / "metrics.jsonl"
                found = "holds no numbers (yet)" if metrics.exists() else "is missing"
                raise ValueError(f"{metrics} {found}; `ssl-flow train` prints the folder of a run")
        if len(logs) == 1:
            return f"wrote {runs[0] / 'pictures' / 'curves.png'} and {write_report(runs[0])}"
        write_atomically(out, draw_curves(logs) or b"")
        return f"wrote {out}"

    return told("ssl-flow show run", work)
