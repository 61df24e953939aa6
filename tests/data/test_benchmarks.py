"""The benchmarks' adapters on tiny trees in the official layouts."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from ssl_flow.data.benchmark_classes import ADE20K, CITYSCAPES, COCOSTUFF, VOC
from ssl_flow.data.segmentation import IGNORE, open_segmentation


def _write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def _image(path, size=(2, 3)):
    _write(path, np.full((*size, 3), 90))


def _lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def voc(tmp_path):
    for name in ("a", "b", "c"):
        _image(tmp_path / f"JPEGImages/{name}.jpg")
    for name in ("a", "b"):
        mask = Image.fromarray(np.array([[0, 20, 255], [1, 1, 0]], np.uint8))
        mask.putpalette(list(range(256)) * 3)  # VOC's masks are palette PNGs
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(tmp_path / f"SegmentationClass/{name}.png")
    _lines(tmp_path / "ImageSets/Segmentation/train.txt", ["a"])
    _lines(tmp_path / "ImageSets/Segmentation/val.txt", ["b"])
    return tmp_path


def _augment(root, line):
    _write(root / "SegmentationClassAug/c.png", np.full((2, 3), 5))
    _lines(root / "ImageSets/Segmentation/trainaug.txt", [line])


def test_voc(voc):
    train, test = (open_segmentation(f"voc:{voc}", split) for split in ("train", "test"))
    assert (train.names, test.names, train.classes) == (["a"], ["b"], VOC)
    assert test[0].mask.tolist() == [[0, 20, IGNORE], [1, 1, 0]]
    assert train.protocol["rule"].endswith("train.txt with the masks of SegmentationClass/")


@pytest.mark.parametrize("line", ["c", "/JPEGImages/c.jpg /SegmentationClassAug/c.png"])
def test_voc_trains_on_the_augmented_masks_where_they_are_and_says_so(voc, line):
    _augment(voc, line)
    train, test = (open_segmentation(f"voc:{voc}", split) for split in ("train", "test"))
    assert train.names == ["c"] and test.names == ["b"] and (train[0].mask == 5).all()
    assert "trainaug.txt with the masks of SegmentationClassAug/" in train.protocol["rule"]
    assert "val.txt with the masks of SegmentationClass/" in test.protocol["rule"]


@pytest.fixture
def cityscapes(tmp_path):
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "munster")):
        stem = f"{split}/{city}/{city}_000000_000019"
        _image(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png")
        unknown = 34 if split == "val" else 11
        mask = [[7, 33, 5], [unknown, 11, 7]]
        _write(tmp_path / f"gtFine/{stem}_gtFine_labelIds.png", mask)
        _write(tmp_path / f"gtFine/{stem}_gtFine_color.png", np.zeros((2, 3, 3)))
    return tmp_path


def test_cityscapes(cityscapes):
    train = open_segmentation(f"cityscapes:{cityscapes}", "train")
    assert train.names == ["aachen/aachen_000000_000019", "bochum/bochum_000000_000019"]
    assert train.classes == list(CITYSCAPES) and len(train.classes) == 19
    assert train[1].mask.tolist() == [[0, 18, IGNORE], [2, 2, 0]]
    test = open_segmentation(f"cityscapes:{cityscapes}", "test")
    with pytest.raises(ValueError, match=r"munster_000000_000019_gtFine_labelIds.*\[34\]"):
        test[0]


@pytest.fixture
def ade20k(tmp_path):
    for split, name in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        _image(tmp_path / f"images/{split}/{name}.jpg")
        _write(tmp_path / f"annotations/{split}/{name}.png", [[0, 1, 150], [2, 2, 2]])
    return tmp_path


def test_ade20k_zero_is_ignored(ade20k):
    test = open_segmentation(f"ade20k:{ade20k}", "test")
    assert (test.names, test.classes) == (["ADE_val_1"], ADE20K)
    assert test[0].mask.tolist() == [[IGNORE, 0, 149], [1, 1, 1]]
    _write(ade20k / "annotations/validation/ADE_val_1.png", [[0, 1, 151], [2, 2, 2]])
    with pytest.raises(ValueError, match=r"ADE_val_1\.png holds \[151\], not among the classes"):
        test[0]


@pytest.fixture
def cocostuff(tmp_path):
    for split, name in (("train", "1"), ("val", "2"), ("val", "3")):
        _image(tmp_path / f"images/{split}2017/{name}.jpg")
        _write(tmp_path / f"annotations/{split}2017/{name}.png", [[0, 181, 255], [123, 156, 105]])
    return tmp_path


def test_cocostuff_coarse_classes_and_the_fields_list(cocostuff):
    test = open_segmentation(f"cocostuff:{cocostuff}", "test")
    assert test.names == ["2", "3"] and test.classes == list(COCOSTUFF)
    person, plant, sky, solid = (
        test.classes.index(f"{name}")
        for name in ("person-things", "plant-stuff", "sky-stuff", "solid-stuff")
    )  # 0 person, 181 wood, 123 grass, 156 sky-other, 105 clouds
    assert test[0].mask.tolist() == [[person, solid, IGNORE], [plant, sky, sky]]
    assert "all images" in test.protocol["rule"]
    _lines(cocostuff / "curated/val2017/Coco164kFull_Stuff_Coarse_7.txt", ["3"])
    test = open_segmentation(f"cocostuff:{cocostuff}", "test")
    assert test.names == ["3"] and "Coco164kFull_Stuff_Coarse_7.txt" in test.protocol["rule"]


def test_cocostuff_table_is_the_published_one():
    """Digest of the fine -> coarse dump of IIC, which STEGO's table equals."""
    coarse = {value: i for i, values in enumerate(COCOSTUFF.values()) for value in values}
    assert sum(len(values) for values in COCOSTUFF.values()) == len(coarse) == 182
    text = "\n".join(f"{value} {coarse[value]}" for value in range(182))
    published = "b56c6a624e96b656e1ee6002261202e9f05554ae56cf54cfdd6f3408578532b9"
    assert hashlib.sha256(text.encode()).hexdigest() == published


def test_class_names_are_distinct():
    for classes, count in ((VOC, 21), (CITYSCAPES, 19), (ADE20K, 150), (COCOSTUFF, 27)):
        assert len(classes) == len(set(classes)) == count


def test_what_is_missing_is_named(voc):
    (voc / "JPEGImages/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"JPEGImages/b\.jpg is missing.*voc"):
        open_segmentation(f"voc:{voc}", "test")
    (voc / "SegmentationClass/a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg has no mask .*SegmentationClass/a\.png"):
        open_segmentation(f"voc:{voc}", "train")
    (voc / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"Segmentation/val\.txt is missing"):
        open_segmentation(f"voc:{voc}", "test")


def test_missing_parts_of_the_other_layouts(cityscapes, tmp_path):
    (tmp_path / "gtFine/train/bochum/bochum_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"bochum.* has no mask .*_gtFine_labelIds"):
        open_segmentation(f"cityscapes:{cityscapes}", "train")
    (tmp_path / "images/val2017").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"annotations/val2017 is missing.*cocostuff"):
        open_segmentation(f"cocostuff:{tmp_path}", "test")


def test_an_empty_split_and_another_size(voc, ade20k):
    _lines(voc / "ImageSets/Segmentation/val.txt", [])
    with pytest.raises(ValueError, match=r"test split is empty \(ImageSets/Segmentation/val\.txt"):
        open_segmentation(f"voc:{voc}", "test")
    _write(ade20k / "annotations/training/ADE_train_1.png", np.ones((4, 4)))
    with pytest.raises(ValueError, match=r"ADE_train_1\.png is \(4, 4\), .*jpg is \(2, 3\)"):
        open_segmentation(f"ade20k:{ade20k}", "train")[0]


@pytest.mark.parametrize("kept", [0, 100])
def test_a_broken_file_is_named(ade20k, kept):
    path = ade20k / "images/validation/ADE_val_1.jpg"
    path.write_bytes(path.read_bytes()[:kept] if kept else b"no image")
    with pytest.raises(ValueError, match=r"ADE_val_1\.jpg cannot be read as an image"):
        open_segmentation(f"ade20k:{ade20k}", "test")[0]
