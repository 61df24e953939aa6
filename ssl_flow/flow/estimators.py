"""Optical flow of pairs of images: one door to all methods, `optical_flow` and `optical_flows`.

- tvl1: the most exact, our own (ssl_flow/flow/tvl1.py), on CPU and CUDA.
- farneback: farneback-opencv on a CPU, farneback-torch (ssl_flow/flow/farneback.py) on CUDA.
- dis-ultrafast, dis-fast, dis-medium (dis): OpenCV's, the fastest for what they give on a CPU.
- tvl1-opencv, farneback-opencv: OpenCV's, to compare with (ssl_flow/flow/opencv.py).
- raft: a network trained on true flow, with weights that the user has (ssl_flow/flow/raft.py).

Options and their defaults are in `OPTIONS`. torch is imported by the methods that need it alone, so
that a process that computes DIS stays small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from . import opencv
from .options import OPTIONS as OPTIONS  # for those who look for them here
from .options import Option as Option
from .options import method_options as method_options

if TYPE_CHECKING:
    import torch

Image = NDArray[np.uint8]
Flow = NDArray[np.float32]

MIN_SIZE = 16  # pixels: below this the coarsest pyramid level is smaller than one DIS patch


def optical_flow(
    prev: Image, next: Image, method: str = "farneback", **options: Option
) -> NDArray[np.float32]:
    """Estimate where each pixel of `prev` is found in `next`, on the CPU.

    Args:
        prev: first image, (H, W, 3) RGB or (H, W) grey, uint8, both sides at least 16 pixels.
        next: second image, same shape and type.
        method: a name in `OPTIONS`.
        options: parameters of the method, see `OPTIONS[method]`.

    Returns:
        Flow (H, W, 2) float32 in pixels: `flow[y, x] = (u, v)` with u to the right and v downwards,
        so that `prev[y, x]` is seen at `next[y + v, x + u]`.

    Raises:
        ValueError: unknown method or option; images of wrong type, unequal shape or too small.
        RuntimeError: method "tvl1-opencv" while the installed OpenCV has no `cv2.optflow`.
        FileNotFoundError: method "raft" without its file of weights.
    """
    settings = method_options(method, options)
    _check_images(prev, next, "")
    flow: Flow = _estimate(prev[None], next[None], method, settings, "cpu")[0]
    return flow


def optical_flows(
    prev: Image, next: Image, method: str = "farneback", device: str = "cpu", **options: Option
) -> NDArray[np.float32]:
    """Estimate the flow of a batch of pairs, all at once if the method allows it.

    Args:
        prev: first images, (B, H, W, 3) RGB or (B, H, W) grey, uint8, sides at least 16 pixels.
        next: second images, same shape and type.
        method: a name in `OPTIONS`.
        device: "cpu", "cuda", "cuda:1", ... Methods that are OpenCV's run on the CPU alone.
        options: parameters of the method, see `OPTIONS[method]`.

    Returns:
        Flow (B, H, W, 2) float32 in pixels, see `optical_flow`.

    Raises:
        ValueError: as for `optical_flow`; a device that is not there or that the method can't use.
        RuntimeError: as for `optical_flow`.
        FileNotFoundError: as for `optical_flow`.
    """
    settings = method_options(method, options)
    _check_images(prev, next, "B, ")
    return _estimate(prev, next, method, settings, str(device))


def _estimate(
    prev: Image, next: Image, method: str, settings: Mapping[str, Option], device: str
) -> Flow:
    """Compute the flow (B, H, W, 2) of checked images."""
    if method in opencv.METHODS and device != "cpu":
        others = ", ".join(name for name in OPTIONS if name not in opencv.METHODS)
        raise ValueError(
            f"flow method {method!r} is OpenCV's and runs on device 'cpu' alone, not on "
            f"{device!r}; there these run: {others}"
        )
    if method == "farneback":  # OpenCV's takes half the time on a CPU
        method = "farneback-opencv" if device == "cpu" else "farneback-torch"
    if method not in opencv.METHODS:
        return _estimate_on_device(prev, next, method, settings, device)
    _, height, width = prev.shape[:3]
    estimate = opencv.estimator(method, settings, (height, width))
    flow = np.empty((len(prev), height, width, 2), np.float32)
    for i in range(len(flow)):
        flow[i] = estimate(_as_grey(prev[i]), _as_grey(next[i]))
    return flow


def _estimate_on_device(
    prev: Image, next: Image, method: str, settings: Mapping[str, Any], device: str
) -> Flow:
    """Compute the flow (B, H, W, 2) by a method of torch."""
    import torch

    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} can't be used: {error}") from error

    def tensor(images: list[Image]) -> torch.Tensor:
        # A copy: arrays may be read-only or lie backwards in memory, which torch does not take.
        stacked = np.stack(images) if images else np.empty(prev.shape[:3], np.uint8)
        return torch.from_numpy(stacked).to(place)

    if method == "raft":
        from .raft import raft

        flow = raft(*(_channels_first(tensor(list(x))) for x in (prev, next)), **settings)
    else:
        # Grey here and not there: a third of the bytes to move, and the same grey on all devices.
        pair = [tensor([_as_grey(image) for image in images]) for images in (prev, next)]
        if method == "tvl1":
            from .tvl1 import tvl1

            flow = tvl1(*pair, **settings)
        else:
            from .farneback import farneback

            flow = farneback(*pair, **settings)
    array: Flow = flow.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


def flow_validity(
    flow: NDArray[np.float32], backward: NDArray[np.float32] | None = None
) -> NDArray[np.bool_]:
    """Tell where a flow can be relied on.

    A pixel is valid when it moves to a place inside the image and, if `backward` is given, when the
    two flows agree there: |wf + wb|^2 < 0.01 (|wf|^2 + |wb|^2) + 0.5, wb being read at the place
    the pixel moves to (UnFlow, Meister et al., AAAI 2018, section 3.2).

    Args:
        flow: (H, W, 2) in pixels, from the first image to the second.
        backward: (H, W, 2) in pixels, from the second image to the first, or None.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: a shape is not (H, W, 2), or the two differ.
    """
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow must be (H, W, 2), got {flow.shape}")
    height, width = flow.shape[:2]
    x = flow[..., 0] + np.arange(width, dtype=np.float32)
    y = flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    valid: NDArray[np.bool_] = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    if backward is None:
        return valid
    if backward.shape != flow.shape:
        raise ValueError(f"flow is {flow.shape}, but backward is {backward.shape}")
    back = cv2.remap(backward, x, y, cv2.INTER_LINEAR)
    mismatch = np.square(flow + back).sum(-1)
    size = np.square(flow).sum(-1) + np.square(back).sum(-1)
    return np.asarray(valid & (mismatch < 0.01 * size + 0.5), dtype=bool)


def _check_images(prev: Image, next: Image, batch: str) -> None:
    """Raise ValueError unless both can be used; `batch` is "B, " if they have that dimension."""
    dims = 3 if batch else 2
    for name, image in (("prev", prev), ("next", next)):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            found = getattr(image, "dtype", type(image).__name__)
            raise ValueError(f"{name} must be a numpy uint8 array, got {found}")
        if image.ndim != dims and (image.ndim != dims + 1 or image.shape[-1] != 3):
            raise ValueError(
                f"{name} must be ({batch}H, W, 3) RGB or ({batch}H, W) grey, got {image.shape}"
            )
        height, width = image.shape[dims - 2 : dims]
        if min(height, width) < MIN_SIZE:
            raise ValueError(
                f"{name} is {height}x{width} pixels; flow needs at least {MIN_SIZE} on each side"
            )
    if prev.shape != next.shape:
        raise ValueError(f"prev is {prev.shape}, but next is {next.shape}: they must be equal")


def _channels_first(images: torch.Tensor) -> torch.Tensor:
    """Turn (B, H, W, 3), or (B, H, W) grey, into (B, 3, H, W)."""
    if images.ndim == 4:
        return images.permute(0, 3, 1, 2)
    return images[:, None].repeat(1, 3, 1, 1)


def _as_grey(image: Image) -> Image:
    return image if image.ndim == 2 else grey(image)


def grey(image: Image) -> Image:
    """Turn (H, W, 3) RGB into (H, W) grey."""
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
