"""The score at the end of a run: a linear probe of the new encoder and of random ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch

from ssl_flow.config import Config
from ssl_flow.data.segmentation import SegmentationSet, open_segmentation
from ssl_flow.evaluation import LinearProbe, run_linear_probe
from ssl_flow.evaluation.pictures import prediction_strips
from ssl_flow.evaluation.pixel_features import estimate_on, spread
from ssl_flow.evaluation.report import write_report
from ssl_flow.flow.shard import write_atomically
from ssl_flow.models import Encoder, TileEncoder, load_encoder

_ONLINE = LinearProbe(pixels_per_image=256, batch_pixels=2048, steps=100)


def online_probe(config: Config) -> Callable[[Encoder], dict[str, float]] | None:
    """A short linear probe on a part of the labelled images, to follow a run with.

    It leaves the encoder, BatchNorm and the global random state as they are; where it cannot be
    fitted (features that are not finite) it prints why and gives no numbers. None when it is off
    (`evaluation.every`, `evaluation.data`).
    """
    spec = config.evaluation.data
    if not config.evaluation.every or spec == "none" or config.data.store.startswith("map:"):
        return None
    train = _spread(open_segmentation(spec, "train"), 64)
    test = _spread(open_segmentation(spec, "test"), 32)

    def probe(encoder: Encoder) -> dict[str, float]:
        try:
            result = run_linear_probe(encoder, train, test, _ONLINE)
        except ValueError as error:
            print(f"online probe left out: {error}", flush=True)
            return {}
        return {f"probe_{name}": value for name, value in result.scores.items()}

    return probe


def _spread(full: SegmentationSet, count: int) -> SegmentationSet:
    """At most `count` images of a set, evenly spread."""
    chosen = spread(len(full), count)
    names = [full.names[i] for i in chosen]
    return replace(full, names=names, load=lambda index: full.load(chosen[index]))


def score_run(config: Config, device: torch.device) -> Callable[[Any, Path], None]:
    """Open the labelled data now, so that a bad path fails before the training; score later.

    Returns:
        A function of (encoder, run folder) that writes results.json, pictures/ and report.html
        and prints the table.

    Raises:
        ValueError, FileNotFoundError: `evaluation.data` cannot be used.
        ImportError: what judges it is not installed.
    """
    spec, sets = config.evaluation.data, None
    on_map = config.data.store.startswith("map:")
    if spec != "none" and on_map != spec.startswith("map:"):
        raise ValueError(
            f"evaluation.data {spec} does not fit data.store {config.data.store}: a map is judged "
            "on map:PATH or not at all (none)"
        )
    if on_map:
        if spec != "none":
            from ssl_flow.evaluation.protocols import check_installed

            check_installed(["loc2vec"])
        return partial(_score_map, config)
    if spec != "none":
        sets = open_segmentation(spec, "train"), open_segmentation(spec, "test")

    def score(encoder: Encoder, run: Path) -> None:
        results: dict[str, Any] = {}
        if sets is not None:
            results["linear_probe"] = probe(encoder, run)
        text = json.dumps(results, indent=2) + "\n"
        write_atomically(run / "results.json", text.encode())
        write_report(run)

    def probe(encoder: Encoder, run: Path) -> dict[str, Any]:
        assert sets is not None
        protocol = LinearProbe()
        table: dict[str, Any] = {
            "data": sets[1].protocol,
            "train_data": sets[0].protocol,
            "protocol": asdict(protocol),
        }
        (run / "pictures").mkdir(exist_ok=True)
        counts = f"{len(sets[0])} images to fit, {len(sets[1])} to score"
        print(f"\nlinear probe on {sets[1].name}: {counts}")
        rows = [f"{'encoder':<12} {'mIoU':>8} {'pixel accuracy':>15}"]
        for name in ("pretrained", "random"):
            probed = encoder
            if name == "random":
                probed = load_encoder(f"random:{config.model.backbone}", 0).to(device)
                estimate_on(probed, sets[0], 64)
            result = run_linear_probe(probed, *sets, protocol, 0)
            miou, accuracy = result.scores.values()
            rows.append(f"{name:<12} {miou:>8.4f} {accuracy:>15.4f}")
            table[name] = {
                "miou": miou,
                "pixel_accuracy": accuracy,
                "per_class": result.per_class,
                "runs": [result.as_dict()],
            }
            strips = prediction_strips(result.examples, len(sets[1].classes))
            cv2.imwrite(str(run / "pictures" / f"probe_{name}.png"), strips[..., ::-1])
        print("\n".join(rows), flush=True)
        return table

    return score


def _score_map(config: Config, encoder: TileEncoder, run: Path) -> None:
    """Judge an encoder of tiles as `ssl-flow eval loc2vec` does, into RUN/loc2vec/."""
    results: dict[str, Any] = {}
    if config.evaluation.data != "none":
        from ssl_flow.evaluation.suite_command import eval_command

        words = ["loc2vec", "--encoders", f"trained={run}", f"random:{config.model.backbone}"]
        words += ["histograms", "--data", config.evaluation.data, "--out", str(run / "loc2vec")]
        words += ["--metres", str(config.data.metres), "--pixels", str(config.data.crop)]
        words += ["--device", config.device]
        if eval_command(words) == 0:
            found = json.loads((run / "loc2vec" / "results.json").read_text())
            results["loc2vec"] = found["tables"]
    write_atomically(run / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    write_report(run)
