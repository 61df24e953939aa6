from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import FakeEncoder, lying

from ssl_flow.data.segmentation import Labelled
from ssl_flow.evaluation.label_propagation import (
    LabelPropagation,
    _default_features,
    propagate,
    run_label_propagation,
)

SMALL = LabelPropagation(short_side=64)


class FakeVideo:
    """The image shows what object is where, one colour each, unless noise is asked for."""

    def __init__(self, masks, name="fake", noise=False):
        self.masks, self.name, self.noise, self.objects = masks, name, noise, 2

    def __len__(self):
        return len(self.masks)

    def __getitem__(self, index):
        mask = self.masks[index]
        image = np.eye(3, dtype=np.uint8)[mask] * 255
        if self.noise:
            image = np.random.default_rng(index).integers(0, 255, image.shape, dtype=np.uint8)
        return Labelled(image, mask, f"{self.name}/{index}")


def moving(frames=5, shape=(64, 128), step=8):
    """Object 1 goes right, object 2 down; together more than the neighbourhood of 12 cells."""
    masks = np.zeros((frames, *shape), np.uint8)
    for t in range(frames):
        masks[t, 5:25, 10 + step * t : 30 + step * t] = 1
        masks[t, 5 + step * t : 20 + step * t, 90:120] = 2
    return masks


def test_features_that_tell_the_objects_carry_them_to_the_end():
    videos = [FakeVideo(moving(), "a"), FakeVideo(moving(3), "b")]
    result = run_label_propagation(FakeEncoder(), videos, SMALL)
    assert list(result.scores)[:2] == ["J&F mean", "J mean"]
    assert all(v == (0 if "decay" in name else 1) for name, v in result.scores.items())
    assert list(result.values) == ["J&F mean", "J mean", "F mean"]
    np.testing.assert_array_equal(result.values["J&F mean"], [1] * 4)
    assert result.items == ["a/object 1", "a/object 2", "b/object 1", "b/object 2"]
    assert result.details["features"] == "stage1"
    (image, truth, prediction) = result.examples[0]
    assert len(result.examples) == 2 and image.shape == (64, 128, 3)
    np.testing.assert_array_equal(truth, moving()[-1])
    np.testing.assert_array_equal(prediction, truth)


def test_features_that_tell_nothing_leave_the_objects_behind():
    videos = [FakeVideo(moving(), noise=True)]
    assert run_label_propagation(FakeEncoder(), videos, SMALL).scores["J mean"] < 0.3


def test_masks_keep_their_size_when_frames_are_resized():
    """Frames of 54 x 100 become 64 x 64 (the longer side: a multiple of 64) with cells of 8."""
    video = FakeVideo(moving(3, (54, 122), 1))
    sizes = []
    encoder = FakeEncoder((8,))
    features = encoder.features
    encoder.features = lambda images: sizes.append(tuple(images.shape)) or features(images)
    result = run_label_propagation(encoder, [video], SMALL)
    assert set(sizes) == {(1, 3, 64, 128)} and 0.4 < result.scores["J mean"] < 1
    portrait = FakeVideo(moving(3, (54, 122), 1).transpose(0, 2, 1).copy())
    again = run_label_propagation(encoder, [portrait], SMALL)
    assert again.scores["J mean"] == pytest.approx(result.scores["J mean"], abs=0.02)
    assert sizes[-1] == (1, 3, 128, 64)


def dense(query, keys, labels, protocol):
    """The published rule with whole affinity matrices and no tiles."""
    _, h, w = query.shape
    cells = np.stack(np.meshgrid(range(h), range(w), indexing="ij"), -1).reshape(-1, 2)
    far = np.abs(cells[:, None] - cells).max(-1) > protocol.radius  # (query, source)
    affinity = np.einsum(
        "cq,ncs->qns", query.reshape(len(query), -1), keys.reshape(*keys.shape[:2], -1)
    )
    affinity = np.exp(affinity / protocol.temperature) * ~far[:, None]
    affinity = affinity.reshape(h * w, -1)
    lowest = np.sort(affinity, 1)[:, -protocol.neighbours]
    affinity[affinity < lowest[:, None]] = 0
    affinity /= affinity.sum(1, keepdims=True)
    flat = labels.transpose(0, 2, 3, 1).reshape(-1, labels.shape[1])
    return (affinity @ flat).T.reshape(-1, h, w)


@pytest.mark.parametrize("change", [{}, {"radius": 3}, {"neighbours": 2}, {"temperature": 1.0}])
def test_tiles_are_the_dense_rule(change):
    protocol = LabelPropagation(**change)
    generator = torch.Generator().manual_seed(0)
    size = (19, 37)  # neither a multiple of the tile
    query, keys = (
        F.normalize(torch.randn(n, 8, *size, generator=generator, dtype=torch.float64), dim=1)
        for n in (1, 3)
    )
    labels = torch.rand(3, 4, *size, generator=generator, dtype=torch.float64)
    found = propagate(query[0], keys, labels, protocol)
    expected = dense(query[0].numpy(), keys.numpy(), labels.numpy(), protocol)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_context_is_the_first_frame_and_the_last_ones():
    """What is hidden for longer than the recent frames reach is found again through the first."""
    masks = moving(5, step=0)
    masks[1:4] = 0
    one = LabelPropagation(short_side=64, previous=1)
    result = run_label_propagation(FakeEncoder(), [FakeVideo(masks)], one)
    _, truth, prediction = result.examples[0]
    np.testing.assert_array_equal(prediction, truth)
    assert truth.any()
    noisy = [FakeVideo(moving(4), noise=True)]
    three = [
        run_label_propagation(FakeEncoder(), noisy, replace(SMALL, previous=n)).scores
        for n in (0, 1, 2)
    ]
    assert three[0] != three[1] == three[2]  # frame 2 has one before it and the first


def test_the_map_that_is_propagated_on():
    assert _default_features(FakeEncoder((4, 8, 16, 32))) == "stage2"
    assert _default_features(FakeEncoder((16, 16, 16, 16))) == "stage4"
    assert _default_features(FakeEncoder((2, 4))) == "stage2"


def test_bad_input():
    run = lambda e, v, **o: run_label_propagation(e, v, LabelPropagation(**o))  # noqa: E731
    good = FakeVideo(moving(3))
    with pytest.raises(ValueError, match="neighbours = 0, expected more than 0"):
        LabelPropagation(neighbours=0)
    with pytest.raises(ValueError, match="no features 'stage2'"):
        run(FakeEncoder(), [good], features="stage2")
    with pytest.raises(ValueError, match="name a stage or the embedding"):
        run(FakeEncoder(), [good], features="hypercolumn")
    with pytest.raises(ValueError, match=r"no video of 3 frames to propagate along: \['one'\]"):
        run(FakeEncoder(), [FakeVideo(moving(2), "one"), good])
    with pytest.raises(ValueError, match="no video at all"):
        run(FakeEncoder(), [])
    with pytest.raises(ValueError, match=r"fake/0: the encoder's map has \(32, 64\) cells"):
        run(lying(), [good], short_side=64)
    broken = FakeEncoder()
    broken.scale.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="features of fake/0 are not finite"):
        run(broken, [good])
    assert broken.training  # as it was
