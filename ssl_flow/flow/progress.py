"""The progress bar of an extraction."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any


class Bar:
    """A bar on stderr: work done and left by weight, videos, pairs and pairs a second.

    Videos count by their size in bytes and by how far each has been read, so that the time left is
    right for three films as it is for a thousand clips.
    """

    def __init__(self, weights: Mapping[str, float], enabled: bool) -> None:
        """Show nothing if not `enabled`; `weights` is the size of each source by its name."""
        self._weights = weights
        self._shares: dict[str, float] = {}  # of the sources that are not done
        self._done_weight = 0.0
        self._done = self._pairs = 0
        self._shown = 0.0
        self._bar: Any = None
        if enabled:
            try:
                from tqdm import tqdm
            except ImportError as error:
                raise ImportError("the progress bar needs tqdm: pip install tqdm") from error
            self._bar = tqdm(
                total=sum(weights.values()),
                smoothing=0,  # the mean speed: that of the last seconds jumps from clip to clip
                bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
                dynamic_ncols=True,
            )

    def __enter__(self) -> Bar:
        """Return the bar."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._show()
            self._bar.close()

    def report(self, name: str, share: float, pairs: int) -> None:
        """Take note that `share` of a source is done, and of pairs that are new."""
        self._pairs += pairs
        self._shares[name] = max(share, self._shares.get(name, 0.0))
        if self._bar is not None and time.monotonic() - self._shown > 0.1:
            self._show()

    def done(self, name: str) -> None:
        """Take note that nothing is left to do for a source."""
        self._shares.pop(name, None)
        self._done_weight += self._weights[name]
        self._done += 1
        if self._bar is not None:
            self._show()

    @property
    def weight(self) -> float:
        """What is done, in the unit of the weights."""
        parts = (share * self._weights[name] for name, share in self._shares.items())
        return self._done_weight + sum(parts)

    def _show(self) -> None:
        self._shown = time.monotonic()
        rate = self._pairs / max(self._bar.format_dict["elapsed"], 1e-9)
        videos = f"{self._done}/{len(self._weights)} videos"
        text = f"{videos}, {self._pairs} pairs, {rate:.1f} pairs/s"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(min(self.weight, self._bar.total) - self._bar.n)
