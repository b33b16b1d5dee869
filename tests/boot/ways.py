"""Machines that boot from a disk, as they are sold: through Secure Boot, shim and GRUB, or as one unified kernel image."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.boot import esp, images, machine
from tests.boot.archive import Archive, archive, run
from tests.boot.cache import Cache
from tests.boot.estate import BOOT_S, PROFILE, Estate, Site, session_in
from tests.boot.images import Images

FROM_DISK_S: Final = 2 * BOOT_S
"""Seconds that a boot from a disk may take: emulated firmware, shim and GRUB read and hash every byte more than once."""

_SYSTEM: Final = uuid.UUID("6b616769-6d6f-7269-8000-0000000000e0")
_BOOT: Final = uuid.UUID("6b616769-6d6f-7269-8000-0000000000b0")

_FIRST: Final = f"""\
search.fs_uuid {_BOOT} root
set prefix=($root)'/grub'
configfile $prefix/grub.cfg
"""
"""What Debian's grub-install leaves in the EFI system partition."""
_GRUB_CFG: Final = """\
set default=0
set timeout=0
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple' {
	insmod gzio
	insmod part_gpt
	insmod ext2
	search --no-floppy --fs-uuid --set=root BOOT
	linux /vmlinuz CMDLINE
	initrd /initrd.img
}
"""
_SIGNED: Final = ("shim-signed", "grub-efi-amd64-signed")


@dataclass
class DiskSite(Site):
    """A site whose VM boots from a disk."""

    def with_boot_way(self, boot_way: str) -> None:
        """Let the owner's profile govern the PCRs of this boot way."""
        policy = self.verifier("profile", "show", PROFILE).json() | {"boot_way": boot_way}
        file = self.directory / "policy.json"
        file.write_text(json.dumps(policy), encoding="utf-8")
        self.verifier("profile", "edit", PROFILE, "--file", str(file))

    @contextmanager
    def booted_from(
        self, disk: Path, verifier: str | None, firmware: machine.Firmware
    ) -> Iterator[machine.Machine]:
        """Switch the VM on; its firmware finds what it boots on ``disk``."""
        with machine.switch_on(
            self.directory / "vm",
            boots=machine.from_disk(disk),
            disks=[
                machine.Disk(self.estate.volume, "root"),
                machine.Disk(self.estate.images.hardware, "snp"),
                *([machine.Disk(self.world, "world")] if self.world else []),
            ],
            verifier=verifier,
            firmware=firmware,
        ) as running:
            yield running

    def refused(self, disk: Path, firmware: machine.Firmware) -> Mapping[str, str]:
        """Boot what the owner does not know, and see it refused; gives what was found, by the checks that failed."""
        with self.serving() as served, self.booted_from(disk, served.url, firmware) as vm:
            vm.wait_off(FROM_DISK_S)
        assert not vm.said(r"root reached|cryptroot: mapped|initramfs\)")
        assert self.events()[:2] == ["confirmed-received", "refused"]
        checks = self.explained(session_in(vm.said("")))
        return {check["id"]: check["found"] for check in checks if not check["ok"]}

    def pcr_events(self, pcr: int) -> list[str]:
        """Give what the owner has accepted of a PCR, event by event."""
        states: list[dict[str, Any]] = self.verifier("reference", "list", "--json").json()
        return [text for state in states for _, text in state["pcrs"].get(str(pcr), {}).get("events", [])]


def first_boot(
    estate: Estate,
    directory: Path,
    boot_way: str,
    disk: Path,
    firmware: machine.Firmware,
    world: Path | None = None,
) -> tuple[DiskSite, list[str]]:
    """Boot once from a disk that nobody has accepted, and accept it; gives the owner's site, and what the console said."""
    shutil.copytree(estate.verifier, directory / "verifier")
    site = DiskSite(estate, directory, world)
    site.with_boot_way(boot_way)
    with site.serving() as served, site.booted_from(disk, served.url, firmware) as vm:
        vm.wait_off(FROM_DISK_S)
    lines = vm.said("")
    assert not vm.said("root reached")
    site.verifier("reference", "accept", session_in(lines), "--yes", "--label", "first boot")
    return site, lines


def copied(known: DiskSite, directory: Path) -> DiskSite:
    """Give a site of its own to one test."""
    shutil.copytree(known.directory / "verifier", directory / "verifier")
    return DiskSite(known.estate, directory, known.world)


def signed_programs(cache: Cache) -> Path:
    """Fetch the distribution's own shim and GRUB, which are signed; gives the directory that they are unpacked in."""

    def fetch(to: Path) -> None:
        for package in _SIGNED:
            source.unpack(package, to)

    source = archive("bookworm", cache.root)
    return cache.get("signed-programs", [*_SIGNED, *source.state()], fetch)


def grub_disk(to: Path, programs: Path, kernel: Path, initramfs: Path, cmdline: str, more: str = "") -> Path:
    """Make the disk of a Debian with shim and GRUB, and ``more`` lines before GRUB's menu entry.

    The programs lie where firmware looks on a disk that it has no boot entry for, as in Debian's cloud images.
    """
    to.mkdir(parents=True)
    (to / "first.cfg").write_text(_FIRST, encoding="utf-8")
    config = more + _GRUB_CFG.replace("BOOT", str(_BOOT)).replace("CMDLINE", cmdline)
    (to / "grub.cfg").write_text(config, encoding="utf-8")
    esp.fat(
        to / "esp.img",
        {
            "/EFI/BOOT/BOOTX64.EFI": programs / "usr/lib/shim/shimx64.efi.signed",
            "/EFI/BOOT/grubx64.efi": programs / "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
            "/EFI/debian/grub.cfg": to / "first.cfg",
        },
    )
    files = {"/vmlinuz": kernel, "/initrd.img": initramfs, "/grub/grub.cfg": to / "grub.cfg"}
    esp.ext4(to / "boot.img", files, _BOOT)
    esp.disk(
        to / "disk.img",
        [
            esp.Partition(esp.SYSTEM_PARTITION, _SYSTEM, to / "esp.img"),
            esp.Partition(esp.LINUX, _BOOT, to / "boot.img"),
        ],
    )
    return to / "disk.img"


def with_older_kernel(cache: Cache, estate: Estate) -> tuple[Path, Path]:
    """Give the kernel that Debian signed before this one, and the initramfs that the same VM has with it."""
    built = estate.images
    current = built.kernel.name.removeprefix("vmlinuz-")
    source = archive(built.variant.suite, cache.root)
    older = _older(current, source)

    def build(to: Path) -> None:
        run("cp", "-a", "--reflink=auto", str(built.chroot), str(to / "root"), cwd=to)
        (to / "root/boot" / built.kernel.name).unlink()
        package = to / "package"
        package.mkdir()
        source.unpack(f"linux-image-{older}", package)
        shutil.copytree(package / "boot", to / "root/boot", dirs_exist_ok=True)
        shutil.copytree(package / "lib/modules", to / "root/usr/lib/modules", dirs_exist_ok=True)
        shutil.rmtree(package)
        run("chroot", str(to / "root"), "/sbin/depmod", older, cwd=to)

    layer = cache.get(f"{built.variant.name}.older", [built.chroot.parent.name, older], build)
    other: Images = dataclasses.replace(
        built, chroot=layer / "root", kernel=layer / "root/boot" / f"vmlinuz-{older}"
    )
    agent_toml = (estate.volume.parent / "agent.toml").read_text(encoding="utf-8")
    return other.kernel, images.build_initramfs(cache, other, agent_toml)


def _older(release: str, source: Archive) -> str:
    """Name the release before this one in the archive: 6.1.0-55-cloud-amd64 for 6.1.0-56-cloud-amd64."""
    match = re.fullmatch(r"(.*-)(\d+)(-cloud-amd64)", release)
    assert match is not None, release
    names = source.names(f"linux-image-{match[1]}")
    wanted = re.compile(re.escape(f"linux-image-{match[1]}") + r"(\d+)" + re.escape(match[3]))
    numbers = [int(found[1]) for name in names if (found := wanted.fullmatch(name))]
    older = max((number for number in numbers if number < int(match[2])), default=None)
    assert older is not None, f"the archive has no kernel before {release}"
    return f"{match[1]}{older}{match[3]}"
