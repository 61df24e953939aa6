"""An encoder as one graph without Python: a `torch.export` program, an ONNX model."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ssl_flow.models.encoder import EMBEDDING_STRIDE, Encoder


class Graph(nn.Module):
    """Features and embedding of images of any size, padded and cropped inside."""

    def __init__(self, encoder: Encoder) -> None:
        """What it gives is named by `outputs`."""
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) normalised -> `features` of the encoder, then `embed`."""
        encoder, (height, width) = self.encoder, images.shape[2:]
        cell = math.lcm(*encoder.strides)
        maps = encoder._maps(_cut(images, _ceil(height, cell) * cell, _ceil(width, cell) * cell))
        given = [
            _cut(level, _ceil(height, stride), _ceil(width, stride))
            for level, stride in zip(maps, encoder.strides, strict=True)
        ]
        if encoder.head is not None:
            grid = _ceil(height, EMBEDDING_STRIDE), _ceil(width, EMBEDDING_STRIDE)
            given.append(F.normalize(_cut(encoder.head(maps), *grid).float(), dim=1))
        return tuple(given)


def _cut(maps: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows and columns; where there are fewer, the last one repeated.

    By index: slices and padding would tie the graph to whether the traced image was padded.
    """
    height, width = maps.shape[2:]
    i = torch.arange(rows, device=maps.device).clamp(max=height - 1)
    j = torch.arange(columns, device=maps.device).clamp(max=width - 1)
    return maps.index_select(2, i).index_select(3, j)


def _ceil(side: int, stride: int) -> int:
    return (side + stride - 1) // stride  # -(-side // stride) is another number in ONNX


def export_program(encoder: Encoder) -> ExportedProgram:
    """A program for any batch and any sides above one cell of the coarsest level.

    Raises:
        ValueError: the backbone's code depends on the image's size.
    """
    if any(hasattr(module, "window_size") for module in encoder.backbone.modules()):
        warnings.warn(
            f"{encoder.architecture} divides its maps into windows, and torch.export may need more "
            "than ten minutes for the shapes of those; --to timm takes seconds",
            stacklevel=2,
        )
    cell = math.lcm(*encoder.strides)
    images = torch.zeros(2, 3, 2 * cell + 3, 3 * cell + 5)  # 0 and 1 would be taken for constants
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    try:
        with torch.no_grad():
            return torch.export.export(Graph(encoder).eval(), (images,), dynamic_shapes=(sizes,))
    except Exception as error:
        raise ValueError(
            f"{encoder.architecture} cannot become a graph for images of any size: its code "
            f"depends on the size ({str(error).strip().splitlines()[0]}). --to timm works for all"
        ) from error


def save_program(encoder: Encoder, path: Path, about: str) -> None:
    """Write `torch.export.load`'s format; `about`, what config.json says, lies in it, too."""
    torch.export.save(export_program(encoder), path, extra_files={"config.json": about})


def save_onnx(encoder: Encoder, path: Path, about: str) -> None:
    """Write ONNX: input `images`, outputs stage1, ..., embedding; batch, height and width are free.

    `about`, what config.json says, becomes its metadata `ssl_flow`.

    Raises:
        ImportError: the extra is not installed.
        ValueError: see `export_program`.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401 (to check it)
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise ImportError(f"--to onnx needs {error.name}: pip install 'ssl-flow[onnx]'") from error
    program = export_program(encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's about its own insides
        exported = torch.onnx.export(
            program, input_names=["images"], output_names=outputs(encoder), verbose=False
        )
    assert exported is not None
    model = exported.model_proto
    model.metadata_props.add(key="ssl_flow", value=about)
    onnx.save(model, path)


def outputs(encoder: Encoder) -> list[str]:
    """Names of what the graph gives."""
    stages = [f"stage{i + 1}" for i in range(len(encoder.strides))]
    return stages + (["embedding"] if encoder.head is not None else [])
