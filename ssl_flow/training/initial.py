"""Before the first step: start weights, activation checkpointing, one step tried and undone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_flow.config import Config
from ssl_flow.models import Encoder, TileEncoder, load_encoder
from ssl_flow.models.encoder import Normalization
from ssl_flow.models.weights import compare
from ssl_flow.training.checkpoint import read_checkpoint
from ssl_flow.training.safety import MemoryAdvice, explain_out_of_memory


def initialize(encoder: Encoder, spec: str) -> str:
    """Copy start weights into an encoder, in place.

    Args:
        encoder: to be trained.
        spec: any of `load_encoder`'s (a folder, `timm:NAME@FILE`, ...), a `.safetensors` file, or a
            checkpoint (`.pt`) of a run. A lone file may hold a backbone alone (timm's names) or an
            encoder.

    Returns:
        The report of `weights.Match` (what is missing stays random), and how images are normalised,
        which the source decides where it says so (a lone file does not).

    Raises:
        FileNotFoundError, WeightsError: nothing there.
        ValueError: a shape differs, or no key fits.
    """
    given, normalization = _weights(spec)
    match = compare(given, encoder, spec)
    if match.wrong or not match.matched:
        raise ValueError(
            f"{spec} does not fit {encoder.architecture}: set model.backbone, model.embedding_dim "
            f"and model.hidden_dim to its own, or leave --init-from out\n{match}"
        )
    encoder.load_state_dict(match.matched, strict=False)
    encoder.normalization = normalization or encoder.normalization
    return (
        f"start weights from {match}\n  images: mean {encoder.normalization.mean}, standard "
        f"deviation {encoder.normalization.std}, "
        f"{'the source' if normalization else 'this backbone'}'s own"
    )


def _weights(spec: str) -> tuple[dict[str, Tensor], Normalization | None]:
    path = Path("" if spec.startswith("timm:") else spec)  # timm:NAME@FILE is load_encoder's
    if path.suffix in (".pt", ".safetensors") and not path.is_file():
        raise FileNotFoundError(f"--init-from: no file {spec}")
    if path.suffix == ".pt":
        content = read_checkpoint(path)
        images = content["progress"].get("normalization")
        average: dict[str, Tensor] | None = content.get("average")
        return average or content["encoder"], Normalization(**images) if images else None
    if path.suffix == ".safetensors":
        weights = load_file(path)
        if not any(name.startswith("backbone.") for name in weights):
            weights = {f"backbone.{name}": value for name, value in weights.items()}
        return weights, None
    encoder = load_encoder(spec)
    return encoder.state_dict(), encoder.normalization


def checkpoint_activations(encoder: Encoder | TileEncoder, images: Tensor) -> None:
    """Switch timm's activation checkpointing on, and see that it keeps less of (B, C, H, W) images.

    Raises:
        ValueError: the backbone has none.
    """
    before = _kept_bytes(encoder, images)
    refusal = f"{encoder.architecture} cannot compute activations again; set"
    try:
        encoder.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError, TypeError) as error:
        raise ValueError(f"{refusal} train.checkpoint_activations to false") from error
    after = _kept_bytes(encoder, images)
    if after >= before:
        raise ValueError(f"{refusal} train.checkpoint_activations to false (no memory saved)")


def _kept_bytes(encoder: Encoder | TileEncoder, images: Tensor) -> int:
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    encoder.eval()  # BatchNorm sees none of this
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        encoder(images)
    return kept


def try_step(config: Config, objective: nn.Module, batches: Iterable[Sequence[Tensor]]) -> None:
    """One forward and backward pass on noise, undone: what cannot work is refused before the work.

    Parameters that the features do not need (a classifier's norm) are frozen, since
    DistributedDataParallel would wait for their gradients.

    Args:
        config: for messages.
        objective: to be trained; in training mode afterwards.
        batches: of every size that a pass will have.

    Raises:
        ValueError: the backbone does not take such crops, or its embedding is not on stride 4.
        MemoryAdvice: no memory for it.
    """
    state = copy.deepcopy(objective.state_dict())
    objective.train()
    for batch in batches:
        try:
            with explain_out_of_memory(config):
                objective(*batch)[0].backward()
        except MemoryAdvice:
            raise
        except Exception as error:
            raise ValueError(
                f"{config.model.backbone} cannot take {len(batch[0])} crops of "
                f"{batch[0].shape[-1]} px: {error}"
            ) from error
    for parameter in objective.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    objective.load_state_dict(state)  # BatchNorm has seen noise
