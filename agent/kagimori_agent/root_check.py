"""The root check: what is about to become the system rests wholly on what the agent opened in this boot (THREATS T2).

That is the root, whatever is mounted below it, every swap and the resume device. What a distribution mounts, it finds by names that a host can copy: a file system's UUID or label, a volume group, a
partition's type. So what counts is not how it was found but what it lies on, asked of the kernel when all is mounted.

Source: proc_pid_mountinfo(5), proc_swaps(5), Linux Documentation/ABI/testing/sysfs-power (resume), fs/btrfs/sysfs.c.
Import budget: the standard library, ``opened``, ``mounts``, ``resting``, the error tree.
"""

from __future__ import annotations

import fcntl
import os
import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from kagimori_agent import mounts, opened, resting
from kagimori_protocol.errors import DiskError, ImageError

if TYPE_CHECKING:
    from kagimori_agent.config import Config
    from kagimori_agent.mounts import Mount

ROOT: Final = Path("/")
OF_NO_DISK: Final = frozenset(
    {
        *(
            "proc",
            "sysfs",
            "devtmpfs",
            "devpts",
            "tmpfs",
            "ramfs",
            "mqueue",
            "hugetlbfs",
            "securityfs",
            "configfs",
        ),
        *("debugfs", "tracefs", "cgroup", "cgroup2", "bpf", "pstore", "efivarfs", "fusectl", "binfmt_misc"),
    }
)
"""File systems of the kernel's own, which may be mounted below a root: nothing in them comes from a disk."""
ON_OTHER_DEVICES: Final = ("logdev=", "rtdev=", "journal_dev=", "journal_path=", "external_log_dev=")
"""Options by which a file system lies on a second device, which no list of the kernel's shows."""
MOST_TOLD: Final = 4

_FS_INFO: Final = struct.Struct("<QQ16s992x")  # struct btrfs_ioctl_fs_info_args: max_id, num_devices, fsid
_FS_INFO_REQUEST: Final = 0x8400941F  # _IOR(BTRFS_IOCTL_MAGIC, 31, 1024 bytes)
_SWAP_FIELDS: Final = 2


class Checked(NamedTuple):
    """What was found to rest on what."""

    subjects: tuple[str, ...]
    mappings: tuple[str, ...]


class BtrfsInfo(NamedTuple):
    """A mounted btrfs: its UUID, and how many devices it has."""

    fsid: str
    devices: int


def btrfs_info(point: Path) -> BtrfsInfo:
    """Ask the kernel about the btrfs that is mounted there. Raises OSError."""
    descriptor = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    try:
        answer = fcntl.ioctl(descriptor, _FS_INFO_REQUEST, bytes(_FS_INFO.size))
    finally:
        os.close(descriptor)
    _, devices, fsid = _FS_INFO.unpack(answer)
    return BtrfsInfo(str(uuid.UUID(bytes=fsid)), devices)


def check(
    config: Config, sysroot: Path, root: Path = ROOT, about: Callable[[Path], BtrfsInfo] = btrfs_info
) -> Checked:
    """Return what rests on which of the agent's mappings, or raise DiskError with every way that leads elsewhere.

    ``sysroot`` is where the root is mounted, ``root`` where sys, proc and run are. Raises DiskError "root.elsewhere",
    "root.not-mounted", "opened.record"; ImageError where the kernel's lists are missing.
    """
    ours = opened.recorded(config.volumes, root)
    if not ours:
        raise DiskError(
            "The agent has opened nothing in this boot.",
            code="root.nothing-opened",
            expected="a record of the mappings that it made",
            found="none",
            todo="See whether `unlock` ran in this boot before.",
        )
    subjects: list[str] = []
    found: list[str] = []
    for subject, numbers, flaws in _subjects(sysroot, root, about):
        subjects.append(subject)
        found += [f"{subject}: {flaw}" for flaw in flaws]
        for number in numbers:
            found += [f"{subject}: {flaw}" for flaw in resting.flaws(number, ours, root)]
    names = tuple(one.name for one in ours.values())
    if found:
        more = f"; and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
        raise DiskError(
            "What would become the system does not rest on volumes that the agent opened.",
            code="root.elsewhere",
            expected=f"{', '.join(subjects)} wholly on {', '.join(names)}",
            found="; ".join(found[:MOST_TOLD]) + more,
            todo="Look at the VM's disks: one of them carries a name that root=, fstab or crypttab looks for. "
            "Name the root by /dev/mapper, and put /usr and swap on a volume of agent.toml.",
        )
    return Checked(tuple(subjects), names)


_Subject = tuple[str, list[str], list[str]]
"""What is looked at, the devices that it lies on, and what is wrong with it before any of them is looked at."""


def _subjects(sysroot: Path, root: Path, about: Callable[[Path], BtrfsInfo]) -> Iterator[_Subject]:
    at = str(sysroot)
    below = at.rstrip("/") + "/"
    there = mounts.read(root)
    if not any(mount.point == at for mount in there):
        raise DiskError(
            "There is no root yet.",
            code="root.not-mounted",
            expected=f"a file system mounted at {at}",
            found="none",
            todo="Give --root as the initramfs mounts it: /root of initramfs-tools, /sysroot of dracut.",
        )
    for mount in there:
        if mount.point == at or (mount.point.startswith(below) and mount.kind not in OF_NO_DISK):
            yield _mounted(mount, root, about)
    yield from swaps(root, there)
    number = _read(root / "sys/power/resume")
    if number not in {None, "", "0:0"}:
        yield f"resume device {number}", [str(number)], []


def _mounted(mount: Mount, root: Path, about: Callable[[Path], BtrfsInfo]) -> _Subject:
    subject = f"{mount.point} ({mount.kind} of {mount.source})"
    apart = [option for option in mount.options if option.startswith(ON_OTHER_DEVICES)]
    if apart:
        return subject, [], [f"a second device ({apart[0]})"]
    if mount.kind == "btrfs":
        return _btrfs(subject, mount, root, about)
    if mount.number.startswith("0:"):
        return subject, [], ["no block device below it"]
    return subject, [mount.number], []


def _btrfs(subject: str, mount: Mount, root: Path, about: Callable[[Path], BtrfsInfo]) -> _Subject:
    """A btrfs has a number of no device; sysfs lists the devices that it is made of."""
    try:
        info = about(Path(mount.point))
        entries = sorted((root / "sys/fs/btrfs" / info.fsid / "devices").iterdir())
    except OSError as error:
        return subject, [], [f"a btrfs that does not tell its devices ({error.strerror})"]
    numbers = [number for entry in entries if (number := _read(entry / "dev"))]
    # One that is missing would come back from whichever disk says that it is the one.
    wrong = f"a btrfs of {info.devices} devices, of which the kernel lists {len(numbers)}"
    return subject, numbers, [] if numbers and len(numbers) == len(entries) == info.devices else [wrong]


def swaps(root: Path, there: list[Mount]) -> Iterator[_Subject]:
    """List the active swaps, as the check looks at them. Raises ImageError."""
    text = _read(root / "proc/swaps")
    if text is None:
        if (root / "proc/self").exists():
            return  # a kernel without swap has no such list
        raise ImageError(
            "What is swapped to cannot be told.",
            code="root.mounts",
            expected=f"the list of swaps {root / 'proc/swaps'}",
            found="none",
            todo="mount -t proc proc /proc",
        )
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) < _SWAP_FIELDS:
            yield f"swap {line!a}", [], ["a line that is none of proc_swaps(5)"]
            continue
        yield _swap(mounts.unescaped(fields[0]), fields[1], root, there)


def _swap(path: str, kind: str, root: Path, there: list[Mount]) -> _Subject:
    subject = f"swap {path}"
    # The mount that it lies in: the longest that it begins with, and of these the last.
    inside = [mount for mount in there if path.startswith(mount.point.rstrip("/") + "/")]
    mount = max(reversed(inside), key=lambda one: len(one.point), default=None)
    device = path
    if mount is not None and mount.kind == "devtmpfs":
        # Where /dev is by now: an initramfs moves it below the root.
        device = "/dev/" + path.removeprefix(mount.point.rstrip("/") + "/")
    of_file = None if mount is None else mount.number
    number = of_file if kind == "file" else resting.number_of(device, root)
    if number is None:
        return subject, [], ["a device that the kernel does not list"]
    name = device.removeprefix("/dev/")
    if name.startswith("zram") and _read(root / "sys/class/block" / name / "backing_dev") in {None, "none"}:
        return subject, [], []  # compressed in memory, and nowhere else
    return subject, [number], []


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
