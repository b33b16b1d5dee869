"""``profile``: appraisal policies that VMs share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kagimori_protocol.errors import OperatorError, UsageError
from kagimori_verifier import ledger
from kagimori_verifier.appraise.command_line import GIVEN_UP
from kagimori_verifier.appraise.policy import DOORS, GOVERNED_PCRS, Policy, check_policy, parse_policy
from kagimori_verifier.cli import arguments
from kagimori_verifier.cli.access import exists, now_s, reading, unknown, writing
from kagimori_verifier.cli.files import read_file
from kagimori_verifier.cli.output import Output, add_verb, group
from kagimori_verifier.store import profiles, references, vms

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verbs
    from kagimori_verifier.store import Txn

WHERE: Final = "`kagimori-verifier profile list` shows the profiles."


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    profile = group(
        add_verb(verbs, "profile", None, "Manage the appraisal policies that VMs share.", "profile list")
    )
    _register_add(profile)
    add_verb(profile, "list", _list, "List the profiles.", "profile list")
    for name, run, about in (
        ("show", _show, "Print a profile's policy as JSON."),
        ("remove", _remove, "Forget a profile that no VM uses, with its boot states."),
    ):
        add_verb(profile, name, run, about, f"profile {name} debian").add_argument(
            "name", type=arguments.name, metavar="NAME"
        )
    edit = add_verb(
        profile,
        "edit",
        _edit,
        "Replace a profile's policy by JSON.",
        "profile show debian > p.json; $EDITOR p.json; kagimori-verifier profile edit debian --file p.json",
    )
    edit.add_argument("name", type=arguments.name, metavar="NAME")
    edit.add_argument(
        "--file", type=Path, default=Path("-"), metavar="FILE", help="the policy (default: stdin)"
    )


def _register_add(profile: Verbs) -> None:
    add = add_verb(
        profile,
        "add",
        _add,
        "Add a profile; what it does not name is refused.",
        'profile add debian --boot-way grub --tcb-floor "Milan:boot_loader=4,tee=0,snp=24,microcode=219"',
    )
    add.add_argument("name", type=arguments.name, metavar="NAME")
    add.add_argument(
        "--boot-way",
        required=True,
        choices=tuple(GOVERNED_PCRS),
        help="how its VMs boot, which fixes the PCRs that must be known",
    )
    add.add_argument(
        "--tcb-floor",
        action="append",
        required=True,
        type=arguments.tcb_floor,
        metavar="PRODUCT:PART=N,...",
        help="lowest firmware versions; parts boot_loader, tee, snp, microcode, on Turin fmc too; one for each "
        "product line that is accepted",
    )
    add.add_argument(
        "--signer",
        action="append",
        choices=("vcek", "vlek"),
        help="who may sign reports; repeatable (default: vcek)",
    )
    add.add_argument("--any-chip", action="store_true", help="accept every chip, instead of each VM's list")
    add.add_argument(
        "--revocation",
        choices=("required", "if-present"),
        default="required",
        help="whether a current revocation list must be there (default: %(default)s)",
    )
    for option, kind, metavar, about in (
        ("--csp-id", arguments.label, "ID", "cloud provider whose VLEK is accepted"),
        ("--allow-platform", arguments.platform_flag, "FLAG", "accept this PLATFORM_INFO flag, too"),
        ("--require-platform", arguments.platform_flag, "FLAG", "demand this PLATFORM_INFO flag"),
        ("--require-policy", arguments.guest_policy_flag, "FLAG", "demand this guest policy flag"),
        ("--extra-pcr", arguments.pcr, "N", "demand that this PCR is known, too"),
        (
            "--command-line",
            arguments.command_line,
            "TEXT",
            "a kernel command line, for boots whose log has no text of it",
        ),
    ):
        add.add_argument(
            option, action="append", default=[], type=kind, metavar=metavar, help=f"{about}; repeatable"
        )

    add.add_argument(
        "--accept-door",
        action="append",
        default=[],
        choices=DOORS,
        help="leave this door of the command line open; command-line: its text need not be known; repeatable",
    )


def _add(options: argparse.Namespace, output: Output) -> int:
    floors = dict(options.tcb_floor)
    if len(floors) != len(options.tcb_floor):
        raise UsageError(
            "A product has two TCB floors.",
            code="policy.tcb-floor",
            expected="one --tcb-floor for each product",
            found=", ".join(product for product, _ in options.tcb_floor),
        )
    defaults = Policy(boot_way=options.boot_way, tcb_floors=floors)
    policy = _checked(
        msgspec.structs.replace(
            defaults,
            signers=list(dict.fromkeys(options.signer or ["vcek"])),
            csp_ids=options.csp_id,
            any_chip=options.any_chip,
            platform_allowed=_together(defaults.platform_allowed, options.allow_platform),
            platform_required=options.require_platform,
            guest_policy_required=options.require_policy,
            revocation=options.revocation,
            extra_pcrs=options.extra_pcr,
            command_lines=options.command_line,
            accepted_doors=list(dict.fromkeys(options.accept_door)),
        )
    )
    shown = msgspec.to_builtins(policy)
    with writing(options) as txn:
        if profiles.get(txn, options.name) is not None:
            raise exists(
                "profile", options.name, f"`kagimori-verifier profile edit {options.name}` changes it."
            )
        profiles.add(txn, profiles.ProfileRow(options.name, msgspec.json.encode(policy).decode(), now_s()))
        _record(txn, "profile-added", {"profile": options.name, "policy": shown})
    output.result(
        shown,
        f"added profile {options.name}",
        *_told(policy),
        f"next: kagimori-verifier reference measurement add HEX --profile {options.name} ...",
    )
    return 0


def _list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        found = [(row.name, row.policy) for row in profiles.all(txn)]
    rows: list[dict[str, Any]] = [{"name": name, "policy": msgspec.json.decode(text)} for name, text in found]
    if not output.as_json:
        rows = [
            {
                "name": row["name"],
                "boot_way": row["policy"]["boot_way"],
                "products": list(row["policy"]["tcb_floors"]),
                "signers": row["policy"]["signers"],
            }
            for row in rows
        ]
    output.rows(rows, "name", "boot_way", "products", "signers", none="no profiles")
    return 0


def _show(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        row = profiles.get(txn, options.name)
    if row is None:
        raise unknown("profile", options.name, WHERE)
    output.result(msgspec.json.decode(row.policy), *msgspec.json.format(row.policy, indent=2).splitlines())
    return 0


def _edit(options: argparse.Namespace, output: Output) -> int:
    policy = _checked(parse_policy(read_file(options.file)))
    shown = msgspec.to_builtins(policy)
    with writing(options) as txn:
        if not profiles.replace(txn, options.name, msgspec.json.encode(policy).decode()):
            raise unknown("profile", options.name, WHERE)
        _record(txn, "profile-changed", {"profile": options.name, "policy": shown})
    output.result(shown, f"changed profile {options.name}", *_told(policy))
    return 0


def _remove(options: argparse.Namespace, output: Output) -> int:
    with writing(options) as txn:
        if profiles.get(txn, options.name) is None:
            raise unknown("profile", options.name, WHERE)
        users = [f"VM {row.vm_id}" for row in vms.all(txn) if row.profile == options.name]
        users += [f"measurement {row.label}" for row in references.measurements(txn, options.name)]
        if users:
            raise OperatorError(
                f"Profile {options.name} is in use.",
                code="profile.used",
                expected="a profile without VMs and measurements",
                found=", ".join(users),
                todo="Remove those first: `vm remove`, `reference measurement remove`.",
            )
        profiles.remove(txn, options.name)
        _record(txn, "profile-removed", {"profile": options.name})
    output.result({"removed": options.name}, f"removed profile {options.name}")
    return 0


def _told(policy: Policy) -> list[str]:
    """Say what a policy leaves open, and whom it will refuse for want of a text."""
    told = [f"given up, {door}: {GIVEN_UP[door]}" for door in policy.accepted_doors]
    if policy.boot_way != "grub" and not policy.command_lines and "command-line" not in policy.accepted_doors:
        told.append(
            f"no command line is known: the log of a boot by {policy.boot_way} has a digest of it alone, so a VM with a "
            "vTPM gets no key before its text stands in command_lines"
        )
    return told


def _checked(policy: Policy) -> Policy:
    """Return a policy that makes sense and whose flags exist: a misspelt one would never hold. Raises its errors."""
    for flag in (*policy.platform_allowed, *policy.platform_required):
        arguments.platform_flag(flag)
    for flag in (*policy.guest_policy_allowed, *policy.guest_policy_required):
        arguments.guest_policy_flag(flag)
    return check_policy(policy)


def _together(*lists: list[str]) -> list[str]:
    return list(dict.fromkeys(flag for one in lists for flag in one))


def _record(txn: Txn, event: str, body: dict[str, Any]) -> None:
    ledger.append(txn, at_s=now_s(), event=event, vm_id=None, session=None, body=body)
