"""``volume``: LUKS2 volumes whose unlock keys are kept here."""

from __future__ import annotations

import argparse
import getpass
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import UsageError
from kagimori_verifier import enrolment, ledger, luks_enrol
from kagimori_verifier.cli import arguments, enrolments, header_backups, recoveries
from kagimori_verifier.cli.access import now_s, opened, reading, unknown, writing
from kagimori_verifier.cli.files import read_file
from kagimori_verifier.cli.output import Output, add_verb, group
from kagimori_verifier.cli.own_kek import own_kek
from kagimori_verifier.cli.secret_input import first_line
from kagimori_verifier.cli.vms import known, shown_volume
from kagimori_verifier.store import vms

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verbs

MAX_PASSPHRASE: Final = 8 << 20
"""Bytes that cryptsetup reads of a key file, too."""


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    volume = group(
        add_verb(
            verbs, "volume", None, "Manage LUKS2 volumes whose unlock keys are kept here.", "volume list"
        )
    )
    add = add_verb(
        volume,
        "add",
        _add,
        "Give a LUKS2 volume a keyslot of its own, for an unlock key that is made and kept here. The key is 32 random\n"
        "bytes, so the keyslot needs no slow derivation (pbkdf2, 1000 iterations) and is tried first: that saves a\n"
        "second and a gigabyte at each boot. The header gets a token by which the VM knows, before it uses the key, that\n"
        "the header is yours. It is changed in memory, proved, and then written so that it opens whenever that is cut\n"
        "off; as it was, it is kept in a file. Interrupted, the same command completes it.",
        "volume add --vm web1 --device disk.img --name cryptroot",
    )
    add.add_argument("--vm", required=True, type=arguments.vm, metavar="NAME")
    add.add_argument(
        "--device", required=True, type=Path, metavar="PATH", help="the device or image, on this machine"
    )
    add.add_argument(
        "--name",
        default="cryptroot",
        type=arguments.name,
        metavar="NAME",
        help="mapping name in the VM (default: %(default)s)",
    )
    header_backups.declare(add)
    secret = add.add_mutually_exclusive_group()
    secret.add_argument(
        "--passphrase-fd",
        type=arguments.descriptor,
        metavar="N",
        help="read an existing passphrase from this descriptor, up to a newline",
    )
    secret.add_argument(
        "--key-file", type=Path, metavar="FILE", help="take an existing key file, all of its bytes"
    )
    secret.add_argument(
        "--recovery-code-fd",
        type=arguments.descriptor,
        metavar="N",
        help="read the volume's recovery code from this descriptor, up to a newline",
    )
    enrolments.register_volume(volume)
    recoveries.register_volume(volume)
    add_verb(volume, "list", _list, "List the volumes.", "volume list")
    reseal = add_verb(
        volume,
        "reseal",
        _reseal,
        "Authenticate a volume's header as it is now (or for the first time, if a release enrolled it that did not seal).\n"
        "From then on the VM refuses every older header. A header on which no seal holds is taken at your word alone.",
        "volume reseal --vm web1 --uuid 0b5a0e3c-... --device disk.img",
    )
    reseal.add_argument("--vm", required=True, type=arguments.vm, metavar="NAME")
    reseal.add_argument("--uuid", required=True, type=arguments.name, metavar="UUID")
    reseal.add_argument(
        "--device", required=True, type=Path, metavar="PATH", help="the device or image, on this machine"
    )
    reseal.add_argument(
        "--restored",
        action="store_true",
        help="seal it even if it is older than what is expected: you restored it",
    )
    reseal.add_argument(
        "--changed",
        action="store_true",
        help="seal it though no seal holds on it: you changed segment, digest or keyslot with cryptsetup",
    )
    header_backups.declare(reseal)
    remove = add_verb(
        volume,
        "remove",
        _remove,
        "Forget a volume's unlock key; its keyslot stays in the header.",
        "volume remove --vm web1 0b5a0e3c-...",
    )
    remove.add_argument("--vm", required=True, type=arguments.vm, metavar="NAME")
    remove.add_argument("uuid", type=arguments.name, metavar="UUID")


def _add(options: argparse.Namespace, output: Output) -> int:
    with opened(options) as (settings, store):
        with store.read() as txn:
            known(txn, options.vm)
        kek = own_kek(settings, store)
        with luks_enrol.opened(options.device) as disk:  # before anybody is asked for a passphrase
            uuid = disk.load().header.uuid
        backup = header_backups.place(options, settings, uuid)
        volume = enrolment.add_volume(
            store,
            kek,
            vm_id=options.vm,
            device=options.device,
            label=options.name,
            passphrase=recoveries.key_by(options.recovery_code_fd)
            if options.recovery_code_fd is not None
            else passphrase_of(options),
            backup=backup,
            at_s=now_s(),
            recovered=options.recovery_code_fd is not None,
        )
    output.result(
        shown_volume(volume),
        f"volume {volume.uuid} of {options.vm}: keyslot added, header sealed, and proved to open",
        f"next: kagimori-verifier vm config {options.vm}",
    )
    header_backups.note(output, backup)
    return 0


def _reseal(options: argparse.Namespace, output: Output) -> int:
    uuid = options.uuid.lower()
    with opened(options) as (settings, store):
        with store.read() as txn:
            known(txn, options.vm)
        backup = header_backups.place(options, settings, uuid)
        volume = enrolment.reseal_volume(
            store,
            own_kek(settings, store),
            vm_id=options.vm,
            uuid=uuid,
            device=options.device,
            backup=backup,
            at_s=now_s(),
            restored=options.restored,
            changed=options.changed,
        )
    output.result(
        shown_volume(volume),
        f"volume {uuid} of {options.vm}: header sealed, epoch {volume.header_epoch}",
    )
    header_backups.note(output, backup)
    return 0


def _list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        rows = [
            shown_volume(volume) | enrolments.provenance_of(txn, volume)
            for vm in vms.all(txn)
            for volume in vms.volumes(txn, vm.vm_id, state=None)
        ]
    output.rows(rows, "vm_id", "uuid", "label", "state", "version", "provenance", none="no volumes")
    if waiting := [row["uuid"] for row in rows if row["state"] == "waiting"]:
        output.note(
            f"enrolled by a boot that nothing explains, see `volume accept --help`: {', '.join(waiting)}"
        )
    if staged := [row["uuid"] for row in rows if row["state"] == "staged"]:
        output.note(f"enrolled, and not confirmed by the VM yet: {', '.join(staged)}")
    if unfinished := [row["uuid"] for row in rows if row["state"] == "adding"]:
        output.note(f"interrupted, and completed by the same `volume add` again: {', '.join(unfinished)}")
    return 0


def _remove(options: argparse.Namespace, output: Output) -> int:
    uuid = options.uuid.lower()
    with writing(options) as txn:
        known(txn, options.vm)
        found = [one for one in vms.volumes(txn, options.vm, state=None) if one.uuid == uuid]
        if not found:
            raise unknown("volume", uuid, "`kagimori-verifier volume list` shows the volumes.")
        for one in found:
            vms.remove_volume(txn, options.vm, uuid, one.version)
        body = {"uuid": uuid}
        ledger.append(txn, at_s=now_s(), event="volume-removed", vm_id=options.vm, session=None, body=body)
    output.result({"removed": uuid}, f"forgot the unlock key of {uuid}; its keyslot is still in the header")
    return 0


def passphrase_of(options: argparse.Namespace) -> bytes:
    """Take an existing passphrase from where the operator says; on a terminal, ask."""
    if options.key_file is not None:
        passphrase = read_file(options.key_file, MAX_PASSPHRASE)
    elif options.passphrase_fd is not None:
        passphrase = first_line(options.passphrase_fd, "passphrase", "volume.passphrase", MAX_PASSPHRASE)
    elif sys.stdin.isatty():
        passphrase = getpass.getpass(f"Existing passphrase of {options.device}: ").encode()
    else:
        raise UsageError(
            "A passphrase that opens the volume is needed.",
            code="volume.passphrase",
            expected="--passphrase-fd, --key-file, or a terminal to ask on",
            found="none of them",
        )
    if not passphrase:
        raise UsageError(
            "A passphrase that opens the volume is needed.",
            code="volume.passphrase",
            expected="one or more bytes",
            found="none",
        )
    return passphrase
