"""`ssl-flow export`: an encoder as the files that other libraries load, compared after loading."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_flow.models.encoder import Encoder, WeightsError
from ssl_flow.models.export_card import write_card
from ssl_flow.models.export_graph import save_onnx, save_program
from ssl_flow.models.folder import load_encoder, read_folder, save_encoder
from ssl_flow.models.wrapped import OnnxNetwork

FORMATS = ("timm", "torchvision", "onnx", "torch-export", "hub")
_TOLERANCE = 1e-4  # of the largest number of a map
_Run = Callable[[Tensor], list[Tensor]]


def export_encoder(spec: str | Path, to: str, out: str | Path, licence: str = "other") -> list[str]:
    """Write an encoder into a new folder, load it back, and compare the features.

    Every format is the folder of `save_encoder` (so `load_encoder` and timm read each) and a model
    card with SHA-256 of the files. A torchvision ResNet's state dict is the same file, since timm
    names its layers alike; `onnx` adds `model.onnx`, `torch-export` adds `model.pt2`.

    Args:
        spec: of an encoder with a timm backbone, see `load_encoder`.
        to: one of `FORMATS`.
        out: the folder, which must not exist; it appears when all is well.
        licence: of the weights, for the card.

    Returns:
        What was compared, a line each with the largest error.

    Raises:
        FileExistsError: `out` is there.
        FileNotFoundError, WeightsError: see `load_encoder`.
        ValueError: the format cannot hold this encoder.
        ImportError: the format's library is not installed.
        RuntimeError: the loaded features differ from the encoder's.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already: give a new folder")
    if to not in FORMATS:
        raise ValueError(f"no format {to!r}; there are {', '.join(FORMATS)}")
    encoder = load_encoder(spec)
    if type(encoder) is not Encoder or encoder.model_args.get("in_chans", 3) != 3:
        raise ValueError(f"{spec} is no timm backbone of 3 channels: only those are exported")
    if Path(spec).exists() and "tile_encoder" in read_folder(Path(spec))[2]:
        raise ValueError(f"{spec} is an encoder of tiles; its folder is one that timm reads")
    if to == "torchvision":
        _torchvision(encoder)  # a refusal comes before the work
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        save_encoder(encoder, part)
        about = (part / "config.json").read_text(encoding="utf-8")
        if to == "onnx":
            save_onnx(encoder, part / "model.onnx", about)
        if to == "torch-export":
            save_program(encoder, part / "model.pt2", about)
        checks = _compare(encoder, part, to)
        write_card(encoder, part, to, _run_of(Path(spec)), licence, checks)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return checks


def _run_of(spec: Path) -> Path | None:
    """The run whose encoder that is, if it is a path into one."""
    path = spec.resolve()
    inside = (path, path.parent, path.parent.parent) if path.exists() else ()
    needed = ("encoder/config.json", "config.yaml")
    return next((run for run in inside if all((run / n).is_file() for n in needed)), None)


@torch.no_grad()
def _compare(encoder: Encoder, folder: Path, to: str) -> list[str]:
    again = load_encoder(folder)
    graph = to in ("onnx", "torch-export")  # which pads and crops inside, and gives the embedding
    readers: list[tuple[str, _Run]] = [
        ("ssl_flow", lambda images: _outputs(again, images)),
        _reader(encoder, folder, to),
    ]
    checks = []
    for reader, run in readers:
        complete = graph or reader == "ssl_flow"
        for name, images in _images(encoder, complete):
            pairs = list(zip(run(images), _outputs(encoder, images), strict=complete))
            # Map by map, since an embedding's numbers are small; unlike max(), torch's passes NaN.
            errors = torch.stack([(a - b).abs().max() for a, b in pairs])
            largest = torch.stack([b.abs().max() for _, b in pairs])
            size = " x ".join(map(str, images.shape))
            what = (
                f"{reader}, {name} ({size}): largest error {errors.max():.1e}, "
                f"feature {largest.max():.3g}"
            )
            if not (errors <= _TOLERANCE * largest).all():
                raise RuntimeError(f"the export is not the encoder: {what}")
            checks.append(what)
    return checks


def _reader(encoder: Encoder, folder: Path, to: str) -> tuple[str, _Run]:
    """The library that the format is for, and what it computes."""
    if to == "torchvision":
        from torchvision.models.feature_extraction import create_feature_extractor

        network = _torchvision(encoder)
        network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        names = ["relu", *(f"layer{i + 1}" for i in range(4))]
        extractor = create_feature_extractor(network, names)
        return "torchvision", lambda images: list(extractor(images).values())
    if to == "onnx":
        return "onnxruntime", OnnxNetwork(folder / "model.onnx")
    if to == "torch-export":
        program = torch.export.load(folder / "model.pt2").module()
        return "torch.export", lambda images: list(program(images))
    return "timm", _timm(folder, encoder)


def _images(encoder: Encoder, odd: bool) -> list[tuple[str, Tensor]]:
    """Noise, and the photograph that comes with matplotlib; in whole cells unless `odd`."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    cell = math.lcm(*encoder.strides)
    seeded = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 2 * cell + 5 * odd, 3 * cell + odd, generator=seeded)
    with Image.open(str(get_sample_data("grace_hopper.jpg", asfileobj=False))) as picture:
        rows = max(1, 224 // cell) * cell + 3 * odd
        small = picture.convert("RGB").resize((rows + cell, rows))
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    photograph = encoder.normalize(pixels.view(1, rows, rows + cell, 3))
    return [("noise", noise), ("photograph", photograph)]


def _outputs(encoder: Encoder, images: Tensor) -> list[Tensor]:
    embedding = [encoder.embed(images)] if encoder.head is not None else []
    return [*encoder.features(images), *embedding]


def _timm(folder: Path, encoder: Encoder) -> _Run:
    """timm's own pyramid; of a ViT, which goes through the last norm here, timm's plain model."""
    source = f"local-dir:{folder}"
    plain = timm.create_model(source, pretrained=True).eval()
    if encoder._norm:
        return Encoder(plain, encoder.architecture).features
    pyramid = timm.create_model(source, pretrained=True, features_only=True).eval()

    def run(images: Tensor) -> list[Tensor]:
        maps = [*pyramid(images)]  # channels come last in some
        return [
            m if m.shape[1] == c else m.permute(0, 3, 1, 2)
            for m, c in zip(maps, encoder.channels, strict=True)
        ]

    return run


def _torchvision(encoder: Encoder) -> nn.Module:
    """torchvision's network of the same name, without its classifier."""
    from torchvision import models

    name = encoder.architecture.split(".")[0]
    resnets = [n for n in models.list_models(module=models) if "resne" in n]
    if name not in resnets:
        raise ValueError(
            f"torchvision has no such ResNet as {encoder.architecture}; it has {', '.join(resnets)}"
        )
    network: nn.Module = models.get_model(name, weights=None).eval()
    network.fc = nn.Identity()
    return network


def export_command(argv: list[str]) -> int:
    """`ssl-flow export E --to FORMAT OUT`; 0, or 2 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="ssl-flow export", description=__doc__)
    parser.add_argument("encoder", help="a run or encoder folder, timm:NAME, timm:NAME@FILE")
    parser.add_argument("out", type=Path, help="folder to write, must not exist")
    parser.add_argument("--to", choices=FORMATS, required=True, help="what it is written for")
    parser.add_argument("--licence", default="other", help="of the weights, e.g. mit (%(default)s)")
    parser.add_argument("--push", metavar="USER/NAME", help="upload to the Hugging Face Hub, too")
    options = parser.parse_args(argv)
    try:
        if options.push and options.to != "hub":
            raise ValueError("--push goes with --to hub")
        for line in export_encoder(options.encoder, options.to, options.out, options.licence):
            print(line)
        if options.push:
            _push(options.out, options.push)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"ssl-flow export: error: {error}", file=sys.stderr)
        return 2
    print(f"written: {options.out}")
    return 0


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:
        raise WeightsError(f"{folder} is written, but not on the Hub: {error}") from error
