"""report.html of a run folder, one self-contained file; the command `ssl-flow show run`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from jinja2 import Environment

from ssl_flow.evaluation.curves import draw_curves, drawable_panels
from ssl_flow.evaluation.pictures import data_uri
from ssl_flow.evaluation.run_log import RunLog, is_number, read_run
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
<h2>Linear probe</h2>
{% if rows %}
<div><table><tr><th>encoder</th><th>mIoU</th><th>pixel accuracy</th><th>runs</th></tr>
{% for row in rows %}<tr><td>{{ row.name }}</td><td><b>{{ row.miou }}</b></td>
<td>{{ row.accuracy }}</td><td>{{ row.runs }}</td></tr>
{% endfor %}</table></div>
<p>{{ protocol }}</p>
<details><summary>Intersection over union of each class</summary><div><table>
<tr><th>class</th>{% for row in rows %}<th>{{ row.name }}</th>{% endfor %}</tr>
{% for name, cells in classes.items() %}<tr><td>{{ name }}</td>
{%- for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div></details>
{% else %}<p>No probe in results.json.</p>{% endif %}
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
{% if call %}<pre><code>{{ call }}</code></pre>
{% else %}<p>No encoder yet: it is written when the training ends.</p>{% endif %}
<h2>Configuration</h2>
{% if log.config %}<details><summary>{{ log.config | length }} keys of config.yaml</summary><div>
<table class="config">{% for key, value in log.config.items() %}<tr><td>{{ key }}</td>
<td>{{ value }}</td></tr>{% endfor %}</table></div></details>
{% else %}<p>No config.yaml.</p>{% endif %}
</body></html>
"""
_CAPTIONS = {
    "training": "frame, flow (colour: direction), embedding (three principal components)",
    "probe_pretrained": "pretrained encoder, probed: image, truth, prediction",
    "probe_random": "random encoder, probed: image, truth, prediction",
}


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` and `pictures/curves.png` from what a run folder holds.

    Reads results.json (`{"linear_probe": {NAME: {"miou": ..., "per_class": {...}}}}`),
    metrics.jsonl, config.yaml and pictures/*.png; parts that are missing are left out.

    Raises:
        FileNotFoundError: the run folder does not exist.
        ValueError: results.json or config.yaml cannot be read (names the file).
    """
    log = read_run(Path(run_dir))
    run, encoder, sheet = log.folder, log.folder / "encoder", draw_curves([log])
    probe = _read_probe(run / "results.json")
    rows, classes = _probe_tables(probe)
    if sheet is not None:
        (run / "pictures").mkdir(exist_ok=True)
        write_atomically(run / "pictures" / "curves.png", sheet)
    files = [p for p in (run / "pictures").glob("*.png") if p.stem != "curves"]
    files.sort(key=lambda p: (p.stem != "training", p.stem))
    call = f"encoder = ssl_flow.load_encoder({json.dumps(str(encoder), ensure_ascii=False)})"
    page = Environment(autoescape=True).from_string(_PAGE).render(
        log=log,
        problems=_problems(log),
        rows=rows,
        classes=classes,
        protocol=_protocol(probe),
        curves=data_uri(sheet) if sheet else None,
        pictures=[(_CAPTIONS.get(p.stem, p.stem), data_uri(p.read_bytes())) for p in files],
        call=call if (encoder / "config.json").exists() else None,
    )  # fmt: skip
    report = run / "report.html"
    write_atomically(report, page.encode(errors="replace"))
    return report


def _read_probe(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON; delete it or put it back: {error}") from error
    probe = results.get("linear_probe") if isinstance(results, dict) else None
    return probe if isinstance(probe, dict) else {}


def _probe_tables(probe: dict[str, Any]) -> tuple[list[dict[str, str]], dict[str, list[str]]]:
    """One row per encoder; the cells of each class, in the order of the rows."""
    # Beside the encoders there are the protocol and the like, which have no score.
    scored = {k: v for k, v in probe.items() if isinstance(v, dict) and is_number(v.get("miou"))}
    rows = []
    for name, value in scored.items():
        std = f" ± {value['miou_std']:.4f}" if is_number(value.get("miou_std")) else ""
        rows.append(
            {
                "name": name,
                "miou": f"{value['miou']:.4f}{std}",
                "accuracy": _cell(value.get("pixel_accuracy")),
                "runs": str(len(value["runs"])) if value.get("runs") else "-",
            }
        )
    tables = [value.get("per_class") or {} for value in scored.values()]
    names = dict.fromkeys(name for table in tables for name in table)
    return rows, {name: [_cell(table.get(name)) for table in tables] for name in names}


def _cell(value: object) -> str:
    return f"{value:.4f}" if is_number(value) else "-"


def _protocol(probe: dict[str, Any]) -> str:
    """Which images, which rule, which classifier: one line."""
    parts = ["Over the whole test split; ± is the standard deviation over runs."]
    for key, name in (("train_data", "Trained on"), ("data", "Scored on")):
        if data := probe.get(key):
            images, rule = data.get("images", "?"), data.get("rule", "?")
            parts.append(f"{name} {data.get('spec', '?')}, {images} images ({rule}).")
    if protocol := probe.get("protocol"):
        parts.append("Protocol: " + ", ".join(f"{k} {v}" for k, v in protocol.items()) + ".")
    return " ".join(parts)


def _problems(log: RunLog) -> list[str]:
    found = []
    if not (log.folder / "encoder" / "config.json").exists():
        found.append(
            f"Not finished (running, or interrupted): {log.summary or 'nothing logged'}. "
            f"If it was interrupted: ssl-flow train --resume {log.folder}"
        )
    elif log.rows and log.rows[-1]["step"] < log.config.get("train.steps", 0):
        found.append(
            f"Not finished, being made longer: {log.summary}. The encoder and the linear probe are "
            f"those of the shorter run. If it was interrupted: ssl-flow train --resume {log.folder}"
        )
    if skipped := sum(log.curve("skipped_steps")[1][-1:]):
        found.append(f"Steps skipped because loss or gradient was not finite: {skipped:g}.")
    if bad := sum("loss" in row and not is_number(row["loss"]) for row in log.rows):
        found.append(f"Logged losses that are not finite: {bad} of {len(log.rows)}.")
    if log.unreadable:
        found.append(
            f"Lines of metrics.jsonl left out as unreadable: {log.unreadable} "
            "(a killed run leaves its last one torn)."
        )
    return found


@dataclass
class ShowRunCommand:
    """Draw the curves of a training run and refresh its report; or compare several runs."""

    runs: tyro.conf.Positional[list[Path]]
    """Run folders. One: RUN/pictures/curves.png and RUN/report.html; several: one picture."""
    out: Path = Path("runs.png")
    """The picture (PNG) of several runs."""


def show_run_command(argv: Sequence[str]) -> int:
    """Run `ssl-flow show run` with the arguments that follow these two words.

    Returns:
        The exit code: 0, or 2 if a run cannot be shown.

    Raises:
        SystemExit: by the parser: 0 after --help, 2 for a wrong flag.
    """
    command = tyro.cli(ShowRunCommand, args=list(argv), prog="ssl-flow show run")
    try:
        if command.out.suffix != ".png" or not command.out.absolute().parent.is_dir():
            raise ValueError(f"--out {command.out}: expected a .png in a folder that is there")
        logs = [_checked(run) for run in command.runs]
        if len(logs) == 1:
            report = write_report(logs[0].folder)
            print(f"wrote {logs[0].folder / 'pictures' / 'curves.png'} and {report}")
        else:
            write_atomically(command.out, draw_curves(logs) or b"")
            print(f"wrote {command.out}")
    except (ValueError, OSError) as error:
        print(f"ssl-flow show run: error: {error}", file=sys.stderr)
        return 2
    return 0


def _checked(folder: Path) -> RunLog:
    """Read a run that has something to draw; else say what is missing and what to do."""
    log, metrics = read_run(folder), folder / "metrics.jsonl"
    if drawable_panels([log]):
        return log
    if not (log.config or metrics.exists()):
        raise FileNotFoundError(
            f"{folder} is no run folder: neither config.yaml nor metrics.jsonl is in it; "
            "`ssl-flow train` prints the right one"
        )
    raise ValueError(
        f"{metrics} {'holds no numbers' if metrics.exists() else 'is missing'}: nothing is logged "
        f"before train.log_every steps (here {log.config.get('train.log_every', 'not known')}); "
        f"wait for them, or go on with an interrupted run: ssl-flow train --resume {folder}"
    )
