"""Who a verifier is: the Ed25519 keys that sign its replies, and the key of its session tokens.

All rest in the database, wrapped by the KEK. Guests pin the public signing keys, so losing them means rebuilding their
initramfs; they belong in the backup. How one key follows another is ``rotation``.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kagimori_protocol import signature
from kagimori_protocol.errors import OperatorError
from kagimori_verifier import wrapping
from kagimori_verifier.store import identities
from kagimori_verifier.store.identities import Identity

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from kagimori_verifier.store import Txn

LABEL_SIGNING: Final = b"kagimori/1/identity/signing"
LABEL_TOKEN_KEY: Final = b"kagimori/1/identity/token"
_ORDER: Final = ("next", "current", "previous")
"""States of the signing keys that still answer, the one that is preferred first."""


@dataclass(frozen=True, slots=True)
class Keys:
    """A verifier's keys, unwrapped. ``signers`` by key ID: the next one, the current one, then previous ones, newest first."""

    signing: Ed25519PrivateKey = field(repr=False)
    token: bytes = field(repr=False)
    signers: Mapping[str, Ed25519PrivateKey] = field(repr=False)
    public: frozenset[bytes]
    """Every key that its challenges may still be signed by."""

    @property
    def current(self) -> bytes:
        """The public key that replies are signed by now (32 bytes)."""
        return self.signing.public_key().public_bytes_raw()

    def signer(self, pinned: Collection[str] = ()) -> Ed25519PrivateKey:
        """Give the newest key among those that an agent says it pins (key IDs); the current one where it says nothing.

        What it says is not authentic, and need not be: a signature that it does not believe is one that the host could have
        kept away as well.
        """
        return next((key for key_id, key in self.signers.items() if key_id in pinned), self.signing)


def create(txn: Txn, kek: bytes, at_s: int) -> Keys:
    """Make a verifier's identity. Raises OperatorError if it has one already: it is never replaced silently."""
    if identities.all(txn, "signing"):
        raise OperatorError(
            "This verifier has an identity already.",
            code="identity.exists",
            expected="a database without one",
            found="one, which is left alone",
            todo="`kagimori-verifier identity show` prints it.",
        )
    make_signing_key(txn, kek, at_s, "current")
    make_token_key(txn, kek, at_s)
    return load(txn, kek)


def make_signing_key(txn: Txn, kek: bytes, at_s: int, state: str) -> Identity:
    """Make another signing key, in this state."""
    private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    key_id = signature.key_id(public)
    wrapped = wrapping.seal(kek, LABEL_SIGNING, private.private_bytes_raw(), key_id.encode())
    made = Identity(key_id, "signing", public, wrapped, at_s, state)
    identities.add(txn, made)
    return made


def make_token_key(txn: Txn, kek: bytes, at_s: int) -> Identity:
    """Make the token key of from now on; no session of before can be redeemed any more."""
    for row in identities.all(txn, "token"):
        identities.set_state(txn, row.key_id, "retired")
    key_id, token = secrets.token_hex(8), secrets.token_bytes(wrapping.KEY_SIZE)
    made = Identity(
        key_id, "token", None, wrapping.seal(kek, LABEL_TOKEN_KEY, token, key_id.encode()), at_s, "current"
    )
    identities.add(txn, made)
    return made


def load(txn: Txn, kek: bytes) -> Keys:
    """Unwrap the current keys. Raises OperatorError where there are none, BoxBroken under another KEK."""
    signing = identities.all(txn, "signing")
    current = [key for key in signing if key.state == "current"]
    tokens = [key for key in identities.all(txn, "token") if key.state == "current"]
    if len(current) != 1 or len(tokens) != 1:
        raise OperatorError(
            "This verifier has no identity.",
            code="identity.missing",
            expected="one current signing key and one current token key",
            found=f"{len(current)} and {len(tokens)}",
            todo="Run `kagimori-verifier init` for a new verifier, or restore the database from your backup.",
        )
    ordered = sorted(
        (key for key in signing if key.state in _ORDER),
        key=lambda key: (_ORDER.index(key.state), -key.created),
    )
    signers = {key.key_id: private_key(kek, key) for key in ordered}
    return Keys(
        signing=signers[current[0].key_id],
        token=wrapping.unseal(kek, LABEL_TOKEN_KEY, tokens[0].wrapped, tokens[0].key_id.encode()),
        signers=signers,
        public=frozenset(key.public_key().public_bytes_raw() for key in signers.values()),
    )


def private_key(kek: bytes, key: Identity) -> Ed25519PrivateKey:
    """Unwrap one signing key, of any state. Raises BoxBroken."""
    return Ed25519PrivateKey.from_private_bytes(
        wrapping.unseal(kek, LABEL_SIGNING, key.wrapped, key.key_id.encode())
    )
