"""A guest without an SVSM, on a kernel without configfs-tsm: its one report door is /dev/sev-guest, here by CUSE."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.boot import estate as estates
from tests.boot.cache import Cache
from tests.boot.doors import World, site_with
from tests.boot.estate import BOOT_S, Estate
from tests.boot.images import SECRET
from tests.boot.variants import INITRAMFS_TOOLS, ROOT

from kagimori_agent.cap import CAPPED

pytestmark = [pytest.mark.boot, pytest.mark.slow]

DIRECT = "d1" * 48
"""The measurement of a guest without an SVSM, whose firmware measures kernel, initramfs and command line into it."""
PLAIN_GUEST = {"svsm": False, "measurement": DIRECT}


@pytest.fixture(scope="module")
def direct(_can_boot: None) -> Estate:
    """Give Debian 12 as a guest without an SVSM; its kernel has neither sev-guest nor configfs-tsm."""
    return estates.build(Cache(ROOT / ".dev" / "boot"), INITRAMFS_TOOLS, "snp-direct", DIRECT)


def test_a_guest_without_an_svsm_gets_its_key_through_dev_sev_guest(direct: Estate, tmp_path: Path) -> None:
    """A real ioctl with nested pointers, on a kernel without configfs-tsm: report, certificates, key, root."""
    site = site_with(direct, tmp_path, World("cuse", PLAIN_GUEST))
    with site.serving() as served, site.booted(served.url) as machine:
        machine.wait_for("guest: done", BOOT_S)
        machine.wait_off(BOOT_S)
    assert machine.said(r"the report door is there \(cuse\)")
    assert machine.said(f"guest: root reached: {SECRET}")
    assert machine.said(f"guest: cap tpm0 {CAPPED.hex().upper()}")
    assert site.events()[:2] == ["confirmed-opened", "released"]


def test_a_wiped_message_key_is_final_and_told(direct: Estate, tmp_path: Path) -> None:
    """ENOTTY of a real ioctl: asked once, said on the console with what to do, powered off; the verifier sees nothing."""
    world = World("cuse", PLAIN_GUEST | {"faults": ["wiped_key"]})
    site = site_with(direct, tmp_path, world)
    with site.serving() as served, site.booted(served.url) as machine:
        machine.wait_off(BOOT_S)
    assert len(machine.said("Linux has wiped its key to the firmware")) == 1
    assert machine.said("ENOTTY .* on /dev/sev-guest")
    assert machine.said("Power the VM off and start it again")
    assert not machine.said("guest: root reached|: mapped")
    assert site.events()[:1] not in (["released"], ["refused"])
