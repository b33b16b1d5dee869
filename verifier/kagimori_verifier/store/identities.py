"""A verifier's own keys, wrapped."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Final

from sqlalchemy import insert, select, update

from kagimori_verifier.store.database import Txn
from kagimori_verifier.store.prepared import Prepared
from kagimori_verifier.store.schema import identity


@dataclass(frozen=True, slots=True)
class Identity:
    """One key: ``role`` signing or token, ``state`` next, current, previous or retired."""

    key_id: str
    role: str
    public: bytes | None
    wrapped: bytes = field(repr=False)
    created: int
    state: str


_STATES: Final = Prepared(select(identity.c.key_id, identity.c.state).order_by(identity.c.key_id))


def add(txn: Txn, row: Identity) -> None:
    """Keep a key."""
    txn.execute(insert(identity).values(asdict(row)))


def all(txn: Txn, role: str) -> tuple[Identity, ...]:  # noqa: A001 - read as identities.all
    """Give the keys of a role, oldest first."""
    rows = txn.execute(select(identity).where(identity.c.role == role).order_by(identity.c.created))
    return tuple(Identity(**row._mapping) for row in rows)  # noqa: SLF001 - SQLAlchemy's public name for it


def states(txn: Txn) -> tuple[tuple[str, str], ...]:
    """Give the ID and the state of each key, whatever its role: as long as these stay, all of it does."""
    return tuple((row["key_id"], row["state"]) for row in txn.rows(_STATES))


def set_state(txn: Txn, key_id: str, state: str) -> None:
    """Change a key's state."""
    txn.execute(update(identity).where(identity.c.key_id == key_id).values(state=state))
