from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import FakeEncoder, label_set, lying, masks
from torch import nn

from ssl_flow.evaluation import LinearProbe, estimate_batchnorm, linear_probe, run_linear_probe
from ssl_flow.evaluation.pixel_features import (
    estimate_on,
    image_levels,
    normalized_batches,
    project_levels,
    sample_levels,
)

QUICK = LinearProbe(pixels_per_image=200, batch_pixels=512, steps=300, lr=0.05)


def test_features_that_hold_the_label_give_one():
    result = run_linear_probe(FakeEncoder((1, 4)), label_set(masks(0)), label_set(masks(1)), QUICK)
    assert (
        result.scores["miou"] == 1
        and result.scores["pixel_accuracy"] == 1
        and result.details["train_accuracy"] == 1
    )
    assert result.per_class == {"class0": 1, "class1": 1, "class2": 1}
    assert (result.details["channels"], result.details["pixels_per_image"]) == (6, 200)


def test_features_without_the_label_give_chance():
    one_hot = np.eye(3, dtype=np.uint8) * 255
    train, test = (label_set(masks(s, 20), one_hot[masks(s + 5, 20)]) for s in (0, 1))
    result = run_linear_probe(FakeEncoder((1,)), train, test, QUICK)
    assert 0.3 < result.scores["pixel_accuracy"] < 0.37 and result.scores["miou"] < 0.25


def test_a_probe_that_diverged_is_no_result():
    data = label_set(masks(0))
    with pytest.raises(ValueError, match=r"training loss is (nan|inf): lower lr = 1e\+37"):
        run_linear_probe(FakeEncoder((1,)), data, data, replace(QUICK, lr=1e37))


def test_ignored_pixels_neither_teach_nor_count():
    train, test = masks(0), masks(1)
    images = (np.eye(256, 3, dtype=np.uint8) * 255)[test]
    test = np.where(np.arange(24) < 12, test, 255)
    images[:, :, 12:] = 77  # garbage below the ignored half
    result = run_linear_probe(FakeEncoder((1,)), label_set(train), label_set(test, images), QUICK)
    assert result.scores["miou"] == 1
    train[:, :, 5:] = 255  # 120 labelled pixels an image, fewer than asked for
    assert (
        run_linear_probe(FakeEncoder((1,)), label_set(train), label_set(masks(1)), QUICK).scores[
            "miou"
        ]
        == 1
    )


@pytest.mark.parametrize("size", [(32, 48), (27, 45)])
def test_projecting_the_levels_is_the_concatenated_hypercolumn(size):
    generator = torch.Generator().manual_seed(0)
    strides, channels = [2, 4, 16], [3, 5, 7]
    levels = [
        torch.randn(2, c, -(-size[0] // s), -(-size[1] // s), generator=generator)
        for c, s in zip(channels, strides, strict=True)
    ]
    weight, bias = torch.randn(4, 15, generator=generator), torch.randn(4, generator=generator)
    full = torch.cat(
        [
            F.interpolate(x, scale_factor=s, mode="bilinear")[..., : size[0], : size[1]]
            for x, s in zip(levels, strides, strict=True)
        ],
        dim=1,
    )  # (2, 15, H, W)
    expected = F.conv2d(full, weight[:, :, None, None], bias)
    torch.testing.assert_close(project_levels(levels, strides, weight, bias, size), expected)
    rows, columns = (x.flatten() for x in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    sampled = sample_levels([x[1] for x in levels], strides, rows, columns)
    torch.testing.assert_close(sampled, full[1].flatten(1).T, atol=1e-5, rtol=1e-4)


def test_scored_function_is_the_fitted_one():
    """BatchNorm folded into the weights predicts what it predicted on the cached features."""
    train = label_set(masks(0, cell=6), (masks(3) * 90).astype(np.uint8)[..., None].repeat(3, 3))
    every = LinearProbe(pixels_per_image=24 * 24, batch_pixels=512, steps=50)
    result = run_linear_probe(FakeEncoder((1, 4)), train, train, every)
    assert result.scores["pixel_accuracy"] == pytest.approx(
        result.details["train_accuracy"], abs=2e-3
    )  # float16 cache


def test_full_mask_resolution_is_scored():
    """Features of stride 8 cannot follow 1-pixel labels; scored at stride 8 that would not show."""
    result = run_linear_probe(FakeEncoder((8,)), label_set(masks(0)), label_set(masks(1)), QUICK)
    assert result.scores["pixel_accuracy"] < 0.6


def test_seeds_and_options_change_something():
    train, test = label_set(masks(0, cell=2)), label_set(masks(1, cell=2))
    run = lambda seed=0, **o: run_linear_probe(  # noqa: E731
        FakeEncoder((4, 8)),
        train,
        test,
        LinearProbe(**{"pixels_per_image": 50, "steps": 20, **o}),
        seed,
    )
    base = run()
    assert base.scores["miou"] == run().scores["miou"]
    for other in (run(seed=1), run(steps=1), run(lr=0.1), run(features="stage2"),
                  run(pixels_per_image=300), run(batch_pixels=10)):  # fmt: skip
        assert other.scores["miou"] != base.scores["miou"]
    assert run(batch_images=1).scores["miou"] == pytest.approx(base.scores["miou"], abs=1e-3)
    assert run(cache_gib=6 * 10 * 12 / 2**30).details["pixels_per_image"] == 10  # 6 x 6 float16


def test_balanced_draws_equally_many_of_each_class_as_far_as_an_image_has_them():
    mask = np.zeros((2, 24, 24), np.uint8)
    mask[0, :4, :5], mask[0, 5] = 1, 2  # 20 and 24 pixels; the other image has one class
    mask[1, :12] = 255
    encoder, protocol = FakeEncoder((1,)).eval(), LinearProbe(pixels_per_image=66, draw="balanced")
    found = image_levels(encoder, label_set(mask), "hypercolumn")
    draw = torch.Generator().manual_seed(0)
    features, labels, _ = linear_probe.draw_pixels(found, 2, protocol, draw)
    assert labels.bincount().tolist() == [23 + 66, 20, 23]
    assert torch.equal(features.argmax(1), labels)  # the picture shows the class


def test_a_rare_class_is_said_more_often_by_a_balanced_probe():
    """What is seen is the class or, as often among the common one, the like of the rare one."""
    rng = np.random.default_rng(0)
    labels = (rng.random((6, 24, 24)) < 0.05).astype(np.uint8)
    seen = np.where(rng.random(labels.shape) < 0.1, 1, labels)
    data = label_set(labels, (np.eye(256, 3, dtype=np.uint8) * 255)[seen], classes=2)
    uniform, balanced = (
        run_linear_probe(FakeEncoder((1,)), data, data, replace(QUICK, draw=draw)).per_class
        for draw in ("uniform", "balanced")
    )
    assert uniform["class1"] == 0
    assert balanced["class1"] == pytest.approx(labels.sum() / seen.sum())


def test_images_of_different_sizes_and_examples():
    mixed = label_set([m[: 24 - i] for i, m in enumerate(masks(0))])
    result = run_linear_probe(FakeEncoder((1, 4)), mixed, mixed, QUICK)
    assert result.scores["miou"] == 1
    assert [image.shape[0] for image, _, _ in result.examples] == [24, 23, 22, 21, 20, 19]
    assert "examples" not in result.as_dict()
    batches = [
        len(items) for items, _ in normalized_batches(FakeEncoder((1, 4)), label_set(masks(0)), 4)
    ]
    assert batches == [4, 2]


def test_batchnorm_statistics_are_those_of_the_images():
    encoder = FakeEncoder((1, 4))
    encoder.norm.eval()  # the modes stay, of every module
    before = encoder.norm.momentum
    images = torch.rand(16, 3, 8, 8) * 5 + 2
    assert estimate_batchnorm(encoder, images.split(6)) == 16  # the last batch of 4 counts less
    torch.testing.assert_close(encoder.norm.running_mean, images.mean((0, 2, 3)))
    assert encoder.norm.momentum == before and not encoder.norm.training and encoder.training
    assert estimate_batchnorm(nn.Linear(2, 2), []) == 0


def test_batchnorm_statistics_of_images_of_mixed_sizes():
    """Grey images: all the variance is between them, and none of it may be lost in batches."""
    grey, sizes = np.linspace(0, 255, 16).astype(np.uint8), [(8 + i % 2, 12) for i in range(16)]
    order = np.arange(16) * 5 % 16  # so that both batches are alike
    images = [np.full((*size, 3), g) for size, g in zip(sizes, grey[order], strict=True)]
    data = label_set([np.zeros(size) for size in sizes], images)
    encoder = FakeEncoder()
    assert estimate_on(encoder, data, 99) == 16
    expected = grey.astype(float) / 255
    assert encoder.norm.running_mean[0].item() == pytest.approx(expected.mean(), rel=1e-4)
    assert encoder.norm.running_var[0].item() == pytest.approx(expected.var(), rel=0.1)


def test_batchnorm_is_left_whole_where_it_cannot_be_estimated():
    encoder = FakeEncoder()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        estimate_batchnorm(encoder.eval(), [torch.rand(1, 3, 1, 1)])
    assert encoder.norm.momentum == 0.1 and not encoder.norm.training
    encoder.norm.train()
    encoder.norm(torch.rand(2, 3, 4, 4))  # no hook is left that would change it
    assert encoder.norm.momentum == 0.1


def test_scoring_holds_the_logits_of_one_image(monkeypatch):
    seen = []

    def project(levels, *rest):
        seen.append(len(levels[0]))
        return project_levels(levels, *rest)

    monkeypatch.setattr(linear_probe, "project_levels", project)
    run_linear_probe(FakeEncoder(), label_set(masks(0)), label_set(masks(1)), QUICK)
    assert seen == [1] * 6


def test_modes_come_back_whatever_happens():
    good, encoder = label_set(masks(0)), FakeEncoder()
    encoder.norm.eval()  # a frozen BatchNorm in a network that trains
    run_linear_probe(encoder, good, good, QUICK)
    assert encoder.training and not encoder.norm.training
    encoder.scale.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="features of fake0 are not finite"):
        run_linear_probe(encoder, good, good, QUICK)
    assert encoder.training and not encoder.norm.training


def test_bad_input():
    good = label_set(masks(0))
    with pytest.raises(
        ValueError, match="no features 'stage3'; it has hypercolumn, stage1, stage2"
    ):
        run_linear_probe(FakeEncoder((1, 4)), good, good, LinearProbe(features="stage3"))
    with pytest.raises(ValueError, match="no features 'embedding'"):
        run_linear_probe(FakeEncoder((1, 4)), good, good, LinearProbe(features="embedding"))
    with pytest.raises(ValueError, match="classes differ"):
        run_linear_probe(FakeEncoder((1, 4)), good, label_set(masks(0), classes=4), QUICK)
    broken = FakeEncoder((1, 4))
    broken.normalize = lambda images: torch.full((len(images), 3, 24, 24), torch.nan)
    with pytest.raises(ValueError, match="features of fake0 are not finite"):
        run_linear_probe(broken, good, good, QUICK)
    with pytest.raises(ValueError, match=r"fake0: the encoder's map has \(12, 12\) cells"):
        run_linear_probe(lying(), good, good, QUICK)
    with pytest.raises(ValueError, match="no training pixel has a label"):
        run_linear_probe(FakeEncoder((1, 4)), label_set(np.full((2, 24, 24), 255)), good, QUICK)


def test_the_embedding_of_an_encoder_with_a_head():
    encoder = FakeEncoder((1,))
    encoder.head = encoder.norm
    encoder.embed = lambda images: F.avg_pool2d(images, 4)
    train, test = label_set(masks(0, cell=4)), label_set(masks(1, cell=4))
    protocol = LinearProbe(features="embedding", pixels_per_image=200, steps=300, lr=0.05)
    result = run_linear_probe(encoder, train, test, protocol)
    assert (
        result.details["channels"] == 3 and result.scores["pixel_accuracy"] > 0.85
    )  # bilinear between the cells
