"""Rules about what was booted: every governed PCR has its one value, and the cap is off (THREATS T4, T22)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kagimori_verifier.appraise.policy import VM_OWNED_PCRS
from kagimori_verifier.verify.eventlog_names import first_difference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kagimori_verifier.appraise.reference import BootState, PcrReference, References
    from kagimori_verifier.trail import Trail
    from kagimori_verifier.verify.eventlog import Event

ZERO: Final = bytes(32)


def appraise_boot(
    trail: Trail,
    purpose: str,
    pcrs: Mapping[int, bytes],
    events: Mapping[int, Sequence[Event]],
    references: References,
) -> bool:
    """Note each governed PCR against the closest boot state of the VM and of its profile, then the cap.

    PCR values must have been seen together: one state of the VM and one of its profile have to explain all of
    them. Where both know a PCR, the VM's word counts; for one that covers an initramfs or a command line, nothing else
    does, or a VM could boot as another of its profile. Only ``unlock`` needs the cap off; other purposes report its
    state. ``enrol`` asks for no state that is known: what it finds is told, and
    whether all of it is explained is returned.
    """
    policy = references.policy
    owned = VM_OWNED_PCRS[policy.boot_way]
    profile_state = _closest(references.profile_states, pcrs)
    vm_state = _closest(references.vm_states, pcrs)
    explained = True
    for index in policy.governed_pcrs:
        owner, reference = _reference(index, None if index in owned else profile_state, vm_state)
        value = pcrs.get(index)
        known = reference is not None and value == reference.digest
        explained = explained and known
        if purpose == "enrol" and not known:
            told = f"{_hex(value)}: not explained"
            trail.note(f"pcr.{index}", value is not None, expected="any value (enrol)", found=told)
        else:
            _note_pcr(trail, index, value, owner, reference, events.get(index, ()))
    cap = pcrs.get(policy.cap_pcr)
    trail.note(
        "cap.off",
        cap == ZERO or (cap is not None and purpose != "unlock"),
        expected=f"PCR {policy.cap_pcr} zero: nothing has used this boot's chance yet"
        if purpose == "unlock"
        else f"PCR {policy.cap_pcr} in any state ({purpose})",
        found="zero" if cap == ZERO else f"{_hex(cap)}: capped",
    )
    return explained


def _closest(states: Sequence[BootState], pcrs: Mapping[int, bytes]) -> BootState | None:
    """Give the state with the fewest values that differ, so that a refusal names as little as possible."""

    def differing(state: BootState) -> int:
        return sum(pcrs.get(index) != reference.digest for index, reference in state.pcrs.items())

    return min(states, key=differing, default=None)


def _reference(
    index: int, profile_state: BootState | None, vm_state: BootState | None
) -> tuple[str, PcrReference | None]:
    for owner, state in (("VM", vm_state), ("profile", profile_state)):
        if state is not None and index in state.pcrs:
            return f'{owner} state "{state.label}"', state.pcrs[index]
    return "", None


def _note_pcr(  # noqa: PLR0913 - one PCR, and the four things that are known of it
    trail: Trail,
    index: int,
    value: bytes | None,
    owner: str,
    reference: PcrReference | None,
    events: Sequence[Event],
) -> None:
    if reference is None:
        trail.note(f"pcr.{index}", False, expected="a reference value, but there is none", found=_hex(value))  # noqa: FBT003 - unknown is no
        return
    holds = value == reference.digest
    found = _hex(value)
    # A PCR that nothing was measured into is zero; a value without events otherwise came from a file that names none.
    if not holds and (reference.events or reference.digest == ZERO):
        found = " ".join(filter(None, (f"{found}:", first_difference(reference.events, events))))
    trail.note(f"pcr.{index}", holds, expected=f"{_hex(reference.digest)} ({owner})", found=found)


def _hex(value: bytes | None) -> str:
    return "not quoted" if value is None else value.hex()
