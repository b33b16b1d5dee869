"""The ledger's chain: what is changed, removed or slipped in shows at the first line that it touches."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from kagimori_protocol.errors import OperatorError
from kagimori_verifier import ledger
from kagimori_verifier.ledger import LedgerBroken
from kagimori_verifier.store import Conflict, Store, StoreUnavailable

SESSION = "00112233aabbccdd"


class _Interrupted(Exception):
    """Whatever may be raised inside a transaction."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Say where the database lies."""
    return tmp_path / "verifier.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """Make a ledger of five lines."""
    made = Store.create(f"sqlite:///{path}")
    with made.write() as txn:
        for number in range(1, 6):
            ledger.append(
                txn,
                at_s=1_700_000_000 + number,
                event="released" if number % 2 else "refused",
                vm_id=f"web{number}",
                session=SESSION if number > 3 else None,
                body={"purpose": "unlock", "number": number, "checks": [{"id": "vm.known", "ok": True}]},
            )
    yield made
    made.close()


def _tamper(path: Path, *statements: str) -> None:
    """Do what whoever owns the database can do: drop the triggers, and then anything."""
    with closing(sqlite3.connect(path)) as other, other:
        for trigger in ("ledger_no_update", "ledger_no_delete", "ledger_next"):
            other.execute(f"DROP TRIGGER {trigger}")
        for statement in statements:
            assert other.execute(statement).rowcount != 0, "the statement changed nothing"


def _verify(store: Store) -> tuple[int, bytes]:
    with store.read() as txn:
        return ledger.verify(txn)


def test_a_line_is_bound_to_all_before_it(store: Store) -> None:
    """The hash is what docs/protocol.md says, computed here from the parts by hand."""
    with store.read() as txn:
        newest_first = ledger.read(txn)
    lines = newest_first[::-1]
    assert [line.seq for line in lines] == [1, 2, 3, 4, 5]
    previous = bytes(32)
    for line in lines:
        session = f'"{line.session}"' if line.session else "null"
        body = f'{{"checks":[{{"id":"vm.known","ok":true}}],"number":{line.seq},"purpose":"unlock"}}'
        canonical = (
            f'{{"body":{body},"created":{line.created},"event":"{line.event}","seq":{line.seq},'
            f'"session":{session},"vm_id":"{line.vm_id}"}}'
        )
        assert line.previous == previous
        previous = hashlib.sha256(b"kagimori/1/ledger\x00" + previous + canonical.encode()).digest()
        assert line.hash == previous
    assert _verify(store) == (5, previous)


def test_the_entry_returned_is_the_entry_kept(store: Store) -> None:
    """What append gives back is what a reader finds, also with characters that JSON escapes."""
    with store.write() as txn:
        entry = ledger.append(
            txn, at_s=1, event="e", vm_id=None, session=None, body={"b": 'a "line"\n\x00 ünï', "a": [None]}
        )
        assert ledger.read(txn, limit=1) == (entry,)
    assert _verify(store) == (6, entry.hash)


def test_an_empty_ledger_holds(tmp_path: Path) -> None:
    """Nothing was decided yet: no lines, and the head is what the first line will name."""
    store = Store.create(f"sqlite:///{tmp_path / 'empty.db'}")
    assert _verify(store) == (0, bytes(32))
    store.close()


def test_lines_are_read_newest_first_and_by_vm_or_session(store: Store) -> None:
    """A limit keeps the newest."""
    with store.read() as txn:
        assert [line.seq for line in ledger.read(txn, limit=2)] == [5, 4]
        assert [line.seq for line in ledger.read(txn, session=SESSION)] == [5, 4]
        assert [line.seq for line in ledger.read(txn, vm_id="web2")] == [2]
        assert ledger.read(txn, vm_id="web2", session=SESSION) == ()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger SET event = 'refused' WHERE seq = 1",
        "UPDATE ledger SET body = body",
        "DELETE FROM ledger WHERE seq = 5",
        "DELETE FROM ledger",
        "INSERT OR REPLACE INTO ledger SELECT seq, previous, hash, created, 'x', vm_id, session, body FROM ledger",
        "INSERT INTO ledger SELECT 7, previous, hash, created, event, vm_id, session, body FROM ledger LIMIT 1",
        "INSERT INTO ledger SELECT 0, previous, hash, created, event, vm_id, session, body FROM ledger LIMIT 1",
    ],
)
def test_the_database_refuses_every_change_but_a_next_line(store: Store, path: Path, statement: str) -> None:
    """Against accidents, from any program: lines are neither changed nor removed nor replaced nor left out."""
    before = _verify(store)
    with closing(sqlite3.connect(path)) as other, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        other.execute(statement)
    assert _verify(store) == before


def test_a_refused_change_of_the_ledger_is_a_conflict(store: Store) -> None:
    """From inside the verifier it has this project's name."""
    with pytest.raises(Conflict, match="append-only"), store.write() as txn:
        txn.execute(text("DELETE FROM ledger"))


@pytest.mark.parametrize(
    ("statement", "line"),
    [
        ("UPDATE ledger SET event = 'refused' WHERE seq = 3", 3),
        ("UPDATE ledger SET created = created + 1 WHERE seq = 1", 1),
        ("UPDATE ledger SET vm_id = 'web9' WHERE seq = 2", 2),
        ("UPDATE ledger SET vm_id = NULL WHERE seq = 2", 2),
        ("UPDATE ledger SET session = NULL WHERE seq = 5", 5),
        ("UPDATE ledger SET body = replace(body, 'unlock', 'enrol') WHERE seq = 4", 4),
        ("UPDATE ledger SET body = ' ' || body WHERE seq = 4", 4),
        ("UPDATE ledger SET body = 'not JSON' WHERE seq = 4", 4),
        ("UPDATE ledger SET body = CAST(body AS BLOB) WHERE seq = 4", 4),
        ("UPDATE ledger SET vm_id = x'c1e6f5' WHERE seq = 1", 1),
        ("UPDATE ledger SET created = 'long ago' WHERE seq = 1", 1),
        ("UPDATE ledger SET created = 1.5 WHERE seq = 1", 1),
        ("UPDATE ledger SET hash = zeroblob(32) WHERE seq = 2", 2),
        ("UPDATE ledger SET hash = 'text' WHERE seq = 2", 2),
        ("UPDATE ledger SET previous = zeroblob(32) WHERE seq = 2", 2),
        ("UPDATE ledger SET previous = 'text' WHERE seq = 2", 2),
        ("DELETE FROM ledger WHERE seq = 1", 2),
        ("DELETE FROM ledger WHERE seq = 3", 4),
        ("UPDATE ledger SET seq = 9 WHERE seq = 5", 9),
        ("UPDATE ledger SET seq = 0 WHERE seq = 1", 0),
        (
            "INSERT INTO ledger SELECT 6, previous, hash, created, event, vm_id, session, body FROM ledger WHERE seq = 5",
            6,
        ),
    ],
)
def test_tampering_shows_at_the_first_line_it_touches(
    store: Store, path: Path, statement: str, line: int
) -> None:
    """Whatever a column was made to hold, the error names the line, and is no traceback."""
    _tamper(path, statement)
    with pytest.raises(LedgerBroken, match=f"breaks at line {line}\\.") as caught:
        _verify(store)
    assert isinstance(caught.value, OperatorError)
    assert caught.value.code == "ledger.broken"


def test_two_lines_that_change_places_show(store: Store, path: Path) -> None:
    """Each keeps its own hash and content; only the order is a lie."""
    _tamper(
        path,
        "UPDATE ledger SET seq = 99 WHERE seq = 2",
        "UPDATE ledger SET seq = 2 WHERE seq = 3",
        "UPDATE ledger SET seq = 3 WHERE seq = 99",
    )
    with pytest.raises(LedgerBroken, match="line 2"):
        _verify(store)


def test_a_ledger_that_was_cut_off_holds_but_has_another_head(store: Store, path: Path) -> None:
    """What the chain does not protect from, and why its head is worth publishing."""
    count, head = _verify(store)
    _tamper(path, "DELETE FROM ledger WHERE seq > 3")
    shorter, other_head = _verify(store)
    assert (count, shorter) == (5, 3)
    assert other_head != head


def test_a_tampered_body_that_is_no_json_is_no_traceback(store: Store, path: Path) -> None:
    """Listing the ledger says that the database was changed."""
    _tamper(path, "UPDATE ledger SET body = '{' WHERE seq = 4")
    with pytest.raises(StoreUnavailable) as caught, store.read() as txn:
        ledger.read(txn)
    assert caught.value.code == "store.broken"


def test_a_line_is_kept_only_with_its_transaction(store: Store) -> None:
    """A decision that was rolled back was never made: its number is the next line's."""

    def decide_and_fail() -> None:
        with store.write() as txn:
            ledger.append(txn, at_s=1, event="released", vm_id=None, session=None, body={})
            raise _Interrupted

    with pytest.raises(_Interrupted):
        decide_and_fail()
    with store.write() as txn:
        assert ledger.append(txn, at_s=1, event="refused", vm_id=None, session=None, body={}).seq == 6
    assert _verify(store)[0] == 6


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25)
@given(bodies=st.lists(st.dictionaries(st.text(max_size=8), JSON, max_size=4), min_size=1, max_size=4))
def test_any_body_can_be_written_read_and_verified(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[dict[str, object]]
) -> None:
    """What goes in comes out, and the chain over it holds."""
    store = Store.create(f"sqlite:///{tmp_path_factory.mktemp('ledger') / 'verifier.db'}")
    with store.write() as txn:
        entries = [
            ledger.append(txn, at_s=1, event="e", vm_id=None, session=None, body=body) for body in bodies
        ]
    with store.read() as txn:
        assert list(ledger.read(txn))[::-1] == entries
        assert ledger.verify(txn) == (len(bodies), entries[-1].hash)
    store.close()
