"""``recovery``: bring a volume's key back from paper."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kagimori_protocol import recovery_code
from kagimori_verifier import recovery
from kagimori_verifier.cli import arguments
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


def _import(options: argparse.Namespace, output: Output) -> int:
    with opened(options) as (settings, store):
        with store.read() as txn:
            known(txn, options.vm)
        kek = own_kek(settings, store)  # before anybody is asked for a code
        code = typed(options.code_fd, "recovery code", "recovery.code")
        key = recovery_code.decode(code.decode(errors="replace"))
        with store.write() as txn:
            known(txn, options.vm)
            row = recovery.import_key(
                txn, kek, vm_id=options.vm, uuid=options.uuid, label=options.name, key=key, at_s=now_s()
            )
    output.result(
        shown_volume(row),
        f"volume {row.uuid} of {row.vm_id}: its key is kept, and released to the VM as any other",
        f"next: kagimori-verifier vm config {row.vm_id}",
        "once the VM has booted, enrol the volume anew: a key that lies on paper is not one to boot by",
    )
    return 0
