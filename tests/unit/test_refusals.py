"""Refusals are caused by anyone, so what they leave behind is bounded and harmless to look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from kagimori_protocol import messages
from kagimori_protocol.errors import KagimoriError, Malformed, NotAuthentic
from kagimori_verifier.refusals import Refusals
from kagimori_verifier.store import Store
from kagimori_verifier.store import refusals as stored
from kagimori_verifier.trail import MAX_TEXT


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Give an empty database."""
    made = Store.create(f"sqlite:///{tmp_path}/verifier.db")
    yield made
    made.close()


def note(store: Store, error: KagimoriError, **claimed: str | None) -> None:
    """Note one refusal."""
    Refusals(store).note(
        at_s=7,
        path="release",
        session=claimed.get("session"),
        vm_id=claimed.get("vm_id"),
        error=error,
        source="a",
    )


def newest(store: Store, **claimed: str) -> tuple[stored.Refusal, ...]:
    """Read the newest refusals."""
    with store.read() as txn:
        return stored.newest(txn, 100, **claimed)


def test_a_refusal_is_kept_with_what_was_expected_and_found(store: Store) -> None:
    """For the owner's eyes; the sender has learned little."""
    note(
        store, NotAuthentic("no", code="report.tie", expected="this", found="that"), vm_id="web1", session="s"
    )
    row = newest(store)[0]
    assert (row.created, row.path, row.session, row.vm_id, row.code, row.expected, row.found, row.source) == (
        *(7, "release", "s", "web1"),
        *("report.tie", "this", "that", "a"),
    )


def test_a_sender_cannot_make_a_refusal_large(store: Store) -> None:
    """An unknown field may have a name of a megabyte; ten thousand of those would fill a disk."""
    body = b'{"type":"hello","version":1,"' + b"x" * 1_000_000 + b'":1}'
    with pytest.raises(Malformed) as caught:
        messages.decode(messages.Hello, body)
    with structlog.testing.capture_logs() as logged:
        note(store, caught.value)
    assert len(newest(store)[0].found) <= MAX_TEXT
    assert len(repr(logged)) < 4 * MAX_TEXT


def test_a_sender_cannot_speak_to_the_owners_terminal(store: Store) -> None:
    """What a terminal would obey is escaped before it is kept."""
    body = b'{"type":"hello","version":1,"\\u001b[2J\\u202e\\n":1}'
    with pytest.raises(Malformed) as caught:
        messages.decode(messages.Hello, body)
    note(store, caught.value)
    found = newest(store)[0].found
    assert "[2J" in found
    assert found.isprintable()


def test_refusals_are_a_ring(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest make room, and the database does not grow."""
    monkeypatch.setattr(stored, "MAX_REFUSALS", 5)
    for number in range(12):
        note(store, NotAuthentic("no", code=f"c{number}"))
    assert [row.code for row in newest(store)] == ["c11", "c10", "c9", "c8", "c7"]


def test_refusals_are_found_by_vm_and_by_session(store: Store) -> None:
    """Newest first, up to the limit."""
    for number in range(4):
        note(store, NotAuthentic("no", code=f"c{number}"), vm_id=f"web{number % 2}", session=f"s{number}")
    assert [row.code for row in newest(store, vm_id="web1")] == ["c3", "c1"]
    assert [row.code for row in newest(store, session="s2")] == ["c2"]
    with store.read() as txn:
        assert [row.code for row in stored.newest(txn, 1)] == ["c3"]


def test_a_refusal_that_cannot_be_kept_is_logged_and_no_failure(store: Store, tmp_path: Path) -> None:
    """The denial is sent all the same: that a request is refused depends on no database."""
    (tmp_path / "verifier.db").unlink()
    with structlog.testing.capture_logs() as logged:
        note(store, NotAuthentic("no", code="report.tie"))
    assert [line["event"] for line in logged] == ["refused", "refusal not kept"]
    assert logged[1]["code"] == "store.gone"
