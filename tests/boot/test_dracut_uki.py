"""Debian 13 with dracut boots as one unified kernel image, whose systemd extends PCR 11 only after the evidence."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.boot import kernel_module, uki, ways
from tests.boot.cache import Cache
from tests.boot.doors import World
from tests.boot.estate import Estate
from tests.boot.images import SECRET
from tests.boot.machine import PLAIN
from tests.boot.variants import DRACUT_TRIXIE, ROOT
from tests.boot.ways import FROM_DISK_S

from kagimori_agent.cap import CAPPED

pytestmark = [
    pytest.mark.boot,
    pytest.mark.slow,
    pytest.mark.parametrize("variant", [DRACUT_TRIXIE], ids=["trixie"], indirect=True, scope="session"),
]


def test_an_accepted_image_gets_its_key_and_reaches_its_root(estate: Estate, tmp_path: Path) -> None:
    """Both boots quote a PCR 11 that the log explains, and the barrier that systemd makes of it comes all the same.

    The report comes through Linux's own configfs-tsm, from a provider that is a kernel module of ours.
    """
    image = uki.disk(tmp_path / "disk", estate.images, estate.initramfs, estate.images.variant.cmdline)
    provider = kernel_module.build(Cache(ROOT / ".dev" / "boot"), estate.images)
    world = World("module", module=provider, arguments="vmpl=2").disk(tmp_path)
    site, _ = ways.first_boot(estate, tmp_path / "first", "uki", image, PLAIN, world)
    owned = ways.copied(site, tmp_path)
    with owned.serving() as served, owned.booted_from(image, served.url, PLAIN) as vm:
        vm.wait_for("guest: done", FROM_DISK_S)
        vm.wait_off(FROM_DISK_S)
    assert vm.said(r"the report door is there \(module\)")
    assert vm.said(f"guest: root reached: {SECRET}")
    assert vm.said(f"guest: cap tpm0 {CAPPED.hex().upper()}")
    assert vm.said("TPM.*PCR Barrier.*initrd")
    assert not vm.said("(?i)passphrase")
    assert owned.events()[:2] == ["confirmed-opened", "released"]
