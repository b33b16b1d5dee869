"""A process that is told to end still does what has to come last: signals become an exception, and only the first one.

Python ends at once on SIGTERM, without any ``finally``; and whoever has the console may send SIGINT as often as they like,
also while the first one is being followed.

Import budget: the standard library.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_BY_SIGNAL: Final = 128
"""What shells add to a signal's number to make an exit code of it."""


@contextlib.contextmanager
def in_order() -> Iterator[None]:
    """Raise SystemExit in the block for the first signal that would end the process, and ignore all that follow."""
    if threading.current_thread() is not threading.main_thread():  # only that one may have handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}

    def end(number: int, _frame: object) -> None:
        for one in ENDING:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(_BY_SIGNAL + number)

    for number in ENDING:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def unheeded() -> Iterator[None]:
    """Heed no such signal in the block, not even the first: for what is short, and must be done whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
