"""What the host writes into the firmware's variables, which no PCR shows, gives it nothing (THREATS T17)."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from tests.boot.estate import BOOT_S, Site
from tests.boot.machine import PLAIN, Machine
from tests.boot.scene import Scene, played
from tests.boot.variants import DRACUT, INITRAMFS_TOOLS

from kagimori_agent.cmdline import SECOND

pytestmark = [
    pytest.mark.boot,
    pytest.mark.slow,
    pytest.mark.parametrize(
        "variant",
        [INITRAMFS_TOOLS, DRACUT],
        ids=["initramfs-tools", "dracut"],
        indirect=True,
        scope="session",
    ),
]

OPTIONS = "systemd.default_timeout_start_sec=91s"
_VARIABLE = b"\x07\0\0\0" + f"{OPTIONS}\0".encode("utf-16-le")
"""Kept, and for boot services and the running system (UEFI 2.10, table 8.2); then a text as systemd reads it."""
_OCTAL = "".join(f"\\{byte:03o}" for byte in _VARIABLE)
WRITE = f"""
modprobe efivarfs
mount -t efivarfs efivarfs /sys/firmware/efi/efivars
printf '{_OCTAL}' >/variable
cat /variable >/sys/firmware/efi/efivars/{SECOND} && echo "scene: written"
umount /sys/firmware/efi/efivars
poweroff -f
"""


def test_a_second_command_line_in_a_variable_ends_the_boot(site: Site) -> None:
    """Systemd would obey it in the initramfs and in the booted system: run a program, skip a unit. Nobody is asked for a key."""
    with site.serving() as served:
        with played(site, served.url, Scene(meanwhile=WRITE)) as machine:
            machine.wait_off(BOOT_S)
        assert machine.said("scene: written")
        stored = site.directory / "variables"
        shutil.copy(machine.directory / "vars.fd", stored)
        shutil.rmtree(machine.directory)
        scene = Scene(firmware=dataclasses.replace(PLAIN, variables=stored))
        with played(site, served.url, scene) as machine:
            machine.wait_off(BOOT_S)
    _ended(machine)
    assert "released" not in site.events()


def _ended(machine: Machine) -> None:
    assert machine.said("There is a second command line, which nothing has measured")
    assert machine.said(f"found: /(sys/firmware/efi|run/systemd)/efivars/{SECOND}")
    assert machine.said("tpm0: PCR 15 (was )?capped")
    assert machine.said("reboot: Power down")
    assert not machine.said("guest: root reached|: mapped|evidence collected")
