"""The flow methods that are OpenCV's: DIS, Farneback and its TV-L1, a pair at a time, on the CPU.

- farneback: Farneback, "Two-Frame Motion Estimation Based on Polynomial Expansion", SCIA 2003.
- dis: Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016.
- tvl1: Zach, Pock, Bischof, "A Duality Based Approach for Realtime TV-L1 Optical Flow", DAGM 2007.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .options import Option, nearest

METHODS = ("dis", "dis-ultrafast", "dis-fast", "dis-medium", "tvl1-opencv", "farneback-opencv")

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


def estimator(
    method: str, settings: Mapping[str, Option], shape: tuple[int, int]
) -> Callable[[NDArray[np.uint8], NDArray[np.uint8]], NDArray[np.float32]]:
    """Return a function of two grey images (H, W) that gives the flow (H, W, 2) in pixels.

    Args:
        method: one of `METHODS`.
        settings: all of the method's options.
        shape: (H, W) of the images.

    Raises:
        ValueError: the option `preset` names none; `patch_size` is below 1.
        RuntimeError: "tvl1-opencv" while the installed OpenCV has no `cv2.optflow`.
    """
    if method == "farneback-opencv":
        return lambda first, second: cv2.calcOpticalFlowFarneback(first, second, None, **settings)  # type: ignore
    algorithm: Any = _tvl1(settings) if method == "tvl1-opencv" else _dis(method, settings, shape)
    return lambda first, second: algorithm.calc(first, second, None)  # type: ignore[no-any-return]


def _dis(method: str, settings: Mapping[str, Option], shape: tuple[int, int]) -> cv2.DISOpticalFlow:
    preset = settings.get("preset", method.removeprefix("dis-"))
    if not isinstance(preset, str) or preset not in _DIS_PRESETS:
        raise ValueError(f"unknown DIS preset {preset!r}{nearest(preset, _DIS_PRESETS)}")
    dis: cv2.DISOpticalFlow = cv2.DISOpticalFlow_create(_DIS_PRESETS[preset])  # type: ignore[attr-defined]
    for name, value in settings.items():
        if name != "preset" and value is not None:
            # finest_scale -> setFinestScale
            getattr(dis, "set" + "".join(part.capitalize() for part in name.split("_")))(value)
    # Where the picture has no scale as coarse as the finest one wanted, OpenCV picks others by the
    # width alone, and low wide pictures crash the process. So pick them here.
    patch = dis.getPatchSize()
    if patch < 1:
        raise ValueError(f"patch_size of DIS must be at least 1, got {patch}")
    coarsest = min(
        int(math.log2(max(shape) / (4 * patch)) + 0.5), int(math.log2(min(shape) / patch))
    )
    if dis.getFinestScale() > coarsest:
        dis.setFinestScale(max(0, coarsest - 2))
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
        "tvl1-opencv needs cv2.optflow, which the imported cv2 lacks. All OpenCV wheels share one "
        "folder cv2/, so a wheel without 'contrib' overwrites the one with it. Use method='tvl1', "
        "which is faster, more exact and needs no OpenCV; or mend it. Installed: "
        f"{', '.join(installed) or 'no OpenCV wheel'}.\n"
        + (f"    pip uninstall -y {names}\n" if names else "")
        + "    pip install --no-cache-dir opencv-contrib-python-headless"
    )
