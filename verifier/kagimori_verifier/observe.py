"""What authentic evidence showed of a boot, in the form in which an owner may make it a reference value.

Until its Confirm verifies, the AK behind it is unproven, and nothing may be learned from it (PROTOCOL.md section 5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kagimori_verifier.store.observations import Observation

if TYPE_CHECKING:
    from kagimori_verifier.pipeline import Judgement

MAX_EVENTS: Final = 256
"""Events kept for each PCR; what comes later still counts, through the PCR's value."""


def observed(judgement: Judgement, session: str, now_s: int) -> Observation:
    """Write down each governed PCR with the events behind it."""
    boot = judgement.claims.vtpm
    assert boot is not None  # noqa: S101 - only kinds with a TPM are observed; the caller has looked
    pcrs = {
        str(index): {
            "digest": boot.pcrs[index].hex(),
            "events": boot.logged.described(index, MAX_EVENTS),
        }
        for index in judgement.vm.references.policy.governed_pcrs
    }
    return Observation(
        session=session,
        vm_id=judgement.vm.vm_id,
        profile=judgement.vm.profile,
        created=now_s,
        confirmed=False,
        pcrs=pcrs,
    )
