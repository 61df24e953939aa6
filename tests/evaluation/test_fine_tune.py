import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ssl_flow.data.segmentation import SegmentationSet
from ssl_flow.evaluation.fine_tune import Decoder, FineTune, _crops, run_fine_tune
from ssl_flow.models.encoder import create_encoder

QUICK = FineTune(channels=8, steps=60, batch_images=4, crop=16, lr=0.02, encoder_lr=0.01)


class FakeEncoder(nn.Module):
    """Convolutions with BatchNorm at strides 1, 2 and 8."""

    def __init__(self):
        super().__init__()
        self.strides, self.channels = [1, 2, 8], [4, 6, 8]
        widths = [3, *self.channels]
        self.convolutions = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, s, s, padding=0), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, s in zip(widths, self.channels, (1, 2, 4), strict=False)
        )

    def normalize(self, images):
        return images.permute(0, 3, 1, 2).float() / 255

    def features(self, images):
        levels, (height, width) = [], images.shape[-2:]
        images = nn.functional.pad(images, (0, -width % 8, 0, -height % 8))
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            images = convolution(images)
            levels.append(images[..., : -(-height // stride), : -(-width // stride)])
        return levels


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return FakeEncoder()


def _set(seed, count=6, size=(24, 28), cell=1, classes=3, useful=True):
    """The image shows the label one-hot in R, G, B, or another label."""
    rng = np.random.default_rng(seed)
    height, width = (side // cell for side in size)
    masks, other = rng.integers(0, 3, (2, count, height, width)).repeat(cell, 2).repeat(cell, 3)
    images = (np.eye(3, dtype=np.uint8) * 255)[masks if useful else other]
    masks = masks.astype(np.uint8)
    names = [f"image{i}" for i in range(count)]
    named = [f"class{i}" for i in range(classes)]
    return SegmentationSet("fake", named, names, lambda i: (images[i], masks[i]), {})


def test_images_that_show_the_label_give_one(encoder):
    result = run_fine_tune(encoder, _set(0), _set(1), QUICK)
    assert result.scores["miou"] > 0.99 and result.scores["pixel_accuracy"] > 0.99
    assert list(result.per_class) == ["class0", "class1", "class2"]
    assert result.counts.shape == (6, 3, 3) and (result.counts[:, 1].sum(1) == 24 * 28).all()
    assert result.counts[:, 0].sum() == pytest.approx(result.scores["pixel_accuracy"] * 6 * 24 * 28)
    assert [image.shape for image, _, _ in result.examples] == [(24, 28, 3)] * 6


def test_images_that_do_not_are_at_chance(encoder):
    result = run_fine_tune(encoder, _set(0, useful=False), _set(1, useful=False), QUICK)
    assert result.scores["pixel_accuracy"] == pytest.approx(1 / 3, abs=0.03)


def test_the_encoder_stays_as_it_was_and_is_trained_in_a_copy(encoder):
    encoder.eval()
    before = copy.deepcopy(encoder.state_dict())
    state = torch.random.get_rng_state()
    scores = run_fine_tune(encoder, _set(0), _set(1), replace(QUICK, steps=15)).scores
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert not encoder.training and all(p.grad is None for p in encoder.parameters())
    torch.testing.assert_close(torch.random.get_rng_state(), state, rtol=0, atol=0)
    still = run_fine_tune(encoder, _set(0), _set(1), replace(QUICK, steps=15, encoder_lr=0)).scores
    assert scores != still


def test_the_last_map_alone_cannot_follow_single_pixels(encoder):
    """Both decoders learn labels that are constant over the cells of stride 8; only one finer."""
    blocks = _set(0, 12, (32, 32), 8), _set(1, 6, (32, 32), 8)
    protocol = replace(QUICK, crop=32, steps=150)
    scores = {
        (decoder, fine): run_fine_tune(
            encoder, *((_set(0), _set(1)) if fine else blocks), replace(protocol, decoder=decoder)
        ).scores["pixel_accuracy"]
        for decoder in ("fcn", "unet")
        for fine in (False, True)
    }
    assert scores["unet", True] > 0.99 and scores["unet", False] > 0.9
    assert scores["fcn", True] < 0.5 and scores["fcn", False] > 0.7


def test_seeds_and_options_change_something(encoder):
    train, test = _set(0), _set(1)
    run = lambda seed=0, **o: run_fine_tune(  # noqa: E731
        encoder, train, test, replace(QUICK, steps=15, **o), seed
    ).counts.tolist()
    base = run()
    assert base == run()
    others = [run(seed=1), run(channels=4), run(crop=8), run(flip=False), run(lr=0.1)]
    others += [run(encoder_lr=0.1), run(weight_decay=30.0), run(batch_images=2)]
    assert base not in others


def test_crops_are_windows_flipped_together_and_padded_as_ignored():
    position = np.arange(24 * 28).reshape(24, 28)
    mask = (position % 251).astype(np.uint8)
    image = np.stack([mask, position // 251, position * 0], -1).astype(np.uint8)
    dataset = SegmentationSet("fake", [], ["a"], lambda i: (image, mask), {})
    crops = _crops(dataset, FineTune(crop=26), np.random.default_rng(0))
    seen = [next(crops) for _ in range(20)]
    flipped = 0
    for item in seen:
        assert item.image.shape == (26, 26, 3) and item.mask.shape == (26, 26)
        assert (item.mask[24:] == 255).all()
        np.testing.assert_array_equal(item.image[:24, :, 0], item.mask[:24])
        flipped += int(item.mask[0, 0]) > int(item.mask[0, 1])
    assert 0 < flipped < 20 and len({item.mask.tobytes() for item in seen}) == 6


@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
@pytest.mark.parametrize("decoder", ["fcn", "unet"])
def test_logits_have_the_size_of_the_image(name, decoder):
    encoder = create_encoder(name)
    logits = Decoder(encoder, 5, FineTune(decoder=decoder, channels=4))
    images = torch.rand(2, 3, 70, 101)
    assert logits(encoder.features(images), (70, 101)).shape == (2, 5, 70, 101)


def test_ignored_pixels_neither_teach_nor_count(encoder):
    train, test = _set(0), _set(1)
    for part in (train, test):
        load = part.load
        part.load = lambda i, load=load: (
            load(i)[0],
            np.where(np.arange(28) < 14, load(i)[1], 255).astype(np.uint8),
        )
    result = run_fine_tune(encoder, train, test, QUICK)
    assert result.scores["miou"] > 0.99 and result.counts[:, 1].sum() == 6 * 24 * 14


def test_bad_input(encoder):
    good = _set(0)
    with pytest.raises(ValueError, match="decoder = 'mlp', expected unet or fcn"):
        FineTune(decoder="mlp")
    with pytest.raises(ValueError, match="steps = 0, expected more than 0"):
        FineTune(steps=0)
    with pytest.raises(ValueError, match="classes differ"):
        run_fine_tune(encoder, good, _set(0, classes=4), QUICK)
    none = replace(good, load=lambda i: (good.load(i)[0], np.full((24, 28), 255, np.uint8)))
    with pytest.raises(ValueError, match="fake: no training pixel has a label"):
        run_fine_tune(encoder, none, good, replace(QUICK, steps=2))
    encoder.convolutions[0][0].bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the loss is nan after 0 steps, of crops of image\d"):
        run_fine_tune(encoder, good, good, QUICK)


def test_a_loss_that_bursts_names_the_step_without_a_bar(encoder, monkeypatch):
    good, calls, real = _set(0), [], FakeEncoder.normalize

    def normalize(self, images):
        calls.append(1)
        return real(self, images) * (torch.nan if len(calls) > 3 else 1)

    monkeypatch.setattr(FakeEncoder, "normalize", normalize)
    with pytest.raises(ValueError, match="the loss is nan after 3 steps"):
        run_fine_tune(encoder, good, good, QUICK)


def test_maps_that_do_not_fit_their_stride(encoder, monkeypatch):
    good, real = _set(0), FakeEncoder.features
    monkeypatch.setattr(FakeEncoder, "features", lambda *args: real(*args)[:1] * 3)
    with pytest.raises(ValueError, match=r"image\d: the encoder's map has \(16, 16\) cells"):
        run_fine_tune(encoder, good, good, QUICK)
