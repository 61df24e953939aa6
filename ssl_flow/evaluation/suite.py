"""A suite: protocols x labelled data x encoders x seeds.

All input is checked first. Each (protocol, data, encoder, seed) is a cell; finished cells lie in
OUT/cells and are not computed again by the next call, whatever ended this one (`outcome.py`).
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from ssl_flow.evaluation.feature_cache import encoder_digest
from ssl_flow.evaluation.loc2vec import check_tile, load_judged
from ssl_flow.evaluation.outcome import Outcome, Settings, cell_path, load_cell, save_cell
from ssl_flow.evaluation.pixel_features import check_features, estimate_on
from ssl_flow.evaluation.protocols import (
    PROTOCOLS,
    Data,
    check_installed,
    fits,
    open_data,
    run_protocol,
)
from ssl_flow.models import WeightsError, load_encoder, pick_device


@dataclass
class Options:
    """What all evaluation commands take."""

    encoders: Annotated[list[str], tyro.conf.arg(aliases=["--encoder"])]
    """One row each, of FOLDER, timm:NAME, torchvision:NAME, random:NAME, handmade,
    python:MODULE:FUNCTION; for maps FOLDER, random:NAME, histograms. NAME=SPEC names
    the row. A comma-joined list of encoders of one method (its pretraining seeds)
    becomes one row with their mean and spread."""
    data: list[str]
    """One or several of camvid:PATH, voc:PATH, cityscapes:PATH, ade20k:PATH, davis:PATH,
    cocostuff:PATH, folder:PATH, synthetic, davis2016:PATH, imagefolder:PATH,
    middlebury:PATH, map:PATH. Each goes to the protocols that take it."""
    out: Path
    """Folder for report.html, results.json, results.csv, results.md and cells/."""
    seeds: int = 1
    """Runs per encoder: initialisations for random:NAME, else seeds of the protocol
    (one run where it draws nothing). A comma-joined list has one a member."""
    batchnorm_images: int = 64
    """Images that give random encoders their BatchNorm statistics."""
    cache: Path | None = None
    """Folder that keeps the features for linear-probe on the disk (float16) for further
    seeds and calls; camvid with a ResNet-18: 4 GB. By default none are kept."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    json: bool = False
    """Print results.json instead of the table."""


@dataclass
class Cell:
    """One number to be: a protocol on a set with an encoder and a seed."""

    data: Data
    settings: Settings
    label: str
    spec: str
    seed: int
    about: dict[str, Any]
    path: Path
    outcome: Outcome | None = None
    error: str = ""


def plan(options: Options, settings: dict[str, Settings]) -> list[Cell]:
    """All cells, with the outcomes that are there already; makes the output folder.

    Loads every encoder once and opens all data; raises ValueError, OSError, ImportError or
    WeightsError for what could be wrong with the input.
    """
    if not (options.encoders and options.data and settings):
        raise ValueError("give at least one encoder, one data set and one protocol")
    for key in ("seeds", "batchnorm_images"):
        if getattr(options, key) < 1:
            raise ValueError(f"{key} = {getattr(options, key)}, expected 1 or more")
    check_installed(settings)
    pick_device(options.device)
    sets = _open_all(options.data, settings)
    rows = [parse_row(text, options.seeds) for text in options.encoders]
    if len(dict(rows)) < len(rows):
        raise ValueError(f"two encoders of the same name: {', '.join(options.encoders)}")
    runs = [(label, *run) for label, part in rows for run in part]
    digests = {run: _check_encoder(*run, settings, sets) for run in {r[1:]: 0 for r in runs}}
    folder = options.out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    cells: dict[tuple[str, Path], Cell] = {}
    for data, (label, spec, seed), protocol in itertools.product(sets, runs, settings.values()):
        entry = PROTOCOLS[protocol.name]
        about = {
            "protocol": protocol.describe(),
            "data": data.digest,
            "encoder": digests[spec, seed],
            "seed": seed if entry.seeded else 0,  # so that seeds may make one cell
            "batchnorm_images": options.batchnorm_images * spec.startswith("random:"),
            "float16": entry.cached and options.cache is not None,
        }
        path = cell_path(folder, about)
        if entry.kind == data.kind and (label, path) not in cells:
            found = load_cell(path)
            cells[label, path] = Cell(data, protocol, label, spec, seed, about, path, found)
    return list(cells.values())


def _open_all(specs: Sequence[str], settings: dict[str, Settings]) -> list[Data]:
    kinds = {name: PROTOCOLS[name].kind for name in settings}
    wanted = dict.fromkeys((k, s) for s in specs for k in kinds.values() if fits(k, s))
    sets = [open_data(kind, spec) for kind, spec in wanted]  # first: names what is unknown
    for spec in specs:
        if spec not in {s for _, s in wanted}:
            raise ValueError(f"{spec}: none of the protocols {', '.join(settings)} takes such data")
    for name, kind in kinds.items():
        if kind not in {k for k, _ in wanted}:
            raise ValueError(f"{name} takes {kind}; none of the data {', '.join(specs)} is such")
    if len({(d.name, d.kind) for d in sets}) < len(sets):
        raise ValueError(f"two sets of the same name: {', '.join(d.name for d in sets)}")
    return sets


def parse_row(text: str, seeds: int) -> tuple[str, list[tuple[str, int]]]:
    """`NAME=SPEC,SPEC` -> its name, and (encoder spec, seed) of every run of the row."""
    name, named, rest = text.partition("=")
    if not named or "/" in name or ":" in name:  # a folder may have = in its name
        name, rest = text, text
    specs = [part.strip() for part in rest.split(",") if part.strip()]
    if not specs:
        raise ValueError(f"empty encoder {text!r}")
    if len(specs) == 1:
        return name, [(specs[0], seed) for seed in range(seeds)]
    return name, [(s, i if s.startswith("random:") else 0) for i, s in enumerate(specs)]


def _check_encoder(
    spec: str, seed: int, settings: dict[str, Settings], sets: Sequence[Data]
) -> str:
    """The digest of an encoder that can be loaded and has the features that protocols ask for."""
    try:
        if maps := [data for data in sets if data.kind == "maps"]:
            if len(maps) < len(sets):
                raise ValueError("loc2vec judges encoders of tiles: judge others in another call")
            tile: Any = settings["loc2vec"]
            judged = [load_judged(spec, seed, *data.sets) for data in maps]
            for each in judged:
                check_tile(each, tile)
            return encoder_digest(judged[0])
        encoder = load_encoder(spec, seed=seed)
        for protocol in settings.values():
            if features := getattr(protocol, "features", None):
                check_features(encoder, features)
        return encoder_digest(encoder)
    except (WeightsError, ValueError) as error:
        raise ValueError(f"encoder {spec}: {error}") from error


def run_cells(cells: Sequence[Cell], options: Options) -> None:
    """Compute the cells that have no outcome, write each; a failing one gets its `error`."""
    missing = [cell for cell in cells if cell.outcome is None]
    say = partial(print, file=sys.stderr, flush=True)
    if len(missing) < len(cells):
        say(f"{len(cells) - len(missing)} of {len(cells)} cells are there already")
    encoder: Any = None
    ready, begun = None, time.perf_counter()
    for number, cell in enumerate(missing, start=1):
        spec = "" if cell.spec == cell.label else f"{cell.spec}, "
        name = f"{cell.data.name} {cell.settings.name} {cell.label} ({spec}seed {cell.seed})"
        start = time.perf_counter()
        try:
            if (cell.spec, cell.seed, cell.data) != ready:
                encoder, ready = prepared(cell, options), (cell.spec, cell.seed, cell.data)
            outcome = run_protocol(cell.settings, encoder, cell.data, cell.seed, options.cache)
            save_cell(cell.path, outcome, cell.about)
            cell.outcome = load_cell(cell.path)  # smaller, and the same as in a later call
            score, value = next(iter(outcome.scores.items()))
            said = f"{score} {value:.4f}"
        except Exception as error:  # one cell must not cost the others
            cell.error = f"{type(error).__name__}: {error}"
            said = f"failed: {cell.error}"
        now = time.perf_counter()
        left = (now - begun) / number * (len(missing) - number) / 60
        said = f"{said} in {now - start:.0f} s; about {left:.1f} min left"
        say(f"[{number}/{len(missing)}] {name}: {said}")


def prepared(cell: Cell, options: Options) -> Any:  # noqa: ANN401
    """The cell's encoder on its device; a random one with BatchNorm statistics of the data."""
    if cell.data.kind == "maps":
        return load_judged(cell.spec, cell.seed, *cell.data.sets).to(pick_device(options.device))
    encoder: Any = load_encoder(cell.spec, seed=cell.seed).to(pick_device(options.device))
    if cell.about["batchnorm_images"]:
        estimate_on(encoder, cell.data.seen, cell.about["batchnorm_images"])
    return encoder
