"""Rules about what a report says of guest, chip and firmware (THREATS T12 to T14)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kagimori_protocol.snp import TcbVersion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kagimori_verifier.appraise.policy import Policy
    from kagimori_verifier.appraise.reference import References
    from kagimori_verifier.claims import SnpClaims
    from kagimori_verifier.trail import Trail

_WITH_MITIGATIONS = 5


def appraise_snp(trail: Trail, snp: SnpClaims, references: References) -> None:
    """Note guest policy, platform, product and TCB floors, mitigations, chip."""
    policy = references.policy
    _flags(
        trail, "policy", snp.report.policy_flags, policy.guest_policy_allowed, policy.guest_policy_required
    )
    _flags(trail, "platform", snp.report.platform_flags, policy.platform_allowed, policy.platform_required)
    _tcb(trail, snp, policy)
    _mitigations(trail, snp, policy)
    _chip(trail, snp, references)


def _flags(
    trail: Trail, subject: str, found: Sequence[str], allowed: Sequence[str], required: Sequence[str]
) -> None:
    """Every flag that is set must be allowed, every required one must be set; unknown bits are never allowed unasked."""
    unwelcome = [flag for flag in found if flag not in {*allowed, *required}]
    missing = [flag for flag in required if flag not in found]
    trail.note(
        f"{subject}.allowed",
        not unwelcome,
        expected="none but " + ", ".join(sorted({*allowed, *required})),
        found=", ".join(unwelcome) + " too" if unwelcome else ", ".join(found) or "none",
    )
    trail.note(
        f"{subject}.required",
        not missing,
        expected=", ".join(required) or "none in particular",
        found="without " + ", ".join(missing) if missing else ", ".join(found) or "none",
    )


def _tcb(trail: Trail, snp: SnpClaims, policy: Policy) -> None:
    """The product must have a floor, and each TCB of the report must reach it, part by part.

    REPORTED_TCB is what the signing key vouches for; the others tell whether the host could go back
    (COMMITTED), what runs (CURRENT) and what the guest was launched under (LAUNCH).
    """
    floor = policy.tcb_floors.get(snp.product)
    trail.note(
        "product.allowed",
        floor is not None,
        expected=" or ".join(sorted(policy.tcb_floors)),
        found=snp.product,
    )
    if floor is None:
        return
    least = floor.as_tcb()
    named = {
        "tcb.reported": snp.reported_tcb,
        "tcb.committed": snp.committed_tcb,
        "tcb.current": snp.current_tcb,
        "tcb.launch": snp.launch_tcb,
    }
    for check, tcb in named.items():
        trail.note(check, _reaches(tcb, least), expected=f"at least {least}", found=str(tcb))


def _reaches(tcb: TcbVersion, floor: TcbVersion) -> bool:
    """Compare part by part: a newer microcode does not make up for an older boot loader."""
    return all((part or 0) >= (least or 0) for part, least in zip(tcb, floor, strict=True))


def _mitigations(trail: Trail, snp: SnpClaims, policy: Policy) -> None:
    """Reports before version 5 have no mitigation vectors, so they satisfy no demand for any."""
    report = snp.report
    named = {
        "mitigation.launch": (report.launch_mit_vector, policy.launch_mitigations),
        "mitigation.current": (report.current_mit_vector, policy.current_mitigations),
    }
    for check, (vector, required) in named.items():
        absent = report.version < _WITH_MITIGATIONS
        trail.note(
            check,
            vector & required == required,
            expected=f"bits 0x{required:x}",
            found="no such field before report version 5" if absent else f"bits 0x{vector:x}",
        )


def _chip(trail: Trail, snp: SnpClaims, references: References) -> None:
    """Only a VCEK vouches for a CHIP_ID; a VLEK-signed report may carry any, so a list of chips cannot hold there."""
    chip = snp.report.chip_id
    listed = snp.signer == "vcek" and chip in references.chips
    trail.note(
        "chip.allowed",
        references.policy.any_chip or listed,
        expected="any chip"
        if references.policy.any_chip
        else f"one of {len(references.chips)} chips of this VM, proven by a VCEK",
        found=chip.hex(),
    )
