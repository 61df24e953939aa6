"""One row of docs/experiments.md: pretrain with one factor changed, probe on a part of the data.

    python benchmarks/screen.py --store STORE --davis DAVIS --camvid CAMVID --out screen \
        --name kta --loss.objective kernel_alignment
    python benchmarks/screen.py ... --encoder runs/NAME      # probe only; random:resnet18 too

Quick on purpose, to compare settings with each other: every third training image of DAVIS, every
second of CamVid, every third test image, features in bfloat16 where the machine has it. So its
figures are not those of `ssl-flow eval linear-probe`. Appends a line to OUT/screen.jsonl and prints
all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from ssl_flow.config import Config, DataConfig, EvaluationConfig, TrainConfig, save_config
from ssl_flow.data.segmentation import SegmentationSet, open_segmentation
from ssl_flow.evaluation import LinearProbe, run_linear_probe
from ssl_flow.evaluation.pixel_features import estimate_on
from ssl_flow.models import Encoder, load_encoder
from ssl_flow.training import train_command

PROTOCOL = LinearProbe(steps=1000, lr=3e-3, batch_pixels=2048)


def part(spec: str, split: str, step: int) -> SegmentationSet:
    """Every `step`-th image of a split."""
    whole = open_segmentation(spec, split)
    return SegmentationSet(
        whole.name, whole.classes, whole.names[::step], lambda i: whole.load(i * step)
    )


def in_bfloat16(encoder: Encoder) -> None:
    """Compute the encoder's features under autocast."""
    features = encoder.features

    def autocast(images: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16):
            return features(images)

    encoder.features = autocast  # type: ignore[method-assign]


def main() -> None:
    """Train (unless --encoder), probe, append, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("store", "davis", "camvid", "out", "name"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--encoder", help="probe this one instead of training")
    parser.add_argument("--encoder-seed", type=int, default=0, help="for random:NAME")
    known, overrides = parser.parse_known_args()
    out = Path(known.out)
    spec, started = known.encoder, time.perf_counter()
    if spec is None:
        runs = out / "runs" / known.name
        base = Config(
            data=DataConfig(store=known.store, crop=128, min_scale=0.3),
            train=TrainConfig(steps=700, batch_size=16),
            evaluation=EvaluationConfig(data="none"),
            out=str(runs),
        )
        out.mkdir(parents=True, exist_ok=True)
        save_config(base, out / "base.yaml")
        if train_command([str(out / "base.yaml"), *overrides]):
            raise SystemExit("training failed")
        spec = str(max(runs.iterdir()))
    row = {"name": known.name, "changed": " ".join(overrides)}
    row["train_minutes"] = round((time.perf_counter() - started) / 60, 1)
    for data, step in ((f"davis:{known.davis}", 3), (f"camvid:{known.camvid}", 2)):
        train_set, test_set = part(data, "train", step), part(data, "test", 3)
        encoder = load_encoder(spec, known.encoder_seed)
        if spec.startswith("random:"):
            estimate_on(encoder, train_set, 64)
        if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
            in_bfloat16(encoder)
        result = run_linear_probe(encoder, train_set, test_set, PROTOCOL)
        davis = test_set.name == "davis"
        score = result.per_class["foreground"] if davis else result.scores["miou"]
        row["davis foreground IoU" if davis else "camvid mIoU"] = round(float(score or 0), 4)
    with (out / "screen.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    for line in (out / "screen.jsonl").read_text().splitlines():
        print(" | ".join(str(value) for value in json.loads(line).values()))


if __name__ == "__main__":
    main()
