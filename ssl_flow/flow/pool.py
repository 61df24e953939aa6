"""Runs one job for each source, here or in worker processes, and shows how far it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.context import SpawnContext
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Tick = Callable[[], None]  # a job calls it once for each pair it has made
Job = Callable[[Item, Tick], Result]

_DIED = "its worker process died (out of memory, killed, or a crash in a library)"


def run(
    items: Sequence[Item],
    job: Job[Item, Result],
    workers: int,
    pairs: Callable[[int], None],
) -> Iterator[tuple[Item, Result | None, str | None]]:
    """Yield (item, result, None), or (item, None, reason) where a worker died, as they finish.

    Args:
        items: what to work on; picklable if `workers` > 1, as is `job`.
        job: called as job(item, tick).
        workers: number of processes; 1 works in this one.
        pairs: told from time to time how many ticks there have been in all.

    Raises:
        Whatever a job raises; work that has not begun is then dropped.
    """
    if workers > 1:
        yield from _in_pool(deque(items), job, workers, pairs)
        return
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        pairs(count)

    for item in items:
        yield item, job(item, tick), None


def _in_pool(
    queue: deque[Item],
    job: Job[Item, Result],
    workers: int,
    pairs: Callable[[int], None],
) -> Iterator[tuple[Item, Result | None, str | None]]:
    # Spawn: a fork while OpenCV or PyTorch threads run in the parent can hang.
    context = get_context("spawn")
    counter = context.Value("q", 0)
    while queue:
        pending: dict[Future[Any], Item] = {}
        pool = _pool(workers, context, counter)
        try:
            while queue or pending:
                while queue and len(pending) < 2 * workers:
                    # Not taken from the queue before it is accepted: the pool may be broken.
                    future = pool.submit(_call, job, queue[0])
                    pending[future] = queue.popleft()
                done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                pairs(counter.value)
                for future in done:
                    result = future.result()
                    yield pending.pop(future), result, None
        except BrokenProcessPool:
            pass  # one of `pending` killed its process, and with it the pool
        finally:
            pool.shutdown(cancel_futures=True)
        for item in pending.values():  # one by one, so that the guilty one shows itself
            with _pool(1, context, counter) as single:
                try:
                    yield item, single.submit(_call, job, item).result(), None
                except BrokenProcessPool:
                    yield item, None, _DIED


def _pool(workers: int, context: SpawnContext, counter: object) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, context, initializer=_share, initargs=(counter,))


_counter: Any = None  # in a worker process: the number of pairs made by all of them


def _share(counter: object) -> None:
    global _counter
    _counter = counter


def _tick() -> None:
    with _counter.get_lock():
        _counter.value += 1


def _call(job: Job[Item, Result], item: Item) -> Result:
    return job(item, _tick)


class Bar:
    """A progress bar on stderr: sources done, time left, pairs and pairs a second."""

    def __init__(self, total: int, enabled: bool) -> None:
        """Show nothing if not `enabled`."""
        self._bar: Any = None
        if enabled:
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError("the progress bar needs tqdm: pip install tqdm") from error
            self._bar = tqdm(total=total, unit="video", dynamic_ncols=True)

    def __enter__(self) -> Bar:
        """Return the bar."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.close()

    def pairs(self, count: int) -> None:
        """Show the number of pairs made so far."""
        if self._bar is not None:
            rate = count / max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(f"{count} pairs, {rate:.1f} pairs/s", refresh=False)
            self._bar.update(0)

    def source_done(self) -> None:
        """Count one source."""
        if self._bar is not None:
            self._bar.update(1)
