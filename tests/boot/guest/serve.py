"""Run in a test's guest: the simulated SNP firmware and SVSM behind FUSE, over the guest's own TPM. Never returns.

``/simulated`` holds the packages, the simulated AMD root with its private keys, and the machine's identity; the kernel's
TPM stands for the SVSM's vTPM, as in hardware the guest has no other door to that either.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

HERE = Path("/simulated")
sys.path[:0] = [str(HERE / "packages"), "/usr/lib/kagimori/python"]

from tpm2_pytss.constants import ESYS_TR  # noqa: E402 - the path comes first
from tpm2_pytss.ESAPI import ESAPI  # noqa: E402 - as above
from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMT_PUBLIC  # noqa: E402 - as above

from kagimori_protocol.tpm import EK_TEMPLATE_L1  # noqa: E402 - as above
from kagimori_simulator.amd import AmdRoot  # noqa: E402 - as above
from kagimori_simulator.configfs import ConfigfsTsm  # noqa: E402 - as above
from kagimori_simulator.machine import SnpMachine  # noqa: E402 - as above
from kagimori_simulator.svsm import Svsm  # noqa: E402 - as above


class KernelTpm:
    """The guest's TPM, as far as an SVSM looks at it."""

    def ek_public(self) -> bytes:
        """Make the EK and give its TPMT_PUBLIC."""
        template, _ = TPMT_PUBLIC.unmarshal(EK_TEMPLATE_L1)
        with ESAPI("device:/dev/tpmrm0") as esapi:
            handle, public, *_ = esapi.create_primary(
                TPM2B_SENSITIVE_CREATE(), TPM2B_PUBLIC(publicArea=template), ESYS_TR.RH_ENDORSEMENT
            )
            esapi.flush_context(handle)
            return bytes(public.publicArea.marshal())


def main() -> None:
    """Serve until the machine goes off."""
    machine = SnpMachine(
        AmdRoot.load(HERE / "root"),
        chip_id=bytes.fromhex((HERE / "chip-id").read_text()),
        measurement=bytes.fromhex((HERE / "measurement").read_text()),
        svsm=True,
        report_version=3,
    )
    svsm = Svsm(machine, KernelTpm())  # type: ignore[arg-type]  # an SVSM asks its vTPM for the EK and nothing else
    with ConfigfsTsm(machine, svsm).mounted(Path("/run/tsm")):
        threading.Event().wait()


if __name__ == "__main__":
    main()
