"""A verifier's own keys, wrapped."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from sqlalchemy import insert, select

from kagimori_verifier.store.database import Txn
from kagimori_verifier.store.schema import identity


@dataclass(frozen=True, slots=True)
class Identity:
    """One key: ``role`` signing or token, ``state`` current, next or retired."""

    key_id: str
    role: str
    public: bytes | None
    wrapped: bytes = field(repr=False)
    created: int
    state: str


def add(txn: Txn, row: Identity) -> None:
    """Keep a key."""
    txn.execute(insert(identity).values(asdict(row)))


def all(txn: Txn, role: str) -> tuple[Identity, ...]:  # noqa: A001 - read as identities.all
    """Give the keys of a role, oldest first."""
    rows = txn.execute(select(identity).where(identity.c.role == role).order_by(identity.c.created))
    return tuple(Identity(**row._mapping) for row in rows)  # noqa: SLF001 - SQLAlchemy's public name for it
