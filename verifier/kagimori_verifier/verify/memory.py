"""What pure functions have made of bytes that come again and again: certificates, their signatures, event logs.

A memory is no place for trust. What is remembered depends on nothing but the bytes that it is kept under, by SHA-256: that
they parse to this, that this key signed them, that this log leads to these PCR values. Which root counts, what is revoked,
what has expired and what a policy wants is looked at each time. What failed is not remembered, so a failure is made, and
explained, each time anew.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

Key = tuple[str, bytes]

ENTRY_WEIGHT: Final = 512
"""Bytes that an entry takes beside its value."""


class Memory:
    """Remembers up to ``most`` bytes, by the weights that it is told; what was not asked for longest goes first."""

    def __init__(self, most: int) -> None:
        """Remember nothing yet; nothing ever, if ``most`` is 0."""
        self._most = most
        self._weight = 0
        self._entries: OrderedDict[Key, tuple[int, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Any:  # noqa: ANN401 - whatever was kept under this key
        """Give what was kept under a key that ``key_of`` made, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][1]

    def keep(self, key: Key, value: object, weight: int) -> None:
        """Keep a value of about ``weight`` bytes that depends on nothing but what its key was made of."""
        weight += ENTRY_WEIGHT
        with self._lock:
            if key in self._entries or weight > self._most:
                return
            self._entries[key] = (weight, value)
            self._weight += weight
            while self._weight > self._most:
                _, (freed, _) = self._entries.popitem(last=False)
                self._weight -= freed

    def recall(self, what: str, *parts: bytes, weight: int, make: Callable[[], T]) -> T:
        """Give what ``make`` made of ``parts``, now or earlier; ``what`` names the function. Raises what it raises."""
        key = key_of(what, *parts)
        known: T | None = self.get(key)
        if known is not None:
            return known
        made = make()
        self.keep(key, made, weight)
        return made


NOTHING: Final = Memory(0)
"""For whoever asks once."""


def key_of(what: str, *parts: bytes) -> Key:
    """Name a function and the bytes that it was given; no two sequences of byte strings meet."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "big"))
        hashed.update(part)
    return what, hashed.digest()
