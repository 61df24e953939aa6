import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import nn

from ssl_flow.data.segmentation import Labelled, SegmentationSet, open_segmentation
from ssl_flow.evaluation import LinearProbe, run_linear_probe
from ssl_flow.evaluation.feature_cache import (
    cache_features,
    cached_levels,
    data_digest,
    encoder_digest,
    read_features,
)
from ssl_flow.evaluation.pixel_features import sample_levels
from ssl_flow.models import load_encoder


class Counting(nn.Module):
    """Two levels; counts the images that it has seen."""

    head, channels, strides = None, [4, 5], [2, 8]

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 5, 4, 4)
        self.norm, self.seen, self.scale, self.embed = nn.BatchNorm2d(5), 0, 1.0, None

    def normalize(self, images):
        return images.permute(0, 3, 1, 2).float() / 255

    def features(self, images):
        assert not self.training
        self.seen += len(images)
        pad = (0, -images.shape[3] % 8, 0, -images.shape[2] % 8)
        first = self.a(F.pad(images, pad)) * self.scale
        return [first, self.norm(self.b(first))]


def _images(count=5, sizes=((24, 32), (16, 40)), seed=0):
    rng = np.random.default_rng(seed)
    shapes = [sizes[i >= count - 2] for i in range(count)]
    images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    return [Labelled(x, x[..., 0] // 86, f"image{i}") for i, x in enumerate(images)]


def _cache(encoder, images, folder, **options):
    return cache_features(encoder, images, folder, **options)


def test_cached_features_are_the_encoders_in_float16(tmp_path):
    encoder, images = Counting().train(), _images()
    encoder.norm.eval()  # a part that is frozen stays so
    cache = _cache(encoder, images, tmp_path, batch_images=2)
    assert len(cache) == 5
    assert encoder.training and not encoder.norm.training and encoder.seen == 5
    encoder.eval()
    for i, item in enumerate(images):
        with torch.no_grad():
            expected = encoder.features(encoder.normalize(torch.from_numpy(item.image)[None]))
        for found, level in zip(read_features(cache[i]), expected, strict=True):
            torch.testing.assert_close(found.float(), level[0], rtol=2**-10, atol=1e-6)
    with safe_open(cache[0], "pt") as file:  # for other readers
        assert file.get_slice("0").get_shape() == [12, 16, 4]


def test_pixels_out_of_the_cache_are_rows_of_mapped_memory(tmp_path):
    """A pixel's channels lie together, and nothing is copied to view them."""
    levels = read_features(_cache(Counting(), _images(), tmp_path)[0])
    level = levels[0]
    assert level.stride() == (1, 16 * 4, 4)
    assert level.permute(1, 2, 0).reshape(-1, 4).data_ptr() == level.data_ptr()
    rows, columns = torch.tensor([0, 5, 23]), torch.tensor([31, 6, 0])
    found = sample_levels(levels, [2, 8], rows, columns)
    dense = [level.float().contiguous() for level in levels]
    assert torch.equal(found, sample_levels(dense, [2, 8], rows, columns))


def test_a_second_call_computes_nothing_and_a_change_does(tmp_path):
    encoder, images = Counting(), _images()
    folders = {_cache(encoder, images, tmp_path)[0].parent}

    def computed():
        encoder.seen = 0
        folders.add(_cache(encoder, images, tmp_path)[0].parent)
        return encoder.seen

    assert computed() == 0
    with torch.no_grad():
        encoder.b.weight[0, 0, 0, 0] += 1e-6
    assert computed() == 5
    encoder.norm.running_var[1] += 1e-6
    assert computed() == 5
    encoder.normalize = lambda images: images.permute(0, 3, 1, 2).float() / 254
    assert computed() == 5
    encoder.a.dilation = (2, 2)  # nothing but the structure
    encoder.a.padding = (1, 1)
    assert computed() == 5
    images[4].image[3, 3, 0] ^= 1
    assert computed() == 5
    images[4] = images[4]._replace(name="renamed")
    assert computed() == 5
    encoder.seen = 0
    stage = _cache(encoder, images, tmp_path, features="stage2")
    assert encoder.seen == 5 and [len(level) for level in read_features(stage[0])] == [5]
    assert len(folders | {stage[0].parent}) == 8 and computed() == 0


def test_files_count_by_size_and_time_and_a_few_by_their_pixels(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for i in range(10):
            shape = (8, 8, 3) if kind == "images" else (8, 8)
            pixels = np.random.default_rng(i).integers(0, 2, shape, np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    first = open_segmentation(f"folder:{tmp_path}", "train")
    assert [file.stem for file in first.files] == first.names
    before = data_digest(first)
    assert before == data_digest(open_segmentation(f"folder:{tmp_path}", "train"))
    shutil.copytree(tmp_path, tmp_path / "moved")  # copies times, too
    assert before == data_digest(open_segmentation(f"folder:{tmp_path / 'moved'}", "train"))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "masks/3.png")
    assert before == data_digest(open_segmentation(f"folder:{tmp_path}", "train"))
    load = first.load
    first.load = lambda i: tuple(x[:4] for x in load(i))  # the same files at another size
    assert before != data_digest(first)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images/3.png")
    assert before != data_digest(open_segmentation(f"folder:{tmp_path}", "train"))
    synthetic = [open_segmentation("synthetic", split) for split in ("train", "train", "test")]
    for dataset in synthetic:
        dataset.names = dataset.names[:2]
    digests = [data_digest(dataset) for dataset in synthetic]
    assert digests[0] == digests[1] != digests[2]


def test_encoders_without_weights_are_told_apart_by_their_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = [encoder_digest(load_encoder("handmade"))]
    for number in (4, 8):
        text = f"import torch\ndef load():\n    return lambda x: x[..., ::{number}, ::{number}]\n"
        (tmp_path / f"cache_network_{number}.py").write_text(text)
        digests.append(encoder_digest(load_encoder(f"python:cache_network_{number}:load")))
    assert len(set(digests)) == 3
    assert digests[1] == encoder_digest(load_encoder("python:cache_network_4:load"))
    seeds = [encoder_digest(load_encoder("random:resnet18", seed)) for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


WORKER = """
import sys, time
sys.path.insert(0, {tests!r})
from test_feature_cache import Counting, _cache, _images

class Slow(list):
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)

print("begun", flush=True)
_cache(Counting(), Slow(_images(60)), {folder!r}, batch_images=2)
"""


def test_a_killed_extraction_loses_at_most_a_batch(tmp_path):
    """kill -9, then the missing images alone are computed."""
    code = WORKER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code])
    while process.poll() is None and len(list(tmp_path.glob("*/*.safetensors"))) < 7:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(tmp_path.glob("*/*.safetensors")))
    assert 7 <= done < 60
    encoder, images = Counting(), _images(60)
    cache = _cache(encoder, images, tmp_path)
    assert encoder.seen == 60 - done
    fresh = _cache(Counting(), images, tmp_path / "fresh")
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(cache, fresh, strict=True))
    assert len(list(cache[0].parent.glob(".*"))) <= 1  # what was being written, which nothing reads


def test_bad_features_name_the_image(tmp_path):
    encoder, images = Counting(), _images()
    images[3].image[:] = 255
    encoder.normalize = lambda x: (x / (255 - x.float().mean((1, 2, 3), True))).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="features of image3 are not finite"):
        _cache(encoder, images, tmp_path)
    encoder = Counting()
    encoder.scale = 1e7
    with pytest.raises(ValueError, match=r"features of image0 exceed float16's range \(65504\)"):
        _cache(encoder, images, tmp_path)
    with pytest.raises(ValueError, match="no features 'stage3'; it has hypercolumn"):
        _cache(encoder, images, tmp_path, features="stage3")
    encoder = Counting()
    encoder.strides = [4, 8]
    with pytest.raises(ValueError, match=r"image0: the encoder's map has \(12, 16\) cells"):
        _cache(encoder, images, tmp_path)


def _set(images):
    names = [item.name for item in images]
    return SegmentationSet("fake", ["a", "b", "c"], names, lambda i: images[i][:2])


def test_a_cached_probe_is_the_computed_one(tmp_path):
    encoder, train, test = load_encoder("handmade"), _set(_images(8)), _set(_images(4, seed=1))
    protocol = LinearProbe(pixels_per_image=200, steps=50, batch_pixels=512)
    computed, cached = (
        run_linear_probe(encoder, train, test, protocol, **options)
        for options in ({}, {"cache": tmp_path})
    )
    assert cached.scores["miou"] == pytest.approx(computed.scores["miou"], abs=3e-3)
    assert cached.details["train_accuracy"] == pytest.approx(
        computed.details["train_accuracy"], abs=3e-3
    )


class Pooled(Counting):
    """Features that float16 holds exactly."""

    channels, strides = [3, 3], [1, 4]

    def features(self, images):
        self.seen += len(images)
        return [F.max_pool2d(images, s, ceil_mode=True) for s in self.strides]

    def normalize(self, images):
        return images.permute(0, 3, 1, 2).float() // 64


def test_features_that_float16_holds_give_the_very_same_result(tmp_path):
    encoder, train, test = Pooled(), _set(_images(8)), _set(_images(4, seed=1))
    protocol = LinearProbe(pixels_per_image=200, steps=50, batch_pixels=512)
    run = lambda **o: run_linear_probe(encoder, train, test, protocol, **o)  # noqa: E731
    computed, *cached = run(), run(cache=tmp_path), run(cache=tmp_path)
    assert encoder.seen == 2 * 12  # none in the third run
    for result in cached:
        assert result.as_dict() | {"seconds": 0} == computed.as_dict() | {"seconds": 0}
        for found, expected in zip(result.examples, computed.examples, strict=True):
            assert np.array_equal(found[2], expected[2])
    for folder in (None, tmp_path):
        found = cached_levels(encoder, train, "hypercolumn", 4, folder, "train")
        assert [item.name for item, _, _ in found] == train.names


def test_a_file_cut_short_is_named_with_the_mend(tmp_path):
    path = _cache(Counting(), _images(), tmp_path)[2]
    content = path.read_bytes()
    for part in (content[:-1], b""):
        path.unlink()  # not in place: it is mapped
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"0000002.safetensors cannot be read .*delete it"):
            read_features(path)


def test_the_disk_must_have_room(tmp_path, monkeypatch):
    images = _images(sizes=((24, 32), (24, 32)))
    size = _cache(Counting(), images, tmp_path)[0].stat().st_size
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(5 * size - 1))
    with pytest.raises(ValueError, match=r"5 more images need about .* GiB.*has .* GiB left"):
        _cache(Counting(), images, tmp_path / "full")
    assert not list((tmp_path / "full").glob("*/*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(5 * size))
    assert len(_cache(Counting(), images, tmp_path / "full")) == 5
