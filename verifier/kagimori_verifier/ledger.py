"""The ledger: every decision, in order, each line bound to the one before it.

``hash = SHA-256("kagimori/1/ledger" 0x00 || previous || canonical JSON of the line)``. A line that is changed, removed or
slipped in shows. What the chain alone does not show is a ledger that someone with the database cut off at some line, or
rewrote from there on: publish the head (`kagimori-verifier ledger verify` prints it) where they cannot reach it. The
triggers of the database are against accidents; whoever owns it can drop them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from sqlalchemy import Row, insert, select, text

from kagimori_protocol.errors import OperatorError
from kagimori_verifier.store import columns
from kagimori_verifier.store.database import Txn
from kagimori_verifier.store.prepared import Prepared
from kagimori_verifier.store.schema import ledger

LABEL_LEDGER: Final = b"kagimori/1/ledger"
FIRST_PREVIOUS: Final = bytes(32)

_AS_THEY_LIE: Final = text(
    "SELECT seq, previous, hash, created, event, vm_id, session, body FROM ledger ORDER BY seq"
)
"""Without SQLAlchemy's types, which expect what ``append`` wrote: a tampered row may hold anything."""

_LAST: Final = Prepared(select(ledger.c.seq, ledger.c.hash).order_by(ledger.c.seq.desc()).limit(1))
_INSERT: Final = Prepared(insert(ledger), ledger.columns.keys())

_encode: Final = msgspec.json.Encoder(order="sorted").encode


class LedgerBroken(OperatorError):
    """The chain does not hold."""

    default_code = "ledger.broken"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line."""

    seq: int
    previous: bytes
    hash: bytes
    created: int
    event: str
    vm_id: str | None
    session: str | None
    body: dict[str, Any]


def append(  # noqa: PLR0913 - the columns of a line, by name only
    txn: Txn, *, at_s: int, event: str, vm_id: str | None, session: str | None, body: dict[str, Any]
) -> Entry:
    """Write the next line, in the caller's write transaction."""
    last = txn.row(_LAST)
    seq, previous = (1, FIRST_PREVIOUS) if last is None else (last["seq"] + 1, last["hash"])
    content = _encode(body)
    line = {"seq": seq, "created": at_s, "event": event, "vm_id": vm_id, "session": session}
    digest = _digest(previous, line, content)
    txn.rows(_INSERT, **line, previous=previous, hash=digest, body=content.decode())
    return Entry(**line, previous=previous, hash=digest, body=body)  # type: ignore[arg-type]  # the values just above


def read(
    txn: Txn, *, vm_id: str | None = None, session: str | None = None, limit: int = 50
) -> tuple[Entry, ...]:
    """Give the newest lines, newest first, of one VM or session if named."""
    statement = select(ledger).order_by(ledger.c.seq.desc()).limit(limit)
    if vm_id is not None:
        statement = statement.where(ledger.c.vm_id == vm_id)
    if session is not None:
        statement = statement.where(ledger.c.session == session)
    return tuple(_entry(row) for row in txn.execute(statement))


def verify(txn: Txn) -> tuple[int, bytes]:
    """Walk the whole chain; returns the number of lines and the head. Raises LedgerBroken at the first bad line."""
    seq, previous = 0, FIRST_PREVIOUS
    for row in txn.execute(_AS_THEY_LIE):
        expected = _expected_hash(previous, row)
        if row.seq != seq + 1 or row.previous != previous or row.hash != expected:
            raise LedgerBroken(
                f"The ledger's chain breaks at line {row.seq}.",
                expected=f"line {seq + 1} after {previous.hex()} with the hash of what it says",
                found=f"line {row.seq} after {_shown(row.previous)} with hash {_shown(row.hash)}",
                todo="Someone changed the database: compare with your backup and with heads that you published.",
            )
        seq, previous = row.seq, row.hash
    return seq, previous


def _expected_hash(previous: bytes, row: Row[Any]) -> bytes | None:
    """Give the hash of what a line says; None if it holds what ``append`` cannot have written."""
    names = (row.vm_id, row.session)
    if not (
        isinstance(row.created, int)
        and isinstance(row.event, str)
        and isinstance(row.body, str)
        and all(name is None or isinstance(name, str) for name in names)
    ):
        return None
    line = {
        "seq": row.seq,
        "created": row.created,
        "event": row.event,
        "vm_id": row.vm_id,
        "session": row.session,
    }
    return _digest(previous, line, row.body.encode())


def _shown(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else "no hash"


def _digest(previous: bytes, line: dict[str, Any], body: bytes) -> bytes:
    content = _encode(line | {"body": msgspec.Raw(body)})
    return hashlib.sha256(LABEL_LEDGER + b"\x00" + previous + content).digest()


def _entry(row: Row[Any]) -> Entry:
    body = columns.decode(row.body, dict[str, Any], "ledger.body")
    return Entry(**(dict(row._mapping) | {"body": body}))  # noqa: SLF001 - SQLAlchemy's public name for it
