import hashlib
import io
import json
import os
import pickle
import stat
import tarfile

import cv2
import numpy as np
import pytest

from ssl_flow.flow import FlowStore, StoreError, encode_flow
from ssl_flow.flow.codec import png
from ssl_flow.flow.shard import (
    ShardWriter,
    index_path,
    member_names,
    safe_name,
    shard_path,
    write_atomically,
)
from ssl_flow.flow.store import verify, write_lists

LONG = "clips/" + "ü" * 180 + ".mp4"
SETTINGS = {"version": 2, "method": "dis", "size": 24, "gap": 0.1, "codec": "q16"}
SETTINGS["consistency"] = True


def made_pair(name, number):
    """Frame, flow on the grid of 1/16 px, valid."""
    rng = np.random.default_rng((len(name), number))
    flow = np.round(rng.uniform(-1, 1, (24, 32, 2)) * 16) / 16
    valid = np.ones((24, 32), bool)
    valid[number % 24] = False
    return rng.integers(0, 256, (24, 32, 3), np.uint8), flow.astype(np.float32), valid


def members(name, number, codec="q16", consistency=True):
    frame, flow, valid = made_pair(name, number)
    key = f"{safe_name(name)}/{number:06d}"
    meta = {"key": key, "video": name, "time": number / 10, "gap": 0.1}
    contents = [
        cv2.imencode(".jpg", frame)[1].tobytes(),
        encode_flow(flow, codec),
        *([png(valid.astype(np.uint8) * 255, [])] if consistency else []),
        json.dumps(meta).encode(),
    ]
    return dict(zip(member_names(codec, consistency), contents, strict=True))


def write_shard(store, name, pairs=3, **options):
    with ShardWriter(store, name) as writer:
        for number in range(pairs):
            writer.add(f"{safe_name(name)}/{number:06d}", members(name, number, **options))
        return writer.commit({"frames": pairs + 1})


def make_store(path, names=("clips/a.mp4", "b"), settings=SETTINGS):
    path.mkdir(parents=True, exist_ok=True)
    (path / "store.json").write_text(json.dumps(settings))
    options = {key: settings[key] for key in ("codec", "consistency")}
    for name in names:
        write_shard(path, name, **options)
    return path


def contents(store):
    files = (file for file in sorted(store.rglob("*")) if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(store)): file.read_bytes() for file in files}


def flip(file, position, bit=0):
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


@pytest.mark.parametrize("codec", ["q16", "png"])
@pytest.mark.parametrize("consistency", [True, False])
def test_what_was_written_is_read(tmp_path, codec, consistency):
    settings = {**SETTINGS, "codec": codec, "consistency": consistency}
    store = FlowStore(make_store(tmp_path / "s", settings=settings))
    assert store.sources == ["b", "clips/a.mp4"]
    assert len(store) == 6
    for i, (name, number) in enumerate((n, k) for n in store.sources for k in range(3)):
        sample = store[i]
        _, flow, valid = made_pair(name, number)
        np.testing.assert_array_equal(sample.flow, flow)
        assert sample.meta["video"] == name
        assert sample.valid[number].any() != consistency
        assert not (sample.valid & ~valid).any() or not consistency
    with tarfile.open(shard_path(tmp_path / "s", "b")) as tar:
        names = [f"b/000000.{m}" for m in member_names(codec, consistency)]
        assert tar.getnames()[: len(names)] == names
    assert verify(tmp_path / "s") == {}


def test_a_version_1_store_is_read(tmp_path):
    """Written here as version 1 did: a grey PNG named flow.png, an index without checksums."""
    store = tmp_path / "old"
    (store / "shards/clips").mkdir(parents=True)
    settings = {"version": 1, "method": "dis", "options": {}, "size": 24, "gap": 0.1, "every": 0.1}
    (store / "store.json").write_text(json.dumps({**settings, "consistency": False}))
    tar, rows = io.BytesIO(), []
    for number in range(2):
        frame, flow, _ = made_pair("a", number)
        grey = (flow * 16 + 32768).transpose(2, 0, 1).reshape(48, 32).astype(np.uint16)
        row = [f"clips/a.mp4/{number:06d}"]
        for extension, data in {
            "jpg": cv2.imencode(".jpg", frame)[1].tobytes(),
            "flow.png": cv2.imencode(".png", grey)[1].tobytes(),
            "json": b"{}",
        }.items():
            info = tarfile.TarInfo(f"{row[0]}.{extension}")
            info.size = len(data)
            tar.write(info.tobuf(tarfile.GNU_FORMAT))
            row += [tar.tell(), len(data)]
            tar.write(data + bytes(-len(data) % 512))
        rows.append(row)
    tar.write(bytes(1024))
    (store / "shards/clips/a.mp4.tar").write_bytes(tar.getvalue())
    index = {"version": 1, "source": "clips/a.mp4", "tar_bytes": tar.tell(), "pairs": 2}
    index_file = store / "shards/clips/a.mp4.index.json"
    index_file.write_text(json.dumps({**index, "samples": rows}))

    flows = FlowStore(store)
    for number in range(2):
        np.testing.assert_array_equal(flows[number].flow, made_pair("a", number)[1])
    assert verify(store) == {}
    write_lists(store)
    assert json.loads((store / "manifest.jsonl").read_text())["sha256"] is None
    flip(store / "shards/clips/a.mp4.tar", rows[1][3] + rows[1][4] // 2)  # in the second flow
    assert "000001" in verify(store)["shards/clips/a.mp4.tar"]
    assert verify(store, deep=False) == {}
    flows[0]
    with pytest.raises(StoreError, match=r"a\.mp4\.tar is damaged \(clips/a\.mp4/000001: "):
        flows[1]


def test_a_flipped_byte_anywhere_in_a_pair_is_told_with_shard_and_pair(tmp_path):
    store = make_store(tmp_path / "s", names=["clips/a.mp4"])
    shard = shard_path(store, "clips/a.mp4")
    flows, whole = FlowStore(store), shard.read_bytes()
    rows = json.loads(index_path(store, "clips/a.mp4").read_text())["samples"]
    start, end = rows[1][1], rows[1][-3] + rows[1][-2]
    for position in np.linspace(start, end - 1, 60).astype(int):
        flip(shard, position, bit=position % 8)
        with pytest.raises(StoreError, match=r"a\.mp4\.tar .*clips/a\.mp4/000001: .*delete this"):
            flows[1]
        flows[0], flows[2]  # the others are still good
        assert list(verify(store)) == ["shards/clips/a.mp4.tar"]
        shard.write_bytes(whole)
    flip(shard, len(whole) - 1)  # beyond the pairs: only the checksum of the whole file shows it
    assert "sha256" in verify(store)["shards/clips/a.mp4.tar"]
    assert verify(store, deep=False) == {}


@pytest.mark.parametrize("keep", [0, 100, 3000, -1])
def test_a_truncated_shard_is_told_and_gives_no_half_pair(tmp_path, keep):
    store = make_store(tmp_path / "s", names=["clips/a.mp4"])
    shard, flows = shard_path(store, "clips/a.mp4"), FlowStore(store)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(StoreError, match=r"a\.mp4\.tar has \d+ bytes instead of \d+: delete"):
        FlowStore(store)
    assert list(verify(store, deep=False)) == ["shards/clips/a.mp4.tar"]
    if keep >= 0:
        with pytest.raises(StoreError, match=r"clips/a\.mp4/000002: the file is too short"):
            flows[2]
    shard.unlink()
    with pytest.raises(StoreError, match=r"clips/a\.mp4/000002: .*No such file"):
        flows[2]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pairs", 4),
        ("pairs", "three"),
        ("samples", [["b/000000", 512]]),
        ("samples", [["b/000000", -512, 9, 9, 9, 18, 9, 27, 9, 9]]),
        ("samples", [["b/000000", 512, 10**15, 10**16, 9, 10**17, 9, 10**18, 9, 9]]),
        ("samples", [["b/000000", 2**70, 9, 9, 9, 9, 9, 9, 9, 9]]),
        ("source", "c"),
        ("source", "../b"),
        ("tar_bytes", 10),
    ],
)
def test_a_damaged_index_is_told(tmp_path, key, value):
    store = make_store(tmp_path / "s")
    file = index_path(store, "b")
    index = json.loads(file.read_text())
    if key == "samples":
        index["pairs"] = 1
    file.write_text(json.dumps({**index, key: value}))
    with pytest.raises(StoreError, match=r"shards/b\.(index\.json|tar).*: delete this file"):
        FlowStore(store)
    assert len(verify(store)) == 1
    for text in ("", "{", "[]", "{}"):
        file.write_text(text)
        with pytest.raises(StoreError, match=r"b\.index\.json is damaged"):
            FlowStore(store)
        assert list(verify(store)) == ["shards/b.index.json"]


@pytest.mark.parametrize("member", ["jpg", "valid.png"])
def test_members_that_do_not_fit_each_other_are_told(tmp_path, member):
    store = make_store(tmp_path / "s", names=[])
    small = np.zeros((8, 8), np.uint8)
    data = cv2.imencode(f".{member[-3:]}", small)[1].tobytes()
    with ShardWriter(store, "b") as writer:
        writer.add("b/000000", {**members("b", 0), member: data})
        writer.add("b/000001", {**members("b", 1), member: b""})
        writer.commit({})
    for number, problem in enumerate([r"of \(8, 8\), flow of \(24, 32\)", "not a"]):
        with pytest.raises(StoreError, match=rf"b/00000{number}: .*{problem}"):
            FlowStore(store)[number]


def test_an_unfinished_shard_is_found_and_not_read(tmp_path):
    store = make_store(tmp_path / "s")
    index_path(store, "b").unlink()
    assert FlowStore(store).sources == ["clips/a.mp4"]
    assert "unfinished" in verify(store)["shards/b.tar"]


def test_an_unknown_codec_is_told(tmp_path):
    store = make_store(tmp_path / "s")
    (store / "store.json").write_text(json.dumps({**SETTINGS, "codec": "h265"}))
    with pytest.raises(StoreError, match="codec 'h265'"):
        FlowStore(store)


NAMES = [
    "a.mp4",
    LONG,
    "x" * 300 + "/" + "y" * 300 + ".mkv",
    "two\nlines.mp4",
    "caf\udce9.mp4",  # a file name in Latin-1, as Python reads it
    "caf\udcea.mp4",
    "日本語 🎬.mp4",
    "-dash %05d a:b.mp4",
]


def test_any_name_makes_a_file_and_is_read_back(tmp_path):
    store = make_store(tmp_path / "s", names=NAMES)
    files = [file for file in (store / "shards").rglob("*") if file.is_file()]
    assert len(files) == 2 * len(NAMES)
    for file in files:
        assert len(os.fsencode(file.name)) <= 240
        assert file.name.isprintable()
    flows = FlowStore(store)
    assert sorted(flows.sources) == sorted(NAMES)
    for name in NAMES:
        number = flows.sources.index(name)
        assert flows[3 * number].meta["video"] == name
    assert verify(store) == {}
    assert write_lists(store) == {}
    lines = [json.loads(line) for line in (store / "manifest.jsonl").read_text().splitlines()]
    assert sorted(line["source"] for line in lines) == sorted(NAMES)
    with tarfile.open(shard_path(store, NAMES[2])) as tar:  # any tool can unpack it
        assert max(len(part) for name in tar.getnames() for part in name.split("/")) < 255


def test_ordinary_names_are_kept_and_no_two_names_meet():
    for name in ("clips/tom/a.mp4", "日本語 🎬.mp4", "a b/c'd.mkv"):
        assert safe_name(name) == name
    assert len({safe_name(name) for name in NAMES}) == len(NAMES)
    assert safe_name("x" * 300) != safe_name("x" * 301)
    for name in ("", "/etc/passwd", "../a", "a/../../b", "a\0b"):
        with pytest.raises(ValueError, match="relative path"):
            safe_name(name)


def test_bytes_depend_on_the_samples_alone(tmp_path):
    first = make_store(tmp_path / "1")
    second = make_store(tmp_path / "2", names=["b"])
    os.utime(second, (1, 1))
    write_shard(second, "clips/a.mp4")
    write_shard(second, "b")  # again
    assert contents(first) == contents(second)
    index = json.loads(index_path(first, "b").read_text())
    assert index["version"] == 2
    assert index["sha256"] == hashlib.sha256(shard_path(first, "b").read_bytes()).hexdigest()


def test_what_is_not_committed_leaves_nothing(tmp_path):
    store = make_store(tmp_path / "s", names=["b"])
    with pytest.raises(RuntimeError), ShardWriter(store, "c") as writer:
        writer.add("c/000000", members("c", 0))
        raise RuntimeError("something in the middle")
    assert sorted(contents(store)) == ["shards/b.index.json", "shards/b.tar", "store.json"]
    write_shard(store, "c")
    assert verify(store) == {}
    before = contents(store)
    assert len(before) == 5
    with ShardWriter(store, "c") as writer:  # begun again
        writer.add("c/000000", members("c", 0))
    assert contents(store) == before


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, failing):
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (type(file), "replace")), fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, b"new")
    monkeypatch.undo()
    assert contents(tmp_path) == {"file": b"old"}


def test_data_reach_the_disk_before_the_name_and_the_folder_after_it(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s", names=["b"])
    events, fsync, replace = [], os.fsync, type(store).replace

    def seen_fsync(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("folder" if folder else "data")
        fsync(descriptor)

    def seen_replace(path, target):
        events.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(type(store), "replace", seen_replace)
    write_shard(store, "c")
    assert events == ["data", "c.tar", "folder", "data", "c.index.json", "folder"]


def test_the_manifest_is_what_the_indexes_say(tmp_path):
    store = make_store(tmp_path / "s")
    write_lists(store)
    lines = [json.loads(line) for line in (store / "manifest.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["b", "clips/a.mp4"]
    for line in lines:
        data = (store / line["shard"]).read_bytes()
        assert line["bytes"] == len(data)
        assert line["sha256"] == hashlib.sha256(data).hexdigest()
        assert line["pairs"] == 3
    before = contents(store)
    write_lists(store)
    assert contents(store) == before


def test_a_store_can_be_pickled_and_moved(tmp_path):
    flows = FlowStore(make_store(tmp_path / "s", names=NAMES))
    copy = pickle.loads(pickle.dumps(flows))
    np.testing.assert_array_equal(copy[4].flow, flows[4].flow)
    (tmp_path / "s").rename(tmp_path / "moved")
    assert len(FlowStore(tmp_path / "moved")) == len(flows)
    assert verify(tmp_path / "moved") == {}
