"""Give a LUKS2 volume an unlock key of its own, on the owner's machine, without ever losing one.

::

    keep the key, wrapped (adding)  ->  the new header, proved in memory  ->  keep the old header  ->  write the new one
    ->  active, and the ledger's line

Killed at any point, either nothing has changed, or ``volume list`` shows ``adding`` and the same verb completes it with
the same key. What fails before the first byte is written leaves nothing behind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from kagimori_protocol import luks2_change
from kagimori_protocol.errors import DiskError, KagimoriError, OperatorError
from kagimori_protocol.luks2_guard import FIRST_EPOCH
from kagimori_verifier import ledger, luks_enrol
from kagimori_verifier.keystore.unlock_keys import UnlockKeys
from kagimori_verifier.store import enrolments, vms
from kagimori_verifier.store.enrolments import EnrolledRow, Provenance
from kagimori_verifier.store.vms import VolumeRow

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kagimori_protocol.luks2_change import Change, Image
    from kagimori_verifier.store import Store, Txn

FIRST_VERSION: Final = 1
MAX_VOLUMES: Final = 16
"""Volumes that a VM can ask for (kagimori_protocol.messages.Hello)."""
RESERVED: Final = "control"
"""A name in /dev/mapper that device-mapper itself has."""


def add_volume(  # noqa: PLR0913 - what one volume consists of, by name only
    store: Store,
    kek: bytes,
    *,
    vm_id: str,
    device: Path,
    label: str,
    passphrase: bytes,
    backup: Path,
    at_s: int,
    part: tuple[int, int] | None = None,
    recovered: bool = False,
) -> VolumeRow:
    """Make an unlock key, keep it, give it a keyslot with its token; returns the active volume.

    ``passphrase`` opens an existing keyslot; ``label`` is the mapping's name in the VM; ``part`` is where in the device the
    volume lies (offset and size in bytes), or None for all of it; ``backup`` is the new file that the
    header goes to as it was. ``recovered`` says that ``passphrase`` is a recovery key: the disk has been at its host, so that
    key has to vouch for the header, and who formatted it is not known. Raises DiskError and OperatorError; header and database are then as before, or the error
    says what is not.
    """
    unlock_keys = UnlockKeys(kek)
    with luks_enrol.opened(device, part) as disk:
        image = disk.load()
        uuid = image.header.uuid
        if recovered and luks2_change.sealed_by(image, passphrase) is None:
            raise _unsealed(
                device,
                "the recovery key",
                "Restore the header from a backup of yours, or give a passphrase (--passphrase-fd).",
            )
        with store.write() as txn:
            row, resumed = _kept(
                txn, unlock_keys, vm_id, uuid, label, at_s, "unknown" if recovered else "owner-machine"
            )
        key = unlock_keys.unwrap(row.wrapped, vm_id, uuid, row.version)
        try:
            change = _to_add(image, key, passphrase, resumed=resumed)
            if change is not None:
                luks_enrol.keep(change, backup)
                disk.write(change)
        except KagimoriError as error:
            if disk.touched:
                raise _half_done(error, backup) from error
            if not resumed:
                _take_back(store, row)
            raise
    with store.write() as txn:
        if not any(one == row for one in vms.volumes(txn, vm_id, state="adding")):
            raise OperatorError(
                f"Volume {uuid} was removed while its keyslot was being added.",
                code="volume.removed",
                expected=f"volume {uuid} of {vm_id} in state adding",
                found="none",
                todo=f"Bring the old header back: cryptsetup luksHeaderRestore {_where(device, part)} "
                f"--header-backup-file {backup}.",
            )
        vms.set_volume_state(txn, vm_id, uuid, row.version, "active")
        body = {"uuid": uuid, "name": row.label, "version": row.version, "header_epoch": row.header_epoch}
        ledger.append(txn, at_s=at_s, event="volume-added", vm_id=vm_id, session=None, body=body)
        return next(one for one in vms.volumes(txn, vm_id) if one.uuid == uuid)


def reseal_volume(  # noqa: PLR0913 - as above
    store: Store,
    kek: bytes,
    *,
    vm_id: str,
    uuid: str,
    device: Path,
    backup: Path,
    at_s: int,
    restored: bool = False,
    changed: bool = False,
) -> VolumeRow:
    """Authenticate a volume's header as it is now, with the next epoch; returns the volume.

    The host may show any header to have it sealed. So the very copy that is worked on has to be sealed by this key already,
    with the epoch that is expected or a later one; ``restored`` says that the owner has brought back an older one, ``changed``
    that he has made the seal void. What was never sealed, by a release that did not, needs no word. An epoch is written down
    before any header has it, and no other header gets it: a run that is cut off uses one up. Raises DiskError and
    OperatorError; header and database are then as before but for that, or the error says what is not.
    """
    with store.read() as txn:
        row = _active(txn, vm_id, uuid)
    key = UnlockKeys(kek).unwrap(row.wrapped, vm_id, uuid, row.version)
    with luks_enrol.opened(device) as disk:
        image = disk.load()
        if image.header.uuid != uuid:
            raise DiskError(
                f"{device} is another volume.",
                code="volume.other",
                expected=f"a LUKS2 header with UUID {uuid}",
                found=image.header.uuid,
            )
        sealed = luks2_change.sealed_by(image, key)
        if sealed is None and _was_sealed(row) and not changed:
            raise _unsealed(
                device,
                "this volume's unlock key",
                "If you have changed segment, digest or keyslot with cryptsetup yourself (reencrypt, luksConvertKey), say so "
                "by --changed. If nobody has, the host has: restore the header from a backup.",
            )
        if sealed is not None and sealed.epoch < row.header_epoch and not restored:
            raise DiskError(
                f"{device} has an old header.",
                code="volume.epoch",
                expected=f"a header of epoch {row.header_epoch} or later",
                found=f"epoch {sealed.epoch}",
                todo="If you restored it from a backup yourself, say so by --restored.",
            )
        row, epoch = _next_epoch(store, row, sealed.epoch if sealed else 0)
        change = luks2_change.reseal(
            image, luks_enrol.cryptsetup, key=key, epoch=epoch, salts=luks_enrol.salts()
        )
        luks_enrol.keep(change, backup)
        try:
            disk.write(change)
        except DiskError as error:
            raise (_half_done(error, backup) if disk.touched else error) from error
    # The header first: one that is newer than expected opens, one that is older does not.
    with store.write() as txn:
        _require_same(txn, row)
        vms.set_header_epoch(txn, vm_id, uuid, row.version, epoch)
        body = {"uuid": uuid, "header_epoch": epoch, "restored": restored, "changed": changed}
        ledger.append(txn, at_s=at_s, event="volume-resealed", vm_id=vm_id, session=None, body=body)
    return replace(row, header_epoch=epoch)


def _to_add(image: Image, key: bytes, passphrase: bytes, *, resumed: bool) -> Change | None:
    """Plan what is left to do: None where an interrupted run has come as far as the sealed header."""
    run, salts = luks_enrol.cryptsetup, luks_enrol.salts()
    if resumed and luks2_change.sealed_by(image, key) is not None:
        luks2_change.prove(image, run, key, FIRST_EPOCH)
        return None
    if resumed and luks2_change.slot_of(image, run, key) is not None:
        return luks2_change.reseal(image, run, key=key, epoch=FIRST_EPOCH, salts=salts)
    return luks2_change.add_key(image, run, passphrase=passphrase, key=key, epoch=FIRST_EPOCH, salts=salts)


def _active(txn: Txn, vm_id: str, uuid: str) -> VolumeRow:
    for one in vms.volumes(txn, vm_id):
        if one.uuid == uuid:
            return one
    raise OperatorError(
        f"{vm_id} has no active volume {uuid}.",
        code="volume.unknown",
        expected="a volume that is enrolled",
        found="none",
        todo="`kagimori-verifier volume list` shows the volumes.",
    )


def _next_epoch(store: Store, row: VolumeRow, sealed: int) -> tuple[VolumeRow, int]:
    """Write down the epoch that the header of a volume gets next; ``sealed`` is the one that it has."""
    epoch = max(row.header_epoch, row.epoch_given, sealed) + 1
    with store.write() as txn:
        _require_same(txn, row)
        vms.set_epoch_given(txn, row.vm_id, row.uuid, row.version, epoch)
    return replace(row, epoch_given=epoch), epoch


def _require_same(txn: Txn, row: VolumeRow) -> None:
    if not any(one == row for one in vms.volumes(txn, row.vm_id)):
        raise OperatorError(
            f"Volume {row.uuid} was changed while its header was being sealed.",
            code="volume.removed",
            expected=f"volume {row.uuid} of {row.vm_id} as it was",
            found="another, or none",
            todo="Look at `kagimori-verifier volume list`, then run the command again.",
        )


def _was_sealed(row: VolumeRow) -> bool:
    """Tell whether a key has a token in its volume's header; that of a recovery key has, of an epoch that is not known."""
    return row.header_epoch >= FIRST_EPOCH or row.origin == "recovery"


def _unsealed(device: Path, by: str, todo: str) -> DiskError:
    return DiskError(
        f"{device} has a header that nobody vouches for.",
        code="volume.unsealed",
        expected=f"a newest copy of the header that is sealed by {by}",
        found="one without a token, or with another MAC",
        todo=todo,
    )


def _where(device: Path, part: tuple[int, int] | None) -> str:
    """Name a volume for cryptsetup: restored at an image's start, a header would lie over its partition table."""
    if part is None:
        return str(device)
    return f"$(losetup --find --show --offset {part[0]} --sizelimit {part[1]} {device})"


def _half_done(error: KagimoriError, backup: Path) -> KagimoriError:
    """Say what is so where writing has begun and failed: the header is the old or the new one, and no key is lost."""
    return DiskError(
        error.what,
        code=error.code,
        expected=error.expected,
        found=error.found,
        todo=f"The volume opens as before, or as intended. Run the same command again; the old header is in {backup}.",
    )


def _kept(  # noqa: PLR0913 - two rows' columns
    txn: Txn, unlock_keys: UnlockKeys, vm_id: str, uuid: str, label: str, at_s: int, provenance: Provenance
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
    row = VolumeRow(vm_id, uuid, "adding", wrapped, FIRST_VERSION, FIRST_EPOCH, label, at_s)
    vms.add_volume(txn, row)
    enrolments.add(txn, EnrolledRow(vm_id, uuid, FIRST_VERSION, provenance, None, explained=True))
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


def _take_back(store: Store, row: VolumeRow) -> None:
    """Forget a key that no keyslot has."""
    with store.write() as txn:
        vms.remove_volume(txn, row.vm_id, row.uuid, row.version)
