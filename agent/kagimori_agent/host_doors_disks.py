"""Doors that disks open: names in fstab and crypttab that a planted disk can carry, swap, images to resume, keys at rest.

A device is looked up where the names lead now, and must rest wholly on the owner's volumes. Sources: fstab(5),
crypttab(5), systemd.swap(5), systemd-hibernate-resume-generator(8). Import budget: ``booted``, ``root_check``, ``cmdline``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from kagimori_agent import cmdline, mounts, root_check
from kagimori_agent.booted import joined
from kagimori_agent.host_doors_software import Seen
from kagimori_protocol.errors import ImageError

if TYPE_CHECKING:
    from kagimori_agent.booted import System

OF_NO_DISK: Final = root_check.OF_NO_DISK | {"none", "overlay"}
EFI_VARIABLE: Final = "sys/firmware/efi/efivars/HibernateLocation-8cf2644b-4b0b-428f-9387-6d876050dc67"
RESUME_FILES: Final = ("etc/initramfs-tools/conf.d/*", "etc/initramfs-tools/initramfs.conf")
_PLANTED: Final = (
    "A host can attach a disk with the same name, and change whatever lies on one that is not encrypted."
)
_OWN: Final = "Put it on a volume of agent.toml and name it by /dev/mapper"
_SWAP_WHY: Final = (
    "What is swapped out lies open on the host's disk: keys and all that the system holds in memory."
)
_CRYPTTAB_FIELDS: Final = 2
_OPTIONS: Final = 3
_KIND: Final = 2


def fstab(system: System) -> Iterator[Seen]:
    """Look at what is mounted by itself: file systems and swaps of devices that are not the owner's, and the host's own."""
    for fields in system.lines("etc/fstab"):
        if len(fields) <= _KIND:
            continue
        spec, point, kind = fields[0], mounts.unescaped(fields[1]), fields[2]
        options = fields[_OPTIONS].split(",") if len(fields) > _OPTIONS else []
        by_hand = "noauto" in options and "x-systemd.automount" not in options
        if by_hand or "bind" in options or "rbind" in options or kind in OF_NO_DISK:
            continue
        file = spec.startswith("/") and not spec.startswith("/dev/")
        flaws = system.flaws(system.lies(spec) if file else system.device(spec))
        if not flaws:
            continue
        if kind == "swap":
            yield Seen(
                f"swap:{spec}", f"fstab swaps to {spec}: {flaws[0]}", _SWAP_WHY, f"{_OWN}, or use none."
            )
        else:
            todo = f"{_OWN}, or take the line out of fstab; what only the boot loader reads needs no mount (noauto)."
            yield Seen(f"fstab:{point}", f"{spec} at {point} ({kind}): {flaws[0]}", _PLANTED, todo)


def crypttab(system: System) -> Iterator[Seen]:
    """Look at what is opened by itself, beside the volumes of agent.toml."""
    for fields in system.lines("etc/crypttab"):
        options = fields[_OPTIONS].split(",") if len(fields) > _OPTIONS else []
        if len(fields) < _CRYPTTAB_FIELDS or "noauto" in options:
            continue
        name, source = fields[0], fields[1]
        flaws = system.flaws(system.device(source))
        if name not in system.owned.values() and flaws:
            yield Seen(
                f"crypttab:{name}",
                f"{source} as {name}: {flaws[0]}",
                f"{_PLANTED} A passphrase that is asked for on a console is the host's.",
                "Enrol it as a volume of agent.toml, or let its device lie on one.",
            )


def swaps(system: System) -> Iterator[Seen]:
    """Look at the swaps that are in use now."""
    try:
        there = list(root_check.swaps(system.root, mounts.read(system.root)))
    except ImageError as error:
        yield Seen("swap:unknown", str(error.found), _SWAP_WHY, str(error.todo))
        return
    for subject, numbers, wrong in there:
        flaws = [*wrong, *(flaw for number in numbers for flaw in system.flaws(number))]
        if flaws:
            yield Seen(
                f"swap:{subject.removeprefix('swap ').replace(' ', '_')}",
                f"in use: {joined(flaws)}",
                _SWAP_WHY,
                f"swapoff, and: {_OWN}.",
            )


def resumes(system: System) -> Iterator[Seen]:
    """Look for what would resume a hibernated system: on the command line, in an initramfs, or in the firmware."""
    found = [word for word in system.words if word.startswith("resume=")]
    found += [
        f"{line.strip()} in {path.name}"
        for path in system.files(*RESUME_FILES)
        for line in (system.text(path) or "").splitlines()
        if re.match(r"\s*RESUME=(?!none\s*$)\S", line)
    ]
    device = system.text("sys/power/resume")
    if device not in {None, "", "0:0"}:
        found.append(f"device {device} in /sys/power/resume")
    if found or "noresume" not in system.words:
        yield Seen(
            "resume",
            joined(found) or "no noresume on the kernel command line",
            "An image of a hibernated system takes the place of the attested one, and is whatever the disk says.",
            "Put noresume on the kernel command line, take resume= off it, and set RESUME=none for initramfs-tools.",
        )
    if (system.root / EFI_VARIABLE).exists():
        yield Seen(
            "hibernate-location",
            "the firmware's variable HibernateLocation",
            "It names a disk to resume from, and the host writes the firmware's variables.",
            f"Remove it (chattr -i and rm /{EFI_VARIABLE}); noresume on the kernel command line closes this, too.",
        )


def second_command_line(system: System) -> Iterator[Seen]:
    """Look for words that systemd takes from the firmware."""
    variable = cmdline.EFI / "efivars" / cmdline.SECOND
    if (system.root / variable).exists():
        yield Seen(
            "efi-options",
            "the firmware's variable SystemdOptions",
            "systemd takes its words for words of the command line, and the host writes the firmware's variables.",
            f"Remove it: chattr -i and rm /{variable}. With it, no boot gets its keys.",
        )


def ssh_keys(system: System) -> Iterator[Seen]:
    """Look where the keys lie by which this system proves itself to who logs in."""
    keys = [path.name for path in system.files("etc/ssh/ssh_host_*_key")]
    if not keys:
        return
    try:
        flaws = system.flaws(system.lies("/etc/ssh"))
    except ImageError as error:
        flaws = (str(error.found),)
    if flaws:
        yield Seen(
            "ssh-host-keys",
            f"{joined(keys)} in /etc/ssh: {flaws[0]}",
            "Whoever has read them can stand between this system and whoever logs in.",
            "Make them anew once the root is encrypted: rm /etc/ssh/ssh_host_*; ssh-keygen -A",
        )


Look = Callable[["System"], Iterator[Seen]]
LOOKS: Final[tuple[Look, ...]] = (fstab, crypttab, swaps, resumes, second_command_line, ssh_keys)
