"""Features of a frozen encoder on the disk: computed once, read as fast as the disk gives them.

    cache = cache_features(encoder, train_set, "features")
    cache[0]              # of image 0: list of (C_i, h_i, w_i) float16, mapped and not yet read

FOLDER/KEY holds one safetensors file an image with one tensor (h, w, C) a level: the channels of a
pixel lie together, so that pixels drawn at random are read without the map around them. KEY is a
hash of the encoder (weights, buffers, structure, source code, normalisation), the data, and the
features' name. Delete FOLDER whenever you like.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from ssl_flow.data.segmentation import Labelled, SegmentationSet
from ssl_flow.evaluation.pixel_features import (
    check_features,
    feature_levels,
    feature_strides,
    frozen,
    normalized_batches,
)
from ssl_flow.flow.shard import open_temporary, write_atomically
from ssl_flow.models.encoder import Encoder, device_of

_VERSION = 1  # of the layout and of what is hashed


@dataclass
class FeatureCache:
    """Features of the images of a set, in its order."""

    folder: Path
    strides: list[int]  # of the levels
    channels: list[int]  # of the levels
    images: int

    def __len__(self) -> int:
        """The number of images."""
        return self.images

    def __getitem__(self, index: int) -> list[Tensor]:
        """Image `index`: float16 maps (C_i, h_i, w_i), views of a mapped (h_i, w_i, C_i)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"the cache holds {len(self)} images, asked for index {index}")
        return _read(_path(self.folder, index % len(self)))


def cache_features(
    encoder: Encoder,
    dataset: SegmentationSet | Sequence[Labelled],
    folder: str | Path,
    features: str = "hypercolumn",
    batch_images: int = 8,
    progress: bool = True,
) -> FeatureCache:
    """Compute the features of all images, unless they are there; what was cut off goes on.

    Args:
        encoder: frozen; on its device, in evaluation mode while this runs.
        dataset: images with names. With `files` (as segmentation sets on the disk have them), a
            changed size or time of a file makes another key, and so do other pixels of the first,
            middle or last image (another image size); without, all pixels are hashed.
        folder: where caches are kept; one sub-folder a key.
        features: as in `check_features`.
        batch_images: images per forward pass. A killed process loses one such batch.
        progress: say on stderr how much disk is needed, and show a bar.

    Raises:
        ValueError: an image whose features are not finite or beyond float16 (named), an empty set,
            unknown features, or too little room on the disk.
    """
    check_features(encoder, features)
    if not len(dataset):
        raise ValueError("there are no images to compute features of")
    about = {
        "version": _VERSION,
        "encoder": encoder_digest(encoder),
        "data": data_digest(dataset),
        "features": features,
    }
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    place = Path(folder) / key
    place.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(len(dataset)) if not _is_whole(_path(place, i))]
    if missing:
        about |= {"architecture": encoder.architecture} if hasattr(encoder, "architecture") else {}
        about |= {"set": getattr(dataset, "name", ""), "images": len(dataset)}
        write_atomically(place / "about.json", json.dumps(about, indent=2).encode())
        with frozen(encoder):
            _extract(encoder, dataset, missing, place, features, batch_images, progress)
    channels = [level.shape[0] for level in _read(_path(place, 0))]
    return FeatureCache(place, feature_strides(encoder, features), channels, len(dataset))


def level_batches(
    encoder: Encoder,
    dataset: SegmentationSet,
    features: str,
    batch_images: int,
    cache: FeatureCache | None = None,
) -> Iterator[tuple[list[Labelled], list[Tensor], list[int]]]:
    """The images of a set in order with their features, computed or out of a cache.

    Yields:
        Up to `batch_images` images of equal size; their levels (B, C_i, H_i, W_i), float32, or
        float16 from a cache (B = 1: no copy is made); the levels' strides.

    Raises:
        ValueError: as `feature_levels`.
    """
    if cache is not None:
        device = device_of(encoder)
        for index, item in enumerate(dataset):
            yield [item], [level[None].to(device) for level in cache[index]], cache.strides
        return
    for items, images in normalized_batches(encoder, dataset, batch_images):
        names = [item.name for item in items]
        yield items, *feature_levels(encoder, images, features, names)


def encoder_digest(encoder: nn.Module) -> str:
    """SHA-256 of all that decides an encoder's features.

    Values, types and names of weights and buffers, the printed module tree, the source files of
    its modules' classes and functions, and what its `normalize` makes of the 256 grey values.
    """
    digest = hashlib.sha256(repr(encoder).encode())
    for name, tensor in [*encoder.named_parameters(), *encoder.named_buffers()]:
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().data)
    own = [getattr(encoder, name, None) for name in ("features", "embed", "normalize")]
    forwards = [getattr(m.forward, "__func__", m.forward) for m in encoder.modules()]
    code = {*map(type, encoder.modules()), *forwards, *filter(None, own)}
    for content in sorted(set(map(_source, code))):
        digest.update(content)
    greys = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    normalized: Any = encoder.normalize(greys.contiguous().to(device_of(encoder)))  # type: ignore[operator]
    digest.update(normalized.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def data_digest(dataset: SegmentationSet | Sequence[Labelled]) -> str:
    """SHA-256 of the names, files and pixels of a set of images (see `cache_features`)."""
    digest, files = hashlib.sha256(), getattr(dataset, "files", None)
    looked_at = list(range(len(dataset)))
    if files:
        for file in files:
            status = Path(file).stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
        looked_at = sorted({0, len(dataset) // 2, len(dataset) - 1})
        digest.update(json.dumps(dataset.names).encode())  # type: ignore[union-attr]
    for index in looked_at:
        item = dataset[index]
        digest.update(f"{item.name} {item.image.shape} ".encode())
        digest.update(item.image.tobytes())
    return digest.hexdigest()


def _source(code: type | Callable[..., Any]) -> bytes:
    """The source file of a class or function; b"" for what is not written in Python."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(code))
    except (TypeError, OSError):
        return b""
    return Path(file).read_bytes() if file and Path(file).is_file() else b""


@torch.inference_mode()
def _extract(
    encoder: Encoder,
    dataset: SegmentationSet | Sequence[Labelled],
    missing: list[int],
    place: Path,
    features: str,
    batch_images: int,
    progress: bool,
) -> None:
    written, done = 0, 0
    items = (dataset[index] for index in missing)
    with tqdm(total=len(missing), desc="features", disable=not progress, leave=False) as bar:
        for batch, images in normalized_batches(encoder, items, batch_images):
            levels, _ = feature_levels(encoder, images, features, [item.name for item in batch])
            size = sum(2 * level[0].numel() for level in levels)
            # Sets of mixed sizes: the mean so far; before anything is written, the first image's.
            need = int((written / done if done else size) * (len(missing) - done))
            free = shutil.disk_usage(place).free
            if need > free:
                raise ValueError(
                    f"the features of {len(missing) - done} more images need about "
                    f"{need / 2**30:.2f} GiB, and {place} has {free / 2**30:.2f} GiB left: use "
                    "another folder, or features of fewer levels (such as the last stage)"
                )
            if progress and not done:
                tqdm.write(
                    f"features of {len(missing)} images: about {need / 2**30:.2f} GiB in {place} "
                    f"({free / 2**30:.1f} GiB free)",
                    file=sys.stderr,
                )
            for i, item in enumerate(batch):
                maps = {str(k): _float16(x[i], item.name) for k, x in enumerate(levels)}
                _write(_path(place, missing[done]), save(maps))
                written, done = written + size, done + 1
            bar.update(len(batch))


def _float16(level: Tensor, name: str) -> Tensor:
    """(C, h, w) -> (h, w, C) float16 on the CPU; ValueError where float16 cannot hold a value."""
    half = level.permute(1, 2, 0).half().cpu().contiguous()
    if not torch.linalg.vector_norm(half, math.inf).isfinite():
        raise ValueError(f"features of {name} exceed float16's range (65504)")
    return half


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:07d}.safetensors"


def _write(path: Path, data: bytes) -> None:
    """Put a file in place without waiting for the disk, which would take as long as the network."""
    with open_temporary(path) as file:
        file.write(data)
        file.flush()
        if os.name == "nt":  # Windows renames no open file
            file.close()
        Path(file.name).replace(path)


def _is_whole(path: Path) -> bool:
    """Whether a file is there and as long as its header says: a loss of power shortens files."""
    try:
        with safe_open(path, "pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False


def _read(path: Path) -> list[Tensor]:
    maps = load_file(path)
    return [maps[str(k)].permute(2, 0, 1) for k in range(len(maps))]
