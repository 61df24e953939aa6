import json
import pickle
import shutil
import sys
import tarfile

import cv2
import numpy as np
import pytest
from clips import make_store, moving, write_video

from ssl_flow.flow import (
    FlowStore,
    Frame,
    Source,
    StoreError,
    VideoError,
    decode_flow,
    extract,
    find_sources,
    flow_validity,
    optical_flow,
    optical_flows,
)
from ssl_flow.flow.command import flow_command
from ssl_flow.flow.merge import merge_stores


@pytest.mark.parametrize(
    ("method", "options"), [("farneback", {"winsize": "abc"}), ("dis", {"patch_size": "x"})]
)
def test_an_impossible_option_is_refused_before_any_work(tmp_path, method, options):
    with pytest.raises(ValueError, match=f"{method}.*{next(iter(options.values()))}"):
        extract([], tmp_path / "store", method=method, options=options)
    assert not (tmp_path / "store").exists()


def shards(store):
    return {
        str(file.relative_to(store)): file.read_bytes()
        for file in sorted((store / "shards").rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in") / "clips"
    folder.mkdir()
    write_video(folder / "a.mp4", moving(12, seed=1))
    write_video(folder / "b.mkv", moving(9, seed=2), fps=20)
    (folder / "c").mkdir()
    for i, image in enumerate(moving(8, seed=3)):
        cv2.imwrite(str(folder / "c" / f"{i:05d}.png"), image[..., ::-1])
    return folder


@pytest.fixture(scope="module")
def store(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "store"
    assert flow_command([str(clips), "--out", str(out), "--workers", "1", "--size", "48"]) == 0
    return out


def test_a_store_holds_frames_and_the_flow_between_them(clips, store):
    flows = FlowStore(store)
    assert flows.sources == ["clips/a.mp4", "clips/b.mkv", "clips/c"]
    assert len(flows) == 11 + 4 + 2
    for sample in (flows[i] for i in range(len(flows))):
        assert sample.frame.shape == (48, 72, 3)
        assert sample.frame.dtype == np.uint8
        assert sample.flow.shape == (48, 72, 2)
        assert sample.flow.dtype == np.float32
        np.testing.assert_array_equal(sample.valid, flow_validity(sample.flow))
        frames_apart = {"a.mp4": 1, "b.mkv": 2, "c": 2.4}[sample.meta["video"].split("/")[1]]
        u, v = np.median(sample.flow[8:-8, 8:-8], axis=(0, 1))  # 2 px right, 1 down, at 3/4 size
        assert (u, v) == pytest.approx((1.5 * frames_apart, 0.75 * frames_apart), rel=0.25)
    meta = flows[1].meta
    assert meta["time"] == pytest.approx(0.1)
    assert meta["gap"] == pytest.approx(0.1)
    assert (meta["method"], meta["size"]) == ("dis", [48, 72])
    with pytest.raises(IndexError):
        flows[len(flows)]
    np.testing.assert_array_equal(flows[-1].flow, flows[len(flows) - 1].flow)


def test_random_access_reads_what_tarfile_reads(store):
    flows = FlowStore(store)
    with tarfile.open(store / "shards/clips/b.mkv.tar") as tar:
        contents = {info.name: tar.extractfile(info).read() for info in tar}
    first = len(FlowStore(store, include="clips/a.mp4"))
    names = list(contents)
    for i in range(len(contents) // 3):
        key = f"clips/b.mkv/{i:06d}"
        assert names[3 * i : 3 * i + 3] == [f"{key}.jpg", f"{key}.flow.q16", f"{key}.json"]
        sample = flows[first + i]
        assert sample.meta == json.loads(contents[f"{key}.json"])
        frame = cv2.imdecode(np.frombuffer(contents[f"{key}.jpg"], np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(sample.frame, frame[..., ::-1])
        np.testing.assert_array_equal(sample.flow, decode_flow(contents[f"{key}.flow.q16"]))


def test_include_chooses_sources(store):
    assert FlowStore(store, include=["clips/b.mkv", "*/c"]).sources == ["clips/b.mkv", "clips/c"]
    assert FlowStore(store, include=["clips/b.mkv"])[0].meta["video"] == "clips/b.mkv"
    with pytest.raises(StoreError, match=r"matches 'd\*'"):
        FlowStore(store, include=["clips/c", "d*"])


def test_a_store_is_small_when_pickled(store):
    flows = FlowStore(store)
    flows[0]
    data = pickle.dumps(flows)
    assert len(data) < 10_000
    np.testing.assert_array_equal(pickle.loads(data)[5].flow, flows[5].flow)


def test_two_workers_make_the_same_bytes(clips, store, tmp_path):
    summary = extract(find_sources([clips])[0], tmp_path / "two", size=48, workers=2)
    assert summary.done == 3
    assert summary.pairs == len(FlowStore(store))
    assert shards(tmp_path / "two") == shards(store)


def test_a_second_call_does_nothing_and_says_so(clips, store, capsys):
    before = shards(store)
    times = {name: (store / name).stat().st_mtime_ns for name in before}
    assert flow_command([str(clips), "--out", str(store), "--size", "48"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {name: (store / name).stat().st_mtime_ns for name in before} == times


@pytest.mark.parametrize("damage", ["no index", "no tar", "short tar", "bad index"])
def test_an_unfinished_shard_is_made_again(clips, store, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    tar, index = copy / "shards/clips/a.mp4.tar", copy / "shards/clips/a.mp4.index.json"
    if damage == "no index":
        index.unlink()
        (copy / "shards/clips/.a.mp4.tar.tmp").write_bytes(b"left by a killed run")
    elif damage == "no tar":
        tar.unlink()
    elif damage == "short tar":
        tar.write_bytes(tar.read_bytes()[:-1000])
    else:
        index.write_text("{")
    if damage != "no index":
        with pytest.raises(StoreError, match=r"a\.mp4.*delete .* run"):
            FlowStore(copy)
    else:
        assert FlowStore(copy).sources == ["clips/b.mkv", "clips/c"]
    summary = extract(find_sources([clips])[0], copy, size=48)
    assert (summary.done, summary.already_done) == (1, 2)
    assert shards(copy) == shards(store)


def test_damage_while_reading_names_the_shard(store, tmp_path):
    shutil.copytree(store, tmp_path / "copy")
    flows = FlowStore(tmp_path / "copy")
    tar = tmp_path / "copy/shards/clips/a.mp4.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(StoreError, match=r"a\.mp4\.tar is damaged .*delete"):
        flows[5]
    tar.write_bytes(bytes(10**6))
    with pytest.raises(StoreError, match=r"a\.mp4\.tar is damaged"):
        flows[5]


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--size", "32"], "size"),
        (["--gap", "0.2"], "gap"),
        (["--every", "1"], "every"),
        (["--method", "farneback"], "method"),
        (["--option", "preset=fast"], "options"),
        (["--consistency"], "consistency"),
        (["--codec", "png"], "codec"),
    ],
)
def test_other_settings_are_refused(clips, store, capsys, flags, key):
    before = shards(store)
    assert flow_command([str(clips), "--out", str(store), "--size", "48", *flags]) == 2
    assert f"made with {key} = " in capsys.readouterr().err
    assert shards(store) == before


def test_what_is_no_store_is_refused(store, tmp_path):
    with pytest.raises(StoreError, match="not a flow store"):
        FlowStore(tmp_path)
    (tmp_path / "thesis.txt").write_text("not to be mixed with")
    with pytest.raises(StoreError, match="no flow store"):
        extract([], tmp_path)
    shutil.copytree(store, tmp_path / "copy")
    settings = json.loads((store / "store.json").read_text())
    (tmp_path / "copy/store.json").write_text(json.dumps({**settings, "version": 99}))
    with pytest.raises(StoreError, match="version 99"):
        FlowStore(tmp_path / "copy")


def test_broken_videos_are_named_and_left_out(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "good.mp4", moving(5))
    write_video(folder / "single.mp4", moving(1))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_bytes(b"no video\n" * 99)
    options = {"movflags": "+faststart"}
    whole = write_video(folder / "cut.mp4", moving(50), options=options).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    out = tmp_path / "store"
    command = [str(folder), "--out", str(out), "--workers", "1"]
    assert flow_command(command) == 0
    printed = capsys.readouterr().out
    problems = [json.loads(line) for line in (out / "problems.jsonl").read_text().splitlines()]
    reasons = {problem["source"]: problem["reason"] for problem in problems}
    assert set(reasons) == {f"in/{name}.mp4" for name in ("single", "empty", "text", "cut")}
    assert "no two frames 0.1 s apart in 1 frame" in reasons["in/single.mp4"]
    assert all(name in printed for name in reasons)
    assert "4 problems" in printed
    flows = FlowStore(out)
    assert len(FlowStore(out, include="in/good.mp4")) == 4
    assert 15 < len(FlowStore(out, include="in/cut.mp4")) < 49  # the good part is kept
    assert flow_command(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert len(FlowStore(out)) == len(flows)
    assert len((out / "problems.jsonl").read_text().splitlines()) == 4  # each is listed once


def test_nothing_usable_is_a_failure(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/empty.mp4").write_bytes(b"")
    assert flow_command([str(tmp_path / "in"), "--out", str(tmp_path / "store")]) == 1
    assert "holds no pair" in capsys.readouterr().err
    assert flow_command([str(tmp_path / "absent"), "--out", str(tmp_path / "s")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_file_that_was_replaced_is_not_taken_for_the_old_one(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "a.mp4", moving(4))
    sources = find_sources([folder])[0]
    extract(sources, tmp_path / "store")
    write_video(folder / "a.mp4", moving(6, seed=5))
    summary = extract(sources, tmp_path / "store")
    assert (summary.done, summary.already_done) == (0, 0)
    assert "has changed" in summary.problems[0].reason


def test_frames_that_become_too_small_cost_only_themselves(tmp_path):
    def frames(short_side):
        images = [*moving(4), *(image[:8] for image in moving(4))]
        return (Frame(i / 10, image) for i, image in enumerate(images))

    summary = extract([Source("a", frames)], tmp_path / "s", method="farneback")
    assert (summary.pairs, summary.skipped) == (3, {"size_change": 1})
    assert summary.problems[0].reason == "frames of 96 x 8 pixels: flow needs at least 16 a side"


def test_the_codec_is_chosen(tmp_path):
    make_store(moving(3), tmp_path, codec="png")
    with tarfile.open(tmp_path / "made_store/shards/made.tar") as tar:
        data = tar.extractfile("made/000000.flow.png").read()
    assert data.startswith(b"\x89PNG")
    np.testing.assert_array_equal(FlowStore(tmp_path / "made_store")[0].flow, decode_flow(data))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "tvll"], "unknown flow method 'tvll', did you mean 'tvl1'"),
        (["--device", "cuda"], "'dis' is OpenCV's and runs on device 'cpu' alone"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--timeout", "-1", "--dry-run"], "--timeout 0; got 2, -1"),
        (["--option", "preset"], "NAME=VALUE"),
    ],
)
def test_wrong_flags_are_explained(clips, tmp_path, capsys, flags, message):
    assert flow_command([str(clips), "--out", str(tmp_path / "s"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_groups_of_a_gpu_lose_no_pair_before_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_flow.flow.job._GROUP", 4)

    def on_device(prev, next, method, device, **options):
        assert device == "cuda"
        assert len(prev) <= 4
        return optical_flows(prev, next, method, "cpu", **options)

    def damaged(short_side):
        for i, image in enumerate([*moving(7), *moving(4, height=96)]):
            yield Frame(i / 10, image)
        raise VideoError("the rest is missing")

    expected = extract([Source("a", damaged)], tmp_path / "one", consistency=True)
    monkeypatch.setattr("ssl_flow.flow.job.optical_flows", on_device)
    monkeypatch.setattr(sys.modules["ssl_flow.flow.extract"], "optical_flows", on_device)
    summary = extract([Source("a", damaged)], tmp_path / "many", consistency=True, device="cuda")
    assert summary.pairs == expected.pairs == 9
    assert summary.problems == expected.problems
    assert shards(tmp_path / "many") == shards(tmp_path / "one")


def test_two_implementations_of_one_method_are_not_mixed(tmp_path, monkeypatch):
    def on_cuda(prev, next, method, device, **options):
        method = "farneback-torch" if method == "farneback" else method
        return optical_flows(prev, next, method, "cpu", **options)

    def frames(short_side):
        return (Frame(i / 10, image) for i, image in enumerate(moving(4)))

    sources = [Source("a", frames)]
    for module in ("job", "extract"):
        monkeypatch.setattr(sys.modules[f"ssl_flow.flow.{module}"], "optical_flows", on_cuda)
    extract(sources, tmp_path / "cpu", method="farneback")
    extract(sources, tmp_path / "cuda", method="farneback", device="cuda")
    assert shards(tmp_path / "cpu") != shards(tmp_path / "cuda")
    assert FlowStore(tmp_path / "cpu").settings["method"] == "farneback"  # as in older stores
    for store, device, found in (("cpu", "cuda", "farneback"), ("cuda", "cpu", "farneback-torch")):
        with pytest.raises(StoreError, match=f"made with method = '{found}'"):
            extract(sources, tmp_path / store, method="farneback", device=device)
    with pytest.raises(StoreError, match="made with method"):
        merge_stores([tmp_path / "cpu", tmp_path / "cuda"], tmp_path / "out")
    # What was begun on a GPU can be continued without one.
    assert extract(sources, tmp_path / "cuda", method="farneback-torch").already_done == 1
    monkeypatch.undo()
    extract(sources, tmp_path / "torch", method="farneback-torch")
    assert shards(tmp_path / "torch") == shards(tmp_path / "cuda")


def test_method_and_options_reach_the_flow(tmp_path):
    frames = moving(2)
    make_store(frames, tmp_path, method="farneback", options={"winsize": 9})
    expected = optical_flow(*frames, method="farneback", winsize=9)
    np.testing.assert_allclose(FlowStore(tmp_path / "made_store")[0].flow, expected, atol=1 / 32)


def test_wrong_arguments_are_refused_before_any_work(tmp_path):
    def source(short_side):
        raise AssertionError("must not be read")

    for arguments in (
        {"size": 8},
        {"gap": 0},
        {"workers": -1},
        {"timeout": -1},
        {"every": -1},
        {"gap": "automatic"},
        {"codec": "jpg"},
        {"method": "raff"},
        {"device": "tpu"},
        {"part": (3, 2)},
        {"options": {"presett": "fast"}},
    ):
        with pytest.raises(ValueError):
            extract([Source("a", source)], tmp_path / "store", **arguments)
    with pytest.raises(ValueError, match="unique"):
        extract([Source("a", source)] * 2, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    with pytest.raises(ValueError, match="relative path"):
        extract([Source("../a", source)], tmp_path / "store")


@pytest.mark.parametrize(("clip", "fewest"), [("wolf.mp4", 19), ("bonsai_handheld.mp4", 11)])
def test_real_clips(data, tmp_path, clip, fewest):
    sources, _ = find_sources([data / "video" / clip])
    summary = extract(sources, tmp_path / "store", size=128, options={"preset": "fast"})
    assert summary.pairs >= fewest
    assert summary.problems == []
