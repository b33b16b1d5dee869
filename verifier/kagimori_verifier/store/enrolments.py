"""Enrolments: the code that a VM's operator was given, and how each volume came here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Final, Literal

from sqlalchemy import and_, bindparam, delete, insert, or_, select, update

from kagimori_verifier.store.database import Txn
from kagimori_verifier.store.prepared import Prepared
from kagimori_verifier.store.schema import enrol_code, enrolment

Provenance = Literal["owner-machine", "attested-vm", "unknown"]
"""Where a volume was formatted, or reencrypted since: there its volume key was made, and who was there may know it."""
PROVENANCES: Final[tuple[Provenance, ...]] = ("owner-machine", "attested-vm", "unknown")


@dataclass(frozen=True, slots=True)
class CodeRow:
    """A VM's code: the key that proofs are held against, its life in seconds since 1970, and the session that used it.

    ``recovery`` is the wrapped recovery key that its enrolment gives, or None.
    """

    vm_id: str
    public_key: bytes
    created: int
    expires: int
    session: str | None
    recovery: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class EnrolledRow:
    """How one version of a volume's key came here.

    ``session`` is that of the enrolment, None for one on the owner's machine; ``explained`` tells whether reference values
    explained the boot that enrolled it.
    """

    vm_id: str
    uuid: str
    version: int
    provenance: Provenance
    session: str | None
    explained: bool


_UNUSED: Final = and_(enrol_code.c.session.is_(None), enrol_code.c.expires < bindparam("before"))
_DROP_OLD: Final = Prepared(
    update(enrol_code)
    .where(enrol_code.c.recovery.is_not(None), or_(_UNUSED, enrol_code.c.expires < bindparam("used_before")))
    .values(recovery=None)
)
_OF_VM: Final = Prepared(select(enrolment).where(enrolment.c.vm_id == bindparam("of")))


def put_code(txn: Txn, row: CodeRow) -> None:
    """Keep a VM's code, in place of an earlier one."""
    txn.execute(delete(enrol_code).where(enrol_code.c.vm_id == row.vm_id))
    txn.execute(insert(enrol_code).values(asdict(row)))


def code(txn: Txn, vm_id: str) -> CodeRow | None:
    """Give a VM's code, used or not, or None."""
    row = txn.execute(select(enrol_code).where(enrol_code.c.vm_id == vm_id)).one_or_none()
    return None if row is None else CodeRow(**row._mapping)  # noqa: SLF001 - SQLAlchemy's public name for it


def use_code(txn: Txn, vm_id: str, session: str) -> None:
    """Write down which session has used a VM's code."""
    txn.execute(update(enrol_code).where(enrol_code.c.vm_id == vm_id).values(session=session))


def drop_recovery(txn: Txn, vm_id: str, session: str) -> None:
    """Forget the recovery key of a code that this session has used."""
    where = (enrol_code.c.vm_id == vm_id, enrol_code.c.session == session)
    txn.execute(update(enrol_code).where(*where).values(recovery=None))


def drop_old_recoveries(txn: Txn, before_s: int, used_before_s: int) -> None:
    """Forget recovery keys of codes that ended before these times: unused, and used."""
    txn.rows(_DROP_OLD, before=before_s, used_before=used_before_s)


def void_codes(txn: Txn) -> None:
    """Forget every code: what was given out is good no more."""
    txn.execute(delete(enrol_code))


def add(txn: Txn, row: EnrolledRow) -> None:
    """Keep how a volume came here; the volume itself is there already."""
    txn.execute(insert(enrolment).values(asdict(row)))


def of_vm(txn: Txn, vm_id: str) -> tuple[EnrolledRow, ...]:
    """Give how all of a VM's volumes came here."""
    return tuple(EnrolledRow(**row) for row in txn.rows(_OF_VM, of=vm_id))


def of_session(txn: Txn, session: str) -> tuple[EnrolledRow, ...]:
    """Give what one session has enrolled, as far as it is still kept."""
    rows = txn.execute(select(enrolment).where(enrolment.c.session == session).order_by(enrolment.c.uuid))
    return tuple(EnrolledRow(**row._mapping) for row in rows)  # noqa: SLF001 - as above


def set_provenance(txn: Txn, row: EnrolledRow, provenance: Provenance) -> None:
    """Write down where a volume's key was made."""
    key = enrolment.c
    where = (key.vm_id == row.vm_id, key.uuid == row.uuid, key.version == row.version)
    txn.execute(update(enrolment).where(*where).values(provenance=provenance))
