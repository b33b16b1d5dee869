"""A booted system as its files show it: what ``host_doors`` asks, answered below any root.

A unit counts as there unless it is masked: whether something starts it (a preset, a udev rule, a generator, a dependency)
is more than files tell, and what is not known is no. Sources: systemd.unit(5), systemd.generator(7), proc_cmdline(5).

Import budget: the standard library, ``mounts``, ``resting``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from kagimori_agent import mounts, resting

UNIT_DIRECTORIES: Final = (
    *("etc/systemd/system", "run/systemd/system", "usr/local/lib/systemd/system", "usr/lib/systemd/system"),
    "lib/systemd/system",
)
GENERATOR_DIRECTORIES: Final = (
    *("run/systemd/system-generators", "etc/systemd/system-generators"),
    *("usr/local/lib/systemd/system-generators", "usr/lib/systemd/system-generators"),
    "lib/systemd/system-generators",
)
_FALSE: Final = frozenset({"0", "no", "n", "false", "f", "off"})
"""What systemd reads as no (parse_boolean)."""
_BY: Final = {
    "UUID=": "by-uuid",
    "LABEL=": "by-label",
    "PARTUUID=": "by-partuuid",
    "PARTLABEL=": "by-partlabel",
}


class System:
    """One system below ``root``; ``volumes`` are UUIDs of LUKS2 headers whose mappings count as the owner's."""

    def __init__(self, root: Path, volumes: Collection[str]) -> None:
        """Read what nearly every look asks for."""
        self.root = root
        self.words = (self.text("proc/cmdline") or "").split()
        prefixes = tuple(f"CRYPT-LUKS2-{uuid.replace('-', '')}-" for uuid in volumes)
        self.owned: dict[str, str] = {}
        """Names of the owner's mappings, by their number."""
        for directory in sorted((root / "sys/class/block").glob("dm-*")):
            name, number = self.text(directory / "dm/name"), self.text(directory / "dev")
            if name and number and prefixes and (self.text(directory / "dm/uuid") or "").startswith(prefixes):
                self.owned[number] = name

    def text(self, path: str | Path) -> str | None:
        """Give a file's text without its last line break; None if it cannot be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def lines(self, path: str | Path) -> list[list[str]]:
        """Give the fields of each line that is no comment."""
        text = self.text(path) or ""
        return [
            line.split() for line in text.splitlines() if line.split() and not line.lstrip().startswith("#")
        ]

    def files(self, *patterns: str) -> list[Path]:
        """List files below the root by patterns, in the order in which systemd and others read them: by name."""
        found = [path for pattern in patterns for path in self.root.glob(pattern)]
        return sorted(found, key=lambda path: path.name)

    def unit(self, name: str) -> Path | None:
        """Give a unit's file, of the first directory that has one; None if it is masked, or not there.

        An instance without a file of its own is its template.
        """
        there, path = self._first(UNIT_DIRECTORIES, name)
        stem, at, rest = name.partition("@")
        if not there and at:
            _, path = self._first(UNIT_DIRECTORIES, f"{stem}@.{rest.rpartition('.')[2]}")
        return path

    def generator(self, name: str) -> Path | None:
        """Give a generator's file, likewise."""
        return self._first(GENERATOR_DIRECTORIES, name)[1]

    def switched_off(self, *words: str) -> bool:
        """Tell whether the command line says no to one of these; the last word of a name counts."""
        for word in words:
            said = [
                one.partition("=")[2] for one in self.words if one.partition("=")[0] == word and "=" in one
            ]
            if said and said[-1].lower() in _FALSE:
                return True
        return False

    def setting(self, name: str, *patterns: str) -> str | None:
        """Give what the last NAME=VALUE says in configuration files of this kind, without quotes."""
        value = None
        for path in self.files(*patterns):
            for line in (self.text(path) or "").splitlines():
                key, sign, rest = line.strip().partition("=")
                if sign and key.strip() == name:
                    value = rest.strip().strip("\"'")
        return value

    def says_no(self, name: str, *patterns: str) -> bool:
        """Tell whether a boolean setting of systemd's is there and false."""
        return (self.setting(name, *patterns) or "").lower() in _FALSE

    def device(self, spec: str) -> str | None:
        """Give major:minor of what fstab or crypttab name; None if it is not there now."""
        tag = next((tag for tag in _BY if spec.startswith(tag)), None)
        name = f"/dev/disk/{_BY[tag]}/{spec.removeprefix(tag).strip(chr(34))}" if tag else spec
        if not name.startswith("/dev/"):
            return None
        with contextlib.suppress(OSError):
            link = (self.root / name.lstrip("/")).readlink()
            # Links of udev's are relative, and lead to what the kernel calls the device: ../../dm-0
            name = "/dev/" + "/".join(part for part in link.parts if part not in {"..", "/", "dev"})
        return resting.number_of(name, self.root)

    def lies(self, path: str) -> str | None:
        """Give major:minor of what a file or directory lies on; of a btrfs, that of the device it was mounted by."""
        mount = self.mount_of(path)
        if mount is None:
            return None
        return self.device(mount.source) if mount.number.startswith("0:") else mount.number

    def flaws(self, number: str | None) -> tuple[str, ...]:
        """Tell where a device rests on something that is not the owner's; empty is good."""
        if number is None:
            return ("no disk that is there now",)
        return resting.flaws(number, self.owned, self.root)

    def mount_of(self, path: str) -> mounts.Mount | None:
        """Give what is mounted where a path lies: the last of the longest that it begins with."""
        found = None
        for mount in mounts.read(self.root):
            inside = path == mount.point or path.startswith(mount.point.rstrip("/") + "/")
            if inside and (found is None or len(mount.point) >= len(found.point)):
                found = mount
        return found

    def _first(self, directories: tuple[str, ...], name: str) -> tuple[bool, Path | None]:
        """Tell whether there is such a file, and give it if it is not there to mask others."""
        for path in (self.root / directory / name for directory in directories):
            if path.is_symlink() and str(path.readlink()) == "/dev/null":
                return True, None
            if path.is_symlink():
                return True, path
            if path.exists():
                return True, path if path.stat().st_size else None
        return False, None


def joined(parts: Iterable[str], most: int = 4) -> str:
    """Join some texts, and say how many there are beside them."""
    known = list(parts)
    more = [f"and {len(known) - most} more"] if len(known) > most else []
    return ", ".join([*known[:most], *more])
