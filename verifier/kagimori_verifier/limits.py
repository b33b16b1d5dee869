"""How much a verifier takes on: requests from one source, and requests at all."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_SOURCES: Final = 10_000
"""Sources remembered; the one not seen for longest is forgotten, so a flood of addresses allocates no more."""


class RateLimit:
    """A token bucket for each source: ``per_minute`` requests on average, ``burst`` at once."""

    def __init__(self, *, per_minute: int, burst: int, clock: Callable[[], float]) -> None:
        """Start with every bucket full. ``clock`` gives monotonic seconds."""
        self._per_second = per_minute / 60
        self._burst = float(burst)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait_s(self, source: str) -> float:
        """Take one request from a source's bucket: 0 if it may be served, else the seconds until it may ask again."""
        with self._lock:
            now = self._clock()
            tokens, then = self._buckets.pop(source, (self._burst, now))
            tokens = min(self._burst, tokens + max(0.0, now - then) * self._per_second)
            served = tokens >= 1
            self._buckets[source] = (tokens - 1 if served else tokens, now)
            if len(self._buckets) > MAX_SOURCES:
                self._buckets.popitem(last=False)
            return 0.0 if served else (1 - tokens) / self._per_second
