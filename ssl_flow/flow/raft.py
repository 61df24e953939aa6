"""RAFT, torchvision's network for optical flow, with weights that the user has.

Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020. Unlike the
other methods it was trained on true flow, so what learns from it is no longer free of labels. The
weights are not part of this package and are never downloaded.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.optical_flow import raft_large, raft_small

_MIN_SIDE = 128  # pixels: below, the coarsest correlation has one cell, and the flow is NaN
_STRIDE = 8


@torch.no_grad()
def raft(
    first: Tensor,
    second: Tensor,
    *,
    weights: str | None = None,
    model: str = "large",
    updates: int = 12,
) -> Tensor:
    """Estimate where each pixel of `first` is found in `second`.

    Images are RGB (B, H, W, 3) or grey (B, H, W), values 0 to 255 in any type, and padded to at
    least 128 pixels a side, in steps of 8. `weights` is the file of the state dict of torchvision's
    `raft_large` or `raft_small` (`model`), as saved by `torch.save` or in safetensors format;
    `updates` the number of recurrent updates of the flow.

    Returns (B, 2, H, W) float32 on the device of `first`, in pixels, x to the right, y downwards.
    ValueError: no weights are given or they are not the model's; an option is out of range.
    """
    if model not in ("large", "small") or updates < 1:
        raise ValueError(
            f"model must be 'large' or 'small' and updates at least 1, got {model!r} and {updates}"
        )
    if weights is None:
        raise ValueError(
            f"method 'raft' needs the option weights: a file with the state dict of torchvision's "
            f"raft_{model}. Its address is in torchvision.models.optical_flow."
            f"Raft_{model.capitalize()}_Weights.DEFAULT.url; this package downloads nothing"
        )
    path = Path(weights).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"the file of RAFT's weights is not there: {path}")
    network = _network(path, path.stat().st_mtime_ns, model, first.device)
    batch, height, width = first.shape[:3]
    if first.numel() == 0:
        return torch.zeros(batch, 2, height, width, device=first.device)
    sides = (max(_MIN_SIDE, -(-side // _STRIDE) * _STRIDE) - side for side in (width, height))
    left, right, top, bottom = (pad for side in sides for pad in (side // 2, side - side // 2))
    images = []
    for image in (first, second):
        rgb = image if image.ndim == 4 else image[..., None].repeat(1, 1, 1, 3)
        # -1 to 1, as in torchvision's preset; padded by the edges, half on each side.
        scaled = rgb.permute(0, 3, 1, 2).float() / 127.5 - 1
        images.append(F.pad(scaled, (left, right, top, bottom), mode="replicate"))
    flow: Tensor = network(*images, num_flow_updates=updates)[-1]
    return flow[..., top : top + height, left : left + width].contiguous()


@functools.lru_cache(maxsize=1)
def _network(path: Path, changed: int, model: str, device: torch.device) -> torch.nn.Module:
    """Load the network; `changed`, the file's time, only tells one version from the next."""
    build = raft_large if model == "large" else raft_small
    network: torch.nn.Module = build(weights=None, progress=False)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:  # weights_only: a file from a stranger must not run code
            state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except Exception as error:  # of pickle, zip, safetensors or the network: each has its own
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} does not hold the state dict of torchvision's raft_{model}: {reason}"
        ) from error
    return network.to(device).eval()
