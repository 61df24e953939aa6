import importlib.util
import os
import sys
import time
from contextlib import closing
from functools import partial

import pytest
from clips import moving, write_video

from ssl_flow.flow import find_sources, pool
from ssl_flow.flow.estimators import method_options
from ssl_flow.flow.job import Settings, extract_source

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra 'ray')"
)


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'ssl-flow\[ray\]'"):
        list(pool.run_on_ray([1], print, 1, _ignore))


def _ignore(item, share, pairs):
    pass


@pytest.fixture
def job():
    def job(item, tick):  # a local function travels to Ray's workers, this module does not
        tick(pairs=item)
        if item == 66:
            os._exit(3)
        if item == 77:
            raise OSError("disk full")
        if item == 88:
            time.sleep(60)
        return item * item

    return job


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra 'ray')")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@needs_ray
def test_a_worker_that_dies_or_hangs_costs_its_item_only(ray, job):
    reports = []
    results = list(
        pool.run_on_ray(
            [1, 66, 2, 88, 3], job, 2, lambda *report: reports.append(report), timeout=3
        )
    )
    assert sorted((item, result) for item, result, _ in results) == [
        (1, 1), (2, 4), (3, 9), (66, None), (88, None)
    ]  # fmt: skip
    assert all((reason is None) == (result is not None) for _, result, reason in results)
    reasons = {item: reason for item, _, reason in results if reason}
    assert pool.DIED in reasons[66] and "no progress for 3 s" in reasons[88]
    assert sorted(reports) == [(1, 1.0, 1), (2, 1.0, 2), (3, 1.0, 3)]


@needs_ray
def test_what_a_job_raises_is_raised(ray, job):
    with pytest.raises(OSError, match=r"^disk full$"):
        list(pool.run_on_ray([1, 77, 2], job, 1, _ignore))


@needs_ray
def test_closing_ends_the_tasks(ray, job):
    start = time.monotonic()
    with closing(pool.run_on_ray([1, 88, 88], job, 2, _ignore)) as results:
        assert next(results) == (1, 1, None)
    assert time.monotonic() - start < 20


@needs_ray
def test_the_shards_are_the_same_as_without_ray(ray, tmp_path):
    (tmp_path / "clips").mkdir()
    for seed in range(3):
        write_video(tmp_path / "clips" / f"{seed}.mp4", moving(8, seed))
    sources, _ = find_sources([tmp_path / "clips"])
    settings = Settings("dis", method_options("dis", {}), 48, 0.1, 0.1, False)
    found = {}
    for name, run, workers in (("here", pool.run, 0), ("ray", pool.run_on_ray, 2)):
        job = partial(extract_source, store=tmp_path / name, settings=settings)
        results = list(run(sources, job, workers, _ignore))
        assert [reason for _, _, reason in results] == [None] * 3
        files = sorted(file for file in (tmp_path / name).rglob("*") if file.is_file())
        found[name] = {str(f.relative_to(tmp_path / name)): f.read_bytes() for f in files}
    assert found["here"] == found["ray"]
    assert len(found["ray"]) >= 6
