"""What authentic evidence says: facts, frozen. Only ``verify`` makes them; ``appraise`` judges them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from kagimori_protocol.messages import Hello, Kind
    from kagimori_protocol.snp import Report, TcbVersion
    from kagimori_protocol.tpm import Attest
    from kagimori_verifier.verify.eventlog import LoggedBoot


@dataclass(frozen=True, slots=True)
class Root:
    """A root key that a chain may end in: SHA-256 of its SubjectPublicKeyInfo, its product line, whose it is.

    ``label`` is None for AMD's own, which are pinned in the code; others exist only because an operator added
    them.
    """

    spki_sha256: bytes
    product: str
    label: str | None = None

    def __str__(self) -> str:
        """Name the root for a person, so that a foreign one cannot be overlooked."""
        if self.label is None:
            return f"AMD's ARK-{self.product}"
        return f'"{self.label}" (no root of AMD: added by the operator as ARK-{self.product})'


@dataclass(frozen=True, slots=True)
class Revocation:
    """What a revocation list said: by when its successor is due, or why there is none to go by."""

    next_update: datetime | None
    missing: str | None


@dataclass(frozen=True, slots=True)
class SnpClaims:
    """An attestation report whose signature chains to a trusted root."""

    report: Report
    product: str
    root: Root
    signer: str
    """``vcek`` or ``vlek``."""
    csp_id: str | None
    reported_tcb: TcbVersion
    committed_tcb: TcbVersion
    current_tcb: TcbVersion
    launch_tcb: TcbVersion
    valid_from: datetime
    valid_until: datetime
    """The span in which every certificate of the chain is valid."""
    revocation: Revocation

    @property
    def boot(self) -> tuple[str, bytes, bytes]:
        """Identify this boot of this VM: who signed, CHIP_ID, REPORT_ID."""
        return self.signer, self.report.chip_id, self.report.report_id


@dataclass(frozen=True, slots=True)
class Measurement:
    """A reference value for MEASUREMENT: it fixes the kind, and with it which checks apply."""

    digest: bytes
    kind: Kind
    label: str
    svsm_features: tuple[str, ...]
    """Build features of the SVSM; empty for kinds without one."""
    vms: frozenset[str]
    """Ids of VMs that may show this measurement; looked up only for kinds where it must be one VM's own."""


@dataclass(frozen=True, slots=True)
class VtpmClaims:
    """A quote by an AK that, once a Confirm verifies, is proven to live in the TPM of the manifest's EK."""

    ek_public: bytes
    ak_name: bytes
    attest: Attest
    pcrs: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class BootClaims(VtpmClaims):
    """A quote together with the logged events that lead to its PCR values."""

    logged: LoggedBoot
    """For each governed PCR the events that extended it, in order; only their digests are authentic."""


@dataclass(frozen=True, slots=True)
class Claims:
    """All that one piece of authentic evidence says."""

    hello: Hello
    snp: SnpClaims
    measurement: Measurement
    vtpm: BootClaims | None
