"""Recovery keys: unlock keys that lie on paper, and nowhere else, until a verifier has lost the others.

A recovery key has a keyslot of its own, with its own token in the header (``luks2_guard``), so that it stays good whatever
becomes of the other keyslots. It is never typed where the host reads along: not at the VM's console, which is the host's, but
at a verifier, which keeps it as the volume's unlock key and releases it to the attested VM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from kagimori_protocol import luks2_change, luks2_guard
from kagimori_protocol.errors import OperatorError
from kagimori_verifier import ledger, luks_enrol
from kagimori_verifier.enrolment import FIRST_VERSION, require_place
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.states import ACTIVE
from kagimori_verifier.store import enrolments, vms
from kagimori_verifier.store.enrolments import EnrolledRow
from kagimori_verifier.store.vms import VolumeRow

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kagimori_verifier.store import Store, Txn

ORIGIN: Final = "recovery"
LEAST_EPOCH: Final = 0
"""Nobody here knows the header's epoch: the VM takes any header that this key authenticates, an older one, too."""


@dataclass(frozen=True, slots=True)
class NewKey:
    """A recovery key for what a VM will enrol by a one-time code that is being made, too."""

    key: bytes = field(repr=False)
    _unlock_keys: UnlockKeys

    @classmethod
    def make(cls, kek: bytes) -> Self:
        """Make one."""
        unlock_keys = UnlockKeys(kek)
        return cls(unlock_keys.make(), unlock_keys)

    def wrapped_for(self, vm_id: str) -> Callable[[bytes], bytes]:
        """Give what wraps it, bound to a VM and the public key of its code."""
        return lambda code_key: self._unlock_keys.wrap_recovery_key(self.key, vm_id, code_key)


def add_keyslot(  # noqa: PLR0913 - what one volume consists of, by name only
    store: Store, kek: bytes, *, vm_id: str, uuid: str, device: Path, backup: Path, at_s: int
) -> tuple[bytes, str]:
    """Give a volume a keyslot for a new recovery key; returns that key, which nobody else has, and the keyslot's number.

    The volume's own unlock key vouches for the header that is changed, and opens it. ``backup`` is the new file that the
    header goes to as it was. Raises DiskError and OperatorError; nothing was written then, or the error says so. Killed
    afterwards, before anybody has seen the key, it leaves a keyslot that nothing opens.
    """
    with store.read() as txn:
        row = next((one for one in vms.volumes(txn, vm_id) if one.uuid == uuid), None)
    if row is None:
        raise OperatorError(
            f"{vm_id} has no active volume {uuid}.",
            code="volume.unknown",
            expected="a volume that is enrolled",
            found="none",
            todo="`kagimori-verifier volume list` shows the volumes.",
        )
    unlock_keys = UnlockKeys(kek)
    own, key = unlock_keys.unwrap(row.wrapped, vm_id, uuid, row.version), unlock_keys.make()
    with luks_enrol.opened(device) as disk:
        image = disk.load()
        # The very copy that is worked on: that another is authentic would not help, the new token vouches for this one.
        guarded = luks2_guard.authenticate(image.header, own, row.header_epoch)
        change = luks2_change.add_key(
            image,
            luks_enrol.cryptsetup,
            passphrase=own,
            key=key,
            epoch=guarded.epoch,
            salts=luks_enrol.salts(),
        )
        luks_enrol.keep(change, backup)
        disk.write(change)
    with store.write() as txn:
        body = {"uuid": uuid, "keyslot": change.slot, "header_epoch": guarded.epoch}
        ledger.append(txn, at_s=at_s, event="recovery-added", vm_id=vm_id, session=None, body=body)
    return key, change.slot


def import_key(  # noqa: PLR0913 - what a volume consists of, by name only
    txn: Txn, kek: bytes, *, vm_id: str, uuid: str, label: str, key: bytes, at_s: int
) -> VolumeRow:
    """Keep a recovery key, wrapped, as the unlock key of a volume that this verifier has no key of.

    Raises OperatorError: for a volume that is known here, a name that is taken, a VM that has too many.
    """
    others = vms.volumes(txn, vm_id, state=None)
    if known := [one for one in others if one.uuid == uuid]:
        raise OperatorError(
            f"This verifier has a key of volume {uuid} already.",
            code="volume.exists",
            expected="a volume without an unlock key here",
            found=f"version {known[0].version}, {known[0].state}",
            todo="If it does not open the volume, `kagimori-verifier volume remove` forgets it first.",
        )
    require_place(others, vm_id, label)
    wrapped = UnlockKeys(kek).wrap(key, vm_id, uuid, FIRST_VERSION)
    row = VolumeRow(vm_id, uuid, ACTIVE, wrapped, FIRST_VERSION, LEAST_EPOCH, label, at_s, ORIGIN)
    vms.add_volume(txn, row)
    enrolments.add(txn, EnrolledRow(vm_id, uuid, FIRST_VERSION, "unknown", None, explained=True))
    body = {"uuid": uuid, "name": label, "version": FIRST_VERSION}
    ledger.append(txn, at_s=at_s, event="recovery-imported", vm_id=vm_id, session=None, body=body)
    return row
