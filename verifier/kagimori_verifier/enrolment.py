"""Give a LUKS2 volume an unlock key of its own, on the owner's machine, without ever losing one.

The key is kept (state ``adding``) before the header is touched, and active only after the volume has opened with it: killed
at any point, either nothing has changed or the same verb completes it. Keys reach cryptsetup through pipes only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import DiskError, OperatorError
from kagimori_verifier import ledger
from kagimori_verifier.keystore.unlock_keys import UNLOCK_KEY_SIZE, UnlockKeys
from kagimori_verifier.store import vms
from kagimori_verifier.store.vms import VolumeRow

if TYPE_CHECKING:
    from pathlib import Path

    from kagimori_verifier.store import Store

CRYPTSETUP_S: Final = 120
FIRST_VERSION: Final = 1
SEARCH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"

_FAST_KEYSLOT: Final = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
"""The unlock key is uniform, so a derivation has nothing to slow down; the least that cryptsetup takes is enough."""

_MEANINGS: Final = {
    1: "it did not accept the parameters",
    2: "no keyslot opens with this passphrase",
    3: "it ran out of memory",
    4: "the device cannot be used",
    5: "the device is in use",
}


def add_volume(  # noqa: PLR0913 - what one volume consists of, by name only
    store: Store, kek: bytes, *, vm_id: str, device: Path, label: str, passphrase: bytes, at_s: int
) -> VolumeRow:
    """Make an unlock key, keep it, add a keyslot for it, prove it; returns the active volume.

    ``passphrase`` opens an existing keyslot. Raises DiskError (nothing is left behind in the database then, and a
    keyslot only if it was proved unusable) and OperatorError.
    """
    uuid = _luks2_uuid(device)
    unlock_keys = UnlockKeys(kek)
    row = _kept(store, unlock_keys, vm_id, uuid, label, at_s)
    key = unlock_keys.unwrap(row.wrapped, vm_id, uuid, row.version)
    try:
        if not _opens(device, key):
            _add_keyslot(device, passphrase, key)
        if not _opens(device, key):
            raise DiskError(
                f"{device} does not open with the key that was just added.",
                code="volume.prove",
                expected="cryptsetup to open it",
                found="no keyslot with this key",
                todo="Look at the device's health; its older keyslots are untouched.",
            )
    except DiskError:
        with store.write() as txn:
            vms.remove_volume(txn, vm_id, uuid, row.version)
        raise
    with store.write() as txn:
        vms.set_volume_state(txn, vm_id, uuid, row.version, "active")
        ledger.append(
            txn,
            at_s=at_s,
            event="volume-added",
            vm_id=vm_id,
            session=None,
            body={"uuid": uuid, "name": label},
        )
    return next(one for one in _all(store, vm_id) if one.uuid == uuid)


def _kept(store: Store, unlock_keys: UnlockKeys, vm_id: str, uuid: str, label: str, at_s: int) -> VolumeRow:  # noqa: PLR0913 - a row's columns
    """Keep a new wrapped key, or find the one that an interrupted run has kept."""
    for one in _all(store, vm_id):
        if one.uuid == uuid and one.state == "active":
            raise OperatorError(
                f"Volume {uuid} of {vm_id} is enrolled already.",
                code="volume.exists",
                expected="a volume without an unlock key here",
                found=f"version {one.version}, active",
                todo="`kagimori-verifier volume remove` forgets it first.",
            )
        if one.uuid == uuid and one.state == "adding":
            return one
    wrapped = unlock_keys.wrap(unlock_keys.make(), vm_id, uuid, FIRST_VERSION)
    row = VolumeRow(vm_id, uuid, "adding", wrapped, FIRST_VERSION, 0, label, at_s)
    with store.write() as txn:
        vms.add_volume(txn, row)
    return row


def _all(store: Store, vm_id: str) -> tuple[VolumeRow, ...]:
    with store.read() as txn:
        return vms.volumes(txn, vm_id, state=None)


def _luks2_uuid(device: Path) -> str:
    if _run(("isLuks", "--type", "luks2", "--", str(device)), device).returncode != 0:
        raise DiskError(
            f"{device} is no LUKS2 volume.",
            code="volume.luks2",
            expected="a device or image with a LUKS2 header",
            found="none" if device.exists() else "no such file",
            todo="cryptsetup convert --type luks2 turns a LUKS1 header into one.",
        )
    done = _run(("luksUUID", "--", str(device)), device)
    uuid = done.stdout.decode(errors="replace").strip()
    if done.returncode or len(uuid) != 36:  # noqa: PLR2004 - RFC 4122 text
        raise DiskError(
            f"{device} has no UUID.", code="volume.uuid", expected="a UUID in its header", found=uuid
        )
    return uuid


def _add_keyslot(device: Path, passphrase: bytes, key: bytes) -> None:
    """Add the keyslot: the existing passphrase on stdin, the new key through a pipe of its own."""
    reader, writer = os.pipe()
    try:
        feeder = threading.Thread(target=_feed, args=(writer, key), daemon=True)
        feeder.start()
        arguments = (
            *("luksAddKey", "--batch-mode", *_FAST_KEYSLOT, "--key-file", "-"),
            *("--new-keyfile-size", str(UNLOCK_KEY_SIZE), "--", str(device), f"/dev/fd/{reader}"),
        )
        done = _run(arguments, device, stdin=passphrase, pass_fds=(reader,))
    finally:
        os.close(reader)
    if done.returncode:
        raise DiskError(
            f"cryptsetup could not add a keyslot to {device}.",
            code="volume.keyslot",
            expected="a passphrase that opens the volume, and a free keyslot",
            found=f"{_MEANINGS.get(done.returncode, 'an error')}: {_words(done.stderr)}",
            todo="Nothing was changed; try again with a passphrase that opens the volume.",
        )


def _feed(writer: int, key: bytes) -> None:
    """Write the key and close; 32 bytes always fit a pipe, so this never blocks."""
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(key)


def _opens(device: Path, key: bytes) -> bool:
    """Ask cryptsetup whether a keyslot opens with this key, without mapping anything."""
    arguments = ("open", "--test-passphrase", "--type", "luks2", "--key-file", "-", "--", str(device))
    return _run(arguments, device, stdin=key).returncode == 0


def _run(
    arguments: tuple[str, ...], device: Path, *, stdin: bytes = b"", pass_fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("cryptsetup", path=SEARCH)
    if program is None:
        raise OperatorError(
            "cryptsetup is missing.",
            code="volume.cryptsetup",
            expected=f"the program cryptsetup in {SEARCH}",
            found="none",
            todo="Install it (Debian: cryptsetup-bin).",
        )
    try:
        return subprocess.run(
            [program, *arguments],
            input=stdin,
            capture_output=True,
            check=False,
            timeout=CRYPTSETUP_S,
            env={"PATH": SEARCH, "LC_ALL": "C"},
            pass_fds=pass_fds,
        )
    except subprocess.TimeoutExpired:
        raise DiskError(
            f"cryptsetup did not end in time with {device}.",
            code="volume.timeout",
            expected=f"an end within {CRYPTSETUP_S} s",
            found="none",
        ) from None


def _words(stderr: bytes) -> str:
    """Give cryptsetup's own words, in one bounded line."""
    return " ".join(stderr.decode(errors="replace").split())[:300] or "no words"
