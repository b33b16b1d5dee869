"""The session token: what the verifier remembers between challenge and evidence, kept by the guest.

An authenticated, encrypted box under a key that all nodes of a verifier share: issue time, nonce, SHA-256 of Hello and
SHA-256 of the Challenge with ``session`` empty (without that, a guest could rewrite ``pcr_selection`` and quote
nothing). Nothing is stored before evidence arrives, so a flood of Hellos allocates nothing. PROTOCOL.md section 3.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from kagimori_protocol import messages
from kagimori_verifier import wrapping

if TYPE_CHECKING:
    from kagimori_protocol.messages import Challenge

LABEL_TOKEN: Final = b"kagimori/1/token"
CLOCK_SKEW_S: Final = 5
"""How far in the future a token may have been issued: nodes of one verifier do not share a clock."""

_TIME_SIZE: Final = 8
_DIGEST_SIZE: Final = 32
_SIZE: Final = _TIME_SIZE + 3 * _DIGEST_SIZE


class Session(NamedTuple):
    """What a token holds: ``issued`` in seconds since 1970, the nonce, and two SHA-256 digests."""

    issued: int
    nonce: bytes
    hello_sha256: bytes
    challenge_sha256: bytes


def issue(key: bytes, hello: bytes, challenge: Challenge, now_s: int) -> Challenge:
    """Return ``challenge`` with its session: a token that binds it to this Hello. Random."""
    content = b"".join(
        (
            now_s.to_bytes(_TIME_SIZE, "big"),
            challenge.nonce,
            hashlib.sha256(hello).digest(),
            unbound_sha256(challenge),
        )
    )
    return msgspec.structs.replace(challenge, session=wrapping.seal(key, LABEL_TOKEN, content, b""))


def read(key: bytes, token: bytes) -> Session:
    """Open a token. Raises wrapping.BoxBroken for anything that was not issued under this key."""
    content = wrapping.unseal(key, LABEL_TOKEN, token, b"")
    if len(content) != _SIZE:
        raise wrapping.BoxBroken(
            "A session token has the wrong size.", expected=str(_SIZE), found=str(len(content))
        )
    rest = content[_TIME_SIZE:]
    nonce, hello, challenge = (
        rest[at : at + _DIGEST_SIZE] for at in range(0, 3 * _DIGEST_SIZE, _DIGEST_SIZE)
    )
    return Session(int.from_bytes(content[:_TIME_SIZE], "big"), nonce, hello, challenge)


def unbound_sha256(challenge: Challenge) -> bytes:
    """Hash a Challenge as it was before it had a session."""
    return hashlib.sha256(messages.encode(msgspec.structs.replace(challenge, session=b""))).digest()
