"""The key-encryption key, for verbs that make or unwrap a key; others need not load any cryptography."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kagimori_protocol.errors import OperatorError
from kagimori_verifier import identity
from kagimori_verifier.wrapping import BoxBroken

if TYPE_CHECKING:
    from kagimori_verifier.settings import Settings
    from kagimori_verifier.store import Store


def own_kek(settings: Settings, store: Store) -> bytes:
    """Read the KEK, and make sure that it is this database's: a key wrapped by another could never be released."""
    kek = settings.kek_provider().read()
    try:
        with store.read() as txn:
            identity.load(txn, kek)
    except BoxBroken as error:
        raise OperatorError(
            "This database was made under another key-encryption key.",
            code="kek.other",
            expected="the KEK that `init` made with this database",
            found="another one",
            todo="Restore the KEK that belongs to this database from your backup.",
        ) from error
    return kek
