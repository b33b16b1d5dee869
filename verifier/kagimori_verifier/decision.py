"""Allow or deny, as values. A decision is taken from the trail alone; nothing is released here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kagimori_protocol.messages import Check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kagimori_protocol.messages import Kind

_ALWAYS: Final = (
    "message.decode",
    "session.token",
    "session.hello",
    "session.challenge",
    "session.fresh",
    "vm.enabled",
    "vm.purpose",
    "vm.volumes",
    "report.layout",
    "report.signing-key",
    "report.signature-algo",
    "endorsement.found",
    "endorsement.root",
    "endorsement.chain",
    "endorsement.product",
    "report.tcb-layout",
    "endorsement.tcb",
    "endorsement.chip",
    "report.signature",
    "report.measurement",
    "report.vmpl",
    "report.tie",
    "signer.allowed",
    "endorsement.valid",
    "endorsement.revocation",
    "policy.allowed",
    "policy.required",
    "platform.allowed",
    "platform.required",
    "product.allowed",
    "tcb.reported",
    "tcb.committed",
    "tcb.current",
    "tcb.launch",
    "mitigation.launch",
    "mitigation.current",
    "chip.allowed",
    "volume.accepted",
    "volume.provenance",
)
_WITH_TPM: Final = (
    "measurement.svsm-features",
    "evidence.parts",
    "manifest.ek",
    "manifest.hello",
    "ak.layout",
    "ak.attributes",
    "ak.scheme",
    "quote.layout",
    "quote.qualifying-data",
    "quote.pcr-selection",
    "quote.signature-layout",
    "quote.signature",
    "quote.pcr-values",
    "eventlog.layout",
    "eventlog.replay",
    "cap.off",
    "cmdline.doors",
)

_WITHOUT_TPM: Final = ("measurement.one-vm", "evidence.parts")

MANDATORY: Final[dict[Kind, tuple[str, ...]]] = {
    "svsm-vtpm": _ALWAYS + _WITH_TPM,
    "snp-direct": _ALWAYS + _WITHOUT_TPM,
}
"""Checks that must be on the trail before anything is allowed: one that was forgotten is one that failed."""


@dataclass(frozen=True, slots=True)
class Allow:
    """Every check was made and holds."""

    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True)
class Deny:
    """At least one check does not hold, or was not made."""

    checks: tuple[Check, ...]


def decide(kind: Kind, checks: Sequence[Check]) -> Allow | Deny:
    """Decide from the trail: allow only if every mandatory check was made and every check made holds."""
    made = {check.id for check in checks}
    missing = tuple(
        Check(id=check, ok=False, expected="this check to be made", found="it was not")
        for check in MANDATORY[kind]
        if check not in made
    )
    everything = (*checks, *missing)
    if checks and all(check.ok for check in everything):
        return Allow(everything)
    return Deny(everything)
