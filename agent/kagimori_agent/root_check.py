"""The root check: what is about to become the system rests wholly on what the agent opened in this boot (THREATS T2).

That is the root, whatever is mounted below it, every swap and the resume device. What a distribution mounts, it finds by names that a host can copy: a file system's UUID or label, a volume group, a
partition's type. So what counts is not how it was found but what it lies on, asked of the kernel when all is mounted.

Source: proc_pid_mountinfo(5), proc_swaps(5), Linux Documentation/ABI/testing/sysfs-power (resume), fs/btrfs/sysfs.c,
fs/ext4/sysfs.c and fs/jbd2/journal.c (journal_task, and what the task is called), fs/xfs/xfs_super.c (logdev, rtdev).
Import budget: the standard library, ``opened``, ``mounts``, ``resting``, the error tree.
"""

from __future__ import annotations

import fcntl
import os
import re
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
WITH_A_JOURNAL: Final = frozenset({"ext2", "ext3", "ext4"})
"""The driver of ext4 mounts all three, and does not show in the options where the journal is."""
ON_ONE_DEVICE: Final = frozenset({"xfs", "vfat", "squashfs"})
"""What lies on the device of its number alone, unless an option tells of another. Of other kinds (f2fs of several devices, JFS
with its log elsewhere, EROFS with blobs, whatever a program answers for) no list of the kernel's shows the rest."""
ON_OTHER_DEVICES: Final = ("logdev=", "rtdev=")
"""Options by which an XFS lies on a second device."""
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
    yield from swaps(root, there, about)
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
    if mount.kind in WITH_A_JOURNAL:
        return subject, [mount.number], _journal(mount.number, root)
    if mount.kind not in ON_ONE_DEVICE:
        return subject, [], [f"a file system ({mount.kind}) of which the kernel does not tell all devices"]
    return subject, [mount.number], []


def _journal(number: str, root: Path) -> list[str]:
    """Tell what is wrong with the journal of an ext4: it has one of its own, or none.

    The superblock may name another device for it, by number or UUID, and no option and no holder shows that. But the kernel
    calls the journal's task by where the journal is: jbd2/DEVICE-INODE for one within, jbd2/DEVICE for one elsewhere.
    """
    name = (root / "sys/dev/block" / number).resolve().name
    task = _read(root / "sys/fs/ext4" / name / "journal_task")
    if task == "<none>":
        return []
    called = _read(root / "proc" / task / "comm") if task and task.isdecimal() else None
    if called and re.fullmatch(rf"jbd2/{re.escape(name)}-[0-9]+", called):
        return []
    return [f"a journal that is not known to lie within ({called or 'nothing is told'})"]


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


def swaps(
    root: Path, there: list[Mount], about: Callable[[Path], BtrfsInfo] = btrfs_info
) -> Iterator[_Subject]:
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
        path = mounts.unescaped(fields[0])
        numbers, flaws = _swap(path, fields[1], root, there, about)
        yield f"swap {path}", numbers, flaws


def _swap(
    path: str, kind: str, root: Path, there: list[Mount], about: Callable[[Path], BtrfsInfo]
) -> tuple[list[str], list[str]]:
    """Give the devices that a swap lies on, and what is wrong with it already."""
    # The mount that it lies in: the longest that it begins with, and of these the last.
    inside = [mount for mount in there if path.startswith(mount.point.rstrip("/") + "/")]
    mount = max(reversed(inside), key=lambda one: len(one.point), default=None)
    if kind == "file":
        # It lies wherever its file system does.
        return _mounted(mount, root, about)[1:] if mount else ([], ["a file in nothing that is mounted"])
    device = path
    if mount is not None and mount.kind == "devtmpfs":
        # Where /dev is by now: an initramfs moves it below the root.
        device = "/dev/" + path.removeprefix(mount.point.rstrip("/") + "/")
    number = resting.number_of(device, root)
    if number is None:
        return [], ["a device that the kernel does not list"]
    name = device.removeprefix("/dev/")
    # Compressed in memory, and nowhere else. A partition tells nothing of what the whole device writes to.
    in_memory = re.fullmatch(r"zram[0-9]+", name) and (root / "sys/class/block" / name / "mm_stat").exists()
    if in_memory and _read(root / "sys/class/block" / name / "backing_dev") in {None, "none"}:
        return [], []
    return [number], []


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
