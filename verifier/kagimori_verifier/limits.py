"""How much a verifier takes on: requests from one source, and requests at all."""

from __future__ import annotations

import contextlib
import ipaddress
import threading
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_SOURCES: Final = 10_000
"""Sources remembered; the one not seen for longest is forgotten, so a flood of addresses allocates no more."""

_IPV6_SOURCE_BITS: Final = 64
"""The network that one IPv6 host is given: whoever has it has 2^64 addresses, and is one source all the same."""


def source_of(address: str) -> str:
    """Name the source that an address belongs to: itself, or the /64 of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, _IPV6_SOURCE_BITS), strict=False))


class Arriving:
    """Requests whose bodies are still arriving: so many at all, and so many of them from one source.

    They take memory and time that a slow sender chooses, so they have a limit of their own and hold up nobody whose
    request is there. For one event loop; not for threads.
    """

    def __init__(self, *, most: int, per_source: int) -> None:
        """Start with none."""
        self._most = most
        self._per_source = per_source
        self._sources: Counter[str] = Counter()

    @contextlib.contextmanager
    def one(self, source: str) -> Iterator[bool]:
        """Tell whether one more may arrive, and count it as long as the block lasts."""
        admitted = self._sources.total() < self._most and self._sources[source] < self._per_source
        if not admitted:
            yield False
            return
        self._sources[source] += 1
        try:
            yield True
        finally:
            self._sources[source] -= 1
            if not self._sources[source]:
                del self._sources[source]


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
