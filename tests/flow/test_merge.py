import json
import os

import numpy as np
import pytest
from test_store import LONG, SETTINGS, contents, flip, make_store

from ssl_flow.cli import main
from ssl_flow.flow import FlowStore, StoreError
from ssl_flow.flow import merge as merge_module
from ssl_flow.flow.merge import merge_stores
from ssl_flow.flow.shard import index_path, shard_path, store_lock
from ssl_flow.flow.store import verify, write_lists

NAMES = ["a.mp4", "clips/b.mp4", "clips/c.mp4", LONG]


@pytest.fixture
def whole(tmp_path):
    store = make_store(tmp_path / "whole", NAMES)
    write_lists(store)
    return store


@pytest.fixture
def parts(tmp_path):
    return [make_store(tmp_path / f"part{i}", NAMES[i::2]) for i in range(2)]


@pytest.fixture
def no_links(monkeypatch):
    def refuse(*arguments):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)


def test_the_result_has_the_bytes_of_one_store_made_at_once(tmp_path, whole, parts):
    before = [contents(part) for part in parts]
    merged = merge_stores(parts, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)
    assert [contents(part) for part in parts] == before
    assert (merged["sources"], merged["pairs"]) == (4, 12)
    assert (merged["linked"], merged["copied"]) == (4, 0)
    shard = shard_path(tmp_path / "out", "a.mp4")
    assert shard.stat().st_nlink == 2
    assert len(FlowStore(tmp_path / "out")) == 12


def test_the_order_of_the_stores_does_not_matter(tmp_path, whole, parts):
    merge_stores(parts[::-1], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_a_second_call_does_nothing(tmp_path, parts):
    out = tmp_path / "out"
    merge_stores(parts, out)
    times = {file: file.stat().st_mtime_ns for file in out.rglob("*.index.json")}
    merged = merge_stores(parts, out)
    assert (merged["linked"], merged["copied"], merged["already_there"]) == (0, 0, 4)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.index.json")} == times


def test_an_interrupted_call_is_continued(tmp_path, whole, parts, monkeypatch):
    out, real, calls = tmp_path / "out", merge_module._link, []

    def link(shard, place):
        calls.append(shard)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(shard, place)

    monkeypatch.setattr(merge_module, "_link", link)
    with pytest.raises(KeyboardInterrupt):
        merge_stores(parts, out)
    monkeypatch.undo()
    index_path(out, "a.mp4").unlink()  # as if killed between tar and index
    os.link(shard_path(parts[0], "a.mp4"), out / "shards/.a.mp4.tar.link")
    assert len(FlowStore(out)) == 3
    merged = merge_stores(parts, out)
    assert (merged["linked"], merged["already_there"]) == (3, 1)
    assert contents(out) == contents(whole)
    assert verify(parts[0]) == {}


def test_a_store_that_is_there_is_added_to(tmp_path, whole, parts):
    merged = merge_stores(parts, parts[0])
    assert (merged["linked"], merged["already_there"]) == (2, 2)
    assert contents(parts[0]) == contents(whole)
    merge_stores(parts[1:], parts[0])
    assert contents(parts[0]) == contents(whole)


def test_writing_into_the_result_does_not_reach_the_parts(tmp_path, parts):
    merge_stores(parts, tmp_path / "out")
    before = contents(parts[0])
    make_store(tmp_path / "out", ["a.mp4"], SETTINGS)
    assert contents(parts[0]) == before
    assert shard_path(parts[0], "a.mp4").stat().st_nlink == 1


def test_a_file_system_without_links_is_copied_to(tmp_path, whole, parts, no_links):
    assert merge_stores(parts, tmp_path / "out")["copied"] == 4
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    ("key", "value"), [("method", "tvl1"), ("codec", "png"), ("version", 1), ("size", 128)]
)
def test_other_settings_are_refused_with_their_name(tmp_path, parts, key, value):
    (parts[1] / "store.json").write_text(json.dumps({**SETTINGS, key: value}))
    with pytest.raises(StoreError, match=rf"part0 was made with {key} = .*/part1 with {value!r}"):
        merge_stores(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_with_two_contents_is_refused(tmp_path, parts):
    merge_stores([*parts, make_store(tmp_path / "same", ["a.mp4"])], tmp_path / "fine")
    other = make_store(tmp_path / "other", ["b.mp4"])  # other bytes, under the name of a.mp4
    shard_path(other, "b.mp4").rename(shard_path(other, "a.mp4"))
    index = json.loads(index_path(other, "b.mp4").read_text())
    index_path(other, "b.mp4").unlink()
    index_path(other, "a.mp4").write_text(json.dumps({**index, "source": "a.mp4"}))
    for out in ("out", "fine"):
        with pytest.raises(StoreError, match=r"'a\.mp4' has different contents in .*part0.*other"):
            merge_stores([parts[0], other], tmp_path / out)
    assert not (tmp_path / "out").exists()


def test_version_1_stores_are_compared_by_their_bytes(tmp_path):
    settings = {**SETTINGS, "version": 1, "codec": "png"}
    parts = [make_store(tmp_path / name, ["a.mp4"], settings) for name in ("x", "y")]
    for part in parts:
        file = index_path(part, "a.mp4")
        index = json.loads(file.read_text())
        index["version"] = 1
        del index["sha256"]
        index["samples"] = [row[:-1] for row in index["samples"]]
        file.write_text(json.dumps(index))
    assert merge_stores(parts, tmp_path / "out")["sources"] == 1
    assert len(FlowStore(tmp_path / "out")) == 3
    flip(shard_path(parts[1], "a.mp4"), 2000)
    with pytest.raises(StoreError, match="different contents"):
        merge_stores(parts, tmp_path / "out2")


def test_damage_is_refused(tmp_path, parts, no_links):
    shard = shard_path(parts[0], "a.mp4")
    flip(shard, 2000)
    with pytest.raises(StoreError, match=r"part0/shards/a\.mp4\.tar is damaged .*sha256"):
        merge_stores(parts, tmp_path / "copied")
    assert not index_path(tmp_path / "copied", "a.mp4").exists()
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"part0/shards/a\.mp4\.tar has"):
        merge_stores(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_problems_are_joined_but_for_what_another_store_could_do(tmp_path, parts):
    def note(store, **reasons):
        rows = [{"source": source, "reason": reason} for source, reason in reasons.items()]
        (store / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    rows = [{"clips/b.mp4": "died", "x": "broken", "a.mp4": "cut"}, {"x": "broken", "/y": "odd"}]
    for part, reasons in zip(parts, rows, strict=True):
        note(part, **reasons)
    file = index_path(parts[0], "a.mp4")
    file.write_text(json.dumps({**json.loads(file.read_text()), "problem": "cut"}))
    for _ in range(2):
        merge_stores(parts, tmp_path / "out")
        lines = (tmp_path / "out/problems.jsonl").read_text().splitlines()
        problems = {row["source"]: row["reason"] for row in map(json.loads, lines)}
        assert problems == {"a.mp4": "cut", "x": "broken", "/y": "odd"}
        assert list(problems) == sorted(problems)
    merge_stores(parts, parts[0])
    assert (parts[0] / "problems.jsonl").read_text().splitlines() == lines


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_a_store_that_is_being_written_is_left_alone(tmp_path, parts):
    out = make_store(tmp_path / "out", [])
    with store_lock(out, shared=True), pytest.raises(StoreError, match="being written"):
        merge_stores(parts, out)
    assert list(contents(out)) == ["store.json"]


def test_the_command(tmp_path, whole, parts, capsys):
    out = tmp_path / "out"
    command = ["merge-flow", *map(str, parts), "--out", str(out)]
    assert main(command) == 0
    assert "4 sources, 12 pairs; shards: 4 linked" in capsys.readouterr().out
    assert main(["merge-flow", str(tmp_path / "absent"), "--out", str(out)]) == 2
    assert "not a flow store" in capsys.readouterr().err
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/text").write_text("not to be mixed with")
    assert main([*command[:-1], str(tmp_path / "thesis")]) == 2
    assert "is no flow store" in capsys.readouterr().err
    np.testing.assert_array_equal(FlowStore(out)[5].flow, FlowStore(whole)[5].flow)
