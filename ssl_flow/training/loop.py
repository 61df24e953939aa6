"""Pretraining, top to bottom: videos' flow, or a map -> an embedding -> an encoder with a score.

    python train.py                         # preset quickstart: synthetic videos, minutes on a CPU
    python train.py small --data.store STORE --evaluation.data camvid:PATH
    python train.py --resume runs/NAME      # go on with an interrupted run
    python train.py --resume runs/NAME --train.steps 2000               # make a run longer
    torchrun --nproc-per-node 8 train.py multi_gpu --data.store STORE   # one process a GPU
    python train.py loc2vec --data.store map:PATH                       # places of a map (Loc2Vec)

What is learned from decides the batch, the loss, what is measured and the picture: `FlowTask` and
`TileTask` have the same methods. One run folder holds everything: config.yaml, metrics.jsonl,
tensorboard/, checkpoints/ (to resume), encoder/ (to import), pictures/, results.json, report.html.
"""

from __future__ import annotations

import copy
import math
import time
from contextlib import closing, nullcontext
from dataclasses import asdict
from operator import mul
from pathlib import Path
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ssl_flow.config import Config, save_config
from ssl_flow.evaluation.pixel_features import frozen
from ssl_flow.models import Encoder, TileEncoder
from ssl_flow.models.encoder import Normalization
from ssl_flow.training.batches import crop_side, make_loader, reading
from ssl_flow.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from ssl_flow.training.distributed import World, join_world
from ssl_flow.training.flow_task import FlowTask
from ssl_flow.training.initial import checkpoint_activations, try_step
from ssl_flow.training.monitors import Metrics
from ssl_flow.training.run_folder import check_same_run, new_run_folder
from ssl_flow.training.safety import (
    PATIENCE,
    Interrupted,
    StopSignals,
    check_collapse,
    explain_out_of_memory,
    save_bad_batch,
)
from ssl_flow.training.score import online_probe, score_run
from ssl_flow.training.step import (
    Shadow,
    amp_type,
    learning_rate,
    make_optimizer,
    step_seed,
    take_step,
    update_average,
)
from ssl_flow.training.tile_task import TileTask


def pretrain(config: Config, resume: Path | None = None) -> Path:
    """Run the whole job and return the run folder.

    Args:
        config: every knob; see `ssl_flow.config`.
        resume: a run folder to go on with; `config` must be that of its config.yaml, but for a
            larger `train.steps`: then the schedules (learning rate, crop side) are those of the new
            length, from the step at which the run is.

    Raises:
        ValueError, FileNotFoundError: bad configuration, store or labelled data, before any work.
        FloatingPointError: the loss stayed non-finite.
        CollapseError: the embedding has become the same everywhere.
        MemoryAdvice: out of memory, with the knobs that help.
        Interrupted: by a signal; a checkpoint is saved.
    """
    if resume is not None:
        check_same_run(config, resume)
    with explain_out_of_memory(config):
        with join_world(config.device) as world:
            score = score_run(config, world.device)  # checks the labelled data, probes at the end
            task: Any = (TileTask if config.data.store.startswith("map:") else FlowTask)(config)
            run, judged = _train(config, task, resume, world)
        if world.is_main:
            task.save(judged, run / "encoder")
            score(judged, run)
    return run


def _train(
    config: Config,
    task: Any,  # noqa: ANN401 (FlowTask or TileTask)
    resume: Path | None,
    world: World,
) -> tuple[Path, Encoder | TileEncoder]:
    """The run folder and, in process 0, the encoder to keep: with `train.ema` the averaged one."""
    # 1. What can be refused is refused now.
    device, train, share = world.device, config.train, _share(config, world)
    probe = online_probe(config)
    torch.manual_seed(config.seed)
    fresh = not (resume and has_checkpoint(resume))
    encoder = task.encoder(config.model.init_from if fresh else "")
    encoder.to(device=device, memory_format=torch.channels_last)
    objective = task.objective(encoder, amp_type(config, device))
    sides = {config.data.start_crop or config.data.crop, config.data.crop}
    trials = [task.trial(share // train.accumulate, side, device) for side in sides]
    if train.checkpoint_activations:
        image = task.trial(1, config.data.crop, device)[0]
        checkpoint_activations(encoder, image.reshape(-1, *image.shape[-3:]))
    try_step(config, objective, trials)

    # 2. The run folder, the data.
    run = world.from_main(lambda: resume or new_run_folder(config))
    if world.is_main:
        print(f"run folder: {run}", flush=True)
        save_config(config, run / "config.yaml")
    what = world.from_main(lambda: task.prepare(run))
    examples = task.examples(run)

    # 3. The state of the run: all that a checkpoint holds.
    optimizer = make_optimizer(config, objective)
    scaler = torch.amp.GradScaler(device.type, enabled=objective.amp_type == torch.float16)
    parts = {"encoder": encoder, "optimizer": optimizer, "scaler": scaler}
    if (deep := getattr(objective, "deep", None)) is not None:
        parts["deep"] = deep
    judged = encoder
    if train.ema and world.is_main:
        judged = parts["average"] = copy.deepcopy(encoder).eval().requires_grad_(False)
    progress = load_checkpoint(run, parts)
    if progress.normalization:
        encoder.normalization = judged.normalization = Normalization(**progress.normalization)
    progress.normalization = asdict(encoder.normalization)
    # A checkpoint brings its own, config.yaml may have been edited.
    for group, decay in zip(optimizer.param_groups, (train.weight_decay, 0.0), strict=True):
        group["weight_decay"] = decay

    # 4. The same module, faster.
    if world.size > 1 and train.sync_batchnorm:
        convert_sync_batchnorm(objective)  # the same parameters, in place
    objective.train()
    if train.compile:
        encoder.compile()
    module: nn.Module = objective
    if world.size > 1:
        module = DistributedDataParallel(objective, [device] if device.type == "cuda" else None)
    buffers = Shadow(objective.buffers())
    average = Shadow(encoder.state_dict().values(), judged.state_dict().values())

    shown = task.collate([examples[k] for k in range(min(8, train.batch_size))])
    if world.is_main:
        print(
            f"{what}, {train.steps} steps of {train.batch_size} crops of "
            f"{config.data.crop} px, {config.model.backbone} on {world.size} x {device}, "
            f"autocast {objective.amp_type or 'off'}",
            flush=True,
        )

    loader = make_loader(config, examples, task.collate, world, progress.step)
    bar = tqdm(
        range(progress.step, train.steps),
        initial=progress.step,
        total=train.steps,
        disable=not world.is_main,
    )
    metrics = Metrics(run, progress.step) if world.is_main else None
    logs = closing(metrics) if metrics else nullcontext()
    with StopSignals() as stop, logs, reading(loader) as batches:
        waited, logged_at, logged_step = 0.0, time.perf_counter(), progress.step
        for step in bar:
            # Dropout and the like depend on (seed, step, process): nothing to save or to disturb.
            torch.manual_seed(step_seed(config, step, world.rank))
            started = time.perf_counter()
            found = next(batches)
            waited += time.perf_counter() - started
            side = crop_side(config, step)
            batch = task.batch(found, side, encoder)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            result = take_step(module, batch, optimizer, scaler, train.accumulate, world, buffers)

            done = progress.step = step + 1
            last = done == train.steps
            if result.taken:
                progress.bad_in_a_row = 0
                if judged is not encoder:
                    update_average(average, train.ema, step)
            else:
                progress.skipped += 1
                # float16 overflows now and then until its scale has come down: that is no error.
                overflow = scaler.is_enabled() and math.isfinite(result.loss)
                progress.bad_in_a_row += not (overflow and scaler.get_scale() >= 1)
                if progress.bad_in_a_row == PATIENCE:
                    saved = save_bad_batch(run, world.rank, batch._asdict(), step=step)
                    raise FloatingPointError(
                        f"loss or gradient not finite {PATIENCE} times in a row up to step {step}; "
                        f"the batch is in {saved}; in {run / 'config.yaml'} lower "
                        f"train.learning_rate or set train.amp to none, then --resume {run}"
                    )

            if done % train.log_every == 0 or last:
                now = time.perf_counter()
                values = {
                    "step": done,
                    # As its bounds are.
                    "loss": result.loss - sum(map(mul, task.terms.values(), result.terms)),
                    **_means(task.measure(objective, batch, result.embedding), world),
                    **dict(zip(task.terms, result.terms, strict=True)),
                    "gradient_norm": result.gradient_norm,
                    "learning_rate": learning_rate(config, step),
                    "skipped_steps": progress.skipped,
                    "crop": side,
                    "images_per_second": (done - logged_step)
                    * train.batch_size
                    / (now - logged_at),
                    "data_wait": waited / (now - logged_at),
                }
                if "target_entropy" in values:
                    values["kl"] = values["loss"] - values["target_entropy"]
                logged_at, logged_step, waited = now, done, 0.0
                if metrics:
                    metrics.write(values)
                bar.set_postfix_str(
                    f"loss {values['loss']:.3f} (floor {values.get('target_entropy', 0.0):.3f}, "
                    f"constant {values['constant_loss']:.3f}, random {values['random_loss']:.3f}), "
                    f"effective rank {values['effective_rank']:.1f}"
                )
                if result.taken and done > train.warmup * train.steps:
                    times = progress.collapsed_in_a_row
                    progress.collapsed_in_a_row = check_collapse(values, times, run)
                excess = result.loss - values.get("target_entropy", 0.0)
                if probe is None and math.isfinite(excess):
                    progress.window.append(-excess)

            probes = probe is not None and (done % config.evaluation.every == 0 or last)
            due = done % train.checkpoint_every == 0 or probes or last
            # The weights may be what is broken: the checkpoint before is what to go back to.
            due = due and (last or not progress.bad_in_a_row)
            number = world.largest(stop.number)
            if metrics and (due or number):
                paused = time.perf_counter()
                save_checkpoint(run, progress, parts, judge=due)
                if probes and probe and (scores := probe(judged)):
                    metrics.write({"step": done, **scores})
                    progress.window = [scores["probe_miou"]]
                    save_checkpoint(run, progress, parts)  # now with its judgement
                with frozen(judged):
                    metrics.picture(done, task.sheet(judged, shown), run / "pictures")
                logged_at += time.perf_counter() - paused  # images_per_second is of the steps
            if number and not last:
                world.from_main(lambda: None)  # torchrun ends all as soon as one process ends
                raise Interrupted(number, run, done, train.steps)
    return run, judged


def _means(values: dict[str, float], world: World) -> dict[str, float]:
    """Over the processes."""
    means = world.mean(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, means.tolist(), strict=True))


def _share(config: Config, world: World) -> int:
    """Images a step in each process."""
    parts = world.size * config.train.accumulate
    if config.train.batch_size % parts:
        raise ValueError(
            f"train.batch_size is {config.train.batch_size}; expected a multiple of {parts} "
            f"({world.size} processes, train.accumulate {config.train.accumulate})"
        )
    if config.train.sync_batchnorm and world.size > 1 and world.device.type == "cpu":
        raise ValueError("train.sync_batchnorm works on GPUs only; set it to false")
    return config.train.batch_size // world.size
