"""What a database can do wrong, done to a real SQLite file: every failure has a name and leaves nothing half-written."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import event, text

from kagimori_protocol.errors import OperatorError
from kagimori_verifier.store import (
    Conflict,
    Store,
    StoreUnavailable,
    profiles,
    refusals,
    settings,
    sqlite,
    vms,
)
from kagimori_verifier.store.profiles import ProfileRow
from kagimori_verifier.store.refusals import Refusal
from kagimori_verifier.store.vms import VmRow

NOBODY = 65534


def _url(path: Path) -> str:
    return f"sqlite:///{path}"


class _Interrupted(Exception):
    """Whatever may be raised inside a transaction."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Say where the database lies."""
    return tmp_path / "verifier.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """Make a new database."""
    made = Store.create(_url(path))
    yield made
    made.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a fifth of a second for a lock instead of five."""
    monkeypatch.setattr(sqlite, "BUSY_S", 0.2)


@contextmanager
def _other_program(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run Python in a process of its own, up to the line that it prints; end it afterwards."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Act as a user whom modes bind; a developer who is not root is one already."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def _value(store: Store, name: str = "name") -> str | None:
    with store.read() as txn:
        return settings.get(txn, name)


def test_what_is_written_is_there_for_the_next_program(store: Store, path: Path) -> None:
    """A committed transaction outlives its store."""
    with store.write() as txn:
        settings.put(txn, "name", "first")
        settings.put(txn, "name", "second")
    store.close()
    again = Store.open(_url(path))
    assert _value(again) == "second"
    again.close()


def test_a_transaction_that_raises_leaves_nothing(store: Store) -> None:
    """Whatever is raised inside passes through unchanged, and takes the transaction with it."""

    def write_and_fail() -> None:
        with store.write() as txn:
            settings.put(txn, "name", "half")
            raise _Interrupted

    with pytest.raises(_Interrupted):
        write_and_fail()
    assert _value(store) is None


def test_only_its_owner_can_read_a_new_database(store: Store, path: Path) -> None:
    """Wrapped keys are no secret, and still nobody's business: the file and its journals have mode 0600."""
    with store.write() as txn:
        settings.put(txn, "name", "value")
    files = list(path.parent.iterdir())
    assert {file.name for file in files} == {"verifier.db", "verifier.db-wal", "verifier.db-shm"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_every_connection_is_durable_and_strict(store: Store) -> None:
    """The ledger is worth what the synchronisation of its last line is."""
    with store.read() as first, store.read() as second:
        for txn in (first, second):
            pragmas = {
                name: txn.execute(text(f"PRAGMA {name}")).scalar_one()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
            assert pragmas == {
                "journal_mode": "wal",
                "synchronous": 2,
                "foreign_keys": 1,
                "busy_timeout": 5000,
            }


def test_a_read_sees_one_moment(store: Store) -> None:
    """A write in between does not change what a transaction sees."""
    with store.read() as txn:
        assert settings.get(txn, "name") is None
        with store.write() as other:
            settings.put(other, "name", "meanwhile")
        assert settings.get(txn, "name") is None
    assert _value(store) == "meanwhile"


def test_writers_wait_for_each_other(store: Store) -> None:
    """Whoever reads inside a write transaction reads what nobody can change before it writes: no update is lost."""

    def count() -> None:
        for _ in range(10):
            with store.write() as txn:
                settings.put(txn, "count", str(int(settings.get(txn, "count") or 0) + 1))

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _value(store, "count") == "80"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("use", ["write", "read"])
def test_a_database_that_another_program_holds_is_locked(path: Path, use: str) -> None:
    """Someone has it exclusively: this is said, and once they are gone everything works again."""
    code = (
        "import sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA locking_mode=EXCLUSIVE')\n"
        "c.execute('BEGIN EXCLUSIVE')\n"
        "c.execute('DELETE FROM setting')\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    store = Store.create(_url(path))
    store.close()  # nobody gets it exclusively while a connection is open
    begin = {"write": store.write, "read": store.read}[use]
    with _other_program(code, path):
        with pytest.raises(StoreUnavailable) as caught, begin() as txn:
            settings.get(txn, "name")
        assert caught.value.code == "store.locked"
        with pytest.raises(StoreUnavailable) as caught:
            Store.open(_url(path))
        assert caught.value.code == "store.locked"
    with store.write() as txn:
        settings.put(txn, "name", "afterwards")
    assert _value(store) == "afterwards"
    store.close()


@pytest.mark.usefixtures("impatient")
def test_a_long_write_elsewhere_locks_writers_only(path: Path) -> None:
    """WAL: readers read on while another program writes, and a writer that waited too long says why."""
    code = (
        "import sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('BEGIN EXCLUSIVE')\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    store = Store.create(_url(path))
    with _other_program(code, path):
        assert _value(store) is None
        store.ping()
        with pytest.raises(StoreUnavailable) as caught, store.write():
            pytest.fail("two programs write at once")
        assert caught.value.code == "store.locked"
    store.close()


def test_a_full_disk_is_named_and_nothing_half_is_kept(path: Path) -> None:
    """The transaction that met it is gone, what was there before stays, and a smaller one may still fit."""
    store = Store.create(_url(path))
    with store.write() as txn:
        settings.put(txn, "name", "before")
        pages = txn.execute(text("PRAGMA page_count")).scalar_one()
    event.listen(
        store._engine, "connect", lambda one, _: one.execute(f"PRAGMA max_page_count={pages + 2}").close()
    )
    store.close()

    def write_too_much() -> None:
        with store.write() as txn:
            settings.put(txn, "name", "after")
            settings.put(txn, "large", "x" * 100_000)

    with pytest.raises(StoreUnavailable) as caught:
        write_too_much()
    assert caught.value.code == "store.full"
    assert _value(store) == "before"
    assert _value(store, "large") is None
    with store.write() as txn:
        settings.put(txn, "name", "small")
    assert _value(store) == "small"
    store.close()


def test_a_database_that_may_not_be_written_is_read_only() -> None:
    """Reading goes on; a write says what to do, and has written nothing."""
    with tempfile.TemporaryDirectory(prefix="kagimori-store-") as name:
        directory = Path(name)
        directory.chmod(0o777)  # whom the modes bind may make SQLite's journals, but not write the database
        path = directory / "verifier.db"
        Store.create(_url(path)).close()
        path.chmod(0o444)
        with _as_nobody():
            store = Store.open(_url(path))
            assert _value(store) is None
            with pytest.raises(StoreUnavailable) as caught, store.write() as txn:
                settings.put(txn, "name", "value")
            assert caught.value.code == "store.read-only"
            assert _value(store) is None
            store.close()


def test_a_database_that_may_not_be_made_is_read_only() -> None:
    """A directory that the verifier's user may not write is named before SQLite tries."""
    with tempfile.TemporaryDirectory(prefix="kagimori-store-") as name:
        directory = Path(name)
        directory.chmod(0o555)
        with _as_nobody(), pytest.raises(StoreUnavailable) as caught:
            Store.create(_url(directory / "verifier.db"))
        directory.chmod(0o755)
        assert caught.value.code == "store.read-only"
        assert not list(directory.iterdir())


@pytest.mark.parametrize("where", ["verifier.db", "nowhere/verifier.db"])
def test_a_missing_database_is_gone_and_is_not_made_by_looking(tmp_path: Path, where: str) -> None:
    """Opening what is not there leaves no empty file behind that would look like a new verifier's."""
    with pytest.raises(StoreUnavailable) as caught:
        Store.open(_url(tmp_path / where))
    assert caught.value.code == "store.gone"
    assert "kagimori-verifier init" in (caught.value.todo or "")
    assert not list(tmp_path.iterdir())


def test_a_database_deleted_in_use_is_gone(store: Store, path: Path) -> None:
    """Its open file could still be written, and a restart would forget every session that was redeemed in it."""
    path.unlink()
    for use in (store.read, store.write):
        with pytest.raises(StoreUnavailable) as caught, use():
            pytest.fail("a deleted database is used")
        assert caught.value.code == "store.gone"
    with pytest.raises(StoreUnavailable):
        store.ping()
    assert not path.exists()


def test_a_database_replaced_in_use_is_gone(store: Store, path: Path, tmp_path: Path) -> None:
    """A backup moved over it has other keys and other sessions: the verifier has to start again with it."""
    backup = tmp_path / "backup.db"
    Store.create(_url(backup)).close()
    backup.replace(path)
    with pytest.raises(StoreUnavailable) as caught, store.write():
        pytest.fail("another database is used")
    assert (caught.value.code, caught.value.found) == ("store.gone", "another file")


@pytest.mark.parametrize("content", [b"no database, whatever its name says\n" * 400, os.urandom(8192)])
def test_a_file_that_is_no_database_is_broken(path: Path, content: bytes) -> None:
    """Neither opening nor making one touches a file that is something else."""
    path.write_bytes(content)
    for use in (Store.open, Store.create):
        with pytest.raises(StoreUnavailable) as caught:
            use(_url(path))
        assert caught.value.code == "store.broken"
    assert path.read_bytes() == content


def test_a_damaged_database_is_broken(path: Path) -> None:
    """Pages overwritten with noise are an error of the operator's disk, not a traceback."""
    store = Store.create(_url(path))
    with store.write() as txn:
        for number in range(200):
            settings.put(txn, f"name {number}", "x" * 200)
    store.close()
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(StoreUnavailable) as caught:
        Store.open(_url(path)).ping()
    assert caught.value.code == "store.broken"


def test_a_column_that_holds_no_json_is_broken(store: Store, path: Path) -> None:
    """What this release cannot have written is not believed: a list of purposes that is none allows nothing."""
    with store.write() as txn:
        profiles.add(txn, ProfileRow("p", "{}", 0))
        vms.add(txn, VmRow("web1", "p", True, ["unlock"], [], 0))
    for purposes in ("unlock", '["everything"]', "{}", ""):
        with closing(sqlite3.connect(path)) as other, other:
            other.execute("UPDATE vm SET purposes = ?", (purposes,))
        with pytest.raises(StoreUnavailable) as caught, store.read() as txn:
            vms.get(txn, "web1")
        assert caught.value.code == "store.broken"


def test_a_writer_killed_in_the_middle_leaves_nothing(path: Path) -> None:
    """With kill -9 between two statements: the first is not there, and the next writer does not wait for the dead."""
    code = (
        "import sys\n"
        "from kagimori_verifier.store import Store, settings\n"
        "store = Store.open(sys.argv[1])\n"
        "with store.write() as txn:\n"
        "    settings.put(txn, 'name', 'x' * 3_000_000)\n"  # more than SQLite's cache: some of it is on the disk
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    store = Store.create(_url(path))
    with _other_program(code, _url(path)) as process:
        assert path.with_name("verifier.db-wal").stat().st_size > 1_000_000
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert _value(store) is None
    with store.write() as txn:
        settings.put(txn, "name", "alive")
    assert _value(store) == "alive"
    store.close()


@pytest.mark.parametrize(
    "url", ["", "verifier.db", "sqlite://", "sqlite:///:memory:", "nosuch:///verifier.db", "oracle://h/d"]
)
def test_a_url_that_names_no_database_is_the_operators_error(url: str) -> None:
    """Also one for a driver that is not installed, and SQLite in memory, which keeps nothing."""
    for use in (Store.create, Store.open):
        with pytest.raises(OperatorError) as caught:
            use(url)
        assert caught.value.code == "store.url"


def test_a_path_with_characters_of_urls_is_that_path(tmp_path: Path) -> None:
    """A directory called "50% #1?" is a directory: nothing of its name becomes an option of SQLite or alembic."""
    directory = tmp_path / "50% #1 &mode=memory"
    directory.mkdir()
    store = Store.create(_url(directory / "verifier.db"))
    with store.write() as txn:
        settings.put(txn, "name", "here")
    store.close()
    assert (directory / "verifier.db").stat().st_size > 0


def test_a_name_that_is_taken_is_a_conflict_and_not_a_broken_disk(store: Store) -> None:
    """The operator is told about the change, not sent to look for backups."""

    def add() -> None:
        with store.write() as txn:
            settings.put(txn, "tried", "yes" if settings.get(txn, "tried") is None else "again")
            profiles.add(txn, ProfileRow("p", "{}", 0))

    add()
    with pytest.raises(Conflict) as caught:
        add()
    assert caught.value.code == "store.conflict"
    assert not isinstance(caught.value, StoreUnavailable)
    assert _value(store, "tried") == "yes"


def test_the_ring_of_refusals_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever causes them is unproven: however many come, the newest are kept, and no more than so many."""
    monkeypatch.setattr(refusals, "MAX_REFUSALS", 10)
    with store.write() as txn:
        for number in range(25):
            refusals.note(
                txn, Refusal(number, "/v1/release", f"{number % 2:016x}", None, "c", "e", "f", "10.0.0.1")
            )
        kept = refusals.newest(txn, 100)
        assert [row.created for row in kept] == list(range(24, 14, -1))
        assert [row.created for row in refusals.newest(txn, 2, session=f"{0:016x}")] == [24, 22]
        assert refusals.newest(txn, 100, vm_id="web1") == ()
