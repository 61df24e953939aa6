import numpy as np
import pytest
from PIL import Image

from ssl_flow.data.classification import open_classification


@pytest.fixture
def root(tmp_path):
    for split, names in (("train", ("cat/a", "cat/b", "dog/c")), ("val", ("dog/d",))):
        for name in names:
            path = tmp_path / split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((2, 3), len(name) * 20, np.uint8)).save(path)
    return tmp_path


def test_classes_are_the_folders_of_train(root):
    train, test = (open_classification(f"imagefolder:{root}", s) for s in ("train", "test"))
    assert train.classes == test.classes == ["cat", "dog"]
    assert [item.label for item in train] == [0, 0, 1]
    image, label, name = test[0]
    assert (image.shape, image.dtype, label, name) == ((2, 3, 3), np.uint8, 1, "dog/d.png")
    assert [item.name for item in train] == ["cat/a.png", "cat/b.png", "dog/c.png"]
    assert test.protocol["rule"] == "the folder val/" and test.protocol["images"] == 1


def test_the_test_folder_counts_only_with_classes(root):
    (root / "test").mkdir()
    (root / "test/0001.png").write_bytes((root / "val/dog/d.png").read_bytes())
    test = open_classification(f"imagefolder:{root}", "test")
    assert test.protocol["rule"] == "the folder val/"
    (root / "test/cat").mkdir()
    (root / "test/0001.png").rename(root / "test/cat/0001.png")
    assert open_classification(f"imagefolder:{root}", "test")[0].label == 0


def test_bad_folders(root, tmp_path):
    for spec in ("imagefolder", "folder:x"):
        with pytest.raises(ValueError, match=f"unknown classification data '{spec}'"):
            open_classification(spec, "train")
    with pytest.raises(ValueError, match="unknown split 'val'"):
        open_classification(f"imagefolder:{root}", "val")
    with pytest.raises(FileNotFoundError, match=r"empty/train has no class folders.*imagefolder"):
        open_classification(f"imagefolder:{tmp_path / 'empty'}", "train")
    (root / "train/cow").mkdir()
    with pytest.raises(ValueError, match="train has no images in cow"):
        open_classification(f"imagefolder:{root}", "train")
    (root / "val/wolf").mkdir()
    with pytest.raises(ValueError, match="val has classes that train/ has not: wolf"):
        open_classification(f"imagefolder:{root}", "test")
    (root / "val/wolf").rmdir()
    (root / "val/dog/d.png").unlink()
    with pytest.raises(ValueError, match="val has no images in cat, cow, dog"):
        open_classification(f"imagefolder:{root}", "test")
    (root / "val/dog").rmdir()
    with pytest.raises(FileNotFoundError, match="test/ or val has no class folders"):
        open_classification(f"imagefolder:{root}", "test")
