"""Mined negatives against loops over all triplets."""

import math

import pytest
import torch

from ssl_flow.losses.mining import batch_hard, semi_hard


def batch(seed, places=9, dim=3, allowed=0.4):
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(2 * places, dim, generator=generator, dtype=torch.float64)
    apart = torch.rand(places, places, generator=generator) < allowed
    apart = (apart | apart.T).fill_diagonal_(False).repeat(2, 2)
    return embedding, apart


def by_loops(embedding, apart, choose):
    rows, triplets = len(embedding), []
    for a in range(rows):
        p = (a + rows // 2) % rows
        near = math.dist(embedding[a], embedding[p])
        far = {n: math.dist(embedding[a], embedding[n]) for n in range(rows) if apart[a, n]}
        if far:
            triplets.append((a, p, choose(near, far)))
    return triplets


def hardest(_, far):
    return min(far, key=far.get)


def facenet(near, far):
    beyond = {n: d for n, d in far.items() if d > near}
    return min(beyond, key=beyond.get) if beyond else max(far, key=far.get)


@pytest.mark.parametrize(("mine", "choose"), [(batch_hard, hardest), (semi_hard, facenet)])
@pytest.mark.parametrize("allowed", [0.05, 0.4, 1.0])
def test_against_a_triple_loop(mine, choose, allowed):
    skipped = 0
    for seed in range(10):
        embedding, apart = batch(seed, allowed=allowed)
        expected = by_loops(embedding, apart, choose)
        assert torch.stack(mine(embedding, apart), 1).tolist() == [list(t) for t in expected]
        skipped += len(embedding) - len(expected)
    assert (skipped > 0) == (allowed < 0.1)


def test_semi_hard_falls_back_to_the_farthest():
    embedding = torch.tensor([[0.0], [1.0], [10.0], [12.0]])  # places 0, 2 and 1, 3
    apart = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]], dtype=torch.bool)
    # Row 1's positive is 11 away, both negatives are nearer; row 0's negative at 12 is just beyond.
    assert semi_hard(embedding, apart).negative.tolist() == [3, 2, 1, 0]
    assert batch_hard(embedding, apart).negative.tolist() == [1, 0, 3, 2]


def test_nothing_to_mine_is_no_error():
    embedding, apart = batch(0, allowed=0.0)
    assert [len(rows) for rows in batch_hard(embedding, apart)] == [0, 0, 0]


def test_near_twins_are_told_apart_far_from_the_origin():
    """By a matrix product in float32 their distances would all be rounding noise."""
    embedding = 5000 + torch.tensor([[0.0], [0.02], [0.01], [0.025]])
    apart = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]], dtype=torch.bool)
    assert batch_hard(embedding, apart).negative.tolist() == [1, 2, 1, 2]
    assert batch_hard((embedding - 5000).half(), apart).negative.tolist() == [1, 2, 1, 2]


def test_shapes_are_checked():
    embedding, apart = batch(0)
    for rows, mask in [(embedding[:-1], apart[:-1, :-1]), (embedding, apart[:, :4])]:
        with pytest.raises(ValueError, match=r"embedding must be \(2B, D\)"):
            semi_hard(rows, mask)
