"""Turns to write: the threads of a program write one after the other, and what several wrote is committed once.

A commit waits for the disk, and meanwhile others queue. Whoever then writes before the last of the queue leaves its
changes to the next one's commit, and *waits for that commit* before it goes on: nobody is told of a change that is not
on the disk, and one access to the disk serves all who waited together. A turn that fails takes back its own changes only.

::

    turn 1   BEGIN  ...                                           (waits)      -> goes on
    turn 2          SAVEPOINT ... RELEASE                         (waits)      -> goes on
    turn 3                                SAVEPOINT ... ROLLBACK  (waits)      -> raises what it met
    turn 4                                          SAVEPOINT ... RELEASE COMMIT -> goes on

A turn sees what the turns before it wrote. Should the commit fail, all of them have failed; that is why a turn that met an
error waits as well: what it saw may have been the reason.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import SQLAlchemyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection

MOST_TURNS: Final = 64
"""Turns in one transaction, so that the first of them does not wait for ever."""

_SAVEPOINT: Final = "turn"


class NoTurn(Exception):
    """No turn came in the time that somebody had."""


class Turns:
    """The queue of one program's threads for its database, whatever the database itself does about other programs."""

    def __init__(self, begin: Callable[[], contextlib.AbstractContextManager[Connection]]) -> None:
        """Keep what begins a transaction, commits it as it ends, and rolls it back with what is raised."""
        self._begin = begin
        self._lock = threading.Lock()
        self._taken = False
        self._queue: deque[threading.Event] = deque()
        self._batch: _Batch | None = None  # touched by whoever has the turn

    @contextlib.contextmanager
    def one(self, patience_s: float) -> Iterator[Connection]:
        """Write in a turn; what was written is committed, and on the disk, when the block has ended.

        Raises NoTurn where none comes in ``patience_s`` seconds, and what beginning and committing raise.
        """
        self._take(patience_s)
        with contextlib.ExitStack() as later:
            try:
                if self._batch is None:
                    self._batch = _Batch(self._begin())
                later.callback(self._batch.wait)
                with self._batch.turn() as connection:
                    yield connection
            finally:
                self._pass_on()

    def _take(self, patience_s: float) -> None:
        ticket = threading.Event()
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            self._queue.append(ticket)
        try:
            called = ticket.wait(patience_s)
        except BaseException:
            if not self._leave(ticket):
                self._pass_on()
            raise
        if not called and self._leave(ticket):
            raise NoTurn

    def _leave(self, ticket: threading.Event) -> bool:
        """Leave the queue; False if it was this one's turn already."""
        with self._lock:
            waited = ticket in self._queue
            if waited:
                self._queue.remove(ticket)
            return waited

    def _pass_on(self) -> None:
        """Leave the transaction to the next in the queue, or end it and call the next."""
        heir = None
        if self._batch is not None and self._batch.goes_on:
            with self._lock:
                heir = self._queue.popleft() if self._queue else None
        if heir is None:
            batch, self._batch = self._batch, None
            if batch is not None:
                batch.end()
            with self._lock:
                heir = self._queue.popleft() if self._queue else None
                self._taken = heir is not None
        if heir is not None:
            heir.set()


class _Batch:
    """One transaction of several turns."""

    def __init__(self, begun: contextlib.AbstractContextManager[Connection]) -> None:
        """Begin it."""
        self._begun = begun
        self._connection = begun.__enter__()
        self._kept = 0
        self._broken: BaseException | None = None
        self._ended = threading.Event()
        self._error: BaseException | None = None

    @property
    def goes_on(self) -> bool:
        """Whether another turn may join: there is something to commit, and room."""
        return self._broken is None and 0 < self._kept < MOST_TURNS

    @contextlib.contextmanager
    def turn(self) -> Iterator[Connection]:
        """Write; what is raised inside takes back this turn's changes, and is raised again."""
        alone = not self._kept  # then there is nothing to keep when all is rolled back
        try:
            if not alone:
                self._connection.exec_driver_sql(f"SAVEPOINT {_SAVEPOINT}")
            yield self._connection
            if not alone:
                self._connection.exec_driver_sql(f"RELEASE {_SAVEPOINT}")
        except BaseException as error:
            if alone:
                self._broken = error
            else:
                self._take_back(error)
            raise
        self._kept += 1

    def end(self) -> None:
        """Commit, or roll back what cannot be kept; then those who wait go on."""
        broken = self._broken
        try:
            if broken is None:
                self._begun.__exit__(None, None, None)
            else:
                self._begun.__exit__(type(broken), broken, broken.__traceback__)
        except BaseException as error:  # noqa: BLE001 - raised again in every thread that waits
            self._error = error
        finally:
            self._ended.set()

    def wait(self) -> None:
        """Wait until the transaction has ended; raise what ended it."""
        self._ended.wait()
        if self._error is not None:
            raise self._error

    def _take_back(self, error: BaseException) -> None:
        try:
            self._connection.exec_driver_sql(f"ROLLBACK TO {_SAVEPOINT}")
            self._connection.exec_driver_sql(f"RELEASE {_SAVEPOINT}")
        except SQLAlchemyError as gone:
            # The whole transaction is, as SQLite does it where the disk is full or fails: nobody's changes are kept.
            self._broken = error if isinstance(error, SQLAlchemyError) else gone
