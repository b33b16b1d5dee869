"""The signature that makes a reply an answer (PROTOCOL.md section 3).

``Kagimori-Signature: ed25519; key=<key id>; sig=<base64>`` covers ``label || 0x00 || SHA-256(request body) ||
reply body``, with a label for each type of reply. Bound to the request, a reply cannot answer another one;
bound to its type, it cannot pass for another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import TYPE_CHECKING, Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from kagimori_protocol.errors import NotAuthentic
from kagimori_protocol.messages import REPLY_TYPES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

HEADER: Final = "Kagimori-Signature"
HEADER_KEYS: Final = "Kagimori-Keys"
"""Of a request: the IDs of the keys that the sender would believe a reply by. A hint, outside of everything signed."""
LABEL_REPLY: Final = "kagimori/1/reply/"
PUBLIC_KEY_SIZE: Final = 32

_SIGNATURE_SIZE: Final = 64
_HEADER_FORM: Final = re.compile(r"\Aed25519; key=([0-9a-f]{16}); sig=([A-Za-z0-9+/]{86}==)\Z")

_KEYS_FORM: Final = re.compile(r"\A[0-9a-f]{16}(, [0-9a-f]{16}){0,3}\Z")
"""One to four: as many as an agent can pin of one verifier (PROTOCOL.md section 1)."""


class _Typed(msgspec.Struct):
    """The one field that is read before the signature is verified, to choose the label."""

    type: str


_TYPED: Final = msgspec.json.Decoder(_Typed)
"""Made by whoever imports this: an agent verifies replies in several threads (kagimori_protocol.messages)."""


def key_id(public_key: bytes) -> str:
    """Name a public key: the first 8 bytes of its SHA-256, in hex."""
    return hashlib.sha256(public_key).digest()[:8].hex()


def write_key_ids(public_keys: Iterable[bytes]) -> str:
    """Give the value of the Kagimori-Keys header: the IDs of these keys."""
    return ", ".join(map(key_id, public_keys))


def read_key_ids(header: str) -> frozenset[str]:
    """Read the IDs in a Kagimori-Keys header. What has another form names none: it is a hint, and anybody may have sent it."""
    return frozenset(header.split(", ")) if _KEYS_FORM.match(header) else frozenset()


def signed_bytes(reply_type: str, request: bytes, reply: bytes) -> bytes:
    """Give the bytes that a signature covers; ``reply_type`` is one of messages.REPLY_TYPES."""
    label = (LABEL_REPLY + reply_type).encode()
    return label + b"\x00" + hashlib.sha256(request).digest() + reply


def sign(private_key: Ed25519PrivateKey, request: bytes, reply: bytes) -> str:
    """Sign a reply to a request; returns the header's value."""
    signature = private_key.sign(signed_bytes(_reply_type(reply), request, reply))
    public = private_key.public_key().public_bytes_raw()
    return f"ed25519; key={key_id(public)}; sig={base64.b64encode(signature).decode()}"


def verify(public_keys: Collection[bytes], header: str | None, request: bytes, reply: bytes) -> bytes:
    """Return the public key (of ``public_keys``, raw Ed25519) that signed this reply to this request.

    Raises NotAuthentic with code ``reply.unsigned``, ``reply.key`` or ``reply.signature``; without keys
    nothing can be an answer.
    """
    match = _HEADER_FORM.match(header or "")
    if match is None:
        raise NotAuthentic(
            "A reply carries no signature that can be read.",
            code="reply.unsigned",
            expected=f"{HEADER}: ed25519; key=<16 hex digits>; sig=<base64>",
            found="no such header" if header is None else f"{len(header)} characters of another form",
        )
    known = {key_id(key): key for key in public_keys}
    key = known.get(match[1])
    if key is None:
        raise NotAuthentic(
            "A reply is signed by a key that this VM does not know.",
            code="reply.key",
            expected="one of " + (", ".join(sorted(known)) or "no keys at all"),
            found=match[1],
            todo="Compare with `kagimori-verifier identity show`; the keys in agent.toml are the ones that count.",
        )
    try:
        signature = base64.b64decode(match[2], validate=True)
        if base64.b64encode(signature).decode() != match[2]:
            raise InvalidSignature
        Ed25519PublicKey.from_public_bytes(key).verify(
            signature, signed_bytes(_reply_type(reply), request, reply)
        )
    except (InvalidSignature, binascii.Error, ValueError):
        raise NotAuthentic(
            "A reply's signature does not verify.",
            code="reply.signature",
            expected=f"a signature by key {match[1]} over this request and this reply",
            found="one over something else",
        ) from None
    return key


def _reply_type(reply: bytes) -> str:
    """Read the type of a reply, or raise NotAuthentic where it has none that is ever signed."""
    try:
        reply_type = _TYPED.decode(reply).type
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        reply_type = ""
    if reply_type not in REPLY_TYPES:
        raise NotAuthentic(
            "A reply is of no type that a verifier signs.",
            code="reply.signature",
            expected=" or ".join(REPLY_TYPES),
            found=repr(reply_type[:32]),
        )
    return reply_type
