"""Pretraining, top to bottom: videos' flow -> a per-pixel embedding -> an encoder with a score.

    python train.py                         # preset quickstart: synthetic videos, minutes on a CPU
    python train.py small --data.store STORE --evaluation.data camvid:PATH
    python train.py --resume runs/NAME      # go on with an interrupted run
    python train.py --resume runs/NAME --train.steps 2000               # make a run longer
    torchrun --nproc-per-node 8 train.py multi_gpu --data.store STORE   # one process a GPU

One run folder holds everything: config.yaml, metrics.jsonl, tensorboard/, checkpoints/ (to resume),
encoder/ (to import), pictures/, results.json, report.html.
"""

from __future__ import annotations

import copy
import math
import time
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ssl_flow.config import Config, save_config
from ssl_flow.data.augment import augment
from ssl_flow.data.pairs import collate
from ssl_flow.losses import CrossPixelFlowLoss
from ssl_flow.models import Encoder, create_encoder, save_encoder
from ssl_flow.models.encoder import Normalization
from ssl_flow.training.batches import (
    crop_side,
    make_batch,
    make_loader,
    make_pairs,
    open_store,
    reading,
    synthetic_store,
)
from ssl_flow.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from ssl_flow.training.distributed import World, join_world
from ssl_flow.training.initial import checkpoint_activations, initialize, try_step
from ssl_flow.training.monitors import Metrics, effective_rank, embedding_sheet
from ssl_flow.training.run_folder import check_same_run, new_run_folder
from ssl_flow.training.safety import (
    PATIENCE,
    Interrupted,
    StopSignals,
    check_collapse,
    embedding_std,
    explain_out_of_memory,
    save_bad_batch,
)
from ssl_flow.training.score import online_probe, score_run
from ssl_flow.training.step import (
    Batch,
    Shadow,
    learning_rate,
    make_objective,
    make_optimizer,
    step_seed,
    take_step,
    update_average,
)


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
            run, judged = _train(config, resume, world)
        if world.is_main:
            save_encoder(judged, run / "encoder")
            score(judged, run)
    return run


def _train(config: Config, resume: Path | None, world: World) -> tuple[Path, Encoder]:
    """The run folder and, in process 0, the encoder to keep: with `train.ema` the averaged one."""
    # 1. What can be refused is refused now.
    device, train, share = world.device, config.train, _share(config, world)
    probe = online_probe(config)
    store = None if config.data.store == "synthetic" else open_store(config.data.store)
    encoder = _encoder(config, resume, device)
    encoder.input_size = (config.data.crop, config.data.crop)
    objective = make_objective(config, encoder, device)
    loss_function, ridge_weight = objective.loss, objective.ridge_weight
    if train.checkpoint_activations:
        checkpoint_activations(encoder, config.data.crop)
    try_step(config, objective, share // train.accumulate, device)

    # 2. The run folder, the data.
    run = world.from_main(lambda: resume or new_run_folder(config))
    if world.is_main:
        print(f"run folder: {run}", flush=True)
        save_config(config, run / "config.yaml")
    if store is None:
        store = open_store(world.from_main(lambda: synthetic_store(config, run / "flow")))
    pairs = make_pairs(config, store)

    # 3. The state of the run: all that a checkpoint holds.
    optimizer = make_optimizer(config, objective)
    scaler = torch.amp.GradScaler(device.type, enabled=objective.amp_type == torch.float16)
    parts = {"encoder": encoder, "loss": loss_function, "optimizer": optimizer, "scaler": scaler}
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
        convert_sync_batchnorm(encoder)  # the same parameters, in place
    encoder.train()
    if train.compile:
        encoder.compile()
    module: nn.Module = objective
    if world.size > 1:
        module = DistributedDataParallel(objective, [device] if device.type == "cuda" else None)
    buffers = Shadow(objective.buffers())
    average = Shadow(encoder.state_dict().values(), judged.state_dict().values())

    shown = collate([pairs[k] for k in range(min(8, train.batch_size))])
    still = augment(shown.to(device), (config.data.crop, config.data.crop))
    if world.is_main:
        print(
            f"{len(store)} pairs, {train.steps} steps of {train.batch_size} crops of "
            f"{config.data.crop} px, {config.model.backbone} on {world.size} x {device}, "
            f"autocast {objective.amp_type or 'off'}",
            flush=True,
        )

    loader = make_loader(config, pairs, world, progress.step)
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
            windows = next(batches)
            waited += time.perf_counter() - started
            side = crop_side(config, step)
            batch = make_batch(windows, side, encoder, config)
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
                    "loss": result.loss - ridge_weight * result.ridge,  # as its bounds are
                    **_measure(loss_function, batch, result.embedding, world),
                    "scale": float(torch.as_tensor(loss_function.scale).detach()),
                    "gradient_norm": result.gradient_norm,
                    "learning_rate": learning_rate(config, step),
                    "skipped_steps": progress.skipped,
                    "crop": side,
                    "images_per_second": (done - logged_step)
                    * train.batch_size
                    / (now - logged_at),
                    "data_wait": waited / (now - logged_at),
                }
                if ridge_weight:
                    values["ridge"] = result.ridge
                if "target_entropy" in values:
                    values["kl"] = values["loss"] - values["target_entropy"]
                logged_at, logged_step, waited = now, done, 0.0
                if metrics:
                    metrics.write(values)
                bar.set_postfix_str(
                    f"loss {values['loss']:.3f} (floor {values.get('target_entropy', 0.0):.3f}, "
                    f"constant {values['constant_loss']:.3f}, random {values['random_loss']:.3f})"
                )
                if result.taken and done > train.warmup * train.steps:
                    times = progress.collapsed_in_a_row
                    progress.collapsed_in_a_row = check_collapse(values, times, run)
                excess = values.get("kl", values["loss"]) + ridge_weight * result.ridge
                if probe is None and math.isfinite(excess):
                    progress.window.append(-excess)

            probes = probe is not None and (done % config.evaluation.every == 0 or last)
            due = done % train.checkpoint_every == 0 or probes or last
            number = world.largest(stop.number)
            if metrics and (due or number):
                paused = time.perf_counter()
                save_checkpoint(run, progress, parts, judge=due)
                if probes and probe and (scores := probe(judged)):
                    metrics.write({"step": done, **scores})
                    progress.window = [scores["probe_miou"]]
                    save_checkpoint(run, progress, parts)  # now with its judgement
                metrics.picture(done, embedding_sheet(judged, still), run / "pictures")
                logged_at += time.perf_counter() - paused  # images_per_second is of the steps
            if number and not last:
                world.from_main(lambda: None)  # torchrun ends all as soon as one process ends
                raise Interrupted(number, run, done, train.steps)
    return run, judged


@torch.no_grad()
def _measure(
    loss_function: CrossPixelFlowLoss, batch: Batch, embedding: Tensor, world: World
) -> dict[str, float]:
    """What to read the loss against, and whether the embedding lives; means over the processes.

    A constant embedding and one random one above, the target's entropy below.
    """
    _, flow, weight = batch
    embedding = embedding.nan_to_num()  # eigenvalues of NaN raise; the loss tells of it
    noise = torch.Generator().manual_seed(0)
    random = torch.randn(1, *embedding.shape[1:], generator=noise).to(flow).expand_as(embedding)
    values = {
        "constant_loss": loss_function.constant_loss(flow, weight).mean(),
        "random_loss": loss_function(random, flow, weight),
        "effective_rank": effective_rank(embedding),
        "embedding_std": embedding_std(embedding),
    }
    if loss_function.objective == "cross_entropy":
        entropy = loss_function.target_entropy(flow, weight)
        values["target_entropy"] = entropy.mean()
        values["effective_neighbours"] = entropy.exp().mean()
    means = world.mean(torch.tensor([float(v) for v in values.values()], dtype=torch.float64))
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


def _encoder(config: Config, resume: Path | None, device: torch.device) -> Encoder:
    torch.manual_seed(config.seed)
    model = config.model
    encoder = create_encoder(model.backbone, model.embedding_dim, model.hidden_dim)
    if model.init_from and not (resume and has_checkpoint(resume)):
        print(initialize(encoder, model.init_from), flush=True)
    encoder.to(memory_format=torch.channels_last)
    return encoder.to(device=device)
