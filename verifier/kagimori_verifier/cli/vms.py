"""``vm`` and ``volume``: who may ask, for which disks."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from base64 import b64encode
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kagimori_protocol.errors import OperatorError, UsageError
from kagimori_protocol.messages import VmId
from kagimori_protocol.snp import CHIP_ID_SIZE
from kagimori_verifier import enrolment, identity, ledger
from kagimori_verifier.cli.output import (
    Output,
    add_verb,
    exists,
    group,
    now_s,
    opened,
    reading,
    unknown,
    writing,
)
from kagimori_verifier.store import profiles, vms

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verbs
    from kagimori_verifier.store import Txn
    from kagimori_verifier.store.vms import VmRow

SUPPORTED_PURPOSES: Final = ("unlock", "dry-run")
MAX_PASSPHRASE: Final = 8 << 20
_VM_TODO: Final = "`kagimori-verifier vm list` shows the VMs."
_COLUMNS: Final = ("vm_id", "profile", "enabled", "purposes", "volumes", "chips")


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    vm = group(add_verb(verbs, "vm", None, "VMs that may ask for keys."))
    add = add_verb(vm, "add", _add, "Enrol a VM.", "vm add web1 --profile debian --chip 0123...")
    add.add_argument("vm", metavar="NAME")
    add.add_argument("--profile", required=True)
    add.add_argument(
        "--chip", action="append", default=[], metavar="HEX", help="CHIP_ID that it may run on; repeatable"
    )
    add.add_argument(
        "--purpose",
        action="append",
        choices=SUPPORTED_PURPOSES,
        help="what it may ask for (default: all of them)",
    )
    add_verb(vm, "list", _list, "List the VMs.", "vm list")
    for name, run, about in (
        ("show", _show, "Show a VM with its volumes."),
        ("enable", _enable, "Let a VM ask again."),
        ("disable", _disable, "Answer a VM no more."),
        ("remove", _remove, "Forget a VM, its volumes' keys and its boot states."),
    ):
        add_verb(vm, name, run, about, f"vm {name} web1").add_argument("vm", metavar="NAME")
    config = add_verb(vm, "config", _config, "Print the agent.toml of a VM.", "vm config web1 > agent.toml")
    config.add_argument("vm", metavar="NAME")
    config.add_argument(
        "--verifier-name", default="home", metavar="NAME", help="what the agent calls this verifier"
    )
    chip = group(add_verb(vm, "chip", None, "Chips that a VM may run on."))
    for name, run, about in (
        ("add", _chip_add, "Let a VM run on a chip."),
        ("remove", _chip_remove, "Not on this chip any more."),
    ):
        parser = add_verb(chip, name, run, about, f"vm chip {name} web1 0123...")
        parser.add_argument("vm", metavar="NAME")
        parser.add_argument("chip", metavar="HEX")

    volume = group(add_verb(verbs, "volume", None, "LUKS2 volumes whose unlock keys are held here."))
    add = add_verb(
        volume,
        "add",
        _volume_add,
        "Give a LUKS2 volume a keyslot of its own, for an unlock key that is made and kept here. The key is 32 random "
        "bytes, so the keyslot needs no slow derivation, which saves time and memory at boot.",
        "volume add --vm web1 --device disk.img --name cryptroot",
    )
    add.add_argument("--vm", required=True, metavar="NAME")
    add.add_argument(
        "--device", required=True, type=Path, metavar="PATH", help="the device or image, on this machine"
    )
    add.add_argument(
        "--name", default="cryptroot", metavar="NAME", help="mapping name in the VM (default: %(default)s)"
    )
    secret = add.add_mutually_exclusive_group()
    secret.add_argument(
        "--passphrase-fd", type=int, metavar="N", help="read an existing passphrase from this descriptor"
    )
    secret.add_argument(
        "--key-file", type=Path, metavar="FILE", help="read an existing passphrase from this file"
    )
    add_verb(volume, "list", _volume_list, "List the volumes.", "volume list")
    remove = add_verb(
        volume,
        "remove",
        _volume_remove,
        "Forget a volume's unlock key; its keyslot stays.",
        "volume remove --vm web1 UUID",
    )
    remove.add_argument("--vm", required=True, metavar="NAME")
    remove.add_argument("uuid", metavar="UUID")


def _add(options: argparse.Namespace, output: Output) -> int:
    try:
        vm_id = msgspec.convert(options.vm, VmId)
    except msgspec.ValidationError as error:
        raise UsageError(
            "A VM's name has another form.",
            expected="1 to 63 of a-z, 0-9, dot, dash, underscore, beginning with a letter or digit",
            found=options.vm,
        ) from error
    chips = [_chip(text) for text in options.chip]
    row = vms.VmRow(
        vm_id,
        options.profile,
        enabled=True,
        purposes=options.purpose or list(SUPPORTED_PURPOSES),
        chips=chips,
        created=now_s(),
    )
    with writing(options) as txn:
        if profiles.get(txn, options.profile) is None:
            raise unknown("profile", options.profile, "`kagimori-verifier profile list` shows the profiles.")
        if vms.get(txn, vm_id) is not None:
            raise exists("VM", vm_id)
        vms.add(txn, row)
        _record(
            txn, "vm-added", vm_id, {"profile": row.profile, "chips": chips, "purposes": list(row.purposes)}
        )
    output.result(
        _vm(row, ()), f"added VM {vm_id}", "next: volume add; then `vm config` prints its agent.toml"
    )
    return 0


def _list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        rows = [_vm(row, vms.volumes(txn, row.vm_id)) for row in vms.all(txn)]
    short = [
        row if output.as_json else row | {"chips": len(row["chips"]), "volumes": len(row["volumes"])}
        for row in rows
    ]
    output.rows(short, *_COLUMNS, none="no VMs")
    return 0


def _show(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        row = _known(txn, options.vm)
        shown = _vm(row, vms.volumes(txn, row.vm_id, state=None))
    output.result(shown, *(f"{name}: {value}" for name, value in shown.items()))
    return 0


def _enable(options: argparse.Namespace, output: Output) -> int:
    return _change(options, output, "vm-enabled", enabled=True)


def _disable(options: argparse.Namespace, output: Output) -> int:
    return _change(options, output, "vm-disabled", enabled=False)


def _remove(options: argparse.Namespace, output: Output) -> int:
    with writing(options) as txn:
        _known(txn, options.vm)
        vms.remove(txn, options.vm)
        _record(txn, "vm-removed", options.vm, {})
    output.result({"removed": options.vm}, f"removed VM {options.vm} with its volumes' keys")
    return 0


def _chip_add(options: argparse.Namespace, output: Output) -> int:
    chip = _chip(options.chip)
    with reading(options) as txn:
        chips = _known(txn, options.vm).chips
    return _change(options, output, "vm-chips", chips=[*(one for one in chips if one != chip), chip])


def _chip_remove(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        chips = _known(txn, options.vm).chips
    if options.chip not in chips:
        raise unknown("chip", options.chip, f"`kagimori-verifier vm show {options.vm}` lists its chips.")
    return _change(options, output, "vm-chips", chips=[one for one in chips if one != options.chip])


def _change(options: argparse.Namespace, output: Output, event: str, **changes: Any) -> int:  # noqa: ANN401 - columns of a VM
    with writing(options) as txn:
        row = replace(_known(txn, options.vm), **changes)
        vms.update(txn, row)
        _record(txn, event, row.vm_id, changes)
    output.result(_vm(row, ()), f"{event}: {row.vm_id}")
    return 0


def _config(options: argparse.Namespace, output: Output) -> int:
    with opened(options) as (settings, store), store.read() as txn:
        _known(txn, options.vm)
        volumes = vms.volumes(txn, options.vm)
        keys = [
            b64encode(key).decode()
            for key in sorted(identity.load(txn, settings.kek_provider().read()).public)
        ]
    lines = [
        "# Belongs into the VM's initramfs, as /etc/kagimori/agent.toml: it is measured with it.",
        f'vm_id = "{options.vm}"',
        'kind = "svsm-vtpm"',
        "",
        "[[verifiers]]",
        f'name = "{options.verifier_name}"',
        f"urls = {_strings(settings.public_urls)}",
        f"keys = {_strings(keys)}                # these authenticate the verifier, not TLS",
    ]
    for volume in volumes:
        lines += ["", "[[volumes]]", f'uuid = "{volume.uuid}"', f'name = "{volume.label}"']
    text = "\n".join(lines)
    output.result({"vm_id": options.vm, "agent_toml": text + "\n"}, text)
    return 0


def _volume_add(options: argparse.Namespace, output: Output) -> int:
    passphrase = _passphrase(options)
    with opened(options) as (settings, store):
        with store.read() as txn:
            _known(txn, options.vm)
        volume = enrolment.add_volume(
            store,
            settings.kek_provider().read(),
            vm_id=options.vm,
            device=options.device,
            label=options.name,
            passphrase=passphrase,
            at_s=now_s(),
        )
    output.result(_volume(volume), f"volume {volume.uuid} of {options.vm}: keyslot added and proved")
    return 0


def _volume_list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        rows = [_volume(volume) for vm in vms.all(txn) for volume in vms.volumes(txn, vm.vm_id, state=None)]
    output.rows(rows, "vm_id", "uuid", "label", "state", "version", none="no volumes")
    return 0


def _volume_remove(options: argparse.Namespace, output: Output) -> int:
    with writing(options) as txn:
        found = [one for one in vms.volumes(txn, options.vm, state=None) if one.uuid == options.uuid]
        if not found:
            raise unknown("volume", options.uuid, "`kagimori-verifier volume list` shows the volumes.")
        for one in found:
            vms.remove_volume(txn, options.vm, options.uuid, one.version)
        _record(txn, "volume-removed", options.vm, {"uuid": options.uuid})
    output.result(
        {"removed": options.uuid},
        f"forgot the unlock key of {options.uuid}; its keyslot is still in the header",
    )
    return 0


def _passphrase(options: argparse.Namespace) -> bytes:
    """Take an existing passphrase from where the operator says; on a terminal, ask."""
    try:
        if options.passphrase_fd is not None:
            with os.fdopen(options.passphrase_fd, "rb", closefd=False) as file:
                passphrase = file.read(MAX_PASSPHRASE)
        elif options.key_file is not None:
            passphrase = options.key_file.read_bytes()
        elif sys.stdin.isatty():
            passphrase = getpass.getpass(f"Existing passphrase of {options.device}: ").encode()
        else:
            raise UsageError(
                "A passphrase that opens the volume is needed.",
                code="volume.passphrase",
                expected="--passphrase-fd, --key-file, or a terminal to ask on",
                found="none of them",
            )
    except OSError as error:
        raise OperatorError(
            "The passphrase cannot be read.",
            code="volume.passphrase",
            expected="a descriptor or file",
            found=str(error.strerror),
        ) from error
    return passphrase


def _known(txn: Txn, vm_id: str) -> VmRow:
    row = vms.get(txn, vm_id)
    if row is None:
        raise unknown("VM", vm_id, _VM_TODO)
    return row


def _chip(text: str) -> str:
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != CHIP_ID_SIZE or not any(raw):
        raise UsageError(
            "A CHIP_ID has another form.",
            code="vm.chip",
            expected=f"{2 * CHIP_ID_SIZE} hex digits, not all zero, as in a report",
            found=f"{len(text)} characters",
        )
    return raw.hex()


def _record(txn: Txn, event: str, vm_id: str, body: dict[str, Any]) -> None:
    ledger.append(txn, at_s=now_s(), event=event, vm_id=vm_id, session=None, body=body)


def _vm(row: VmRow, volumes: tuple[vms.VolumeRow, ...]) -> dict[str, Any]:
    return asdict(row) | {"volumes": [_volume(volume) for volume in volumes]}


def _volume(row: vms.VolumeRow) -> dict[str, Any]:
    return {
        name: getattr(row, name)
        for name in ("vm_id", "uuid", "label", "state", "version", "header_epoch", "created")
    }


def _strings(values: list[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"
