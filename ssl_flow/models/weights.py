"""Weights that others saved: read without running their code, fitted to a network name by name."""

from __future__ import annotations

import argparse
import pickle
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# The copy that is not judged: DINO evaluates its teacher, MoCo and lightly the query encoder.
_OTHER_COPY = re.compile("student|momentum|encoder_k")


class _Dropped:
    """In the place of a NumPy number, as in the learning rates of DINO's optimiser."""

    def __init__(self, *_: object) -> None:
        """Nothing of NumPy is run."""

    __setstate__ = __init__


_SAFE: list[Any] = [
    argparse.Namespace,
    type("dtype", (_Dropped,), {"__module__": "numpy"}),
    type("scalar", (_Dropped,), {"__module__": "numpy.core.multiarray"}),
    type("scalar", (_Dropped,), {"__module__": "numpy._core.multiarray"}),
]


@dataclass(frozen=True)
class Match:
    """Which tensors of a source a network takes; `str()` is the report."""

    source: str
    matched: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    wrong: list[str]
    """With another shape, as text."""
    aside: str = ""
    """Where the tensors lay and what was left there."""

    def __str__(self) -> str:
        """Counts, and the first names of what does not fit."""
        lines = [f"{self.source}: {len(self.matched)} tensors taken{self.aside}"]
        for title in ("missing", "unexpected", "wrong"):
            names = getattr(self, title)
            more = f", ... ({len(names)})" if len(names) > 4 else ""
            lines += [f"  {title}: {', '.join(names[:4])}{more}"] if names else []
        return "\n".join(lines)


def compare(tensors: dict[str, Tensor], network: nn.Module, source: str, aside: str = "") -> Match:
    """Which of the tensors, by the network's own names, it can take."""
    wanted = network.state_dict()
    known = {n: t for n, t in tensors.items() if n in wanted}
    fits = {n: t for n, t in known.items() if t.shape == wanted[n].shape}
    return Match(
        source,
        fits,
        [n for n in wanted if n not in tensors and not n.endswith("num_batches_tracked")],
        [n for n in tensors if n not in wanted],
        [f"{n} is {tuple(t.shape)}, expected {tuple(wanted[n].shape)}" for n, t in known.items()
         if n not in fits],
        aside,
    )  # fmt: skip


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file or of a PyTorch checkpoint, by their dotted names.

    A checkpoint is unpickled by PyTorch's restricted reader (`weights_only`); beside its own types
    it may hold an `argparse.Namespace` and NumPy's numbers (which are dropped), as DINO's training
    files do. No code of it is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or it holds something else than numbers and tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of weights at {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = code_asked_for(error)
        wish = f"it asks for {asked}" if asked else str(error).splitlines()[0]
        raise ValueError(
            f"{path} was not opened, since loading it could run code ({wish}). Ask its author for "
            "a .safetensors, or, where you trust it, open it by torch.load(FILE, "
            "weights_only=False) and save a dict of its tensors alone"
        ) from error
    except Exception as error:
        raise ValueError(f"{path} is no readable file of weights: {error!r}") from error
    return dict(_flat(content))


def code_asked_for(error: Exception) -> str:
    """The function that a refused pickle names, in the words of PyTorch's restricted reader."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    return asked[1] if asked and isinstance(error, pickle.UnpicklingError) else ""


def _flat(content: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, dict):
        for name, value in content.items():
            if isinstance(name, str):  # an optimiser's are numbers
                yield from _flat(value, f"{prefix}.{name}" if prefix else name)


def load_weights(
    network: nn.Module,
    tensors: dict[str, Tensor],
    source: str,
    classifier: Sequence[str] = (),
    strict: bool = True,
) -> Match:
    """Fill a network from another's checkpoint.

    Names may stand under any prefix (`module.`, `backbone.`, `teacher.backbone.`, ...): the one
    under which most tensors fit is removed as a whole. They are those of the network, those that
    timm converts (the authors' releases of DINOv2, ConvNeXt, ...), or numbers in place of the
    names of the network's children (`nn.Sequential(*resnet.children())`, as in lightly).

    Args:
        network: a timm or torchvision model, filled in place.
        tensors: of `read_tensors`.
        source: their name in messages.
        classifier: names of the classifier's modules, which the network has not got.
        strict: refuse missing and unexpected names.

    Returns:
        What was taken and what was not.

    Raises:
        ValueError: `strict`, and names are missing or unexpected; a wrong shape; no name that fits;
            two copies of the network, and no way to tell which one is meant.
    """
    wanted = network.state_dict()
    best: list[tuple[tuple[bool, int], str, dict[str, Tensor]]] = []
    for prefix in _prefixes(tensors, len(wanted) // 2):
        inside = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        for names in _spellings(inside, network):
            fitting = sum(n in wanted and t.shape == wanted[n].shape for n, t in names.items())
            # The copy that is judged comes first, even where it is not complete.
            meant = fitting > len(wanted) // 2 and not _OTHER_COPY.search(prefix)
            if not best or (meant, fitting) > best[0][0]:
                best = []
            if not best or (meant, fitting) == best[0][0]:
                best.append(((meant, fitting), prefix, names))
    (_, fitting), prefix, names = best[0] if best else ((False, 0), "", tensors)
    rivals = [p for _, p, _ in best if not (p.startswith(prefix) or prefix.startswith(p))]
    if fitting and rivals:
        raise ValueError(
            f"{source} holds the network twice, under {prefix!r} and {rivals[0]!r}: save the one "
            "that you mean into a file of its own"
        )
    # timm resamples positions and kernels of another patch size; the latter is another network.
    given = {n: tensors.get(prefix + n, t) for n, t in names.items() if "pos" not in n}
    names = names | {n: t for n, t in given.items() if t.numel() != names[n].numel()}
    outputs = tuple(f"{name}." for name in classifier)
    left = [n for n in names if n.startswith(outputs) and n not in wanted]
    elsewhere = sum(not n.startswith(prefix) for n in tensors)
    match = compare(
        {n: t for n, t in names.items() if n not in left},
        network,
        source,
        (f" under {prefix!r}" if prefix else "") + f", left aside: {len(left)} of a classifier, "
        f"{elsewhere} elsewhere in the file",
    )
    if not match.matched or match.wrong or (strict and (match.missing or match.unexpected)):
        mend = "" if match.wrong or not match.matched else " (strict=False takes what fits)"
        raise ValueError(f"{source} does not fit {type(network).__name__}{mend}\n{match}")
    if match.missing or match.unexpected:
        warnings.warn(str(match), stacklevel=2)
    network.load_state_dict(match.matched, strict=False)
    return match


def _prefixes(names: Sequence[str] | dict[str, Tensor], least: int) -> list[str]:
    """Dotted beginnings that at least `least` of the names share; the empty one first."""
    shared: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        shared.update("".join(f"{part}." for part in parts[:n]) for n in range(len(parts)))
    return [prefix for prefix, count in shared.items() if count >= least]


def _spellings(names: dict[str, Tensor], network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The tensors as they are named, as timm converts them, and with numbers made to names."""
    yield names
    children = [name for name, _ in network.named_children()]
    renamed = {}
    for name, tensor in names.items():
        first, dot, rest = name.partition(".")
        if first.isdecimal() and int(first) < len(children):
            name = children[int(first)] + dot + rest
        # DINOv2's training files number their blocks in chunks: blocks.CHUNK.BLOCK.
        renamed[re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name)] = tensor
    if renamed.keys() != names.keys():
        yield renamed
    convert: Any = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    for spelling in (names, renamed) if convert else ():
        try:
            yield convert(dict(spelling), network)
        except Exception:  # made for other names
            continue
