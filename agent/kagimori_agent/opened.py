"""What the agent has opened in this boot: a record in /run, and whether the mappings still are what it says.

An initramfs leaves the record to the check of its root, and that to the booted system. It counts only together with
agent.toml and with the kernel: a mapping is ours if agent.toml names it, the agent has recorded that it made it, and it
still stands under that number with that name and UUID. The agent refuses a mapping that it finds made (``luks``), so
whoever could write a record would gain nothing by it.

Import budget: the standard library, the error tree, and that of ``config`` (loaded anyway).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from kagimori_protocol.errors import DiskError, ImageError

if TYPE_CHECKING:
    from kagimori_agent.config import Volume

ROOT: Final = Path("/")
RECORD: Final = "run/kagimori/mappings"
"""Not "opened", which is what the scripts of dracut note there."""
_FIELDS: Final = 3


class Mapping(NamedTuple):
    """An opened volume: its header's UUID, its name in /dev/mapper, its device as major:minor."""

    uuid: str
    name: str
    number: str

    @property
    def dm_uuid(self) -> str:
        """Give its UUID as libcryptsetup tells it to device-mapper."""
        return f"CRYPT-LUKS2-{self.uuid.replace('-', '')}-{self.name}"


def begin(root: Path = ROOT) -> None:
    """Forget what any record says: this boot's agent has opened nothing yet. Raises ImageError."""
    try:
        (root / RECORD).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritten(root, error) from error


def remember(volume: Volume, root: Path = ROOT) -> Mapping:
    """Record that the agent has just mapped this volume. Raises DiskError: no such mapping; ImageError: no record."""
    made = next((one for one in _mappings(root) if (one.name, one.uuid) == (volume.name, volume.uuid)), None)
    if made is None:
        raise DiskError(
            f"The mapping {volume.name} is not there.",
            code="opened.none",
            expected=f"a mapping {volume.name} of volume {volume.uuid}",
            found="none in /sys/class/block",
            todo="See that sysfs is mounted on /sys.",
        )
    path = root / RECORD
    fresh = path.with_name("mappings.new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        lines = path.read_text(encoding="ascii") if path.exists() else ""
        with os.fdopen(
            os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w"
        ) as file:
            file.write(f"{lines}{' '.join(made)}\n")
        fresh.replace(path)
    except (OSError, ValueError) as error:
        raise _unwritten(root, error) from error
    return made


def recorded(volumes: Sequence[Volume], root: Path = ROOT) -> dict[str, Mapping]:
    """Give the agent's mappings of this boot, by number; none without a record.

    Raises DiskError "opened.record": another's file, a volume that agent.toml does not name, or a mapping that is no
    longer what it was.
    """
    path = root / RECORD
    try:
        with path.open("rb") as file:
            owner = os.fstat(file.fileno())
            text = file.read(1 << 16).decode("ascii")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _untrue(f"a record {path} that can be read", str(error)) from error
    if owner.st_uid != os.geteuid() or owner.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _untrue("a record that root alone can write", f"mode {owner.st_mode:o} of user {owner.st_uid}")
    there = _mappings(root)
    named = {(volume.uuid, volume.name) for volume in volumes}
    found: dict[str, Mapping] = {}
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) != _FIELDS:
            raise _untrue("lines of UUID, name and number", ascii(line[:120]))
        one = Mapping(*fields)
        if (one.uuid, one.name) not in named:
            raise _untrue("volumes of agent.toml", ascii(line[:120]))
        if one not in there:
            raise _untrue(f"a mapping {one.name} with {one.dm_uuid} at {one.number}", "another, or none")
        found[one.number] = one
    return found


def _mappings(root: Path) -> list[Mapping]:
    """List every LUKS2 mapping that the kernel has now."""
    found = []
    for directory in sorted((root / "sys/class/block").glob("dm-*")):
        # It may go away while we look.
        with contextlib.suppress(OSError):
            name = _text(directory / "dm/name")
            dm_uuid, number = _text(directory / "dm/uuid"), _text(directory / "dev")
            digits = dm_uuid.removeprefix("CRYPT-LUKS2-")[:32]
            uuid = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
            one = Mapping(uuid, name, number)
            if one.dm_uuid == dm_uuid:
                found.append(one)
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii", errors="replace").strip()


def _untrue(expected: str, found: str) -> DiskError:
    return DiskError(
        "The record of what the agent has opened does not hold.",
        code="opened.record",
        expected=expected,
        found=found,
        todo="Boot again: nobody but the agent writes it, and nobody may change its mappings.",
    )


def _unwritten(root: Path, error: OSError | ValueError) -> ImageError:
    return ImageError(
        "What the agent has opened cannot be recorded.",
        code="opened.write",
        expected=f"a file {root / RECORD} that root can write",
        found=str(error),
        todo="See that /run is a tmpfs in the initramfs.",
    )
