"""What kills a long extraction: full disks, signals, crashes, hangs; and what must be left."""

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from clips import living_source, moving, shard_bytes, write_video

from ssl_flow.flow import FlowStore, Frame, Source, StoreError, extract, find_sources
from ssl_flow.flow.command import flow_command
from ssl_flow.flow.extract import ProblemError
from ssl_flow.flow.shard import store_lock
from ssl_flow.flow.store import verify

FLAGS = ["--size", "48", "--option", "preset=ultrafast", "--option", "finest_scale=3"]
CLIPS = 12
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in") / "clips"
    folder.mkdir()
    for i in range(CLIPS):
        write_video(folder / f"{i:02d}.mp4", moving(10, seed=i))
    return folder


@pytest.fixture(scope="module")
def undisturbed(clips, tmp_path_factory):
    """Return the bytes of the store that a quiet run makes, and its seconds."""
    out = tmp_path_factory.mktemp("out") / "store"
    start = time.perf_counter()
    process = run(clips, out)
    assert process.wait() == 0, process.stderr.read()
    seconds = time.perf_counter() - start
    assert len(FlowStore(out, duplicates=True)) == CLIPS * 9
    return shard_bytes(out), seconds


def run(clips, out, *flags, workers=1, **options):
    """Start the command as a process of its own."""
    command = [sys.executable, "-m", "ssl_flow.cli", "flow", str(clips), "--out", str(out)]
    return subprocess.Popen(
        [*command, *FLAGS, "--workers", str(workers), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def living():
    """Yield number, parent, group and command of all processes but those that wait to be reaped."""
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal():
                state, *numbers = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:3]
                if state not in "ZX":
                    parent, group = map(int, numbers)
                    yield int(folder.name), parent, group, (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended


def workers_of(process):
    return [n for n, parent, _, call in living() if parent == process and b"spawn_main" in call]


def has_ended(process):
    """Tell that of the processes that one started none is left."""
    return all(group != process for _, _, group, _ in living())


@linux
def test_25_killed_at_20_random_moments_it_ends_with_the_same_bytes(clips, undisturbed, tmp_path):
    expected, seconds = undisturbed
    rng = random.Random(0)
    kills = rounds = 0
    while kills < 20:
        out = tmp_path / f"store{rounds}"
        finished = len(list(out.rglob("*.index.json")))
        process = run(clips, out)
        if rng.random() < 0.25:  # at any moment, starting up included
            delay = rng.uniform(0, seconds)
        else:  # in the middle of the work
            delay = rng.uniform(0, 0.15)
            wait_for(
                lambda p=process, o=out, n=finished: (
                    len(list(o.rglob("*.index.json"))) > n or p.poll() is not None
                )
            )
        time.sleep(delay)
        workers = workers_of(process.pid)
        victim = rng.choice([process.pid, *workers])
        if process.poll() is None:
            os.kill(victim, signal.SIGKILL)
            kills += 1
        process.communicate()
        wait_for(partial(has_ended, process.pid))  # nothing is left behind
        if process.returncode == 0 and not (out / "problems.jsonl").exists():
            assert shard_bytes(out) == expected
            rounds += 1  # this store is complete: the next kills are for another
    process = run(clips, out)
    assert process.wait() == 0, process.stderr.read()
    assert shard_bytes(out) == expected
    assert verify(out) == {}
    process.communicate()


@linux
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_25_ctrl_c_and_sigterm_end_it_cleanly(clips, undisturbed, tmp_path, number, code):
    out = tmp_path / "store"
    process = run(clips, out, workers=2)
    wait_for(lambda: list(out.rglob("*.index.json")))
    start = time.monotonic()
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    printed, errors = process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert process.returncode == code
    assert "repeat the call to go on" in errors
    assert "Traceback" not in errors + printed
    assert list(out.rglob("*.tmp")) == []
    assert all("is unfinished" in reason for reason in verify(out).values())
    wait_for(partial(has_ended, process.pid))
    process = run(clips, out)
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert "already done" in printed
    assert shard_bytes(out) == undisturbed[0]


@linux
def test_25_no_video_is_blamed_when_all_processes_are_told_to_end(clips, tmp_path):
    out = tmp_path / "store"
    process = run(clips, out, workers=2)
    wait_for(lambda: list(out.rglob("*.index.json")))
    for worker in workers_of(process.pid):  # as a kill of the group may: the parent comes last
        os.kill(worker, signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert not (out / "problems.jsonl").exists()
    wait_for(partial(has_ended, process.pid))


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def assert_stopped_for_want_of_room(process, out):
    printed, errors = process.communicate(timeout=30)
    assert process.returncode == 2, errors
    lines = [line for line in re.split("[\r\n]", errors) if "error" in line]
    assert len(lines) == 1
    assert "cannot be written" in lines[0] and "make room there" in lines[0]
    assert str(out) in lines[0]
    assert "Traceback" not in errors + printed
    assert list(out.rglob("*.tmp")) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_24_a_file_that_cannot_grow_stops_it_cleanly(clips, undisturbed, tmp_path, workers):
    out = tmp_path / "store"
    largest = max(len(data) for data in undisturbed[0].values())
    process = run(clips, out, workers=workers, preexec_fn=partial(limit_file_size, largest - 1))
    assert_stopped_for_want_of_room(process, out)
    assert verify(out) == {}
    process = run(clips, out)
    process.communicate()
    assert process.returncode == 0
    assert shard_bytes(out) == undisturbed[0]


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_24_a_full_disk_stops_it_cleanly(clips, undisturbed, small_disk, tmp_path):
    out = small_disk / "store"
    process = run(clips, out)
    assert_stopped_for_want_of_room(process, out)
    assert verify(out) == {}
    assert 0 < len(FlowStore(out, duplicates=True)) < CLIPS * 9
    shutil.copytree(out, tmp_path / "larger")
    process = run(clips, tmp_path / "larger")
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert " 0 already done" not in printed
    assert shard_bytes(tmp_path / "larger") == undisturbed[0]


def test_24_an_unwritable_place_is_one_sentence(clips, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert flow_command([str(clips), "--out", str(tmp_path / "file/store"), *FLAGS]) == 2
    assert re.search(r"cannot be written .*choose another --out", capsys.readouterr().err)
    assert flow_command([str(clips), "--out", str(tmp_path / "file"), *FLAGS]) == 2
    assert "is no flow store" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_24_a_folder_without_the_right_to_write():
    folder = Path(tempfile.gettempdir()) / f"ssl_flow_test_{os.getpid()}"
    folder.mkdir(mode=0o555)
    try:
        if os.getuid() == 0:
            os.seteuid(65534)
        with pytest.raises(OSError, match=r"cannot be written \(Permission denied\): make it"):
            extract([Source("a", living_source)], folder / "store")
    finally:
        os.seteuid(os.getuid())
        folder.rmdir()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_24_an_error_of_the_disk_stops_it_cleanly(tmp_path, monkeypatch, call, at):
    sources = [Source(name, living_source) for name in "ab"]
    extract(sources, tmp_path / "good")
    calls = 0
    real = os.fsync if call == "fsync" else Path.replace

    def broken(*arguments):
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os if call == "fsync" else Path, call, broken)
        try:
            extract(sources, tmp_path / "store")
        except OSError as error:
            assert re.search(r"cannot be written \(Input/output error\)", str(error))
        else:  # folders are synced where that is possible
            assert call == "fsync" and at % 2 == 0
    assert list(tmp_path.rglob("*.tmp")) == []
    extract(sources, tmp_path / "store")
    assert shard_bytes(tmp_path / "store") == shard_bytes(tmp_path / "good")


def test_25_two_calls_at_once_do_not_mix(clips, tmp_path):
    sources = find_sources([clips])[0][:2]
    extract(sources, tmp_path / "store", part=(1, 2))
    busy = pytest.raises(StoreError, match="another call: wait")
    with store_lock(tmp_path / "store", shared=False), busy:
        extract(sources, tmp_path / "store")
    with store_lock(tmp_path / "store", shared=True):  # another part
        assert extract(sources, tmp_path / "store", part=(2, 2)).problems == []
        with pytest.raises(StoreError, match="another call"):
            extract(sources, tmp_path / "store")
    assert extract(sources, tmp_path / "store").already_done == 2


def test_25_what_a_killed_call_left_behind_is_removed(clips, tmp_path):
    sources = find_sources([clips])[0][:1]
    extract(sources, tmp_path / "store")
    before = shard_bytes(tmp_path / "store")
    for name in ("shards/clips/.gone.mp4.tar.tmp", ".store.json.tmp"):
        (tmp_path / "store" / name).write_bytes(b"torn")
    assert extract(sources, tmp_path / "store").already_done == 1
    assert shard_bytes(tmp_path / "store") == before


def test_25_a_call_that_was_killed_at_its_first_step_can_be_repeated(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/.store.json.tmp").write_bytes(b"{")
    assert extract([Source("a", living_source)], tmp_path / "store").pairs == 3


def failing_source(short_side):
    yield Frame(0.0, np.zeros((4, 4, 3), np.uint8))


def test_strict_stops_at_the_first_problem(clips, tmp_path, capsys):
    sources = [Source(name, living_source) for name in "ab"] + [Source("c", failing_source)]
    for _ in "12":  # again: what was done stays, the problem too
        with pytest.raises(ProblemError, match="c: frames of 4 x 4 pixels"):
            extract(sources, tmp_path / "store", strict=True)
        assert len(FlowStore(tmp_path / "store", duplicates=True)) == 6
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        shutil.copy(clips / "00.mp4", folder / f"{name}.mp4")
    command = [str(folder), "--out", str(tmp_path / "strict"), *FLAGS, "--strict", "--workers", "1"]
    assert flow_command(command) == 0
    (folder / "c.mp4").write_bytes(b"")
    assert flow_command(command) == 1
    error = capsys.readouterr().err
    assert "in/c.mp4: cannot be opened as video" in error and "--strict" in error
    assert "in/c.mp4" in (tmp_path / "strict/problems.jsonl").read_text()
    assert len(FlowStore(tmp_path / "strict", duplicates=True)) == 18


@pytest.mark.parametrize("together", [True, False])
def test_parts_of_the_work_make_the_bytes_of_the_whole(clips, undisturbed, tmp_path, together):
    sources = find_sources([clips])[0]
    options = {"size": 48, "options": {"preset": "ultrafast", "finest_scale": 3}}
    merged = {}
    for number in (1, 2, 3):
        out = tmp_path / ("store" if together else f"store{number}")
        summary = extract(sources, out, part=(number, 3), **options)
        assert 0 < summary.sources < CLIPS  # shared out by hash
        merged |= shard_bytes(out)
    if not together:
        expected = {k: v for k, v in undisturbed[0].items() if k.startswith("shards/")}
        merged = {name: data for name, data in merged.items() if name.startswith("shards/")}
        assert merged == expected
    else:
        assert "manifest.jsonl" not in merged
        assert extract(sources, out, **options).already_done == CLIPS
        assert shard_bytes(out) == undisturbed[0]
    # A source stays in its part when others are added.
    few = extract(sources[:9], tmp_path / "few", part=(2, 3), **options).sources
    assert few == len({s.name for s in sources[:9]} & set(FlowStore(tmp_path / "few").sources))


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0"])
def test_a_wrong_part_is_refused(clips, tmp_path, capsys, text):
    assert flow_command([str(clips), "--out", str(tmp_path / "s"), "--shard", text]) == 2
    assert "i from 1 to n" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_dry_run_estimates_and_writes_nothing(clips, undisturbed, tmp_path, capsys):
    out = tmp_path / "store"
    assert flow_command([str(clips), "--out", str(out), *FLAGS, "--dry-run"]) == 0
    assert not out.exists()
    printed = capsys.readouterr().out
    assert f"{CLIPS} of {CLIPS} videos to do (0 already done), about {CLIPS} s of video" in printed
    pairs = int(re.search(r"about (\d+) pairs", printed).group(1))
    size = float(re.search(r"([\d.]+(?:e-\d+)?) GB", printed).group(1))
    assert pairs == pytest.approx(CLIPS * 9, rel=0.15)
    stored = sum(len(v) for name, v in undisturbed[0].items() if name.endswith(".tar"))
    assert size == pytest.approx(stored / 1e9, rel=0.3)  # the tars' ends are not counted
    extract(
        find_sources([clips])[0][:10],
        out,
        size=48,
        options={"preset": "ultrafast", "finest_scale": 3},
    )
    assert flow_command([str(clips), "--out", str(out), *FLAGS, "--dry-run"]) == 0
    assert (
        f"{CLIPS - 10} of {CLIPS} videos to do (10 already done), about 2 s"
        in capsys.readouterr().out
    )
