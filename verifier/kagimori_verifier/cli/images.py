"""``image``: raw disk images on the owner's machine, before they go to a provider."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kagimori_protocol.errors import DiskError, OperatorError, UsageError
from kagimori_verifier import enrolment, luks_enrol, partitions
from kagimori_verifier.cli import arguments, header_backups
from kagimori_verifier.cli.access import now_s, opened
from kagimori_verifier.cli.output import Output, add_verb, group
from kagimori_verifier.cli.own_kek import own_kek
from kagimori_verifier.cli.vms import agent_toml, known, shown_volume
from kagimori_verifier.cli.volumes import passphrase_of
from kagimori_verifier.partitions import Partition

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verbs

WHOLE = 0
"""Number of the partition that an image without a table is."""


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    image = group(
        add_verb(verbs, "image", None, "Work on raw disk images, on this machine.", "image enrol IMAGE")
    )
    enrol = add_verb(
        image,
        "enrol",
        _enrol,
        "Give every LUKS2 volume in a raw disk image a keyslot for an unlock key that is made and kept here, as `volume add`\n"
        "does for one. What was formatted here has a volume key that no host has known, and verdicts say so. Reference\n"
        "values are not computed: the initramfs with its agent.toml is yet to be built. Boot it, and `reference accept`.",
        "image enrol disk.raw --vm web1 --agent-toml agent.toml",
    )
    enrol.add_argument(
        "image", type=Path, metavar="IMAGE", help="a raw image, with a GPT, an MBR, or no table"
    )
    enrol.add_argument("--vm", required=True, type=arguments.vm, metavar="NAME")
    enrol.add_argument(
        "--partition",
        action="append",
        type=int,
        metavar="N",
        help="only this partition; repeatable (default: all with LUKS2)",
    )
    enrol.add_argument(
        "--name",
        action="append",
        default=[],
        type=arguments.name,
        metavar="NAME",
        help="mapping name in the VM, in the order of the partitions (default: cryptroot, then luks-UUID)",
    )
    secret = enrol.add_mutually_exclusive_group()
    secret.add_argument(
        "--passphrase-fd",
        type=arguments.descriptor,
        metavar="N",
        help="read an existing passphrase of all of them from this descriptor, up to a newline",
    )
    secret.add_argument(
        "--key-file", type=Path, metavar="FILE", help="take an existing key file, all of its bytes"
    )
    enrol.add_argument(
        "--agent-toml", type=Path, metavar="FILE", help="write the VM's agent.toml to this new file"
    )


def _enrol(options: argparse.Namespace, output: Output) -> int:
    added: list[dict[str, Any]] = []
    with opened(options) as (settings, store):
        with store.read() as txn:
            known(txn, options.vm)
        if options.agent_toml is not None and options.agent_toml.exists():
            raise UsageError(f"{options.agent_toml} exists already.", expected="a new file", found="one")
        found = _volumes(options.image, options.partition)
        kek = own_kek(settings, store)
        options.device, options.backup = options.image, None
        passphrase = passphrase_of(options)
        for number, (part, uuid) in enumerate(found):
            names = [*options.name, *([] if options.name else ["cryptroot"])]
            volume = enrolment.add_volume(
                store,
                kek,
                vm_id=options.vm,
                device=options.image,
                part=(part.offset, part.size),
                label=names[number] if number < len(names) else f"luks-{uuid}",
                passphrase=passphrase,
                backup=header_backups.place(options, settings, uuid),
                at_s=now_s(),
            )
            added.append(shown_volume(volume) | {"partition": part.number})
        text, notes = agent_toml(store, settings, options.vm, "home")
    if options.agent_toml is not None:
        _write(options.agent_toml, text)
    output.result(
        {"vm_id": options.vm, "volumes": added, "agent_toml": text},
        *(f"partition {one['partition']}: volume {one['uuid']} enrolled as {one['label']}" for one in added),
        f"next: {options.agent_toml or 'kagimori-verifier vm config ' + options.vm} belongs into the image as "
        "/etc/kagimori/agent.toml, and its initramfs is to be built anew",
        "then: boot it, and accept what it shows: kagimori-verifier reference accept SESSION",
    )
    for note in notes:
        output.note(note)
    return 0


def _volumes(image: Path, wanted: list[int] | None) -> list[tuple[Partition, str]]:
    """Give the partitions with a LUKS2 header, and its UUID. Raises DiskError."""
    with luks_enrol.opened(image) as disk:
        table = partitions.find(disk.read, disk.size) or (Partition(WHOLE, 0, disk.size),)
    missing = set(wanted or ()) - {one.number for one in table}
    if missing:
        raise UsageError(
            "The image has no such partition.",
            expected=", ".join(str(one.number) for one in table),
            found=", ".join(map(str, sorted(missing))),
        )
    found: list[tuple[Partition, str]] = []
    for one in table:
        if wanted is not None and one.number not in wanted:
            continue
        with luks_enrol.opened(image, (one.offset, one.size)) as disk:
            if disk.is_luks2() or wanted is not None:
                found.append((one, disk.load().header.uuid))
    if not found:
        raise DiskError(
            f"{image} has no LUKS2 volume.",
            code="image.luks2",
            expected="a raw image with a LUKS2 partition",
            found=f"{len(table)} partition{'' if len(table) == 1 else 's'} without",
            todo="Encrypt its root first (cryptsetup reencrypt --encrypt); convert qcow2 with qemu-img convert -O raw.",
        )
    return found


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OperatorError(
            f"{path} cannot be written.",
            code="image.agent-toml",
            expected="a new file",
            found=str(error.strerror),
            todo="The volumes are enrolled: `kagimori-verifier vm config` prints it again.",
        ) from error
