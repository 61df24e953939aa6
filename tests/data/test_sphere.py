"""Distances against known ones and vectors, draws uniform by area, blocks that do not leak."""

import numpy as np
import pytest

from ssl_flow.data.sphere import (
    EARTH_RADIUS,
    SpatialBlocks,
    around,
    far_apart,
    great_circle,
    tile_blocks,
    travel,
)

PLACES = [(9.52, 47.14), (0.0, 0.0), (179.9999, -60.0), (-40.0, 89.999), (5.0, -90.0)]


def scattered(count, seed=0):
    """Uniform on the sphere."""
    rng = np.random.default_rng(seed)
    lon = rng.uniform(-180, 180, count)
    return np.stack([lon, np.degrees(np.arcsin(rng.uniform(-1, 1, count)))], -1)


def vectors(places):
    lon, lat = np.radians(places).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)


def test_distances_by_hand():
    quarter = np.pi / 2 * EARTH_RADIUS
    assert great_circle(np.array([0.0, 0.0]), np.array([90.0, 0.0])) == pytest.approx(quarter)
    assert great_circle(np.array([17.0, 90.0]), np.array([-60.0, 0.0])) == pytest.approx(quarter)
    across = great_circle(np.array([179.5, 0.0]), np.array([-179.5, 0.0]))  # the date line
    assert across == pytest.approx(EARTH_RADIUS * np.radians(1))
    # Vaduz - Buenos Aires, 11500 km by any gazetteer.
    far = great_circle(np.array([9.5209, 47.1410]), np.array([-58.3816, -34.6037]))
    assert far == pytest.approx(11.4e6, rel=0.02)


def test_distances_equal_the_angle_between_vectors():
    first, second = scattered(500), scattered(500, seed=1)
    angle = np.arctan2(
        np.linalg.norm(np.cross(vectors(first), vectors(second)), axis=1),
        (vectors(first) * vectors(second)).sum(1),
    )
    np.testing.assert_allclose(great_circle(first, second), EARTH_RADIUS * angle, rtol=1e-7)


def test_far_apart_pairs():
    places = np.array([[0, 0], [1, 0], [0, 0.5]])
    near = 0.9 * np.radians(1) * EARTH_RADIUS
    expected = [[False, True, False], [True, False, True], [False, True, False]]
    assert far_apart(places, near).tolist() == expected


@pytest.mark.parametrize("metres", [1.0, 300.0, 1e6])
def test_travel_goes_as_far_as_asked_and_north_is_north(metres):
    places, bearings = scattered(200), np.random.default_rng(2).uniform(0, 2 * np.pi, 200)
    arrived = travel(places, bearings, np.full(200, metres))
    np.testing.assert_allclose(great_circle(places, arrived), metres, rtol=1e-6)
    assert (np.abs(arrived[:, 0]) <= 180).all()
    degrees = np.degrees(metres / EARTH_RADIUS)
    start = np.array([10.0, 20.0])
    np.testing.assert_allclose(travel(start, 0.0, metres), [10, 20 + degrees], rtol=1e-6)
    east = travel(np.zeros(2), np.pi / 2, metres)
    np.testing.assert_allclose(east, [degrees, 0], atol=1e-9)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("metres", [200.0, 3e6])
def test_draws_around_a_place_are_uniform_by_area(place, metres):
    rng, place, count = np.random.default_rng(3), np.array(place), 3000
    drawn = np.stack([around(rng, place, metres) for _ in range(count)])
    far = great_circle(place, drawn)
    assert far.max() <= metres * (1 + 1e-6)
    # The share of the area within r is uniform in 0..1; so is the bearing, seen in its octants.
    share = np.sort((np.sin(far / EARTH_RADIUS / 2) / np.sin(metres / EARTH_RADIUS / 2)) ** 2)
    assert np.abs(share - np.arange(count) / count).max() < 1.63 / np.sqrt(count)  # Kolmogorov, 1 %
    axis = vectors(place[None])[0]
    side = np.linalg.svd(axis[None])[2][1:]  # two directions across the axis
    x, y = side @ vectors(drawn).T
    octants = np.histogram(np.arctan2(y, x), 8, (-np.pi, np.pi))[0]
    assert ((octants - count / 8) ** 2 / (count / 8)).sum() < 18.5  # chi squared, 7 degrees, 1 %


@pytest.mark.parametrize(("block", "buffer"), [(1.2e6, 3e5), (5e5, 1.2e5), (3.1e6, 7.7e5)])
def test_blocks_do_not_leak(block, buffer):
    """Everywhere on the globe, the poles and the date line too."""
    blocks = SpatialBlocks(block, buffer, judged=0.5)
    places = np.concatenate([scattered(6000), np.array(PLACES)])
    train, judge = blocks.train(places), blocks.judge(places)
    assert not (train & judge).any()
    assert 0.4 < train.mean() < 0.6
    assert judge.mean() > 0.05
    assert great_circle(places[judge][:, None], places[train][None]).min() > buffer


@pytest.mark.parametrize("seed", range(5))
def test_blocks_at_the_scale_of_a_town(seed):
    rng = np.random.default_rng(0)
    places = np.stack([rng.uniform(9.47, 9.64, 4000), rng.uniform(47.05, 47.27, 4000)], -1)
    blocks = SpatialBlocks(block=2500, buffer=600, judged=0.4, seed=seed)
    train, judge = blocks.train(places), blocks.judge(places)
    assert 0.5 < train.mean() < 0.7
    assert judge.mean() > 0.06
    nearest = great_circle(places[judge][:, None], places[train][None]).min()
    assert 600 < nearest < 660  # no more is given away than has to be


def test_blocks_depend_on_the_seed_and_the_place_alone():
    places = scattered(300)
    blocks = SpatialBlocks(1e6, 1e5)
    one_by_one = np.concatenate([blocks.judge(place[None]) for place in places])
    np.testing.assert_array_equal(one_by_one, blocks.judge(places))
    assert (SpatialBlocks(1e6, 1e5, seed=1).judge(places) != one_by_one).any()
    shifted = places + np.array([360, 0])
    np.testing.assert_array_equal(blocks.judge(shifted), one_by_one)


def test_blocks_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="at least 4 buffers"):
        SpatialBlocks(1000, 300)
    with pytest.raises(ValueError, match="share between 0 and 1"):
        SpatialBlocks(1000, 100, judged=1.0)


@pytest.mark.parametrize("metres", [0.0, -1.0, 900e3])
def test_tiles_that_no_blocks_hold_name_the_key(metres):
    with pytest.raises(ValueError, match=f"a tile of {metres:g} m; .*data.metres"):
        tile_blocks(metres)
