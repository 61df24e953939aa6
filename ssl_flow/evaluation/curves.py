"""What a run folder says about its training (config.yaml, metrics.jsonl), and its curves."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

# Okabe & Ito, told apart with any colour vision; without their yellow, too pale for a line.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


class Panel(NamedTuple):
    """One quantity against the step."""

    title: str
    unit: str
    key: str  # in metrics.jsonl
    scale: str = "linear"  # linear, from_zero, log
    smooth: bool = True
    bounds: tuple[str, ...] = ()  # further keys, drawn where there is one run


_PANELS = [
    Panel("loss", "loss", "loss", bounds=("constant_loss", "random_loss", "target_entropy")),
    Panel("KL divergence (loss - target entropy)", "nats", "kl"),
    Panel("flow a linear map leaves unexplained", "share", "ridge"),
    Panel("effective rank of the embedding", "dimensions", "effective_rank"),
    Panel("spread of the embedding", "standard deviation", "embedding_std"),
    Panel("mined triplets in the wrong order", "share", "wrong_triplets"),
    Panel("gradient norm", "norm, log scale", "gradient_norm", "log"),
    Panel("learning rate", "learning rate", "learning_rate", "from_zero", False),
    Panel("speed", "images / s", "images_per_second", "from_zero"),
    Panel("waiting for data", "share of the time", "data_wait", "from_zero"),
]


@dataclass(frozen=True)
class RunLog:
    """The configuration and the logged numbers of one run."""

    folder: Path
    config: dict[str, Any]  # flat: `train.steps` -> 400; empty without config.yaml
    rows: list[dict[str, Any]]  # one a logged step, ascending: `step`, and what else was logged
    unreadable: int  # lines of metrics.jsonl that hold no step

    @property
    def name(self) -> str:
        """The folder's own name, in characters that can be drawn."""
        return "".join(c if c.isprintable() else "?" for c in self.folder.resolve().name)

    @property
    def summary(self) -> str:
        """Backbone, objective and steps, as far as the files tell."""
        parts = [self.config.get("model.backbone"), self.config.get("loss.objective")]
        if self.rows:
            done = self.rows[-1]["step"]
            wanted = self.config.get("train.steps", done)
            parts.append(f"{done} steps" if done == wanted else f"{done} of {wanted} steps")
        return ", ".join(str(part) for part in parts if part)

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a key, without what is missing or not finite."""
        rows = [row for row in self.rows if is_number(row.get(key))]
        return [row["step"] for row in rows], [row[key] for row in rows]


def is_number(value: object) -> bool:
    """Whether a value of a JSON file can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_run(folder: Path) -> RunLog:
    """Read a run folder; a missing file counts as an empty one, torn lines are left out.

    The lines of one step (a probe has its own) are joined; `kl` is added to those of old runs.
    FileNotFoundError without such a folder; ValueError if config.yaml is not a YAML file of keys.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}; `ssl-flow train` prints the one it makes")
    file = folder / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML; put back what the run wrote: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no keys; put back what the run wrote")

    metrics, unreadable = folder / "metrics.jsonl", 0
    rows: dict[float, dict[str, Any]] = {}
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
    for line in filter(str.strip, text.split("\n")):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError):  # torn, or not of a step
            step = None
        if is_number(step):
            rows.setdefault(step, {}).update(row)
        else:
            unreadable += 1
    for row in rows.values():
        if is_number(row.get("loss")) and is_number(row.get("target_entropy")):
            row["kl"] = row["loss"] - row["target_entropy"]
    return RunLog(folder, _flat(config), [rows[step] for step in sorted(rows)], unreadable)


def _flat(config: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def exponential_mean(values: Sequence[float]) -> NDArray[np.float64]:
    """Running mean with exponentially falling weights, (N,): no bias towards a start value.

    The span is the root of the number of values: 400 lines of metrics are averaged over about 20.
    """
    keep = 1 - 2 / (math.sqrt(len(values)) + 1) if values else 0.0
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return np.array(means)


def drawable_panels(runs: Sequence[RunLog]) -> list[Panel]:
    """The panels that at least one run has numbers for."""
    keys = sorted({key for run in runs for row in run.rows for key in row if key[:6] == "probe_"})
    probes = [Panel(f"probe while training: {k[6:]}", k[6:], k, smooth=False) for k in keys]
    return [
        panel for panel in _PANELS + probes
        if any(v > 0 or panel.scale != "log" for run in runs for v in run.curve(panel.key)[1])
    ]  # fmt: skip


def draw_curves(runs: Sequence[RunLog]) -> bytes | None:
    """Draw every panel that a run has numbers for; several runs are laid over each other.

    Thin lines are the logged values, bold ones their `exponential_mean`. One run: its loss stands
    between its bounds. Several: a colour each, no bounds. Returns a PNG; None without any numbers.
    """
    panels = drawable_panels(runs)
    if not panels:
        return None
    columns = min(3, math.ceil(math.sqrt(len(panels))))
    rows = math.ceil(len(panels) / columns)
    names = [run.name for run in runs]
    heads = [
        f"{run.name if names.count(run.name) == 1 else run.folder}: {run.summary}" for run in runs
    ]
    figure = Figure((4.6 * columns, 2.7 * rows + 0.3 * len(runs) + 0.2), 150, layout="constrained")
    figure.subplots(rows, columns, squeeze=False)
    for panel, axes in zip(panels, figure.axes, strict=False):
        _draw_panel(axes, panel, runs)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    if len(runs) == 1:
        figure.suptitle(heads[0], x=0.01, ha="left", parse_math=False)
    else:
        lines = [figure.axes[0].plot([], [], lw=2.2, **_style(i))[0] for i in range(len(runs))]
        legend = figure.legend(lines, heads, loc="outside upper left", frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a folder's name in any script
        figure.savefig(buffer)
    return buffer.getvalue()


def _style(index: int) -> dict[str, Any]:
    styles = ["-", "--", ":", "-."]
    turn = index // len(COLORS) % len(styles)
    return {"color": COLORS[index % len(COLORS)], "linestyle": styles[turn]}


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[RunLog]) -> None:
    for number, run in enumerate(runs):
        steps, values = run.curve(panel.key)
        if not values:
            continue
        means = exponential_mean(values) if panel.smooth else np.array(values)
        sparse = "o" if (len(values) < 30 and not panel.smooth) or len(values) == 1 else ""
        axes.plot(steps, values, lw=0.8, alpha=0.35 if len(runs) == 1 else 0.2, **_style(number))
        axes.plot(steps, means, lw=2, marker=sparse, ms=4, label=panel.key, **_style(number))
    bounds = [key for key in panel.bounds if len(runs) == 1 and runs[0].curve(key)[1]]
    for index, key in enumerate(panel.bounds, start=1):
        if key in bounds:
            steps, values = runs[0].curve(key)
            style = _style(index) | {"linestyle": "--"}
            name = {"constant_loss": "constant embedding"}.get(key, key.removesuffix("_loss"))
            label = name.replace("_", " ")
            axes.plot(steps, exponential_mean(values), lw=1.4, label=label, **style)
    nats = panel.title == "loss" and any("kl" in row for run in runs for row in run.rows)
    axes.set_title(panel.title, fontsize=10, loc="left", pad=17 if bounds else 6)
    if bounds:
        axes.legend(fontsize=7.5, frameon=False, ncols=4, loc="lower left", borderpad=0,
                    bbox_to_anchor=(0, 1), columnspacing=0.9, handlelength=1.4)  # fmt: skip
    axes.set_xlabel("optimiser step", fontsize=8.5)
    # A cross entropy is in nats; the other objectives have no unit.
    axes.set_ylabel("nats" if nats else panel.unit, fontsize=8.5)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.02 * max(1, *(run.rows[-1]["step"] for run in runs if run.rows)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.scale == "log":
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.scale == "from_zero":
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
