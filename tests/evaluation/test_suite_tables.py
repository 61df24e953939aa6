"""Outcomes on the disk, tables from outcomes whose intervals are known, pictures of features."""

import os

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ssl_flow.data.segmentation import SegmentationSet
from ssl_flow.evaluation import protocols
from ssl_flow.evaluation.dense_knn import DenseKnn
from ssl_flow.evaluation.outcome import Outcome, cell_path, load_cell, save_cell
from ssl_flow.evaluation.protocols import Data, open_data
from ssl_flow.evaluation.suite import Cell, parse_row
from ssl_flow.evaluation.suite_pictures import (
    joint_maps,
    mark_pixels,
    pca_tiles,
    pick_images,
    similarity_tiles,
)
from ssl_flow.evaluation.suite_tables import as_csv, as_markdown, tables

ABOUT = {"protocol": {"name": "dense-knn"}, "encoder": "e", "seed": 0}


def outcome(right, images=8, wrong=2):
    """Every image has `right` pixels of each of 2 classes right and `wrong` of class 0 wrong."""
    sums = [[right, right], [right + wrong, right], [right, right + wrong]]
    counts = np.tile(np.array(sums), (images, 1, 1))
    miou = (right / (right + wrong)) if right else 0.0
    return Outcome({"miou": miou}, counts, items=[f"video{i % 4}/{i}" for i in range(images)])


def cell(data, label, found, seed=0, error=""):
    about = ABOUT | {"encoder": label, "seed": seed}
    return Cell(data, DenseKnn(), label, label, seed, about, cell_path(data.about["folder"], about),
                found, error)  # fmt: skip


@pytest.fixture
def data(tmp_path):
    images = SegmentationSet("fake", ["a", "b"], [], lambda i: None)
    about = {"folder": tmp_path}
    return Data("fake:x", "fake", "segmentation", (), images, images, about, "sequences", "digest")


def test_a_cell_comes_back_from_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    image = np.full((480, 640, 3), (10, 100, 200), np.uint8)
    labels = rng.integers(0, 3, (2, 3)).repeat(240, 0).repeat(240, 1)[:, :640].astype(np.uint8)
    stored = Outcome(
        {"miou": 0.5, "other score": 1.25}, rng.integers(0, 9, (4, 3, 3)),
        {"other score": rng.random(4)}, list("abcd"), {"x": None}, {"seconds": 1.5},
        [(image, labels, 2 - labels)],
    )  # fmt: skip
    path = cell_path(tmp_path, ABOUT)
    assert load_cell(path) is None
    save_cell(path, stored, ABOUT)
    found = load_cell(path)
    for name in ("scores", "items", "per_class", "details"):
        assert getattr(found, name) == getattr(stored, name)
    np.testing.assert_array_equal(found.counts, stored.counts)
    np.testing.assert_array_equal(found.values["other score"], stored.values["other score"])
    ((small, truth, prediction),) = found.examples
    assert small.shape == (240, 320, 3) and np.abs(small - image[::2, ::2].astype(int)).max() < 4
    np.testing.assert_array_equal(truth, labels[::2, ::2])
    np.testing.assert_array_equal(prediction, 2 - truth)
    path.with_suffix(".npz").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"dense-knn-.*json cannot be read .*delete it"):
        load_cell(path)
    assert cell_path(tmp_path, ABOUT | {"seed": 1}) != path


def test_better_is_said_only_where_intervals_and_runs_are_apart(data):
    cells = [
        cell(data, "good", outcome(90)), cell(data, "good", outcome(88), 1),
        cell(data, "poor", outcome(40)), cell(data, "mixed", outcome(91)),
        cell(data, "mixed", outcome(20), 1), cell(data, "gone", None, error="MemoryError: none"),
    ]  # fmt: skip
    (table,) = tables(cells)
    rows = {row["encoder"]: row for row in table["rows"]}
    assert (table["units"], table["unit"]) == (4, "sequences")
    assert rows["good"]["better_than"] == ["poor"] and rows["good"]["best"]
    # above poor in the mean, but not with every run
    assert rows["mixed"]["better_than"] == rows["poor"]["better_than"] == []
    assert rows["gone"]["scores"] == {} and not rows["gone"]["best"]
    text = as_markdown([table])
    assert "By mIoU: good is better than poor." in text and "| **0.978 [" in text
    # all images alike, so every draw gives the difference itself
    gap = (90 / 92 + 88 / 90) / 2 - 40 / 42
    assert rows["poor"]["best_less_this"]["miou"] == pytest.approx(
        {"value": gap, "low": gap, "high": gap}
    )
    assert rows["good"]["best_less_this"] == rows["gone"]["best_less_this"] == {}
    shown = f"poor {gap:.3f} [{gap:.3f}, {gap:.3f}]; mixed 0.034"
    assert f"good less the others, paired: {shown}" in text
    assert "1 of 1 failed: MemoryError: none" in text and "Intervals over 4 sequences" in text
    lines = as_csv([table]).splitlines()
    assert lines[1].startswith("fake,dense-knn,1,good,miou,0.97") and lines[1].endswith(",1,poor")
    assert lines[-1].startswith("fake,dense-knn,1,gone,miou,,,,,,,,1,1")
    assert f",{gap},{gap},{gap},1,0,0," in next(line for line in lines if ",poor,miou," in line)


@pytest.mark.parametrize(
    "found", [Outcome({"miou": np.nan}), Outcome({"miou": 0.5}, values={"J": np.array([np.inf])})]
)
def test_a_score_that_is_not_finite_is_no_outcome(data, monkeypatch, found):
    fake = protocols.Entry(DenseKnn, lambda *given, **options: found)
    monkeypatch.setitem(protocols.PROTOCOLS, "dense-knn", fake)
    with pytest.raises(ValueError, match="a score is not finite"):
        protocols.run_protocol(DenseKnn(), None, data, 0)


def test_an_error_of_several_lines_is_one_cell(data):
    text = as_markdown(tables([cell(data, "e", None, error="RuntimeError: one\n  a | b")]))
    assert "| e | - | 1 of 1 failed: RuntimeError: one a \\| b |" in text


def test_objects_of_a_sequence_are_drawn_together(data):
    values = {"J": np.repeat([0.2, 0.6, 0.7], 10)}
    items = [f"video{i // 10}/object {i % 10 + 1}" for i in range(30)]
    (table,) = tables([cell(data, "e", Outcome({"J": 0.5}, values=values, items=items))])
    score = table["rows"][0]["scores"]["J"]
    assert (table["units"], score["value"]) == (3, 0.5)
    # as three independent values, not as thirty
    assert (score["low"], score["high"]) == pytest.approx((0.2, 0.7))


def test_a_row_of_encoders():
    assert parse_row("random:resnet18", 2) == (
        "random:resnet18",
        [("random:resnet18", 0), ("random:resnet18", 1)],
    )
    assert parse_row("mine=runs/a, runs/b", 3) == ("mine", [("runs/a", 0), ("runs/b", 0)])
    assert parse_row("runs/lr=1", 1) == ("runs/lr=1", [("runs/lr=1", 0)])
    random = "random:a,random:a"
    assert parse_row(random, 1)[1] == [("random:a", 0), ("random:a", 1)]


def test_data_of_every_kind_can_be_shown():
    for kind in ("segmentation", "pairs"):
        opened = open_data(kind, "synthetic")
        image, mask, name = opened.shown[0]
        assert image.shape[:2] == mask.shape and name.startswith("synthetic-")
        assert opened.digest == open_data(kind, "synthetic").digest


def test_a_changed_mask_is_another_set(tmp_path):
    for split in ("train", "test"):
        for kind, shape in (("images", (8, 8, 3)), ("masks", (8, 8))):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(5):
                blank = Image.fromarray(np.zeros(shape, np.uint8))
                blank.save(tmp_path / split / kind / f"{i}.png")
    before = open_data("segmentation", f"folder:{tmp_path}").digest
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "train/masks/3.png")
    assert open_data("segmentation", f"folder:{tmp_path}").digest != before


def test_a_changed_flow_is_another_set(tmp_path):
    folder = tmp_path / "Venus"
    folder.mkdir()
    for name in ("frame10", "frame11", "flow10"):
        cv2.imwrite(str(folder / f"{name}.png"), np.ones((8, 8, 3), np.uint16))
    before = open_data("pairs", f"middlebury:{tmp_path}").digest
    assert open_data("pairs", f"middlebury:{tmp_path}").digest == before
    os.utime(folder / "flow10.png", (1, 1))
    assert open_data("pairs", f"middlebury:{tmp_path}").digest != before


class Colours(nn.Module):
    """Two levels: the image at strides 4 and 16."""

    strides, channels = (4, 16), (3, 3)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def normalize(self, images):
        return images.permute(0, 3, 1, 2).float() / 255

    def features(self, images):
        return [nn.functional.avg_pool2d(images, s) * self.weight for s in self.strides]


def test_features_of_the_same_images_as_pictures():
    masks = np.zeros((3, 320, 480), np.uint8)
    masks[:, :160, 240:] = 1
    masks[:, 300:, :50] = 255
    pictures = np.array([(200, 10, 10), (10, 200, 10)], np.uint8)[np.minimum(masks, 1)]
    dataset = SegmentationSet("s", ["a", "b"], list("xyz"), lambda i: (pictures[i], masks[i]))
    images, chosen = pick_images(dataset, str, count=2)
    assert images.shape == (2, 320, 480, 3) and chosen.shape == (2, 320, 480)
    marks = mark_pixels(chosen)
    assert [chosen[mark] for mark in marks] == [0, 1, 0, 1]
    maps, stride = joint_maps(Colours(), images)
    assert maps.shape == (2, 6, 40, 60) and stride == 8
    torch.testing.assert_close(maps.norm(dim=1), torch.ones(2, 40, 60))
    _, row, column = marks[1]
    first, second = (x.astype(int).sum(-1) for x in similarity_tiles(maps, 8, marks[1], (40, 60)))
    assert first[row // 8, column // 8] == first.max()  # bright where the class is
    bright = second > (second.min() + second.max()) / 2
    assert (bright == (chosen[1, 4::8, 4::8] == 1)).mean() > 0.97
    red, green = pca_tiles(maps, (40, 60))[0][[30, 10], [10, 50]].astype(int)
    assert np.abs(red - green).max() > 200  # the two classes differ most
    bad = Colours()
    bad.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        joint_maps(bad, images)
