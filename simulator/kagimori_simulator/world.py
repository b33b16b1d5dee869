"""One host and one VM in a directory: chip, SVSM, vTPM and report door, all running, ready for an unmodified agent.

Tests and the demo build on it; every part is reachable, so that ``faults`` can make it lie.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_simulator import measured_boot, sev_guest_fuse
from kagimori_simulator.configfs import ConfigfsTsm
from kagimori_simulator.svsm import Svsm
from kagimori_simulator.vtpm import Vtpm

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from kagimori_simulator.event_log import MeasuredBoot
    from kagimori_simulator.machine import SnpMachine

CONFIGFS_TSM: Final = "configfs-tsm"
SEV_GUEST: Final = "sev-guest"
DOORS: Final = (CONFIGFS_TSM, SEV_GUEST)
"""The report doors that a guest's kernel can have."""

LIMITS: Final = """\
[limits]
boot_budget_s = 20
attempt_s = 10
connect_s = 2
gather_s = 0.5
backoff_min_s = 0.2
backoff_max_s = 1
"""
"""A laptop answers at once, so nobody should wait long for what does not come."""


@dataclass(frozen=True)
class VerifierAt:
    """A verifier as agent.toml names it: ``keys`` are base64 Ed25519 public keys."""

    name: str
    urls: Sequence[str]
    keys: Sequence[str]


@dataclass(frozen=True)
class VolumeAt:
    """A volume as agent.toml names it."""

    uuid: str
    name: str
    device: Path


@dataclass
class World:
    """A running VM on its host. ``svsm`` and ``vtpm`` are None for a VM without an SVSM (kind ``snp-direct``).

    ``tsm`` is the door configfs-tsm, ``tsm.driver`` what is behind it and behind /dev/sev-guest.
    """

    directory: Path
    machine: SnpMachine
    vtpm: Vtpm | None
    svsm: Svsm | None
    tsm: ConfigfsTsm

    @classmethod
    @contextlib.contextmanager
    def running(
        cls,
        directory: Path,
        machine: SnpMachine,
        boot: MeasuredBoot | None = None,
        doors: Collection[str] = (CONFIGFS_TSM,),
    ) -> Iterator[World]:
        """Boot the VM: below an SVSM if the machine has one, measuring ``boot`` (by default a GRUB boot).

        ``doors`` are those that its kernel has; the agent.toml names places for both.
        """
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            vtpm = svsm = None
            if machine.svsm:
                boot = boot or measured_boot.grub()
                vtpm = stack.enter_context(
                    Vtpm.start(directory / "securityfs", startup_locality=boot.startup_locality)
                )
                vtpm.play(boot)
                svsm = Svsm(machine, vtpm)
            tsm = ConfigfsTsm(machine, svsm)
            if CONFIGFS_TSM in doors:
                stack.enter_context(tsm.mounted(directory / CONFIGFS_TSM))
            if SEV_GUEST in doors:
                stack.enter_context(sev_guest_fuse.mounted(tsm.driver, directory / SEV_GUEST))
            yield cls(directory, machine, vtpm, svsm, tsm)

    def agent_toml(self, vm_id: str, verifiers: Sequence[VerifierAt], volumes: Sequence[VolumeAt]) -> Path:
        """Write the agent.toml that this VM's initramfs would carry; returns its path."""
        lines = [f'vm_id = "{vm_id}"', f'kind = "{"svsm-vtpm" if self.vtpm else "snp-direct"}"', ""]
        for verifier in verifiers:
            lines += [
                "[[verifiers]]",
                f'name = "{verifier.name}"',
                f"urls = {_strings(verifier.urls)}",
                f"keys = {_strings(verifier.keys)}",
                "",
            ]
        for volume in volumes:
            lines += [
                "[[volumes]]",
                f'uuid = "{volume.uuid}"',
                f'name = "{volume.name}"',
                f'device = "{volume.device}"',
                "",
            ]
        if self.vtpm is not None:
            lines += ["[tpm]", f'tcti = "{self.vtpm.tcti}"', f'event_log = "{self.vtpm.event_log_path}"', ""]
        lines += ["[tsm]", f'root = "{self.directory / CONFIGFS_TSM}"', ""]
        lines += ["[sev_guest]", f'device = "{self.directory / SEV_GUEST}"', "", LIMITS]
        path = self.directory / "agent.toml"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path


def _strings(values: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"
