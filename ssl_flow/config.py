"""Every knob of a training run, with its default; and a strict YAML loader."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    store: str = "synthetic"
    """A store written by `ssl-flow flow`; `synthetic` or `synthetic:N`: N (150) videos, made and
    analysed on the spot; `map:PATH`, a map as of `ssl-flow loc2vec rasterize`."""
    crop: int = 128
    """Side of the training crops (or tiles) in pixels, a multiple of 32."""
    start_crop: int = 0
    """Side at the start, grows in steps of 32 to `crop` in two thirds of the run; 0 = off."""
    min_scale: float = 0.3
    """Smallest crop as a fraction of the area of the largest square in the frame."""
    color_jitter: float = 0.4
    """Strength of brightness, contrast, saturation and hue changes; 0 = none. Half of it is the
    probability for a map's layer to be switched off."""
    metres: float = 200.0
    """Side of a map's tile on the ground."""
    shift: float = 0.5
    """How far the positive of a triplet may lie from its anchor, in sides of a tile."""
    far: float = 3.0
    """How far a negative has to lie, in sides of a tile."""
    workers: int = 1
    """Processes that read and augment; 0 = in the training process."""


@dataclass(frozen=True)
class ModelConfig:
    """Backbone and head."""

    backbone: str = "resnet18"
    """Any timm model name."""
    init_from: str = ""
    """Start weights: a run or encoder folder, timm:NAME, a .safetensors file, a checkpoint (.pt) of
    a run; empty = random. On the command line --init-from, too."""
    embedding_dim: int = 16
    """D, the length of a pixel's embedding."""
    hidden_dim: int = 128
    """Channels to which the head projects every level of the backbone."""


@dataclass(frozen=True)
class LossConfig:
    """The cross-pixel flow-similarity loss, and ridge regression of the flow beside it."""

    objective: Literal[
        "cross_entropy",
        "kernel_alignment",
        "regression",
        "triplet_margin",
        "softmax_ratio",
        "soft_pn",
        "info_nce",
    ] = "cross_entropy"
    """What compares the two kernel matrices; of a map, the last four compare the triplets."""
    embedding_scale: float = 1.0
    """s of the embedding kernel, s * cosine."""
    embedding_temperature: float = 0.1
    """Softmax temperature of the embedding kernel (cross_entropy, info_nce)."""
    flow_sigma: float = 0.5
    """Width of the Gaussian flow kernel, in units of the normalised flow."""
    flow_temperature: float = 0.1
    """Softmax temperature of the flow kernel (cross_entropy)."""
    self_pairs: Literal["exclude", "subtract_identity"] = "exclude"
    """How a pixel's pair with itself is kept from dominating."""
    flow_normalization: Literal["standardize", "log", "none"] = "standardize"
    """Per image: zero mean and unit deviation; log compression to [-1, 1]; pixels as they are."""
    deep_weight: float = 0.0
    """Weight of the same loss of a second embedding, read at stride 16 alone; 0 = off."""
    ridge_weight: float = 0.0
    """Weight of a second term: the flow that no linear map of the embedding explains; 0 = off."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 600
    """Optimiser steps."""
    batch_size: int = 16
    """Crops a step, of all processes together."""
    accumulate: int = 1
    """Parts in which a batch is computed to save memory; the gradient is the whole batch's."""
    learning_rate: float = 1e-3
    """Peak of warm-up + cosine, AdamW."""
    weight_decay: float = 0.05
    """AdamW's, on weights that are matrices or kernels."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then saved and judged; 0 = off."""
    amp: Literal["auto", "bfloat16", "float16", "none"] = "auto"
    """Autocast; auto = bfloat16 where the device computes it natively, else float16 on GPUs."""
    compile: bool = False
    """torch.compile the encoder: a minute or more at the start, faster steps on a GPU."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory."""
    sync_batchnorm: bool = False
    """BatchNorm over the batches of all GPUs (torchrun) instead of each one's own."""
    log_every: int = 20
    """Steps between lines of metrics."""
    checkpoint_every: int = 200
    """Steps between checkpoints (to resume; the last 2 and the best are kept) and pictures."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The score at the end of the run, and on the way."""

    data: str = "synthetic"
    """Labelled data for the linear probe, e.g. `camvid:PATH`; `none` = no score."""
    every: int = 0
    """Steps between short probes of a part of the images, which choose the best checkpoint;
    0 = off, the loss does."""


@dataclass(frozen=True)
class Config:
    """A pretraining run: videos' flow -> encoder -> score."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    """Of weights, order and augmentation."""
    device: str = "auto"
    """`auto` = cuda where there is one, else cpu."""
    out: str = "runs"
    """Folder in which the run's own folder is made."""

    def __post_init__(self) -> None:
        """Refuse impossible values before anything starts."""
        groups = {k: vars(v) for k, v in vars(self).items() if dataclasses.is_dataclass(v)}
        values = {f"{g}.{k}": v for g, group in groups.items() for k, v in group.items()}
        values["seed"] = self.seed
        crop, start, batch = self.data.crop, self.data.start_crop, self.train.batch_size
        sides = f"0 or a multiple of 32 up to data.crop ({crop})"
        checks = [
            *(
                (k, math.isfinite(v), "a finite number")
                for k, v in values.items()
                if type(v) is float
            ),
            *((key, values[key] >= least, f"{least} or more") for key, least in _LEAST.items()),
            ("data.crop", crop > 0 and crop % 32 == 0, "a multiple of 32"),
            ("data.start_crop", start % 32 == 0 and 0 <= start <= crop, sides),
            ("data.min_scale", 0 < self.data.min_scale <= 1, "in (0, 1]"),
            ("data.color_jitter", 0 <= self.data.color_jitter <= 1, "in [0, 1]"),
            ("data.metres", self.data.metres > 0, "above 0"),
            ("data.shift", self.data.shift >= 0, "at least 0"),
            ("data.far", self.data.far > self.data.shift, "above data.shift"),
            (
                "evaluation.every",
                self.evaluation.every == 0 or self.evaluation.data != "none",
                "0 without labelled images: set evaluation.data",
            ),
            ("train.ema", 0 <= self.train.ema < 1, "in [0, 1)"),
            ("train.warmup", 0 <= self.train.warmup < 1, "in [0, 1)"),
            ("train.learning_rate", self.train.learning_rate > 0, "above 0"),
            ("seed", 0 <= self.seed < 2**63, "in [0, 2**63)"),
        ]
        for key, fine, expected in checks:
            if not fine:
                raise ValueError(f"{key} is {values[key]!r}; expected {expected}")
        if batch % self.train.accumulate:
            found = f"train.accumulate is {self.train.accumulate}"
            raise ValueError(f"{found}; expected a divisor of train.batch_size ({batch})")


def refuse_without_effect(config: Config, keys: Iterable[str], what: str) -> None:
    """ValueError for keys like `data.crop` that are set though they mean nothing `what`."""

    def value(config: Config, key: str) -> Any:  # noqa: ANN401
        group, _, name = key.partition(".")
        return getattr(getattr(config, group), name)

    default = Config()
    changed = [key for key in keys if value(config, key) != value(default, key)]
    if changed:
        found = ", ".join(f"{key} ({value(config, key)!r})" for key in changed)
        raise ValueError(f"without effect in a run {what}: {found}; leave it out")


_LEAST = {
    "data.workers": 0, "model.embedding_dim": 2, "model.hidden_dim": 1,
    "loss.ridge_weight": 0, "train.steps": 1, "train.batch_size": 1, "train.accumulate": 1,
    "train.weight_decay": 0, "train.log_every": 1, "train.checkpoint_every": 1,
    "evaluation.every": 0,
}  # fmt: skip


def load_config(name: str) -> Config:
    """Read a YAML file, or a preset by its name (`quickstart`, `small`, ...).

    Raises:
        FileNotFoundError: neither a file nor a preset; lists the presets.
        ValueError: not YAML, a key twice, an unknown key (names the nearest known one), a value of
            the wrong type or an impossible one.
    """
    presets = preset_files()
    path = Path(name) if Path(name).is_file() else presets.get(name)
    if path is None:
        known = ", ".join(presets)
        raise FileNotFoundError(
            f"no configuration {name!r}: not a file, and the presets are {known}"
        )
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    config: Config = _build(Config, loaded, str(path), "")
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads; atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(
        yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), encoding="utf-8"
    )
    temporary.replace(path)


def preset_files() -> dict[str, Path]:
    """Preset name -> its file: in the installed package, or in the checkout's `configs/`."""
    here = Path(__file__).parent
    packaged = here / "configs"
    folder = packaged if packaged.is_dir() else here.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.YAMLError(f"the key {name!r} is there twice\n{key.start_mark}")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _build(kind: Any, values: Any, source: str, prefix: str) -> Any:  # noqa: ANN401
    """A dataclass from a mapping, its groups too; ValueError names the file and the key."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: {prefix or 'the file'} holds {values!r}; expected keys")
    hints = typing.get_type_hints(kind)
    built = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key not in hints:
            near = difflib.get_close_matches(str(key), _all_keys(), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(hints)}"
            raise ValueError(f"{source}: unknown key {name!r}{hint}")
        wanted, choices = hints[key], typing.get_args(hints[key])
        if dataclasses.is_dataclass(wanted):
            value = _build(wanted, value, source, name)
        elif choices and value not in choices:
            expected = f"one of {', '.join(choices)}"
            raise ValueError(f"{source}: {name} is {value!r}; expected {expected}")
        elif wanted is float and type(value) in (int, str):
            try:  # YAML 1.1 reads 1e-3 (without a dot) as text
                value = float(value)
            except ValueError as error:
                message = f"{source}: {name} is {value!r}; expected float"
                raise ValueError(message) from error
        elif not choices and type(value) is not wanted:
            raise ValueError(f"{source}: {name} is {value!r}; expected {wanted.__name__}")
        built[key] = value
    return kind(**built)


def _all_keys() -> list[str]:
    groups = typing.get_type_hints(Config)
    return [*groups, *(k for g in groups.values() for k in getattr(g, "__annotations__", ()))]
