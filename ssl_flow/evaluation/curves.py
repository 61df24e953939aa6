"""The curves of training runs: a panel for each quantity that metrics.jsonl holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from ssl_flow.evaluation.run_log import RunLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture: TypeAlias = NDArray[np.uint8]

# Okabe & Ito, told apart with any colour vision; without their yellow, too pale for a line.
_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_DPI, _WIDTH, _HEIGHT = 150, 4.6, 2.7  # pixels an inch; a panel in inches
_BOUNDS = {
    "constant_loss": "constant embedding",
    "random_loss": "random",
    "target_entropy": "target entropy",
}


@dataclass(frozen=True)
class Panel:
    """One quantity against the step: the first key is drawn bold, further ones are its bounds."""

    title: str
    unit: str
    keys: dict[str, str]
    """Key in metrics.jsonl -> name in the legend."""
    scale: str = "linear"  # linear, from_zero, log
    smooth: bool = True


_PANELS = [
    Panel("loss", "loss", {"loss": "loss"} | _BOUNDS),
    Panel("KL divergence (loss - target entropy)", "nats", {"kl": ""}),
    Panel("flow a linear map leaves unexplained", "share", {"ridge": ""}),
    Panel("effective rank of the embedding", "dimensions", {"effective_rank": ""}),
    Panel("spread of the embedding", "standard deviation", {"embedding_std": ""}),
    Panel("mined triplets in the wrong order", "share", {"wrong_triplets": ""}),
    Panel("gradient norm", "norm, log scale", {"gradient_norm": ""}, "log"),
    Panel("learning rate", "learning rate", {"learning_rate": ""}, "from_zero", False),
    Panel("speed", "images / s", {"images_per_second": ""}, "from_zero"),
    Panel("waiting for data", "% of the time", {"data_wait": ""}, "from_zero"),
]


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
    probes = [Panel(f"probe while training: {k[6:]}", k[6:], {k: ""}, smooth=False) for k in keys]

    def has_numbers(panel: Panel) -> bool:
        key, log = next(iter(panel.keys)), panel.scale == "log"
        return any(value > 0 or not log for run in runs for value in run.curve(key)[1])

    return [panel for panel in _PANELS + probes if has_numbers(panel)]


def draw_curves(runs: Sequence[RunLog]) -> tuple[Picture | None, dict[str, Picture]]:
    """Draw every panel that a run has numbers for; several runs are laid over each other.

    Thin lines are the logged values, bold ones their `exponential_mean`. One run: its loss stands
    between its bounds. Several: a colour each, no bounds.

    Returns:
        The sheet (H, W, 3) uint8 RGB, and cut out of it the panels by title; None and none when
        no run has numbers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the curves need matplotlib: pip install matplotlib") from error
    panels = drawable_panels(runs)
    if not panels:
        return None, {}
    columns = min(3, math.ceil(math.sqrt(len(panels))))
    rows = math.ceil(len(panels) / columns)
    head = 0.75 if len(runs) == 1 else 0.35 + 0.24 * len(runs)  # inches
    size = (columns * _WIDTH, rows * _HEIGHT + head)
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    _draw_head(figure, runs)
    corners = [(i % columns * _WIDTH, head + i // columns * _HEIGHT) for i in range(len(panels))]
    for panel, (left, top) in zip(panels, corners, strict=True):
        bottom = size[1] - top - _HEIGHT + 0.45
        axes = figure.add_axes((
            (left + 0.8) / size[0], bottom / size[1],
            (_WIDTH - 1.0) / size[0], (_HEIGHT - 0.95) / size[1],
        ))  # fmt: skip
        _draw_panel(axes, panel, runs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a folder's name in any script
        canvas.draw()
    sheet = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    cells = {}
    for panel, (left, top) in zip(panels, corners, strict=True):
        x, y = round(left * _DPI), round(top * _DPI)
        cells[panel.title] = sheet[y : y + round(_HEIGHT * _DPI), x : x + round(_WIDTH * _DPI)]
    return sheet, cells


def png(picture: Picture) -> bytes:
    """(H, W, 3) uint8 RGB -> the bytes of a PNG."""
    return cv2.imencode(".png", picture[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()


def _draw_head(figure: Figure, runs: Sequence[RunLog]) -> None:
    """Name and summary of the run, or the legend: a line of text a run in its colour."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()

    def write(x: float, y: float, text: str, points: float, color: str) -> None:
        room = int((width - x - 0.2) * 120 / points)  # characters, about
        text = text if len(text) <= room else text[: room - 1] + "…"
        figure.text(x / width, 1 - y / height, text, fontsize=points, color=color,
                    va="center", parse_math=False)  # fmt: skip

    if len(runs) == 1:
        write(0.2, 0.28, runs[0].name, 13, "black")
        write(0.2, 0.56, runs[0].summary, 9.5, "0.3")
        return
    names = [run.name for run in runs]
    for i, run in enumerate(runs):
        y = 0.3 + 0.24 * i
        name = run.name if names.count(run.name) == 1 else str(run.folder)
        line = Line2D([0.2 / width, 0.55 / width], [1 - y / height] * 2, lw=2.2, **_style(i))
        figure.add_artist(line)
        write(0.65, y, f"{name}: {run.summary}", 9.5, "black")


def _style(index: int) -> dict[str, Any]:
    styles = ["-", "--", ":", "-."]
    turn = index // len(_COLORS) % len(styles)
    return {"color": _COLORS[index % len(_COLORS)], "linestyle": styles[turn]}


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[RunLog]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    bounded = len(runs) == 1 and any(runs[0].curve(key)[1] for key in list(panel.keys)[1:])
    for number, run in enumerate(runs):
        for index, (key, label) in enumerate(panel.keys.items()):
            if index and not bounded:
                continue
            steps, values = run.curve(key)
            if key == "data_wait":
                values = [100 * value for value in values]
            if panel.scale == "log":
                pairs = [(s, v) for s, v in zip(steps, values, strict=True) if v > 0]
                steps, values = [s for s, _ in pairs], [v for _, v in pairs]
            if not values:
                continue
            style = _style(number + index)
            means = exponential_mean(values) if panel.smooth else np.array(values)
            sparse = "o" if (len(values) < 30 and not panel.smooth) or len(values) == 1 else ""
            if index:
                axes.plot(steps, means, lw=1.4, label=label, **style | {"linestyle": "--"})
            else:
                axes.plot(steps, values, lw=0.8, alpha=0.35 if len(runs) == 1 else 0.2, **style)
                axes.plot(steps, means, lw=2, label=label, marker=sparse, ms=4, **style)
    unit = panel.unit
    if panel.title == "loss" and any("kl" in row for run in runs for row in run.rows):
        unit = "nats"  # a cross entropy; the other objectives have no unit
    axes.set_title(panel.title, fontsize=10, loc="left", pad=17 if bounded else 6)
    if bounded:
        axes.legend(fontsize=7.5, frameon=False, ncols=4, loc="lower left", borderpad=0,
                    bbox_to_anchor=(0, 1), columnspacing=0.9, handlelength=1.4)  # fmt: skip
    axes.set_xlabel("optimiser step", fontsize=8.5)
    axes.set_ylabel(unit, fontsize=8.5)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1.02 * max(1, *(run.rows[-1]["step"] for run in runs if run.rows)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.scale == "from_zero":
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
