"""Who a verifier is: the Ed25519 key that signs its replies, and the key of its session tokens.

Both rest in the database, wrapped by the KEK. Guests pin the public signing key, so losing it means rebuilding their
initramfs; it belongs in the backup.
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
    from kagimori_verifier.store import Txn

LABEL_SIGNING: Final = b"kagimori/1/identity/signing"
LABEL_TOKEN_KEY: Final = b"kagimori/1/identity/token"


@dataclass(frozen=True, slots=True)
class Keys:
    """A verifier's keys, unwrapped. ``public`` holds every key that its challenges may still be signed by."""

    signing: Ed25519PrivateKey = field(repr=False)
    token: bytes = field(repr=False)
    public: frozenset[bytes]

    @property
    def current(self) -> bytes:
        """The public key that replies are signed by now (32 bytes)."""
        return self.signing.public_key().public_bytes_raw()


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
    private, token = Ed25519PrivateKey.generate(), secrets.token_bytes(wrapping.KEY_SIZE)
    public = private.public_key().public_bytes_raw()
    for key_id, role, raw_public, label, secret in (
        (signature.key_id(public), "signing", public, LABEL_SIGNING, private.private_bytes_raw()),
        (secrets.token_hex(8), "token", None, LABEL_TOKEN_KEY, token),
    ):
        identities.add(
            txn,
            Identity(
                key_id=key_id,
                role=role,
                public=raw_public,
                wrapped=wrapping.seal(kek, label, secret, key_id.encode()),
                created=at_s,
                state="current",
            ),
        )
    return load(txn, kek)


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
    private = wrapping.unseal(kek, LABEL_SIGNING, current[0].wrapped, current[0].key_id.encode())
    return Keys(
        signing=Ed25519PrivateKey.from_private_bytes(private),
        token=wrapping.unseal(kek, LABEL_TOKEN_KEY, tokens[0].wrapped, tokens[0].key_id.encode()),
        public=frozenset(key.public for key in signing if key.public is not None and key.state != "retired"),
    )
