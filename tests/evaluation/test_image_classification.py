from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import FakeEncoder
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from ssl_flow.evaluation.classification import (
    Classification,
    center_crop,
    fit_linear,
    knn_votes,
    run_classification,
)

SMALL = Classification(resize=8, crop=8)


class LastEncoder(FakeEncoder):
    """The last map is the image; the one before is of no use."""

    def features(self, images):
        return [torch.full_like(images, 7), *super().features(images)]


class FakeSet:
    """Noise around a colour that tells the class, or that does not."""

    def __init__(self, count, seed, classes=3, useful=True):
        rng = np.random.default_rng(seed)
        self.classes = [f"class{i}" for i in range(classes)]
        self.labels = rng.integers(0, classes, count)
        shown = self.labels if useful else rng.integers(0, classes, count)
        colours = np.random.default_rng(99).integers(60, 196, (classes, 3))
        self.images = colours[shown][:, None, None] + rng.integers(-20, 20, (count, 8, 8, 3))
        self.images = self.images.astype(np.uint8)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index]), f"image{index}"


def test_features_that_tell_the_class_give_one():
    result = run_classification(LastEncoder(), FakeSet(60, 0), FakeSet(30, 1), SMALL)
    assert result.scores == {"knn_top1": 1, "linear_top1": 1}
    assert result.per_class == {"class0": 1, "class1": 1, "class2": 1}
    assert result.items[:2] == ["image0", "image1"] and len(result.values["knn_top1"]) == 30
    assert result.details["channels"] == 3 and result.details["train_images"] == 60


def test_features_that_do_not_are_at_chance():
    train, test = FakeSet(300, 0, 10, useful=False), FakeSet(300, 1, 10, useful=False)
    result = run_classification(LastEncoder(), train, test, SMALL)
    assert list(result.scores) == ["knn_top1", "linear_top1", "knn_top5", "linear_top5"]
    for name, score in result.scores.items():
        assert score == pytest.approx(0.1 if name.endswith("1") else 0.5, abs=0.07)
        assert score == result.values[name].mean()


def _problem(seed=0, classes=4):
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((classes, 12))
    labels = rng.integers(0, classes, (2, 150))
    points = centers[labels] + 1.5 * rng.standard_normal((2, 150, 12))
    points = points * np.logspace(-1, 1, 12) + 3
    return points.astype(np.float32), labels


def test_neighbours_are_those_of_scikit_learn():
    (train, test), (labels, _) = _problem()
    votes = knn_votes(*map(torch.from_numpy, (train, labels, test)), 4, Classification())
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
    oracle = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07))
    oracle.fit(unit[0], labels)
    expected = oracle.predict_proba(unit[1])
    found = (votes / votes.sum(1, keepdim=True)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    few = knn_votes(*map(torch.from_numpy, (train[:5], labels[:5], test)), 4, Classification())
    assert (few > 0).sum(1).max() <= len(set(labels[:5].tolist()))


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_the_linear_classifier_is_that_of_scikit_learn(ridge):
    (train, test), (labels, _) = _problem()
    weight, bias = fit_linear(
        torch.from_numpy(train), torch.from_numpy(labels), 4, Classification(ridge=ridge)
    )
    found = (torch.from_numpy(test) @ weight.T + bias).softmax(1)
    mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    oracle = LogisticRegression(C=1 / (ridge * len(train)), tol=1e-8, max_iter=5000)
    oracle.fit((train - mean) / std, labels)
    np.testing.assert_allclose(found, oracle.predict_proba((test - mean) / std), atol=2e-3)


def test_a_constant_channel_is_left_out():
    (train, _), (labels, _) = _problem()
    train[:, 3] = 0.1
    weight, bias = fit_linear(*map(torch.from_numpy, (train, labels)), 4, Classification())
    assert not weight[:, 3].any() and weight[:, 4].all() and bias.isfinite().all()


@pytest.mark.parametrize("size", [(103, 206), (300, 451), (500, 333), (20, 20), (224, 256)])
def test_crops_are_those_of_torchvision(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    whole = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224)])
    np.testing.assert_array_equal(center_crop(image, 256, 224), whole(Image.fromarray(image)))


def test_options_change_something():
    train, test = FakeSet(40, 0, 6), FakeSet(200, 1, 6)
    rng = np.random.default_rng(5)
    for images in (train, test):  # hard enough for the options to matter
        images.images = (images.images + rng.integers(-60, 60, (len(images), 1, 1, 3))).clip(0, 255)
        images.images = images.images.astype(np.uint8)

    def run(**options):
        protocol = replace(SMALL, **options)
        return run_classification(LastEncoder(), train, test, protocol).scores

    base = run()
    assert run(batch_images=7) == pytest.approx(base)
    for change in ({"neighbours": 3}, {"temperature": 1.0}, {"crop": 2}):
        assert run(**change)["knn_top1"] != base["knn_top1"]
    for change in ({"ridge": 1.0}, {"iterations": 1}, {"resize": 32}):
        assert run(**change)["linear_top1"] != base["linear_top1"]


def test_bad_input():
    good = FakeSet(9, 0)
    with pytest.raises(ValueError, match="resize = 100 is less than crop = 224"):
        Classification(resize=100)
    with pytest.raises(ValueError, match="ridge = 0, expected more than 0"):
        Classification(ridge=0)
    with pytest.raises(ValueError, match="classes differ"):
        run_classification(LastEncoder(), good, FakeSet(9, 0, 4), SMALL)
    with pytest.raises(ValueError, match="the set is empty"):
        run_classification(LastEncoder(), FakeSet(0, 0), good, SMALL)
    wrong = FakeSet(9, 0)
    wrong.labels[4] = 3
    with pytest.raises(ValueError, match=r"image4 is of class 3, expected 0\.\.2"):
        run_classification(LastEncoder(), good, wrong, SMALL)
    broken = LastEncoder()
    broken.scale.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="features of image0 are not finite"):
        run_classification(broken, good, good, SMALL)
    assert broken.training
