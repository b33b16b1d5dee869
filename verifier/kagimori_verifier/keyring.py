"""The verifier's own keys as the database has them now, for a program that runs while its owner rotates them.

Several programs serve one database: a challenge that one of them signed by a key that was staged this minute must be
known to the others. So each request looks which keys there are, and only a change is unwrapped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kagimori_verifier import identity
from kagimori_verifier.store import identities

if TYPE_CHECKING:
    from kagimori_verifier.identity import Keys
    from kagimori_verifier.store import Store


class Keyring:
    """Keys under one KEK. Threads share it: whoever finds a change unwraps it, and what they find is the same."""

    def __init__(self, store: Store, kek: bytes) -> None:
        """Unwrap the keys. Raises OperatorError where there are none, BoxBroken under another KEK."""
        self._store = store
        self._kek = kek
        with store.read() as txn:
            self._known = identities.states(txn), identity.load(txn, kek)

    def keys(self) -> Keys:
        """Give the keys of now. Raises as ``identity.load``, and StoreUnavailable."""
        with self._store.read() as txn:
            states = identities.states(txn)
            known, keys = self._known
            if states != known:
                keys = identity.load(txn, self._kek)
                self._known = states, keys
        return keys

    def __repr__(self) -> str:
        """Show no key."""
        return "Keyring(...)"
