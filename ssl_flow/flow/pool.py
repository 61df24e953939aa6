"""Runs one job for each source: here, in processes that may hang or die, or in tasks of Ray.

A worker that dies, or is killed because it does nothing any more, costs the source it was working
on and nothing else. `concurrent.futures` cannot do that: there a dead worker breaks the pool, and
one that hangs cannot be told from one that works.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, parent_process, resource_tracker
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


# A job calls tick(share=0.0, pairs=0) for each packet, frame and pair: also a sign that it is
# alive. `share` is what is done of the item, 0 to 1; `pairs` those made since the last call.
Tick = Callable[..., None]
Job = Callable[[Item, Tick], Result]
Report = Callable[[Item, float, int], None]  # item, its share, new pairs; see Tick
Results = Generator[tuple[Item, Result | None, str | None], None, None]

TIMEOUT = 120.0  # seconds: the slowest method takes 20 s for a pair of megapixels
DIED = "its worker process died"
_ENDED = (-signal.SIGTERM, -signal.SIGINT)  # exit codes of a process that was told to end
_TELL = 0.2  # seconds between two messages of a worker


def run(
    items: Sequence[Item],
    job: Job[Item, Result],
    workers: int,
    report: Report[Item],
    timeout: float = TIMEOUT,
) -> Results[Item, Result]:
    """Yield (item, result, None), or (item, None, reason) where a worker died, as they finish.

    `job(item, tick)` is called in `workers` processes, to which both are pickled; 0 works in this
    one, which cannot survive a crash or a hang. A worker is killed after `timeout` seconds without
    a tick (0: never). `report` is told from time to time what ticks there have been. What a job
    raises is raised, and ends the others, as does closing the iterator (`contextlib.closing`).
    """
    if workers == 0:
        for item in items:

            def tick(share: float = 0.0, pairs: int = 0, item: Item = item) -> None:
                report(item, share, pairs)

            yield item, job(item, tick), None
        return
    queue = deque(items)
    team = [_Worker(job) for _ in range(min(workers, len(queue)))]
    ended: list[Item] = []  # items whose worker somebody has ended
    try:
        while queue or any(worker.busy for worker in team):
            for index, worker in enumerate(team):
                if worker.busy or not queue:
                    continue
                try:
                    worker.give(queue[0])
                except OSError:  # it died while it waited
                    worker.end()
                    team[index] = worker = _Worker(job)
                    worker.give(queue[0])
                queue.popleft()
            started = time.monotonic()
            ready = connection.wait([worker.pipe for worker in team if worker.busy], timeout=0.5)
            # Only what was waited here counts, else a job that was stopped for a while (Ctrl-Z)
            # would lose all its workers.
            waited = min(time.monotonic() - started, 1.0)
            for worker in [worker for worker in team if worker.busy]:
                reason = None
                if worker.pipe in ready:
                    worker.idle = 0.0
                    try:
                        kind, *content = worker.pipe.recv()
                    except (EOFError, OSError):
                        kind, reason = "dead", worker.why_dead()
                        code = worker.process.exitcode or 0
                        # Not if it was killed: that may happen to any process at any time.
                        if not worker.ready and code > 0:
                            raise RuntimeError(
                                f"{reason} while it started; a script that computes with several "
                                'processes needs the usual `if __name__ == "__main__":`'
                            ) from None
                        if code in _ENDED and worker.item not in ended:
                            # No fault of the item: the job is being stopped, and in a moment this
                            # process will know. If not, it is tried again, once.
                            worker.end()
                            ended.append(worker.item)
                            queue.append(worker.free())
                            continue
                    if kind == "ready":
                        worker.ready = True
                    elif kind == "tick":
                        report(worker.item, *content)
                    elif kind == "done":
                        yield worker.free(), content[0], None
                    elif kind == "error":
                        raise content[0]
                else:
                    worker.idle += waited
                    if timeout and worker.idle > timeout:
                        reason = f"no progress for {timeout:g} s: given up (see timeout)"
                if reason is not None:
                    worker.end()  # replaced when there is something to give it
                    yield worker.free(), None, reason
    finally:
        for worker in team:
            worker.process.kill()
        for worker in team:
            worker.end()


class _Worker:
    """A worker process as its parent sees it."""

    def __init__(self, job: Job[Any, Any]) -> None:
        # Spawn: a fork while threads of OpenCV or PyTorch run in the parent can hang.
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, job), daemon=True)
        self.busy = self.ready = False
        self.item: Any = None
        self.idle = 0.0  # seconds without a sign of life
        with _no_interrupt():
            self.process.start()
        theirs.close()  # so that the pipe ends when the process does

    def give(self, item: Any) -> None:  # noqa: ANN401
        """Hand over an item; OSError if the process is dead."""
        self.pipe.send(item)
        self.item, self.busy, self.idle = item, True, 0.0

    def free(self) -> Any:  # noqa: ANN401
        """Forget the item and return it."""
        item, self.item, self.busy = self.item, None, False
        return item

    def why_dead(self) -> str:
        """Say how the process ended."""
        self.process.join(5)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"{DIED} (exit code {code})"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = "killed, maybe for want of memory" if name == "SIGKILL" else "a crash in a library"
        return f"{DIED} ({name}: {hint})"

    def end(self) -> None:
        """Kill the process; what it had begun to write is no finished shard."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes started in the block do not see Ctrl-C: their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: connection.Connection, job: Job[Any, Any]) -> None:
    """Do what comes through the pipe, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # Before PyTorch or numba are loaded: one thread in each of the processes.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = "1"
    made, told = 0, 0.0

    def tick(share: float = 0.0, pairs: int = 0) -> None:
        nonlocal made, told
        made += pairs
        now = time.monotonic()
        if now - told >= _TELL:
            pipe.send(("tick", share, made))
            made, told = 0, now

    pipe.send(("ready",))
    with suppress(EOFError, OSError):  # the parent has gone
        while True:
            item = pipe.recv()
            try:
                result = job(item, tick)
            except Exception as error:
                try:
                    pickle.loads(pickle.dumps(error))
                except Exception:
                    error = RuntimeError(f"{type(error).__name__}: {error}")
                pipe.send(("error", error))
                continue
            told = 0.0
            tick(1.0)
            pipe.send(("done", result))


def _die_with_parent() -> None:
    """End this process as soon as its parent has ended, even if it was killed."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def run_on_ray(
    items: Sequence[Item],
    job: Job[Item, Result],
    workers: int,
    report: Report[Item],
    timeout: float = TIMEOUT,
) -> Results[Item, Result]:
    """Do what `run` does with Ray, `workers` tasks at a time, each with one processor.

    A task gets a source (a path), writes its shard itself and returns the small index: neither
    frames nor flow pass through Ray's object store. All machines must see the videos and the store
    under the same paths, and have the same ssl_flow installed.

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
    task = ray.remote(num_cpus=1, max_retries=0)(_ray_task)
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


def _ray_task(job: Job[Any, Any], item: Any, timeout: float) -> tuple[Any, int]:  # noqa: ANN401
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
