"""Videos without labels -> optical flow -> an encoder, its pictures and its score.

    python examples/own_videos.py                              # built-in synthetic videos, minutes
    python examples/own_videos.py VIDEOS_OR_FOLDERS --size 256 --crop 192 --steps 1700 \\
        --labelled camvid:PATH

The same from the command line: ssl-flow flow, ssl-flow train, ssl-flow show run.
"""

import argparse
import json
from pathlib import Path

from ssl_flow.config import Config, DataConfig, EvaluationConfig, ModelConfig, TrainConfig
from ssl_flow.data.synthetic import synthetic_sources
from ssl_flow.flow import FlowStore, extract, find_sources
from ssl_flow.training import pretrain

parser = argparse.ArgumentParser(description="Pretrain an encoder on videos without labels.")
parser.add_argument("videos", nargs="*", type=Path, help="files, folders; none: 100 synthetic ones")
parser.add_argument("--out", type=Path, default=Path("runs/own_videos"))
parser.add_argument("--size", type=int, default=128, help="shorter side of the stored frames")
parser.add_argument("--backbone", default="resnet18", help="any timm model")
parser.add_argument("--crop", type=int, default=128, help="side of the training crops")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--labelled", default="", help="data for the score: camvid:PATH, ...")


def main() -> None:
    """Three steps: flow, training, a look at what came out."""
    args = parser.parse_args()

    # 1. Flow of pairs of frames, once; a second call goes on where the first was stopped.
    sources, bad = find_sources(args.videos) if args.videos else (synthetic_sources(100, 0), [])
    store = args.out / "flow_store"
    summary = extract(sources, store, size=args.size, workers=2, problems=bad, progress=True)
    print(f"{len(FlowStore(store))} pairs; left out: {dict(summary.skipped)}")
    for problem in summary.problems:
        print(f"not usable: {problem.source}: {problem.reason}")

    # 2. Training. Config holds every knob, with what it is for: ssl_flow/config.py.
    labelled = args.labelled or ("none" if args.videos else "synthetic")
    config = Config(
        data=DataConfig(store=str(store), crop=args.crop),
        model=ModelConfig(backbone=args.backbone),
        train=TrainConfig(steps=args.steps),
        evaluation=EvaluationConfig(data=labelled),
        out=str(args.out),
    )
    run = pretrain(config)

    # 3. The score beside a random encoder's, and where to look. `report.html` has it all.
    for name, row in json.loads((run / "results.json").read_text()).get("linear_probe", {}).items():
        if name in ("pretrained", "random"):
            print(f"linear probe, {name}: mIoU {row['miou']:.3f}")
    print(f"curves and pictures: {run / 'report.html'}\nencoder: {run / 'encoder'}")


if __name__ == "__main__":  # worker processes import this file again
    main()
