"""Refusals before authenticity: a ring of bounded size, since anyone can cause them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from sqlalchemy import bindparam, delete, func, insert, select

from kagimori_verifier.store.database import Txn
from kagimori_verifier.store.prepared import Prepared
from kagimori_verifier.store.schema import refusal

MAX_REFUSALS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Refusal:
    """One refusal; ``session`` and ``vm_id`` are what the sender claimed. ``id`` is 0 before it is kept."""

    created: int
    path: str
    session: str | None
    vm_id: str | None
    code: str
    expected: str
    found: str
    source: str
    id: int = 0


_INSERT: Final = Prepared(insert(refusal), [column.name for column in refusal.columns if column.name != "id"])
_FORGET: Final = Prepared(
    delete(refusal).where(
        refusal.c.id <= select(func.max(refusal.c.id)).scalar_subquery() - bindparam("most")
    )
)


def note(txn: Txn, row: Refusal) -> None:
    """Keep a refusal, and forget the oldest beyond MAX_REFUSALS."""
    values = asdict(row)
    del values["id"]
    txn.rows(_INSERT, **values)
    txn.rows(_FORGET, most=MAX_REFUSALS)


def newest(
    txn: Txn, limit: int, *, vm_id: str | None = None, session: str | None = None
) -> tuple[Refusal, ...]:
    """Give the newest refusals, newest first, of one VM or session if named."""
    statement = select(refusal).order_by(refusal.c.id.desc()).limit(limit)
    if vm_id is not None:
        statement = statement.where(refusal.c.vm_id == vm_id)
    if session is not None:
        statement = statement.where(refusal.c.session == session)
    return tuple(Refusal(**row._mapping) for row in txn.execute(statement))  # noqa: SLF001 - SQLAlchemy's public name for it
