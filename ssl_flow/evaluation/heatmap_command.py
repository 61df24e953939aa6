"""The command `ssl-flow show heatmap`: where in an image an encoder sees something."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import tyro

from ssl_flow.data.labelled import read_image
from ssl_flow.evaluation.embedding_pictures import estimate_random, shrunk
from ssl_flow.evaluation.heatmap import (
    check_method,
    class_map,
    class_scores,
    region_classifier,
    similarity,
)
from ssl_flow.evaluation.linear_head import Head, open_head, save_head
from ssl_flow.evaluation.refusal import run_command
from ssl_flow.flow.shard import write_atomically
from ssl_flow.models import load_encoder, pick_device


@dataclass
class ShowHeatmapCommand:
    """Draw which parts of an image are alike to an encoder, or speak for a class."""

    image: tyro.conf.Positional[Path]
    """An image file."""
    encoder: str
    """FOLDER | timm:NAME | torchvision:NAME | random:NAME | handmade | python:MODULE:FUNCTION"""
    method: Literal[
        "similarity", "cam", "grad-cam", "grad-cam++", "guided-backprop", "deconvolution"
    ] = "similarity"
    """similarity: cosine to the embedding of --at or --region. The others explain the score of a
    class on the mean of the last level: of --head, or of one that --at or --region is the example
    of. guided-backprop and deconvolution take networks with ReLUs alone."""
    at: str | None = None
    """x,y: a pixel of the image, from the top left."""
    region: str | None = None
    """x0,y0,x1,y1: the pixels x0 <= x < x1, y0 <= y < y1."""
    head: str | None = None
    """imagefolder:PATH: fit the linear classifier of the protocol `classification` there (it is
    kept beside the picture); FILE.safetensors: weight (K, C) and bias (K)."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Name or number of a class of the head; by default the one of the highest score."""
    out: Path = Path()
    """A .png, or the folder for one; the map itself goes beside it (.npy, float32, H x W)."""
    size: int = 512
    """Shorter side in pixels to which a larger image is shrunk for the encoder."""
    device: str = "auto"
    """cpu, cuda, or auto."""


def show_heatmap_command(argv: Sequence[str]) -> int:
    """Run `ssl-flow show heatmap`; returns the exit code: 0, or 2 for input it cannot use."""
    return run_command("ssl-flow show heatmap", ShowHeatmapCommand, argv, _show)


def _show(command: ShowHeatmapCommand) -> str:
    image, method, out = read_image(command.image), command.method, command.out
    if out.suffix != ".png":
        out = out / f"{command.image.stem}_{method}.png"
    if command.size < 16:
        raise ValueError(f"--size {command.size}: expected 16 pixels or more")
    region = _region(command, image)
    head = open_head(command.head) if command.head else None
    wanted = head.index_of(command.class_) if head and command.class_ is not None else None
    encoder: Any = load_encoder(command.encoder).to(pick_device(command.device))
    check_method(encoder, method)
    out.parent.mkdir(parents=True, exist_ok=True)
    small = shrunk(image, command.size)
    estimate_random(encoder, command.encoder, [small])
    height, width = (a / b for a, b in zip(small.shape[:2], image.shape[:2], strict=True))
    near = (region[0] * width, region[1] * height, region[2] * width, region[3] * height)
    about: str = method
    if method == "similarity":
        found = similarity(encoder, small, near)
    else:
        head = head or Head(["the region"], partial(region_classifier, image=small, region=near))
        weight, bias = head.fit(encoder)
        scores = class_scores(encoder, small, weight, bias)
        index = int(scores.argmax()) if wanted is None else wanted
        about += f" of {head.classes[index]} (score {scores[index]:.3g})"
        found = class_map(encoder, small, method, weight, bias, index)
        if command.head and command.head.startswith("imagefolder:"):
            save_head(out.parent / "classifier.safetensors", weight, bias, head.classes)
    found = cv2.resize(found, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    buffer = io.BytesIO()
    np.save(buffer, found)
    write_atomically(out.with_suffix(".npy"), buffer.getvalue())
    picture = overlay(image, found, None if command.head else region)
    write_atomically(out, cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
    return f"wrote {out} and .npy: {about}, values {found.min():.3g} to {found.max():.3g}"


def _region(command: ShowHeatmapCommand, image: np.ndarray) -> tuple[int, int, int, int]:
    """What --at or --region say, the whole image with --head.

    Raises:
        ValueError: it is not in the image; not exactly one of the three is given.
    """
    height, width = image.shape[:2]
    given = [command.at, command.region, command.head]
    if sum(text is not None for text in given) != 1 or (
        command.head and command.method == "similarity"
    ):
        more = "" if command.method == "similarity" else ", --head"
        raise ValueError(f"--method {command.method} needs exactly one of --at, --region{more}")
    if command.class_ is not None and command.head is None:
        raise ValueError("--class needs a --head that has classes")
    if command.head is not None:
        return 0, 0, width, height
    text, form = (command.at, "x,y") if command.at else (command.region or "", "x0,y0,x1,y1")
    parts = text.split(",")
    if len(parts) != form.count(",") + 1 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{text!r}: expected {form}, whole pixels from the top left")
    x0, y0 = int(parts[0]), int(parts[1])
    x1, y1 = (int(parts[2]), int(parts[3])) if len(parts) == 4 else (x0 + 1, y0 + 1)
    if not (x0 < x1 <= width and y0 < y1 <= height):
        raise ValueError(f"{text}: not in the image of {width} x {height} (x, y) pixels")
    return x0, y0, x1, y1


def overlay(
    image: np.ndarray, values: np.ndarray, region: tuple[int, ...] | None = None
) -> np.ndarray:
    """The grey image (H, W, 3) under the colours of a map (H, W): (H, W, 3) uint8.

    From the smallest value (dark blue) to the 99.5th percentile (yellow); `region` is framed.
    """
    low, high = float(values.min()), float(np.percentile(values, 99.5))
    scaled = ((values - low) / max(high - low, 1e-9)).clip(0, 1) * 255
    colors = cv2.applyColorMap(scaled.astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    picture: np.ndarray = (0.35 * image.mean(2, keepdims=True) + 0.65 * colors).astype(np.uint8)
    if region is not None:
        thick = max(1, round(min(image.shape[:2]) / 200))
        room = 3 * thick  # a single pixel is seen by its frame alone
        x0, y0, x1, y1 = region
        corners = (x0 - room, y0 - room), (x1 + room, y1 + room)
        cv2.rectangle(picture, *corners, (255, 255, 255), thick)
    return picture
