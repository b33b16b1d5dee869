"""Sessions that were used: what was decided, for which evidence, and the answer that the same evidence gets again."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Final

import sqlalchemy as sa
from sqlalchemy import Table, bindparam, select, update
from sqlalchemy.exc import IntegrityError

from kagimori_protocol.errors import OperatorError
from kagimori_protocol.messages import Kind, Outcome, Purpose
from kagimori_verifier.store.database import Txn
from kagimori_verifier.store.prepared import Prepared
from kagimori_verifier.store.schema import direct_grant, ledger, opened_boot, redemption, vm


class AlreadyRedeemed(OperatorError):
    """Another transaction has redeemed this session meanwhile."""

    default_code = "session.raced"


@dataclass(frozen=True, slots=True)
class Redemption:
    """A used session. ``decision`` is keys, allowed or denied; ``confirm_key`` is wrapped.

    ``verifier_key`` is the ID of the verifier's key that the agent says its challenge was signed by; the tie holds it to it.
    """

    session_sha256: bytes
    session: str
    evidence_sha256: bytes
    vm_id: str
    purpose: Purpose
    decision: str
    kind: Kind
    signer: str
    chip_id: bytes
    report_id: bytes
    binding: bytes
    created: int
    expires: int
    answer: bytes | None = field(repr=False)
    confirm_key: bytes | None = field(repr=False)
    outcome: Outcome | None
    verifier_key: str | None = None


_COLUMNS: Final = tuple(column.name for column in fields(Redemption))
_THIS: Final = redemption.c.session_sha256 == bindparam("of")
_FIND: Final = Prepared(select(redemption).where(_THIS))
_INSERT: Final = Prepared(sa.insert(redemption), _COLUMNS)
_STORE_ANSWER: Final = Prepared(
    update(redemption).where(_THIS).values(answer=bindparam("answer"), confirm_key=bindparam("confirm_key"))
)
_SET_OUTCOME: Final = Prepared(update(redemption).where(_THIS).values(outcome=bindparam("outcome")))
_PURGE: Final = Prepared(
    update(redemption)
    .where(redemption.c.expires < bindparam("now"), redemption.c.answer.is_not(None))
    .values(answer=None)
)
_FIRST: Final = {
    table.name: Prepared(select(table.c.session_sha256).where(table.c.report_id == bindparam("of")).limit(1))
    for table in (direct_grant, opened_boot)
}
_INSERT_FIRST: Final = {
    table.name: Prepared(sa.insert(table), table.columns.keys()) for table in (direct_grant, opened_boot)
}


def find(txn: Txn, session_sha256: bytes) -> Redemption | None:
    """Give what a session was used for, or None."""
    row = txn.row(_FIND, of=session_sha256)
    return None if row is None else Redemption(**row)


def insert(txn: Txn, row: Redemption) -> None:
    """Use a session. Raises AlreadyRedeemed if another transaction was first."""
    try:
        txn.rows(_INSERT, **{name: getattr(row, name) for name in _COLUMNS})
    except IntegrityError as error:
        raise AlreadyRedeemed("A session was used twice at once.", expected="one use", found="two") from error


def store_answer(txn: Txn, session_sha256: bytes, answer: bytes, confirm_key: bytes) -> None:
    """Keep the answer, and its confirm key, wrapped."""
    txn.rows(_STORE_ANSWER, of=session_sha256, answer=answer, confirm_key=confirm_key)


def set_outcome(txn: Txn, session_sha256: bytes, outcome: Outcome) -> None:
    """Write down what became of an answer."""
    txn.rows(_SET_OUTCOME, of=session_sha256, outcome=outcome)


def purge_answers(txn: Txn, now_s: int) -> None:
    """Drop the answers of sessions that have expired: nobody can ask for them again."""
    txn.rows(_PURGE, now=now_s)


def claim_direct_grant(
    txn: Txn, signer: str, chip_id: bytes, report_id: bytes, session_sha256: bytes
) -> bool:
    """Claim the one keys answer of a boot without a TPM; False if another session has it.

    A boot is its REPORT_ID, whatever else the report says: a guest may choose between the keys of chip and provider
    (MSG_REPORT_REQ.KEY_SEL), and its host whether a report shows CHIP_ID.
    """
    return _first(txn, direct_grant, signer, chip_id, report_id, session_sha256)


def is_opened(txn: Txn, report_id: bytes) -> bool:
    """Tell whether this boot has confirmed that its volumes are open."""
    return _first_session(txn, opened_boot, report_id) is not None


def drop_answers(txn: Txn) -> None:
    """Drop every answer, also of sessions that have not expired."""
    txn.execute(update(redemption).where(redemption.c.answer.is_not(None)).values(answer=None))


def last_opened(txn: Txn) -> dict[str, str | None]:
    """Give, for each VM that has confirmed `opened` since it was added, the verifier's key (ID) of the newest such boot.

    The key is None where it was not written down. Newest is by the ledger: two boots may lie in one second. An enrolment is
    no boot: it has read the agent.toml of the booted system, and the initramfs may have an older one.
    """
    rows = txn.execute(
        select(redemption.c.vm_id, redemption.c.verifier_key)
        .join(ledger, ledger.c.session == redemption.c.session)
        .join(vm, vm.c.vm_id == redemption.c.vm_id)
        .where(ledger.c.event == "confirmed-opened", ledger.c.vm_id == redemption.c.vm_id)
        .where(ledger.c.created >= vm.c.created, redemption.c.purpose == "unlock")
        .order_by(ledger.c.seq)
    )
    return {row.vm_id: row.verifier_key for row in rows}


def mark_opened(txn: Txn, signer: str, chip_id: bytes, report_id: bytes, session_sha256: bytes) -> None:
    """Write down that this boot's volumes are open."""
    _first(txn, opened_boot, signer, chip_id, report_id, session_sha256)


def _first(  # noqa: PLR0913 - the columns
    txn: Txn, table: Table, signer: str, chip_id: bytes, report_id: bytes, session_sha256: bytes
) -> bool:
    owner = _first_session(txn, table, report_id)
    if owner is None:
        txn.rows(
            _INSERT_FIRST[table.name],
            signer=signer,
            chip_id=chip_id,
            report_id=report_id,
            session_sha256=session_sha256,
        )
    return owner in {None, session_sha256}


def _first_session(txn: Txn, table: Table, report_id: bytes) -> bytes | None:
    """Give the session that a table of boots knows for a REPORT_ID, or None."""
    found = txn.row(_FIRST[table.name], of=report_id)
    return None if found is None else found["session_sha256"]
