"""Give a LUKS2 volume an unlock key of its own, on the owner's machine, without ever losing one.

::

    keep the key, wrapped (adding)  ->  add a keyslot  ->  prove that it opens  ->  active, and the ledger's line

Killed at any point, either nothing has changed, or ``volume list`` shows ``adding`` and the same verb completes it with
the same key. A failure takes back what it did: the keyslot first, then the row, so that no keyslot stays whose key is
forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import DiskError, OperatorError
from kagimori_verifier import ledger, luks_enrol
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import enrolments, vms
from kagimori_verifier.store.enrolments import EnrolledRow
from kagimori_verifier.store.vms import VolumeRow

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kagimori_verifier.store import Store, Txn

FIRST_VERSION: Final = 1
MAX_VOLUMES: Final = 16
"""Volumes that a VM can ask for (kagimori_protocol.messages.Hello)."""
RESERVED: Final = "control"
"""A name in /dev/mapper that device-mapper itself has."""


def add_volume(  # noqa: PLR0913 - what one volume consists of, by name only
    store: Store, kek: bytes, *, vm_id: str, device: Path, label: str, passphrase: bytes, at_s: int
) -> VolumeRow:
    """Make an unlock key, keep it, add a keyslot for it, prove it; returns the active volume.

    ``passphrase`` opens an existing keyslot; ``label`` is the mapping's name in the VM. Raises DiskError and
    OperatorError; header and database are then as before, or the error says what is not.
    """
    uuid = luks_enrol.luks2_uuid(device)
    before = luks_enrol.keyslots(device)
    unlock_keys = UnlockKeys(kek)
    with store.write() as txn:
        row, resumed = _kept(txn, unlock_keys, vm_id, uuid, label, at_s)
    key = unlock_keys.unwrap(row.wrapped, vm_id, uuid, row.version)
    # An interrupted run may have come as far as the keyslot. As long as that is not known, its row stays.
    if not (resumed and luks_enrol.opens(device, key)):
        try:
            luks_enrol.add_keyslot(device, passphrase, key)
            _prove(device, key)
        except DiskError as error:
            _take_back(store, row, device, before, error)
            raise
    with store.write() as txn:
        if not any(one == row for one in vms.volumes(txn, vm_id, state="adding")):
            raise OperatorError(
                f"Volume {uuid} was removed while its keyslot was being added.",
                code="volume.removed",
                expected=f"volume {uuid} of {vm_id} in state adding",
                found="none",
                todo=f"Remove the new keyslot: cryptsetup luksKillSlot {device} NUMBER.",
            )
        vms.set_volume_state(txn, vm_id, uuid, row.version, "active")
        body = {"uuid": uuid, "name": row.label, "version": row.version}
        ledger.append(txn, at_s=at_s, event="volume-added", vm_id=vm_id, session=None, body=body)
        return next(one for one in vms.volumes(txn, vm_id) if one.uuid == uuid)


def _kept(  # noqa: PLR0913 - a row's columns
    txn: Txn, unlock_keys: UnlockKeys, vm_id: str, uuid: str, label: str, at_s: int
) -> tuple[VolumeRow, bool]:
    """Keep a new wrapped key, or find the one that an interrupted run has kept; tells which."""
    others: list[VolumeRow] = []
    for one in vms.volumes(txn, vm_id, state=None):
        if one.uuid != uuid:
            others.append(one)
        elif one.state == "adding":
            return one, True
        else:
            raise OperatorError(
                f"Volume {uuid} of {vm_id} is enrolled already.",
                code="volume.exists",
                expected="a volume without an unlock key here",
                found=f"version {one.version}, {one.state}",
                todo="`kagimori-verifier volume remove` forgets it first.",
            )
    require_place(others, vm_id, label)
    wrapped = unlock_keys.wrap(unlock_keys.make(), vm_id, uuid, FIRST_VERSION)
    row = VolumeRow(vm_id, uuid, "adding", wrapped, FIRST_VERSION, 0, label, at_s)
    vms.add_volume(txn, row)
    enrolments.add(txn, EnrolledRow(vm_id, uuid, FIRST_VERSION, "owner-machine", None, explained=True))
    return row, False


def require_place(others: Sequence[VolumeRow], vm_id: str, label: str) -> None:
    """Require room for one more volume beside a VM's others, and a name that none of them has. Raises OperatorError."""
    if label == RESERVED or label in {one.label for one in others}:
        raise OperatorError(
            f"The mapping name {label} is taken.",
            code="volume.name",
            expected=f"a name that no other volume of {vm_id} has, and not {RESERVED}",
            found=label,
            todo="Choose another by --name.",
        )
    if len(others) >= MAX_VOLUMES:
        raise OperatorError(
            f"{vm_id} has as many volumes as a VM can ask for.",
            code="volume.many",
            expected=f"at most {MAX_VOLUMES}",
            found=str(len(others)),
        )


def _prove(device: Path, key: bytes) -> None:
    if not luks_enrol.opens(device, key):
        raise DiskError(
            f"{device} does not open with the key that was just added.",
            code="volume.prove",
            expected="cryptsetup to open it",
            found="no keyslot with this key",
            todo="Look at the device's health; its older keyslots are untouched.",
        )


def _take_back(store: Store, row: VolumeRow, device: Path, before: frozenset[int], error: DiskError) -> None:
    """Remove the keyslot that a failed run has added, then the row. Raises DiskError if the keyslot has to stay."""
    try:
        luks_enrol.remove_keyslots(device, luks_enrol.keyslots(device) - before)
    except DiskError as kept:
        raise DiskError(
            f"{error.what} What was begun could not be taken back: {kept.what}",
            code=error.code,
            expected=error.expected,
            found=error.found,
            todo="The volume stays in state adding, so that no key is lost. Run the same command again.",
        ) from error
    with store.write() as txn:
        vms.remove_volume(txn, row.vm_id, row.uuid, row.version)
