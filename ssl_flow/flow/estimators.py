"""Classical optical flow, without labels: Farneback, DIS and TV-L1 through OpenCV.

Options and their defaults are in `OPTIONS`. Papers:

- farneback: Farneback, "Two-Frame Motion Estimation Based on Polynomial Expansion", SCIA 2003.
- dis: Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016.
- tvl1: Zach, Pock, Bischof, "A Duality Based Approach for Realtime TV-L1 Optical Flow", DAGM 2007.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Iterable, Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

Option = float | str | bool | None
Image = NDArray[np.uint8]

MIN_SIZE = 16  # pixels: below this the coarsest pyramid level is smaller than one DIS patch

# Every option of every method with its default. `None` leaves OpenCV's (or the preset's) own value.
OPTIONS: dict[str, dict[str, Option]] = {
    # The values of OpenCV's tutorial, which nearly all published Farneback flow uses.
    "farneback": {
        "pyr_scale": 0.5,
        "levels": 3,
        "winsize": 15,
        "iterations": 3,
        "poly_n": 5,
        "poly_sigma": 1.2,
        "flags": 0,
    },
    "dis": {
        "preset": "medium",  # ultrafast | fast | medium
        "finest_scale": None,
        "patch_size": None,
        "patch_stride": None,
        "gradient_descent_iterations": None,
        "variational_refinement_iterations": None,
        "variational_refinement_alpha": None,
        "variational_refinement_delta": None,
        "variational_refinement_gamma": None,
        "use_mean_normalization": None,
        "use_spatial_propagation": None,
    },
    # OpenCV's own defaults (warps 5, outer 10, inner 30, scale_step 0.8) take 7 times as long. They
    # are better where motion is small, but their 5 scales of 0.8 do not reach large motion: see
    # benchmarks/results/flow_accuracy.md.
    "tvl1": {
        "warps": 2,
        "outer_iterations": 1,
        "inner_iterations": 20,
        "scale_step": 0.5,
        "nscales": 5,
        "tau": 0.25,
        "lambda_": 0.15,
        "theta": 0.3,
        "epsilon": 0.01,
        "gamma": 0.0,
        "median_filtering": 5,
    },
}

_DIS_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}

_TVL1_SETTERS = {
    "warps": "setWarpingsNumber",
    "outer_iterations": "setOuterIterations",
    "inner_iterations": "setInnerIterations",
    "scale_step": "setScaleStep",
    "nscales": "setScalesNumber",
    "tau": "setTau",
    "lambda_": "setLambda",
    "theta": "setTheta",
    "epsilon": "setEpsilon",
    "gamma": "setGamma",
    "median_filtering": "setMedianFiltering",
}


def optical_flow(
    prev: Image, next: Image, method: str = "farneback", **options: Option
) -> NDArray[np.float32]:
    """Estimate where each pixel of `prev` is found in `next`.

    Args:
        prev: first image, (H, W, 3) RGB or (H, W) grey, uint8, both sides at least 16 pixels.
        next: second image, same shape and type.
        method: "farneback", "dis" or "tvl1".
        options: parameters of the method, see `OPTIONS[method]`.

    Returns:
        Flow (H, W, 2) float32 in pixels: `flow[y, x] = (u, v)` with u to the right and v downwards,
        so that `prev[y, x]` is seen at `next[y + v, x + u]`.

    Raises:
        ValueError: unknown method or option; images of wrong type, unequal shape or too small.
        RuntimeError: method "tvl1" while the installed OpenCV has no `cv2.optflow`.
    """
    settings = method_options(method, options)
    prev_grey, next_grey = _grey_pair(prev, next)
    if method == "farneback":
        flow = cv2.calcOpticalFlowFarneback(prev_grey, next_grey, None, **settings)  # type: ignore
    elif method == "dis":
        flow = _dis(settings).calc(prev_grey, next_grey, None)  # type: ignore[call-overload]
    else:
        flow = _tvl1(settings).calc(prev_grey, next_grey, None)  # type: ignore[call-overload]
    return np.ascontiguousarray(flow, dtype=np.float32)  # (H, W, 2)


def method_options(method: str, options: Mapping[str, Option]) -> dict[str, Option]:
    """Return all options of `method`, the given ones in place of the defaults.

    Raises:
        ValueError: unknown method or option; the message names the nearest known one.
    """
    if method not in OPTIONS:
        raise ValueError(f"unknown flow method {method!r}{_nearest(method, OPTIONS)}")
    known = OPTIONS[method]
    for name in options:
        if name not in known:
            raise ValueError(
                f"flow method {method!r} has no option {name!r}{_nearest(name, known)}"
            )
    return {**known, **options}


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


def _dis(settings: Mapping[str, Option]) -> cv2.DISOpticalFlow:
    preset = settings["preset"]
    if not isinstance(preset, str) or preset not in _DIS_PRESETS:
        raise ValueError(f"unknown DIS preset {preset!r}{_nearest(preset, _DIS_PRESETS)}")
    dis: cv2.DISOpticalFlow = cv2.DISOpticalFlow_create(_DIS_PRESETS[preset])  # type: ignore[attr-defined]
    for name, value in settings.items():
        if name != "preset" and value is not None:
            # finest_scale -> setFinestScale
            getattr(dis, "set" + "".join(part.capitalize() for part in name.split("_")))(value)
    return dis


def _tvl1(settings: Mapping[str, Option]) -> cv2.DenseOpticalFlow:
    if not hasattr(getattr(cv2, "optflow", None), "DualTVL1OpticalFlow_create"):
        raise RuntimeError(_missing_optflow())
    tvl1: cv2.DenseOpticalFlow = cv2.optflow.DualTVL1OpticalFlow_create()  # type: ignore[attr-defined]
    for name, value in settings.items():
        getattr(tvl1, _TVL1_SETTERS[name])(value)
    return tvl1


def _missing_optflow() -> str:
    installed = sorted(
        {
            f"{name} {dist.version}"
            for dist in importlib.metadata.distributions()
            if (name := str(dist.metadata["Name"] or "").lower()).startswith("opencv")
        }
    )
    names = " ".join(entry.split()[0] for entry in installed)
    return (
        "TV-L1 needs cv2.optflow, which the imported cv2 lacks. All OpenCV wheels share one folder "
        "cv2/, so a wheel without 'contrib' overwrites the one with it. Installed: "
        f"{', '.join(installed) or 'no OpenCV wheel'}. To mend:\n"
        + (f"    pip uninstall -y {names}\n" if names else "")
        + "    pip install --no-cache-dir opencv-contrib-python-headless\n"
        "or use method='dis' or 'farneback', which every OpenCV has."
    )


def _nearest(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    hint = f", did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known: {', '.join(known)}"


def _grey_pair(prev: Image, next: Image) -> tuple[Image, Image]:
    for name, image in (("prev", prev), ("next", next)):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            found = getattr(image, "dtype", type(image).__name__)
            raise ValueError(f"{name} must be a numpy uint8 array, got {found}")
        if image.ndim != 2 and (image.ndim != 3 or image.shape[2] != 3):
            raise ValueError(f"{name} must be (H, W, 3) RGB or (H, W) grey, got {image.shape}")
        if min(image.shape[:2]) < MIN_SIZE:
            raise ValueError(
                f"{name} is {image.shape[0]}x{image.shape[1]} pixels; flow needs at least "
                f"{MIN_SIZE} on each side"
            )
    if prev.shape != next.shape:
        raise ValueError(f"prev is {prev.shape}, but next is {next.shape}: they must be equal")
    if prev.ndim == 2:
        return prev, next
    return grey(prev), grey(next)


def grey(image: Image) -> Image:
    """Turn (H, W, 3) RGB into (H, W) grey."""
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
