"""What an enrolment may do, and what becomes of its keys (docs/protocol.md section 3, ADR 9).

::

    vm code -> a code, for one VM and 24 hours
    enrol   -> the code is used, new keys are kept: staged          (one transaction with session and ledger)
    Confirm -> opened: active, or waiting where no reference value explains the boot;  failed: dropped
    owner   -> volume accept, or reference accept of that session: waiting becomes active

With a recovery key, which ``vm code --recovery`` has put on paper: it is kept, wrapped, beside the code, given once more with
the new keys, and forgotten as these are confirmed, as the code is replaced, or as it has ended.

No key that was there before is in any answer of an enrolment, and none of its own is in another answer before it is active.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

from kagimori_protocol import enrol_code, signature
from kagimori_protocol.enrol_code import EnrolCode
from kagimori_protocol.errors import NotAuthentic, OperatorError
from kagimori_protocol.luks2_guard import FIRST_EPOCH
from kagimori_protocol.messages import Check
from kagimori_verifier import ledger
from kagimori_verifier.decision import Allow, Deny
from kagimori_verifier.states import ACTIVE, STAGED, WAITING
from kagimori_verifier.store import enrolments, identities, vms
from kagimori_verifier.store.enrolments import CodeRow, EnrolledRow
from kagimori_verifier.store.vms import VolumeRow

if TYPE_CHECKING:
    from collections.abc import Callable

    from kagimori_protocol.messages import Outcome
    from kagimori_verifier.pipeline import Judgement
    from kagimori_verifier.store import Txn
    from kagimori_verifier.store.redemptions import Redemption

CODE_S: Final = 24 * 3600
"""How long a code is good, in seconds, unless its owner says otherwise."""
RECOVERY_GIVEN: Final = "recovery-given"
"""The ledger's event for a session whose answer has a recovery key."""
SESSION_S: Final = 3600
"""How long a session can live, in seconds (kagimori_protocol.messages.Challenge)."""
STAGED_S: Final = 7 * 24 * 3600
"""How long a key waits for the Confirm of its enrolment, in seconds: then the next enrolment or code drops it."""


def make_code(
    txn: Txn,
    vm_id: str,
    at_s: int,
    life_s: int = CODE_S,
    wrapped_recovery: Callable[[bytes], bytes] | None = None,
) -> tuple[EnrolCode, CodeRow]:
    """Make a VM's code, in place of an earlier one; what is kept of it is a public key.

    ``wrapped_recovery`` wraps the recovery key that the enrolment shall give, bound to this public key. Raises OperatorError for a VM that is not there, is disabled or may not enrol, and without an identity.
    """
    vm = vms.get(txn, vm_id)
    if vm is None or not vm.enabled or "enrol" not in vm.purposes:
        found = "no such VM" if vm is None else "may not enrol" if vm.enabled else "disabled"
        raise OperatorError(
            f"{vm_id} cannot be given a code.",
            code="enrol.vm",
            expected="a VM that is enabled and has the purpose enrol",
            found=found,
            todo="`kagimori-verifier vm show NAME` shows a VM; `vm add --purpose` gives it purposes.",
        )
    current = [key.public for key in identities.all(txn, "signing") if key.state == "current" and key.public]
    if len(current) != 1:
        raise OperatorError(
            "This verifier has no identity.",
            code="identity.missing",
            expected="one current signing key",
            found=str(len(current)),
            todo="Run `kagimori-verifier init` for a new verifier, or restore the database from your backup.",
        )
    drop_expired(txn, vm_id, at_s)
    code = EnrolCode(secrets.token_bytes(enrol_code.SECRET_SIZE), enrol_code.fingerprint(current[0]))
    recovery = None if wrapped_recovery is None else wrapped_recovery(code.public_key)
    row = CodeRow(vm_id, code.public_key, at_s, at_s + life_s, None, recovery)
    enrolments.put_code(txn, row)
    body = {"expires": row.expires, "verifier_key": signature.key_id(current[0])}
    body |= {} if recovery is None else {"recovery": True}
    ledger.append(txn, at_s=at_s, event="enrol-code", vm_id=vm_id, session=None, body=body)
    return code, row


def apply_rules(txn: Txn, judgement: Judgement, now_s: int) -> Allow | Deny:
    """Step 10 for ``enrol``: this VM has a code that is good, and the proof is by it, over this exchange."""
    row = enrolments.code(txn, judgement.vm.vm_id)
    good = row is not None and row.session is None and row.created <= now_s <= row.expires
    proved = row is not None and _is_proved(row, judgement)
    checks = (
        *judgement.decision.checks,
        Check(
            id="enrol.code",
            ok=good,
            expected=f"a code that was made for {judgement.vm.vm_id}, is not used and not too old",
            found=_told(row, now_s),
        ),
        Check(
            id="enrol.proof",
            ok=proved,
            expected="a proof by that code, over this exchange",
            found="one"
            if proved
            else "none"
            if row is None
            else "a proof by another code, or of another exchange",
        ),
    )
    allowed = isinstance(judgement.decision, Allow) and all(check.ok for check in checks)
    return Allow(checks) if allowed else Deny(checks)


def keep_new_keys(
    txn: Txn, judgement: Judgement, session: str, now_s: int, wrapped_new: Callable[[str, int], bytes]
) -> None:
    """Use the code, and keep a new key for each volume: staged. ``wrapped_new`` makes and wraps one, of a UUID and version.

    A key of an earlier enrolment of the volume that nobody has confirmed gives way to it.
    """
    vm_id = judgement.vm.vm_id
    enrolments.use_code(txn, vm_id, session)
    if recovery_of(txn, vm_id, session) is not None:
        body = {"volumes": judgement.hello.volumes}
        ledger.append(txn, at_s=now_s, event=RECOVERY_GIVEN, vm_id=vm_id, session=session, body=body)
    drop_expired(txn, vm_id, now_s)
    kept = vms.volumes(txn, vm_id, state=None)
    labels = {one.label for one in kept}
    for uuid in judgement.hello.volumes:
        earlier = [one for one in kept if one.uuid == uuid and one.state == STAGED]
        for one in earlier:
            _drop(txn, one, now_s, session, "replaced")
        version = max((one.version for one in earlier), default=0) + 1
        label = next((one.label for one in earlier), f"luks-{uuid}")
        if not earlier and label in labels:
            label = f"{label}-{version}"
        vms.add_volume(
            txn,
            VolumeRow(vm_id, uuid, STAGED, wrapped_new(uuid, version), version, FIRST_EPOCH, label, now_s),
        )
        enrolments.add(txn, EnrolledRow(vm_id, uuid, version, "unknown", session, judgement.explained))


def keys_of(txn: Txn, vm_id: str, session: str) -> dict[str, VolumeRow]:
    """Give the volumes whose new keys a session was answered with, by UUID: as long as they are staged."""
    versions = {(one.uuid, one.version) for one in enrolments.of_session(txn, session)}
    rows = vms.volumes(txn, vm_id, state=STAGED)
    return {one.uuid: one for one in rows if (one.uuid, one.version) in versions}


def recovery_of(txn: Txn, vm_id: str, session: str) -> CodeRow | None:
    """Give the code by which a session has enrolled, if it is still there and still has its recovery key."""
    row = enrolments.code(txn, vm_id)
    return None if row is None or row.session != session or row.recovery is None else row


def confirmed(txn: Txn, known: Redemption, outcome: Outcome, now_s: int) -> None:
    """Let keys follow what their agent has confirmed. Raises NotAuthentic where they were dropped meanwhile."""
    enrolled = enrolments.of_session(txn, known.session)
    enrolments.drop_recovery(txn, known.vm_id, known.session)
    staged = keys_of(txn, known.vm_id, known.session)
    if outcome == "reencrypted":
        for one in enrolled:
            enrolments.set_provenance(txn, one, "attested-vm")
            _record(
                txn, "volume-reencrypted", one.vm_id, one.uuid, now_s, known.session, {"version": one.version}
            )
    elif outcome == "failed":
        for row in staged.values():
            _drop(txn, row, now_s, known.session, "not added")
    elif outcome == "opened":
        if len(staged) != len(enrolled) or not staged:
            raise NotAuthentic(
                "A Confirm comes for keys that are gone.",
                code="confirm.order",
                expected="keys that wait for it",
                found="keys that their owner, a later enrolment or time has dropped",
            )
        for one in enrolled:
            state = ACTIVE if one.explained else WAITING
            vms.set_volume_state(txn, one.vm_id, one.uuid, one.version, state)
            body = {"version": one.version, "state": state, "provenance": one.provenance}
            _record(txn, "volume-enrolled", one.vm_id, one.uuid, now_s, known.session, body)


def accept(txn: Txn, rows: list[VolumeRow], now_s: int, session: str | None) -> list[VolumeRow]:
    """Let volumes be unlocked whose enrolment came from a boot that nothing explains; gives those that waited for it."""
    waiting = [row for row in rows if row.state == WAITING]
    for row in waiting:
        vms.set_volume_state(txn, row.vm_id, row.uuid, row.version, ACTIVE)
        _record(txn, "volume-accepted", row.vm_id, row.uuid, now_s, session, {"version": row.version})
    return waiting


def waiting_of(txn: Txn, session: str) -> list[VolumeRow]:
    """Give the volumes that a session has enrolled and that wait for their owner."""
    found = []
    for one in enrolments.of_session(txn, session):
        rows = vms.volumes(txn, one.vm_id, state=WAITING)
        found += [row for row in rows if (row.uuid, row.version) == (one.uuid, one.version)]
    return found


def undo(txn: Txn, row: VolumeRow, now_s: int) -> None:
    """Drop the key of an enrolment that is not active."""
    _drop(txn, row, now_s, None, "by its owner")


def drop_old_recoveries(txn: Txn, now_s: int) -> None:
    """Forget the recovery keys of codes that have ended; of used ones once no session that used them can ask again."""
    enrolments.drop_old_recoveries(txn, now_s, now_s - SESSION_S)


def drop_expired(txn: Txn, vm_id: str, now_s: int) -> None:
    """Drop the keys of a VM that nobody has confirmed in time."""
    drop_old_recoveries(txn, now_s)
    for row in vms.volumes(txn, vm_id, state=STAGED):
        if now_s > row.created + STAGED_S:
            _drop(txn, row, now_s, None, "never confirmed")


def _is_proved(row: CodeRow, judgement: Judgement) -> bool:
    try:
        enrol_code.verify_proof(row.public_key, judgement.t0, judgement.enrol_proof or b"")
    except NotAuthentic:
        return False
    return True


def _told(row: CodeRow | None, now_s: int) -> str:
    if row is None:
        return "no code"
    if row.session is not None:
        return f"a code that session {row.session} has used"
    if now_s > row.expires:
        return f"a code that was good until {now_s - row.expires} s ago"
    return "a code from the future" if now_s < row.created else "one"


def _drop(txn: Txn, row: VolumeRow, now_s: int, session: str | None, why: str) -> None:
    vms.remove_volume(txn, row.vm_id, row.uuid, row.version)
    _record(txn, "enrol-dropped", row.vm_id, row.uuid, now_s, session, {"version": row.version, "why": why})


def _record(  # noqa: PLR0913 - the columns of a line
    txn: Txn, event: str, vm_id: str, uuid: str, now_s: int, session: str | None, body: dict[str, object]
) -> None:
    ledger.append(txn, at_s=now_s, event=event, vm_id=vm_id, session=session, body={"uuid": uuid, **body})
