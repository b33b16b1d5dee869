"""Vectors of the answer's two layers and of the Confirm that follows: docs/protocol.md section 5, from its words."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from tests.conformance.making import hpke
from tests.conformance.making.vector import Vector, given

TH: Final = hashlib.sha256(b"TH").digest()
OTHER_TH: Final = hashlib.sha256(b"another TH").digest()
S: Final = bytes(range(32, 64))
PAYLOAD: Final = b'{"type":"verdict"}'
OUTCOMES: Final = ("received", "opened", "failed", "reencrypted")
MLKEM_SEED_SIZE: Final = 64


def inner(secret: bytes, binding: bytes, payload: bytes) -> bytes:
    """Make the inner layer: AES-256-GCM under a key that comes from S, nonce zero."""
    key = hpke.expand(hpke.extract(binding, secret), b"kagimori/1/inner", 32)
    return AESGCM(key).encrypt(bytes(12), payload, binding)


def answer(secret: bytes | None, binding: bytes, payload: bytes) -> bytes:
    """Make both layers, or without S the outer one alone, sealed to the published recipient."""
    within = payload if secret is None else inner(secret, binding, payload)
    return hpke.seal(b"kagimori/1/answer\0" + binding, within)


def confirm_mac(confirm_key: bytes, binding: bytes, outcome: str) -> bytes:
    """Confirm.mac."""
    return hmac.digest(confirm_key, b"kagimori/1/confirm\0" + binding + outcome.encode(), "sha256")


def response_key(entropy: list[bytes]) -> bytes:
    """Derive an agent's HPKE private key from several sources (HKDF with SHA-512): 64 bytes ML-KEM, 32 bytes X25519."""
    sources = b"".join(len(source).to_bytes(4, "big") + source for source in entropy)
    secret = hmac.digest(bytes(64), sources, "sha512")
    first = hmac.digest(secret, b"kagimori/1/hpke-key\x01", "sha512")
    return first + hmac.digest(secret, first + b"kagimori/1/hpke-key\x02", "sha512")[:32]


def vectors() -> Iterator[Vector]:
    """Give all of them."""
    yield from _opening()
    yield from _altered()
    yield from _keys()
    for outcome in OUTCOMES:
        for name, key, binding in (
            ("", S, TH),
            ("-other-answer", S, OTHER_TH),
            ("-other-key", bytes(32), TH),
        ):
            yield Vector(
                f"confirm/{outcome}{name}",
                "HMAC-SHA256 under confirm_key, over label, TH and outcome.",
                given(confirm_key=key, binding=binding, outcome=outcome),
                {"mac": confirm_mac(key, binding, outcome).hex()},
            )


def _open(sealed: bytes, secret: bytes | None = S, binding: bytes = TH) -> dict[str, bytes]:
    private = {
        "mlkem_seed": hpke.RECIPIENT[:MLKEM_SEED_SIZE],
        "x25519_private": hpke.RECIPIENT[MLKEM_SEED_SIZE:],
    }
    return {"sealed.bin": sealed} | given(**private, binding=binding, secret=secret)


def _opening() -> Iterator[Vector]:
    for name, secret, about in (
        ("with-a-tpm", S, "Both layers: HPKE, then AES-256-GCM under what comes from S."),
        ("without-a-tpm", None, "The outer layer alone: there is no S."),
    ):
        for length, payload in (("", PAYLOAD), ("-empty", b""), ("-long", bytes(range(256)))):
            within = payload if secret is None else inner(secret, TH, payload)
            yield Vector(
                f"sealing/{name}{length}",
                about,
                _open(answer(secret, TH, payload), secret),
                {"inner": within.hex(), "payload": payload.hex()},
            )


def _altered() -> Iterator[Vector]:
    outer, within = "answer.hpke", "answer.inner"
    good = answer(S, TH, PAYLOAD)
    whole = {
        "enc-mlkem": _flipped(good, 0),
        "enc-x25519": _flipped(good, 8 * 1088 + 1),
        "ciphertext": _flipped(good, 8 * 1120),
        "tag": _flipped(good, 8 * len(good) - 1),
        "longer": good + b"\0",
        "cut-in-the-tag": good[:-1],
        "cut-after-enc": good[:1120],
        "cut-in-enc": good[:1119],
        "nothing": b"",
        "info-without-label": hpke.seal(TH, inner(S, TH, PAYLOAD)),
        "info-without-separator": hpke.seal(b"kagimori/1/answer" + TH, inner(S, TH, PAYLOAD)),
    }
    for name, sealed in whole.items():
        yield Vector(f"sealing/{name}", "The outer layer does not open.", _open(sealed), fails=outer)
    for_other = answer(S, OTHER_TH, PAYLOAD)
    yield Vector("sealing/other-answer", "Sealed for another exchange.", _open(for_other), fails=outer)
    info = b"kagimori/1/answer\0" + TH
    inside = {
        "inner-of-another-answer": inner(S, OTHER_TH, PAYLOAD),
        "inner-of-another-s": inner(bytes(32), TH, PAYLOAD),
        "inner-flipped": _flipped(inner(S, TH, PAYLOAD), 0),
        "inner-cut": inner(S, TH, PAYLOAD)[:-1],
        "inner-missing": PAYLOAD,
        "inner-nothing": b"",
    }
    for name, content in inside.items():
        sealed = hpke.seal(info, content)
        yield Vector(f"sealing/{name}", "The inner layer does not open.", _open(sealed), fails=within)
    for size in (0, 31, 33):
        short = _open(good, (S + S)[:size])
        yield Vector(f"sealing/s-of-{size}", "S has 32 bytes.", short, fails=within)


def _keys() -> Iterator[Vector]:
    first, second = bytes(range(32)), b"TPM2_GetRandom" + bytes(50)
    for name, entropy in (
        ("one-source", [first]),
        ("two-sources", [first, second]),
        ("turned", [second, first]),
        ("one-source-is-dead", [first, b""]),
        ("borders-count", [first + second[:1], second[1:]]),
    ):
        private = response_key(entropy)
        yield Vector(
            f"sealing/key-{name}",
            "How our agent makes its HPKE key. No peer can see it: another agent may do otherwise.",
            given(entropy=entropy),
            {"public_sha256": hashlib.sha256(hpke.public_key(private)).hexdigest()},
        )
    for name, entropy in (("no-source", []), ("two-halves", [bytes(31), bytes(31)])):
        about = "One source must be good by itself."
        yield Vector(f"sealing/key-{name}", about, given(entropy=entropy), fails="sealing.entropy")
    size = len(hpke.RECIPIENT_PUBLIC)
    for name, public in {
        "nothing": b"",
        "short": hpke.RECIPIENT_PUBLIC[:-1],
        "long": hpke.RECIPIENT_PUBLIC + b"\0",
        "large-coefficients": b"\xff" * size,
        "x25519-of-low-order": hpke.RECIPIENT_PUBLIC[:-32] + bytes(32),
    }.items():
        about = "A verifier refuses an hpke_public_key that is none."
        yield Vector(f"sealing/to-{name}", about, given(hpke_public_key=public), fails="hello.hpke-key")


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
