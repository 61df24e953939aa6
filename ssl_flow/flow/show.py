"""A store of flow as one picture to judge it by: the command `ssl-flow show flow`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tyro
from numpy.typing import NDArray

from .codec import flow_to_rgb
from .store import FlowStore, Sample

_HISTOGRAM_PAIRS = 200  # read for the histogram: about a second
_BINS = np.geomspace(1 / 8, 1024, 27)  # pixels, two bins an octave
_INVALID = (230, 0, 160)  # a colour the wheel has only between right and up


def spread_pairs(numbers: NDArray[np.int64], count: int) -> list[int]:
    """Choose `count` pairs of a store evenly over its videos, and over the length of each video.

    `numbers` (pairs,) is `FlowStore.source_numbers`. Returns the pairs' numbers, ascending.
    """
    _, first, pairs = np.unique(numbers, return_index=True, return_counts=True)
    videos = np.arange(len(first))
    if len(videos) > count:
        videos = ((np.arange(count) + 0.5) * len(videos) / count).astype(int)
    take = np.zeros(len(first), int)
    while take.sum() < min(count, len(numbers)):
        open_videos = videos[take[videos] < pairs[videos]]
        take[open_videos[: count - take.sum()]] += 1
    chosen = [first[v] + (np.arange(take[v]) + 0.5) * pairs[v] / take[v] for v in videos]
    return [int(number) for number in np.concatenate(chosen)]


def show_flow(store: FlowStore, out: str | Path, count: int = 12) -> None:
    """Draw a sheet (PNG): pairs as frame, flow and what is valid; the wheel; motion lengths.

    `count` pairs are spread over the videos, the same ones in each call. Each pair's colours are
    full at the length that 99 % of its pixels stay below, which is written above it. ValueError:
    `count` is not positive, the store holds no pair or a damaged one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # needs no display
    from matplotlib.figure import Figure

    if count < 1:
        raise ValueError(f"count must be above 0, got {count}")
    if len(store) == 0:
        raise ValueError(f"{store.path} holds no pair")
    samples = [store[number] for number in spread_pairs(store.source_numbers, count)]
    shape = np.median([sample.frame.shape[0] / sample.frame.shape[1] for sample in samples])
    rows = -(-len(samples) // 2)
    heights = [3.3, rows * (2.4 * min(float(shape), 1.2) + 0.35)]  # inches
    figure = Figure(figsize=(15, sum(heights)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    head, body = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).ravel()
    wheel, histogram = head.subplots(1, 2, width_ratios=[1, 3.4])
    _draw_wheel(wheel)
    _draw_histogram(histogram, store)
    method, size, gap = (store.settings[key] for key in ("method", "size", "gap"))
    head.suptitle(
        f"{_printable(str(store.path), 80)}: {len(store)} pairs of {len(store.sources)} videos; "
        f"{method}, size {size}, gap {gap if gap == 'auto' else f'{gap:g} s'}",
        parse_math=False,
    )
    body.suptitle("first frame | flow to the second | magenta: flow not valid", fontsize=9)
    axes = body.subplots(rows, 6, squeeze=False).reshape(-1, 3)
    for axis in axes.ravel():
        axis.axis("off")
    for sample, (left, middle, right) in zip(samples, axes, strict=False):
        lengths, meta = _lengths(sample), sample.meta
        full = max(float(np.percentile(lengths, 99)), 0.1)
        grey = cv2.cvtColor(cv2.cvtColor(sample.frame, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        grey[~sample.valid] = _INVALID
        left.imshow(sample.frame)
        middle.imshow(flow_to_rgb(sample.flow, full))
        right.imshow(grey)
        middle.set_title(
            f"{_printable(meta['video'], 34)}  {meta['time']:.2f} s + {meta['gap']:.2f} s   "
            f"median {np.median(lengths):.1f} px, full colour {full:.1f} px, "
            f"valid {sample.valid.mean():.0%}",
            fontsize=8,
            parse_math=False,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a video's name in any script
        figure.savefig(out, format="png", metadata={"Software": None})


def _draw_wheel(axis: Any) -> None:  # noqa: ANN401
    grid = np.linspace(-1.1, 1.1, 301, dtype=np.float32)
    flow = np.stack(np.meshgrid(grid, grid), axis=-1)  # (301, 301, 2), x right, y down
    picture = flow_to_rgb(flow, 1.0)
    picture[np.linalg.norm(flow, axis=-1) > 1] = 255
    axis.imshow(picture, extent=(-1.1, 1.1, 1.1, -1.1))
    axis.set_title("direction of motion; radius = the pair's full colour", fontsize=9)
    axis.set_xticks([-1, 0, 1], ["left", "0", "right"])
    axis.set_yticks([-1, 0, 1], ["up", "0", "down"])
    axis.spines[:].set_visible(False)


def _draw_histogram(axis: Any, store: FlowStore) -> None:  # noqa: ANN401
    chosen = spread_pairs(store.source_numbers, _HISTOGRAM_PAIRS)
    lengths = [_lengths(store[number]) for number in chosen]
    lengths = [length[:: max(1, len(length) // 5000)] for length in lengths]
    # Each pair counts the same, whatever its size.
    every = np.concatenate(lengths)
    weights = np.concatenate([np.full(len(length), 100 / len(length)) for length in lengths])
    edges = [0, *_BINS[1:-1], np.inf]
    shares = np.histogram(every, edges, weights=weights / len(chosen))[0]
    axis.stairs(shares, _BINS, fill=True, color="0.6")
    for share, style in ((50, "-"), (95, "--")):
        value = float(np.percentile(every, share))
        label = f"{share} % below {value:.2g} px"
        axis.axvline(max(value, _BINS[0]), color="C3", linestyle=style, label=label)
    axis.legend(loc="upper right", fontsize=8)
    axis.set_xscale("log", base=2)
    axis.set_xlim(_BINS[0], max(64.0, 2 * float(every.max())))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("length of the motion in pixels (first bar: and below)", fontsize=9)
    axis.set_ylabel("% of valid pixels", fontsize=9)
    axis.set_title(f"motion in {len(chosen)} of {len(store)} pairs", fontsize=9)


def _lengths(sample: Sample) -> NDArray[np.float32]:
    """Lengths of the vectors that can be relied on, (N,), N > 0."""
    length: NDArray[np.float32] = np.linalg.norm(sample.flow, axis=-1)
    return length[sample.valid] if sample.valid.any() else np.zeros(1, np.float32)


def _printable(name: str, longest: int) -> str:
    clean = "".join(c if c.isprintable() else "?" for c in name)
    return clean if len(clean) <= longest else "…" + clean[1 - longest :]


@dataclass
class ShowFlowCommand:
    """Draw pairs of a store with their flow, the colour wheel, and a histogram of the motion."""

    store: tyro.conf.Positional[Path]
    """Folder of the store."""
    out: Path = Path("flow_sheet.png")
    """The picture (PNG)."""
    count: int = 12
    """Number of pairs, spread over the videos."""


def show_flow_command(argv: Sequence[str]) -> int:
    """Run `ssl-flow show flow`; returns the exit code: 0, or 2 if the store cannot be shown."""
    command = tyro.cli(ShowFlowCommand, args=list(argv), prog="ssl-flow show flow")
    try:
        show_flow(FlowStore(command.store), command.out, command.count)
    except (ValueError, OSError, ImportError) as error:
        print(f"ssl-flow show flow: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {command.out}")
    return 0
