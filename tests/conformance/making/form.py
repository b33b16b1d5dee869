"""Messages in their one form, written by hand: docs/protocol.md section 3. One valid message of each kind, and variations."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any, Final

from tests.conformance.making import hpke

Body = dict[str, Any]
"""A message's fields in order, ``type`` first; byte strings as bytes."""

UUID: Final = "0b3a6a7c-5c1b-4f5e-9d0e-0f4f8f6f2a11"
DIGEST: Final = b"\x11" * 32
SECRET: Final = bytes(range(0x40, 0x60))
PROOF: Final = bytes(range(64))
TEXT: Final = 'line\n tab\t more\b\f\r quote" backslash\\ slash/ control\x01\x1f delete\x7f é 鍵 \U0001f511'

HELLO: Final[Body] = {
    "type": "hello",
    "version": 1,
    "vm_id": "web1",
    "purpose": "unlock",
    "kind": "svsm-vtpm",
    "hpke_public_key": hpke.RECIPIENT_PUBLIC,
    "ek_public": b"ek",
    "ak_public": b"ak",
    "volumes": [UUID],
    "agent": "another agent 0.1",
}
CHALLENGE: Final[Body] = {
    "type": "challenge",
    "version": 1,
    "session": b"token",
    "nonce": DIGEST,
    "expires_in": 120,
    "pcr_selection": bytes.fromhex("00000001000b03ffff00"),
}
EVIDENCE: Final[Body] = {
    "type": "evidence",
    "version": 1,
    "hello": b"{}",
    "challenges": [{"key": DIGEST, "challenge": b"{}"}],
    "report": b"report",
    "manifest": b"manifest",
    "certificates": b"",
    "quote": {"attest": b"attest", "signature": b"signature"},
    "pcrs": [{"index": 0, "digest": DIGEST}, {"index": 23, "digest": DIGEST}],
    "event_log": b"log",
    "enrol_proof": PROOF,
}
SEALED: Final[Body] = {
    "type": "sealed",
    "version": 1,
    "session": b"token",
    "credential": {"id_object": b"id", "encrypted_secret": b"secret"},
    "sealed": b"sealed",
}
PENDING: Final[Body] = {
    "type": "pending",
    "version": 1,
    "session": b"token",
    "approval": "approval-1",
    "retry_after": 5,
}
DENIAL: Final[Body] = {"type": "denial", "version": 1, "session": b"token", "code": "not-authentic"}
VERSIONS: Final[Body] = {"type": "unsupported-version", "version": 1, "versions": [1, 2]}
CONFIRM: Final[Body] = {
    "type": "confirm",
    "version": 1,
    "session": b"token",
    "outcome": "opened",
    "mac": DIGEST,
}
RECEIPT: Final[Body] = {"type": "receipt", "version": 1, "session": b"token", "outcome": "opened"}
KEYS: Final[Body] = {
    "type": "keys",
    "confirm_key": SECRET,
    "volumes": [{"uuid": UUID, "unlock_key": SECRET, "header_epoch": 7, "next_unlock_key": DIGEST}],
    "recovery_key": DIGEST,
}
VERDICT: Final[Body] = {
    "type": "verdict",
    "confirm_key": SECRET,
    "allowed": False,
    "checks": [{"id": "cap.off", "ok": False, "expected": "PCR 15 zero", "found": TEXT}],
}
BODIES: Final[dict[str, Body]] = {
    body["type"]: body
    for body in (
        HELLO,
        CHALLENGE,
        EVIDENCE,
        SEALED,
        PENDING,
        DENIAL,
        VERSIONS,
        CONFIRM,
        RECEIPT,
        KEYS,
        VERDICT,
    )
}
PAYLOADS: Final = ("keys", "verdict")
"""Messages inside a Sealed, which have no version of their own."""
OPTIONAL: Final = {
    "hello": ("ek_public", "ak_public"),
    "evidence": ("manifest", "certificates", "quote", "pcrs", "event_log", "enrol_proof"),
    "sealed": ("credential",),
    "keys": ("recovery_key",),
}


def form(value: Any) -> bytes:  # noqa: ANN401 - a message, or a value in one
    """Write in the one form: fields in order, no blanks, UTF-8, byte strings as padded base64."""
    plain = json.dumps(value, default=_base64, separators=(",", ":"), ensure_ascii=False)
    return plain.encode()


def changed(body: Body, **changes: Any) -> Body:  # noqa: ANN401 - values of fields
    """Give a body with some fields another value, in their places."""
    return {name: changes.get(name, value) for name, value in body.items()}


def short(body: Body) -> Body:
    """Give a Hello an HPKE key that is easily described; what is broken about it is something else."""
    return changed(body, hpke_public_key=bytes(len(hpke.RECIPIENT_PUBLIC)))


def without(body: Body, *names: str) -> Body:
    """Leave fields out."""
    return {name: value for name, value in body.items() if name not in names}


def _base64(value: bytes) -> str:
    return b64encode(value).decode()
