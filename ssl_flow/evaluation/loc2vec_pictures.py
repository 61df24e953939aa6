"""What an embedding of places looks like: neighbours, the map in its colours, walks, sums."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_flow.data.georeference import great_circle
from ssl_flow.data.tiles import TileMap
from ssl_flow.evaluation.loc2vec import Judged, Loc2Vec, embed_tiles
from ssl_flow.evaluation.pictures import fit_colors, strip
from ssl_flow.models import TileEncoder

# Of a layer whose name begins so; the first layers are drawn last. Others get a hue of their own.
_COLOURS = {
    "road_major": (214, 80, 40), "road": (250, 190, 60), "path": (150, 110, 70),
    "rail": (60, 60, 60), "building": (120, 90, 110), "water": (90, 150, 220),
    "forest": (110, 165, 100), "grass": (205, 230, 170), "green": (170, 215, 140),
    "residential": (225, 215, 215), "commercial": (235, 200, 225), "industrial": (225, 195, 215),
    "bare": (205, 195, 180), "amenity": (245, 225, 175),
}  # fmt: skip
_PAPER = 248
CELLS = 3000
"""Places of the map that is coloured."""


def tile_rgb(tiles: np.ndarray, tile_map: TileMap) -> np.ndarray:
    """(N, H, W, C) uint8 tiles of a map as pictures (N, H, W, 3) uint8; layers are painted over."""
    colour = np.flatnonzero(tile_map.colour)
    if len(colour):
        return tiles[..., colour[:3]]
    shown = np.full((*tiles.shape[:3], 3), _PAPER, np.float32)
    # The first on top, but for single spots, which would vanish beneath the areas around them.
    order = sorted(reversed(range(tiles.shape[-1])),
                   key=lambda index: tile_map.channels[index].startswith("amenity"))  # fmt: skip
    for index in order:
        name = tile_map.channels[index]
        hue = np.array([[[index * 67 % 180, 120, 200]]], np.uint8)
        other = tuple(cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist())
        paint = next((c for k, c in _COLOURS.items() if name.startswith(k)), other)
        share = tiles[..., index, None].astype(np.float32) / 255
        shown = shown + share * (np.array(paint, np.float32) - shown)
    return shown.round().astype(np.uint8)


def neighbour_sheet(shown: np.ndarray, grid: np.ndarray, side: int = 96) -> np.ndarray:
    """Pictures (N, H, W, 3) in the rows and columns of `grid`, (R, K) indices; -1 = nothing."""
    white = np.full((4, 4, 3), 255, np.uint8)
    rows = [strip([shown[i] if i >= 0 else white for i in line], (side, side)) for line in grid]
    return np.vstack([np.pad(row, ((2, 2), (2, 2), (0, 0)), constant_values=255) for row in rows])


def draw_pictures(
    encoder: nn.Module, tile_map: TileMap, protocol: Loc2Vec, judged: Judged
) -> list[tuple[str, str, np.ndarray]]:
    """(name, caption, picture (H, W, 3) uint8) of the tiles that are scored; few of a floor."""
    points = embed_tiles(encoder, judged.tiles)
    shown = tile_rgb(judged.tiles, tile_map)
    rng = np.random.default_rng(0)
    queries = rng.choice(len(points), min(8, len(points)), replace=False)
    apart = great_circle(judged.places[queries, None], judged.places[None]) / protocol.metres
    between = np.linalg.norm(points[queries, None] - points, axis=2)
    others = np.where(apart < 2, np.inf, between).argsort(1)[:, :8]
    text = "left a tile, then those nearest to it of other places (2 tiles away or more)"
    sheet = neighbour_sheet(shown, np.column_stack([queries, others]))
    pictures = [("neighbours", text, sheet)]
    text = "the map, and its places in the first three principal components (grey: left out)"
    pictures.append(("map", text, map_picture(encoder, tile_map, protocol, points)))
    if not isinstance(encoder, TileEncoder) or not encoder.tile:
        return pictures
    walked = neighbour_sheet(shown, walks(points, rng))
    pictures.append(("tsne", "all tiles by t-SNE", scatter(points, shown)))
    pictures.append(("walks", "nearest tiles along the line from the left to the right", walked))
    if sums := _sums(points, judged, tile_map):
        text = "left a tile; nearest to it less the mean of its class, plus that of another: "
        grid = neighbour_sheet(shown, sums[1])
        pictures.append(("sums", text + ", ".join(sums[0]), grid))
    text = "what each dimension answers to most (above) and least (below)"
    pictures.append(("filters", text, filters(encoder, judged.tiles, tile_map)))
    return pictures


def walks(points: np.ndarray, rng: np.random.Generator, steps: int = 9) -> np.ndarray:
    """(6, steps) indices: from one point to a distant one, the nearest not yet seen on the way."""
    grid = []
    for start in rng.choice(len(points), min(6, len(points)), replace=False):
        end = int(rng.choice(_nearest(points, points[start])[-len(points) // 5 :]))
        line = [int(start)]
        for share in np.linspace(0, 1, steps)[1:-1]:
            order = _nearest(points, (1 - share) * points[start] + share * points[end])
            line.append(int(next((i for i in order if i not in (*line, end)), end)))
        grid.append([*line, end])
    return np.array(grid)


def _nearest(points: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Indices of (N, D) points, nearest first."""
    return np.asarray(np.linalg.norm(points - place, axis=1).argsort())


def _sums(
    points: np.ndarray, judged: Judged, tile_map: TileMap
) -> tuple[list[str], np.ndarray] | None:
    label = next(iter(judged.labels), None)
    if label is None:
        return None
    classes, names = judged.labels[label], tile_map.labels[label].names or {}
    found, counts = np.unique(classes, return_counts=True)
    common = found[np.argsort(-counts)][:4].tolist()
    means = {c: points[classes == c].mean(0) for c in common}
    heads, grid = [], []
    for number, (a, b) in enumerate(list(itertools.permutations(common, 2))[:6]):
        mine = np.flatnonzero(classes == a)
        tile = mine[_nearest(points[mine], means[a])[(len(mine) // 2 + number) % len(mine)]]
        heads.append(f"{names.get(a, a)} to {names.get(b, b)}")
        order = _nearest(points, points[tile] - means[a] + means[b])
        grid.append([tile, -1, *order[order != tile][:8]])
    return (heads, np.array(grid)) if grid else None


def map_picture(
    encoder: nn.Module, tile_map: TileMap, protocol: Loc2Vec, points: np.ndarray
) -> np.ndarray:
    """The map beside the map coloured by the first three principal components of `points`.

    A cell a place of a grid of about `CELLS`; grey: outside or empty.
    """
    width, height = tile_map.size
    step = (width * height / CELLS) ** 0.5
    xy = np.stack(np.meshgrid(*(np.arange(step / 2, n - 0.5, step) for n in (width, height))), -1)
    kept, tiles = np.zeros(xy.shape[:2], bool), []
    for row, column in np.argwhere(tile_map.is_inside(xy.reshape(-1, 2)).reshape(kept.shape)):
        try:
            x, y = xy[row, column].tolist()
            tile = tile_map.cut(x, y, protocol.pixels, metres=protocol.metres)
        except ValueError:
            continue  # near a pole a tile is wider than the map
        if tile_map.content(tile) >= 0.05 and tile_map.is_land(xy[None, row, column])[0]:
            kept[row, column] = True
            tiles.append(tile)
    weight, bias = fit_colors(torch.from_numpy(points))
    shown = torch.from_numpy(embed_tiles(encoder, np.stack(tiles))) @ weight.T + bias
    colours = np.full((*kept.shape, 3), 128, np.uint8)
    colours[kept] = (shown.clamp(0, 1) * 255).round().byte().numpy()
    shape = (round(720 * width / height), 720)
    whole = tile_rgb(_overview(tile_map, shape)[None], tile_map)[0]
    side = cv2.resize(colours, shape, interpolation=cv2.INTER_NEAREST)
    return np.hstack([whole, np.full((720, 8, 3), 255, np.uint8), side])


def _overview(tile_map: TileMap, shape: tuple[int, int]) -> np.ndarray:
    """The whole map made small, (H, W, C) of `shape` (W, H); read in strips, as it may be huge."""
    width, height = tile_map.size
    edges = np.linspace(0, shape[1], min(shape[1], 24) + 1).round().astype(int).tolist()
    strips = []
    for top, bottom in itertools.pairwise(edges):
        y0, y1 = (round(row * height / shape[1]) for row in (top, bottom))
        y0 = min(y0, height - 1)
        bands = []
        for raster in tile_map.rasters:
            pixels = raster.read(0, y0, width, max(y1, y0 + 1))
            small = cv2.resize(pixels, (shape[0], bottom - top), interpolation=cv2.INTER_AREA)
            bands.append(small.reshape(bottom - top, shape[0], -1))
        strips.append(np.concatenate(bands, -1))
    return np.concatenate(strips)


def scatter(points: np.ndarray, shown: np.ndarray, size: int = 1400, side: int = 44) -> np.ndarray:
    """Tiles at their places in a t-SNE of (N, D) points; one that would cover another is left."""
    from sklearn.manifold import TSNE

    plane = TSNE(perplexity=min(30, (len(points) - 1) / 3), random_state=0).fit_transform(points)
    low, high = plane.min(0), plane.max(0)
    corners = ((plane - low) / (high - low) * (size - side)).astype(int)
    canvas, free = np.full((size, size, 3), 255, np.uint8), np.ones((size, size), bool)
    for picture, (x, y) in zip(shown, corners.tolist(), strict=True):
        window = (slice(y, y + side), slice(x, x + side))
        if free[window].mean() > 0.7:
            canvas[window] = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
            free[window] = False
    return canvas


def filters(encoder: TileEncoder, tiles: np.ndarray, tile_map: TileMap) -> np.ndarray:
    """Tiles made by gradient ascent, two for each dimension of the embedding: most, least.

    Erhan et al., "Visualizing higher-layer features of a deep network", 2009; from the mean colour
    and noise at a quarter of the resolution, moved in each step, so that no single pixel decides.
    """
    dimensions, side = encoder.embedding_dim, tiles.shape[1]
    device = next(encoder.parameters()).device
    encoder.eval()
    generator = torch.Generator().manual_seed(0)
    mean = torch.from_numpy(tiles.mean((0, 1, 2)) / 255).clamp(0.02, 0.98).float()
    coarse = torch.randn(2 * dimensions, len(mean), side // 4, side // 4, generator=generator)
    logits = (mean.logit()[:, None, None] + 0.1 * coarse).to(device).requires_grad_()
    sign = torch.tensor([1.0, -1.0], device=device).repeat_interleave(dimensions)
    unit = torch.arange(dimensions, device=device).repeat(2)
    optimizer = torch.optim.Adam([logits], lr=0.1)

    def pixels() -> Tensor:
        """(B, C, side, side) in 0..1, smooth."""
        return F.interpolate(logits, (side, side), mode="bilinear").sigmoid()

    for step in range(60):
        shift = (3 * step % 7 - 3, 5 * step % 7 - 3)
        values = pixels().roll(shift, (2, 3))
        answer = encoder(encoder.normalize(255 * values.permute(0, 2, 3, 1)))
        loss = -(sign * answer.gather(1, unit[:, None])[:, 0]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made = (255 * pixels()).detach().permute(0, 2, 3, 1).round().byte().cpu().numpy()
    return neighbour_sheet(tile_rgb(made, tile_map), np.arange(2 * dimensions).reshape(2, -1))
