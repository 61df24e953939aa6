"""Which pairs are worth learning from: what is left out, the gap, the consistency."""

import json
import tarfile
from functools import partial

import numpy as np
import pytest
from clips import make_store, moving, texture, write_video

from ssl_flow.flow import (
    FlowStore,
    Frame,
    Source,
    StoreError,
    extract,
    find_sources,
    flow_validity,
    optical_flow,
)
from ssl_flow.flow.command import flow_command


def test_pairs_without_motion_are_left_out(tmp_path):
    still = [texture(0)] * 4
    noisy = [
        np.clip(still[0] + np.random.default_rng(i).normal(0, 2, still[0].shape), 0, 255)
        for i in range(3)
    ]
    frames = [
        *still,
        *(image.astype(np.uint8) for image in noisy),
        *[still[0]],
        np.roll(still[0], 3, 1),
    ]
    summary = make_store(frames, tmp_path)
    assert set(summary.skipped) <= {"static", "duplicate"}  # noise on one picture may be either
    assert summary.skipped.total() == 7
    assert summary.pairs == 1


def test_pairs_across_a_cut_are_left_out(tmp_path):
    summary = make_store([*moving(5, seed=1), *moving(5, seed=2)], tmp_path)
    assert summary.skipped == {"cut": 1}
    assert summary.pairs == 8
    times = [FlowStore(tmp_path / "made_store")[i].meta["time"] for i in range(8)]
    assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8])


def test_pairs_that_come_again_are_left_out(tmp_path):
    loop = moving(6)
    summary = make_store([*loop, *loop, *loop], tmp_path)
    assert summary.skipped["duplicate"] >= 10
    assert summary.pairs <= 6


def test_copies_of_a_video_are_named(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, seed in (("a", 1), ("b", 2)):
        write_video(folder / f"{name}.mp4", moving(12, seed=seed))
    write_video(folder / "c.mkv", moving(12, seed=1), crf="25")  # a, encoded again
    command = [str(folder), "--out", str(tmp_path / "store"), "--workers", "1"]
    assert flow_command(command) == 0
    assert "1 videos are copies of others" in capsys.readouterr().out
    found = json.loads((tmp_path / "store/duplicates.json").read_text())
    assert found == {"in/c.mkv": "in/a.mp4"}
    store = tmp_path / "store"
    assert len(FlowStore(store).sources) == 3  # named, not left out unless that is asked for
    assert FlowStore(store, duplicates=False).sources == ["in/a.mp4", "in/b.mp4"]
    assert FlowStore(store, include="in/c.mkv", duplicates=False).sources == ["in/c.mkv"]


def test_an_error_that_may_pass_stores_nothing_and_is_tried_again(tmp_path):
    def sick():
        yield from (Frame(i / 10, image) for i, image in enumerate(moving(4)))
        raise MemoryError("no room")

    source = Source("a", lambda size: sick())
    summary = extract([source], tmp_path / "store", workers=0)
    assert summary.done == 0
    assert "MemoryError: no room: not stored, repeat the call" in summary.problems[0].reason
    source = Source("a", lambda size: (Frame(i / 10, im) for i, im in enumerate(moving(4))))
    assert extract([source], tmp_path / "store", workers=0).done == 1


def test_the_gap_is_chosen_by_the_motion_of_each_video(tmp_path):
    def source(step, short_side):
        images = moving(24, step=step, height=128, width=160)
        return (Frame(i / 20, image) for i, image in enumerate(images))

    sources = [Source("fast", partial(source, 6)), Source("slow", partial(source, 1))]
    extract(sources, tmp_path / "store", gap="auto")
    store = FlowStore(tmp_path / "store")
    gaps = {meta["video"]: meta["gap"] for meta in (store[i].meta for i in range(len(store)))}
    assert gaps["fast"] == pytest.approx(0.05)
    assert gaps["slow"] >= 0.1
    assert store.settings["gap"] == "auto" and store.settings["every"] is None
    index = json.loads((tmp_path / "store/shards/slow.index.json").read_text())
    assert index["gap"] == pytest.approx(gaps["slow"])
    with pytest.raises(StoreError, match="made with gap = 'auto'"):
        extract(sources, tmp_path / "store")


def test_consistency_stores_where_both_flows_agree(tmp_path):
    frames = moving(3)
    make_store(frames, tmp_path, consistency=True)
    flows = FlowStore(tmp_path / "made_store")
    sample = flows[0]
    forward = optical_flow(frames[0], frames[1], method="dis")
    backward = optical_flow(frames[1], frames[0], method="dis")
    expected = flow_validity(forward, backward) & flow_validity(sample.flow)
    np.testing.assert_array_equal(sample.valid, expected)
    assert sample.meta["consistent"] == pytest.approx(expected.mean(), abs=0.01)
    with tarfile.open(tmp_path / "made_store/shards/made.tar") as tar:
        assert "made/000000.valid.png" in tar.getnames()


def test_the_cuts_of_a_real_clip_are_found(data, tmp_path):
    sources, _ = find_sources([data / "video/street_cuts.mp4"])
    summary = extract(sources, tmp_path / "store", size=128, options={"preset": "fast"})
    flows = FlowStore(tmp_path / "store")
    spans = [(m["time"], m["time"] + m["gap"]) for m in (flows[i].meta for i in range(len(flows)))]
    for frame in (30, 76, 137, 187, 242):  # the first frame of a shot
        assert not any(a < frame / 25 - 1e-3 and frame / 25 - 1e-3 < b for a, b in spans)
    assert summary.skipped["cut"] <= 7
