"""Debian boots through its own shim and GRUB with Secure Boot on, and what its host changes there is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.boot import ways
from tests.boot.cache import Cache
from tests.boot.estate import Estate
from tests.boot.images import SECRET
from tests.boot.machine import SECURE_BOOT, SECURE_BOOT_OFF
from tests.boot.variants import ROOT
from tests.boot.ways import FROM_DISK_S, DiskSite

pytestmark = [pytest.mark.boot, pytest.mark.slow]

SHIM_AND_GRUB = 2
"""Images that firmware and shim start before the kernel."""


@pytest.fixture(scope="session")
def cache() -> Cache:
    """Give the cache of images."""
    return Cache(ROOT / ".dev" / "boot")


@pytest.fixture(scope="session")
def programs(cache: Cache) -> Path:
    """Give the distribution's signed shim and GRUB."""
    return ways.signed_programs(cache)


@pytest.fixture(scope="session")
def honest_disk(estate: Estate, programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the disk that the owner installed."""
    images = estate.images
    to = tmp_path_factory.mktemp("grub") / "disk"
    return ways.grub_disk(to, programs, images.kernel, estate.initramfs, images.variant.cmdline)


@pytest.fixture(scope="session")
def grub_first(
    estate: Estate, honest_disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DiskSite, list[str]]:
    """Give the site whose owner has accepted one boot from that disk, and what its console said."""
    return ways.first_boot(estate, tmp_path_factory.mktemp("grub-first"), "grub", honest_disk, SECURE_BOOT)


@pytest.fixture
def grub(grub_first: tuple[DiskSite, list[str]], tmp_path: Path) -> DiskSite:
    """Give a site of its own to each test."""
    return ways.copied(grub_first[0], tmp_path)


def test_what_was_accepted_is_a_boot_with_secure_boot_on(grub_first: tuple[DiskSite, list[str]]) -> None:
    """Firmware, shim and kernel say so, and whose certificates vouched is among what the owner accepted."""
    site, lines = grub_first
    assert any("secureboot: Secure boot enabled" in line for line in lines)
    known = site.pcr_events(7)
    assert "PCR 7 SecureBoot = 01" in known
    assert [text for text in known if text.startswith("PCR 7 authority db = ")]
    assert [text for text in known if text.startswith("PCR 7 authority MokListRT = ")]
    applications = [text for text in site.pcr_events(4) if text.startswith("PCR 4 boot application")]
    assert len(applications) > SHIM_AND_GRUB
    assert [text for text in site.pcr_events(14) if "MokList" in text]


def test_an_accepted_boot_through_shim_and_grub_reaches_its_root(grub: DiskSite, honest_disk: Path) -> None:
    """What the distribution itself signed, on a disk as it installs it, is unlocked with nobody there."""
    with grub.serving() as served, grub.booted_from(honest_disk, served.url, SECURE_BOOT) as vm:
        vm.wait_for("guest: done", FROM_DISK_S)
        vm.wait_off(FROM_DISK_S)
    assert vm.said(f"guest: root reached: {SECRET}")
    assert not vm.said("Please unlock disk")
    assert grub.events()[:2] == ["confirmed-opened", "released"]


def test_another_line_in_grubs_configuration_is_refused(
    grub: DiskSite, estate: Estate, programs: Path, tmp_path: Path
) -> None:
    """Whoever may write /boot cannot so much as set a variable of GRUB: the file is measured, and each command."""
    images = estate.images
    disk = ways.grub_disk(
        *(tmp_path / "disk", programs, images.kernel, estate.initramfs, images.variant.cmdline),
        more="set menu_color_normal=red/black\n",
    )
    found = grub.refused(disk, SECURE_BOOT)
    assert set(found) == {"pcr.8", "pcr.9"}
    assert "grub_cmd: set menu_color_normal=red/black" in found["pcr.8"]
    assert "/grub/grub.cfg" in found["pcr.9"]


def test_another_command_line_in_grubs_configuration_is_refused(
    grub: DiskSite, estate: Estate, programs: Path, tmp_path: Path
) -> None:
    """A shell in place of init would have the key; the owner reads which words were added."""
    images = estate.images
    disk = ways.grub_disk(
        *(tmp_path / "disk", programs, images.kernel, estate.initramfs),
        f"{images.variant.cmdline} init=/bin/sh",
    )
    found = grub.refused(disk, SECURE_BOOT)
    assert set(found) == {"pcr.8", "pcr.9", "cmdline.doors"}
    assert "init=/bin/sh" in found["cmdline.doors"]
    assert "init=/bin/sh" in found["pcr.8"]


def test_another_initramfs_is_refused(grub: DiskSite, estate: Estate, programs: Path, tmp_path: Path) -> None:
    """No signature covers an initramfs, and Linux unpacks whatever is appended to it: its measurement alone tells."""
    images = estate.images
    changed = tmp_path / "initrd.img"
    changed.write_bytes(estate.initramfs.read_bytes() + bytes(512))
    disk = ways.grub_disk(tmp_path / "disk", programs, images.kernel, changed, images.variant.cmdline)
    found = grub.refused(disk, SECURE_BOOT)
    assert set(found) == {"pcr.9"}
    assert "initrd" in found["pcr.9"]


def test_an_older_kernel_that_the_distribution_signed_is_refused(
    grub: DiskSite, estate: Estate, programs: Path, cache: Cache, tmp_path: Path
) -> None:
    """Secure Boot lets every kernel in that was ever signed and not revoked, also one with known holes."""
    kernel, initramfs = ways.with_older_kernel(cache, estate)
    disk = ways.grub_disk(tmp_path / "disk", programs, kernel, initramfs, estate.images.variant.cmdline)
    found = grub.refused(disk, SECURE_BOOT)
    assert set(found) == {"pcr.4", "pcr.9"}
    assert "boot application" in found["pcr.4"]
    assert "vmlinuz" in found["pcr.9"]


def test_secure_boot_switched_off_by_the_host_gets_no_key(grub: DiskSite, honest_disk: Path) -> None:
    """The host owns the variables. This GRUB then goes round Linux's EFI stub, and without an event log nothing is shown."""
    with grub.serving() as served, grub.booted_from(honest_disk, served.url, SECURE_BOOT_OFF) as vm:
        vm.wait_off(FROM_DISK_S)
    assert vm.said("secureboot: Secure boot disabled")
    assert vm.said("There is no event log of this TPM")
    assert vm.said("GRUB 2.06 does so only with Secure Boot on")
    assert not vm.said("root reached|cryptroot: mapped")
    assert "released" not in grub.events()
