"""The pictures of a suite's report, as data URIs: predictions, hardest images, features."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import cv2
import numpy as np
import torch
from torch import Tensor

from ssl_flow.data.segmentation import IGNORE, Labelled, SegmentationSet
from ssl_flow.evaluation.loc2vec import Loc2Vec, estimate_untrained, judged_tiles
from ssl_flow.evaluation.loc2vec_pictures import draw_pictures
from ssl_flow.evaluation.metrics import miou_of
from ssl_flow.evaluation.outcome import Outcome
from ssl_flow.evaluation.pictures import Tile, data_uri, palette, pca_rgb, strip, tile_of
from ssl_flow.evaluation.pixel_features import image_levels, joined
from ssl_flow.evaluation.protocols import Data
from ssl_flow.evaluation.suite import Cell, Options, prepared
from ssl_flow.evaluation.suite_tables import pretty, short, smaller_is_better
from ssl_flow.models.encoder import Encoder

_SIDE = 320  # shorter side of the images
_STRIDE = 8  # of the maps, or the encoder's finest stride where that is coarser

Strips = list[tuple[str, str]]  # label, data URI


def _truths(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], colors: np.ndarray
) -> Strips:
    tile = tile_of(images[0])
    truth = data_uri(strip([colors[mask] for mask in masks], tile, True), True)
    return [("image", data_uri(strip(images, tile))), ("truth", truth)]


def predictions(data: Data, outcomes: dict[str, Outcome]) -> Strips:
    """Strips of images, truth, and what each encoder predicts."""
    shown = {label: o.examples for label, o in outcomes.items() if o.examples}
    if not shown:
        return []
    images, truths, _ = zip(*next(iter(shown.values())), strict=True)
    found = 1 + max(int(t[t != 255].max(initial=0)) for t in truths)
    colors, tile = palette(len(data.shown.classes) or found), tile_of(images[0])
    rows = _truths(images, truths, colors)
    for label, examples in shown.items():
        maps = [colors[np.where(truth == 255, 255, guess)] for _, truth, guess in examples]
        rows.append((label, data_uri(strip(maps, tile, True), True)))
    return rows


def hardest(
    table: dict[str, Any], data: Data, outcomes: dict[str, Outcome], count: int = 6
) -> dict[str, Any] | None:
    """The images that are worst in the mean over the encoders, at most one of a sequence."""
    score, columns = table["headline"], {}
    for label, outcome in outcomes.items():
        if outcome.counts is not None:
            found = miou_of(outcome.counts)  # (N,), or (N, R)
            columns[label] = found.reshape(len(found), -1).mean(1)
        elif score in outcome.values:
            columns[label] = outcome.values[score]
    if not columns or data.kind == "maps":  # a tile is right or wrong: many are the worst
        return None
    items = next(iter(outcomes.values())).items
    mean = np.mean(list(columns.values()), axis=0)
    order = np.argsort(-mean if smaller_is_better(score) else mean, kind="stable")
    chosen: dict[str, int] = {}
    for index in order[~np.isnan(mean[order])].tolist():
        chosen.setdefault(data.unit_of(items[index]), index)
    worst = list(chosen.values())[:count]
    names = data.shown.names
    examples = [data.shown[names.index(items[i])] for i in worst if items[i] in names]
    strips = []
    if examples:
        images, masks, _ = zip(*examples, strict=True)
        classes = len(data.shown.classes)
        strips = _truths(images, masks, palette(classes))[: 2 if classes else 1]
    return {
        "what": "images" if data.kind == "segmentation" else table["unit"],
        "score": pretty(score),
        "strips": strips,
        "heads": ["", *(items[i] for i in worst)],
        "rows": [[label, *(short(values[i]) for i in worst)] for label, values in columns.items()],
    }


def feature_strips(data: Data, cells: Sequence[Cell], options: Options) -> dict[str, Any]:
    """PCA and similarity of every encoder on the same images of a set."""
    images, masks = pick_images(data.shown, data.unit_of)
    marks, tile = mark_pixels(masks), tile_of(images[0])
    image = data_uri(strip(list(images), tile))
    height, width = images.shape[1:3]
    total = len(images) * (tile[1] + 4) - 4
    placed: list[dict[str, Any]] = [
        {"rows": [], "top": round(100 * row / height, 2),
         "left": round(100 * (index * (tile[1] + 4) + column / width * tile[1]) / total, 2)}
        for index, row, column in marks
    ]  # fmt: skip
    pca = [("image", image)]
    for label, cell in _first_cells(data, cells).items():
        try:
            maps, stride = joint_maps(prepared(cell, options).eval(), images)
            pca.append((label, data_uri(strip(pca_tiles(maps, tile), tile))))
            for mark, place in zip(marks, placed, strict=True):
                tiles = similarity_tiles(maps, stride, mark, tile)
                place["rows"].append((label, data_uri(strip(tiles, tile))))
        except Exception as error:  # a picture must not cost the report
            pca.append((label, f"failed: {error}"))
    return {"name": data.name, "image": image, "pca": pca, "marks": placed}


def map_sheets(data: Data, cells: Sequence[Cell], options: Options) -> list[tuple[str, Strips]]:
    """For each encoder of a map its pictures: (title, (caption, data URI)); also as files."""
    folder, sheets = options.out / "pictures", []
    folder.mkdir(exist_ok=True)
    for label, cell in _first_cells(data, cells).items():
        shown, protocol, tile_map = [], cast("Loc2Vec", cell.settings), data.sets[0]
        try:
            train, judged, _ = judged_tiles(tile_map, protocol)
            encoder = prepared(cell, options)
            estimate_untrained(encoder, train.tiles)
            for name, caption, picture in draw_pictures(encoder, tile_map, protocol, judged):
                file = re.sub(r"[^\w.-]", "_", f"{data.name}_{label}_{name}.png")
                cv2.imwrite(str(folder / file), picture[..., ::-1])
                shown.append((caption, data_uri(picture)))
        except Exception as error:  # a picture must not cost the report
            shown.append((f"failed: {error}", ""))
        sheets.append((f"{data.name}: {label}", shown))
    return sheets


def _first_cells(data: Data, cells: Sequence[Cell]) -> dict[str, Cell]:
    """The first cell of every encoder on a set."""
    firsts: dict[str, Cell] = {}
    for cell in (cell for cell in cells if cell.data.spec == data.spec):
        firsts.setdefault(cell.label, cell)
    return firsts


def pick_images(
    dataset: SegmentationSet, unit_of: Callable[[str], str], count: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, H, W, 3) and masks (B, H, W) spread over a set, shrunk and cut to one size."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(dataset.names):
        groups.setdefault(unit_of(name), []).append(index)
    middles = [part[len(part) // 2] for part in groups.values()]
    if len(middles) < count:
        middles = list(range(len(dataset)))
    # The middles of equal parts: neither the first nor the last.
    chosen = [middles[int((i + 0.5) * len(middles) / count)] for i in range(count)]
    pairs = []
    for image, mask, _ in (dataset[index] for index in dict.fromkeys(chosen)):
        scale = _SIDE / min(mask.shape)
        size = (round(mask.shape[1] * scale), round(mask.shape[0] * scale))
        shrunk = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        pairs.append((shrunk, cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)))
    # Whole cells of the usual strides, so that maps cover their image exactly.
    rows, columns = (min(mask.shape[axis] for _, mask in pairs) // 16 * 16 for axis in (0, 1))

    def cut(array: np.ndarray) -> np.ndarray:
        top, left = (array.shape[0] - rows) // 2, (array.shape[1] - columns) // 2
        return array[top : top + rows, left : left + columns]

    images, masks = ([cut(array) for array in part] for part in zip(*pairs, strict=True))
    return np.stack(images), np.stack(masks)


def mark_pixels(masks: np.ndarray, each: int = 2) -> list[tuple[int, int, int]]:
    """Pixels well inside large regions of different classes: (image, row, column) of each."""
    used: Counter[int] = Counter()
    marks = []
    for index, mask in enumerate(masks):
        classes, areas = np.unique(mask[mask != IGNORE], return_counts=True)
        large = [(used[c], -a, c) for c, a in zip(classes.tolist(), areas, strict=True)
                 if a >= mask.size / 100]  # fmt: skip
        for _, _, chosen in sorted(large)[:each]:
            region = np.pad((mask == chosen).astype(np.uint8), 1)
            inside = cv2.distanceTransform(region, cv2.DIST_L2, 5)[1:-1, 1:-1]
            row, column = np.unravel_index(int(inside.argmax()), mask.shape)
            used[chosen] += 1
            marks.append((index, int(row), int(column)))
    return marks


@torch.no_grad()
def joint_maps(encoder: Encoder, images: np.ndarray) -> tuple[Tensor, int]:
    """All levels of (B, H, W, 3) images on one grid: (B, sum C, h, w), and its stride.

    A level has unit length at every cell before it is joined, so that each counts alike.
    ValueError for features that are not finite.
    """
    stride = max(_STRIDE, min(encoder.strides))
    items = [Labelled(image, image[..., 0], f"picture {i}") for i, image in enumerate(images)]
    parts = []
    for _, levels, strides in image_levels(encoder, items, "hypercolumn", 1):
        found = joined(levels, strides, stride, images.shape[1:3], unit=True)
        parts.append((found / len(levels) ** 0.5).cpu())
    return torch.cat(parts), stride


def pca_tiles(maps: Tensor, tile: Tile) -> list[np.ndarray]:
    """Three principal components over all images as colours, one (H, W, 3) uint8 an image."""
    return [cv2.resize(picture, tile[::-1]) for picture in pca_rgb(maps)]


def similarity_tiles(
    maps: Tensor, stride: int, mark: tuple[int, int, int], tile: Tile
) -> list[np.ndarray]:
    """Cosine similarity of every cell of every image to that of a marked pixel, as colours.

    From the smallest (dark) to the largest value over all the images, the mark's own.
    """
    index, row, column = mark
    chosen = maps[index, :, row // stride, column // stride]
    similarity = torch.einsum("bchw,c->bhw", maps, chosen).numpy()
    low, high = similarity.min(), similarity.max()
    scaled = ((similarity - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    large = [cv2.resize(picture, tile[::-1]) for picture in scaled]
    return [cv2.applyColorMap(picture, cv2.COLORMAP_VIRIDIS)[..., ::-1] for picture in large]
