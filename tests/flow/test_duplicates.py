import time
from itertools import pairwise

import cv2
import numpy as np
import pytest
from clips import moving, texture, write_video

from ssl_flow.flow import read_frames
from ssl_flow.flow.duplicates import (
    NEAR,
    PLAIN,
    RepeatedPairs,
    Thumbnail,
    find_duplicate_sources,
)


def grey(image):
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def frame_hash(picture):
    return Thumbnail(picture).hash


def near(a, b):
    return PLAIN not in (a, b) and (a ^ b).bit_count() <= NEAR


def test_the_hash_tells_which_frequencies_are_strong():
    y, x = np.mgrid[:64, :64]
    wave = np.cos(np.pi * 3 * (x + 0.5) / 64) + 0.5 * np.cos(np.pi * 5 * (y + 0.5) / 64)
    picture = (128 + 60 * wave).astype(np.uint8)
    bits = np.array(list(f"{frame_hash(picture):064b}"), int).reshape(8, 8)
    assert bits[0, 3] == bits[5, 0] == 1  # vertical frequency first
    negative = np.array(list(f"{frame_hash(255 - picture):064b}"), int).reshape(8, 8)
    assert negative[0, 3] == negative[5, 0] == 0


def test_the_hash_survives_size_encoder_and_brightness(tmp_path):
    image = texture(1, 240, 320)
    original = frame_hash(grey(image))
    small = cv2.resize(image, (160, 120), interpolation=cv2.INTER_AREA)
    jpeg = cv2.imdecode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 1)
    for other in (small, jpeg, (image * 0.8 + 10).astype(np.uint8)):
        assert near(original, frame_hash(grey(other)))
    assert not near(original, frame_hash(grey(texture(2, 240, 320))))
    assert not near(original, frame_hash(grey(image[:, ::-1])))


def test_pictures_without_contrast_are_near_nothing():
    black = frame_hash(np.zeros((64, 64), np.uint8))
    assert black == PLAIN
    assert not near(black, black)
    assert near(0b11111, 0b00001) and not near(0b111111, 0b000001)


def test_repeated_pairs_are_found_and_a_way_back_is_not():
    frames = [Thumbnail(grey(image)) for image in moving(8, step=4)]
    repeated = RepeatedPairs()
    forth = list(pairwise(frames))
    back = [(b, a) for a, b in reversed(forth)]
    assert [repeated.seen(a, b) for a, b in forth] == [False] * 7
    assert [repeated.seen(a, b) for a, b in back] == [False] * 7
    assert [repeated.seen(a, b) for a, b in forth + back] == [True] * 14


def test_near_hashes_of_different_pictures_are_not_repeated():
    """The background makes the hash; the small thing before it moves."""
    background = cv2.GaussianBlur(grey(texture(1, 96, 128)), (0, 0), 6)
    background = cv2.normalize(background, None, 0, 255, cv2.NORM_MINMAX)
    pictures = []
    for x in range(0, 120, 8):
        picture = background.copy()
        picture[44:52, x : x + 8] = 255 - picture[44:52, x : x + 8]
        pictures.append(picture)
    hashes = [frame_hash(picture) for picture in pictures]
    assert any(near(a, b) for a, b in pairwise(hashes))
    repeated = RepeatedPairs()
    assert not any(repeated.seen(Thumbnail(a), Thumbnail(b)) for a, b in pairwise(pictures))


def test_old_pairs_are_forgotten():
    repeated = RepeatedPairs(remembered=2)
    images = [Thumbnail(grey(texture(seed))) for seed in range(4)]
    for i in range(3):
        assert not repeated.seen(images[i], images[i + 1])
    assert not repeated.seen(images[0], images[1])
    assert repeated.seen(images[0], images[1])


def distort(hashes, bits, seed=0):
    random = np.random.default_rng(seed)
    flips = [sum(1 << int(b) for b in random.choice(64, bits, replace=False)) for _ in hashes]
    return [value ^ flip for value, flip in zip(hashes, flips, strict=True)]


def some(count, seed):
    return [int(h) for h in np.random.default_rng(seed).integers(1, 2**63, count, dtype=np.uint64)]


def test_copies_and_extracts_are_marked():
    a, b, c = some(100, 1), some(100, 2), some(50, 3)
    hashes = {
        "c/one": c,
        "a/one": a,
        "b/copy of a": distort(a, 2),
        "z/extract of b": b[30:60],
        "b/b": b,
        "a/extract of c": c[10:30],
        "d/part of a": a[:40] + some(60, 4),
        "e/black": [PLAIN] * 50,
        "f/black": [PLAIN] * 50,
        "g/empty": [],
    }
    found = find_duplicate_sources(hashes)
    assert found == {
        "b/copy of a": "a/one",
        "z/extract of b": "b/b",
        "a/extract of c": "c/one",
    }
    assert find_duplicate_sources(dict(reversed(hashes.items()))) == found
    assert find_duplicate_sources({}) == {}
    assert find_duplicate_sources({"a": [PLAIN], "b": []}) == {}


def test_scenes_before_one_background_are_no_copies():
    background = some(1, 1)
    # Each hash is the background's but for a few bits, as of a fixed camera.
    fixed = {name: distort(background * 40, 2, seed=i) for i, name in enumerate("ab")}
    assert find_duplicate_sources(fixed) == {}
    shared = some(60, 2)
    half = {name: shared + some(40, i) for i, name in enumerate("ab", 3)}
    assert find_duplicate_sources(half) == {}
    most = {"a": shared + some(40, 3), "b": shared + some(4, 4)}
    assert find_duplicate_sources(most) == {"b": "a"}


def test_a_few_pictures_make_no_copy():
    film = some(50, 1)
    assert find_duplicate_sources({"film": film, "four": film[:4]}) == {}
    assert find_duplicate_sources({"film": film, "five": film[:5]}) == {"five": "film"}


def test_a_copy_is_one_of_the_video_that_is_named():
    first = some(40, 1)
    second = [value ^ 0b111 for value in first]
    third = [value ^ 0b111 << 16 for value in second]  # near the second, 6 bits from the first
    found = find_duplicate_sources({"a": second, "b": third, "film": first + some(60, 2)})
    assert found == {"a": "film"}


def test_many_copies_have_one_original():
    first = some(40, 1)
    hashes = {f"{i:03d}": distort(first, i % 3, seed=i) for i in range(200)}
    assert find_duplicate_sources(hashes) == {name: "000" for name in hashes if name != "000"}


def test_long_videos_are_sampled_by_value():
    film = some(5000, 1)
    found = find_duplicate_sources({"film": film, "trimmed": distort(film[777:4000], 1)})
    assert found == {"trimmed": "film"}


def test_a_large_collection_takes_seconds():
    random = np.random.default_rng(0)
    table = random.integers(1, 2**63, (10_000, 30), dtype=np.uint64)
    hashes = {f"{i:06d}": [int(value) for value in row] for i, row in enumerate(table)}
    copied = list(range(0, 5_000, 50))
    hashes |= {f"x{i:06d}": distort(hashes[f"{i:06d}"], 1, seed=i) for i in copied}
    start = time.perf_counter()
    found = find_duplicate_sources(hashes)
    assert found == {f"x{i:06d}": f"{i:06d}" for i in copied}
    assert time.perf_counter() - start < 20  # 0.6 s on an idle machine


def test_a_video_encoded_again_is_found(tmp_path):
    pytest.importorskip("av")
    frames = {name: moving(30, seed, 4, 128, 192) for name, seed in (("a", 1), ("b", 2))}
    write_video(tmp_path / "a.mp4", frames["a"])
    write_video(tmp_path / "b.mp4", frames["b"])
    small = [cv2.resize(image, (160, 106), interpolation=cv2.INTER_AREA) for image in frames["a"]]
    write_video(tmp_path / "again.avi", small, codec="mpeg4", qmax="4")
    hashes = {
        file.name: [frame_hash(grey(frame.image)) for frame in read_frames(file)]
        for file in tmp_path.iterdir()
    }
    assert find_duplicate_sources(hashes) == {"again.avi": "a.mp4"}
