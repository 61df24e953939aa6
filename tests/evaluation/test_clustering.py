import itertools
import sys

import numpy as np
import pytest
import torch
from fakes import FakeEncoder, label_set, masks
from sklearn.metrics import confusion_matrix, jaccard_score

from ssl_flow.evaluation import clustering
from ssl_flow.evaluation.clustering import Clustering, _match, _miou, _small_mask, run_clustering
from ssl_flow.evaluation.intervals import interval_of_outcomes
from ssl_flow.evaluation.pixel_features import image_features

QUICK = Clustering(image_size=24, mask_size=24, overclusters=6, runs=3, patches_per_cluster=400)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Number of distinct clusters"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning:sklearn"),
]


def test_features_that_hold_the_label_give_one():
    data = label_set(masks(0))
    result = run_clustering(FakeEncoder(), data, data, QUICK)
    assert result.scores == {
        "miou": 1, "miou_std": 0, "overclustering_miou": 1, "overclustering_miou_std": 0
    }  # fmt: skip
    assert result.per_class == {"class0": 1, "class1": 1, "class2": 1}
    assert result.counts.shape == (6, QUICK.runs, 3, 3)
    assert (result.counts[:, :, 1].sum((0, 2)) == 6 * 24 * 24).all()


@pytest.mark.parametrize("image", ["constant", "shuffled"])
def test_features_without_the_label_give_chance(image):
    truth = masks(1, 12)
    shown = masks(7, 12) if image == "shuffled" else 0 * truth
    data = label_set(truth, (np.eye(3, dtype=np.uint8) * 255)[shown])
    result = run_clustering(FakeEncoder(), data, data, QUICK)
    assert 0.1 < result.scores["miou"] < 0.25 and 0.1 < result.scores["overclustering_miou"] < 0.25


def test_one_to_one_matching_is_the_best_of_all_permutations():
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = rng.integers(0, 50, (4, 4))
        best = max(
            sum(
                table[c, k] / (table[c].sum() + table[:, k].sum() - table[c, k])
                for c, k in enumerate(p)
            )
            for p in itertools.permutations(range(4))
        )
        match = _match(table, one_to_one=True)
        assert sorted(match) == [0, 1, 2, 3]
        assert _miou(table, match) == pytest.approx(best / 4)


def test_overclusters_are_matched_by_majority_though_they_be_as_many_as_classes():
    truth = np.where(masks(0) > 0, 0, masks(8))  # most pixels are of class 0 ...
    data = label_set(truth, (np.eye(3, dtype=np.uint8) * 255)[masks(7)])  # ... in every colour
    protocol = Clustering(**vars(QUICK) | {"overclusters": 3})
    scores = run_clustering(FakeEncoder(), data, data, protocol).scores
    assert scores["overclustering_miou"] == pytest.approx((truth == 0).mean() / 3)
    assert scores["miou"] != scores["overclustering_miou"]


def test_scores_agree_with_scikit_learn():
    rng = np.random.default_rng(1)
    truth, clusters = rng.integers(0, 3, 3000), rng.integers(0, 20, 3000)
    truth = np.where(clusters % 4 == 3, truth, clusters % 4)  # most clusters have a class
    table = confusion_matrix(truth, clusters, labels=range(20))[:3]
    match = _match(table, one_to_one=False)
    majority = [np.bincount(truth[clusters == k], minlength=3).argmax() for k in range(20)]
    assert match.tolist() == majority
    expected = jaccard_score(truth, match[clusters], average="macro")
    assert _miou(table, match) == pytest.approx(expected)


def test_ignored_pixels_do_not_count_and_masks_are_read_as_published():
    truth = masks(0, 6)
    wrong = np.where(np.arange(24) < 12, truth, (truth + 1) % 3)
    images = (np.eye(3, dtype=np.uint8) * 255)[wrong]
    data = label_set(np.where(np.arange(24) < 12, truth, 255), images)
    assert run_clustering(FakeEncoder(), data, data, QUICK).scores["miou"] == 1
    mask = masks(3, 1, 48)[0].astype(np.uint8)
    small = _small_mask(mask, Clustering(image_size=48, mask_size=10))
    large = torch.from_numpy(mask)[None, None].float()
    expected = torch.nn.functional.interpolate(large, (10, 10), mode="nearest")[0, 0]
    assert np.array_equal(small, expected.numpy())


def test_options_and_seeds_change_something():
    noise = np.random.default_rng(0).integers(0, 255, (6, 24, 24, 3), np.uint8)
    data = label_set(masks(0, 6, cell=3), noise)
    run = lambda seed=0, **o: run_clustering(  # noqa: E731
        FakeEncoder((2, 4)), data, data, Clustering(**{**vars(QUICK), "runs": 2, **o}), seed
    )
    base = run()
    assert base.scores == run().scores and base.scores["overclustering_miou_std"] > 0
    assert base.details["miou_of_seeds"][1] == run(seed=1, runs=1).details["miou_of_seeds"][0]
    for other in (run(features="hypercolumn"), run(features="stage1"), run(image_size=16),
                  run(mask_size=12), run(overclusters=20), run(components=1), run(iterations=1),
                  run(restarts=1), run(patches_per_cluster=5), run(runs=3)):  # fmt: skip
        assert other.scores != base.scores
    assert run(batch_images=1).scores == base.scores


def test_features_that_are_too_many_to_keep_are_computed_twice(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (6, 24, 24, 3), np.uint8)
    data, passes = label_set(masks(0, 6, cell=3), noise), []

    def counted(*inputs):
        passes.append(inputs[-1])
        return image_features(*inputs)

    monkeypatch.setattr(clustering, "image_features", counted)
    kept = run_clustering(FakeEncoder((2,)), data, data, QUICK)
    assert passes == ["sample"]
    monkeypatch.setattr(clustering, "_KEPT_BYTES", 100)
    assert run_clustering(FakeEncoder((2,)), data, data, QUICK).scores == kept.scores
    assert passes == ["sample", "sample", "assign"]


def test_the_interval_is_that_of_the_mean_over_the_runs():
    """Not of the one run whose predictions are shown: the mean may lie outside of its interval."""
    noise = np.random.default_rng(0).integers(0, 255, (6, 24, 24, 3), np.uint8)
    data = label_set(masks(0, 6, cell=3), noise)
    outcomes = [run_clustering(FakeEncoder((2, 4)), data, data, QUICK, seed) for seed in (0, 5)]
    for outcome in outcomes:
        found = interval_of_outcomes([outcome], "miou")
        assert found.value == pytest.approx(outcome.scores["miou"])
        assert found.seeds == pytest.approx(outcome.details["miou_of_seeds"])
    both = interval_of_outcomes(outcomes, "miou")
    assert both.value == pytest.approx(np.mean([o.scores["miou"] for o in outcomes]))


def test_bad_input(monkeypatch):
    good = label_set(masks(0))
    with pytest.raises(ValueError, match="runs = 0, expected more than 0"):
        Clustering(runs=0)
    with pytest.raises(ValueError, match="3456 patches cannot make overclusters = 5000"):
        run_clustering(FakeEncoder(), good, good, Clustering(image_size=24, overclusters=5000))
    with pytest.raises(ValueError, match="classes differ"):
        run_clustering(FakeEncoder(), good, label_set(masks(0), classes=4), QUICK)
    broken = FakeEncoder()
    broken.normalize = lambda images: torch.full((len(images), 3, 24, 24), torch.nan)
    with pytest.raises(ValueError, match="features of fake0 are not finite"):
        run_clustering(broken, good, good, QUICK)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'ssl-flow\[eval\]'"):
        run_clustering(FakeEncoder(), good, good, QUICK)
