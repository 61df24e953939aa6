"""Where pairs of tiles come from and what is done to them, on a map that knows what is asked."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ssl_flow.data.georeference import EARTH_RADIUS, great_circle
from ssl_flow.data.sphere import SpatialBlocks
from ssl_flow.data.tile_pairs import TilePairs

SIDE = 4


class FakeMap:
    """1000 x 1000 pixels, 500 a degree, at 59 degrees north; empty in the west (x < 300)."""

    channels = ("roads", "water", "forest")
    colour = np.zeros(3, bool)

    def __init__(self):
        self.georeference, self.rotations = self, []

    def lonlat(self, xy):
        return np.asarray(xy) / 500 * (1, -1) + (10, 60)

    def pixel(self, lonlat):
        return (np.asarray(lonlat) - (10, 60)) * (1, -1) * 500

    def is_inside(self, xy):
        return ((xy >= 0) & (xy < 1000)).all(-1)

    def content(self, tile):
        return float(tile.any())

    def cut(self, x, y, side, *, metres, rotation=0.0):
        assert (side, metres) == (SIDE, 3000.0)
        self.rotations.append(rotation)
        color = np.zeros(3) if x < 300 else np.array([200, 120, 40])
        return np.full((side, side, 3), color, np.uint8)


class Picture(FakeMap):
    channels = ("red", "green", "blue")
    colour = np.ones(3, bool)


def centres(count=400, left=400, right=990):
    rng = np.random.default_rng(5)
    return np.stack([rng.uniform(left, right, count), rng.uniform(10, 990, count)], -1)


def make(tile_map=None, places=None, length=2000, **options):
    options = {"shift": 3000.0, "drop_layers": 0.0, "metres": 3000.0} | options
    places = centres() if places is None else places
    return TilePairs(tile_map or FakeMap(), places, length, SIDE, **options)


def drawn_places(pairs):
    return np.stack([pairs[k].places.numpy() for k in range(len(pairs))])


def test_positives_lie_within_the_shift():
    places = drawn_places(make())
    near = great_circle(places[:, 0], places[:, 1])
    assert near.max() <= 3000.001
    assert near.max() > 2900


def test_positives_are_uniform_in_the_disk_on_the_sphere():
    """At 59 degrees north a degree of longitude is half as long as one of latitude."""
    places = drawn_places(make(places=centres(right=900) * (1, 0.8) + (0, 90)))
    metres = np.radians(places[:, 1] - places[:, 0]) * EARTH_RADIUS
    x, y = metres[:, 0] * np.cos(np.radians(places[:, 0, 1])), metres[:, 1]
    share = np.sort((x**2 + y**2) / 3000**2)  # of the disk's area
    limit = 1.63 / np.sqrt(len(share))  # Kolmogorov and Smirnov, 1 %
    assert np.abs(share - np.arange(len(share)) / len(share)).max() < limit
    turn = np.sort(np.arctan2(y, x) / (2 * np.pi) + 0.5)
    assert np.abs(turn - np.arange(len(turn)) / len(turn)).max() < limit


def test_places_on_empty_ground_or_off_the_map_are_drawn_again():
    edge = np.concatenate([centres(200, 300, 310), centres(200, 985, 999)])
    pairs = make(places=edge)
    for k in range(500):
        example = pairs[k]
        xy = FakeMap().pixel(example.places[1].numpy())
        assert 300 <= xy[0] < 1000
        assert example.tiles[1].any()


def test_a_positive_that_finds_no_ground_is_the_anchors_own():
    class Speck(FakeMap):
        def content(self, tile):
            return 0.0

    example = make(Speck(), length=1)[0]
    assert torch.equal(example.places[0], example.places[1])


def test_only_the_positive_is_rotated_by_any_angle():
    tile_map = FakeMap()
    pairs = make(tile_map)
    [pairs[k] for k in range(300)]
    rotated = np.array([angle for angle in tile_map.rotations if angle])
    assert len(rotated) == 300
    assert len(tile_map.rotations) == 600
    assert np.histogram(rotated, 6, (0, 360))[0].min() > 25


def test_layers_of_the_positive_alone_are_dropped_but_never_all():
    pairs = make(drop_layers=0.5)
    tiles = torch.stack([pairs[k].tiles for k in range(400)])
    assert (tiles[:, 0] == torch.tensor([200, 120, 40])).all()
    shown = tiles[:, 1].amax((1, 2)) > 0  # (400, 3)
    assert shown.any(1).all()
    share = 0.5 + 0.125 / 3  # one of the three is put back where all were drawn
    assert (shown.float().mean(0) - share).abs().max() < 0.1
    kept = tiles[:, 1][shown.all(1)]
    assert (kept == torch.tensor([200, 120, 40])).all()
    everything = make(drop_layers=1.0)[0].tiles[1]
    assert (everything.amax((0, 1)) > 0).sum() == 1


def test_colours_of_pictures_change_and_their_channels_stay():
    pairs = make(Picture(), drop_layers=1.0)
    tiles = torch.stack([pairs[k].tiles for k in range(50)])
    assert (tiles[:, 0] == torch.tensor([200, 120, 40])).all()
    assert tiles[:, 1].float().std(0).min() > 5
    assert (tiles[:, 1].amax((1, 2)) > 0).float().mean() > 0.9
    plain = make(Picture(), color_jitter=0.0)[3].tiles
    assert torch.equal(plain[1], plain[0])


def test_an_example_depends_on_the_seed_and_its_number_alone():
    one, other = make(drop_layers=0.5), make(drop_layers=0.5)
    for k in (900, 3, 401, 3):
        for a, b in zip(one[k], other[k], strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(one[3].places, make(seed=1)[3].places)
    assert not torch.equal(one[3].places, one[403].places)


def test_every_place_is_an_anchor_equally_often():
    anchors = drawn_places(make())[:, 0]
    for turn in range(5):
        assert len(np.unique(anchors[400 * turn : 400 * (turn + 1)], axis=0)) == 400
    assert not np.array_equal(anchors[:400], anchors[400:800])


def test_batches_from_worker_processes():
    pairs = make(length=8)
    batches = list(DataLoader(pairs, 4, num_workers=1, multiprocessing_context="fork"))
    assert batches[0].tiles.shape == (4, 2, SIDE, SIDE, 3)
    assert batches[0].places.shape == (4, 2, 2)
    assert torch.equal(batches[1].places[2], pairs[6].places)


def test_blocks_keep_what_is_learned_from_away_from_what_is_judged():
    """Not even a corner of a positive's tile reaches a judged tile."""
    tile_map, places = FakeMap(), centres(6000)
    reach = SIDE * 2 * 0.5**0.5 * 223  # metres from centre to corner: 223 m a pixel north-south
    blocks = SpatialBlocks(block=40_000, buffer=2 * reach + 3000, seed=3)
    lonlat = tile_map.lonlat(places)
    judged = lonlat[blocks.judge(lonlat)]
    pairs = make(places=places[blocks.train(lonlat)], length=500)
    learned = drawn_places(pairs).reshape(-1, 2)
    assert len(judged) > 200
    assert great_circle(learned[:, None], judged[None]).min() > 2 * reach


def test_a_wide_shift_stays_where_positives_are_allowed():
    """Three tiles far, but on the learned side of the split, as the anchors are."""
    tile_map, places = FakeMap(), centres(6000)
    blocks = SpatialBlocks(block=40_000, buffer=6000, seed=3)

    def allowed(xy):
        return blocks.train(tile_map.lonlat(xy))

    places = places[allowed(places)]
    learned = drawn_places(
        make(places=places, length=500, shift=9000.0, metres=3000.0, allowed=allowed)
    )
    assert blocks.train(learned[:, 1]).all()
    apart = great_circle(learned[:, 0], learned[:, 1])
    assert apart.max() > 8000 and (apart == 0).mean() < 0.01
    free = drawn_places(make(places=places, length=500, shift=9000.0, metres=3000.0))
    assert not blocks.train(free[:, 1]).all()  # else the first assertion would say nothing
    nowhere = make(length=1, allowed=lambda xy: np.zeros(len(xy), bool))[0]
    assert torch.equal(nowhere.places[0], nowhere.places[1])


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="no places for pairs"):
        make(places=np.empty((0, 2)))
    with pytest.raises(ValueError, match="shift is -1 m"):
        make(shift=-1)
    with pytest.raises(ValueError, match="share from 0 to 1, found 2"):
        make(drop_layers=2)
    with pytest.raises(IndexError):
        make()[2000]
