"""Networks that timm does not build as encoders: torchvision's, and those of a user's function."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_flow.models.encoder import Encoder, Normalization, WeightsError, device_of
from ssl_flow.models.weights import load_weights, read_tensors

_IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PROBE = (224, 448)  # multiples of the usual strides and of patches of 14; one map is not square


class WrappedEncoder(Encoder):
    """An `Encoder` around any network that gives maps; its channels and strides are measured."""

    def __init__(
        self, network: Callable[..., Any], name: str, normalization: Normalization = _IMAGENET
    ) -> None:
        """Run the network on a random image to learn its levels.

        Args:
            network: a module or function; it, or its `features`, takes (B, 3, H, W) images with
                sides that are multiples of all its strides, and gives a map (B, C, H/s, W/s), or a
                list or dict of maps, fine to coarse. Its `channels` and `strides`, if any, must be
                these. Its `normalize` ((B, H, W, 3) uint8 -> images), if any, replaces
                `normalization`.
            name: for messages.
            normalization: ImageNet's by default.

        Raises:
            ValueError: what it gives are no such maps.
        """
        nn.Module.__init__(self)
        self.backbone = network if isinstance(network, nn.Module) else _Function(network)
        self.architecture, self.model_args, self.head = name, {}, None
        self.normalization = normalization
        self.strides, self.channels, self.input_size = [], [], (224, 224)
        self.eval()
        try:
            self._measure(network)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{name} does not take images of any size: {error!r}") from error

    def normalize(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 RGB -> (B, 3, H, W) float32, as the network expects."""
        own = getattr(self.backbone, "normalize", None)
        normalized: Tensor = own(images) if own is not None else super().normalize(images)
        return normalized

    @torch.no_grad()
    def _measure(self, network: object) -> None:
        """Find strides and channels; see that they hold for another size, too."""
        image = torch.rand(1, 3, *_PROBE, generator=torch.Generator().manual_seed(0))
        image = image.to(device_of(self))
        maps = self._maps(image)
        self.strides = [_PROBE[0] // level.shape[2] for level in maps]
        self.channels = [level.shape[1] for level in maps]
        if self.strides != sorted(self.strides):
            raise ValueError(
                f"{self.architecture} gives maps of strides {self.strides}; expected fine to coarse"
            )
        for name in ("strides", "channels"):
            measured = getattr(self, name)
            if list(getattr(network, name, measured)) != measured:
                declared = f"{self.architecture} has {name} = {getattr(network, name)}"
                raise ValueError(f"{declared}, but its maps have {measured}")
        side = math.lcm(*self.strides)
        self.features(torch.zeros(2, 3, 3 * side - 1, 2 * side).to(image))

    def _maps(self, images: Tensor) -> list[Tensor]:
        features = getattr(self.backbone, "features", self.backbone)
        maps = features(images.contiguous())  # it may call view() on what comes of it
        maps = list(maps.values()) if isinstance(maps, Mapping) else maps
        maps = list(maps) if isinstance(maps, list | tuple) else [maps]
        for level in maps or [None]:
            if not (isinstance(level, Tensor) and level.ndim == 4 and len(level) == len(images)):
                found = tuple(level.shape) if isinstance(level, Tensor) else type(level).__name__
                raise ValueError(
                    f"{self.architecture} gives {found} for images of {tuple(images.shape)}; "
                    "expected a map (B, C, H/s, W/s), or a list or dict of maps"
                )
        height, width = images.shape[2:]
        strides = self.strides or [height // max(1, level.shape[2]) for level in maps]
        for level, stride in zip(maps, strides, strict=True):
            rows, columns = level.shape[2:]
            if (rows * stride, columns * stride) != (height, width):
                raise ValueError(
                    f"{self.architecture} gives a map of {rows} x {columns} for an image of "
                    f"{height} x {width} (rows x columns): no whole stride s with H/s x W/s. "
                    "Pad its convolutions; pooled vectors and token lists are no maps"
                )
        return maps


class _Function(nn.Module):
    """A function as a module; the modules that it uses by name are its children."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function
        used: dict[str, Any] = {"owner": getattr(function, "__self__", None)}
        if inspect.isroutine(function) and not inspect.isbuiltin(function):
            variables = inspect.getclosurevars(function)
            used |= {**variables.globals, **variables.nonlocals}
        for name, value in used.items():  # else eval() and .to() would not reach them
            if isinstance(value, nn.Module):
                self.add_module(name, value)
        for name in ("features", "normalize"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))


class _Pyramid(nn.Sequential):
    """Layers one after another; the last map of every size, fine to coarse."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> list of (B, C_i, H/s_i, W/s_i)."""
        maps = {}
        images = images.contiguous(memory_format=torch.channels_last)
        for layer in self:
            images = layer(images)
            maps[images.shape[2:]] = images
        return list(maps.values())


def load_torchvision(name: str, file: Path | None = None, strict: bool = True) -> WrappedEncoder:
    """A classification network of torchvision with its default pretrained weights, or a file's.

    Its levels are the last maps of every resolution, as timm's. For `file` see `load_weights`.

    Raises:
        ValueError: no such network, not a sequence of layers that give maps (use timm's then), or
            weights that do not fit.
        WeightsError: the weights cannot be had.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        close = [n for n in known if n[:4] == name[:4]]
        raise ValueError(
            f"torchvision has no model {name!r}; near it: {', '.join(close) or 'none'}"
        )
    weights, report = models.get_model_weights(name).DEFAULT, ""
    try:
        model = models.get_model(name, weights=None if file else weights).eval()
    except Exception as error:
        raise WeightsError(
            f"could not get torchvision's weights for {name!r} ({error}). Use a network connection"
        ) from error
    if file:
        classifier = [n for n in ("fc", "classifier", "heads", "head") if hasattr(model, n)]
        for part in classifier:
            setattr(model, part, nn.Identity())
        report = str(load_weights(model, read_tensors(file), str(file), classifier, strict))
    preset = weights.transforms()
    normalization = Normalization(tuple(preset.mean), tuple(preset.std))
    layers = []
    for layer in _layers(getattr(model, "features", model)):
        if isinstance(layer, nn.AdaptiveAvgPool2d | nn.Dropout | nn.Linear):
            break  # the classifier
        layers.append(layer)
    refusal = f"torchvision's {name} is no sequence of layers with maps of any size; try timm:"
    try:
        _check_sequence(model, layers)
        encoder = WrappedEncoder(_Pyramid(*layers), f"torchvision:{name}", normalization)
    except Exception as error:
        raise ValueError(f"{refusal} ({error})") from error
    encoder.input_size, encoder.report = tuple(preset.crop_size * 2), report
    return encoder


def _layers(module: nn.Module) -> list[nn.Module]:
    """The children; those that are plain sequences opened."""
    layers = []
    for child in module.children():
        layers += _layers(child) if type(child) is nn.Sequential else [child]
    return layers


@torch.no_grad()
def _check_sequence(model: nn.Module, layers: list[nn.Module]) -> None:
    """ValueError unless the last layer gives in `model` what it gives after the others alone."""
    seen: list[Tensor] = []
    hook = layers[-1].register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    image = torch.rand(1, 3, *_PROBE, generator=torch.Generator().manual_seed(0))
    try:
        model(image)
        nn.Sequential(*layers)(image)
    finally:
        hook.remove()
    if len(seen) != 2 or not torch.allclose(seen[0], seen[1], atol=1e-5):
        raise ValueError("its layers do not run one after another")


def load_python(spec: str, seed: int = 0) -> Encoder:
    """What a user's function returns, as an encoder: see `WrappedEncoder` for what that may be.

    Args:
        spec: `MODULE:FUNCTION`; the module is looked for in the current folder, too.
        seed: of torch's generator while the function runs.

    Raises:
        ValueError: no such module or function, or a result that is no encoder.
    """
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise ValueError(f"python:{spec}: write python:MODULE:FUNCTION (a module as in `import`)")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a console script has not got it
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"python:{spec}: {error} (searched: Python's path and here)") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = function()
    if isinstance(network, Encoder):
        return network.eval()
    if not callable(getattr(network, "features", network)):
        raise ValueError(
            f"python:{spec} returned {type(network).__name__}; expected an nn.Module or a function "
            "that takes images (B, 3, H, W) and gives maps, or one with features(images)"
        )
    return WrappedEncoder(network, f"python:{spec}")


class OnnxNetwork(nn.Module):
    """An ONNX graph, computed by onnxruntime on the CPU."""

    def __init__(self, path: Path) -> None:
        """Raises ImportError: no onnxruntime here; ValueError: no ONNX file."""
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(f"{path}: pip install 'ssl-flow[onnx]' to run it") from error
        content = path.read_bytes()
        # Two graphs differ in nothing else that a cache of features could tell them by.
        digest = torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
        self.register_buffer("digest", digest)
        try:
            providers = ["CPUExecutionProvider"]
            self.session = onnxruntime.InferenceSession(content, providers=providers)
        except Exception as error:
            raise ValueError(f"{path} is no readable ONNX model: {error}") from error

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> all outputs."""
        given = self.session.run(None, {"images": images.detach().cpu().numpy()})
        return [torch.from_numpy(array).to(images.device) for array in given]

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> list of (B, C_i, H/s_i, W/s_i)."""
        names = [output.name for output in self.session.get_outputs()]
        return [x for name, x in zip(names, self(images), strict=True) if name != "embedding"]


def load_onnx(path: Path) -> WrappedEncoder:
    """The features of a graph that `ssl-flow export --to onnx` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no ONNX file, or another graph, which does not say its normalization.
        ImportError: no onnxruntime here.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no encoder at {str(path)!r}: no such file")
    network = OnnxNetwork(path)
    about = network.session.get_modelmeta().custom_metadata_map.get("ssl_flow")
    if about is None:
        raise ValueError(
            f"{path} was not written by `ssl-flow export`; for another graph write a function: "
            "python:MODULE:FUNCTION"
        )
    pixels = json.loads(about)["pretrained_cfg"]
    normalization = Normalization(tuple(pixels["mean"]), tuple(pixels["std"]))
    encoder = WrappedEncoder(network, str(path), normalization)
    encoder.input_size = tuple(pixels["input_size"][1:])
    return encoder
