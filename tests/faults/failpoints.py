"""Points in the programs at which a process can end itself, as a crash would end it there.

Every statement and COMMIT of a writing transaction is one, by SQLAlchemy's own events: the seam below the store. The
others lie between the steps that docs/protocol.md tells apart: committed, unwrapped, stored, sent; prepared, collected,
opened, capped. Nothing of this exists in the product: it is put around its functions in processes of tests.launcher.
"""

from __future__ import annotations

import functools
import os
import re
import signal as signals
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import starlette.responses
from sqlalchemy import Engine, event
from sqlalchemy.engine.default import DefaultDialect

from kagimori_agent import attempt, cap, cli, collect, config, exchange, luks, unlock
from kagimori_agent.devices.vtpm import Vtpm
from kagimori_verifier import backup_format, luks_enrol, server, settings
from kagimori_verifier.keystore.kek import FileKek
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.service import Service
from kagimori_verifier.store import sqlite
from kagimori_verifier.store.turns import Turns

_TABLE = re.compile(r"\b(?:FROM|INTO|UPDATE|TABLE|INDEX|TRIGGER)\s+\"?(\w+)", re.IGNORECASE)


class Points:
    """Counts the points that this process passes, and ends it at one of them."""

    def __init__(self, record: str | None, at: str | None, signal: int) -> None:
        self._record = None if record is None else Path(record)
        self._at = at
        self._signal = signal
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.stage = ""
        """What is being done: the request that arrived last. One at a time, so threads need not tell."""

    def reach(self, name: str, stage: str = "") -> None:
        """Note a point as ``STAGE: NAME #N``, and end here if it is the one."""
        with self._lock:
            stage = stage or self.stage
            named = f"{stage}: {name}" if stage else name
            self._counts[named] += 1
            point = f"{named} #{self._counts[named]}"
            if self._record is not None:
                with self._record.open("a", encoding="utf-8") as file:
                    file.write(f"{point}\n")
        if point == self._at:
            os.kill(os.getpid(), self._signal)
            if self._signal == signals.SIGKILL:
                signals.pause()

    def around(self, place: Any, name: str, told: str) -> None:  # noqa: ANN401 - a module or a class
        """Make the moments just before and just after a function two points."""
        function: Callable[..., Any] = getattr(place, name)

        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever it takes and gives
            self.reach(f"before {told}")
            result = function(*arguments, **named)
            self.reach(f"after {told}")
            return result

        setattr(place, name, wrapped)


def arm(
    *,
    record: str | None = None,
    at: str | None = None,
    signal: int = signals.SIGKILL,
    busy_s: float | None = None,
    year: int | None = None,
    user: int | None = None,
) -> None:
    """Set the points of this process.

    ``busy_s`` makes the database impatient, ``year`` moves Python's wall clock, ``user`` is whose process it becomes.
    """
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    points = Points(record, at, signal)
    _watch_database(points)
    _watch_verifier(points)
    _watch_owner(points)
    _watch_agent(points)
    if busy_s is not None:
        setattr(sqlite, "BUSY_S", busy_s)  # noqa: B010 - Final in the product
    if year is not None:
        seconds = (year - 1970) * 365.25 * 86400
        time.time = lambda: seconds
        time.time_ns = lambda: int(seconds * 1e9)


def _watch_database(points: Points) -> None:
    """Each statement between BEGIN IMMEDIATE and COMMIT, and the COMMIT itself, whoever sends them."""
    writing: set[int] = set()

    def before_statement(connection: Any, _cursor: object, statement: str, *_: object) -> None:  # noqa: ANN401 - SQLAlchemy's
        raw = id(connection.connection.dbapi_connection)
        if statement == sqlite.BEGIN_WRITE:
            writing.add(raw)
        if raw in writing:
            table = _TABLE.search(statement)
            points.reach(
                f"before {statement.split(maxsplit=1)[0]} {table.group(1) if table else ''}".rstrip()
            )

    event.listen(Engine, "before_cursor_execute", before_statement)
    take = Turns._take

    def taken(self: Turns, patience_s: float) -> None:
        points.reach("before a turn to write is taken")
        take(self, patience_s)

    setattr(Turns, "_take", taken)  # noqa: B010 - a name that a type checker holds on to
    for name in ("do_commit", "do_rollback"):
        _watch_end(points, name, writing)


def _watch_end(points: Points, name: str, writing: set[int]) -> None:
    end = getattr(DefaultDialect, name)

    def ended(self: DefaultDialect, connection: Any) -> None:  # noqa: ANN401 - a connection of the driver, perhaps in a proxy
        raw = id(getattr(connection, "dbapi_connection", connection))
        counts = name == "do_commit" and raw in writing
        writing.discard(raw)
        if counts:
            points.reach("before COMMIT")
        end(self, connection)
        if counts:
            points.reach("after COMMIT")

    setattr(DefaultDialect, name, ended)


def _watch_verifier(points: Points) -> None:
    points.around(UnlockKeys, "unwrap", "a key is unwrapped")
    points.around(Service, "_sign", "the reply is signed")
    answer, send = server._answer, starlette.responses.Response.__call__

    async def answered(path: str, *rest: Any) -> Any:  # noqa: ANN401 - whatever _answer takes
        points.stage = path.rpartition("/")[2]
        points.reach("the request has arrived")
        return await answer(path, *rest)

    async def sent(self: Any, scope: Any, *rest: Any) -> None:  # noqa: ANN401 - ASGI's
        await send(self, scope, *rest)
        if scope["path"].startswith("/v1/"):
            points.reach("after the reply is sent", scope["path"].rpartition("/")[2])

    setattr(server, "_answer", answered)  # noqa: B010 - as above
    setattr(starlette.responses.Response, "__call__", sent)  # noqa: B010 - as above


def _watch_owner(points: Points) -> None:
    points.around(luks_enrol, "_run", "cryptsetup runs")
    points.around(luks_enrol, "keep", "the old header is kept")
    points.around(luks_enrol, "_write", "a part of the header is written")
    points.around(FileKek, "create", "the KEK is made")
    points.around(settings, "load", "the settings are read")
    points.around(sqlite, "create_file", "the database's file is made")
    points.around(sqlite, "copy", "the database is copied")
    points.around(backup_format, "write", "a backup is written")
    points.around(Path, "mkdir", "a directory is made")
    points.around(Path, "rename", "a file gets its name")
    points.around(Path, "replace", "a file takes another's place")
    points.around(os, "fsync", "a file is synchronised")


def _watch_agent(points: Points) -> None:
    points.around(config, "load", "agent.toml is read")
    for kind in (collect.SvsmVtpm, collect.SnpDirect):
        points.around(kind, "prepare", "keys are made")
        points.around(kind, "collect", "evidence is collected")
        points.around(kind, "open_credential", "the credential is opened")
    points.around(exchange, "ask_all", "challenges are drawn")
    points.around(exchange, "post", "something is sent")
    points.around(attempt, "_open", "the answer is opened")
    points.around(luks, "open_volume", "a volume is opened")
    points.around(luks, "_run", "cryptsetup gets the key")
    points.around(unlock, "cap_boot", "the unlock caps")
    points.around(Vtpm, "measure", "the cap PCR is extended")
    points.around(cap, "cap", "capping")
    points.around(cli, "_print_json", "the result is told")
