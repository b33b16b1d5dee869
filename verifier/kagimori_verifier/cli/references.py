"""``reference``: what is known to be good. Launch measurements, and PCR values of profiles and VMs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kagimori_protocol.errors import UsageError
from kagimori_verifier import enrolling, learning, ledger
from kagimori_verifier.cli import arguments
from kagimori_verifier.cli.access import exists, now_s, reading, unknown, writing
from kagimori_verifier.cli.files import read_file
from kagimori_verifier.cli.output import Output, add_verb, group, when
from kagimori_verifier.cli.profiles import WHERE as PROFILES
from kagimori_verifier.store import profiles, references, vms

if TYPE_CHECKING:
    from kagimori_verifier.cli.output import Verbs
    from kagimori_verifier.learning import Proposal
    from kagimori_verifier.store import Txn
    from kagimori_verifier.store.references import BootStateRow, MeasurementRow

_TODO = "`kagimori-verifier reference list` shows them."


def register(verbs: Verbs) -> None:
    """Declare the verbs."""
    reference = group(
        add_verb(
            verbs, "reference", None, "Manage reference values: what is known to be good.", "reference list"
        )
    )
    _register_measurement(reference)
    _register_pcr(reference)
    add_verb(
        reference,
        "list",
        _list,
        "List the boot states (sets of PCR values) of profiles and VMs.",
        "reference list",
    )
    for name, run, about in (
        ("show", _show, "Show a boot state, PCR by PCR, with the events behind each."),
        ("remove", _remove, "Forget a boot state."),
    ):
        add_verb(reference, name, run, about, f"reference {name} 3").add_argument(
            "id", type=arguments.identifier, metavar="ID"
        )
    accept = add_verb(
        reference,
        "accept",
        _accept,
        "Make what a VM showed in a confirmed session its reference value.",
        "reference accept 1f2e3d4c5b6a7988 --label 'after update'",
    )
    accept.add_argument("session", type=arguments.session, metavar="SESSION")
    accept.add_argument(
        "--label", type=arguments.label, help="what this state is (default: the session's name)"
    )
    accept.add_argument("--yes", action="store_true", help="do not ask")


def _register_measurement(reference: Verbs) -> None:
    measurement = group(
        add_verb(
            reference,
            "measurement",
            None,
            "Manage launch measurements; they fix the kind of evidence.",
            "reference measurement list",
        )
    )
    add = add_verb(
        measurement,
        "add",
        _measurement_add,
        "Know a launch measurement.",
        "reference measurement add 5a5a... --profile debian --kind svsm-vtpm --label 'svsm 2026.10' \\\n"
        "      --svsm-feature vtpm",
    )
    add.add_argument("digest", type=arguments.measurement, metavar="HEX")
    add.add_argument("--profile", required=True, type=arguments.name, metavar="P")
    add.add_argument(
        "--kind",
        required=True,
        choices=("svsm-vtpm", "snp-direct"),
        help="what evidence such a VM gives",
    )
    add.add_argument("--label", required=True, type=arguments.label, help="what build this is")
    add.add_argument(
        "--svsm-feature",
        action="append",
        default=[],
        type=arguments.name,
        metavar="NAME",
        help="build features of the SVSM, as they are; svsm-vtpm accepts exactly `vtpm`; repeatable",
    )
    add_verb(measurement, "list", _measurement_list, "List the measurements.", "reference measurement list")
    remove = add_verb(
        measurement,
        "remove",
        _measurement_remove,
        "Forget a measurement.",
        "reference measurement remove 5a5a... --profile debian",
    )
    remove.add_argument("digest", type=arguments.measurement, metavar="HEX")
    remove.add_argument("--profile", required=True, type=arguments.name, metavar="P")


def _register_pcr(reference: Verbs) -> None:
    pcr = group(
        add_verb(
            reference, "pcr", None, "Manage PCR values that come from a file.", "reference pcr add --help"
        )
    )
    add = add_verb(
        pcr,
        "add",
        _pcr_add,
        "Know a set of PCR values that belong together.",
        "reference pcr add --vm web1 --label 'kernel 6.1.0-50' --event-log eventlog.bin --pcr 8 --pcr 9",
    )
    owner = add.add_mutually_exclusive_group(required=True)
    owner.add_argument(
        "--profile", type=arguments.name, metavar="P", help="for all of its VMs: firmware and boot loader"
    )
    owner.add_argument(
        "--vm", type=arguments.vm, metavar="NAME", help="for one VM: initramfs and command line, too"
    )
    add.add_argument("--label", required=True, type=arguments.label, help="what this state is")
    source = add.add_mutually_exclusive_group(required=True)
    source.add_argument("--pcrs", type=Path, metavar="FILE", help='JSON: {"sha256": {"0": "<hex>", ...}}')
    source.add_argument(
        "--event-log", type=Path, metavar="FILE", help="a firmware event log, which is replayed"
    )
    add.add_argument(
        "--pcr",
        action="append",
        type=arguments.pcr,
        metavar="N",
        help="take only this PCR; repeatable (default: all that the owner may have)",
    )


def _measurement_add(options: argparse.Namespace, output: Output) -> int:
    features = sorted(set(options.svsm_feature))
    if features and options.kind == "snp-direct":
        raise UsageError(
            "An snp-direct guest has no SVSM.",
            code="reference.kind",
            expected="no --svsm-feature",
            found=", ".join(features),
        )
    row = references.MeasurementRow(
        options.digest, options.profile, options.kind, options.label, features, now_s()
    )
    shown = _measurement(row)
    with writing(options) as txn:
        if profiles.get(txn, options.profile) is None:
            raise unknown("profile", options.profile, PROFILES)
        if references.measurement(txn, options.profile, options.digest) is not None:
            raise exists("measurement", shown["digest"], "`reference measurement remove` forgets it first.")
        references.add_measurement(txn, row)
        _record(txn, "measurement-added", shown)
    output.result(shown, f"profile {options.profile} knows {options.label}")
    if options.kind == "svsm-vtpm" and features != ["vtpm"]:
        output.note("evidence of this build will be refused: svsm-vtpm accepts exactly --svsm-feature vtpm")
    return 0


def _measurement_list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        rows = [_measurement(row) for row in references.measurements(txn)]
    output.rows(rows, "profile", "label", "kind", "svsm_features", "digest", none="no measurements")
    return 0


def _measurement_remove(options: argparse.Namespace, output: Output) -> int:
    digest = options.digest.hex()
    with writing(options) as txn:
        if not references.remove_measurement(txn, options.profile, options.digest):
            raise unknown("measurement", digest, "`reference measurement list` shows them.")
        _record(txn, "measurement-removed", {"profile": options.profile, "digest": digest})
    output.result({"removed": digest}, "removed the measurement")
    return 0


def _pcr_add(options: argparse.Namespace, output: Output) -> int:
    kind, owner = ("vm", options.vm) if options.vm else ("profile", options.profile)
    if options.pcrs:
        pcrs = learning.from_values(read_file(options.pcrs))
    else:
        pcrs = learning.from_event_log(read_file(options.event_log))
    source = "values" if options.pcrs else "event log"
    with writing(options) as txn:
        policy = learning.policy_of(txn, kind, owner)
        row = learning.boot_state(policy, kind, owner, options.label, pcrs, options.pcr, source, now_s())
        state_id = references.add_boot_state(txn, row)
        indices = sorted(map(int, row.pcrs))
        body = {"id": state_id, "owner_kind": kind, "owner": owner, "label": row.label, "pcrs": indices}
        _record(txn, "reference-added", body, owner if kind == "vm" else None)
    output.result(
        {"id": state_id, "pcrs": indices},
        f"boot state {state_id} of {kind} {owner}: PCRs {', '.join(map(str, indices))}",
    )
    return 0


def _list(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        rows = [_state(row) for row in _states(txn)]
    if not output.as_json:
        rows = [
            row | {"pcrs": sorted(map(int, row["pcrs"])), "created": when(row["created"])} for row in rows
        ]
    output.rows(rows, "id", "owner_kind", "owner", "label", "pcrs", "created", none="no boot states")
    return 0


def _show(options: argparse.Namespace, output: Output) -> int:
    with reading(options) as txn:
        found = next((row for row in _states(txn) if row.id == options.id), None)
    if found is None:
        raise unknown("boot state", str(options.id), _TODO)
    lines = [
        f'{found.owner_kind} {found.owner}: "{found.label}" of {when(found.created)} UTC, from {found.source}'
    ]
    for index in sorted(found.pcrs, key=int):
        lines.append(f"PCR {index:>2}  {found.pcrs[index]['digest']}")
        lines += [f"        {digest[:16]}  {text}" for digest, text in found.pcrs[index]["events"]]
    output.result(_state(found), *lines)
    return 0


def _remove(options: argparse.Namespace, output: Output) -> int:
    with writing(options) as txn:
        found = next((row for row in _states(txn) if row.id == options.id), None)
        if found is None:
            raise unknown("boot state", str(options.id), _TODO)
        references.remove_boot_state(txn, options.id)
        body = {"id": found.id, "owner_kind": found.owner_kind, "owner": found.owner, "label": found.label}
        _record(txn, "reference-removed", body, found.owner if found.owner_kind == "vm" else None)
    output.result({"removed": options.id}, f"removed boot state {options.id}")
    return 0


def _accept(options: argparse.Namespace, output: Output) -> int:
    label, at_s = options.label or f"session {options.session}", now_s()
    with reading(options) as txn:
        proposal = learning.proposal(txn, options.session, label, at_s)
        waiting = enrolling.waiting_of(txn, options.session)
    if not proposal.states and not waiting:
        output.result({"accepted": False, "states": []}, "all of this is known already; nothing was changed")
        return 0
    for row, changes in proposal.states:
        output.note(f"{row.owner_kind} {row.owner} gets PCRs {', '.join(sorted(row.pcrs, key=int))}")
        for line in changes:
            output.note(f"  {line}")
    for volume in waiting:
        output.note(f"volume {volume.uuid}, which this boot has enrolled, may be unlocked from then on")
    if not (options.yes or _agreed(output)):
        output.result({"accepted": False, "states": []}, "nothing was changed")
        return 1
    with writing(options) as txn:
        # What was shown is what is kept, whatever else changed while somebody was asked.
        if learning.proposal(txn, options.session, label, at_s) != proposal:
            raise UsageError(
                "The reference values were changed meanwhile.",
                code="accept.raced",
                expected="what was shown",
                found="something else; nothing was changed",
                todo="Run the command again.",
            )
        ids = _keep(txn, options.session, label, proposal, at_s) if proposal.states else []
        enrolling.accept(txn, enrolling.waiting_of(txn, options.session), at_s, options.session)
    output.result({"accepted": True, "states": ids}, f'accepted as "{label}"')
    return 0


def _agreed(output: Output) -> bool:
    if output.as_json or not sys.stdin.isatty():
        raise UsageError(
            "Nobody can be asked here.", code="accept.ask", expected="--yes, or a terminal", found="neither"
        )
    output.note("accept? [y/N]")
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _keep(txn: Txn, session: str, label: str, proposal: Proposal, at_s: int) -> list[int]:
    ids = [references.add_boot_state(txn, row) for row, _ in proposal.states]
    body = {
        "label": label,
        "states": [
            {
                "id": state_id,
                "owner_kind": row.owner_kind,
                "owner": row.owner,
                "pcrs": {index: pcr["digest"] for index, pcr in row.pcrs.items()},
            }
            for state_id, (row, _) in zip(ids, proposal.states, strict=True)
        ],
    }
    ledger.append(
        txn, at_s=at_s, event="reference-accepted", vm_id=proposal.vm_id, session=session, body=body
    )
    return ids


def _states(txn: Txn) -> list[BootStateRow]:
    owners = [("profile", row.name) for row in profiles.all(txn)]
    owners += [("vm", row.vm_id) for row in vms.all(txn)]
    rows = [row for owner in owners for row in references.boot_states(txn, *owner)]
    return sorted(rows, key=lambda row: row.id)


def _measurement(row: MeasurementRow) -> dict[str, Any]:
    return {
        "profile": row.profile,
        "digest": row.digest.hex(),
        "kind": row.kind,
        "label": row.label,
        "svsm_features": row.svsm_features,
    }


def _state(row: BootStateRow) -> dict[str, Any]:
    names = ("id", "owner_kind", "owner", "label", "source", "created", "pcrs")
    return {name: getattr(row, name) for name in names}


def _record(txn: Txn, event: str, body: dict[str, Any], vm_id: str | None = None) -> None:
    ledger.append(txn, at_s=now_s(), event=event, vm_id=vm_id, session=None, body=body)
