"""Unlock keys: made here, wrapped here, and nowhere else turned into bytes."""

from __future__ import annotations

import secrets
from typing import Final

from kagimori_verifier import wrapping

UNLOCK_KEY_SIZE: Final = 32
LABEL_UNLOCK_KEY: Final = b"kagimori/1/unlock-key"
LABEL_RECOVERY_KEY: Final = b"kagimori/1/recovery-key"
LABEL_CONFIRM_KEY: Final = b"kagimori/1/confirm-key"


class UnlockKeys:
    """Wraps and unwraps under one KEK. A wrapped key is bound to its VM, volume and version."""

    def __init__(self, kek: bytes) -> None:
        """Keep the KEK."""
        self._kek = kek

    def make(self) -> bytes:
        """Make an unlock key: uniform, so its keyslot needs no slow derivation."""
        return secrets.token_bytes(UNLOCK_KEY_SIZE)

    def wrap(self, key: bytes, vm_id: str, uuid: str, version: int) -> bytes:
        """Wrap an unlock key for the database."""
        return wrapping.seal(self._kek, LABEL_UNLOCK_KEY, key, _bound_to(vm_id, uuid, version))

    def unwrap(self, wrapped: bytes, vm_id: str, uuid: str, version: int) -> bytes:
        """Unwrap an unlock key. Raises wrapping.BoxBroken for another KEK, VM, volume or version."""
        return wrapping.unseal(self._kek, LABEL_UNLOCK_KEY, wrapped, _bound_to(vm_id, uuid, version))

    def wrap_recovery_key(self, key: bytes, vm_id: str, code_key: bytes) -> bytes:
        """Wrap the recovery key of an enrolment, for as long as its code waits; ``code_key`` is the code's public key."""
        return wrapping.seal(self._kek, LABEL_RECOVERY_KEY, key, _bound_to_code(vm_id, code_key))

    def unwrap_recovery_key(self, wrapped: bytes, vm_id: str, code_key: bytes) -> bytes:
        """Unwrap the recovery key of an enrolment. Raises wrapping.BoxBroken for another KEK, VM or code."""
        return wrapping.unseal(self._kek, LABEL_RECOVERY_KEY, wrapped, _bound_to_code(vm_id, code_key))

    def wrap_confirm_key(self, key: bytes, session_sha256: bytes) -> bytes:
        """Wrap the key that the last Confirm of a session will be checked with."""
        return wrapping.seal(self._kek, LABEL_CONFIRM_KEY, key, session_sha256)

    def unwrap_confirm_key(self, wrapped: bytes, session_sha256: bytes) -> bytes:
        """Unwrap a session's confirm key. Raises wrapping.BoxBroken."""
        return wrapping.unseal(self._kek, LABEL_CONFIRM_KEY, wrapped, session_sha256)

    def __repr__(self) -> str:
        """Show no key."""
        return "UnlockKeys(...)"


def _bound_to_code(vm_id: str, code_key: bytes) -> bytes:
    return vm_id.encode() + b"\x00" + code_key


def _bound_to(vm_id: str, uuid: str, version: int) -> bytes:
    """Neither id can contain a zero byte, so no two triples meet."""
    return b"\x00".join((vm_id.encode(), uuid.encode(), str(version).encode()))
