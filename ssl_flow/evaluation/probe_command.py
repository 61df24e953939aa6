"""`ssl-flow eval linear-probe`: several encoders on several labelled sets, one table a set."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import timm
import torch
import tyro

import ssl_flow
from ssl_flow.data.segmentation import SegmentationSet, open_segmentation
from ssl_flow.evaluation.linear_probe import LinearProbe, ProbeResult, run_linear_probe
from ssl_flow.evaluation.pictures import prediction_strips
from ssl_flow.evaluation.pixel_features import (
    check_features,
    estimate_batchnorm,
    normalized_batches,
)
from ssl_flow.models import Encoder, WeightsError, load_encoder, pick_device


@dataclass
class LinearProbeCommand:
    """Score frozen encoders with a linear classifier on labelled images (dataset-level mIoU)."""

    encoder: list[str]
    """One row each: FOLDER | timm:NAME | random:NAME | torchvision:NAME | python:MODULE:FUNCTION |
    handmade, or a comma-joined list of encoders of one method (its pretraining seeds), which become
    one row with their mean and spread."""
    data: list[str]
    """camvid:PATH | davis:PATH | folder:PATH | synthetic, one or several."""
    out: Path
    """Folder for linear_probe.json, linear_probe.md and predictions/."""
    seeds: int = 1
    """Runs per encoder: initialisations for random:NAME, probe seeds for another single encoder.
    A comma-joined list has one run per member."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    json: bool = False
    """Print the JSON instead of the table."""
    probe: Annotated[LinearProbe, tyro.conf.arg(name="")] = field(default_factory=LinearProbe)


def linear_probe_command(argv: list[str]) -> int:
    """Run the command; returns the exit status (2 for bad input, told on stderr)."""
    try:
        command = tyro.cli(LinearProbeCommand, args=argv, prog="ssl-flow eval linear-probe")
        report = linear_probe_table(command)
    except (FileNotFoundError, ValueError) as error:
        print(f"linear-probe: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if command.json else markdown(report))
    return 0


def linear_probe_table(command: LinearProbeCommand) -> dict[str, Any]:
    """Run every encoder on every set; write and return what linear_probe.json holds.

    Raises:
        ValueError, FileNotFoundError: bad input; checked before the first probe, except for
            single images (named) that cannot be used.
    """
    if not (command.encoder and command.data):
        raise ValueError("give at least one encoder and one data set")
    device = pick_device(command.device)
    if command.seeds < 1:
        raise ValueError(f"seeds = {command.seeds}, expected 1 or more")
    sets = [(open_segmentation(s, "train"), open_segmentation(s, "test")) for s in command.data]
    rows = {label: _runs(label, command.seeds) for label in command.encoder}
    if len({test.name for _, test in sets}) < len(sets):
        raise ValueError(f"two sets of the same name: {', '.join(t.name for _, t in sets)}")
    for spec in dict.fromkeys(spec for runs in rows.values() for spec, _ in runs):
        try:
            check_features(load_encoder(spec), command.probe.features)
        except (WeightsError, ValueError) as error:
            raise ValueError(f"encoder {spec}: {error}") from error
    (command.out / "predictions").mkdir(parents=True, exist_ok=True)

    report: dict[str, Any] = {
        "protocol": asdict(command.probe)
        | {"classifier": "BatchNorm + 1x1 convolution, encoder frozen",
           "score": "dataset-level mIoU at full mask resolution, ignore left out"},
        "data": {s.name: {"classes": s.classes, "train": t.protocol, "test": s.protocol}
                 for t, s in sets},
        "versions": {"ssl_flow": ssl_flow.__version__, "torch": torch.__version__,
                     "timm": timm.__version__, "device": str(device)},
        "results": [],
    }  # fmt: skip
    for train_set, test_set in sets:
        for number, (label, runs) in enumerate(rows.items(), start=1):
            results, details = [], []
            for spec, seed in runs:
                encoder = load_encoder(spec, seed=seed).to(device)
                estimated = 0
                if spec.startswith("random:"):
                    estimated = estimate_on(encoder, train_set, command.probe)
                result = run_linear_probe(encoder, train_set, test_set, command.probe, seed)
                score = f"mIoU {result.miou:.4f} in {result.seconds} s"
                print(f"{test_set.name} {spec} (seed {seed}): {score}", file=sys.stderr, flush=True)
                results.append(result)
                details.append(result.as_dict() | {"encoder": spec, "batchnorm_images": estimated})
            picture = prediction_strips(results[0].examples, len(test_set.classes))
            # A list of encoders can be longer than a file name may be.
            short = _slug(label) if len(label) < 100 else f"{_slug(label[:90])}-row{number}"
            name = f"{_slug(test_set.name)}-{short}.png"
            cv2.imwrite(str(command.out / "predictions" / name), picture[..., ::-1])
            summary = summarize(results)
            report["results"].append(
                {"data": test_set.name, "encoder": label, "summary": summary, "runs": details}
            )
    (command.out / "linear_probe.json").write_text(json.dumps(report, indent=2) + "\n")
    (command.out / "linear_probe.md").write_text(markdown(report) + "\n")
    return report


def summarize(results: list[ProbeResult]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one run), min and max over runs of every score."""

    def spread(values: list[float]) -> dict[str, float | None]:
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return {"mean": float(np.mean(values)), "std": std, "min": min(values), "max": max(values)}

    per_class = {}
    for name in results[0].per_class:
        found = [value for r in results if (value := r.per_class[name]) is not None]
        per_class[name] = spread(found) if found else None
    return {
        "miou": spread([r.miou for r in results]),
        "pixel_accuracy": spread([r.pixel_accuracy for r in results]),
        "per_class": per_class,
        "runs": len(results),
    }


def markdown(report: dict[str, Any]) -> str:
    """One table a data set, the protocol below."""
    lines: list[str] = []
    columns = ["encoder", "runs", "mIoU", "min .. max", "pixel accuracy"]
    for name, data in report["data"].items():
        train, test = data["train"], data["test"]
        lines += [
            f"### {name}: trained on {train['images']} images, scored on {test['images']}", "",
            "| " + " | ".join([*columns, *data["classes"]]) + " |",
            "| --- " * (len(columns) + len(data["classes"])) + "|",
        ]  # fmt: skip
        for row in (r for r in report["results"] if r["data"] == name):
            s = row["summary"]
            # Two classes: each is a headline figure (DAVIS' foreground) and gets its spread too.
            classes = [_cell(s["per_class"][c], len(data["classes"]) <= 2) for c in data["classes"]]
            bounds = f"{s['miou']['min']:.4f} .. {s['miou']['max']:.4f}"
            cells = [row["encoder"], str(s["runs"]), _cell(s["miou"]), bounds,
                     _cell(s["pixel_accuracy"]), *classes]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", f"Split: train {train['rule']}; test {test['rule']}.", ""]
    protocol = ", ".join(f"{k} {v}" for k, v in report["protocol"].items())
    return "\n".join([*lines, f"± is the standard deviation over runs. Protocol: {protocol}."])


def _runs(label: str, seeds: int) -> list[tuple[str, int]]:
    """(encoder spec, seed) of every run of a row."""
    specs = [part.strip() for part in label.split(",") if part.strip()]
    if not specs:
        raise ValueError(f"empty encoder {label!r}")
    if len(specs) > 1:
        return [(spec, i if spec.startswith("random:") else 0) for i, spec in enumerate(specs)]
    return [(specs[0], seed) for seed in range(seeds)]


def estimate_on(encoder: Encoder, train_set: SegmentationSet, probe: LinearProbe) -> int:
    """`estimate_batchnorm` on images spread over a set's train split; the number of images."""
    count = min(probe.batchnorm_images, len(train_set))
    indices = np.linspace(0, len(train_set) - 1, count).astype(int).tolist()
    images = (train_set[i] for i in indices)
    batches = normalized_batches(encoder, images, probe.batch_images)
    return estimate_batchnorm(encoder, (batch for _, batch in batches))


def _cell(value: dict[str, float | None] | None, with_std: bool = True) -> str:
    if value is None:
        return "-"
    std = f" ± {value['std']:.4f}" if with_std and value["std"] is not None else ""
    return f"{value['mean']:.4f}{std}"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("_")
