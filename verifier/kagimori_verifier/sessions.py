"""Step 1 of PROTOCOL.md section 6: the evidence answers a challenge of this verifier, for this Hello, in time."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kagimori_protocol import messages
from kagimori_protocol.errors import PeerError
from kagimori_verifier import token, wrapping

if TYPE_CHECKING:
    from kagimori_protocol.messages import Challenge, Evidence
    from kagimori_verifier.trail import Trail


class OwnKeys(Protocol):
    """The verifier's own keys: of its session tokens, and those that its challenges may be signed by (raw Ed25519)."""

    @property
    def token(self) -> bytes:
        """32 bytes."""

    @property
    def public(self) -> frozenset[bytes]:
        """32 bytes each."""


class Own(NamedTuple):
    """This verifier's challenge in an Evidence, and the public key that the agent says it believed it by."""

    signed_by: bytes
    challenge: Challenge
    session: token.Session


def require_own(trail: Trail, evidence: Evidence, now_s: int, keys: OwnKeys, session_s: int) -> Own:
    """Find this verifier's challenge in the list; hold its token against Hello, Challenge and clock.

    ``session_s`` is how old it may be. Raises NotAuthentic.
    """
    own = _find(evidence, keys)
    trail.require(
        "session.token",
        own is not None,
        expected="a challenge under one of this verifier's keys, with a token that it issued",
        found=f"{'one' if own else 'none'} among {len(evidence.challenges)}",
    )
    assert own is not None  # noqa: S101 - required just above; tells the type checker
    session, hello_sha256 = own.session, hashlib.sha256(evidence.hello).digest()
    trail.require(
        "session.hello",
        session.hello_sha256 == hello_sha256,
        expected=f"the Hello that this token was issued for: SHA-256 {session.hello_sha256.hex()}",
        found=hello_sha256.hex(),
    )
    unbound = token.unbound_sha256(own.challenge)
    trail.require(
        "session.challenge",
        session.challenge_sha256 == unbound,
        expected=f"the Challenge as it was sent: SHA-256 {session.challenge_sha256.hex()}",
        found=unbound.hex(),
    )
    age = now_s - session.issued
    trail.require(
        "session.fresh",
        -token.CLOCK_SKEW_S <= age <= session_s,
        expected=f"issued at most {session_s} s ago",
        found=f"issued {age} s ago",
    )
    return own


def _find(evidence: Evidence, keys: OwnKeys) -> Own | None:
    for signed in evidence.challenges:
        if signed.key not in keys.public:
            continue
        try:
            challenge = messages.decode(messages.Challenge, signed.challenge)
            return Own(signed.key, challenge, token.read(keys.token, challenge.session))
        except (wrapping.BoxBroken, PeerError):
            continue
    return None
