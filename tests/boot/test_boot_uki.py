"""Debian 13 boots as one unified kernel image, and another one is refused by the name of what differs in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.boot import uki, ways
from tests.boot.estate import Estate
from tests.boot.images import SECRET
from tests.boot.machine import PLAIN
from tests.boot.ways import FROM_DISK_S, DiskSite

from kagimori_agent.cap import CAPPED

pytestmark = [
    pytest.mark.boot,
    pytest.mark.slow,
    pytest.mark.parametrize("variant", [uki.TRIXIE], ids=["trixie"], indirect=True, scope="session"),
]


@pytest.fixture(scope="session")
def image_disk(estate: Estate, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the disk that the owner installed."""
    to = tmp_path_factory.mktemp("uki") / "disk"
    return uki.disk(to, estate.images, estate.initramfs, estate.images.variant.cmdline)


@pytest.fixture(scope="session")
def uki_first(
    estate: Estate, image_disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DiskSite, list[str]]:
    """Give the site whose owner has accepted one boot from that disk, and what its console said."""
    return ways.first_boot(estate, tmp_path_factory.mktemp("uki-first"), "uki", image_disk, PLAIN)


@pytest.fixture
def owned(uki_first: tuple[DiskSite, list[str]], tmp_path: Path) -> DiskSite:
    """Give a site of its own to each test."""
    return ways.copied(uki_first[0], tmp_path)


def test_what_was_accepted_names_each_section_of_the_image(uki_first: tuple[DiskSite, list[str]]) -> None:
    """The owner reads what the image is made of, and that it runs the kernel of Debian 13."""
    site, lines = uki_first
    sections = "\n".join(site.pcr_events(11))
    for name in (".linux", ".osrel", ".cmdline", ".initrd", ".uname"):
        assert f"PCR 11 UKI section {name} " in sections
    assert any("Linux version 6.12." in line for line in lines)


def test_an_accepted_image_gets_its_key_and_reaches_its_root(owned: DiskSite, image_disk: Path) -> None:
    """The whole job on Debian 13, through nothing but firmware and systemd's stub."""
    with owned.serving() as served, owned.booted_from(image_disk, served.url, PLAIN) as vm:
        vm.wait_for("guest: done", FROM_DISK_S)
        vm.wait_off(FROM_DISK_S)
    assert vm.said(f"guest: root reached: {SECRET}")
    assert vm.said(f"guest: cap tpm0 {CAPPED.hex().upper()}")
    assert not vm.said("Please unlock disk")
    assert owned.events()[:2] == ["confirmed-opened", "released"]


def test_an_image_with_another_command_line_is_refused(
    owned: DiskSite, estate: Estate, tmp_path: Path
) -> None:
    """Without Secure Boot anybody can put another image there; section, image and load options each say which."""
    images = estate.images
    disk = uki.disk(tmp_path / "disk", images, estate.initramfs, f"{images.variant.cmdline} init=/bin/sh")
    found = owned.refused(disk, PLAIN)
    assert set(found) == {"pcr.4", "pcr.9", "pcr.11", "cmdline.doors"}
    assert "BOOTX64.EFI" in found["pcr.4"]
    assert "Linux load options" in found["pcr.9"]
    assert "UKI section .cmdline" in found["pcr.11"]


def test_a_credential_beside_the_image_is_refused(owned: DiskSite, estate: Estate, tmp_path: Path) -> None:
    """The stub hands on whatever lies beside the image, and no signature covers it: a root password, say."""
    credential = tmp_path / "passwd.plaintext-password.root.cred"
    credential.write_text("mallory", encoding="ascii")
    images = estate.images
    disk = uki.disk(tmp_path / "disk", images, estate.initramfs, images.variant.cmdline, credential)
    found = owned.refused(disk, PLAIN)
    assert set(found) == {"pcr.9", "pcr.12"}
    assert "Linux initrd" in found["pcr.9"]
    assert "beside the UKI: Credentials initrd" in found["pcr.12"]
