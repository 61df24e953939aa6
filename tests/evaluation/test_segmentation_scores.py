"""Scores gathered image by image against the confusion matrix of the whole set."""

import numpy as np
import pytest
from fakes import label_set, masks

from ssl_flow.evaluation.metrics import ConfusionMatrix, SegmentationScores


def _scored(labels, predictions, classes):
    dataset = label_set(labels, classes=classes)
    scores = SegmentationScores(dataset)
    for item, prediction in zip(dataset, predictions, strict=True):
        scores.add(item, prediction)
    return scores


def test_scores_are_those_of_the_whole_set_in_memory_linear_in_the_classes():
    labels, predictions = masks(0), masks(1)
    labels[:, :4] = 255
    outcome = _scored(labels, predictions, classes=150).outcome(seed=3)
    whole = ConfusionMatrix(150)
    whole.update(predictions, labels)
    assert outcome.scores == {"miou": whole.miou(), "pixel_accuracy": whole.pixel_accuracy()}
    assert outcome.counts.size == 6 * 3 * 150
    np.testing.assert_array_equal(outcome.counts.sum(0), whole.sums())
    assert outcome.per_class["class2"] == whole.iou()[2] and outcome.per_class["class3"] is None
    assert outcome.details["seed"] == 3 and len(outcome.examples) == 6


def test_a_set_whose_every_label_is_ignored_is_refused():
    with pytest.raises(ValueError, match="fake: no pixel to score has a label"):
        _scored(np.full((2, 8, 8), 255), masks(0, 2, 8), classes=3).outcome()
