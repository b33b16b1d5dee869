"""The only room that lets a key out (PROTOCOL.md sections 5 and 6, steps 10 and 11).

The decision is written to the ledger, **then** the key is unwrapped, **then** the answer is made. Redeeming a session,
its ledger line and its claim on this boot are one transaction; whatever dies afterwards, the same evidence gets the
same answer (or one made again under the same ledger line), and other evidence gets none.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING, Any, Final

from msgspec import UNSET, UnsetType

from kagimori_protocol import messages, sealing, signature, tpm, transcript
from kagimori_protocol.errors import NotAuthentic, OperatorError
from kagimori_protocol.messages import Check
from kagimori_verifier import enrolling, ledger
from kagimori_verifier.decision import Allow, Deny
from kagimori_verifier.observe import observed
from kagimori_verifier.store import observations, redemptions, vms
from kagimori_verifier.store.redemptions import Redemption

if TYPE_CHECKING:
    from collections.abc import Callable

    from kagimori_protocol.messages import Confirm, Outcome, Payload
    from kagimori_verifier.keystore.unlock_keys import UnlockKeys
    from kagimori_verifier.metrics import Metrics
    from kagimori_verifier.pipeline import Judgement
    from kagimori_verifier.store import Store, Txn

KEYS: Final = "keys"
ALLOWED: Final = "allowed"
DENIED: Final = "denied"
"""What a redemption may have decided: keys are released, or a verdict tells that they would or would not be."""

_EVENTS: Final = {KEYS: "released", ALLOWED: "judged", DENIED: "refused"}
_ABOUT_BOOT: Final = ("pcr.", "cap.", "boot.", "volume.")
"""Checks about what was booted, what this boot has had already, and its volumes; all others are about who says so."""
_FINAL: Final[frozenset[Outcome]] = frozenset({"opened", "failed", "reencrypted"})
_GIVES_KEYS: Final = frozenset({"unlock", "enrol"})


class Release:
    """Turns judgements into answers, and Confirms into ledger lines."""

    def __init__(self, store: Store, unlock_keys: UnlockKeys, metrics: Metrics) -> None:
        """Keep the collaborators."""
        self._store = store
        self._unlock_keys = unlock_keys
        self._metrics = metrics

    def answer(self, judgement: Judgement, now_s: int) -> bytes:
        """Answer authentic evidence: the body of a Sealed, with keys or with a verdict.

        Raises NotAuthentic (``session.unused``) if other evidence has used this session, and OperatorError if the
        database fails: then nothing was released that the ledger does not show.
        """
        session_sha256 = hashlib.sha256(judgement.session).digest()
        fresh = False
        with self._store.write() as txn:
            settled = redemptions.find(txn, session_sha256)
            if settled is None:
                decision = _apply_release_rules(txn, judgement, session_sha256, now_s)
                settled = _redeem(txn, judgement, decision, session_sha256, now_s)
                if settled.decision == KEYS and settled.purpose == "enrol":
                    enrolling.keep_new_keys(txn, judgement, settled.session, now_s, self._new_key(settled))
                fresh = True
            else:
                _require_same_evidence(settled, judgement)
                decision = _as_refused(txn, settled) if settled.decision == DENIED else judgement.decision
        if fresh:  # counted once the ledger has it
            self._metrics.decided(judgement.hello.purpose, settled.decision)
        if settled.answer is not None:
            return settled.answer
        if settled.decision != DENIED and isinstance(decision, Deny):
            raise _judged_otherwise(decision)
        return self._make_answer(judgement, settled, decision)

    def confirm(self, confirm: Confirm, now_s: int) -> None:
        """Write down what became of an answer. Raises NotAuthentic if the sender has not opened it.

        From here on the AK of that evidence is proven, and what it showed may be learned from. The confirm key stays,
        wrapped, as long as its row: the last Confirm may be sent again until its receipt arrives.
        """
        session_sha256 = hashlib.sha256(confirm.session).digest()
        with self._store.write() as txn:
            known = redemptions.find(txn, session_sha256)
            if known is None or known.confirm_key is None:
                raise _unconfirmed("confirm.session", "a session that has an answer", "one that has none")
            key = self._unlock_keys.unwrap_confirm_key(known.confirm_key, session_sha256)
            if not hmac.compare_digest(sealing.confirm_mac(key, known.binding, confirm.outcome), confirm.mac):
                raise _unconfirmed("confirm.mac", "a MAC under the key inside the answer", "another MAC")
            if known.outcome == confirm.outcome:
                return
            if not _may_follow(known, confirm.outcome):
                raise _unconfirmed(
                    "confirm.order", f"{known.outcome or 'received'}, as it was", confirm.outcome
                )
            redemptions.set_outcome(txn, session_sha256, confirm.outcome)
            observations.confirm(txn, known.session)
            if known.purpose == "enrol" and known.decision == KEYS:
                enrolling.confirmed(txn, known, confirm.outcome, now_s)
            if confirm.outcome == "opened":
                redemptions.mark_opened(txn, known.signer, known.chip_id, known.report_id, session_sha256)
            ledger.append(
                txn,
                at_s=now_s,
                event=f"confirmed-{confirm.outcome}",
                vm_id=known.vm_id,
                session=known.session,
                body={"purpose": known.purpose},
            )
        self._metrics.confirmed(confirm.outcome)

    def _make_answer(self, judgement: Judgement, settled: Redemption, decision: Allow | Deny) -> bytes:
        """Step 11, after the ledger: unwrap, seal, keep the answer. Whoever comes second gives the first's answer.

        An answer that was dropped is made again around the same confirm key: who opened the first may still confirm it.
        """
        confirm_key = (
            secrets.token_bytes(sealing.SECRET_SIZE)
            if settled.confirm_key is None
            else self._unlock_keys.unwrap_confirm_key(settled.confirm_key, settled.session_sha256)
        )
        payload = self._payload(judgement, settled, decision, confirm_key)
        boot = judgement.claims.vtpm
        secret = None if boot is None else secrets.token_bytes(sealing.SECRET_SIZE)
        credential: messages.Credential | Any = UNSET
        if boot is not None and secret is not None:
            id_object, encrypted_secret = tpm.make_credential(boot.ek_public, boot.ak_name, secret)
            credential = messages.Credential(id_object=id_object, encrypted_secret=encrypted_secret)
        sealed = messages.Sealed(
            version=messages.VERSION,
            session=judgement.session,
            credential=credential,
            sealed=sealing.seal(
                judgement.hello.hpke_public_key, judgement.binding, messages.encode(payload), secret
            ),
        )
        answer = messages.encode(sealed)
        wrapped = self._unlock_keys.wrap_confirm_key(confirm_key, settled.session_sha256)
        with self._store.write() as txn:
            current = redemptions.find(txn, settled.session_sha256)
            if current is not None and current.answer is not None:
                return current.answer
            redemptions.store_answer(txn, settled.session_sha256, answer, wrapped)
        return answer

    def _payload(
        self, judgement: Judgement, settled: Redemption, decision: Allow | Deny, confirm_key: bytes
    ) -> Payload:
        if settled.decision == KEYS:
            return messages.Keys(
                confirm_key=confirm_key,
                volumes=self._volume_keys(judgement, settled),
                recovery_key=self._recovery_key(settled),
            )
        return messages.Verdict(
            confirm_key=confirm_key, allowed=settled.decision == ALLOWED, checks=list(decision.checks)
        )

    def _new_key(self, settled: Redemption) -> Callable[[str, int], bytes]:
        """Give what makes and wraps a new key for a volume of this session's VM."""

        def wrapped(uuid: str, version: int) -> bytes:
            return self._unlock_keys.wrap(self._unlock_keys.make(), settled.vm_id, uuid, version)

        return wrapped

    def _volume_keys(self, judgement: Judgement, settled: Redemption) -> list[messages.VolumeKey]:
        """Unwrap the key of each volume that was asked for, in the order asked; of an enrolment, its own new ones alone."""
        vm_id = judgement.vm.vm_id
        with self._store.read() as txn:
            if settled.purpose == "enrol":
                rows = enrolling.keys_of(txn, vm_id, settled.session)
            else:
                rows = {row.uuid: row for row in vms.volumes(txn, vm_id)}
        keys = []
        for uuid in judgement.hello.volumes:
            if uuid not in rows:
                raise OperatorError(
                    "A volume was removed while its key was being released.",
                    code="volume.removed",
                    expected=f"an active volume {uuid} of {vm_id}",
                    found="none",
                )
            row = rows[uuid]
            unlock_key = self._unlock_keys.unwrap(row.wrapped, vm_id, uuid, row.version)
            keys.append(messages.VolumeKey(uuid=uuid, unlock_key=unlock_key, header_epoch=row.header_epoch))
        return keys

    def _recovery_key(self, settled: Redemption) -> bytes | UnsetType:
        """Unwrap the recovery key that the owner has put on paper for this enrolment, if he has.

        Raises OperatorError where it is gone: an answer without it would enrol volumes that the paper does not open.
        """
        if settled.purpose != "enrol":
            return UNSET
        with self._store.read() as txn:
            row = enrolling.recovery_of(txn, settled.vm_id, settled.session)
            promised = any(
                line.event == enrolling.RECOVERY_GIVEN for line in ledger.read(txn, session=settled.session)
            )
        if not promised:
            return UNSET
        if row is None or row.recovery is None:
            raise OperatorError(
                "A code was replaced while its recovery key was being given.",
                code="recovery.gone",
                expected=f"the recovery key that session {settled.session} was promised",
                found="none",
                todo="Enrol by the newer code; the recovery code of the older is to be destroyed.",
            )
        return self._unlock_keys.unwrap_recovery_key(row.recovery, row.vm_id, row.public_key)


def _apply_release_rules(txn: Txn, judgement: Judgement, session_sha256: bytes, now_s: int) -> Allow | Deny:
    """Step 10: this boot has not opened its volumes yet, and without a TPM it gets keys once, for any VM.

    Only ``unlock`` releases keys that open something, so only it is held to these rules; ``enrol`` has its own.
    """
    decision = judgement.decision
    if judgement.hello.purpose == "enrol":
        return enrolling.apply_rules(txn, judgement, now_s)
    if judgement.hello.purpose != "unlock":
        return decision
    signer, chip_id, report_id = judgement.claims.snp.boot
    opened = redemptions.is_opened(txn, report_id)
    checks = [
        *decision.checks,
        Check(
            id="boot.unopened",
            ok=not opened,
            expected="a boot that has not confirmed `opened` yet",
            found=f"REPORT_ID {report_id.hex()}" + (" has" if opened else " has not"),
        ),
    ]
    if isinstance(decision, Allow) and not opened and judgement.claims.vtpm is None:
        first = redemptions.claim_direct_grant(txn, signer, chip_id, report_id, session_sha256)
        checks.append(
            Check(
                id="boot.ungranted",
                ok=first,
                expected="a boot that has had no keys yet, for any VM",
                found=f"REPORT_ID {report_id.hex()}" + (" has had none" if first else " has had keys"),
            )
        )
    allowed = isinstance(decision, Allow) and all(check.ok for check in checks)
    return Allow(tuple(checks)) if allowed else Deny(tuple(checks))


def _redeem(
    txn: Txn, judgement: Judgement, decision: Allow | Deny, session_sha256: bytes, now_s: int
) -> Redemption:
    """Write the decision down: the session is used, the ledger has its line, the owner can see what was shown."""
    session = transcript.session_id(judgement.session)
    snp, hello = judgement.claims.snp, judgement.hello
    outcome = KEYS if hello.purpose in _GIVES_KEYS else ALLOWED
    decided = outcome if isinstance(decision, Allow) else DENIED
    verifier_key = signature.key_id(judgement.signed_by)
    redemption = Redemption(
        session_sha256=session_sha256,
        session=session,
        evidence_sha256=judgement.evidence_sha256,
        vm_id=hello.vm_id,
        purpose=hello.purpose,
        decision=decided,
        kind=judgement.claims.measurement.kind,
        signer=snp.signer,
        chip_id=snp.report.chip_id,
        report_id=snp.report.report_id,
        binding=judgement.binding,
        created=now_s,
        expires=judgement.expires_s,
        answer=None,
        confirm_key=None,
        outcome=None,
        verifier_key=verifier_key,
    )
    redemptions.purge_answers(txn, now_s)
    enrolling.drop_old_recoveries(txn, now_s)
    redemptions.insert(txn, redemption)
    if judgement.claims.vtpm is not None and _is_worth_learning(decision):
        observations.add(txn, observed(judgement, session, now_s))
    ledger.append(
        txn,
        at_s=now_s,
        event=_EVENTS[decided],
        vm_id=hello.vm_id,
        session=session,
        body={
            "purpose": hello.purpose,
            "kind": redemption.kind,
            "root": str(snp.root),
            "product": snp.product,
            "chip_id": redemption.chip_id.hex(),
            "report_id": redemption.report_id.hex(),
            "measurement": snp.report.measurement.hex(),
            "volumes": list(hello.volumes),
            "evidence_sha256": judgement.evidence_sha256.hex(),
            "verifier_key": verifier_key,
            "checks": [
                {"id": check.id, "ok": check.ok, "expected": check.expected, "found": check.found}
                for check in decision.checks
            ],
        },
    )
    return redemption


def _may_follow(known: Redemption, outcome: Outcome) -> bool:
    """Tell whether an outcome may come after the one that is known: a final one stays, but for a new volume key."""
    if outcome == "reencrypted":
        return known.purpose == "enrol" and known.outcome == "opened"
    return known.outcome not in _FINAL and (known.decision == KEYS or outcome == "received")


def _is_worth_learning(decision: Allow | Deny) -> bool:
    """Tell whether PCR values may become reference values: nothing else speaks against this evidence than what it booted.

    Behind a chip, firmware or guest policy that the owner refuses, even a proven TPM proves nothing: a host reads and
    writes the memory of a guest with DEBUG, its SVSM's too.
    """
    failed = [check.id for check in decision.checks if not check.ok]
    return all(check.startswith(_ABOUT_BOOT) for check in failed)


def _require_same_evidence(settled: Redemption, judgement: Judgement) -> None:
    if settled.evidence_sha256 != judgement.evidence_sha256:
        raise NotAuthentic(
            "A session has been used by other evidence.",
            code="session.unused",
            expected=f"evidence {settled.evidence_sha256.hex()}, which used it",
            found=judgement.evidence_sha256.hex(),
        )


def _as_refused(txn: Txn, settled: Redemption) -> Deny:
    """Give a refusal with the reasons that the ledger has: this boot, or the policy, may look different by now."""
    lines = ledger.read(txn, session=settled.session)
    body = next(
        line.body for line in lines if line.body.get("evidence_sha256") == settled.evidence_sha256.hex()
    )
    return Deny(tuple(Check(**check) for check in body["checks"]))


def _judged_otherwise(decision: Deny) -> NotAuthentic:
    """An answer that was never given is not made up for under a policy that has changed since."""
    failed = [check for check in decision.checks if not check.ok]
    return NotAuthentic(
        "What was allowed when a session was used is refused by now, and its answer was not made then.",
        code="session.unused",
        expected="; ".join(f"{check.id}: {check.expected}" for check in failed),
        found="; ".join(f"{check.id}: {check.found}" for check in failed),
    )


def _unconfirmed(code: str, expected: str, found: str) -> NotAuthentic:
    return NotAuthentic("A Confirm is not accepted.", code=code, expected=expected, found=found)
