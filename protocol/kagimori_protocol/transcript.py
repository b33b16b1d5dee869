"""The tie: what report and quote must commit to, and what answers and confirmations are bound to.

PROTOCOL.md section 4. Both ends call these functions and vectors pin them; nothing else in Kagimori computes them.
Inputs are always **the exact bytes sent**, never a re-encoding.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LABEL_T0: Final = b"kagimori/1/t0"
LABEL_SVSM_NONCE: Final = b"kagimori/1/svsm-nonce"
LABEL_REPORT_DATA: Final = b"kagimori/1/report-data"
LABEL_QUOTE: Final = b"kagimori/1/quote"
LABEL_ANSWER: Final = b"kagimori/1/answer"

MAX_VERIFIERS: Final = 8


def t0(hello: bytes, challenges: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Commit to one Hello and to every challenge that it drew, in order (64 bytes).

    ``challenges`` holds pairs (the verifier's Ed25519 public key, Challenge body). Raises Malformed unless there are
    1 to 8 of them: with none, nothing would be fresh.
    """
    if not 1 <= len(challenges) <= MAX_VERIFIERS:
        raise Malformed(
            "Evidence must answer at least one challenge and not too many.",
            code="evidence.challenges",
            expected=f"1 to {MAX_VERIFIERS}",
            found=str(len(challenges)),
        )
    parts = [_sha256(hello), bytes([len(challenges)])]
    for public_key, challenge in challenges:
        parts += [_sha256(public_key), _sha256(challenge)]
    return _labelled(hashlib.sha512, LABEL_T0, *parts)


def svsm_nonce(t0_value: bytes) -> bytes:
    """Give the nonce that the SVSM signs together with its manifest: exactly 64 bytes, written to ``inblob``."""
    return _labelled(hashlib.sha512, LABEL_SVSM_NONCE, t0_value)


def svsm_report_data(nonce: bytes, manifest: bytes) -> bytes:
    """Give the REPORT_DATA that an SVSM makes of nonce and manifest (AMD 58019, section 7).

    The concatenation is unambiguous only because the nonce has a fixed size. Raises Malformed for any other.
    """
    if len(nonce) != hashlib.sha512().digest_size:
        raise Malformed(
            "An SVSM nonce has the wrong size.",
            code="svsm.nonce",
            expected="64 bytes",
            found=f"{len(nonce)} bytes",
        )
    return hashlib.sha512(nonce + manifest).digest()


def direct_report_data(t0_value: bytes) -> bytes:
    """Give the REPORT_DATA of kind ``snp-direct`` (64 bytes)."""
    return _labelled(hashlib.sha512, LABEL_REPORT_DATA, t0_value)


def quote_qualifying_data(t0_value: bytes, report: bytes, manifest: bytes) -> bytes:
    """T1, the qualifyingData of TPM2_Quote (32 bytes): this exchange, this report, this manifest."""
    return _labelled(hashlib.sha256, LABEL_QUOTE, t0_value, _sha256(report), _sha256(manifest))


def answer_binding(t0_value: bytes, challenge: bytes, evidence: bytes) -> bytes:
    """TH (32 bytes): binds an answer to one verifier's Challenge and to the exact Evidence that it answers."""
    return _labelled(hashlib.sha256, LABEL_ANSWER, t0_value, _sha256(challenge), _sha256(evidence))


def session_id(session: bytes) -> str:
    """Name a session for people, logs and the ledger: the first 8 bytes of its token's SHA-256, in hex."""
    return _sha256(session)[:8].hex()


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _labelled(algorithm: Callable[[bytes], hashlib._Hash], label: bytes, *parts: bytes) -> bytes:
    """Hash ``label || 0x00 || parts``; all parts have fixed sizes, so no two inputs meet."""
    return algorithm(label + b"\x00" + b"".join(parts)).digest()
