"""Roots that an operator added beside AMD's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from sqlalchemy import delete, insert, select

from kagimori_verifier.store.database import Txn
from kagimori_verifier.store.prepared import Prepared
from kagimori_verifier.store.schema import root


@dataclass(frozen=True, slots=True)
class RootRow:
    """A root by the SHA-256 of its SubjectPublicKeyInfo."""

    spki_sha256: bytes
    product: str
    label: str
    created: int


_ALL: Final = Prepared(select(root).order_by(root.c.created))


def add(txn: Txn, row: RootRow) -> None:
    """Trust a root."""
    txn.execute(insert(root).values(asdict(row)))


def remove(txn: Txn, spki_sha256: bytes) -> bool:
    """Trust a root no longer; tells whether there was one."""
    return txn.execute(delete(root).where(root.c.spki_sha256 == spki_sha256)).rowcount > 0


def all(txn: Txn) -> tuple[RootRow, ...]:  # noqa: A001 - read as roots.all
    """Give all of them, oldest first."""
    return tuple(RootRow(**row) for row in txn.rows(_ALL))
