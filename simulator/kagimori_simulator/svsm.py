"""An SVSM's attestation protocol, as COCONUT serves it with its default features: the vTPM is the only service.

Source: AMD 58019, sections 7 and 8.3. The SVSM holds the guest's strongest key (VMPCK0), so it alone gets reports of VMPL 0;
it vouches for the vTPM by putting the EK into the manifest that the report commits to.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import HardwareError

if TYPE_CHECKING:
    from kagimori_simulator.machine import SnpMachine
    from kagimori_simulator.vtpm import Vtpm

VTPM_SERVICE: Final = uuid.UUID("c476f1eb-0123-45a5-9641-b4e7dde5bfe3")
SERVICES_MANIFEST: Final = uuid.UUID("63849ebb-3d92-4670-a1ff-58f9c94b87bb")
_SERVICES_HEADER_SIZE: Final = 24
_SERVICES_ENTRY_SIZE: Final = 24
NONCE_SIZE: Final = 64
ONLY_MANIFEST_VERSION: Final = 0


@dataclass
class Svsm:
    """The SVSM of one guest; it reads the vTPM's EK once, when it starts, and then knows it by heart.

    ``vmpl``: the level that it asks reports for. ``manifest`` may be set to anything, for lies.
    """

    machine: SnpMachine
    vtpm: Vtpm
    vmpl: int = 0
    manifest: bytes = field(init=False)

    def __post_init__(self) -> None:
        """Make the EK and keep its TPMT_PUBLIC as the manifest."""
        self.manifest = self.vtpm.ek_public()

    def attest_single_service(
        self, nonce: bytes, service_guid: uuid.UUID, manifest_version: int = ONLY_MANIFEST_VERSION
    ) -> tuple[bytes, bytes, bytes]:
        """SVSM_ATTEST_SINGLE_SERVICE: give report, manifest and certificate table (empty where the host has none).

        REPORT_DATA is SHA-512(nonce || manifest). Raises HardwareError where the SVSM answers INVALID_PARAMETER: a nonce of
        another size than 64 bytes, an unknown service, a manifest version other than 0.
        """
        known = service_guid == VTPM_SERVICE and manifest_version == ONLY_MANIFEST_VERSION
        if len(nonce) != NONCE_SIZE or not known:
            raise HardwareError(
                "The SVSM refused an attestation request.",
                code="simulator.svsm-invalid-parameter",
                expected=f"{NONCE_SIZE} bytes of nonce, service {VTPM_SERVICE}, manifest version {ONLY_MANIFEST_VERSION}",
                found=f"{len(nonce)} bytes, service {service_guid}, manifest version {manifest_version}",
            )
        return self._attest(nonce, self.manifest)

    def attest_services(self, nonce: bytes) -> tuple[bytes, bytes, bytes]:
        """SVSM_ATTEST_SERVICES: as for one service, over the list of all services with their manifests.

        REPORT_DATA is made in the same way, so who verifies must know which of the two was asked. Raises HardwareError.
        """
        if len(nonce) != NONCE_SIZE:
            raise HardwareError(
                "The SVSM refused an attestation request.",
                code="simulator.svsm-invalid-parameter",
                expected=f"{NONCE_SIZE} bytes of nonce",
                found=f"{len(nonce)} bytes",
            )
        blob_at = _SERVICES_HEADER_SIZE + _SERVICES_ENTRY_SIZE
        header = SERVICES_MANIFEST.bytes_le + struct.pack("<II", blob_at + len(self.manifest), 1)
        entry = VTPM_SERVICE.bytes_le + struct.pack("<II", blob_at, len(self.manifest))
        return self._attest(nonce, header + entry + self.manifest)

    def _attest(self, nonce: bytes, manifest: bytes) -> tuple[bytes, bytes, bytes]:
        report = self.machine.report(hashlib.sha512(nonce + manifest).digest(), self.vmpl)
        return report, manifest, self.machine.certificate_table()
