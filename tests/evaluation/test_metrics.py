import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from ssl_flow.evaluation import ConfusionMatrix


def _random(seed, classes=5, shape=(3, 20, 30)):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes, shape)
    prediction = np.where(rng.random(shape) < 0.5, target, rng.integers(0, classes, shape))
    target[rng.random(shape) < 0.1] = 255
    return prediction, target


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_torchmetrics(seed):
    ours = ConfusionMatrix(5)
    theirs = {
        average: MulticlassJaccardIndex(5, average=average, ignore_index=255)
        for average in ("none", "macro")
    }
    accuracy = MulticlassAccuracy(5, average="micro", ignore_index=255)
    for batch in range(3):
        prediction, target = (torch.from_numpy(x) for x in _random(10 * seed + batch))
        ours.update(prediction, target)
        for metric in (*theirs.values(), accuracy):
            metric.update(prediction, target)
    np.testing.assert_allclose(ours.iou(), theirs["none"].compute().numpy(), rtol=1e-5)
    assert ours.miou() == pytest.approx(theirs["macro"].compute().item(), rel=1e-5)
    assert ours.pixel_accuracy() == pytest.approx(accuracy.compute().item(), rel=1e-5)


def test_the_data_set_is_scored_not_the_mean_over_images():
    # Image 1: one pixel of class 1, missed. Image 2: 9 pixels of class 1, all found.
    images = [([0, 0], [0, 1]), ([1] * 9, [1] * 9)]
    whole, single = ConfusionMatrix(2), []
    for prediction, target in images:
        one = ConfusionMatrix(2)
        for matrix in (whole, one):
            matrix.update(np.array(prediction), np.array(target))
        single.append(one.miou())
    assert whole.iou().tolist() == [0.5, 0.9] and whole.miou() == pytest.approx(0.7)
    assert np.mean(single) == pytest.approx((0.25 + 1) / 2)  # what must not be reported


def test_absent_classes_are_nan_and_left_out_of_the_mean():
    matrix = ConfusionMatrix(4)
    matrix.update(np.array([0, 0, 2]), np.array([0, 1, 255]))  # 2 only where ignored, 3 nowhere
    np.testing.assert_array_equal(matrix.iou(), [0.5, 0, np.nan, np.nan])
    assert matrix.miou() == 0.25 and matrix.pixel_accuracy() == 0.5
    assert np.isnan(ConfusionMatrix(2).miou())


def test_small_integer_types():
    matrix = ConfusionMatrix(12)
    matrix.update(np.array([10, 3], np.uint8), np.array([10, 255], np.uint8))
    assert matrix.counts.sum() == 1 and matrix.counts[10, 10] == 1


def test_bad_input():
    matrix = ConfusionMatrix(2)
    with pytest.raises(ValueError, match="differ"):
        matrix.update(np.zeros((2, 2), int), np.zeros(4, int))
    with pytest.raises(ValueError, match=r"target holds class indices 0\.\.7, expected 0\.\.1"):
        matrix.update(np.zeros(2, int), np.array([0, 7]))
    with pytest.raises(ValueError, match="prediction"):
        matrix.update(np.array([-1]), np.array([0]))
