import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import FakeEncoder, label_set, lying, masks

from ssl_flow.evaluation.dense_knn import (
    DenseKnn,
    _choose,
    _together,
    label_counts,
    nearest,
    run_dense_knn,
)
from ssl_flow.evaluation.pixel_features import image_features, resize_map

AS_IT_IS = DenseKnn(image_size=None, features="stage1")


def test_features_that_hold_the_label_give_one():
    result = run_dense_knn(FakeEncoder(), label_set(masks(0)), label_set(masks(1)), AS_IT_IS)
    assert result.scores == {"miou": 1, "pixel_accuracy": 1}
    assert result.per_class == {"class0": 1, "class1": 1, "class2": 1}
    assert result.counts.shape == (6, 3, 3) and result.counts[:, 1].sum() == 6 * 24 * 24
    assert result.details["memory"] == 6 * 24 * 24 and result.items[0] == "fake0"


@pytest.mark.parametrize("image", ["constant", "shuffled"])
def test_features_without_the_label_give_chance(image):
    train, test = masks(0, 12, 12), masks(1, 12, 12)
    one_hot = np.eye(3, dtype=np.uint8) * 255
    pictures = [one_hot[masks(s, 12, 12) if image == "shuffled" else 0 * train] for s in (5, 6)]
    result = run_dense_knn(
        FakeEncoder(), label_set(train, pictures[0]), label_set(test, pictures[1]), AS_IT_IS
    )
    assert 0.28 < result.scores["pixel_accuracy"] < 0.39 and result.scores["miou"] < 0.3


def test_agrees_with_a_dense_float64_reference():
    """Cross-attention over the k best of all patches, written out without blocks or float16."""
    train, test = (label_set(masks(s, 4, 20), cell_noise(s)) for s in (0, 1))
    encoder = FakeEncoder((4,)).eval()
    protocol = DenseKnn(image_size=None, neighbours=7, temperature=0.1)
    encoder.normalize = lambda x: x.permute(0, 3, 1, 2) / 255 - 0.5  # so that directions differ
    result = run_dense_knn(encoder, train, test, protocol)
    keys, values = [], []
    for item, patches, stride in image_features(encoder, train, protocol, "train"):
        keys.append(F.normalize(patches.flatten(1).T.double(), dim=1))
        one_hot = F.one_hot(torch.from_numpy(item.mask).long(), 3).permute(2, 0, 1).double()
        values.append(F.avg_pool2d(one_hot, stride).flatten(1).T)
    keys, values = torch.cat(keys), torch.cat(values)
    for (_, patches, stride), kept in zip(
        image_features(encoder, test, protocol, "test"), result.examples, strict=True
    ):
        cosine = F.normalize(patches.flatten(1).T.double(), dim=1) @ keys.T
        cut = cosine.sort(dim=1, descending=True).values[:, 6:7]
        weights = torch.where(cosine >= cut, cosine / 0.1, -torch.inf).softmax(1)
        maps = (weights @ values).T.reshape(1, 3, 5, 5)
        expected = F.interpolate(maps, scale_factor=stride, mode="bilinear")[0].argmax(0)
        assert (kept[2] == expected.numpy()).mean() > 0.99  # near ties may turn in float16


def cell_noise(seed, count=4, size=20):
    return np.random.default_rng(seed + 9).integers(0, 255, (count, size, size, 3), np.uint8)


@pytest.mark.parametrize(("rows", "block"), [(1000, 100), (7, 3), (64, 1), (600, 4)])
def test_nearest_in_blocks_is_topk_of_all_products(rows, block):
    generator = torch.Generator().manual_seed(0)
    memory, queries = (torch.randn(n, 5, generator=generator) for n in (1111, 10))
    products, indices = nearest(memory.half(), queries, 6, rows, block)
    expected = (queries.double() @ memory.half().double().T).topk(6)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(products, expected.values.float())
    assert nearest(memory[:4], queries, 6)[0].shape == (10, 4)


def test_images_searched_together_lose_none():
    images = [(i, torch.zeros(2, 3, 5 if i < 3 else 1), 4) for i in range(7)]
    found = [[i for i, _, _ in some] for some in _together(iter(images), 20)]
    assert found == [[0, 1], [2, 3, 4], [5, 6]]
    assert list(_together(iter([]))) == []


def test_patches_of_rare_classes_come_first():
    mask = np.zeros((8, 8), np.uint8)
    mask[:2, :2] = 1  # one of 16 patches
    mask[6:, 6:] = 255
    counts = label_counts(mask, 2, (4, 4), 3)
    assert counts.sum() == 60 and counts[0].tolist() == [0, 4, 0] and counts[15].sum() == 0
    draws = [_choose(counts, 3, torch.Generator().manual_seed(s)).tolist() for s in range(200)]
    # Patch 0 has score u, the 14 others 14 u: it is among the lowest 3 of 15 nearly always.
    assert np.mean([0 in d for d in draws]) > 0.8
    assert np.mean([5 in d for d in draws]) < 0.3
    assert not any(15 in d for d in draws) and len(_choose(counts, 99, torch.Generator())) == 15


def test_memory_limits_and_seed():
    train, test = label_set(masks(0, 6)), label_set(masks(1, 6))
    run = lambda seed=0, **o: run_dense_knn(  # noqa: E731
        FakeEncoder((2,)), train, test, DenseKnn(**{"image_size": None, "memory_size": 60, **o}),
        seed,
    )  # fmt: skip
    base = run()
    assert base.details["memory"] == 60 and base.scores == run().scores
    assert run(memory_gib=6 * 5 * 12 / 2**30).details["memory"] == 30  # 3 channels, 3 classes
    for other in (run(seed=1), run(neighbours=1), run(temperature=5.0), run(memory_size=600),
                  run(image_size=16)):  # fmt: skip
        assert other.scores != base.scores
    assert run(batch_images=1).scores == base.scores


def test_images_of_other_sizes_and_coarser_levels():
    encoder = FakeEncoder((4, 8))
    images = torch.rand(2, 3, 27, 45)
    data, protocol = label_set(masks(0, 2, 45)[:, :27]), DenseKnn("hypercolumn", None)
    maps = [m for _, m, _ in image_features(encoder.eval(), data, protocol, "")]
    assert maps[0].shape == (6, 7, 12)
    coarse = encoder.features(images)[1]
    full = F.interpolate(coarse, scale_factor=8, mode="bilinear")[..., :27, :45]
    torch.testing.assert_close(resize_map(coarse, 8, (27, 45), (27, 45)), full)
    even = encoder.features(torch.rand(1, 3, 32, 32))[0]
    torch.testing.assert_close(
        resize_map(even, 4, (32, 32), (20, 50)), F.interpolate(even, (20, 50), mode="bilinear")
    )
    result = run_dense_knn(encoder, data, data, DenseKnn(image_size=None))
    assert result.counts[:, 1].sum() == 2 * 27 * 45 and result.examples[0][2].shape == (27, 45)


def test_bad_input():
    good = label_set(masks(0))
    for wrong in ({"neighbours": 0}, {"temperature": 0.0}, {"search": "annoy"}):
        with pytest.raises(ValueError, match="expected"):
            DenseKnn(**wrong)
    with pytest.raises(ValueError, match="no features 'stage3'; it has hypercolumn, stage1, last"):
        run_dense_knn(FakeEncoder(), good, good, DenseKnn(features="stage3"))
    with pytest.raises(ValueError, match="classes differ"):
        run_dense_knn(FakeEncoder(), good, label_set(masks(0), classes=4), AS_IT_IS)
    with pytest.raises(ValueError, match="fake: no training patch has a label"):
        run_dense_knn(FakeEncoder(), label_set(np.full((2, 24, 24), 255)), good, AS_IT_IS)
    broken = FakeEncoder()
    broken.normalize = lambda images: torch.full((len(images), 3, 24, 24), torch.nan)
    with pytest.raises(ValueError, match="features of fake0 are not finite"):
        run_dense_knn(broken.train(), good, good, AS_IT_IS)
    assert broken.training
    with pytest.raises(ValueError, match=r"fake0: the encoder's map has \(12, 12\) cells"):
        run_dense_knn(lying(), good, good, AS_IT_IS)


def test_faiss_finds_the_same():
    pytest.importorskip("faiss")
    train, test = (label_set(masks(s, 4, 20), cell_noise(s)) for s in (0, 1))
    results = [
        run_dense_knn(FakeEncoder((2,)), train, test, DenseKnn(image_size=None, search=search))
        for search in ("torch", "faiss")
    ]
    assert results[0].scores["miou"] == pytest.approx(results[1].scores["miou"], abs=1e-3)


def test_without_faiss_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    data = label_set(masks(0))
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        run_dense_knn(FakeEncoder(), data, data, DenseKnn(search="faiss"))
