"""Calls that write to one store at the same time, and what each of them must see of the others."""

import errno
import json
import os
import sys
import threading
from dataclasses import replace
from functools import partial

import pytest
from clips import moving, shard_bytes, write_video
from test_store import contents, make_store, members, write_shard

from ssl_flow.flow import FlowStore, StoreError, extract, find_sources, shard
from ssl_flow.flow.command import flow_command
from ssl_flow.flow.job import Settings, extract_source
from ssl_flow.flow.merge import merge_stores
from ssl_flow.flow.shard import (
    ShardWriter,
    finished,
    shard_path,
    store_lock,
)
from ssl_flow.flow.store import read_problems, update_problems, verify

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no locks there")


def test_parts_leave_the_lists_to_the_last_call(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abcd":
        write_video(folder / f"{name}.mp4", moving(12, seed=1), crf=str(10 + ord(name) % 4))
    flags = [str(folder), "--workers", "1"]
    for part in ("1/2", "2/2"):
        assert flow_command([*flags, "--out", str(tmp_path / "s"), "--shard", part]) == 0
        assert "without --shard" in capsys.readouterr().out
    names = [file.name for file in (tmp_path / "s").iterdir()]
    assert sorted(names) == [".lock", ".turn.tmp", "shards", "store.json"]
    assert verify(tmp_path / "s") == {}
    assert len(FlowStore(tmp_path / "s").sources) == 4
    with pytest.raises(StoreError, match=r"do not look for .*: run `ssl-flow merge"):
        FlowStore(tmp_path / "s", duplicates=False)
    merge_stores([tmp_path / "s"], tmp_path / "s")
    assert FlowStore(tmp_path / "s", duplicates=False).sources == ["in/a.mp4"]
    merged = shard_bytes(tmp_path / "s")
    (tmp_path / "s/manifest.jsonl").write_bytes(b"{}\n")  # as it was before the last part
    with pytest.raises(StoreError, match=r"among 1 sources of the 4 .* run `ssl-flow merge"):
        FlowStore(tmp_path / "s", duplicates=False)
    (tmp_path / "s/manifest.jsonl").unlink()
    assert flow_command([*flags, "--out", str(tmp_path / "s")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert shard_bytes(tmp_path / "s") == merged
    extract(find_sources([folder])[0], tmp_path / "whole")
    assert shard_bytes(tmp_path / "whole") == merged


def test_what_another_call_has_just_finished_is_not_begun_again(tmp_path):
    sources, _ = find_sources([write_video(tmp_path / "a.mp4", moving(4))])
    settings = Settings("dis", {}, 48, 0.1, 0.1, False)
    job = partial(extract_source, tick=lambda *_, **__: None, store=tmp_path, settings=settings)
    done = job(sources[0])
    before = shard_bytes(tmp_path)

    def killed(short_side):
        raise SystemExit

    assert job(replace(sources[0], frames=killed)) == done
    assert shard_bytes(tmp_path) == before
    # Its folder would be the shard of another: no name for the store, but no reason to stop.
    assert finished(tmp_path, f"{sources[0].name}.tar/b.mp4") is None
    shard_path(tmp_path, sources[0].name).write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        job(replace(sources[0], frames=killed))
    assert FlowStore(make_store(tmp_path, [])).sources == []


def test_a_part_without_any_pair_is_no_failure(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/empty.mp4").write_bytes(b"")
    command = [str(tmp_path / "in"), "--out", str(tmp_path / "s"), "--workers", "1"]
    assert [flow_command([*command, "--shard", f"{i}/2"]) for i in (1, 2)] == [0, 0]
    assert flow_command(command) == 1


def test_parts_keep_the_problems_of_each_other(tmp_path):
    for source in "abc":
        update_problems(tmp_path, {source: f"{source} is broken"})
    update_problems(tmp_path, {"b": None})
    assert read_problems(tmp_path) == {"a": "a is broken", "c": "c is broken"}
    update_problems(tmp_path, {"a": None, "c": None})
    assert not (tmp_path / "problems.jsonl").exists()


def before_it_writes(monkeypatch, module, other):
    """Begin `other` when `module` is about to write, and let it end if it does not wait."""
    real = module.write_atomically

    def begin_other(*arguments):
        monkeypatch.setattr(module, "write_atomically", real)
        thread.start()
        thread.join(0.5)
        real(*arguments)

    thread = threading.Thread(target=other)
    monkeypatch.setattr(module, "write_atomically", begin_other)
    return thread


def test_parts_that_save_their_problems_at_once_lose_none(tmp_path, monkeypatch):
    thread = before_it_writes(monkeypatch, shard, lambda: update_problems(tmp_path, {"b": "cut"}))
    update_problems(tmp_path, {"a": "broken"})
    thread.join()
    assert read_problems(tmp_path) == {"a": "broken", "b": "cut"}


def test_of_two_parts_that_begin_one_store_at_once_the_first_decides(tmp_path, monkeypatch):
    refused = []

    def other():
        with pytest.raises(StoreError, match="made with size = 48"):
            extract([], tmp_path / "s", size=64, part=(2, 2))
        refused.append(True)

    thread = before_it_writes(monkeypatch, sys.modules["ssl_flow.flow.extract"], other)
    extract([], tmp_path / "s", size=48, part=(1, 2))
    thread.join()
    assert refused


def test_the_lock_is_one_that_network_file_systems_know(tmp_path, monkeypatch):
    """NFS refuses a shared lock on a file that is not open for reading: see flock(2)."""
    real = shard.fcntl.flock

    def flock(file, kind):
        if kind & shard.fcntl.LOCK_SH and not file.readable():
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(file, kind)

    monkeypatch.setattr(shard.fcntl, "flock", flock)
    refused = pytest.raises(StoreError, match="another call")
    with store_lock(tmp_path, shared=True), refused, store_lock(tmp_path):
        pass


def test_two_writers_of_one_shard_leave_a_whole_one(tmp_path):
    store = make_store(tmp_path / "s", [])
    with ShardWriter(store, "a") as orphan:
        orphan.add("a/000000", members("a", 0))
        write_shard(store, "a")
    write_shard(store, "b")
    assert verify(store) == {}
    assert FlowStore(store).sources == ["a", "b"]
    assert len(contents(store)) == 5  # no temporary file


@pytest.mark.parametrize("shared", [True, False])
def test_stores_that_are_being_written_are_not_merged(tmp_path, shared):
    parts = [make_store(tmp_path / name, [name]) for name in "ab"]
    with store_lock(parts[1], shared), pytest.raises(StoreError, match="b is being written by"):
        merge_stores(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_stores([parts[0], *parts, tmp_path / "b/../a"], tmp_path / "out")
    assert FlowStore(tmp_path / "out").sources == ["a", "b"]


def test_a_store_that_may_only_be_read_is_merged(tmp_path, monkeypatch):
    part = make_store(tmp_path / "a", ["a"])
    (part / ".lock").mkdir()  # cannot be opened, by no user
    before = contents(part)
    assert merge_stores([part], tmp_path / "out")["linked"] == 1
    assert contents(part) == before
    manifest = (tmp_path / "out/manifest.jsonl").read_text()
    assert json.loads(manifest)["source"] == "a"
