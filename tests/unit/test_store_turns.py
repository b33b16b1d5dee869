"""Threads that write at once share a commit, and none of them goes on before it: no sync is traded for speed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine.default import DefaultDialect

from kagimori_protocol.errors import NotAuthentic, UsageError
from kagimori_verifier.store import Store, StoreUnavailable, settings, sqlite, turns
from kagimori_verifier.store.database import Txn

WAIT_S = 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Say where the database lies."""
    return tmp_path / "verifier.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """Make a new database."""
    made = Store.create(f"sqlite:///{path}")
    yield made
    made.close()


@pytest.fixture
def commits(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Collect when each writing transaction was committed."""
    ended: list[float] = []
    writing: set[int] = set()
    commit: Callable[[DefaultDialect, Any], None] = DefaultDialect.do_commit

    @event.listens_for(store._engine, "before_cursor_execute")
    def look(connection: Any, _cursor: object, statement: str, *_rest: object) -> None:  # noqa: ANN401 - SQLAlchemy's
        if statement == sqlite.BEGIN_WRITE:
            writing.add(id(connection.connection.dbapi_connection))

    def counted(self: DefaultDialect, connection: Any) -> None:  # noqa: ANN401 - a connection of the driver
        commit(self, connection)
        raw = getattr(connection, "dbapi_connection", connection)
        if id(raw) in writing:
            writing.discard(id(raw))
            ended.append(time.monotonic())

    monkeypatch.setattr(DefaultDialect, "do_commit", counted)
    return ended


class Crowd:
    """Threads that want to write while another one does."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.results: dict[str, BaseException | float] = {}

    def write(self, jobs: dict[str, Callable[[Txn], None]], first: Callable[[Txn], None]) -> None:
        """Let ``first`` write until all others are queued behind it, in order; then all of them go through."""
        begun, go = threading.Event(), threading.Event()

        def hold(txn: Txn) -> None:
            begun.set()
            assert go.wait(WAIT_S)
            first(txn)

        threads = [threading.Thread(target=self._one, args=("first", hold))]
        threads[0].start()
        assert begun.wait(WAIT_S)
        for number, (name, job) in enumerate(jobs.items(), 1):
            threads.append(threading.Thread(target=self._one, args=(name, job)))
            threads[-1].start()
            until = time.monotonic() + WAIT_S
            while len(self._store._turns._queue) < number and time.monotonic() < until:
                time.sleep(0.001)
        go.set()
        for thread in threads:
            thread.join(WAIT_S)

    def _one(self, name: str, job: Callable[[Txn], None]) -> None:
        try:
            with self._store.write() as txn:
                job(txn)
            self.results[name] = time.monotonic()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.results[name] = error


def put(name: str) -> Callable[[Txn], None]:
    """Give a job that writes one setting."""
    return lambda txn: settings.put(txn, name, "kept")


def kept(store: Store, *names: str) -> list[str]:
    """Name the settings that the database has."""
    with store.read() as txn:
        return [name for name in names if settings.get(txn, name) == "kept"]


def test_who_waited_together_is_committed_together_and_goes_on_after_it(
    store: Store, commits: list[float]
) -> None:
    """One access to the disk serves all; and none returned from its write before that access had ended."""
    crowd = Crowd(store)
    crowd.write({"second": put("b"), "third": put("c")}, put("a"))
    assert len(commits) == 1
    times = [at for at in crowd.results.values() if isinstance(at, float)]
    assert len(times) == 3
    assert min(times) >= commits[0]
    assert kept(store, "a", "b", "c") == ["a", "b", "c"]


def test_nobody_reads_or_goes_on_with_what_is_not_on_the_disk_yet(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the last turn still writes, the first has ended its own and waits; a reader sees neither."""
    at_last, go = threading.Event(), threading.Event()
    seen: list[object] = []

    def last(txn: Txn) -> None:
        settings.put(txn, "b", "kept")
        at_last.set()
        assert go.wait(WAIT_S)

    crowd = Crowd(store)

    def look() -> None:
        assert at_last.wait(WAIT_S)
        time.sleep(0.05)
        seen.extend((dict(crowd.results), kept(store, "a", "b")))
        go.set()

    looker = threading.Thread(target=look)
    looker.start()
    crowd.write({"second": last}, put("a"))
    looker.join(WAIT_S)
    assert seen == [{}, []]
    assert kept(store, "a", "b") == ["a", "b"]


def test_a_turn_that_fails_takes_back_its_own_changes_only(store: Store, commits: list[float]) -> None:
    """A denial in the middle of a batch costs nobody else anything, and is told for what it is."""

    def refused(txn: Txn) -> None:
        settings.put(txn, "b", "kept")
        raise NotAuthentic("Used already.", code="session.unused")

    crowd = Crowd(store)
    crowd.write({"second": refused, "third": put("c")}, put("a"))
    assert isinstance(crowd.results["second"], NotAuthentic)
    assert (len(commits), kept(store, "a", "b", "c")) == (1, ["a", "c"])


def test_a_first_turn_that_fails_leaves_the_next_a_transaction_of_its_own(
    store: Store, commits: list[float]
) -> None:
    """Nothing was there to be kept, so all of it is rolled back."""

    def refused(txn: Txn) -> None:
        settings.put(txn, "a", "kept")
        raise UsageError("No.")

    crowd = Crowd(store)
    crowd.write({"second": put("b"), "third": put("c")}, refused)
    assert isinstance(crowd.results["first"], UsageError)
    assert (len(commits), kept(store, "a", "b", "c")) == (1, ["b", "c"])


def test_a_last_turn_that_fails_still_commits_what_was_left_to_it(store: Store, commits: list[float]) -> None:
    """Whoever relied on the next one's commit has it, even if that one has nothing of its own to commit."""

    def refused(txn: Txn) -> None:
        settings.put(txn, "b", "kept")
        raise UsageError("No.")

    crowd = Crowd(store)
    crowd.write({"second": refused}, put("a"))
    assert (len(commits), kept(store, "a", "b")) == (1, ["a"])


def test_a_commit_that_fails_is_told_to_everyone_in_it(store: Store, path: Path) -> None:
    """Also to the turn that had an error of its own: what it saw was never kept, so that error may be none."""

    def refused(txn: Txn) -> None:
        assert settings.get(txn, "a") == "kept"
        raise NotAuthentic("Used already.", code="session.unused")

    def take_away(txn: Txn) -> None:
        settings.put(txn, "c", "kept")
        path.rename(path.with_name("elsewhere"))

    crowd = Crowd(store)
    crowd.write({"second": refused, "third": take_away}, put("a"))
    told = {name: getattr(error, "code", error) for name, error in crowd.results.items()}
    assert told == dict.fromkeys(("first", "second", "third"), "store.gone")
    path.with_name("elsewhere").rename(path)
    assert kept(store, "a", "c") == []


def test_a_transaction_that_the_database_gave_up_fails_everyone_in_it(store: Store) -> None:
    """As SQLite does it where the disk is full: nobody goes on with changes that are gone."""

    def gone(txn: Txn) -> None:
        txn.execute(text("ROLLBACK"))
        txn.execute(text("SELECT no_such_column FROM setting"))

    crowd = Crowd(store)
    crowd.write({"second": gone, "third": put("c")}, put("a"))
    assert isinstance(crowd.results["first"], StoreUnavailable)
    assert isinstance(crowd.results["second"], StoreUnavailable)
    assert kept(store, "a", "c") == ["c"]


def test_a_batch_has_a_last_turn(store: Store, commits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many queue, the first of them is not kept waiting for all."""
    monkeypatch.setattr(turns, "MOST_TURNS", 2)
    Crowd(store).write({name: put(name) for name in "bcde"}, put("a"))
    assert len(commits) == 3
    assert kept(store, *"abcde") == list("abcde")


def test_who_leaves_the_queue_leaves_no_transaction_behind(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that gave up waiting is nobody's heir: the one before it commits by itself."""
    monkeypatch.setattr(sqlite, "BUSY_S", 0.05)
    crowd = Crowd(store)

    def slow(txn: Txn) -> None:
        second.start()
        settings.put(txn, "a", "kept")
        until = time.monotonic() + WAIT_S
        while "second" not in crowd.results and time.monotonic() < until:
            time.sleep(0.001)

    second = threading.Thread(target=crowd._one, args=("second", put("b")))
    first = threading.Thread(target=crowd._one, args=("first", slow))
    first.start()
    first.join(WAIT_S)
    second.join(WAIT_S)
    assert getattr(crowd.results["second"], "code", None) == "store.locked"
    assert isinstance(crowd.results["first"], float)
    assert kept(store, "a", "b") == ["a"]


def test_a_storm_of_writers_keeps_every_change_and_shares_commits(store: Store, commits: list[float]) -> None:
    """Eight threads of a hundred writes each, some failing: what returned is there, what raised is not."""
    done: set[str] = set()
    failed: set[str] = set()

    def write_many(thread: int) -> None:
        for number in range(100):
            name = f"{thread}-{number}"
            try:
                with store.write() as txn:
                    settings.put(txn, name, "kept")
                    if number % 10 == thread:
                        raise UsageError("No.")
                done.add(name)
            except UsageError:
                failed.add(name)

    threads = [threading.Thread(target=write_many, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert (len(done), len(failed)) == (720, 80)
    assert kept(store, *done) == list(done)
    assert kept(store, *failed) == []
    assert len(commits) < len(done)


def test_a_connection_that_another_thread_took_meanwhile_is_replaced(store: Store) -> None:
    """Between a look and a grasp there may be another thread."""

    class TakenMeanwhile(list[Any]):
        def __bool__(self) -> bool:
            return True

    store._idle = TakenMeanwhile()
    store.ping()
    assert len(store._idle) == 1
    store._idle = list(store._idle)
