"""Worker processes that hang or crash, their threads and memory, and the progress bar."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial

import cv2
import pytest
from clips import living_source, moving, texture

from ssl_flow.flow import Frame, Source, VideoError, extract
from ssl_flow.flow.extract import Bar, check_settings
from ssl_flow.flow.job import Settings
from ssl_flow.flow.store import verify


def hanging_source(short_side):
    yield Frame(0.0, texture(0))
    time.sleep(1000)


def dying_source(short_side):
    yield Frame(0.0, texture(0))
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_dry_run_survives_what_hangs_or_crashes(tmp_path):
    from ssl_flow.flow.command import make_plan  # not in the workers, which import this module

    sources = {"a": living_source, "crashes": dying_source, "hangs": hanging_source}
    settings = check_settings(Settings("dis", {}, 256, 0.1, None, False), "cpu")
    plan = make_plan(
        [Source(name, frames) for name, frames in sources.items()],
        tmp_path / "store",
        settings,
        timeout=3.0,
    )
    assert "3 of 3 videos to do" in plan
    assert "estimated from 3 pairs of 1 videos, 2 more could not be read" in plan
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_22_25_a_worker_that_hangs_or_crashes_costs_one_source(tmp_path, workers):
    sources = [
        Source("a", living_source),
        Source("crashes", dying_source),
        Source("hangs", hanging_source),
        *(Source(name, living_source) for name in "bc"),
    ]
    out = tmp_path / "store"
    summary = extract(sources, out, workers=workers, timeout=3.0)
    assert summary.pairs == 9
    reasons = {problem.source: problem.reason for problem in summary.problems}
    assert set(reasons) == {"crashes", "hangs"}
    assert "worker process died (SIGSEGV: a crash in a library)" in reasons["crashes"]
    assert "no progress for 3 s" in reasons["hangs"]
    assert verify(out) == {} and list(out.rglob("*.tmp")) == []
    if workers == 1:
        names = ["a", "b", "c", "crashes", "d", "hangs"]
        summary = extract([Source(name, living_source) for name in names], out)
        assert (summary.done, summary.already_done) == (3, 3)
        assert not (out / "problems.jsonl").exists()  # nothing is wrong any more


def source_whose_worker_is_ended(marks, short_side):
    """End the own process as often as there are marks."""
    yield Frame(0.0, texture(0))
    for mark in marks.glob("*"):
        mark.unlink()
        os.kill(os.getpid(), signal.SIGTERM)
    yield from living_source(short_side)


@pytest.mark.parametrize("times", [1, 2])
def test_a_worker_that_is_told_to_end_speaks_not_against_its_video(tmp_path, times):
    marks = tmp_path / "marks"
    marks.mkdir()
    for i in range(times):
        (marks / str(i)).touch()
    ended = Source("ended", partial(source_whose_worker_is_ended, marks))
    sources = [ended, Source("b", living_source)]
    summary = extract(sources, tmp_path / "store", workers=1)
    reasons = [problem.reason for problem in summary.problems]
    if times == 1:  # somebody was in error, or this process will be told in a moment
        assert reasons == [] and summary.done == 2
    else:  # a guard of the memory, for example, which would do it again for ever
        assert len(reasons) == 1 and "died (SIGTERM" in reasons[0] and summary.done == 1


def test_a_script_without_the_usual_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from functools import partial\n"
        "from ssl_flow.flow import Source, extract, read_frames\n"
        "extract([Source('a', partial(read_frames, 'a.mp4'))], 'store', workers=1)\n"
    )
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "RuntimeError: its worker process died (exit code 1) while it started" in done.stderr
    assert 'if __name__ == "__main__"' in done.stderr.splitlines()[-1]


def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path):
    import tracemalloc

    big = texture(0, 120, 1000)

    def film(frames, short_side):
        return (Frame(i / 10, big[i % 7 :, 2 * i :][:64, :96]) for i in range(frames))

    peaks = []
    for frames in (40, 240):
        tracemalloc.start()
        summary = extract([Source(f"film{frames}", partial(film, frames))], tmp_path / "s", size=64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert summary.pairs > 0.8 * frames
    assert peaks[1] < peaks[0] + 200 * 1000  # a row of the index each


def source_that_tells_its_threads(short_side):
    import os

    for i, image in enumerate(moving(2)):
        yield Frame(i / 10, image)
    raise VideoError(f"{cv2.getNumThreads()} {os.environ.get('OMP_NUM_THREADS')}")


def test_workers_use_one_thread_and_this_process_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    cv2.setNumThreads(2)
    sources = [Source("a", source_that_tells_its_threads)]
    assert extract(sources, tmp_path / "s1", workers=1).problems[0].reason == "1 1"
    assert extract(sources, tmp_path / "s0").problems[0].reason == "1 7"
    assert cv2.getNumThreads() == 2


def test_the_time_left_is_right_for_few_long_videos():
    film, clip = (Source(name, living_source) for name in ("film", "clip"))
    bar = Bar({film: 900.0, clip: 100.0}, enabled=True)
    for second in range(1, 46):
        bar.report(film, second / 90, 3)
    assert bar.bar.n == pytest.approx(450)  # half of the film, though no video is done
    bar.report(film, 0.2, 0)  # a second reading of its start takes nothing back
    assert bar.bar.n == pytest.approx(450)
    bar.done(clip)
    assert bar.bar.n == pytest.approx(550)
    bar.done(film)
    assert bar.bar.n == pytest.approx(1000)


def test_the_progress_bar_shows_videos_and_pairs(capsys):
    a, b = (Source(name, living_source) for name in "ab")
    bar = Bar({a: 3.0, b: 1.0}, enabled=True)
    with closing(bar.bar):
        bar.report(a, 0.5, 7)
        bar.done(b)
    shown = capsys.readouterr().err
    assert "62%" in shown and "1/2 videos, 7 pairs" in shown
