"""What autograd keeps of a crop, preset by preset: most of the memory that a GPU needs for it.

    python benchmarks/preset_memory.py

Counted on a CPU under bfloat16 autocast: what four crops of the preset's side keep more than two.
Beside it the weights with gradient and both moments of AdamW, 16 bytes a parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_flow.config import load_config, preset_files
from ssl_flow.models import Encoder, create_encoder


def kept_bytes(encoder: Encoder, crops: int, side: int) -> int:
    """Bytes that autograd keeps of a forward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()  # once, though two operations may keep it
        return tensor

    images = torch.rand(crops, 3, side, side)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        out = encoder(images)
    del out  # until here all that is kept stays where it is
    return sum(kept.values())


def main() -> None:
    """Print a line a preset."""
    for name in preset_files():
        config = load_config(name)
        if config.data.store.startswith("map:"):
            continue  # triplets of tiles, another encoder
        model, side = config.model, config.data.crop
        encoder = create_encoder(model.backbone, model.embedding_dim, model.hidden_dim)
        crop = (kept_bytes(encoder, 4, side) - kept_bytes(encoder, 2, side)) / 2 / 2**20
        weights = 16 * sum(p.numel() for p in encoder.parameters()) / 2**20
        print(f"{name}: {crop:.0f} MiB a crop, {weights:.0f} MiB for the weights")


if __name__ == "__main__":
    main()
