import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_flow.data.segmentation import SegmentationSet
from ssl_flow.evaluation import LinearProbe, estimate_batchnorm, run_linear_probe
from ssl_flow.evaluation.pixel_features import normalized_batches, project_levels, sample_levels

QUICK = LinearProbe(pixels_per_image=200, batch_pixels=512, steps=300, lr=0.05)


class FakeEncoder(nn.Module):
    """Feature maps made from the image by average pooling; what the probe needs, nothing more."""

    def __init__(self, strides=(1, 4)):
        super().__init__()
        self.strides, self.channels, self.head = list(strides), [3] * len(strides), None
        self.norm = nn.BatchNorm2d(3)

    def normalize(self, images):
        return images.permute(0, 3, 1, 2).float() / 255

    def features(self, images):
        return [F.avg_pool2d(self.norm(images), s, ceil_mode=True) for s in self.strides]


def _set(masks, images=None, classes=3, name="fake"):
    """The image shows the label one-hot in R, G, B, unless given."""
    masks = np.asarray(masks, np.uint8)
    if images is None:
        images = (np.eye(256, 3, dtype=np.uint8) * 255)[masks]
    names = [f"{name}{i}" for i in range(len(masks))]
    classes = [f"class{i}" for i in range(classes)]
    return SegmentationSet(name, classes, names, lambda i: (images[i], masks[i]), {"rule": "fake"})


def _masks(seed, count=6, size=24, cell=1):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 3, (count, size // cell, size // cell))
    return small.repeat(cell, 1).repeat(cell, 2)


def test_features_that_hold_the_label_give_one():
    result = run_linear_probe(FakeEncoder(), _set(_masks(0)), _set(_masks(1)), QUICK)
    assert (
        result.scores["miou"] == 1
        and result.scores["pixel_accuracy"] == 1
        and result.details["train_accuracy"] == 1
    )
    assert result.per_class == {"class0": 1, "class1": 1, "class2": 1}
    assert (result.details["channels"], result.details["pixels_per_image"]) == (6, 200)


def test_features_without_the_label_give_chance():
    one_hot = np.eye(3, dtype=np.uint8) * 255
    train, test = (_set(_masks(s, 20), one_hot[_masks(s + 5, 20)]) for s in (0, 1))
    result = run_linear_probe(FakeEncoder((1,)), train, test, QUICK)
    assert 0.3 < result.scores["pixel_accuracy"] < 0.37 and result.scores["miou"] < 0.25


def test_ignored_pixels_neither_teach_nor_count():
    train, test = _masks(0), _masks(1)
    images = (np.eye(256, 3, dtype=np.uint8) * 255)[test]
    test = np.where(np.arange(24) < 12, test, 255)
    images[:, :, 12:] = 77  # garbage below the ignored half
    result = run_linear_probe(FakeEncoder((1,)), _set(train), _set(test, images), QUICK)
    assert result.scores["miou"] == 1
    train[:, :, 5:] = 255  # 120 labelled pixels an image, fewer than asked for
    assert (
        run_linear_probe(FakeEncoder((1,)), _set(train), _set(_masks(1)), QUICK).scores["miou"] == 1
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
    train = _set(_masks(0, cell=6), (_masks(3) * 90).astype(np.uint8)[..., None].repeat(3, 3))
    every = LinearProbe(pixels_per_image=24 * 24, batch_pixels=512, steps=50)
    result = run_linear_probe(FakeEncoder((1, 4)), train, train, every)
    assert result.scores["pixel_accuracy"] == pytest.approx(
        result.details["train_accuracy"], abs=2e-3
    )  # float16 cache


def test_full_mask_resolution_is_scored():
    """Features of stride 8 cannot follow 1-pixel labels; scored at stride 8 that would not show."""
    result = run_linear_probe(FakeEncoder((8,)), _set(_masks(0)), _set(_masks(1)), QUICK)
    assert result.scores["pixel_accuracy"] < 0.6


def test_seeds_and_options_change_something():
    train, test = _set(_masks(0, cell=2)), _set(_masks(1, cell=2))
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


def test_images_of_different_sizes_and_examples():
    masks = [m[: 24 - i] for i, m in enumerate(_masks(0))]
    images = [(np.eye(256, 3, dtype=np.uint8) * 255)[m] for m in masks]
    mixed = _set(_masks(0))
    mixed.load = lambda i: (images[i], masks[i])
    result = run_linear_probe(FakeEncoder(), mixed, mixed, QUICK, examples=3)
    assert result.scores["miou"] == 1
    assert [image.shape[0] for image, _, _ in result.examples] == [24, 22, 19]
    assert "examples" not in result.as_dict()
    batches = [len(items) for items, _ in normalized_batches(FakeEncoder(), _set(_masks(0)), 4)]
    assert batches == [4, 2]


def test_batchnorm_statistics_are_those_of_the_images():
    encoder = FakeEncoder()
    encoder.eval()
    before = encoder.norm.momentum
    images = torch.rand(16, 3, 8, 8) * 5 + 2
    assert estimate_batchnorm(encoder, images.split(8)) == 16
    torch.testing.assert_close(encoder.norm.running_mean, images.mean((0, 2, 3)))
    assert encoder.norm.momentum == before and not encoder.norm.training
    assert estimate_batchnorm(nn.Linear(2, 2), []) == 0


def test_bad_input():
    good = _set(_masks(0))
    with pytest.raises(
        ValueError, match="no features 'stage3'; it has hypercolumn, stage1, stage2"
    ):
        run_linear_probe(FakeEncoder(), good, good, LinearProbe(features="stage3"))
    with pytest.raises(ValueError, match="no features 'embedding'"):
        run_linear_probe(FakeEncoder(), good, good, LinearProbe(features="embedding"))
    with pytest.raises(ValueError, match="classes differ"):
        run_linear_probe(FakeEncoder(), good, _set(_masks(0), classes=4), QUICK)
    broken = FakeEncoder()
    broken.normalize = lambda images: torch.full((len(images), 3, 24, 24), torch.nan)
    with pytest.raises(ValueError, match="features of fake0 are not finite"):
        run_linear_probe(broken, good, good, QUICK)
    with pytest.raises(ValueError, match="no training pixel has a label"):
        run_linear_probe(FakeEncoder(), _set(np.full((2, 24, 24), 255)), good, QUICK)


def test_the_embedding_of_an_encoder_with_a_head():
    encoder = FakeEncoder((1,))
    encoder.head = encoder.norm
    encoder.embed = lambda images: F.avg_pool2d(images, 4)
    train, test = _set(_masks(0, cell=4)), _set(_masks(1, cell=4))
    protocol = LinearProbe(features="embedding", pixels_per_image=200, steps=300, lr=0.05)
    result = run_linear_probe(encoder, train, test, protocol)
    assert (
        result.details["channels"] == 3 and result.scores["pixel_accuracy"] > 0.85
    )  # bilinear between the cells
