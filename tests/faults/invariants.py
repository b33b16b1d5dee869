"""What no fault may break. Every story of this directory ends here.

The owner's side is looked at from outside: the database as it lies there, and the command line that an owner would use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import select
from tests.exchange.test_secrets import search_files, sightings

from kagimori_agent.cap import CAPPED
from kagimori_verifier import ledger, settings
from kagimori_verifier.ledger import Entry
from kagimori_verifier.store import Store, schema

if TYPE_CHECKING:
    from tests.faults.guests import Opened
    from tests.faults.programs import Launcher

    from kagimori_simulator.vtpm import Vtpm
    from kagimori_verifier.store import Txn

LINES = 10_000


@contextmanager
def reading(directory: Path) -> Iterator[Txn]:
    """Read the database of the verifier in a directory."""
    store = Store.open(settings.load(directory / "verifier.toml").database_url)
    try:
        with store.read() as txn:
            yield txn
    finally:
        store.close()


def lines(directory: Path, *events: str) -> list[Entry]:
    """Give the ledger's lines, oldest first, of some events or of all."""
    with reading(directory) as txn:
        found = ledger.read(txn, limit=LINES)[::-1]
    return [line for line in found if not events or line.event in events]


def nothing_is_released_that_the_ledger_lacks(directory: Path, opened: Iterable[Opened] = ()) -> None:
    """For each answer that was made, and each that was opened, there is a line; it names evidence and volumes."""
    released = {line.session: line for line in lines(directory, "released")}
    with reading(directory) as txn:
        rows = list(txn.execute(select(schema.redemption).where(schema.redemption.c.decision == "keys")))
        others = list(txn.execute(select(schema.redemption).where(schema.redemption.c.decision != "keys")))
    assert {row.session for row in rows} == set(released), "a redemption and its line are one transaction"
    assert not {row.session for row in others} & set(released)
    for row in rows:
        assert released[row.session].body["evidence_sha256"] == row.evidence_sha256.hex()
        assert released[row.session].vm_id == row.vm_id
    for one in opened:
        line = released[one.session]
        assert line.body["evidence_sha256"] == one.evidence_sha256.hex()
        assert set(one.keys) <= set(line.body["volumes"])


def nothing_is_released_twice(directory: Path, opened: Iterable[Opened] = ()) -> None:
    """A session has one line, a boot without a TPM one too, and a boot that has opened its volumes none after that.

    All answers of one session that anybody could open hold the same keys.
    """
    sessions: Counter[str | None] = Counter()
    direct: Counter[str] = Counter()
    boots: dict[str | None, str] = {}
    done: set[str] = set()
    for line in lines(directory):
        if line.event == "released":
            boot = boots[line.session] = line.body["report_id"]
            sessions[line.session] += 1
            direct[boot] += line.body["kind"] == "snp-direct"
            assert boot not in done, f"released to a boot that had opened its volumes: {line}"
        elif line.event == "confirmed-opened":
            done.add(boots[line.session])
    assert set(sessions.values()) <= {1}, sessions
    assert set(direct.values()) <= {0, 1}, direct
    given: dict[str, dict[str, bytes]] = {}
    for one in opened:
        assert given.setdefault(one.session, one.keys) == one.keys


def the_ledger_holds(launcher: Launcher, directory: Path) -> None:
    """The owner's own command walks the whole chain."""
    done = launcher.run("verifier", "--json", "--config", directory / "verifier.toml", "ledger", "verify")
    assert done.code == 0, done.stderr.read_text()
    assert done.json["lines"] == len(lines(directory))


def opened_is_recorded_once(directory: Path, session: str) -> None:
    """The Confirm of a session counts once: in the ledger, in its redemption, for its boot."""
    told = [line.session for line in lines(directory, "confirmed-opened")]
    assert told.count(session) == 1
    with reading(directory) as txn:
        row = txn.execute(select(schema.redemption).where(schema.redemption.c.session == session)).one()
        boots = [
            boot.session_sha256
            for boot in txn.execute(select(schema.opened_boot))
            if boot.report_id == row.report_id
        ]
    assert row.outcome == "opened"
    assert boots == [row.session_sha256]


def the_owner_is_safe(launcher: Launcher, directory: Path, opened: Iterable[Opened] = ()) -> None:
    """Hold the three of them that need nothing else."""
    answers = list(opened)
    nothing_is_released_that_the_ledger_lacks(directory, answers)
    nothing_is_released_twice(directory, answers)
    the_ledger_holds(launcher, directory)


def the_boot_is_capped(vtpm: Vtpm) -> None:
    """PCR 15 holds the cap, in every bank."""
    assert vtpm.pcr(15) == CAPPED
    assert all(any(vtpm.pcr(15, bank)) for bank in vtpm.banks())


def no_file_holds_the_key(key: bytes, *places: Path) -> None:
    """Neither what programs wrote nor what they printed has the unlock key, in any form of writing."""
    found: list[str] = []
    for place in places:
        if place.is_dir():
            found += search_files(key, place)
        else:
            found += sightings(key, str(place), place.read_bytes())
    assert found == []


def no_traceback(*printed: Path) -> None:
    """Whatever broke, it was told in words."""
    for path in printed:
        assert "Traceback" not in path.read_text(errors="replace"), path.read_text(errors="replace")
