from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_flow.data.davis import open_videos

REAL = Path(__file__).parents[3] / "shared/data/davis"


def _sequence(images, masks, name, frames):
    for i, mask in enumerate(frames):
        mask = np.asarray(mask, np.uint8)
        for folder, suffix, array in (
            (images, "jpg", np.zeros((*mask.shape, 3), np.uint8)),
            (masks, "png", mask),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / name / f"{i:05d}.{suffix}")


def _official(root, year, sequences):
    for name, frames in sequences.items():
        _sequence(root / "JPEGImages/480p", root / "Annotations/480p", name, frames)
    (root / f"ImageSets/{year}").mkdir(parents=True)
    lines = sequences
    if year == "480p":
        lines = [f"/JPEGImages/480p/{n}/00000.jpg /Annotations/480p/{n}/00000.png" for n in lines]
    for split in ("train", "val"):
        (root / f"ImageSets/{year}/{split}.txt").write_text("\n".join(lines) + "\n")


TWO_OBJECTS = [[[0, 1, 3]], [[3, 1, 255]], [[2, 0, 0]]]


def test_objects_are_those_of_the_first_mask(tmp_path):
    _official(tmp_path, "2017", {"bike": TWO_OBJECTS, "ant": [[[0, 1, 0]]]})
    videos = open_videos(f"davis:{tmp_path}")
    assert [v.name for v in videos.videos] == ["ant", "bike"] == videos.protocol["sequences"]
    bike = videos.videos[1]
    assert (len(bike), bike.objects) == (3, 2)
    # 3 is the second object, 255 is void and 2 is new: both background, as officially
    assert [item.mask.tolist() for item in bike] == [[[0, 1, 2]], [[2, 1, 0]], [[0, 0, 0]]]
    assert bike[2].name == "bike/00002" and bike[2].image.shape == (1, 3, 3)
    assert "ImageSets/2017/val.txt; the objects" in videos.protocol["rule"]
    assert (videos.protocol["objects"], videos.protocol["frames"]) == (3, 4)


@pytest.mark.parametrize(("year", "kind"), [("480p", "davis"), ("2016", "davis2016")])
def test_foreground_as_one_object(tmp_path, year, kind):
    _official(tmp_path, year, {"bear": [[[0, 255, 0]], [[0, 255, 255]], [[0, 3, 0]]]})
    videos = open_videos(f"{kind}:{tmp_path}", "train")
    assert videos.videos[0].objects == 1 and videos.name == "davis2016"
    assert videos.videos[0][1].mask.tolist() == [[0, 1, 1]]
    assert "foreground as one object" in videos.protocol["rule"]


def test_frames_and_masks_without_lists(tmp_path):
    for name in "abcde":
        _sequence(tmp_path / "frames", tmp_path / "masks", name, TWO_OBJECTS)
    test = open_videos(f"davis:{tmp_path}")
    assert [v.name for v in test.videos] == ["b", "e"] and test.videos[0].objects == 2
    assert open_videos(f"davis2016:{tmp_path}").videos[0].objects == 1


def test_bad_videos(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"frames is missing\. Expected layout of davis"):
        open_videos(f"davis:{tmp_path}")
    for spec in ("voc:x", "davis"):
        with pytest.raises(ValueError, match=f"unknown videos '{spec}'; known: davis:PATH"):
            open_videos(spec)
    with pytest.raises(ValueError, match="unknown split 'val'"):
        open_videos(f"davis:{tmp_path}", "val")
    _official(tmp_path, "2017", {"bike": TWO_OBJECTS})
    video = open_videos(f"davis:{tmp_path}").videos[0]
    masks = tmp_path / "Annotations/480p/bike"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(masks / "00001.png")
    with pytest.raises(ValueError, match=r"00001\.png is \(4, 4\), .*00001\.jpg is \(1, 3\)"):
        video[1]
    (masks / "00002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"00002\.jpg has no mask"):
        open_videos(f"davis:{tmp_path}")


def test_a_first_mask_without_objects_and_empty_splits(tmp_path):
    _official(tmp_path, "2017", {"bike": [[[0, 255]]]})
    with pytest.raises(ValueError, match=r"bike/00000\.png: the first mask has no object"):
        open_videos(f"davis:{tmp_path}")
    (tmp_path / "ImageSets/2017/val.txt").write_text("\n")
    with pytest.raises(ValueError, match="test split is empty"):
        open_videos(f"davis:{tmp_path}")
    (tmp_path / "ImageSets/2017/val.txt").write_text("bike\n")
    for folder in ("JPEGImages", "Annotations"):
        for path in (tmp_path / folder / "480p/bike").iterdir():
            path.unlink()
    with pytest.raises(ValueError, match="the sequence bike has no frames"):
        open_videos(f"davis:{tmp_path}")


@pytest.mark.skipif(not REAL.exists(), reason=f"no real data beside the checkout ({REAL})")
def test_real_videos():
    videos = open_videos(f"davis:{REAL}").videos
    assert sum(len(video) for video in videos) == 213
    for video in videos:
        image, mask, _ = video[len(video) // 2]
        assert image.shape[:2] == mask.shape and video.objects == 1
        assert np.unique(mask).tolist() == [0, 1]
