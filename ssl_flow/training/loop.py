"""Pretraining, top to bottom: videos' flow -> a per-pixel embedding -> an encoder with a score.

    python train.py                         # preset quickstart: synthetic videos, minutes on a CPU
    python train.py small --data.store STORE --evaluation.data camvid:PATH
    python train.py --resume runs/NAME      # go on with an interrupted run

One run folder holds everything: config.yaml, metrics.jsonl, tensorboard/, checkpoints/ (to resume),
encoder/ (to import), pictures/, results.json, report.html.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ssl_flow.config import Config, load_config, save_config
from ssl_flow.data.augment import augment, normalize_flow
from ssl_flow.data.pairs import FlowPairs, collate
from ssl_flow.flow import FlowStore, extract
from ssl_flow.losses import CrossPixelFlowLoss
from ssl_flow.models import Encoder, WeightsError, create_encoder, pick_device, save_encoder
from ssl_flow.training.checkpoint import load_checkpoint, save_checkpoint
from ssl_flow.training.monitors import Metrics, effective_rank, embedding_sheet
from ssl_flow.training.score import score_run

PATIENCE = 10  # non-finite steps in a row after which training stops


def pretrain(config: Config, resume: Path | None = None) -> Path:
    """Run the whole job and return the run folder.

    Args:
        config: every knob; see `ssl_flow.config`.
        resume: an interrupted run folder to go on with (its config.yaml counts, not `config`).

    Raises:
        ValueError, FileNotFoundError: bad configuration, store or labelled data, before any work.
        FloatingPointError: the loss stayed non-finite.
    """
    if resume is not None:
        config = load_config(str(resume / "config.yaml"))
    device = pick_device(config.device)
    loss_function = _loss(config).to(device)
    torch.manual_seed(config.seed)
    encoder = create_encoder(
        config.model.backbone,
        config.model.embedding_dim,
        config.model.hidden_dim,
        config.model.pretrained,
    ).to(device=device)
    encoder.to(memory_format=torch.channels_last)
    _try_step(config, encoder, device)
    score = score_run(config, device)  # checks the labelled data now, probes at the end

    store = None if config.data.store == "synthetic" else _open_store(config.data.store)
    run = resume or _new_run_folder(config)
    print(f"run folder: {run}", flush=True)
    save_config(config, run / "config.yaml")
    store = store or _synthetic_store(config, run / "flow")

    optimizer = _optimizer(config, encoder, loss_function)
    state = nn.ModuleDict({"encoder": encoder, "loss": loss_function})
    first_step = load_checkpoint(run, state, optimizer) if resume else 0
    metrics = Metrics(run, first_step)

    # Example k is the same whatever the number of workers, so a restart goes on with the next one.
    train, batch = config.train, config.train.batch_size
    pairs = FlowPairs(
        store,
        train.steps * batch,
        config.data.min_scale,
        config.data.color_jitter,
        config.seed,
    )
    loader = DataLoader(
        Subset(pairs, range(first_step * batch, len(pairs))),
        batch_size=batch,
        collate_fn=collate,
        num_workers=config.data.workers,
        pin_memory=device.type == "cuda",
        multiprocessing_context=_start_method() if config.data.workers else None,
        generator=torch.Generator(),  # the global one must not be drawn from at every start
    )
    still = augment(collate([pairs[k] for k in range(min(8, batch))]).to(device), config.data.crop)
    amp_type = _amp_type(config, device)
    print(
        f"{len(store)} pairs, {train.steps} steps of {batch} crops of {config.data.crop} px, "
        f"{config.model.backbone} on {device}, autocast {amp_type or 'off'}",
        flush=True,
    )

    encoder.train()
    skipped, bad_in_a_row = 0, 0
    waited, logged_at, logged_step = 0.0, time.perf_counter(), first_step
    batches = iter(loader)
    progress = tqdm(range(first_step, train.steps), initial=first_step, total=train.steps)
    for step in progress:
        started = time.perf_counter()
        windows = next(batches)
        waited += time.perf_counter() - started
        pair = augment(windows.to(device), config.data.crop)

        rate = train.learning_rate * _schedule(step, train.steps, train.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        images = encoder.normalize(pair.image).contiguous(memory_format=torch.channels_last)
        flow = normalize_flow(pair.flow, pair.weight, config.loss.flow_normalization)
        # BatchNorm counts a batch in the forward pass; a skipped one must not stay in it.
        buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        with torch.autocast(device.type, amp_type, enabled=amp_type is not None):
            embedding = encoder(images)
        loss = loss_function(embedding, flow, pair.weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(state.parameters(), 1.0)
        if torch.isfinite(norm) and torch.isfinite(loss):
            optimizer.step()
            bad_in_a_row = 0
        else:  # skip the step; a run of them means that something is wrong
            encoder.load_state_dict(buffers, strict=False)
            skipped += 1
            bad_in_a_row += 1
            if bad_in_a_row == PATIENCE:
                raise FloatingPointError(
                    f"loss or gradient not finite {PATIENCE} times in a row up to step {step}; "
                    f"in {run / 'config.yaml'} lower train.learning_rate or set train.amp to none, "
                    f"then --resume {run}"
                )

        done = step + 1
        if done % train.log_every == 0 or done == train.steps:
            now = time.perf_counter()
            values = {
                "step": done,
                "loss": loss.item(),
                **_bounds(loss_function, flow, pair.weight),
                "effective_rank": effective_rank(embedding),
                "scale": float(torch.as_tensor(loss_function.scale).detach()),
                "gradient_norm": norm.item(),
                "learning_rate": rate,
                "skipped_steps": skipped,
                "images_per_second": (done - logged_step) * batch / (now - logged_at),
                "data_wait": waited / (now - logged_at),
            }
            metrics.write(values)
            floor = values.get("target_entropy", 0.0)
            progress.set_postfix_str(f"loss {values['loss']:.3f} (floor {floor:.3f})")
            logged_at, logged_step, waited = now, done, 0.0
        if done % train.checkpoint_every == 0 or done == train.steps:
            save_checkpoint(run, done, state, optimizer)
            metrics.picture(done, embedding_sheet(encoder, still), run / "pictures")
    metrics.close()

    save_encoder(encoder, run / "encoder")
    score(encoder, run)
    return run


def train_command(argv: list[str]) -> int:
    """`ssl-flow train [CONFIG] [--key.subkey VALUE]... [--resume RUN]` = `python train.py ...`."""
    import tyro

    argv = [word for given in argv for word in _split_resume(given)]
    resume = None
    if "--resume" in argv:
        at = argv.index("--resume")
        if at + 1 == len(argv) or not (Path(argv[at + 1]) / "config.yaml").is_file():
            found = argv[at + 1] if at + 1 < len(argv) else "nothing"
            return _refused(f"--resume needs a run folder with a config.yaml; got {found}")
        resume = Path(argv[at + 1])
        del argv[at : at + 2]
        if argv:
            return _refused(f"a resumed run keeps its own config.yaml; drop {' '.join(argv)}")
    try:
        name = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
        config = tyro.cli(
            Config,
            args=argv,
            default=load_config(name),
            prog="ssl-flow train",
            description=f"Pretrain an encoder; defaults below are those of {name!r}. Before the "
            "options: a YAML file or a preset's name. --resume RUN goes on with a run.",
        )
        run = pretrain(config, resume)
    except (ValueError, OSError, FloatingPointError, WeightsError) as error:
        return _refused(str(error))
    print(f"encoder: {run / 'encoder'}    report: {run / 'report.html'}")
    return 0


def _split_resume(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--resume=") else [word]


def _refused(reason: str) -> int:
    print(f"train: {reason}", file=sys.stderr)
    return 2


def _start_method() -> str:
    """Not fork, which may hang beside running threads; Windows has spawn alone."""
    methods = multiprocessing.get_all_start_methods()
    return "forkserver" if "forkserver" in methods else "spawn"


def _try_step(config: Config, encoder: Encoder, device: torch.device) -> None:
    """Refuse a backbone that cannot take these crops now, not after the flow has been computed."""
    side, state = config.data.crop, copy.deepcopy(encoder.state_dict())
    try:
        encoder.train()(torch.rand(config.train.batch_size, 3, side, side, device=device))
    except Exception as error:
        raise ValueError(
            f"{config.model.backbone} cannot take {config.train.batch_size} crops of {side} px: "
            f"{error}"
        ) from error
    encoder.load_state_dict(state)  # BatchNorm has seen noise


def _amp_type(config: Config, device: torch.device) -> torch.dtype | None:
    if config.train.amp == "bfloat16":
        return torch.bfloat16
    if config.train.amp == "none":
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    # Emulated bfloat16 is slower than float32 on a CPU; only native instructions pay.
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else None


def _loss(config: Config) -> CrossPixelFlowLoss:
    options = {k: v for k, v in vars(config.loss).items() if k != "flow_normalization"}
    return CrossPixelFlowLoss(**options)


def _optimizer(config: Config, *modules: nn.Module) -> torch.optim.Optimizer:
    # Decay pulls kernels and matrices towards zero; biases, norms and the scale are left alone.
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {
            "params": [p for p in parameters if p.ndim >= 2],
            "weight_decay": config.train.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.train.learning_rate)


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then half a cosine to zero."""
    rising = warmup * steps
    if step < rising:
        return min(1.0, (step + 1) / rising)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


@torch.no_grad()
def _bounds(
    loss_function: CrossPixelFlowLoss, flow: torch.Tensor, weight: torch.Tensor
) -> dict[str, float]:
    """What to read the loss against: a constant embedding above, the target's entropy below."""
    values = {"constant_loss": loss_function.constant_loss(flow, weight).mean().item()}
    if loss_function.objective == "cross_entropy":
        entropy = loss_function.target_entropy(flow, weight)
        values["target_entropy"] = entropy.mean().item()
        values["effective_neighbours"] = entropy.exp().mean().item()
    return values


def _open_store(path: str) -> FlowStore:
    store = FlowStore(path)
    if len(store) == 0:
        raise ValueError(f"the flow store {path} holds no pairs")
    return store


def _synthetic_store(config: Config, path: Path) -> FlowStore:
    from ssl_flow.data.synthetic import synthetic_sources

    print("synthetic videos: computing optical flow from their frames", flush=True)
    sources = synthetic_sources(config.data.videos, config.seed)
    extract(sources, path, method="farneback", size=128, gap=0.1, workers=2, progress=True)
    return _open_store(str(path))


def _new_run_folder(config: Config) -> Path:
    base = Path(config.out) / time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        run = base if attempt == 0 else base.with_name(f"{base.name}-{attempt}")
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            continue
        return run
    raise FileExistsError(f"cannot make a new run folder beside {base}")
