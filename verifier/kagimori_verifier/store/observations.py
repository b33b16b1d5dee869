"""What authentic evidence showed of a boot; learnable only once its Confirm has arrived."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Row, bindparam, delete, insert, select, update

from kagimori_verifier.store import columns
from kagimori_verifier.store.database import Txn
from kagimori_verifier.store.prepared import Prepared
from kagimori_verifier.store.schema import observation

KEPT: Final = 20
"""Observations kept of each VM, confirmed and unconfirmed ones apart: what is unproven pushes out nothing proven."""


@dataclass(frozen=True, slots=True)
class Observation:
    """PCR values and events of one session; ``pcrs`` as in references.BootStateRow."""

    session: str
    vm_id: str
    profile: str
    created: int
    confirmed: bool
    pcrs: dict[str, dict[str, Any]]


_THIS: Final = observation.c.session == bindparam("of")
_INSERT: Final = Prepared(insert(observation), observation.columns.keys())
_CONFIRM: Final = Prepared(update(observation).where(_THIS).values(confirmed=True))
_VM_OF: Final = Prepared(select(observation.c.vm_id).where(_THIS))
_SAME: Final = (observation.c.vm_id == bindparam("vm"), observation.c.confirmed.is_(bindparam("proven")))
_FORGET: Final = Prepared(
    delete(observation).where(
        *_SAME,
        observation.c.session.not_in(
            select(observation.c.session).where(*_SAME).order_by(observation.c.created.desc()).limit(KEPT)
        ),
    )
)


def add(txn: Txn, row: Observation) -> None:
    """Keep an observation, and forget the oldest of its kind beyond what is kept."""
    txn.rows(
        _INSERT,
        session=row.session,
        vm_id=row.vm_id,
        profile=row.profile,
        created=row.created,
        confirmed=row.confirmed,
        pcrs=columns.encode(row.pcrs),
    )
    _forget_oldest(txn, row.vm_id, confirmed=row.confirmed)


def confirm(txn: Txn, session: str) -> None:
    """A Confirm has verified: the AK behind this observation is proven."""
    txn.rows(_CONFIRM, of=session)
    observed = txn.row(_VM_OF, of=session)
    if observed is not None:
        _forget_oldest(txn, observed["vm_id"], confirmed=True)


def get(txn: Txn, session: str) -> Observation | None:
    """Give the observation of a session, or None."""
    row = txn.execute(select(observation).where(observation.c.session == session)).one_or_none()
    return None if row is None else _observation(row)


def for_vm(txn: Txn, vm_id: str) -> tuple[Observation, ...]:
    """Give a VM's observations, newest first."""
    statement = select(observation).where(observation.c.vm_id == vm_id).order_by(observation.c.created.desc())
    return tuple(_observation(row) for row in txn.execute(statement))


def _forget_oldest(txn: Txn, vm_id: str, *, confirmed: bool) -> None:
    txn.rows(_FORGET, vm=vm_id, proven=confirmed)


def _observation(row: Row[Any]) -> Observation:
    pcrs = columns.decode(row.pcrs, dict[str, dict[str, Any]], "observation.pcrs")
    return Observation(**(dict(row._mapping) | {"pcrs": pcrs}))  # noqa: SLF001 - SQLAlchemy's public name for it
