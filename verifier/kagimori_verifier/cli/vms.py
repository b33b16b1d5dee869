"""``vm``: who may ask, for which purposes, on which chips; and what its agent has to know."""

from __future__ import annotations

import argparse
import re
from base64 import b64encode
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kagimori_verifier import enrolling, ledger
from kagimori_verifier.appraise.policy import parse_policy
from kagimori_verifier.cli import arguments, enrolments, recovery_paper
from kagimori_verifier.cli.access import exists, now_s, opened, reading, unknown, writing
from kagimori_verifier.cli.agent_toml import AgentToml
from kagimori_verifier.cli.output import Output, add_verb, group
from kagimori_verifier.store import identities, profiles, references, vms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kagimori_verifier.cli.output import Verbs
    from kagimori_verifier.settings import Settings
    from kagimori_verifier.store import Store, Txn
    from kagimori_verifier.store.vms import VmRow, VolumeRow

SUPPORTED_PURPOSES: Final = ("unlock", "dry-run", "enrol")
_UNREACHABLE: Final = re.compile(r"//(0\.0\.0\.0|\[::\])[:/]?|:0(/|\Z)")
"""URLs that only make sense to listen on: every address, or any port."""
_TODO: Final = "`kagimori-verifier vm list` shows the VMs."
_COLUMNS: Final = ("vm_id", "profile", "enabled", "purposes", "volumes", "chips")


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    vm = group(add_verb(verbs, "vm", None, "Manage the VMs that may ask for keys.", "vm list"))
    add = add_verb(
        vm,
        "add",
        _add,
        "Make a VM known, and a one-time code by which it may enrol its volumes.",
        "vm add web1 --profile debian --chip 0123...",
    )
    add.add_argument("vm", type=arguments.vm, metavar="NAME", help="its vm_id, as in its agent.toml")
    add.add_argument(
        "--profile", required=True, type=arguments.name, metavar="P", help="the policy that it is held to"
    )
    add.add_argument(
        "--chip",
        action="append",
        default=[],
        type=arguments.chip,
        metavar="HEX",
        help="CHIP_ID that it may run on; repeatable",
    )
    add.add_argument(
        "--purpose",
        action="append",
        choices=SUPPORTED_PURPOSES,
        help="what it may ask for; repeatable (default: all of them)",
    )
    recovery_paper.declare(add)
    enrolments.register_vm(vm)
    add_verb(vm, "list", _list, "List the VMs.", "vm list")
    for name, run, about in (
        ("show", _show, "Show a VM with its volumes."),
        ("enable", _enable, "Let a VM ask again."),
        ("disable", _disable, "Answer a VM no more."),
        ("remove", _remove, "Forget a VM, its volumes' keys and its boot states."),
    ):
        add_verb(vm, name, run, about, f"vm {name} web1").add_argument(
            "vm", type=arguments.vm, metavar="NAME"
        )
    config = add_verb(vm, "config", _config, "Print the agent.toml of a VM.", "vm config web1 > agent.toml")
    config.add_argument("vm", type=arguments.vm, metavar="NAME")
    config.add_argument(
        "--verifier-name",
        default="home",
        type=arguments.name,
        metavar="NAME",
        help="what the agent calls this verifier (default: %(default)s)",
    )
    chip = group(
        add_verb(vm, "chip", None, "Change the chips that a VM may run on.", "vm chip add web1 0123...")
    )
    for name, run, about in (
        ("add", _chip_add, "Let a VM run on a chip."),
        ("remove", _chip_remove, "Let a VM run on a chip no more."),
    ):
        parser = add_verb(chip, name, run, about, f"vm chip {name} web1 0123...")
        parser.add_argument("vm", type=arguments.vm, metavar="NAME")
        parser.add_argument("chip", type=arguments.chip, metavar="HEX", help="CHIP_ID, as in a report")


def known(txn: Txn, vm_id: str) -> VmRow:
    """Give a VM that exists. Raises OperatorError."""
    row = vms.get(txn, vm_id)
    if row is None:
        raise unknown("VM", vm_id, _TODO)
    return row


def shown_volume(row: VolumeRow) -> dict[str, Any]:
    """Give what may be shown of a volume: all but its wrapped key."""
    names = ("vm_id", "uuid", "label", "state", "version", "header_epoch", "origin", "created")
    return {name: getattr(row, name) for name in names}


def _add(options: argparse.Namespace, output: Output) -> int:
    purposes = list(dict.fromkeys(options.purpose or SUPPORTED_PURPOSES))
    chips = list(dict.fromkeys(options.chip))
    row = vms.VmRow(
        options.vm, options.profile, enabled=True, purposes=purposes, chips=chips, created=now_s()
    )
    with opened(options) as (settings, store):
        recovery = recovery_paper.asked(options, output, settings, store)
        with store.write() as txn:
            profile = profiles.get(txn, options.profile)
            if profile is None:
                raise unknown(
                    "profile", options.profile, "`kagimori-verifier profile list` shows the profiles."
                )
            if vms.get(txn, row.vm_id) is not None:
                raise exists("VM", row.vm_id, f"`kagimori-verifier vm show {row.vm_id}` shows it.")
            vms.add(txn, row)
            body = {"profile": row.profile, "chips": chips, "purposes": purposes}
            _record(txn, "vm-added", row.vm_id, body)
            code: dict[str, Any] = {}
            if recovery is not None or "enrol" in purposes:
                wrapped = None if recovery is None else recovery.wrapped_for(row.vm_id)
                made = enrolling.make_code(txn, row.vm_id, row.created, wrapped_recovery=wrapped)
                code = enrolments.shown_code(txn, *made)
    if recovery is not None:
        recovery_paper.show_new(recovery, options, row.vm_id)
    output.result(
        _shown(row, ()) | ({"enrol": code} if code else {}),
        f"added VM {row.vm_id}",
        *(enrolments.code_lines(row.vm_id, code) if code else ()),
        f"next: its disk is here? kagimori-verifier volume add --vm {row.vm_id} --device PATH",
        f"      it is installed there? kagimori-verifier vm config {row.vm_id}, and the code",
    )
    if not chips and not parse_policy(profile.policy).any_chip:
        output.note(f"{row.vm_id} may run on no chip yet: kagimori-verifier vm chip add {row.vm_id} CHIP_ID")
    return 0


def _list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        rows = [_shown(row, vms.volumes(txn, row.vm_id)) for row in vms.all(txn)]
    if not output.as_json:
        rows = [row | {"chips": len(row["chips"]), "volumes": len(row["volumes"])} for row in rows]
    output.rows(rows, *_COLUMNS, none="no VMs")
    return 0


def _show(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        row = known(txn, options.vm)
        shown = _shown(row, vms.volumes(txn, row.vm_id, state=None))
    lines = [f"{'vm_id':<10}{row.vm_id}", f"{'profile':<10}{row.profile}"]
    lines.append(f"{'enabled':<10}{'yes' if row.enabled else 'no'}")
    lines.append(f"{'purposes':<10}{', '.join(row.purposes)}")
    lines += [f"{'chip':<10}{chip}" for chip in row.chips]
    lines += [f"{'volume':<10}{one['uuid']}  {one['label']}  {one['state']}" for one in shown["volumes"]]
    output.result(shown, *lines)
    return 0


def _enable(options: argparse.Namespace, output: Output) -> int:
    return _change(options, output, "vm-enabled", lambda row: replace(row, enabled=True))


def _disable(options: argparse.Namespace, output: Output) -> int:
    return _change(options, output, "vm-disabled", lambda row: replace(row, enabled=False))


def _remove(options: argparse.Namespace, output: Output) -> int:
    with writing(options) as txn:
        known(txn, options.vm)
        vms.remove(txn, options.vm)
        _record(txn, "vm-removed", options.vm, {})
    output.result({"removed": options.vm}, f"removed VM {options.vm} with its volumes' keys and boot states")
    return 0


def _chip_add(options: argparse.Namespace, output: Output) -> int:
    def changed(row: VmRow) -> VmRow:
        return replace(row, chips=list(dict.fromkeys([*row.chips, options.chip])))

    return _change(options, output, "vm-chips", changed)


def _chip_remove(options: argparse.Namespace, output: Output) -> int:
    def changed(row: VmRow) -> VmRow:
        if options.chip not in row.chips:
            raise unknown(
                "chip", options.chip, f"`kagimori-verifier vm show {row.vm_id}` lists the VM's chips."
            )
        return replace(row, chips=[one for one in row.chips if one != options.chip])

    return _change(options, output, "vm-chips", changed)


def _change(
    options: argparse.Namespace, output: Output, event: str, changed: Callable[[VmRow], VmRow]
) -> int:
    """Change a VM and write down what it is now, in one transaction."""
    with writing(options) as txn:
        row = changed(known(txn, options.vm))
        vms.update(txn, row)
        volumes = vms.volumes(txn, row.vm_id, state=None)
        _record(txn, event, row.vm_id, {"enabled": row.enabled, "chips": row.chips})
    chips = f"{len(row.chips)} chip{'' if len(row.chips) == 1 else 's'}"
    output.result(
        _shown(row, volumes), f"VM {row.vm_id} is {'enabled' if row.enabled else 'disabled'}, on {chips}"
    )
    return 0


def _config(options: argparse.Namespace, output: Output) -> int:
    with opened(options) as (settings, store):
        text, notes = agent_toml(store, settings, options.vm, options.verifier_name)
    output.result({"vm_id": options.vm, "agent_toml": text}, *text.splitlines())
    for note in notes:
        output.note(note)
    return 0


def agent_toml(store: Store, settings: Settings, vm_id: str, verifier: str) -> tuple[str, list[str]]:
    """Give a VM's agent.toml, which calls this verifier so, and what its owner should know of it. Raises OperatorError."""
    with store.read() as txn:
        row = known(txn, vm_id)
        volumes = vms.volumes(txn, vm_id)
        profile = profiles.get(txn, row.profile)
        kinds = {one.kind for one in references.measurements(txn, row.profile)}
        keys = [
            b64encode(key.public).decode()
            for key in sorted(identities.all(txn, "signing"), key=lambda key: key.state != "current")
            if key.public is not None and key.state in {"current", "next"}
        ]
    if profile is None:
        raise unknown("profile", row.profile, "`kagimori-verifier profile list` shows the profiles.")
    text = AgentToml(
        vm_id=vm_id,
        kind="snp-direct" if kinds == {"snp-direct"} else "svsm-vtpm",
        verifier=verifier,
        urls=settings.public_urls,
        keys=keys,
        volumes=[(one.uuid, one.label) for one in volumes],
        cap_pcr=parse_policy(profile.policy).cap_pcr,
    ).text()
    notes = []
    if unreachable := [url for url in settings.public_urls if _UNREACHABLE.search(url)]:
        notes.append(f"agents cannot reach {', '.join(unreachable)}: correct public_urls in verifier.toml")
    if not volumes:
        notes.append(
            f"{vm_id} has no volume yet, so it can only ask by dry-run: volume add here, or kagimori-agent enrol there"
        )
    return text, notes


def _record(txn: Txn, event: str, vm_id: str, body: dict[str, Any]) -> None:
    ledger.append(txn, at_s=now_s(), event=event, vm_id=vm_id, session=None, body=body)


def _shown(row: VmRow, volumes: Sequence[VolumeRow]) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(asdict(row))
    return plain | {"volumes": [shown_volume(volume) for volume in volumes]}
