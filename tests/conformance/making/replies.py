"""Vectors of the signature that makes a reply an answer: docs/protocol.md section 3."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterator
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.conformance.making.vector import Vector, given

SEED: Final = bytes(range(32))
OTHER_SEED: Final = bytes(32)
REQUEST: Final = b'{"type":"hello"}'
TYPES: Final = ("challenge", "sealed", "pending", "denial", "unsupported-version", "receipt")


def public_key(seed: bytes) -> bytes:
    """Give the raw Ed25519 public key."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def header(seed: bytes, reply_type: str, request: bytes, reply: bytes) -> str:
    """Sign a reply as one of a type; the value of Kagimori-Signature."""
    covered = f"kagimori/1/reply/{reply_type}".encode() + b"\0" + hashlib.sha256(request).digest() + reply
    signature = Ed25519PrivateKey.from_private_bytes(seed).sign(covered)
    key_id = hashlib.sha256(public_key(seed)).hexdigest()[:16]
    return f"ed25519; key={key_id}; sig={b64encode(signature).decode()}"


def vectors() -> Iterator[Vector]:
    """Give all of them."""
    known = public_key(SEED)
    key_id = hashlib.sha256(known).hexdigest()[:16]
    for one in TYPES:
        reply = _reply(one)
        yield Vector(
            f"replies/{one}",
            "The label ends with the reply's type; request and reply are covered. Ed25519 is deterministic.",
            _given(header(SEED, one, REQUEST, reply), reply=reply, signing_seed=SEED),
            {"key": known.hex(), "key_id": key_id},
        )
    denial = _reply("denial")
    good = header(SEED, "denial", REQUEST, denial)
    yield Vector(
        "replies/second-of-two-keys",
        "The key id chooses among the keys that the agent knows.",
        _given(good, keys=[public_key(OTHER_SEED), known]),
        {"key": known.hex(), "key_id": key_id},
    )
    for name, about, code, inputs in _bad(good, denial):
        yield Vector(f"replies/{name}", about, _given(**inputs), fails=code)


def _bad(good: str, denial: bytes) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    unsigned, signature = "reply.unsigned", "reply.signature"
    other = header(OTHER_SEED, "denial", REQUEST, denial)
    renamed = good[: good.index("sig=")] + other[other.index("sig=") :]
    yield "no-header", "A reply without a signature is no answer.", unsigned, {"header": None}
    for name, changed in {
        "line-break-behind": good + "\n",
        "blank-in-front": " " + good,
        "no-blanks": good.replace("; ", ";"),
        "algorithm-none": good.replace("ed25519", "none"),
        "algorithm-upper-case": good.replace("ed25519", "ED25519"),
        "key-id-upper-case": good.replace(good[13:29], good[13:29].upper()),
        "cut": good[:-4] + "==",
        "two-signatures": f"{good}, {good}",
    }.items():
        yield name, "The header has one form.", unsigned, {"header": changed}
    yield "loose-base64", "Base64 whose unused bits are not zero.", signature, {"header": _loosened(good)}
    yield "unknown-key", "The agent's configuration does not have this key.", "reply.key", {"header": other}
    yield "no-keys", "Without keys nothing is an answer.", "reply.key", {"header": good, "keys": []}
    yield "key-id-of-another", "The key decides, not its name.", signature, {"header": renamed}
    yield "other-request", "A reply to another request.", signature, {"header": good, "request": b"{}"}
    changed_reply = denial.replace(b"vm", b"Vm")
    yield (
        "changed-reply",
        "One bit of the reply is another.",
        signature,
        {"header": good, "reply": changed_reply},
    )
    longer = denial + b"\n"
    yield "longer-reply", "A line break behind the reply.", signature, {"header": good, "reply": longer}
    as_receipt = header(SEED, "receipt", REQUEST, denial)
    yield "label-of-another-type", "Signed as a receipt.", signature, {"header": as_receipt}
    for one in ("keys", "hello"):
        never = {"header": header(SEED, one, REQUEST, _reply(one)), "reply": _reply(one)}
        yield f"type-{one}", "A type that no verifier signs.", signature, never
    html = b"<html>502</html>"
    proxy = {"header": header(SEED, "denial", REQUEST, html), "reply": html}
    yield "no-message", "What a proxy says.", signature, proxy


def _reply(reply_type: str) -> bytes:
    return f'{{"type":"{reply_type}","version":1,"session":"","code":"unknown-vm"}}'.encode()


def _given(
    header: str | None,
    keys: list[bytes] | None = None,
    request: bytes = REQUEST,
    reply: bytes | None = None,
    **more: bytes,
) -> dict[str, bytes]:
    body = _reply("denial") if reply is None else reply
    known = [public_key(SEED)] if keys is None else keys
    return given(public_keys=known, header=header, request=request, reply=body, **more)


def _loosened(value: str) -> str:
    """Set a bit of the base64 that stands for no bit of the signature."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return value[:-3] + alphabet[alphabet.index(value[-3]) + 1] + "=="
