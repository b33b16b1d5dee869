"""``profile`` and ``reference``: what a VM must show, and what is known to be good."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kagimori_protocol.errors import OperatorError, UsageError
from kagimori_protocol.snp import MEASUREMENT_SIZE
from kagimori_verifier import learning, ledger
from kagimori_verifier.appraise.policy import Policy, TcbFloor, check_policy, parse_policy
from kagimori_verifier.cli.output import (
    Output,
    add_verb,
    exists,
    group,
    now_s,
    read_file,
    reading,
    unknown,
    when,
    writing,
)
from kagimori_verifier.store import profiles, references, vms

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verbs
    from kagimori_verifier.store import Txn
    from kagimori_verifier.store.references import BootStateRow, MeasurementRow

_PROFILE_TODO: Final = "`kagimori-verifier profile list` shows the profiles."


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    profile = group(add_verb(verbs, "profile", None, "Appraisal policies that VMs share."))
    add = add_verb(
        profile,
        "add",
        _profile_add,
        "Add a profile; what it does not name is refused.",
        'profile add debian --boot-way grub --tcb-floor "Milan:boot_loader=4,tee=0,snp=24,microcode=219"',
    )
    add.add_argument("name", metavar="NAME")
    add.add_argument("--boot-way", required=True, choices=("grub", "uki", "direct"))
    add.add_argument(
        "--tcb-floor",
        action="append",
        required=True,
        metavar="PRODUCT:PART=N,...",
        help="lowest firmware versions; parts boot_loader, tee, snp, microcode, on Turin fmc too; repeatable",
    )
    add.add_argument(
        "--signer", action="append", choices=("vcek", "vlek"), help="who may sign reports (default: vcek)"
    )
    add.add_argument(
        "--csp-id", action="append", default=[], metavar="ID", help="provider whose VLEK is accepted"
    )
    add.add_argument("--any-chip", action="store_true", help="accept every chip, instead of each VM's list")
    add.add_argument(
        "--allow-platform",
        action="append",
        default=[],
        metavar="FLAG",
        help="accept a PLATFORM_INFO flag beside the usual ones",
    )
    add.add_argument("--require-platform", action="append", default=[], metavar="FLAG")
    add.add_argument(
        "--require-policy", action="append", default=[], metavar="FLAG", help="demand a guest policy flag"
    )
    add.add_argument("--revocation", choices=("required", "if-present"), default="required")
    add.add_argument(
        "--extra-pcr", action="append", type=int, default=[], metavar="N", help="govern this PCR, too"
    )
    add_verb(profile, "list", _profile_list, "List the profiles.", "profile list")
    for name, run, about in (
        ("show", _profile_show, "Print a profile's policy as JSON."),
        ("remove", _profile_remove, "Forget a profile that no VM uses."),
    ):
        add_verb(profile, name, run, about, f"profile {name} debian").add_argument("name", metavar="NAME")
    edit = add_verb(
        profile,
        "edit",
        _profile_edit,
        "Replace a profile's policy by JSON.",
        "profile show debian > p.json; $EDITOR p.json; kagimori-verifier profile edit debian --file p.json",
    )
    edit.add_argument("name", metavar="NAME")
    edit.add_argument("--file", type=Path, default=Path("-"), help="the policy (default: stdin)")

    reference = group(add_verb(verbs, "reference", None, "Reference values: what is known to be good."))
    measurement = group(
        add_verb(reference, "measurement", None, "Launch measurements; they fix the kind of evidence.")
    )
    add = add_verb(
        measurement,
        "add",
        _measurement_add,
        "Know a launch measurement.",
        "reference measurement add 5a5a... --profile debian --kind svsm-vtpm --label 'svsm 2026.10' --svsm-feature vtpm",
    )
    add.add_argument("digest", metavar="HEX")
    add.add_argument("--profile", required=True)
    add.add_argument("--kind", required=True, choices=("svsm-vtpm", "snp-direct"))
    add.add_argument("--label", required=True, help="what build this is")
    add.add_argument(
        "--svsm-feature",
        action="append",
        default=[],
        metavar="NAME",
        help="build features of the SVSM, as they are; svsm-vtpm accepts exactly `vtpm`",
    )
    add_verb(measurement, "list", _measurement_list, "List the measurements.", "reference measurement list")
    remove = add_verb(
        measurement,
        "remove",
        _measurement_remove,
        "Forget a measurement.",
        "reference measurement remove 5a5a... --profile debian",
    )
    remove.add_argument("digest", metavar="HEX")
    remove.add_argument("--profile", required=True)
    pcr = group(add_verb(reference, "pcr", None, "PCR values, from a file."))
    add = add_verb(
        pcr,
        "add",
        _pcr_add,
        "Know a set of PCR values that belong together.",
        "reference pcr add --vm web1 --label 'kernel 6.1.0-50' --event-log eventlog.bin --pcr 8 --pcr 9",
    )
    owner = add.add_mutually_exclusive_group(required=True)
    owner.add_argument("--profile")
    owner.add_argument("--vm")
    add.add_argument("--label", required=True)
    source = add.add_mutually_exclusive_group(required=True)
    source.add_argument("--pcrs", type=Path, metavar="FILE", help='JSON: {"sha256": {"0": "<hex>", ...}}')
    source.add_argument(
        "--event-log", type=Path, metavar="FILE", help="a firmware event log, which is replayed"
    )
    add.add_argument(
        "--pcr",
        action="append",
        type=int,
        metavar="N",
        help="take only this PCR; repeatable (default: all that the owner may have)",
    )
    add_verb(
        reference, "list", _reference_list, "List the boot states of profiles and VMs.", "reference list"
    )
    for name, run, about in (
        ("show", _reference_show, "Show a boot state."),
        ("remove", _reference_remove, "Forget a boot state."),
    ):
        add_verb(reference, name, run, about, f"reference {name} 3").add_argument(
            "id", type=int, metavar="ID"
        )
    accept = add_verb(
        reference,
        "accept",
        _accept,
        "Make what a VM showed in a confirmed session its reference value.",
        "reference accept 1f2e3d4c5b6a7988 --label 'after update'",
    )
    accept.add_argument("session", metavar="SESSION")
    accept.add_argument("--label", default="", help="what this state is (default: the session's name)")
    accept.add_argument("--yes", action="store_true", help="do not ask")


def _profile_add(options: argparse.Namespace, output: Output) -> int:
    defaults = Policy(boot_way=options.boot_way, tcb_floors={})
    policy = check_policy(
        msgspec.structs.replace(
            defaults,
            tcb_floors=dict(_floor(text) for text in options.tcb_floor),
            signers=options.signer or ["vcek"],
            csp_ids=options.csp_id,
            any_chip=options.any_chip,
            platform_allowed=[*defaults.platform_allowed, *options.allow_platform],
            platform_required=options.require_platform,
            guest_policy_required=options.require_policy,
            revocation=options.revocation,
            extra_pcrs=options.extra_pcr,
        )
    )
    text = msgspec.json.encode(policy).decode()
    parse_policy(text)
    with writing(options) as txn:
        if profiles.get(txn, options.name) is not None:
            raise exists("profile", options.name)
        profiles.add(txn, profiles.ProfileRow(options.name, text, now_s()))
        _record(txn, "profile-added", {"profile": options.name, "policy": msgspec.json.decode(text)})
    output.result(msgspec.json.decode(text), f"added profile {options.name}")
    return 0


def _floor(text: str) -> tuple[str, TcbFloor]:
    product, _, parts = text.partition(":")
    try:
        numbers = {name: int(number) for name, number in (part.split("=") for part in parts.split(","))}
        return product, msgspec.convert(numbers, TcbFloor)
    except (ValueError, msgspec.ValidationError) as error:
        raise UsageError(
            "A TCB floor has another form.",
            code="policy.tcb-floor",
            expected="PRODUCT:boot_loader=N,tee=N,snp=N,microcode=N (Turin: fmc=N, too)",
            found=text,
        ) from error


def _profile_list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        rows = [{"name": row.name, "policy": msgspec.json.decode(row.policy)} for row in profiles.all(txn)]
    short = (
        rows
        if output.as_json
        else [
            {
                "name": row["name"],
                "boot_way": row["policy"]["boot_way"],
                "products": list(row["policy"]["tcb_floors"]),
            }
            for row in rows
        ]
    )
    output.rows(short, "name", "boot_way", "products", none="no profiles")
    return 0


def _profile_show(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        row = profiles.get(txn, options.name)
    if row is None:
        raise unknown("profile", options.name, _PROFILE_TODO)
    policy = msgspec.json.decode(row.policy)
    output.result(policy, msgspec.json.format(row.policy, indent=2))
    return 0


def _profile_edit(options: argparse.Namespace, output: Output) -> int:
    policy = parse_policy(read_file(options.file))
    text = msgspec.json.encode(policy).decode()
    with writing(options) as txn:
        if not profiles.replace(txn, options.name, text):
            raise unknown("profile", options.name, _PROFILE_TODO)
        _record(txn, "profile-changed", {"profile": options.name, "policy": msgspec.json.decode(text)})
    output.result(msgspec.json.decode(text), f"changed profile {options.name}")
    return 0


def _profile_remove(options: argparse.Namespace, output: Output) -> int:
    with writing(options) as txn:
        users = [row.vm_id for row in vms.all(txn) if row.profile == options.name]
        if users or references.measurements(txn, options.name):
            raise OperatorError(
                f"Profile {options.name} is in use.",
                code="profile.used",
                expected="a profile without VMs and measurements",
                found=", ".join(users) or "measurements",
            )
        if not profiles.remove(txn, options.name):
            raise unknown("profile", options.name, _PROFILE_TODO)
        _record(txn, "profile-removed", {"profile": options.name})
    output.result({"removed": options.name}, f"removed profile {options.name}")
    return 0


def _measurement_add(options: argparse.Namespace, output: Output) -> int:
    digest = _digest(options.digest)
    row = references.MeasurementRow(
        digest, options.profile, options.kind, options.label, sorted(set(options.svsm_feature)), now_s()
    )
    with writing(options) as txn:
        if profiles.get(txn, options.profile) is None:
            raise unknown("profile", options.profile, _PROFILE_TODO)
        if references.measurement(txn, options.profile, digest) is not None:
            raise exists("measurement", options.digest)
        references.add_measurement(txn, row)
        _record(txn, "measurement-added", _measurement(row))
    output.result(_measurement(row), f"profile {options.profile} knows {options.label}")
    if options.kind == "svsm-vtpm" and row.svsm_features != ["vtpm"]:
        output.note("evidence of this build will be refused: svsm-vtpm accepts exactly --svsm-feature vtpm")
    return 0


def _measurement_list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        rows = [_measurement(row) for row in references.measurements(txn)]
    output.rows(rows, "profile", "label", "kind", "svsm_features", "digest", none="no measurements")
    return 0


def _measurement_remove(options: argparse.Namespace, output: Output) -> int:
    digest = _digest(options.digest)
    with writing(options) as txn:
        if not references.remove_measurement(txn, options.profile, digest):
            raise unknown(
                "measurement", options.digest, "`kagimori-verifier reference measurement list` shows them."
            )
        _record(txn, "measurement-removed", {"profile": options.profile, "digest": digest.hex()})
    output.result({"removed": digest.hex()}, "removed the measurement")
    return 0


def _pcr_add(options: argparse.Namespace, output: Output) -> int:
    kind, owner = ("vm", options.vm) if options.vm else ("profile", options.profile)
    if options.pcrs:
        pcrs = learning.from_values(read_file(options.pcrs))
    else:
        pcrs = learning.from_event_log(read_file(options.event_log))
    with writing(options) as txn:
        policy = learning.policy_of(txn, kind, owner)
        row = learning.boot_state(policy, kind, owner, options.label, pcrs, options.pcr, "file", now_s())
        state_id = references.add_boot_state(txn, row)
        _record(
            txn,
            "reference-added",
            {"id": state_id, "owner": owner, "label": options.label, "pcrs": sorted(map(int, row.pcrs))},
        )
    output.result(
        {"id": state_id, "pcrs": sorted(map(int, row.pcrs))},
        f"boot state {state_id} of {kind} {owner}: PCRs {', '.join(sorted(row.pcrs, key=int))}",
    )
    return 0


def _reference_list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        rows = [_state(row) for row in _states(txn)]
    short = (
        rows
        if output.as_json
        else [row | {"pcrs": sorted(map(int, row["pcrs"])), "created": when(row["created"])} for row in rows]
    )
    output.rows(short, "id", "owner_kind", "owner", "label", "pcrs", "created", none="no boot states")
    return 0


def _reference_show(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        found = next((row for row in _states(txn) if row.id == options.id), None)
    if found is None:
        raise unknown("boot state", str(options.id), "`kagimori-verifier reference list` shows them.")
    lines = [
        f'{found.owner_kind} {found.owner}: "{found.label}" of {when(found.created)}, from {found.source}'
    ]
    for index in sorted(found.pcrs, key=int):
        lines.append(f"PCR {index}  {found.pcrs[index]['digest']}")
        lines += [f"        {digest[:16]}  {text}" for digest, text in found.pcrs[index]["events"]]
    output.result(_state(found), *lines)
    return 0


def _reference_remove(options: argparse.Namespace, output: Output) -> int:
    with writing(options) as txn:
        if not references.remove_boot_state(txn, options.id):
            raise unknown("boot state", str(options.id), "`kagimori-verifier reference list` shows them.")
        _record(txn, "reference-removed", {"id": options.id})
    output.result({"removed": options.id}, f"removed boot state {options.id}")
    return 0


def _accept(options: argparse.Namespace, output: Output) -> int:
    label = options.label or f"session {options.session}"
    with reading(options) as txn:
        proposal = learning.proposal(txn, options.session, label, now_s())
    for row, changes in proposal.states:
        output.note(f"{row.owner_kind} {row.owner} gets PCRs {', '.join(sorted(row.pcrs, key=int))}")
        for line in changes:
            output.note(f"  {line}")
    if not options.yes:
        if output.as_json or not sys.stdin.isatty():
            raise UsageError(
                "Nobody can be asked here.",
                code="accept.ask",
                expected="--yes, or a terminal",
                found="neither",
            )
        if input("Accept? [y/N] ").strip().lower() not in {"y", "yes"}:
            output.result({"accepted": False}, "nothing was changed")
            return 1
    with writing(options) as txn:
        ids = [references.add_boot_state(txn, row) for row, _ in proposal.states]
        body = {"label": label, "states": ids, "session": options.session}
        ledger.append(
            txn,
            at_s=now_s(),
            event="reference-accepted",
            vm_id=proposal.vm_id,
            session=options.session,
            body=body,
        )
    output.result({"accepted": True, "states": ids}, f'accepted as "{label}"')
    return 0


def _states(txn: Txn) -> list[BootStateRow]:
    owners = [("profile", row.name) for row in profiles.all(txn)] + [
        ("vm", row.vm_id) for row in vms.all(txn)
    ]
    return sorted(
        (row for owner in owners for row in references.boot_states(txn, *owner)), key=lambda row: row.id
    )


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != MEASUREMENT_SIZE:
        raise UsageError(
            "A measurement has another form.",
            code="reference.digest",
            expected=f"{2 * MEASUREMENT_SIZE} hex digits",
            found=f"{len(text)} characters",
        )
    return digest


def _measurement(row: MeasurementRow) -> dict[str, Any]:
    return {
        "profile": row.profile,
        "digest": row.digest.hex(),
        "kind": row.kind,
        "label": row.label,
        "svsm_features": row.svsm_features,
    }


def _state(row: BootStateRow) -> dict[str, Any]:
    return {
        name: getattr(row, name)
        for name in ("id", "owner_kind", "owner", "label", "source", "created", "pcrs")
    }


def _record(txn: Txn, event: str, body: dict[str, Any]) -> None:
    ledger.append(txn, at_s=now_s(), event=event, vm_id=None, session=None, body=body)
