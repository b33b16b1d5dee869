"""Reference values from what was seen: files, event logs, and confirmed sessions.

From a session only after its Confirm: until then its AK is unproven, and a software key could have quoted anything
(PROTOCOL.md section 5). Values that cover an initramfs or a command line belong to one VM, never to a shared profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kagimori_protocol.errors import OperatorError
from kagimori_verifier.appraise.policy import VM_OWNED_PCRS, Policy, parse_policy
from kagimori_verifier.store import observations, profiles, references, vms
from kagimori_verifier.store.references import BootStateRow
from kagimori_verifier.verify import eventlog
from kagimori_verifier.verify.eventlog_names import RECORDED_LENGTH, describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kagimori_verifier.store import Txn

Pcrs = dict[str, dict[str, Any]]

PARTITION_PCR: Final = 5
"""Covers the partition table, whose GUIDs differ from disk to disk: a learned value belongs to the VM."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Boot states to keep, each with lines about what would change against the closest known one."""

    vm_id: str
    states: tuple[tuple[BootStateRow, tuple[str, ...]], ...]


def from_values(raw: bytes) -> Pcrs:
    """Read PCR values of the SHA-256 bank: {"sha256": {"0": "<hex>", ...}}. Raises OperatorError."""
    try:
        values = msgspec.json.decode(raw, type=dict[str, dict[str, str]])["sha256"]
        pcrs = {int(index): bytes.fromhex(text) for index, text in values.items()}
    except (msgspec.MsgspecError, KeyError, ValueError) as error:
        raise _wrong('{"sha256": {"0": "<64 hex digits>", ...}}', str(error)) from error
    if list(map(str, pcrs)) != list(values):
        raise _wrong("each PCR once, by its number in decimal", ", ".join(map(ascii, values))[:200])
    if not pcrs or any(len(digest) != 32 or not 0 <= index <= 23 for index, digest in pcrs.items()):  # noqa: PLR2004 - SHA-256, and a TPM's PCRs
        raise _wrong("PCRs 0 to 23 with 32 bytes each", f"{len(pcrs)} values")
    return {str(index): {"digest": digest.hex(), "events": []} for index, digest in pcrs.items()}


def from_event_log(raw: bytes) -> Pcrs:
    """Replay a firmware event log: values and events of every PCR below 16. Raises NotAuthentic."""
    log = eventlog.parse(raw)
    values = eventlog.replay(log)
    return {
        str(index): {
            "digest": values.pcr(index).hex(),
            "events": [
                [event.digest().hex(), describe(event, limit=RECORDED_LENGTH)]
                for event in log.events
                if event.pcr == index and event.type != eventlog.EV_NO_ACTION
            ],
        }
        for index in range(16)
    }


def policy_of(txn: Txn, owner_kind: str, owner: str) -> Policy:
    """Give the policy behind a profile or a VM. Raises OperatorError if there is none."""
    name = owner
    if owner_kind == "vm":
        vm = vms.get(txn, owner)
        name = "" if vm is None else vm.profile
    profile = profiles.get(txn, name)
    if profile is None:
        raise OperatorError(
            f"There is no {owner_kind} {owner}.",
            code=f"{owner_kind}.unknown",
            expected=f"a {owner_kind} that exists",
            found=owner,
            todo=f"`kagimori-verifier {owner_kind} list` shows them.",
        )
    return parse_policy(profile.policy)


def boot_state(  # noqa: PLR0913 - the parts of a boot state
    policy: Policy,
    owner_kind: str,
    owner: str,
    label: str,
    pcrs: Pcrs,
    chosen: Sequence[int] | None,
    source: str,
    at_s: int,
) -> BootStateRow:
    """Make a boot state of the PCRs that its owner may have. Raises OperatorError for one that it may not."""
    owned = VM_OWNED_PCRS[policy.boot_way]
    governed = set(policy.governed_pcrs)
    may = governed if owner_kind == "vm" else governed - owned
    wanted = may & set(map(int, pcrs)) if chosen is None else set(chosen)
    if strangers := wanted - governed:
        raise _wrong(f"PCRs that the policy governs: {_numbers(governed)}", _numbers(strangers))
    if owner_kind == "profile" and wanted & owned:
        raise OperatorError(
            "These PCRs cover an initramfs or a command line, so their values belong to one VM.",
            code="reference.vm-owned",
            expected=f"PCRs among {_numbers(may)} in a profile",
            found=_numbers(wanted & owned),
            todo="Give them to the VM: --vm NAME instead of --profile.",
        )
    if missing := wanted - set(map(int, pcrs)):
        raise _wrong(f"values of PCRs {_numbers(wanted)}", f"none of {_numbers(missing)}")
    if not wanted:
        raise _wrong(f"values among PCRs {_numbers(may)}", "none")
    kept = {str(index): pcrs[str(index)] for index in sorted(wanted)}
    return BootStateRow(owner_kind, owner, label, kept, source, at_s)


def proposal(txn: Txn, session: str, label: str, at_s: int) -> Proposal:
    """Propose to make what a confirmed session showed the reference of its VM and profile; nothing that is known.

    Raises OperatorError for a session without a Confirm, and for a VM that has another profile since.
    """
    seen = observations.get(txn, session)
    if seen is None or not seen.confirmed:
        raise OperatorError(
            "Nothing may be learned from this session.",
            code="accept.unconfirmed",
            expected="a session whose Confirm has arrived, so that its TPM is proven",
            found="no such observation" if seen is None else "a session without a Confirm",
            todo="Let the VM run `kagimori-agent dry-run`, and accept the session that it names.",
        )
    policy = policy_of(txn, "vm", seen.vm_id)
    vm = vms.get(txn, seen.vm_id)
    if vm is None or vm.profile != seen.profile:
        raise OperatorError(
            "The VM has another profile since.",
            code="accept.profile",
            expected=f"{seen.vm_id} in profile {seen.profile}",
            found="none" if vm is None else vm.profile,
            todo="Let the VM run `kagimori-agent dry-run`, and accept the session that it names.",
        )
    owned = VM_OWNED_PCRS[policy.boot_way] | {PARTITION_PCR}
    shared = set(policy.governed_pcrs) - owned
    source = f"session {session}"
    states = [
        boot_state(
            policy,
            "vm",
            seen.vm_id,
            label,
            seen.pcrs,
            sorted(owned & set(policy.governed_pcrs)),
            source,
            at_s,
        )
    ]
    if shared:
        states.append(
            boot_state(policy, "profile", seen.profile, label, seen.pcrs, sorted(shared), source, at_s)
        )
    new = [row for row in states if not _is_known(txn, row)]
    return Proposal(seen.vm_id, tuple((row, _changes(txn, row)) for row in new))


def _is_known(txn: Txn, row: BootStateRow) -> bool:
    """Tell whether the owner has a state with exactly these values: another would only be in the way."""
    known = references.boot_states(txn, row.owner_kind, row.owner)
    return any(_values(one) == _values(row) for one in known)


def _changes(txn: Txn, row: BootStateRow) -> tuple[str, ...]:
    """Say what differs from the closest state that is known, PCR by PCR."""
    known = references.boot_states(txn, row.owner_kind, row.owner)
    if not known:
        return ("nothing was known before",)
    new = _values(row)

    def differing(other: BootStateRow) -> list[str]:
        old = _values(other)
        return [index for index in sorted(new, key=int) if old.get(index) != new[index]]

    closest = min(known, key=lambda other: len(differing(other)))
    lines = []
    for index in differing(closest):
        old = {digest for digest, _ in closest.pcrs.get(index, {}).get("events", [])}
        fresh = [text for digest, text in row.pcrs[index]["events"] if digest not in old]
        lines.append(f'PCR {index} differs from "{closest.label}": {"; ".join(fresh) or "events left out"}')
    return tuple(lines) or (f'the same as "{closest.label}"',)


def _values(row: BootStateRow) -> dict[str, str]:
    return {index: pcr["digest"] for index, pcr in row.pcrs.items()}


def _numbers(indices: set[int] | frozenset[int]) -> str:
    return ", ".join(map(str, sorted(indices))) or "none"


def _wrong(expected: str, found: str) -> OperatorError:
    return OperatorError(
        "These PCR values cannot be used.", code="reference.pcrs", expected=expected, found=found
    )
