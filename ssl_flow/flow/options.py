"""The flow methods, their options and the defaults, in one place; `method_options` checks a choice.

Nothing is computed here, and neither OpenCV nor torch is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

Option = float | str | bool | None

_DIS: dict[str, Option] = {  # None leaves the preset's own value
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
}
# The values of OpenCV's tutorial, which nearly all published Farneback flow uses.
_FARNEBACK: dict[str, Option] = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}

# Every option of every method with its default.
OPTIONS: dict[str, dict[str, Option]] = {
    # Explained in ssl_flow/flow/tvl1.py. Quicker: warps 1. More exact: warps 5, iterations 30,
    # scale_step 0.8, scales 30. What each costs: benchmarks/results/flow_accuracy.md.
    "tvl1": {
        "lambda_": 0.3,
        "theta": 0.3,
        "tau": 0.25,
        "warps": 3,
        "iterations": 20,
        "scale_step": 0.5,
        "scales": 8,
        "min_side": 16,
        "median": True,
    },
    "farneback": _FARNEBACK,
    "dis": {"preset": "medium", **_DIS},  # ultrafast | fast | medium
    "dis-ultrafast": _DIS,
    "dis-fast": _DIS,
    "dis-medium": _DIS,
    # OpenCV's own defaults: for flow like other people's, at 30 times the cost of "tvl1". With 5
    # scales of 0.8 it does not reach motion of more than a few pixels.
    "tvl1-opencv": {
        "warps": 5,
        "outer_iterations": 10,
        "inner_iterations": 30,
        "scale_step": 0.8,
        "nscales": 5,
        "tau": 0.25,
        "lambda_": 0.15,
        "theta": 0.3,
        "epsilon": 0.01,
        "gamma": 0.0,
        "median_filtering": 5,
    },
    "farneback-opencv": _FARNEBACK,
    "farneback-torch": _FARNEBACK,  # ssl_flow/flow/farneback.py
    "raft": {"weights": None, "model": "large", "updates": 12},  # ssl_flow/flow/raft.py
}


def method_options(method: str, options: Mapping[str, Option]) -> dict[str, Option]:
    """Return all options of `method`, the given ones in place of the defaults.

    Raises:
        ValueError: unknown method or option, the message names the nearest known one; a value of
            another type than the default's.
    """
    if method not in OPTIONS:
        raise ValueError(f"unknown flow method {method!r}{nearest(method, OPTIONS)}")
    known = OPTIONS[method]
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"flow method {method!r} has no option {name!r}{nearest(name, known)}")
        if not _fits(value, known[name]):
            raise ValueError(
                f"option {name!r} of flow method {method!r} must be of type "
                f"{type(known[name]).__name__}, as its default {known[name]!r}; got {value!r}"
            )
    return {**known, **options}


def _fits(value: Option, default: Option) -> bool:
    """Tell whether `value` may stand where `default` does: a whole number for a float, too."""
    if default is None:
        return True
    if isinstance(value, bool) or isinstance(default, bool):
        return type(value) is type(default)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def nearest(word: object, known: Iterable[str]) -> str:
    """Return the end of an error message about an unknown `word`: what was meant, what is known."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    hint = f", did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known: {', '.join(known)}"
