"""Features of a frozen encoder on the disk: computed once, read as fast as the disk gives them.

    files = cache_features(encoder, train_set, "features")
    read_features(files[0])     # of image 0: list of (C_i, h_i, w_i) float16, mapped, not yet read

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
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ssl_flow.data.segmentation import Labelled, SegmentationSet
from ssl_flow.evaluation.pixel_features import (
    bar,
    check_features,
    feature_strides,
    frozen,
    image_levels,
)
from ssl_flow.flow.shard import write_atomically
from ssl_flow.models.encoder import Encoder, device_of

_VERSION = 2  # of the layout and of what is hashed


def cache_features(
    encoder: Encoder,
    dataset: SegmentationSet | Sequence[Labelled],
    folder: str | Path,
    features: str = "hypercolumn",
    batch_images: int = 8,
) -> list[Path]:
    """Compute the features of all images, unless they are there; what was cut off goes on.

    `folder` has one sub-folder a key (for what a changed image is, see `data_digest`). A killed
    process loses one batch of `batch_images`. Returns a file an image, for `read_features`.
    ValueError for unknown features, an image whose features are not finite or beyond float16, or no
    room on the disk for what is missing, if all images are like the first.
    """
    check_features(encoder, features)
    about = [_VERSION, encoder_digest(encoder), data_digest(dataset), features]
    place = Path(folder) / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    place.mkdir(parents=True, exist_ok=True)
    files = [place / f"{index:07d}.safetensors" for index in range(len(dataset))]
    missing = [index for index, file in enumerate(files) if not file.exists()]
    items = (dataset[index] for index in bar(missing, "features"))
    with frozen(encoder), torch.inference_mode():
        found = image_levels(encoder, items, features, batch_images)
        for index, (item, levels, _) in zip(missing, found, strict=True):
            halves = [x[0].permute(1, 2, 0).half().cpu().contiguous() for x in levels]
            if not all(torch.linalg.vector_norm(x, math.inf).isfinite() for x in halves):
                raise ValueError(f"features of {item.name} exceed float16's range (65504)")
            data = save({str(k): x for k, x in enumerate(halves)})
            if index == missing[0]:
                need, free = len(data) * len(missing), shutil.disk_usage(place).free
                if need > free:
                    raise ValueError(
                        f"the features of {len(missing)} more images need about "
                        f"{need / 2**30:.1f} GiB, and {place} has {free / 2**30:.1f} GiB left: "
                        "use another folder, or features of one level"
                    )
            write_atomically(files[index], data)
    return files


def read_features(file: Path) -> list[Tensor]:
    """Float16 maps (C_i, h_i, w_i) of an image, views of mapped (h_i, w_i, C_i).

    ValueError with the file's name where it cannot be read.
    """
    try:
        maps = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read ({error}); delete it, and it is redone") from error
    return [maps[str(k)].permute(2, 0, 1) for k in range(len(maps))]


def cached_levels(
    encoder: Encoder, dataset: SegmentationSet, features: str, batch_images: int,
    folder: str | Path | None, what: str,
) -> Iterator[tuple[Labelled, list[Tensor], list[int]]]:  # fmt: skip
    """As `image_levels`; with a folder by way of its cache: float16, mapped, not copied."""
    if folder is None:
        yield from image_levels(encoder, bar(dataset, what), features, batch_images)
        return
    files = cache_features(encoder, dataset, folder, features, batch_images)
    device, strides = device_of(encoder), feature_strides(encoder, features)
    for item, file in zip(bar(dataset, what), files, strict=True):
        yield item, [level[None].to(device) for level in read_features(file)], strides


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
    normalization: Any = getattr(encoder, "normalization", None)
    channels = len(normalization.mean) if normalization else 3
    greys = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, channels)
    normalized: Any = encoder.normalize(greys.contiguous().to(device_of(encoder)))  # type: ignore[operator]
    digest.update(normalized.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def data_digest(dataset: SegmentationSet | Sequence[Labelled], masks: bool = False) -> str:
    """SHA-256 of the names and pixels of a set of images (and of their masks).

    Of files the sizes and times count, and the pixels of the first, middle and last image, so that
    another image size is another set; of images that only the memory has, all pixels.
    """
    digest = hashlib.sha256()
    looked_at: Sequence[int] = range(len(dataset))
    if isinstance(dataset, SegmentationSet) and (dataset.files or "spec" in dataset.protocol):
        for file in [*dataset.files, *(dataset.mask_files if masks else [])]:
            status = Path(file).stat()
            digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
        digest.update(json.dumps(dataset.names).encode())
        looked_at = sorted({0, len(dataset) // 2, len(dataset) - 1} if len(dataset) else [])
    for item in (dataset[index] for index in looked_at):
        digest.update(f"{item.name} {item.image.shape} ".encode())
        digest.update(item.image.tobytes() + item.mask.tobytes() * masks)
    return digest.hexdigest()


def _source(code: type | Callable[..., Any]) -> bytes:
    """The source file of a class or function; b"" for what is not written in Python."""
    try:
        return Path(str(inspect.getsourcefile(inspect.unwrap(code)))).read_bytes()
    except (TypeError, OSError):
        return b""
