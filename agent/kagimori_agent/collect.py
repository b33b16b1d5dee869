"""Collect what a VM can show, by kind of evidence (PROTOCOL.md sections 2 and 4).

An attester makes its keys first (before there is a network), then answers a set of challenges with one report and one
quote. Both kinds have the same three questions asked of them; what a kind has not, it leaves out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from kagimori_agent.devices.report import within
from kagimori_protocol import messages, transcript
from kagimori_protocol.errors import HardwareError, PeerError

if TYPE_CHECKING:
    from kagimori_agent.devices.configfs_tsm import ConfigfsTsm
    from kagimori_agent.devices.doors import HostCertificates
    from kagimori_agent.devices.report import PlainDoor
    from kagimori_agent.devices.vtpm import Vtpm
    from kagimori_protocol.messages import Credential, Kind

VTPM_SERVICE: Final = "c476f1eb-0123-45a5-9641-b4e7dde5bfe3"
"""GUID of the SVSM's vTPM service (AMD 58019, section 8.3)."""
TPM_ENTROPY_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class Prepared:
    """What an attester can say before any challenge: its TPM's public areas, if it has one, and randomness."""

    ek_public: bytes | None = None
    ak_public: bytes | None = None
    entropy: tuple[bytes, ...] = field(default=(), repr=False)


class Attester(Protocol):
    """One kind of evidence."""

    kind: Kind

    def prepare(self) -> Prepared:
        """Make fresh keys, in place of earlier ones. Raises ImageError or HardwareError."""

    def collect(self, t0: bytes, pcr_selection: bytes, wait_s: float) -> dict[str, Any]:
        """Answer the challenges behind ``t0``: the fields of an Evidence that this kind has, by their names.

        Raises ImageError or HardwareError; the latter also when the report door has not answered within ``wait_s``
        seconds. One report is requested: hosts throttle, and a failed request can cost the VM its report key.
        """

    def open_credential(self, credential: Credential | None) -> bytes | None:
        """Give S out of an answer's credential, or None where the kind has none. Raises PeerError, HardwareError."""


class SvsmVtpm:
    """Kind ``svsm-vtpm``: the SVSM vouches for the vTPM's EK, the vTPM for what was booted."""

    kind: Kind = "svsm-vtpm"

    def __init__(
        self, tsm: ConfigfsTsm, vtpm: Vtpm, cap_pcr: int, certificates: HostCertificates | None = None
    ) -> None:
        """Use an open TPM and the report door; ``cap_pcr`` is the PCR that this agent will close the door by.

        ``certificates`` is where to look for the host's where the SVSM passes none on.
        """
        self._tsm = tsm
        self._certificates = certificates
        self._cap_pcr = cap_pcr
        self._vtpm = vtpm
        self._ek_public = b""

    def prepare(self) -> Prepared:
        """Make the EK, a fresh AK, and take randomness from the TPM."""
        self._ek_public, ak_public = self._vtpm.make_keys()
        return Prepared(self._ek_public, ak_public, (self._vtpm.random(TPM_ENTROPY_BYTES),))

    def collect(self, t0: bytes, pcr_selection: bytes, wait_s: float) -> dict[str, Any]:
        """Take the SVSM's report with its manifest, then a quote that commits to both, then the event log."""
        self._require_cap_looked_at(pcr_selection)
        until = time.monotonic() + wait_s
        told = within(wait_s, lambda: self._tsm.service_report(transcript.svsm_nonce(t0), VTPM_SERVICE))
        if told.manifest != self._ek_public:
            raise HardwareError(
                "The SVSM vouches for another TPM than the one that this agent uses.",
                code="collect.other-tpm",
                expected="a manifest with the EK of the TPM chosen by [tpm] in agent.toml",
                found=f"{len(told.manifest)} bytes that differ from that EK",
                todo="See that [tpm] names the SVSM's driver, and that the SVSM's manifest is of version 0.",
            )
        quote = self._vtpm.quote(
            transcript.quote_qualifying_data(t0, told.report, told.manifest), pcr_selection
        )
        certificates = told.certificates
        if not any(certificates) and self._certificates is not None:
            certificates = self._certificates.get(until - time.monotonic())
        return {
            "report": told.report,
            "manifest": told.manifest,
            "certificates": certificates,
            "quote": messages.Quote(attest=quote.attest, signature=quote.signature),
            "pcrs": [messages.PcrValue(index=index, digest=digest) for index, digest in quote.pcrs],
            "event_log": self._vtpm.event_log(),
        }

    def _require_cap_looked_at(self, pcr_selection: bytes) -> None:
        """Refuse a verifier that would not see our cap: it would give the key again to whoever comes after the boot.

        Every PCR that it looks at is either its own cap or has one value only, so extending any of them closes the door.
        """
        from kagimori_protocol.tpm import selected_pcrs  # noqa: PLC0415 - loads the TPM library; only this kind needs it

        looked_at = selected_pcrs(pcr_selection)
        if self._cap_pcr not in looked_at:
            raise PeerError(
                "The verifier does not look at the PCR that closes the door after this boot.",
                code="challenge.cap-pcr",
                expected=f"PCR {self._cap_pcr}, cap_pcr of [tpm] in agent.toml, among those to be quoted",
                found=", ".join(map(str, looked_at)) or "none",
                todo="Give agent.toml the cap_pcr of the VM's profile: `kagimori-verifier vm config` prints it.",
            )

    def open_credential(self, credential: Credential | None) -> bytes | None:
        """Let the TPM activate the credential: only it can, and only for this AK."""
        if credential is None:
            raise PeerError(
                "An answer has no credential, though this VM showed a TPM.",
                code="answer.credential",
                expected="id_object and encrypted_secret",
                found="none",
            )
        return self._vtpm.activate(credential.id_object, credential.encrypted_secret)


class SnpDirect:
    """Kind ``snp-direct``: the measurement covers firmware, kernel, initramfs and command line; there is no TPM."""

    kind: Kind = "snp-direct"

    def __init__(self, door: PlainDoor) -> None:
        """Use a report door."""
        self._door = door

    def prepare(self) -> Prepared:
        """There is nothing to prepare."""
        return Prepared()

    def collect(self, t0: bytes, pcr_selection: bytes, wait_s: float) -> dict[str, Any]:  # noqa: ARG002 - this kind quotes no PCRs
        """Take one report over the tie."""
        told = within(wait_s, lambda: self._door.plain_report(transcript.direct_report_data(t0)))
        return {"report": told.report, "certificates": told.certificates}

    def open_credential(self, credential: Credential | None) -> bytes | None:
        """Refuse a credential: without a TPM nobody could open it."""
        if credential is not None:
            raise PeerError(
                "An answer has a credential, though this VM showed no TPM.",
                code="answer.credential",
                expected="none",
                found="one",
            )
        return None
