"""Three whole exchanges, byte for byte: what each side sends, and every value on the way. Keys and chance are fixed.

Reports, quotes and credentials are made-up bytes here: nothing in an exchange's own cryptography looks into them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Final

from tests.conformance.making import enrol, hpke, replies, sealing, tie, tpm
from tests.conformance.making.form import CHALLENGE, DIGEST, UUID, Body, form
from tests.conformance.making.vector import Vector, given, hexed

SESSION: Final = bytes(range(200))
UNLOCK_KEY: Final = b"\xd1" * 32
CONFIRM_KEY: Final = b"\xc0" * 32
RECOVERY_KEY: Final = b"\x4e" * 32
REPORT: Final = bytes(range(256)) * 4 + bytes(160)


def vectors() -> Iterator[Vector]:
    """Give all of them."""
    yield _exchange(
        "snp-direct-unlock",
        "A VM without a TPM gets its key.",
        hello={"purpose": "unlock", "kind": "snp-direct"},
        payload={
            "type": "keys",
            "confirm_key": CONFIRM_KEY,
            "volumes": [{"uuid": UUID, "unlock_key": UNLOCK_KEY, "header_epoch": 0}],
        },
        pcr_selection=bytes(4),
        outcome="opened",
    )
    yield _exchange(
        "svsm-vtpm-dry-run",
        "A VM with a vTPM gets a verdict; S is what its TPM gives for the credential.",
        hello={"purpose": "dry-run", "kind": "svsm-vtpm"},
        payload={
            "type": "verdict",
            "confirm_key": CONFIRM_KEY,
            "allowed": False,
            "checks": [{"id": "cap.off", "ok": False, "expected": "zero", "found": "capped"}],
        },
        pcr_selection=tpm.selection([0, 7, 15]),
        outcome="received",
    )
    yield _exchange(
        "svsm-vtpm-enrol",
        "A booted system proves the operator's code, gets a new key and a recovery key, and has reencrypted the volume.",
        hello={"purpose": "enrol", "kind": "svsm-vtpm"},
        payload={
            "type": "keys",
            "confirm_key": CONFIRM_KEY,
            "volumes": [{"uuid": UUID, "unlock_key": UNLOCK_KEY, "header_epoch": 1}],
            "recovery_key": RECOVERY_KEY,
        },
        pcr_selection=tpm.selection([0, 7, 15]),
        outcome="reencrypted",
    )


def _exchange(
    name: str, about: str, *, hello: dict[str, str], payload: Body, pcr_selection: bytes, outcome: str
) -> Vector:
    with_tpm = hello["kind"] == "svsm-vtpm"
    keys = {"ek_public": tpm.ek(), "ak_public": tpm.ecc_ak()} if with_tpm else {}
    asked = {
        "type": "hello",
        "version": 1,
        "vm_id": "web1",
        **hello,
        "hpke_public_key": hpke.RECIPIENT_PUBLIC,
    }
    hello_body = form({**asked, **keys, "volumes": [UUID], "agent": "another agent 0.1"})
    challenge = form({**CHALLENGE, "session": SESSION, "pcr_selection": pcr_selection})
    verifier = replies.public_key(replies.SEED)
    t0 = tie.t0(hello_body, [(verifier, challenge)])
    evidence: Body = {
        "type": "evidence",
        "version": 1,
        "hello": hello_body,
        "challenges": [{"key": verifier, "challenge": challenge}],
        "report": REPORT,
    }
    gives: dict[str, Any] = {"t0": t0}
    if with_tpm:
        gives["t1"] = tie.t1(t0, REPORT, tpm.ek())
        gives["svsm_nonce"] = tie.svsm_nonce(t0)
        gives["report_data"] = tie.sha512(gives["svsm_nonce"] + tpm.ek())
        quoted = tpm.attest(qualifying=gives["t1"])
        evidence |= {
            "manifest": tpm.ek(),
            "quote": {"attest": quoted, "signature": tpm.ecdsa(quoted)},
            "pcrs": [{"index": index, "digest": value} for index, value in tpm.PCRS],
            "event_log": b"",
        }
    else:
        gives["report_data"] = tie.direct_report_data(t0)
    if hello["purpose"] == "enrol":
        evidence["enrol_proof"] = gives["enrol_proof"] = enrol.proof(enrol.SECRET, t0)
    evidence_body = form(evidence)
    th = tie.th(t0, challenge, evidence_body)
    secret = sealing.S if with_tpm else None
    answer = sealing.answer(secret, th, form(payload))
    credential = {"credential": {"id_object": b"id", "encrypted_secret": b"secret"}} if with_tpm else {}
    sealed = form({"type": "sealed", "version": 1, "session": SESSION, **credential, "sealed": answer})
    mac = sealing.confirm_mac(CONFIRM_KEY, th, outcome)
    confirm = form({"type": "confirm", "version": 1, "session": SESSION, "outcome": outcome, "mac": mac})
    receipt = form({"type": "receipt", "version": 1, "session": SESSION, "outcome": outcome})
    gives |= {"th": th, "payload": form(payload), "session": hashlib.sha256(SESSION).digest()[:8]}
    signed = {
        "challenge": replies.header(replies.SEED, "challenge", hello_body, challenge),
        "sealed": replies.header(replies.SEED, "sealed", evidence_body, sealed),
        "receipt": replies.header(replies.SEED, "receipt", confirm, receipt),
    }
    files = given(
        verifier_signing_seed=replies.SEED,
        mlkem_seed=hpke.RECIPIENT[: sealing.MLKEM_SEED_SIZE],
        x25519_private=hpke.RECIPIENT[sealing.MLKEM_SEED_SIZE :],
        secret=secret,
        outcome=outcome,
        signatures=signed,
    )
    bodies = {
        "hello": hello_body,
        "challenge": challenge,
        "evidence": evidence_body,
        "sealed": sealed,
        "confirm": confirm,
        "receipt": receipt,
    }
    assert len(DIGEST) == len(mac)
    return Vector(f"exchange/{name}", about, files | bodies, hexed(gives))
