from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_flow.data.segmentation import IGNORE, SegmentationSet, open_segmentation

REAL = Path(__file__).parents[3] / "shared/data"


def _write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def _pair(folder, name, mask, image_suffix=".jpg"):
    mask = np.asarray(mask, np.uint8)
    _write(folder / "images" / f"{name}{image_suffix}", np.zeros((*mask.shape, 3)))
    _write(folder / "masks" / f"{name}.png", mask)


@pytest.fixture
def camvid(tmp_path):
    root = tmp_path / "camvid"
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            _pair(root / split, f"{split}{i}", [[0, 1, 7], [2, 2, 0]])
    (root / "classes.csv").write_text("id,name,ignore\n0,sky,0\n1,void,1\n2,road,0\n7,car,0\n")
    return root


@pytest.fixture
def davis(tmp_path):
    root = tmp_path / "davis"
    for sequence in "abcde":
        for i in range(2):
            _write(root / "frames" / sequence / f"{i:05d}.jpg", np.zeros((2, 3, 3)))
            _write(root / "masks" / sequence / f"{i:05d}.png", [[0, 1, 0], [0, 0, 1]])
    return root


def test_camvid_train_and_val_with_ignore(camvid):
    train, test = (open_segmentation(f"camvid:{camvid}", s) for s in ("train", "test"))
    assert (len(train), len(test), train.name) == (3, 2, "camvid")
    assert train.classes == test.classes == ["sky", "road", "car"]
    image, mask, name = test[1]
    assert image.shape == (2, 3, 3) and image.dtype == mask.dtype == np.uint8
    assert mask.tolist() == [[0, IGNORE, 2], [1, 1, 0]] and name == "val1"
    assert test.protocol["images"] == 2 and "val" in test.protocol["rule"]
    assert [item.name for item in train] == ["train0", "train1", "train2"]
    with pytest.raises(IndexError):
        train[3]


def test_camvid_is_judged_on_its_test_split_where_it_has_one(camvid):
    _pair(camvid / "test", "test0", [[0, 1, 7], [2, 2, 0]])
    assert open_segmentation(f"camvid:{camvid}", "test").names == ["test0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,name\n256,sky\n", "id 256 is not the value of an 8-bit mask, 0 to 255"),
        ("id,name\nsky,0\n", "id sky is not the value of an 8-bit mask, 0 to 255"),
        ("id,name,ignore\n0,sky,no\n", "ignore = no of id 0, expected 0 or 1"),
        ("id,name\n0,sky\n1,road\n0,car\n", "id 0 is there twice"),
        ("id,name\n0,sky\n1,sky\n", "id 1 needs a name of its own, found 'sky'"),
        ("id,name,ignore\n0,sky,1\n1,road,1\n", "every class is ignored"),
    ],
)
def test_bad_classes_are_named(camvid, text, message):
    (camvid / "classes.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"classes\.csv: {message}"):
        open_segmentation(f"camvid:{camvid}", "train")


def test_classes_as_spreadsheets_write_them(camvid):
    (camvid / "classes.csv").write_bytes(b"\xef\xbb\xbfid,name\r\n0,sky\r\n1,void\r\n")
    assert open_segmentation(f"camvid:{camvid}", "train").classes == ["sky", "void"]


def test_davis_splits_by_sequence(davis):
    train, test = (open_segmentation(f"davis:{davis}", s) for s in ("train", "test"))
    assert train.protocol["sequences"] == ["a", "c", "d"]
    assert test.protocol["sequences"] == ["b", "e"]
    assert "index % 3 == 1" in test.protocol["rule"]
    assert test.names == ["b/00000", "b/00001", "e/00000", "e/00001"]
    assert test.classes == ["background", "foreground"]
    assert test[0].mask.tolist() == [[0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("year", [2016, 2017])
def test_davis_official_lists_and_values(tmp_path, year):
    for sequence in ("bear", "camel"):
        _write(tmp_path / "JPEGImages/480p" / sequence / "00000.jpg", np.zeros((1, 3, 3)))
        mask = Image.fromarray(np.array([[0, 2, 255]], np.uint8))
        mask.putpalette([0, 0, 0, 9, 9, 9, 0, 128, 0])  # as in 2017: the index is the object
        path = tmp_path / "Annotations/480p" / sequence / "00000.png"
        path.parent.mkdir(parents=True)
        mask.save(path)
    for split, sequence in (("train", "bear"), ("val", "camel")):
        line = f"{sequence}\n"
        if year == 2016:
            name = f"480p/{sequence}/00000"
            line = f"/JPEGImages/{name}.jpg /Annotations/{name}.png\n"
        _write(tmp_path / "ImageSets/480p/x.png", [[0]])
        (tmp_path / f"ImageSets/480p/{split}.txt").write_text(line)
    test = open_segmentation(f"davis:{tmp_path}", "test")
    assert test.names == ["camel/00000"] and "official" in test.protocol["rule"]
    assert test[0].mask.tolist() == [[0, 1, 1]]


def test_folder_with_splits_and_found_classes(tmp_path):
    _pair(tmp_path / "train", "a", [[3, 9]], ".png")
    _pair(tmp_path / "val", "b", [[3, 255]], ".png")
    test = open_segmentation(f"folder:{tmp_path}", "test")
    assert test.classes == ["3", "9"]  # the train split has the 9
    assert test[0].mask.tolist() == [[0, IGNORE]]
    _pair(tmp_path / "test", "c", [[3, 3]], ".png")
    assert open_segmentation(f"folder:{tmp_path}", "test").names == ["c"]


def test_folder_without_splits_takes_every_fifth_for_the_test(tmp_path):
    for i in range(10):
        _pair(tmp_path, f"{i:02d}", [[0, 1]])
    assert open_segmentation(f"folder:{tmp_path}", "test").names == ["04", "09"]
    train = open_segmentation(f"folder:{tmp_path}", "train")
    assert len(train) == 8 and "every 5th" in train.protocol["rule"]


def test_synthetic_stills_are_not_training_frames():
    train, test = (open_segmentation("synthetic", s) for s in ("train", "test"))
    assert (len(train), len(test), len(train.classes)) == (200, 60, 5)
    assert not set(train.names) & set(test.names)
    assert train[0].mask.max() > 0
    assert np.array_equal(train[0].image, train[0].image)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagenet:x", "unknown data 'imagenet:x'.*camvid:PATH, voc:PATH.*synthetic"),
        ("camvid", "unknown data 'camvid'; known: camvid:PATH"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        open_segmentation(spec, "train")


@pytest.mark.parametrize(
    "kind", ["camvid", "voc", "cityscapes", "ade20k", "cocostuff", "davis", "folder"]
)
def test_a_missing_layout_is_named(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"Expected layout of {kind}"):
        open_segmentation(f"{kind}:{tmp_path}", "train")


def test_an_unknown_split_and_an_empty_split(camvid, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'val'"):
        open_segmentation(f"camvid:{camvid}", "val")
    for name in ("images", "masks"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="train split is empty"):
        open_segmentation(f"folder:{tmp_path / 'empty'}", "train")


def test_bad_files_are_named(camvid):
    (camvid / "val/masks/val0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"val0\.jpg has no mask"):
        open_segmentation(f"camvid:{camvid}", "test")
    train = open_segmentation(f"camvid:{camvid}", "train")
    _write(camvid / "train/masks/train0.png", np.zeros((5, 5)))
    with pytest.raises(ValueError, match=r"train0\.png is \(5, 5\), .*train0\.jpg is \(2, 3\)"):
        train[0]
    _write(camvid / "train/masks/train1.png", [[0, 1, 5], [2, 2, 0]])
    with pytest.raises(ValueError, match=r"train1\.png holds \[5\], not among the classes"):
        train[1]
    _write(camvid / "train/masks/train2.png", np.zeros((2, 3, 3)))
    with pytest.raises(ValueError, match=r"train2\.png: expected a single-channel"):
        train[2]
    (camvid / "classes.csv").write_text("number,label\n1,sky\n")
    with pytest.raises(ValueError, match=r"classes\.csv: expected the columns"):
        open_segmentation(f"camvid:{camvid}", "train")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((2, 3), np.uint8), r"mine: the mask of first is \(2, 3\), its image \(3, 3\)"),
        (np.diag([7, 0, 255]), r"mine: the mask of first holds class 7, expected 0\.\.2 or 255"),
    ],
)
def test_masks_of_a_set_made_in_memory_are_checked_too(mask, message):
    load = lambda i: (np.zeros((3, 3, 3), np.uint8), mask)  # noqa: E731
    with pytest.raises(ValueError, match=message):
        SegmentationSet("mine", ["a", "b", "c"], ["first"], load)[0]
    if mask.shape == (3, 3):
        assert SegmentationSet("mine", [], ["first"], load)[0].mask is mask  # of any index


@pytest.mark.skipif(not REAL.exists(), reason=f"no real data beside the checkout ({REAL})")
@pytest.mark.parametrize(
    ("spec", "train", "test", "classes"),
    [("camvid", 367, 101, 11), ("davis", 466, 213, 2), ("folder", 160, 40, 9)],
)
def test_real_sets(spec, train, test, classes):
    path = REAL / ("ccp" if spec == "folder" else spec)
    sets = [open_segmentation(f"{spec}:{path}", s) for s in ("train", "test")]
    assert [len(s) for s in sets] == [train, test]
    for each in sets:
        assert len(each.classes) == classes
        for index in range(0, len(each), 25):
            image, mask, _ = each[index]
            assert image.shape[:2] == mask.shape
            assert set(np.unique(mask)) <= {*range(classes), IGNORE}
