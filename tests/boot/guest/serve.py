"""Run in a test's guest: the simulated SNP firmware and SVSM behind a report door, over the guest's own TPM. Never returns.

``/simulated`` holds the packages, the simulated AMD root with its private keys, and the machine's identity; the kernel's
TPM stands for the SVSM's vTPM, as in hardware the guest has no other door to that either. ``/run/world`` may say otherwise
how this hardware behaves: see ``tests/boot/doors.py``.
"""

from __future__ import annotations

import os
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

HERE = Path("/simulated")
sys.path[:0] = [str(HERE / "packages"), "/usr/lib/kagimori/python"]

from tpm2_pytss.constants import ESYS_TR  # noqa: E402 - the path comes first
from tpm2_pytss.ESAPI import ESAPI  # noqa: E402 - as above
from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMT_PUBLIC  # noqa: E402 - as above

from kagimori_protocol.tpm import EK_TEMPLATE_L1  # noqa: E402 - as above
from kagimori_simulator import faults, sev_guest_cuse, tsm_provider  # noqa: E402 - as above
from kagimori_simulator.amd import AmdRoot  # noqa: E402 - as above
from kagimori_simulator.configfs import ConfigfsTsm  # noqa: E402 - as above
from kagimori_simulator.machine import SnpMachine  # noqa: E402 - as above
from kagimori_simulator.svsm import Svsm  # noqa: E402 - as above

WORLD = Path("/run/world")
READY = Path("/run/ready")


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
    world: dict[str, Any] = {}
    door = "fuse"
    if WORLD.exists():
        world = tomllib.loads((WORLD / "world.toml").read_text())
        door = (WORLD / "door").read_text().split()[0]
    machine = SnpMachine(
        AmdRoot.load(HERE / "root"),
        chip_id=bytes.fromhex((HERE / "chip-id").read_text()),
        measurement=bytes.fromhex(world.get("measurement", (HERE / "measurement").read_text())),
        svsm=world.get("svsm", True),
        report_version=3,
    )
    svsm = None
    if machine.svsm:
        svsm = Svsm(machine, KernelTpm())  # type: ignore[arg-type]  # an SVSM asks its vTPM for the EK and nothing else
    tsm = ConfigfsTsm(machine, svsm)
    for name in world.get("faults", ()):
        getattr(faults, name)(tsm.driver)
    if "errno" in world:
        tsm.failures["outblob"] = world["errno"]
    if door == "cuse":
        with sev_guest_cuse.served(tsm.driver):
            for_ever()
    elif door == "module":
        provide(tsm, world.get("daemon", ""))
    else:
        with tsm.mounted(Path("/run/tsm")):
            for_ever()


def provide(tsm: ConfigfsTsm, how: str) -> None:
    """Answer the kernel's module: as it should be, or once it has asked, never or not at all."""
    if how == "absent":
        for_ever()
    if not how:
        tsm_provider.serve(tsm, ready=READY.touch)
    descriptor = os.open(tsm_provider.DEVICE, os.O_RDWR)
    READY.touch()
    os.read(descriptor, tsm_provider.REQUEST.size)
    if how == "dies":
        os._exit(1)
    for_ever()


def for_ever() -> None:
    """Tell the script that waits, and wait."""
    READY.touch()
    threading.Event().wait()


if __name__ == "__main__":
    main()
