import shutil

import cv2
import numpy as np
import pytest
from test_store import flip, make_store

from ssl_flow.cli import main
from ssl_flow.flow.shard import shard_path
from ssl_flow.flow.show import spread_pairs

NAMES = ["clips/a.mp4", "caf\udce9\n$x^2$.mp4", "日本語.mp4", "b" * 300]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("show") / "store", NAMES)


def numbers(*pairs):
    return np.repeat(np.arange(len(pairs)), pairs)


@pytest.mark.parametrize(
    ("pairs", "count", "expected"),
    [
        ([10], 1, [5]),
        ([10], 2, [2, 7]),
        ([10, 10], 2, [5, 15]),
        ([10, 1, 10], 5, [2, 7, 10, 13, 18]),
        ([1, 1, 1, 1, 1, 1], 3, [1, 3, 5]),
        ([2, 3], 99, [0, 1, 2, 3, 4]),
        ([4], 3, [0, 2, 3]),
    ],
)
def test_pairs_are_spread_over_the_videos(pairs, count, expected):
    assert spread_pairs(numbers(*pairs), count) == expected


def test_pairs_are_distinct_and_as_many_as_asked():
    rng = np.random.default_rng(0)
    for _ in range(100):
        pairs = rng.integers(1, 9, rng.integers(1, 9))
        count = int(rng.integers(1, 40))
        chosen = spread_pairs(numbers(*pairs), count)
        assert len(set(chosen)) == len(chosen) == min(count, pairs.sum())
        assert chosen == sorted(chosen)
        assert chosen[-1] < pairs.sum()


def test_the_sheet_is_a_picture_and_the_same_each_time(store, tmp_path, capsys):
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file in files:
        assert main(["show", "flow", str(store), "--out", str(file), "--count", "5"]) == 0
        assert f"wrote {file}" in capsys.readouterr().out
    assert files[0].read_bytes() == files[1].read_bytes()
    image = cv2.imread(str(files[0]))
    assert image.shape[1] == 1500
    assert (image != 255).mean() > 0.3
    magenta = (image == (160, 0, 230)).all(axis=-1)
    assert magenta.sum() > 500  # what is not valid


def test_errors_are_told(store, tmp_path, capsys):
    def fails(*arguments):
        assert main(["show", "flow", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    out = tmp_path / "sheet.png"
    assert "not a flow store" in fails(tmp_path / "absent")
    assert "above 0" in fails(store, "--out", out, "--count", 0)
    assert "No such file" in fails(store, "--out", tmp_path / "absent/sheet.png", "--count", 1)
    empty = make_store(tmp_path / "empty", [])
    assert "holds no pair" in fails(empty, "--out", out)
    shutil.copytree(store, tmp_path / "copy")
    flip(shard_path(tmp_path / "copy", "clips/a.mp4"), 2000)
    assert "clips/a.mp4/00000" in fails(tmp_path / "copy", "--out", out)
    assert not out.exists()


def test_an_unknown_kind_is_told_with_the_known_ones(capsys):
    assert main(["show", "flows"]) == 2
    assert "show flow" in capsys.readouterr().err
