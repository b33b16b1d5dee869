"""What a block device rests on: down through partitions, LVM, RAID and other mappings, to mappings of the agent or to none.

The kernel lists below each device the ones that it is made of (``slaves``), and a partition lies in its disk's directory.
A device counts if every way down goes through a mapping that the agent opened. What has nothing below it and is no such
mapping is a disk, and the host's; so is a loop device, whose file could lie anywhere.

Source: Linux, Documentation/ABI/stable/sysfs-block and sysfs-class-block. Import budget: the standard library.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path("/")
MOST_STEPS: Final = 16
"""Devices upon each other; real ones are five at most, and whoever goes on for ever ends here."""
MOST_DEVICES: Final = 4096


def flaws(number: str, opened: Collection[str], root: Path = ROOT) -> tuple[str, ...]:
    """Tell, way by way, where a device (``major:minor``) leads to something that is none of ``opened``; empty is good."""
    return tuple(_Walk(opened, root).flaws(number, ()))


def number_of(name: str, root: Path = ROOT) -> str | None:
    """Give major:minor of a device by what /dev or /dev/mapper call it; None for what the kernel does not know."""
    if name.startswith("/dev/mapper/"):
        for directory in (root / "sys/class/block").glob("dm-*"):
            if _text(directory / "dm/name") == name.removeprefix("/dev/mapper/"):
                return _text(directory / "dev")
        return None
    if not name.startswith("/dev/"):
        return None
    # sysfs writes cciss/c0d0 as cciss!c0d0
    return _text(root / "sys/class/block" / name.removeprefix("/dev/").replace("/", "!") / "dev")


class _Walk:
    """One walk down; what was seen to be good is not walked twice."""

    def __init__(self, opened: Collection[str], root: Path) -> None:
        self._opened = opened
        self._root = root
        self._good: set[str] = set()
        self._steps = 0

    def flaws(self, number: str, above: tuple[str, ...]) -> Iterator[str]:
        if number in self._opened or number in self._good:
            return
        self._steps += 1
        way = (*above, self._named(number))
        told = " on ".join(way)
        if len(way) > MOST_STEPS or self._steps > MOST_DEVICES:
            yield f"{told}: too many devices upon each other"
            return
        directory = self._directory(number)
        if not directory.is_dir():
            yield f"{told}: a device that the kernel does not list"
            return
        below = [_text(directory.resolve().parent / "dev")] if (directory / "partition").exists() else None
        if below is None:
            below = [_text(one / "dev") for one in _entries(directory / "slaves")]
        if not below:
            yield f"{told}: {self._kind(directory)} that the agent has not opened"
            return
        bad = False
        for one in below:
            for flaw in [f"{told}: on a device without a number"] if one is None else self.flaws(one, way):
                bad = True
                yield flaw
        if not bad:
            self._good.add(number)

    def _directory(self, number: str) -> Path:
        return self._root / "sys/dev/block" / number

    def _named(self, number: str) -> str:
        directory = self._directory(number)
        name = directory.resolve().name if directory.is_symlink() else number
        mapping = _text(directory / "dm/name")
        return f"{name} ({mapping})" if mapping else name

    def _kind(self, directory: Path) -> str:
        if (directory / "loop").is_dir():
            return "a loop device"
        return "a mapping" if (directory / "dm").is_dir() else "a disk"


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip() or None
    except OSError:
        return None
