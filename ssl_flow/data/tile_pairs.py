"""Pairs of map tiles in a reproducible order: a place, and the same place seen anew.

As in Loc2Vec (Sentiance, 2018), the second is shifted, rotated, and some of its layers are switched
off, or its colours changed if the map is a picture; the first is cut as it lies on the map. The
third of a triplet is another place of the batch, far away (`ssl_flow.losses.mining`).

    xy, _ = tile_map.draw_centres(20_000, 64, rng=np.random.default_rng(0))
    xy = xy[tile_blocks(200).train(tile_map.lonlat(xy))]
    pairs = TilePairs(tile_map, xy, length=100_000, side=64, metres=200, shift=100)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_flow.data.pairs import sample_color
from ssl_flow.data.sphere import around
from ssl_flow.data.tiles import TileMap

_TRIES = 100


class TilePair(NamedTuple):
    """One example; torch's default collation puts B of them in front."""

    tiles: Tensor
    """(2, side, side, C) uint8: anchor, positive."""
    places: Tensor
    """(2, 2) float64: longitude and latitude of their centres."""


class TilePairs(Dataset[TilePair]):
    """Pairs whose anchors are given places, each as often as the others, in a new order a turn.

    Example `k` depends on (seed, k) alone, so neither the number of workers nor a restart in the
    middle changes what is seen.

    The positive's centre is uniform by area in the disk of `shift` metres around the anchor's. It
    is drawn again where it falls off the map, where `allowed` refuses it, or its tile shows less
    than `least_content`, and is the anchor's own if all of 100 draws do.
    """

    def __init__(
        self,
        tile_map: TileMap,
        centres: np.ndarray,
        length: int,
        side: int,
        *,
        shift: float,
        metres: float,
        allowed: Callable[[np.ndarray], np.ndarray] | None = None,
        drop_layers: float = 0.2,
        color_jitter: float = 0.4,
        least_content: float = 0.05,
        seed: int = 0,
    ) -> None:
        """Check the numbers.

        Args:
            tile_map: where tiles are cut.
            centres: (N, 2) pixels of the places, none of them empty, as `draw_centres` gives.
            length: examples in the whole run.
            side: of a tile in pixels.
            shift: metres between the anchor's and the positive's centre, at most.
            metres: the tile's side on the ground.
            allowed: (N, 2) pixels -> (N,) bool: where positives may lie, as `centres` do already;
                None = all over the map. With a split by blocks it keeps them on its side.
            drop_layers: probability for each layer of the positive to be switched off (to 0); one
                that shows something always stays. Not for the channels of a picture.
            color_jitter: strength of the change of a picture's colours, see `sample_color`.
            least_content: see above.
            seed: of everything.

        Raises:
            ValueError: no places, a negative shift, a share outside of 0..1.
        """
        if len(centres) == 0:
            raise ValueError("no places for pairs: the map is empty, or the split took all")
        if not shift >= 0:
            raise ValueError(f"shift is {shift:g} m, expected 0 or more")
        if not 0 <= drop_layers <= 1:
            raise ValueError(f"drop_layers is a share from 0 to 1, found {drop_layers}")
        self.tile_map, self.length, self.side = tile_map, length, side
        self.centres = np.asarray(centres, np.float64)
        self.places = tile_map.lonlat(self.centres)
        self.shift, self.metres, self.allowed = shift, metres, allowed
        self.drop_layers, self.color_jitter = drop_layers, color_jitter
        self.least_content, self.seed = least_content, seed
        self._turn: tuple[int, np.ndarray] = (-1, np.empty(0, int))  # the last one's order

    def __len__(self) -> int:
        """Examples in the whole run."""
        return self.length

    def __getitem__(self, k: int) -> TilePair:
        """The `k`-th example of the run."""
        if not 0 <= k < self.length:  # IndexError also ends `for example in pairs`
            raise IndexError(f"example {k} of {self.length}")
        index = self._anchor(k)
        rng = np.random.default_rng((self.seed, 1, k))
        positive, place = self._positive(rng, index)
        tiles = np.stack([self._tile(self.centres[index]), self._augment(rng, positive)])
        places = np.stack([self.places[index], place])
        return TilePair(torch.from_numpy(tiles), torch.from_numpy(places))

    def _anchor(self, k: int) -> int:
        turn, position = divmod(k, len(self.centres))
        if self._turn[0] != turn:
            order = np.random.default_rng((self.seed, 0, turn)).permutation(len(self.centres))
            self._turn = turn, order
        return int(self._turn[1][position])

    def _positive(self, rng: np.random.Generator, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A tile near a place, and where it is."""
        for _ in range(_TRIES):
            rotation = rng.uniform(0, 360)
            place = around(rng, self.places[index], self.shift)
            centre = self.tile_map.georeference.pixel(place)
            inside = self.tile_map.is_inside(centre[None])[0]
            if inside and (self.allowed is None or self.allowed(centre[None])[0]):
                tile = self._tile(centre, rotation)
                if self.tile_map.content(tile) >= self.least_content:
                    return tile, place
        return self._tile(self.centres[index], rotation), self.places[index]

    def _tile(self, centre: np.ndarray, rotation: float = 0.0) -> np.ndarray:
        x, y = centre.tolist()
        return self.tile_map.cut(x, y, self.side, metres=self.metres, rotation=rotation)

    def _augment(self, rng: np.random.Generator, tile: np.ndarray) -> np.ndarray:
        """Switch layers off and change the colours of pictures: (side, side, C) uint8."""
        colour = self.tile_map.colour
        dropped = (rng.uniform(size=len(colour)) < self.drop_layers) & ~colour
        shown = np.flatnonzero(tile.any((0, 1)))
        if len(shown) and dropped[shown].all():
            dropped[rng.choice(shown)] = False
        tile = np.where(dropped, np.uint8(0), tile)
        for rgb in np.flatnonzero(colour).reshape(-1, 3):  # a picture each
            matrix = sample_color(rng, self.color_jitter)
            pixels = tile[..., rgb].astype(np.float64)
            changed = pixels @ matrix[:, :3].T + matrix[:, 3] * pixels.mean()
            tile[..., rgb] = changed.round().clip(0, 255)
        return tile
