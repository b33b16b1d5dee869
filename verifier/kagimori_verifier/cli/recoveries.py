"""``volume recovery``: put a key of a volume on paper, once. ``recovery``: bring it back from there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kagimori_protocol import recovery_code
from kagimori_verifier import recovery
from kagimori_verifier.cli import arguments, header_backups, recovery_paper
from kagimori_verifier.cli.access import now_s, opened
from kagimori_verifier.cli.output import Output, add_verb, group
from kagimori_verifier.cli.own_kek import own_kek
from kagimori_verifier.cli.secret_input import typed
from kagimori_verifier.cli.vms import known, shown_volume

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verbs


def register(verbs: Verbs) -> None:
    """Declare the verb."""
    group_of = group(
        add_verb(
            verbs,
            "recovery",
            None,
            "Use recovery codes, which lie on paper.",
            "recovery import --vm web1 --uuid 0b5a...",
        )
    )
    parser = add_verb(
        group_of,
        "import",
        _import,
        "Enter the recovery code of a volume, at a verifier that has no key of it. The VM then gets that key as it gets any:\n"
        "after it has proved what it is. Never type a code at the VM's console: the host reads it. The code is asked for on\n"
        "the terminal, unseen, or read from --code-fd or stdin; a typo is named by its place.",
        "recovery import --vm web1 --uuid 0b5a0e3c-...",
    )
    parser.add_argument("--vm", required=True, type=arguments.vm, metavar="NAME")
    parser.add_argument(
        "--uuid",
        required=True,
        type=arguments.uuid,
        metavar="UUID",
        help="the volume's, as it stands beside the code, and as `cryptsetup luksUUID` prints it",
    )
    parser.add_argument(
        "--name",
        default="cryptroot",
        type=arguments.name,
        metavar="NAME",
        help="mapping name in the VM (default: %(default)s)",
    )
    parser.add_argument(
        "--code-fd",
        type=arguments.descriptor,
        metavar="N",
        help="read the code from this descriptor, up to a newline",
    )


def register_volume(volume: Verbs) -> None:
    """Declare the verb of ``volume``."""
    parser = add_verb(
        volume,
        "recovery",
        _recovery,
        "Give a volume a recovery keyslot, and show its code once: on this terminal, or to --output-fd. Nothing keeps it, so\n"
        "write it down, with the UUID, and keep it where neither this verifier nor the VM's host is. By it, a verifier that\n"
        "has lost the volume's key gets it back: `recovery import`, never the VM's console.",
        "volume recovery --vm web1 --uuid 0b5a0e3c-... --device disk.img",
    )
    parser.add_argument("--vm", required=True, type=arguments.vm, metavar="NAME")
    parser.add_argument("--uuid", required=True, type=arguments.uuid, metavar="UUID")
    parser.add_argument(
        "--device", required=True, type=Path, metavar="PATH", help="the device or image, on this machine"
    )
    parser.add_argument(
        "--output-fd",
        type=arguments.descriptor,
        metavar="N",
        help="write the code to this descriptor, on one line",
    )
    header_backups.declare(parser)


def key_by(descriptor: int | None) -> bytes:
    """Read a code as it is typed, by a descriptor or at the terminal. Raises UsageError, which names the place of a typo."""
    code = typed(descriptor, "recovery code", "recovery.code")
    return recovery_code.decode(code.decode(errors="replace"))


def _recovery(options: argparse.Namespace, output: Output) -> int:
    recovery_paper.require_reader(options.output_fd, "--output-fd", as_json=output.as_json)
    with opened(options) as (settings, store):
        with store.read() as txn:
            known(txn, options.vm)
        kek = own_kek(settings, store)
        backup = header_backups.place(options, settings, options.uuid)
        key, slot = recovery.add_keyslot(
            store,
            kek,
            vm_id=options.vm,
            uuid=options.uuid,
            device=options.device,
            backup=backup,
            at_s=now_s(),
        )
    recovery_paper.show(
        key,
        options.output_fd,
        f"volume {options.uuid}, keyslot {slot}",
        "Its keyslot is there, and nobody has its code: run this again, and remove that keyslot.",
    )
    output.result(
        {"uuid": options.uuid, "keyslot": int(slot)},
        "the header is sealed with it, and it was proved to open",
        f"if it was not written down: cryptsetup luksKillSlot {options.device} {slot}, and run this again",
    )
    header_backups.note(output, backup)
    return 0


def _import(options: argparse.Namespace, output: Output) -> int:
    with opened(options) as (settings, store):
        with store.read() as txn:
            known(txn, options.vm)
        kek = own_kek(settings, store)  # before anybody is asked for a code
        key = key_by(options.code_fd)
        with store.write() as txn:
            known(txn, options.vm)
            row = recovery.import_key(
                txn, kek, vm_id=options.vm, uuid=options.uuid, label=options.name, key=key, at_s=now_s()
            )
    output.result(
        shown_volume(row),
        f"volume {row.uuid} of {row.vm_id}: its key is kept, and released to the VM as any other",
        f"next: kagimori-verifier vm config {row.vm_id}",
        "a key that lies on paper is not one to boot by: `volume add --recovery-code-fd N` gives the volume a new one",
    )
    return 0
