"""The 25 faults of real collections: each is used as far as it goes, or named with its reason.

The files of most of them lie in one folder, over which the command runs once; `FAULTS` says what
must come of each. The last two faults, those of disks and of processes, are in test_survival.py.
"""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from broken import (
    change_size,
    claim_a_huge_image,
    claim_a_huge_size,
    claim_many_frames,
    cut_at_60_percent,
    cut_scene,
    flash,
    flip_bits,
    frames_with,
    jpeg,
    noise,
    still_frames,
    times_in_disorder,
    unknown_codec,
    without_times,
    write_gif,
    zero_the_middle,
)
from clips import moving, texture, write_sound, write_video

from ssl_flow.flow import FlowStore, Frame, Source, VideoError, extract, find_sources, read_frames
from ssl_flow.flow.command import flow_command
from ssl_flow.flow.store import verify

pytest.importorskip("av")
NAMES = ["🎈文.mp4", "new\nline.mp4", "-x.mp4", "%05d.mp4", "a:b.mp4", "é" * 120 + ".mp4"]
NOT_UTF8 = os.fsdecode(b"caf\xe9.mp4")


# number: file, how it is made, what problems.jsonl must say (None: nothing), least and most pairs
FAULTS = [
    (1, "empty.mp4", lambda p: p.write_bytes(b""), "cannot be opened", 0, 0),
    (2, "text.mp4", lambda p: p.write_bytes(b"no video\n" * 99), "cannot be opened", 0, 0),
    (
        2,
        "random.mp4",
        lambda p: p.write_bytes(bytes(range(256)) * 40),
        "cannot be opened|no ",
        0,
        0,
    ),
    (3, "picture.mp4", jpeg, r"no two frames 0\.1 s apart in 1 frame", 0, 0),
    (4, "cut.mp4", cut_at_60_percent, "cannot be opened", 0, 0),
    (
        5,
        "cut_fast.mp4",
        lambda p: cut_at_60_percent(p, options={"movflags": "+faststart"}),
        "file ends early|could not be decoded",
        15,
        48,
    ),
    (6, "flipped.mp4", flip_bits, "damaged|could not be decoded", 30, 57),
    (7, "hole.mp4", zero_the_middle, "damaged|could not be decoded", 35, 57),
    (8, "one.mp4", lambda p: write_video(p, moving(1)), "in 1 frame", 0, 0),
    (8, "two.mp4", lambda p: write_video(p, moving(2)), None, 1, 1),
    (9, "sound.mp4", write_sound, "no video stream", 0, 0),
    (10, "grey.mkv", frames_with(codec="ffv1", pix_fmt="gray"), None, 5, 5),
    (10, "grey16.mkv", frames_with(codec="ffv1", pix_fmt="gray16le"), None, 5, 5),
    (10, "ten_bit.mp4", frames_with(pix_fmt="yuv420p10le"), None, 5, 5),
    (10, "yuv444.mp4", frames_with(pix_fmt="yuv444p"), None, 5, 5),
    (11, "alpha.mov", frames_with(codec="qtrle", pix_fmt="argb"), None, 5, 5),
    (11, "alpha.mkv", frames_with(codec="ffv1", pix_fmt="yuva420p"), None, 5, 5),
    (11, "movie.gif", write_gif, None, 4, 5),
    (
        12,
        "odd.mp4",
        lambda p: write_video(p, moving(3, height=241, width=321), pix_fmt="yuv444p"),
        None,
        2,
        2,
    ),
    (12, "16.mp4", lambda p: write_video(p, moving(3, height=16, width=16)), None, 2, 2),
    (
        12,
        "2.mp4",
        lambda p: write_video(p, [texture(i, 2, 2) for i in range(3)]),
        "frames of 2 x 2 pixels: flow needs at least 16",
        0,
        0,
    ),
    (
        13,
        "8k.avi",
        lambda p: write_video(
            p,
            [np.kron(i, np.ones((60, 60, 1), np.uint8)) for i in moving(2, height=72, width=128)],
            codec="mjpeg",
            pix_fmt="yuvj420p",
        ),
        None,
        1,
        1,
    ),
    (13, "declared.mkv", claim_a_huge_size, "20000 x 260 pixels are refused", 0, 0),
    (
        13,
        "huge",
        claim_a_huge_image,
        r"1 unusable image\(s\): 2\.png frames of 20000 x 60 pixels are refused",
        1,
        2,
    ),
    (
        14,
        "vfr.mkv",
        lambda p: write_video(p, moving(7), times=[0, 0.1, 0.2, 1.5, 1.6, 1.7, 1.8]),
        None,
        5,
        5,
    ),
    (
        14,
        "doubled.mp4",
        lambda p: write_video(p, [i for i in moving(8) for _ in "12"], fps=20),
        None,
        6,
        7,
    ),
    (14, "1fps.mp4", lambda p: write_video(p, moving(5), fps=1), "4 hole.*larger gap", 0, 0),
    (14, "240fps.mp4", lambda p: write_video(p, moving(97, step=1), fps=240), None, 3, 4),
    (15, "turned.mp4", lambda p: write_video(p, moving(6), rotation=90), None, 5, 5),
    (15, "wide.mp4", frames_with(aspect=Fraction(3, 2)), None, 5, 5),
    (15, "interlaced.mp4", frames_with(**{"x264-params": "tff=1"}), None, 5, 5),
    (16, "edited.mp4", frames_with(bf="2"), None, 5, 5),
    (16, "late.ts", lambda p: write_video(p, moving(6), times=np.arange(6) / 10 + 3), None, 5, 5),
    (17, "no_times.mp4", without_times, None, 2, 7),
    (17, "disorder.mkv", times_in_disorder, None, 5, 7),
    (18, "resized.mp4", change_size, None, 4, 13),
    (19, "many.avi", claim_many_frames, None, 19, 19),
    (20, "unknown.mkv", unknown_codec, "no decoder|no video stream", 0, 0),
    *((21, name, lambda p: write_video(p, moving(3)), None, 2, 2) for name in (*NAMES, NOT_UTF8)),
    (21, "stem.mp4", lambda p: write_video(p, moving(3)), None, 2, 2),
    (21, "stem.mkv", lambda p: write_video(p, moving(4)), None, 3, 3),
    (22, "folder.mp4", lambda p: p.mkdir(), r"not a regular file \(a folder\)", 0, 0),
    (22, "dangling.mp4", lambda p: p.symlink_to(p.parent / "gone"), "a link to nothing", 0, 0),
    (22, "loop.mp4", lambda p: p.symlink_to(p), "cannot be reached", 0, 0),
    (22, "pipe.mp4", lambda p: os.mkfifo(p), r"not a regular file \(a pipe\)", 0, 0),
    (22, "linked", lambda p: p.symlink_to(p.parent), "searched already", 0, 0),
    (23, "still.mp4", still_frames(texture(0)), "no usable pair in 8 frames.*static", 0, 0),
    (23, "black.mp4", still_frames(np.zeros((64, 96, 3), np.uint8)), "7 static", 0, 0),
    (23, "cut_scene.mp4", cut_scene, None, 8, 8),
    (23, "flash.mp4", flash, None, 6, 6),
    (23, "noise.mp4", noise, r"no usable pair in 6 frames \(5 cut\)", 0, 0),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Run the command once over all of them."""
    folder = tmp_path_factory.mktemp("in") / "in"
    folder.mkdir()
    for _, name, make, *_ in FAULTS:
        make(folder / name)
    out = folder.parent / "store"
    arguments = [str(folder), "--out", str(out), "--size", "48", "--option", "preset=ultrafast"]
    code = flow_command([*arguments, "--workers", "1", "--timeout", "60"])
    rows = [json.loads(line) for line in (out / "problems.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        code=code, out=out, rows=rows, store=FlowStore(out, duplicates=True), folder=folder
    )


@pytest.mark.parametrize(
    ("number", "name", "make", "reason", "least", "most"),
    FAULTS,
    ids=[f"{number:02d}-{ascii(name)[1:-1]:.20}" for number, name, *_ in FAULTS],
)
def test_fault(result, number, name, make, reason, least, most):
    found = [row["reason"] for row in result.rows if row["source"] == f"in/{name}"]
    if reason is None:
        assert found == []
    else:
        assert len(found) == 1
        assert re.search(reason, found[0]), found[0]
    counts = Counter(result.store.sources[i] for i in result.store.source_numbers)
    assert least <= counts[f"in/{name}"] <= most


def test_the_run_over_all_faults_ends_with_a_whole_store(result):
    assert result.code == 0
    assert {row["source"] for row in result.rows} <= {f"in/{name}" for _, name, *_ in FAULTS}
    assert verify(result.out) == {}
    assert [file for file in result.out.rglob(".*") if file.name != ".lock"] == []
    store = result.store
    assert len({store[i].meta["key"] for i in range(len(store))}) == len(store)
    for i in range(len(store)):
        assert np.isfinite(store[i].flow).all()


def test_05_06_07_what_is_left_of_damaged_files_is_the_same_each_time(result, tmp_path):
    names = ("cut_fast.mp4", "flipped.mp4", "hole.mp4")
    sources = [s for s in find_sources([result.folder])[0] if s.name.split("/")[-1] in names]
    extract(sources, tmp_path / "again", size=48, options={"preset": "ultrafast"})
    for name in names:
        again, before = (s / f"shards/in/{name}.tar" for s in (tmp_path / "again", result.out))
        assert again.read_bytes() == before.read_bytes()


def true_frames(path, clean):
    """Whether each frame that is read from a damaged file is the one that was written."""
    frames = []
    with pytest.raises(VideoError):
        for frame in read_frames(path):
            frames.append(frame)
    assert frames[-1].time > 5  # reading went on behind the damage
    whole = {round(frame.time, 3): frame.image for frame in read_frames(clean)}
    return [
        np.abs(frame.image.astype(int) - whole[round(frame.time, 3)]).mean() < 3 for frame in frames
    ]


@pytest.mark.parametrize("name", ["flipped.mp4", "hole.mp4"])
def test_06_07_no_smeared_frame_comes_out_of_a_damaged_file(result, tmp_path, name):
    clean = write_video(tmp_path / "clean.mp4", moving(60))
    good = true_frames(result.folder / name, clean)
    # A flipped bit in the middle of a block changes some pixels and is no error to any decoder.
    assert sum(good) >= (0.9 if name == "flipped.mp4" else 1.0) * len(good)


def test_15_pixels_that_are_not_square_are_made_so(result):
    path = result.folder / "wide.mp4"
    assert next(read_frames(path)).image.shape == (43, 96, 3)  # 64 / 1.5, never enlarged
    assert next(read_frames(path, 32)).image.shape == (32, 71, 3)


def test_17_times_in_disorder_increase(result):
    times = [frame.time for frame in read_frames(result.folder / "disorder.mkv")]
    assert len(times) == 8
    assert (np.diff(times) > 0).all()


@pytest.fixture
def nobody():
    """Be a user without rights for a while."""
    folder = Path(tempfile.mkdtemp())  # tmp_path lies in a folder that others may not enter
    folder.chmod(0o755)
    yield folder
    if os.geteuid() != os.getuid():
        os.seteuid(os.getuid())
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_22_what_may_not_be_read_is_named(nobody, capsys):
    inside = nobody / "in"
    (inside / "locked").mkdir(parents=True)
    secret = write_video(inside / "secret.mp4", moving(3))
    write_video(inside / "good.mp4", moving(3))
    for path in (secret, inside / "locked"):
        path.chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)
    sources, problems = find_sources([inside])
    assert [(p.source, p.reason) for p in problems] == [
        ("in/locked", "cannot be listed: Permission denied")
    ]
    with pytest.raises(VideoError, match="Permission denied"):
        next(sources[1].frames(None))


def test_22_a_file_that_changes_while_it_is_read_is_not_stored(tmp_path):
    def growing(short_side):
        yield from read_frames(path, short_side)
        path.write_bytes(path.read_bytes() + b"more")

    def vanishing(short_side):
        yield from read_frames(path, short_side)
        path.unlink()

    path = write_video(tmp_path / "a.mp4", moving(4))
    for frames in (growing, vanishing):
        summary = extract([Source("a.mp4", frames, path)], tmp_path / "store")
        assert (summary.done, summary.pairs) == (0, 0)
        assert "changed while it was read" in summary.problems[0].reason
    assert list(FlowStore(tmp_path / "store").sources) == []


def test_22_a_folder_of_images_that_changed_is_noticed(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, image in enumerate(moving(8)):
        cv2.imwrite(str(folder / f"{i}.png"), image)
    sources = find_sources([folder])[0]
    assert extract(sources, tmp_path / "store").done == 1
    os.utime(folder / "3.png", (1, 1))  # a copy has other times and is the same
    assert extract(sources, tmp_path / "store").already_done == 1
    (folder / "3.png").rename(folder / "33.png")
    summary = extract(sources, tmp_path / "store")
    assert "has changed since" in summary.problems[0].reason


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_23_flow_that_is_not_finite_is_left_out(tmp_path, monkeypatch, value):
    def broken(a, b, *arguments, **options):
        flow = np.ones((*a.shape, 2), np.float32)
        flow[:, 3, 4] = value
        return flow

    def frames(short_side):
        return (Frame(i / 10, image) for i, image in enumerate(moving(4)))

    monkeypatch.setattr("ssl_flow.flow.job.optical_flows", broken)
    summary = extract([Source("a", frames)], tmp_path / "store")
    assert summary.skipped == {"not_finite": 3}
    assert "not_finite" in summary.problems[0].reason
