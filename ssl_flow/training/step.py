"""One optimiser step, and what is computed with it: mixed precision, parts of a batch, averages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssl_flow.config import Config
from ssl_flow.training.distributed import World


class Step(NamedTuple):
    """What came out of a step."""

    loss: float
    """What is minimised, mean over the global batch."""
    terms: list[float]
    """The third output of the objective, in the order of the task's `terms`."""
    gradient_norm: float
    """Before clipping."""
    taken: bool
    """False: something was not finite, nothing has changed."""
    embedding: Tensor
    """Of this process's images, detached."""


class Shadow:
    """Copies that follow a module's tensors; listed once, so that a few kernels serve them all."""

    def __init__(self, live: Iterable[Tensor], own: Iterable[Tensor] | None = None) -> None:
        """`live` must be changed in place from now on; `own` are the copies, None = new ones."""
        live = [tensor.detach() for tensor in live]
        own = [tensor.clone() for tensor in live] if own is None else [t.detach() for t in own]
        self._groups: list[tuple[list[Tensor], list[Tensor]]] = []
        for floating in (True, False):  # a kernel for lists takes one type
            numbers = [i for i, tensor in enumerate(live) if tensor.is_floating_point() == floating]
            if numbers:
                self._groups.append(([own[i] for i in numbers], [live[i] for i in numbers]))

    def follow(self, share: float = 1.0) -> None:
        """own <- own + share (live - own); what is not floating-point is copied."""
        for own, live in self._groups:
            if share < 1 and own[0].is_floating_point():
                torch._foreach_lerp_(own, live, share)
            else:
                torch._foreach_copy_(own, live)

    def restore(self) -> None:
        """live <- own."""
        for own, live in self._groups:
            torch._foreach_copy_(live, own)


def take_step(
    objective: nn.Module,
    batch: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    accumulate: int,
    world: World,
    buffers: Shadow,
) -> Step:
    """Forward, backward and update; or nothing at all where a number is not finite.

    Args:
        objective: batch -> loss, embedding, (T,) further numbers; maybe in DistributedDataParallel.
        batch: this process's share of the global batch.
        optimizer: of the objective's parameters.
        scaler: for float16, else disabled.
        accumulate: parts in which the batch is computed. The loss is a mean over images, so the
            gradient is that of the whole batch (but for BatchNorm, which sees the parts). Always
            1 of a map, whose loss compares images.
        world: the processes, over which loss and gradient are averaged.
        buffers: of the objective's.
    """
    optimizer.zero_grad(set_to_none=True)
    # BatchNorm counts a batch in the forward pass; a skipped one must not stay in it.
    buffers.follow()
    losses, terms, embeddings = [], [], []
    parts = zip(*(tensor.chunk(accumulate) for tensor in batch), strict=True)
    for number, part in enumerate(parts, start=1):
        # Processes exchange gradients once a step, after the last part.
        waits: Any = objective.no_sync if hasattr(objective, "no_sync") else nullcontext
        with waits() if number < accumulate else nullcontext():
            loss, embedding, others = objective(*part)
            scaler.scale(loss / accumulate).backward()
        losses.append(loss.detach())
        terms.append(others)
        embeddings.append(embedding.detach())
    scaler.unscale_(optimizer)
    clipped = nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    means = world.mean(torch.cat([torch.stack(losses)[:, None], torch.stack(terms)], 1).mean(0))
    # The one wait for the device.
    value, *others, norm = torch.cat([means, clipped[None]]).tolist()
    taken = math.isfinite(value) and math.isfinite(norm)
    if taken:
        scaler.step(optimizer)
    else:
        buffers.restore()
    scaler.update()
    return Step(value, others, norm, taken, torch.cat(embeddings))


def amp_type(config: Config, device: torch.device) -> torch.dtype | None:
    """The autocast type that `train.amp` means on this device, None = off."""
    named = {"bfloat16": torch.bfloat16, "float16": torch.float16, "none": None}
    if config.train.amp != "auto":
        return named[config.train.amp]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    # Emulated bfloat16 is slower than float32 on a CPU; only native instructions pay.
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if native else None


def make_optimizer(config: Config, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW. Decay pulls kernels and matrices towards zero; biases, norms and scales are left."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    decay = config.train.weight_decay
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.train.learning_rate, fused=True)


def step_seed(config: Config, step: int, rank: int) -> int:
    """Of the random numbers of step 0, 1, ... in a process, below 2**63 as PyTorch wants it."""
    return ((config.seed * 1_000_003 + step) * 65536 + rank) % 2**63


def learning_rate(config: Config, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up, then half a cosine to zero."""
    steps, rising = config.train.steps, config.train.warmup * config.train.steps
    if step < rising:
        return config.train.learning_rate * min(1.0, (step + 1) / rising)
    share = (step - rising) / max(1.0, steps - rising)
    return config.train.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def update_average(average: Shadow, decay: float, step: int) -> None:
    """average <- decay average + (1 - decay) live, after step 0, 1, ...

    The decay is at most (1 + step) / (10 + step), so that the start is soon forgotten.
    """
    average.follow(1 - min(decay, (1 + step) / (10 + step)))
