from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import FakeEncoder, label_set, lying, masks

from ssl_flow.evaluation import linear_probe_bn, segmentation_head
from ssl_flow.evaluation.linear_probe_bn import BnProbe, distort_colors
from ssl_flow.evaluation.linear_probe_plain import PlainProbe
from ssl_flow.evaluation.pixel_features import shrink_mask
from ssl_flow.evaluation.segmentation_head import run_segmentation_head
from ssl_flow.models import load_encoder

BN = BnProbe(steps=60, warmup_steps=5, lr=0.3, batch_images=4, dropout=0, input_size=24, stride=16,
             scales=(1, 1))  # fmt: skip
PLAIN = PlainProbe(epochs=60, drop_epoch=40, lr=1, batch_images=3, input_size=24, target_size=24)
BOTH = pytest.mark.parametrize("protocol", [BN, PLAIN], ids=["bn", "plain"])


@pytest.fixture
def true_colors(monkeypatch):
    """The fake images show the classes as colours: a distortion would take the label away."""
    monkeypatch.setattr(linear_probe_bn, "distort_colors", lambda image, rng: image)


@BOTH
def test_features_that_hold_the_label_give_one(protocol, true_colors):
    protocol = (
        protocol if protocol is BN else replace(protocol, crop_area=(1, 1), crop_ratio=(1, 1))
    )
    result = run_segmentation_head(
        FakeEncoder(), label_set(masks(0)), label_set(masks(1)), protocol
    )
    assert result.scores == {"miou": 1, "pixel_accuracy": 1}
    assert result.counts.shape == (6, 3, 3) and result.counts[:, 1].sum() == 6 * 24 * 24
    assert result.details["steps"] == (60 if protocol is BN else 120)


@BOTH
def test_features_without_the_label_give_chance(protocol, true_colors):
    one_hot = np.eye(3, dtype=np.uint8) * 255
    train, test = (label_set(masks(s, 12), one_hot[masks(s + 5, 12)]) for s in (0, 1))
    result = run_segmentation_head(FakeEncoder(), train, test, protocol)
    assert 0.3 < result.scores["pixel_accuracy"] < 0.37 and result.scores["miou"] < 0.3


def test_a_head_that_diverged_is_no_result():
    data = label_set(masks(0))
    protocol = replace(PLAIN, lr=1e30, epochs=4)
    with pytest.raises(ValueError, match=r"training loss is (nan|inf): lower lr = 1e\+30"):
        run_segmentation_head(FakeEncoder(), data, data, protocol)


def _one_step(protocol, monkeypatch):
    """The head after one training step on a whole set, its first state, features, masks."""
    data = label_set(
        masks(0, 4), np.random.default_rng(0).integers(0, 255, (4, 24, 24, 3), np.uint8)
    )
    data.load(0)[1][:5] = 255
    size = 24 if protocol.ignored_count else protocol.target_size
    monkeypatch.setattr(
        type(protocol), "augment", lambda self, image, mask, rng: (image, shrink_mask(mask, size))
    )
    monkeypatch.setattr(type(protocol), "total_steps", lambda self, images: 1)
    encoder = FakeEncoder((4, 8)).eval()
    torch.manual_seed(3)
    channels = [3, 3] if protocol.features == "hypercolumn" else [3]
    first = segmentation_head.LevelHead(protocol, channels, 3).double()
    torch.manual_seed(3)
    head, losses = segmentation_head._train(encoder, data, protocol, seed=5)
    images = torch.stack([encoder.normalize(torch.from_numpy(i.image)[None])[0] for i in data])
    mask = torch.from_numpy(np.stack([i.mask for i in data]).astype(np.int64))
    levels = [level.double().detach() for level in encoder.features(images)]
    return head.double(), losses[0], first, levels[-len(channels) :], mask


def _same(head, first, loss, losses, rate):
    assert losses == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    protocol = BN if len(list(head.parameters())) > 2 else PLAIN
    optimizer = protocol.optimizer(first)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    for got, expected in zip(head.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_plain_step_is_the_published_one(monkeypatch):
    """Features upsampled and concatenated, then the convolution; mean over labelled pixels."""
    for features in ("last", "hypercolumn"):
        protocol = replace(PLAIN, batch_images=4, target_size=10, features=features)
        head, losses, first, levels, mask = _one_step(protocol, monkeypatch)
        large = [F.interpolate(level, (10, 10), mode="bilinear") for level in levels]
        logits = first.convolution(torch.cat(large, 1))
        target = F.interpolate(mask[:, None].double(), (10, 10), mode="nearest")[:, 0].long()
        _same(head, first, F.cross_entropy(logits, target, ignore_index=255), losses, 1)


def test_bn_step_is_the_published_one(monkeypatch):
    """BatchNorm over the whole batch though the encoder runs in parts; all pixels in the mean."""
    protocol = replace(BN, forward_images=3)
    monkeypatch.setattr(BnProbe, "learning_rate", lambda self, step, images: 0.3)  # one that shows
    head, losses, first, levels, mask = _one_step(protocol, monkeypatch)
    norm = first.before[0].train()
    logits = first.convolution(norm(levels[0]))
    logits = F.interpolate(logits, (24, 24), mode="bilinear")
    loss = F.cross_entropy(logits, mask, ignore_index=255, reduction="none").mean()
    _same(head, first, loss, losses, 0.3)
    torch.testing.assert_close(head.before[0][1].running_mean, norm[1].running_mean)


def test_learning_rates_are_the_published_ones():
    bn = [BnProbe().learning_rate(step, 9) for step in (0, 1, 751, 1501, 20000, 39999)]
    expected = [1e-9, 1e-9, 4.90625e-4, 1e-3 / 2 * (1 + np.cos(np.pi * 1501 / 40000)), 5e-4, 0]
    assert bn == pytest.approx(expected, rel=1e-5, abs=1e-11)
    plain = PlainProbe(batch_images=10)
    assert plain.total_steps(105) == 250  # 10 batches an epoch, the 5 images left are left out
    rates = [plain.learning_rate(step, 105) for step in (0, 199, 200, 249)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert PlainProbe().total_steps(7) == 25


def test_windows_cover_the_image_and_are_averaged():
    protocol = BnProbe()
    starts = {side: protocol._starts(side) for side in (512, 513, 853, 854, 1024)}
    assert starts == {512: [0], 513: [0, 1], 853: [0, 341], 854: [0, 341, 342], 1024: [0, 341, 512]}
    item = label_set(masks(0, 1, 60)[:, :30])[0]
    small, calls = replace(BN, input_size=30), []

    def classify(image, size):
        calls.append(len(calls))
        assert image.shape == (30, 30, 3) and size == (30, 30)
        return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() + calls[-1]

    prediction, mask = small.predict(classify, item)
    assert len(calls) == 3 and np.array_equal(prediction.numpy(), mask) and mask is item.mask
    tall = label_set(masks(0, 1, 96)[:, :, :50])[0]  # 50 wide: brought to 30, 58 high
    assert small.predict(classify, tall)[0].shape == (96, 50)


def test_training_crops():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (40, 60, 3), np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 40:] = 1
    image[..., 0] = mask * 200  # read off the image where the mask must be
    protocol = replace(PLAIN, input_size=30, target_size=30)
    for _ in range(50):
        window = protocol._crop(mask.shape, rng)
        height, width = mask[window].shape
        assert 0.79 < height * width / mask.size <= 1 and 0.74 < width / height < 1.35
        crop, labels = protocol.augment(image, mask, rng)
        assert crop.shape == (30, 30, 3) and labels.shape == (30, 30)
        assert ((crop[..., 0] > 100) == labels).mean() > 0.97
    assert protocol._crop((10, 100), rng) == (slice(0, 10), slice(43, 56))  # none fits: centre
    shapes, both = set(), 0
    for _ in range(60):
        crop, labels = BnProbe(input_size=36, stride=20).augment(image, mask, rng)
        shapes.add(crop.shape)
        assert labels.shape == (36, 36) and (labels[crop.shape[0] :] == 255).all()
        both += np.unique(labels[labels < 255]).size == 2
    assert len(shapes) > 5 and max(shapes) == (36, 36, 3) and both > 50
    mixed = []
    for share in (0.75, 0.99):
        probe = BnProbe(input_size=36, stride=20, scales=(2, 2), max_class_share=share)
        draws = [probe.augment(image, mask, rng)[1].mean() for _ in range(60)]
        mixed.append(sum(0.25 < d < 0.75 for d in draws))
    assert mixed[0] > 50 and mixed[1] < 40


def test_color_distortion():
    image = np.random.default_rng(0).integers(0, 255, (6, 7, 3), np.uint8)
    made = [distort_colors(image, np.random.default_rng(s)) for s in range(200)]
    assert all(m.dtype == np.uint8 and m.shape == image.shape for m in made)
    untouched = sum(np.array_equal(m, image) for m in made)
    assert 2 < untouched < 30  # 1 in 16
    grey = np.full((4, 4, 3), 100, np.uint8)
    made = [distort_colors(grey, np.random.default_rng(s)) for s in range(50)]
    assert all(np.ptp(m) <= 1 for m in made) and len({int(m[0, 0, 0]) for m in made}) > 10


@BOTH
def test_seeds_and_options_change_something(protocol):
    noise = np.random.default_rng(0).integers(0, 255, (6, 24, 24, 3), np.uint8)
    data = label_set(masks(0, cell=4), noise)
    short = {"steps": 8} if protocol is BN else {"epochs": 4, "drop_epoch": 2, "target_size": 20}
    run = lambda seed=0, **o: run_segmentation_head(  # noqa: E731
        FakeEncoder((4, 8)), data, data, replace(protocol, **{**short, **o}), seed
    )
    base = run()
    state = torch.get_rng_state()
    assert base.scores == run().scores and torch.equal(torch.get_rng_state(), state)
    assert run(forward_images=1).details == pytest.approx(base.details, rel=1e-4, abs=1)
    others = [{"seed": 1}, {"lr": 0.01}, {"batch_images": 2}, {"features": "stage1"},
              {"features": "hypercolumn"}, {"flip": 1}, {"weight_decay": 0.9}]  # fmt: skip
    if protocol is BN:
        others += [{"steps": 9}, {"warmup_steps": 1}, {"dropout": 0.9},
                   {"scales": (0.5, 2)}]  # fmt: skip
    else:
        others += [{"epochs": 5}, {"drop_epoch": 1}, {"momentum": 0},
                   {"input_size": 16}, {"target_size": 8}, {"crop_area": (0.1, 0.2)},
                   {"crop_ratio": (2, 3)}]  # fmt: skip
    for other in others:
        losses = [r.details["train_loss"] for r in (run(**other), base)]
        assert losses[0] != losses[1], other


@BOTH
def test_bad_input(protocol):
    good = label_set(masks(0))
    for name in ("lr", "batch_images", "input_size"):
        with pytest.raises(ValueError, match=f"{name} = 0, expected more than 0"):
            replace(protocol, **{name: 0})
    with pytest.raises(ValueError, match="warmup_steps = 1500 of steps = 100: shorten both"):
        BnProbe(steps=100)
    with pytest.raises(ValueError, match="no features 'stage3'"):
        run_segmentation_head(FakeEncoder(), good, good, replace(protocol, features="stage3"))
    with pytest.raises(ValueError, match="classes differ"):
        run_segmentation_head(FakeEncoder(), good, label_set(masks(0), classes=4), protocol)
    broken = FakeEncoder().train()
    broken.normalize = lambda images: torch.full((len(images), 3, 24, 24), torch.nan)
    with pytest.raises(ValueError, match=r"features of fake\d are not finite"):
        run_segmentation_head(broken, good, good, protocol)
    assert broken.training
    with pytest.raises(ValueError, match=r"fake\d: the encoder's map has \(12, 12\) cells"):
        run_segmentation_head(lying(), good, good, protocol)
    with pytest.raises(ValueError, match="fake: no training pixel has a label"):
        run_segmentation_head(FakeEncoder(), label_set(np.full((2, 24, 24), 255)), good, protocol)


def test_a_frozen_part_of_the_encoder_stays_frozen(true_colors):
    data, encoder = label_set(masks(0)), FakeEncoder()
    encoder.norm.eval()
    run_segmentation_head(encoder, data, data, replace(BN, steps=6))
    assert encoder.training and not encoder.norm.training


@BOTH
def test_an_encoder_without_weights(protocol):
    data = label_set(masks(0, cell=8))
    result = run_segmentation_head(load_encoder("handmade"), data, data, replace(protocol, lr=0.1))
    assert result.scores["pixel_accuracy"] > 0.5


def test_classes_in_strips_are_those_of_the_whole_image():
    logits = torch.randn(1, 5, 20, 30, generator=torch.Generator().manual_seed(0))
    for size in ((150, 71), (64, 64), (7, 9)):
        expected = F.interpolate(logits, size, mode="bilinear")[0].argmax(0)
        found = linear_probe_bn._largest(logits, size)
        assert found.shape == size and (found == expected).float().mean() > 0.999
