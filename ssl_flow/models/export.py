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
from ssl_flow.models.folder import load_encoder, save_encoder

FORMATS = ("timm", "torchvision", "onnx", "torch-export", "hub")
_TOLERANCE = 1e-4  # of the largest feature
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
    if type(encoder) is not Encoder:
        raise ValueError(f"{spec} is no timm backbone: only those are exported")
    if to == "torchvision":
        _torchvision(encoder)  # a refusal comes before the work
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        save_encoder(encoder, part)
        if to == "onnx":
            save_onnx(encoder, part / "model.onnx")
        if to == "torch-export":
            save_program(encoder, part / "model.pt2")
        checks = _compare(encoder, part, to)
        folder = Path(spec)
        run = next((f for f in (folder, folder.parent) if (f / "config.yaml").is_file()), None)
        write_card(encoder, part, to, run, licence, checks)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return checks


@torch.no_grad()
def _compare(encoder: Encoder, folder: Path, to: str) -> list[str]:
    again = load_encoder(folder)
    readers: dict[str, tuple[bool, _Run]] = {"ssl_flow": (True, lambda x: _outputs(again, x))}
    if to in ("timm", "hub"):
        readers["timm"] = False, _timm(folder, encoder)
    if to == "torchvision":
        network = _torchvision(encoder)
        network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        readers["torchvision"] = False, _torchvision_maps(network)
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(
            folder / "model.onnx", providers=["CPUExecutionProvider"]
        )
        readers["onnxruntime"] = (
            True,
            lambda x: list(map(torch.from_numpy, session.run(None, {"images": x.numpy()}))),
        )
    if to == "torch-export":
        program = torch.export.load(folder / "model.pt2").module()
        readers["torch.export"] = True, lambda x: list(program(x))
    checks = []
    for reader, (any_size, run) in readers.items():
        for name, images in _images(encoder, any_size):
            found, expected = run(images), _outputs(encoder, images)
            pairs = list(zip(found, expected, strict=any_size))
            error = max(float((a - b).abs().max()) for a, b in pairs)
            largest = max(float(b.abs().max()) for _, b in pairs)
            size = " x ".join(map(str, images.shape))
            what = f"{reader}, {name} ({size}): largest error {error:.1e}, feature {largest:.3g}"
            if not error <= _TOLERANCE * largest:
                raise RuntimeError(f"the export is not the encoder: {what}")
            checks.append(what)
    return checks


def _images(encoder: Encoder, any_size: bool) -> list[tuple[str, Tensor]]:
    """Noise, and the photograph that comes with matplotlib; in whole cells unless `any_size`."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    cell, odd = math.lcm(*encoder.strides), 1 if any_size else 0
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


def _torchvision_maps(network: nn.Module) -> _Run:
    from torchvision.models.feature_extraction import create_feature_extractor

    names = ["relu", *(f"layer{i + 1}" for i in range(4))]
    extractor = create_feature_extractor(network, names)
    return lambda images: list(extractor(images).values())


def export_command(argv: list[str]) -> int:
    """`ssl-flow export E --to FORMAT OUT`; 0, or 2 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="ssl-flow export", description=__doc__)
    parser.add_argument("encoder", help="a run or encoder folder, timm:NAME, timm:NAME@FILE")
    parser.add_argument("out", type=Path, help="folder to write, must not exist")
    parser.add_argument("--to", choices=FORMATS, required=True)
    parser.add_argument("--licence", default="other", help="of the weights, for the card: mit")
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
        print(f"export: {error}", file=sys.stderr)
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
