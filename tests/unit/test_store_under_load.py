"""A database that grows and is asked by many at once: no request reads a whole table, and no thread writes unseen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from sqlite3 import Cursor

import pytest
from sqlalchemy import event

from kagimori_verifier import ledger
from kagimori_verifier.store import (
    Store,
    StoreUnavailable,
    observations,
    profiles,
    redemptions,
    references,
    refusals,
    settings,
    sqlite,
    vms,
)

SESSION, REPORT_ID, CHIP_ID = b"\x01" * 32, b"\x02" * 32, b"\x03" * 64


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


def test_threads_of_one_program_queue_for_the_write_lock(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own waiting sleeps through its turns; a queue is fair, and whoever waits too long is told."""
    monkeypatch.setattr(sqlite, "BUSY_S", 0.1)
    refused: list[StoreUnavailable] = []

    def write() -> None:
        try:
            with store.write() as txn:
                settings.put(txn, "name", "second")
        except StoreUnavailable as error:
            refused.append(error)

    with store.write() as txn:
        settings.put(txn, "name", "first")
        second = threading.Thread(target=write)
        second.start()
        second.join()
    assert [(error.code, error.found) for error in refused] == [
        ("store.locked", "other threads have written for 0.1 s")
    ]
    write()
    with store.read() as txn:
        assert settings.get(txn, "name") == "second"


def test_a_write_that_fails_lets_the_next_one_in(store: Store) -> None:
    """The turn ends with the transaction, however that ends."""
    with pytest.raises(ZeroDivisionError), store.write():
        _ = 1 // 0
    with store.write() as txn:
        settings.put(txn, "name", "next")


def test_a_database_deleted_in_the_middle_of_a_write_is_gone(store: Store, path: Path) -> None:
    """Committed to a file without a name, a redeemed session would be forgotten: the writer is told, and answers nothing."""

    def write() -> None:
        with store.write() as txn:
            settings.put(txn, "name", "value")
            path.unlink()

    with pytest.raises(StoreUnavailable) as caught:
        write()
    assert caught.value.code == "store.gone"


def _serve_one_exchange(store: Store) -> None:
    """Do to the database what a challenge, a release, a Confirm and a refusal do."""
    with store.write() as txn:
        vms.get(txn, "web1")
        vms.volumes(txn, "web1")
        profiles.get(txn, "web")
        references.measurement(txn, "web", bytes(48))
        references.boot_states(txn, "vm", "web1")
        redemptions.find(txn, SESSION)
        redemptions.is_opened(txn, REPORT_ID)
        redemptions.claim_direct_grant(txn, "vcek", CHIP_ID, REPORT_ID, SESSION)
        redemptions.purge_answers(txn, 2000)
        redemption = redemptions.Redemption(
            session_sha256=SESSION,
            session="01" * 8,
            evidence_sha256=bytes(32),
            vm_id="web1",
            purpose="unlock",
            decision="keys",
            kind="svsm-vtpm",
            signer="vcek",
            chip_id=CHIP_ID,
            report_id=REPORT_ID,
            binding=bytes(32),
            created=1000,
            expires=1300,
            answer=None,
            confirm_key=None,
            outcome=None,
        )
        redemptions.insert(txn, redemption)
        observations.add(txn, observations.Observation("01" * 8, "web1", "web", 1000, False, {}))
        ledger.append(txn, at_s=1000, event="released", vm_id="web1", session="01" * 8, body={})
        redemptions.store_answer(txn, SESSION, b"answer", b"wrapped")
        redemptions.set_outcome(txn, SESSION, "opened")
        observations.confirm(txn, "01" * 8)
        redemptions.mark_opened(txn, "vcek", CHIP_ID, REPORT_ID, SESSION)
        refusals.note(
            txn, refusals.Refusal(1000, "release", None, None, "malformed", "expected", "found", "192.0.2.1")
        )


def test_no_request_reads_a_whole_table(store: Store) -> None:
    """Redemptions, boots and the ledger only ever grow: whoever reads all of one gets slower with every boot."""
    plans: dict[str, list[str]] = {}

    @event.listens_for(store._engine, "before_cursor_execute")
    def explain(
        _connection: object, cursor: Cursor, statement: str, parameters: tuple[object, ...], *_rest: object
    ) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE", "INSERT")):
            steps = cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            plans[statement] = [detail for *_, detail in steps]

    _serve_one_exchange(store)
    assert len(plans) > 20
    assert {statement: plan for statement, plan in plans.items() if _reads_all(statement, plan)} == {}


def _reads_all(statement: str, plan: list[str]) -> bool:
    """Tell whether a plan walks a whole table; walking a key until LIMIT ends at the first line."""
    if "WHERE" not in statement and "LIMIT" in statement and not any("B-TREE" in step for step in plan):
        return False
    return any(step.startswith("SCAN") and "CONSTANT" not in step for step in plan)
