"""Speed of a training step beside the bare backbone on random tensors, and where the time goes.

    python benchmarks/training.py                          # resnet18, 16 crops of 128 px, on a CPU
    python benchmarks/training.py --device cuda            # resnet50, 256 crops of 224 px

Four loops take turns, round by round, so that a slow spell of the machine hits all alike:
`backbone` (forward, backward, optimiser of timm's plain model), `encoder` (with head, loss a plain
sum), `step` (the training loop's own batch and take_step on the loader's batches), and
`loader` (batches alone). The same precision and memory format in all. Writes training_DEVICE.md and
training_profile_DEVICE.png into benchmarks/results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import timm
import torch
from machine import describe, footer
from torch.utils.data import DataLoader

from ssl_flow.config import Config, DataConfig, TrainConfig, load_config
from ssl_flow.data.augment import Windows
from ssl_flow.data.pairs import Window
from ssl_flow.data.synthetic import synthetic_sources
from ssl_flow.flow import extract
from ssl_flow.models import create_encoder
from ssl_flow.training.batches import make_loader, reading
from ssl_flow.training.distributed import World
from ssl_flow.training.flow_task import FlowTask
from ssl_flow.training.step import Shadow, amp_type, make_optimizer, take_step

SHARES = ["data wait", "augment", "forward", "loss", "backward", "optimizer"]


class Bench:
    """The loops, each a function that does one batch."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Build models and optimisers."""
        self.options, self.device = options, torch.device(options.device)
        self.world = World(self.device)
        preset = load_config("small")  # its head and loss are those of `default`, too
        self.config = Config(
            data=DataConfig(str(options.store), crop=options.crop, workers=options.workers),
            model=replace(preset.model, backbone=options.backbone),
            loss=preset.loss,
            train=TrainConfig(
                steps=10**6,
                batch_size=options.batch,
                learning_rate=1e-5,
                amp="bfloat16" if options.amp else "none",
            ),
        )
        channels_last = torch.channels_last
        plain = timm.create_model(options.backbone, num_classes=0)
        self.plain = plain.to(self.device, memory_format=channels_last).train()
        model = self.config.model
        encoder = create_encoder(model.backbone, model.embedding_dim, model.hidden_dim)
        self.encoder = encoder.to(self.device).to(memory_format=channels_last).train()
        self.task = FlowTask(self.config)
        self.objective = self.task.objective(self.encoder, amp_type(self.config, self.device))
        self.buffers = Shadow(self.objective.buffers())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        shape = (options.batch, 3, options.crop, options.crop)
        noise = torch.randn(shape, device=self.device)
        self.noise = noise.contiguous(memory_format=channels_last)
        self.optimizers = {
            model: make_optimizer(self.config, model) for model in (self.plain, self.encoder)
        }
        self.batches: Iterator[Windows] = iter(())
        self.times = dict.fromkeys(SHARES, 0.0)  # of all logged steps so far, seconds
        self.begun: float | None = None  # while a step is logged: when its part began
        self.encoder.register_forward_hook(lambda *_: self._done("forward"))
        self.objective.register_forward_hook(lambda *_: self._done("loss"))
        optimizer = self.optimizers[self.encoder]
        optimizer.register_step_pre_hook(lambda *_: self._done("backward"))

    def _done(self, part: str) -> None:
        if self.begun is not None:
            now = self._now()
            self.times[part] += now - self.begun
            self.begun = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.options.processor_time else time.perf_counter()

    def bare_step(self, model: torch.nn.Module) -> None:
        """A model on random tensors."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp):
            loss = model(self.noise).float().mean()
        loss.backward()
        self.optimizers[model].step()
        self.optimizers[model].zero_grad()

    def loader_step(self) -> None:
        """A batch of windows, not augmented."""
        next(self.batches)

    def loader(self) -> DataLoader[Window]:
        """What `batches` comes from."""
        pairs = self.task.examples(self.options.store)
        return make_loader(self.config, pairs, self.task.collate, self.world, 0)

    def step(self, log: bool = False) -> None:
        """What training does; `log` waits for the device after each part and adds to `times`."""
        self.begun = self._now() if log else None
        windows = next(self.batches)
        self._done("data wait")
        batch = self.task.batch(windows, self.options.crop, self.encoder)
        self._done("augment")
        optimizer = self.optimizers[self.encoder]
        take_step(self.objective, batch, optimizer, self.scaler, 1, self.world, self.buffers)
        self._done("optimizer")
        self.begun = None

    def images_per_second(self, function: Callable[[], None], batches: int) -> float:
        """Of a few batches, one after the other; of the loader always by the clock on the wall."""
        loads = function == self.loader_step
        if loads:
            for _ in range(2 * self.options.workers):  # those that lie ready come for nothing
                function()
            batches = max(batches, 4 * self.options.workers)  # the workers deliver in waves
        now = time.perf_counter if loads else self._now
        begun = now()
        for _ in range(batches):
            function()
        return batches * self.options.batch / (now() - begun)


def picture(shares: dict[str, float], title: str, path: Path) -> None:
    """One bar, cut into the parts of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.8))
    left = 0.0
    for name, share in shares.items():
        axes.barh(0, share, left=left, label=f"{name} {share:.0%}")
        left += share
    axes.set(xlim=(0, 1), yticks=[], xlabel="share of a step")
    axes.set_title(title, fontsize=9)
    axes.legend(ncols=len(shares), fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.45))
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", help="default: resnet18, on CUDA resnet50")
    parser.add_argument("--crop", type=int, help="default: 128, on CUDA 224")
    parser.add_argument("--batch", type=int, help="default: 16, on CUDA 256")
    parser.add_argument("--store", type=Path, help="default: synthetic videos, made on the spot")
    parser.add_argument("--workers", type=int, help="of the loader; default: 1, on CUDA 12")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of this process, for busy machines, with --threads 1; does not see waits for data",
    )
    amp = argparse.BooleanOptionalAction
    parser.add_argument("--amp", action=amp, help="bfloat16; default: where training takes it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=3, help="of each loop a round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    defaults = {
        "backbone": ("resnet18", "resnet50"),
        "crop": (128, 224),
        "batch": (16, 256),
        "workers": (1, 12),
    }
    for name, values in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, values[cuda])
    if options.amp is None:
        options.amp = amp_type(Config(), torch.device(options.device)) == torch.bfloat16
    if options.threads:
        torch.set_num_threads(options.threads)
    cv2.setNumThreads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        if options.store is None:
            size = 2 * options.crop if cuda else 128
            options.store = Path(scratch) / "store"
            sources = synthetic_sources(20, 0, size=size)
            extract(sources, options.store, method="farneback", size=size, gap=0.1, workers=1)
        text = measure(options)
    print(text)
    name = "cuda" if cuda else options.device
    (options.out / f"training_{name}.md").write_text(text)


def measure(options: argparse.Namespace) -> str:
    """Run the loops and return the report."""
    bench = Bench(options)
    loops: dict[str, Callable[[], None]] = {
        "backbone": partial(bench.bare_step, bench.plain),
        "encoder": partial(bench.bare_step, bench.encoder),
        "step": bench.step,
        "loader": bench.loader_step,
    }
    rates: dict[str, list[float]] = {name: [] for name in loops}
    with reading(bench.loader()) as bench.batches:
        for function in loops.values():
            bench.images_per_second(function, 2)  # warm up
        for _ in range(options.rounds):
            for name, function in loops.items():
                rates[name].append(bench.images_per_second(function, options.batches))
            for _ in range(options.batches):
                bench.step(log=True)
    lines = ["| loop | images/s | of the bare backbone (min .. max) |\n|---|---|---|"]
    for name, found in rates.items():
        ratios = [a / b for a, b in zip(found, rates["backbone"], strict=True)]
        lines.append(
            f"| {name} | {statistics.median(found):.1f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} .. {max(ratios):.2f}) |"
        )
    total = sum(bench.times.values())
    shares = {name: seconds / total for name, seconds in bench.times.items()}
    count = options.rounds * options.batches
    lines.append(
        "\nBatches lie ready when a round begins: a long run is as fast as the slower of step and "
        "loader.\n\n| part of a step | ms | share |\n|---|---|---|"
    )
    for name, share in shares.items():
        lines.append(f"| {name} | {1e3 * bench.times[name] / count:.1f} | {share:.3f} |")
    about = describe("training.py", sys.argv[1:], bench.device.type)
    title = (
        f"{options.backbone}, {options.batch} crops of {options.crop} px, "
        f"{about['machine']}, {'bfloat16 autocast' if options.amp else 'float32'}, "
        f"{options.workers} workers"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    picture(shares, title, options.out / f"training_profile_{bench.device.type}.png")
    return "\n".join(
        [
            f"{title}; medians of {options.rounds} rounds of {options.batches} batches, "
            f"{'processor' if options.processor_time else 'wall'} time.\n",
            *lines,
            f"\n{footer(about)}",
        ]
    )


if __name__ == "__main__":
    main()
