"""Optical flow of pairs of images: one door to all methods, `optical_flow` and `optical_flows`.

- tvl1: the most exact, our own (ssl_flow/flow/tvl1.py), on CPU and CUDA.
- farneback: farneback-opencv on a CPU, farneback-torch (ssl_flow/flow/farneback.py) on CUDA.
- dis-ultrafast, dis-fast, dis-medium (dis): OpenCV's, the fastest for what they give on a CPU;
  Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016.
- tvl1-opencv, farneback-opencv: OpenCV's, to compare with.
- raft: a network trained on true flow, with weights that the user has (ssl_flow/flow/raft.py).

torch is imported by the methods that need it alone: a process that computes DIS stays small.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Flow = NDArray[np.float32]
Option = float | str | bool | None

MIN_SIZE = 16  # pixels: below this the coarsest pyramid level is smaller than one DIS patch
OPENCV_METHODS = (
    "dis", "dis-ultrafast", "dis-fast", "dis-medium", "tvl1-opencv", "farneback-opencv",
)  # fmt: skip
_DIS: dict[str, Option] = dict.fromkeys(  # None leaves the preset's own value
    (
        "finest_scale", "patch_size", "patch_stride", "gradient_descent_iterations",
        "variational_refinement_iterations", "variational_refinement_alpha",
        "variational_refinement_delta", "variational_refinement_gamma", "use_mean_normalization",
        "use_spatial_propagation",
    )
)  # fmt: skip
# The values of OpenCV's tutorial, which nearly all published Farneback flow uses.
_FARNEBACK: dict[str, Option] = {
    "pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2,
    "flags": 0,
}  # fmt: skip
# Every option of every method with its default.
OPTIONS: dict[str, dict[str, Option]] = {
    # Explained in ssl_flow/flow/tvl1.py. Quicker: warps 1. More exact: warps 5, iterations 30,
    # scale_step 0.8, scales 30. What each costs: benchmarks/results/flow_accuracy.md.
    "tvl1": {
        "lambda_": 0.3, "theta": 0.3, "tau": 0.25, "warps": 3, "iterations": 20, "scale_step": 0.5,
        "scales": 8, "min_side": 16, "median": True,
    },
    "farneback": _FARNEBACK,
    "dis": {"preset": "medium", **_DIS},  # ultrafast | fast | medium
    "dis-ultrafast": _DIS,
    "dis-fast": _DIS,
    "dis-medium": _DIS,
    # OpenCV's own defaults: for flow like other people's, at 30 times the cost of "tvl1". With 5
    # scales of 0.8 it does not reach motion of more than a few pixels.
    "tvl1-opencv": {
        "warps": 5, "outer_iterations": 10, "inner_iterations": 30, "scale_step": 0.8, "nscales": 5,
        "tau": 0.25, "lambda_": 0.15, "theta": 0.3, "epsilon": 0.01, "gamma": 0.0,
        "median_filtering": 5,
    },
    "farneback-opencv": _FARNEBACK,
    "farneback-torch": _FARNEBACK,
    "raft": {"weights": None, "model": "large", "updates": 12},
}  # fmt: skip


def method_options(method: str, options: Mapping[str, Option]) -> dict[str, Option]:
    """Return all options of `method`, the given ones in place of the defaults.

    ValueError: unknown method or option, the message names the nearest known one; a value of
    another type than the default's.
    """
    if method not in OPTIONS:
        raise ValueError(f"unknown flow method {method!r}{_nearest(method, OPTIONS)}")
    known = OPTIONS[method]
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"flow method {method!r} has no option {name!r}{_nearest(name, known)}"
            )
        default = known[name]
        kinds = (int, float) if type(default) is float else (type(default),)
        if default is not None and type(value) not in kinds:
            raise ValueError(
                f"option {name!r} of flow method {method!r} must be of type "
                f"{type(default).__name__}, as its default {default!r}; got {value!r}"
            )
    return {**known, **options}


def _nearest(word: object, known: Iterable[str]) -> str:
    """Return the end of an error message about an unknown `word`: what was meant, what is known."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    hint = f", did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known: {', '.join(known)}"


def optical_flow(
    prev: Image, next: Image, method: str = "farneback", **options: Option
) -> NDArray[np.float32]:
    """Estimate where each pixel of `prev` is found in `next`, on the CPU.

    Images are (H, W, 3) RGB or (H, W) grey, uint8, both of one shape, at least 16 pixels a side;
    `method` is a name in `OPTIONS`, `options` some of `OPTIONS[method]`.

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
    """Do what `optical_flow` does for batches (B, H, W, 3) or (B, H, W), all at once if possible.

    `device` is "cpu", "cuda", "cuda:1", ... Returns (B, H, W, 2). Raises the same, and ValueError
    for a device that is not there or that the method can't use (OpenCV's run on the CPU alone).
    """
    settings = method_options(method, options)
    _check_images(prev, next, "B, ")
    return _estimate(prev, next, method, settings, str(device))


def _estimate(
    prev: Image, next: Image, method: str, settings: Mapping[str, Any], device: str
) -> Flow:
    """Compute the flow (B, H, W, 2) of checked images."""
    if method in OPENCV_METHODS and device != "cpu":
        others = ", ".join(name for name in OPTIONS if name not in OPENCV_METHODS)
        raise ValueError(
            f"flow method {method!r} is OpenCV's and runs on device 'cpu' alone, not on "
            f"{device!r}; there these run: {others}"
        )
    if method == "farneback":  # OpenCV's takes half the time on a CPU
        method = "farneback-opencv" if device == "cpu" else "farneback-torch"
    if method != "raft" and prev.ndim == 4:  # here, so that devices get the same and less
        if len(prev) == 0:
            prev = next = prev[..., 0]
        else:
            prev, next = (np.stack([grey(image) for image in images]) for images in (prev, next))
    if method in OPENCV_METHODS:
        estimate = _opencv(method, settings, (prev.shape[1], prev.shape[2]))
        flow = np.empty((*prev.shape, 2), np.float32)
        for i in range(len(flow)):
            flow[i] = estimate(prev[i], next[i])
        return flow
    import torch

    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} can't be used: {error}") from error
    name = method.removesuffix("-torch")
    function = getattr(importlib.import_module(f".{name}", __package__), name)
    # A copy: arrays may be read-only or lie backwards in memory, which torch does not take.
    pair = [torch.from_numpy(images.copy()).to(place) for images in (prev, next)]
    array: Flow = function(*pair, **settings).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


def _opencv(
    method: str, settings: Mapping[str, Any], shape: tuple[int, int]
) -> Callable[[Image, Image], Flow]:
    """Return a function of two grey images of this shape (H, W) that gives the flow (H, W, 2)."""
    if method == "farneback-opencv":
        return lambda first, second: cv2.calcOpticalFlowFarneback(first, second, None, **settings)  # type: ignore
    algorithm: Any
    if method == "tvl1-opencv":
        if not hasattr(getattr(cv2, "optflow", None), "DualTVL1OpticalFlow_create"):
            raise RuntimeError(_missing_optflow())
        algorithm = cv2.optflow.DualTVL1OpticalFlow_create()  # type: ignore[attr-defined]
        theirs = {"warps": "warpings_number", "nscales": "scales_number", "lambda_": "lambda"}
        settings = {theirs.get(name, name): value for name, value in settings.items()}
    else:
        preset = settings.get("preset", method.removeprefix("dis-"))
        if preset not in ("ultrafast", "fast", "medium"):
            known = _nearest(preset, ("ultrafast", "fast", "medium"))
            raise ValueError(f"unknown DIS preset {preset!r}{known}")
        number = getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{preset.upper()}")
        algorithm = cv2.DISOpticalFlow_create(number)  # type: ignore[attr-defined]
        settings = {k: v for k, v in settings.items() if k != "preset" and v is not None}
    for name, value in settings.items():  # finest_scale -> setFinestScale
        getattr(algorithm, "set" + name.title().replace("_", ""))(value)
    if method != "tvl1-opencv":
        # Where the picture has no scale as coarse as the finest one wanted, OpenCV picks others by
        # the width alone, and low wide pictures crash the process. So pick them here.
        patch = algorithm.getPatchSize()
        if patch < 1:
            raise ValueError(f"patch_size of DIS must be at least 1, got {patch}")
        coarsest = min(
            int(math.log2(max(shape) / (4 * patch)) + 0.5), int(math.log2(min(shape) / patch))
        )
        if algorithm.getFinestScale() > coarsest:
            algorithm.setFinestScale(max(0, coarsest - 2))
    return lambda first, second: algorithm.calc(first, second, None)  # type: ignore[no-any-return]


def _missing_optflow() -> str:
    wheels = importlib.metadata.distributions()
    found = {(str(wheel.metadata["Name"] or "").lower(), wheel.version) for wheel in wheels}
    installed = sorted(entry for entry in found if entry[0].startswith("opencv"))
    listed = ", ".join(f"{name} {version}" for name, version in installed) or "no OpenCV wheel"
    names = " ".join(name for name, _ in installed)
    return (
        "tvl1-opencv needs cv2.optflow, which the imported cv2 lacks. All OpenCV wheels share one "
        "folder cv2/, so a wheel without 'contrib' overwrites the one with it. Use method='tvl1', "
        "which is faster, more exact and needs no OpenCV; or mend it. "
        f"Installed: {listed}.\n"
        + (f"    pip uninstall -y {names}\n" if names else "")
        + "    pip install --no-cache-dir opencv-contrib-python-headless"
    )


def flow_validity(flow: Flow, backward: Flow | None = None) -> NDArray[np.bool_]:
    """Tell where a flow (H, W, 2) in pixels can be relied on: (H, W) bool.

    A pixel is valid when it moves to a place inside the image and, if the flow `backward` from the
    second image to the first is given, when the two agree there: |wf + wb|^2 < 0.01 (|wf|^2 +
    |wb|^2) + 0.5, wb being read at the place the pixel moves to (UnFlow, Meister et al., AAAI 2018,
    section 3.2). ValueError: a shape is not (H, W, 2), or the two differ.
    """
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow must be (H, W, 2), got {flow.shape}")
    x, y, valid = targets(flow)
    if backward is None:
        return valid
    if backward.shape != flow.shape:
        raise ValueError(f"flow is {flow.shape}, but backward is {backward.shape}")
    back = cv2.remap(backward, x, y, cv2.INTER_LINEAR)
    mismatch = np.square(flow + back).sum(-1)
    size = np.square(flow).sum(-1) + np.square(back).sum(-1)
    return np.asarray(valid & (mismatch < 0.01 * size + 0.5), dtype=bool)


def targets(flow: Flow) -> tuple[NDArray, NDArray, NDArray]:
    """Return x and y (H, W) of where each pixel moves to, and whether that is in the picture."""
    height, width = flow.shape[:2]
    x = flow[..., 0] + np.arange(width, dtype=np.float32)
    y = flow[..., 1] + np.arange(height, dtype=np.float32)[:, None]
    return x, y, (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


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


def grey(image: Image) -> Image:
    """Turn (H, W, 3) RGB into (H, W) grey."""
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
