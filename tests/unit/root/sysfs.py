"""A made-up kernel: block devices that lie upon each other, mounts, swaps, and a record of what the agent opened."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

UUID: Final = "5c9e7a10-3d0f-4b7a-9a51-0c6b7d1e2f30"
AGENT_TOML: Final = f"""\
vm_id = "web1"
[[verifiers]]
name = "home"
urls = ["http://127.0.0.1:1"]
keys = ["11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="]
[[volumes]]
uuid = "{UUID}"
name = "cryptroot"
"""


class Kernel:
    """A directory that stands for / of an initramfs; what is added appears as the kernel would show it."""

    def __init__(self, root: Path) -> None:
        """Make one without devices."""
        self.root = root
        self._numbers: dict[str, str] = {}
        self._mounts = ["1 0 0:2 / / rw - rootfs none rw"]
        self._swaps = ["Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority"]
        for name in ("proc/self", "sys/power", "sys/dev/block", "sys/class/block", "run/kagimori"):
            (root / name).mkdir(parents=True)
        self._tell()

    def number(self, name: str) -> str:
        """Give major:minor of a device."""
        return self._numbers[name]

    def disk(self, name: str) -> str:
        """Attach a disk."""
        return self._add(name, self.root / "sys/devices" / name)

    def partition(self, name: str, disk: str) -> str:
        """Show a partition of a disk."""
        self._add(name, self.root / "sys/devices" / disk / name)
        (self.root / "sys/devices" / disk / name / "partition").write_text("1\n")
        return name

    def upon(self, name: str, below: Iterable[str], mapping: str = "", dm_uuid: str = "") -> str:
        """Lay a device upon others: a mapping of device-mapper, or a RAID."""
        directory = self.root / "sys/devices/virtual" / name
        self._add(name, directory)
        (directory / "slaves").mkdir()
        for one in below:
            (directory / "slaves" / one).symlink_to((self.root / "sys/class/block" / one).resolve())
        if mapping:
            (directory / "dm").mkdir()
            (directory / "dm/name").write_text(f"{mapping}\n")
            (directory / "dm/uuid").write_text(f"{dm_uuid or 'LVM-' + mapping}\n")
        return name

    def opened(self, name: str, below: str, mapping: str = "cryptroot", uuid: str = UUID) -> str:
        """Open a volume, as the agent does, but for its record."""
        return self.upon(name, [below], mapping, f"CRYPT-LUKS2-{uuid.replace('-', '')}-{mapping}")

    def mount(
        self, point: str, source: str, kind: str = "ext4", number: str = "", options: str = "rw"
    ) -> None:
        """Mount something; its number is that of the device ``source``, unless it is given."""
        number = number or self._numbers.get(source.rpartition("/")[2], "0:40")
        if kind in {"ext2", "ext3", "ext4"}:
            name = next((name for name, one in self._numbers.items() if one == number), "")
            self.journal(name, f"jbd2/{name}-8")
        self._mounts.append(f"{len(self._mounts) + 1} 1 {number} / {point} rw - {kind} {source} {options}")
        self._tell()

    def journal(self, name: str, task: str | None) -> None:
        """Show by which task's name an ext4 on this device has its journal; None: it has none."""
        if name:
            directory = self.root / "sys/fs/ext4" / name
            directory.mkdir(parents=True, exist_ok=True)
            number = 100 + int(self._numbers[name].partition(":")[2])
            (directory / "journal_task").write_text(f"{number}\n" if task else "<none>\n")
            (self.root / f"proc/{number}").mkdir(exist_ok=True)
            (self.root / f"proc/{number}/comm").write_text(f"{task}\n")

    def swap(self, path: str, kind: str = "partition") -> None:
        """Activate a swap."""
        self._swaps.append(f"{path}\t\t{kind}\t1048572\t0\t-2")
        self._tell()

    def btrfs(self, fsid: str, *names: str) -> None:
        """Show the devices of a btrfs."""
        directory = self.root / "sys/fs/btrfs" / fsid / "devices"
        directory.mkdir(parents=True)
        for name in names:
            (directory / name).symlink_to((self.root / "sys/class/block" / name).resolve())

    def _add(self, name: str, directory: Path) -> str:
        number = f"253:{len(self._numbers)}"
        self._numbers[name] = number
        directory.mkdir(parents=True)
        (directory / "dev").write_text(f"{number}\n")
        (self.root / "sys/dev/block" / number).symlink_to(directory)
        (self.root / "sys/class/block" / name).symlink_to(directory)
        return name

    def _tell(self) -> None:
        (self.root / "proc/self/mountinfo").write_text("".join(f"{line}\n" for line in self._mounts))
        (self.root / "proc/swaps").write_text("".join(f"{line}\n" for line in self._swaps))
