"""Encoders on disk: a folder that timm reads too, and the one door that loads every spec."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from ssl_flow.models.encoder import Encoder, Normalization, WeightsError, create_encoder
from ssl_flow.models.handmade import HandmadeEncoder
from ssl_flow.models.weights import load_weights, read_tensors
from ssl_flow.models.wrapped import load_onnx, load_python, load_torchvision


def save_encoder(encoder: Encoder, folder: str | Path) -> Path:
    """Write `config.json` + `model.safetensors` (as timm's `local-dir:` reads them) + the head.

    The backbone's keys are those of timm's plain model, so both of these give the same features:
    `ssl_flow.load_encoder(folder)` and `timm.create_model("local-dir:FOLDER", pretrained=True)`.
    Each file is written under a temporary name and moved in place.
    """
    head, own = encoder.head, {}
    if head is not None:
        own["ssl_flow"] = {"embedding_dim": head.embedding_dim, "hidden_dim": head.hidden_dim}
    return write_folder(encoder, folder, head, own)


def write_folder(
    encoder: Any,  # noqa: ANN401 (an Encoder or a TileEncoder)
    folder: str | Path,
    head: nn.Module | None,
    own: dict[str, Any],
) -> Path:
    """Write a backbone and its head as `save_encoder` says; `own` is added to `config.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    normalization, known = encoder.normalization, encoder.backbone.pretrained_cfg
    model_args = {"in_chans": 3, **encoder.model_args}
    if known.get("fixed_input_size"):  # position embeddings are those of this size
        model_args.setdefault("img_size", list(known["input_size"][1:]))
    input_size = getattr(encoder, "input_size", (224, 224))
    config = {
        "architecture": encoder.architecture,
        "num_classes": 0,
        "num_features": encoder.backbone.num_features,
        "model_args": model_args,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [model_args["in_chans"], *input_size],
            "mean": list(normalization.mean),
            "std": list(normalization.std),
            "interpolation": "bilinear",
        },
        **own,
    }
    _save_tensors(encoder.backbone, folder / "model.safetensors")
    if head is not None:
        _save_tensors(head, folder / "head.safetensors")
    temporary = folder / f".config.json.{os.getpid()}"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    temporary.replace(folder / "config.json")
    return folder


def load_encoder(spec: str | Path, seed: int = 0, strict: bool = True) -> Encoder:
    """Load an encoder from any spec, in evaluation mode.

    Args:
        spec: a folder as `save_encoder`, a training run, `ssl-flow export` and timm write it (the
            run folder itself will do); a `.safetensors` file with a `config.json` beside it; a
            `.onnx` of `ssl-flow export` (features only, by onnxruntime); or one of
            `timm:NAME` (timm's pretrained weights; a ViT's patch tokens become maps),
            `timm:NAME@FILE` (timm's architecture, the weights of a checkpoint of anyone's: see
            `weights.load_weights`),
            `torchvision:NAME`, `torchvision:NAME@FILE` (torchvision's likewise),
            `hf-hub:USER/NAME` (a folder on the Hugging Face Hub),
            `random:NAME` (timm's architecture, random weights),
            `python:MODULE:FUNCTION` (what your function returns: see `wrapped.WrappedEncoder`),
            `handmade` (colour, position, oriented gradients: no weights at all).
        seed: which random weights, for `random:` and `python:`.
        strict: refuse weights whose names are not exactly the network's (a classifier's apart);
            otherwise warn. `encoder.report` says what was matched.

    Returns:
        An `Encoder`. Freshly random ones have untrained BatchNorm statistics: the suite and a run's
        score estimate those of `random:` on the data; else call `estimate_batchnorm`.

    Raises:
        FileNotFoundError: nothing usable at the path (says what was expected).
        ValueError: unknown architecture, weights that do not fit it, a file that could run code, or
            a network without maps of whole strides.
        WeightsError: weights cannot be had from the network.
    """
    kind, _, name = str(spec).partition(":")
    name, _, file = name.partition("@") if kind in ("timm", "torchvision") else (name, "", "")
    if str(spec) == "handmade":
        return HandmadeEncoder().eval()
    if kind == "timm":
        encoder = create_encoder(name, pretrained=not file)
        return _filled(encoder, Path(file), strict).eval() if file else encoder.eval()
    if kind == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return create_encoder(name).eval()
    if kind == "torchvision":
        return load_torchvision(name, Path(file) if file else None, strict)
    if kind == "python":
        return load_python(name, seed)
    if kind == "hf-hub":
        return _load_folder(_download(name), strict)
    if Path(spec).suffix == ".onnx":
        return load_onnx(Path(spec))
    return _load_folder(Path(spec), strict)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted = ["config.json", "*.safetensors"]
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:
        raise WeightsError(f"could not get {repository!r} from the Hub: {error}") from error


def _filled(encoder: Encoder, weights: Path, strict: bool) -> Encoder:
    """The encoder with the backbone's weights out of a file."""
    backbone: Any = encoder.backbone
    classifier = backbone.pretrained_cfg.get("classifier") or ()
    classifier = [classifier] if isinstance(classifier, str) else classifier
    match = load_weights(backbone, read_tensors(weights), str(weights), classifier, strict)
    encoder.report = str(match)
    return encoder


def read_folder(path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """The folder of an encoder or a run -> the encoder's folder, its weights, its config.json.

    Raises: FileNotFoundError, ValueError: as `load_encoder`.
    """
    if path.suffix == ".pt2":
        raise ValueError(
            f"{path}: loading a torch.export program can run code. Give the folder that holds its "
            "config.json and model.safetensors, or call torch.export.load where you trust it"
        )
    if path.suffix == ".safetensors":
        folder, weights = path.parent, path
    else:
        folder = path / "encoder" if (path / "encoder" / "config.json").is_file() else path
        weights = folder / "model.safetensors"
    for needed in (folder / "config.json", weights):
        if not needed.is_file():
            raise FileNotFoundError(
                f"no encoder at {str(path)!r}: {needed} is missing. An encoder is a folder with "
                "config.json and model.safetensors, a run folder that holds encoder/, timm:NAME, "
                "timm:NAME@FILE (anyone's checkpoint), torchvision:NAME, hf-hub:USER/NAME, "
                "random:NAME, python:MODULE:FUNCTION or handmade."
            )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["architecture"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} names no 'architecture' (a timm model): {error!r}"
        ) from error
    return folder, weights, config


def _load_folder(path: Path, strict: bool) -> Encoder:
    folder, weights, config = read_folder(path)
    own = config.get("ssl_flow", {})
    encoder = create_encoder(
        config["architecture"],
        own.get("embedding_dim"),
        own.get("hidden_dim", 128),
        model_args=config.get("model_args"),
    )
    pixels = config.get("pretrained_cfg", {})
    if "mean" in pixels and "std" in pixels:
        encoder.normalization = Normalization(tuple(pixels["mean"]), tuple(pixels["std"]))
    if "input_size" in pixels:
        encoder.input_size = tuple(pixels["input_size"][1:])
    _filled(encoder, weights, strict)
    if encoder.head is not None:
        load_tensors(encoder.head, folder / "head.safetensors")
    return encoder.eval()


def _save_tensors(module: nn.Module, path: Path) -> None:
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # save_file makes files that only their owner can read.
    temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
    temporary.replace(path)


def load_tensors(module: nn.Module, path: Path) -> None:
    """Fill a module from a `.safetensors` file; ValueError (with its name) when it does not fit."""
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:
        raise ValueError(f"{path} does not fit the architecture in config.json: {error}") from error
