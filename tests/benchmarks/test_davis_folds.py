"""DAVIS held out in turn: each sequence is judged by a probe that has learned on all the others."""

import sys
from pathlib import Path

import numpy as np
import pytest

from ssl_flow.evaluation import LinearProbe, run_linear_probe

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
import davis_folds
from fakes import FakeEncoder, label_set

PROBE = LinearProbe(pixels_per_image=200, steps=60, lr=0.1)


def _sequence(seed, foreground):
    """Two frames whose foreground has the colour `foreground`."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((2, 24, 24)) < 0.4).astype(np.uint8)
    colours = np.array([[0, 0, 0], foreground], np.uint8)
    data = label_set(labels, colours[labels], classes=2, name=f"s{seed}")
    return [data[0], data[1]]


def test_a_sequence_is_judged_by_what_the_others_show():
    red, green = (255, 0, 0), (0, 255, 0)
    sequences = {"a": _sequence(0, red), "b": _sequence(1, red), "odd": _sequence(2, green)}
    a, b, odd = davis_folds.held_out(FakeEncoder((1,)).eval(), sequences, PROBE)
    assert a.iou()[1] > 0.99 and b.iou()[1] > 0.99
    assert odd.iou()[1] < 0.01  # nothing that was learned from is green
    assert int(a.counts.sum()) == 2 * 24 * 24


def test_a_fold_is_the_linear_probe_itself():
    rng = np.random.default_rng(0)
    noisy = [
        label_set(
            labels, rng.integers(0, 256, (2, 24, 24, 3), np.uint8) // 2 + labels[..., None] * 30, 2
        )
        for labels in rng.integers(0, 2, (2, 2, 24, 24), np.uint8)
    ]
    encoder = FakeEncoder((1, 4)).eval()
    sequences = {"learned": [noisy[0][0], noisy[0][1]], "judged": [noisy[1][0], noisy[1][1]]}
    table = davis_folds.held_out(encoder, sequences, PROBE)[1]
    whole = run_linear_probe(encoder, noisy[0], noisy[1], PROBE)
    assert 0.1 < whole.per_class["class1"] < 0.95
    assert float(table.iou()[1]) == pytest.approx(whole.per_class["class1"], abs=0.01)
