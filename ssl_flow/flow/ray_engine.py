"""`--engine ray`: the same jobs as in pool.py as tasks of Ray, on one machine or on a cluster.

A task gets a source (a path), writes its shard itself and returns the small index: neither frames
nor flow pass through Ray's object store. All machines must see the videos and the store under the
same paths, and have the same ssl_flow installed.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from .pool import DIED, TIMEOUT, Item, Job, Report, Result, Results


def run(
    items: Sequence[Item],
    job: Job[Item, Result],
    workers: int,
    report: Report[Item],
    timeout: float = TIMEOUT,
) -> Results[Item, Result]:
    """Do what `pool.run` does, with `workers` tasks at a time, each with one processor.

    Uses the Ray that the caller has started, or the cluster at RAY_ADDRESS, or starts Ray on this
    machine for as long as it runs. `report` is told the pairs of an item when it is done: ticks do
    not travel between machines. A worker without a tick for `timeout` seconds ends itself.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ImportError(
            "the engine 'ray' needs Ray: pip install 'ssl-flow[ray]' (or use the engine 'local')"
        ) from error
    workers = max(workers, 1)
    ours = not ray.is_initialized()
    if ours:
        # Ray refuses a number of processors where it joins a cluster.
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", **local)
    # No retries: what killed one worker would kill the next, and the next call tries it anyway.
    task = ray.remote(num_cpus=1, max_retries=0)(_call)
    queue = deque(items)
    pending: dict[Any, Item] = {}
    try:
        shared = ray.put(job)
        while queue or pending:
            while queue and len(pending) < workers:
                item = queue.popleft()
                pending[task.remote(shared, item, timeout)] = item
            done, _ = ray.wait(list(pending), num_returns=1)
            item = pending.pop(done[0])
            try:
                result, pairs = ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:  # a worker or a whole machine is lost
                stalled = f", or made no progress for {timeout:g} s" if timeout else ""
                yield item, None, f"{DIED}{stalled} ({type(error).__name__})"
                continue
            report(item, 1.0, pairs)
            yield item, result, None
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()


def _call(job: Job[Any, Any], item: Any, timeout: float) -> tuple[Any, int]:  # noqa: ANN401
    """Do the job in a worker of Ray (which has set the number of OpenMP threads to 1)."""
    made, alive = 0, time.monotonic()
    finished = threading.Event()

    def tick(share: float = 0.0, pairs: int = 0) -> None:
        nonlocal made, alive
        made, alive = made + pairs, time.monotonic()

    def watch() -> None:
        while not finished.wait(min(timeout / 4, 1.0)):
            if time.monotonic() - alive > timeout:
                os._exit(1)  # a call into a library that hangs cannot be interrupted

    if timeout:
        threading.Thread(target=watch, daemon=True).start()
    try:
        return job(item, tick), made
    finally:
        finished.set()
