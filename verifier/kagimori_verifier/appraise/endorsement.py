"""Rules about the certificates behind a report: root, who signs, validity today, revocation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from kagimori_verifier.appraise.policy import Policy
    from kagimori_verifier.claims import SnpClaims
    from kagimori_verifier.trail import Trail


def appraise_endorsement(trail: Trail, snp: SnpClaims, policy: Policy, now: datetime) -> None:
    """Note who vouches for this report, and whether that still counts."""
    trail.note(
        "signer.allowed",
        snp.signer in policy.signers,
        expected=" or ".join(policy.signers),
        found=f"{snp.signer}, chained to {snp.root}",
    )
    if snp.signer == "vlek":
        trail.note(
            "signer.provider",
            snp.csp_id in policy.csp_ids,
            expected=" or ".join(policy.csp_ids) or "a provider, but the policy names none",
            found=snp.csp_id or "none",
        )
    trail.note(
        "endorsement.valid",
        snp.valid_from <= now <= snp.valid_until,
        expected=f"certificates valid on {now:%Y-%m-%d}",
        found=f"valid from {snp.valid_from:%Y-%m-%d} to {snp.valid_until:%Y-%m-%d}",
    )
    revocation = snp.revocation
    if revocation.next_update is None:
        holds, found = policy.revocation == "if-present", revocation.missing or "none"
    else:
        holds, found = now <= revocation.next_update, f"next update due {revocation.next_update:%Y-%m-%d}"
    trail.note(
        "endorsement.revocation",
        holds,
        expected=f"a revocation list that is still current ({policy.revocation})",
        found=found,
    )
