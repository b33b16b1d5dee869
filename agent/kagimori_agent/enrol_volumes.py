"""Which volumes of a booted system are enrolled, under which names, and how agent.toml hears of them.

A volume's name is that of its mapping, where there is one now: what the system's fstab and kernel command line say stays true.

Import budget: that of ``config`` and ``keyslots``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from kagimori_agent import config as agent_config
from kagimori_agent import keyslots, luks
from kagimori_agent.config import Volume
from kagimori_protocol.errors import DiskError, ImageError, OperatorError, UsageError
from kagimori_protocol.luks2_layout import probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kagimori_agent.config import Config

ROOT: Final = Path("/")
MAX_VOLUMES: Final = 16


def chosen(
    config: Config, devices: Sequence[Path], uuids: Sequence[str], root: Path = ROOT
) -> list[tuple[Volume, Path]]:
    """Give the volumes that the caller names, by device or by UUID, or else all of agent.toml, each with its device.

    Raises UsageError (none, one twice, too many) and DiskError (no such volume, more than one).
    """
    known = {volume.uuid: volume for volume in config.volumes}
    found: list[tuple[Volume, Path]] = []
    for device in devices:
        with keyslots.opened(device) as disk:
            uuid = probe(disk.read)
        if uuid is None:
            raise DiskError(
                f"{device} is no LUKS2 volume.",
                code="enrol.luks2",
                expected="a device or image with a LUKS2 header",
                found="none",
                todo="`cryptsetup convert --type luks2` turns a LUKS1 header into one. Nothing is ever formatted here.",
            )
        found.append((_named(uuid, known, root), device))
    for uuid in uuids:
        volume = _named(uuid.lower(), known, root)
        found.append((volume, luks.find_device(volume, root)))
    if not devices and not uuids:
        found = [(volume, luks.find_device(volume, root)) for volume in config.volumes]
    named = [volume.uuid for volume, _ in found]
    if not found or len(set(named)) != len(named) or len(found) > MAX_VOLUMES:
        raise UsageError(
            "The volumes to enrol cannot be told.",
            code="enrol.volumes",
            expected=f"1 to {MAX_VOLUMES} volumes, each once, by --device or --volume, or in agent.toml",
            found=", ".join(named) or "none",
        )
    return found


def add_to_config(path: Path, config: Config, volumes: Sequence[Volume]) -> list[Volume]:
    """Write volumes into agent.toml that it does not name yet; gives those. Raises OperatorError, and ImageError for its text.

    The file is replaced as a whole, once what it will be was read like any agent.toml.
    """
    known = {volume.uuid for volume in config.volumes}
    new = [volume for volume in volumes if volume.uuid not in known]
    if not new:
        return []
    temporary = path.with_name(f".{path.name}.new")
    try:
        text = path.read_text(encoding="utf-8")
        text += "" if text.endswith("\n") else "\n"
        for volume in new:
            text += f"\n[[volumes]]\nuuid = {json.dumps(volume.uuid)}\nname = {json.dumps(volume.name)}\n"
            if volume.device is not None:
                text += f"device = {json.dumps(str(volume.device))}\n"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(path.stat().st_mode & 0o777)
        agent_config.load(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OperatorError(
            f"{path} cannot be changed.",
            code="enrol.config",
            expected="a file that can be replaced",
            found=str(error.strerror),
            todo="Add the volumes by hand: uuid and name below [[volumes]].",
        ) from error
    except ImageError:
        temporary.unlink(missing_ok=True)
        raise
    return new


def _named(uuid: str, known: dict[str, Volume], root: Path) -> Volume:
    if uuid in known:
        return known[uuid]
    name = mapped_name(uuid, root) or f"luks-{uuid}"
    try:
        return msgspec.convert({"uuid": uuid, "name": name}, Volume)
    except msgspec.ValidationError as error:
        raise UsageError(
            "A volume cannot be named in agent.toml.",
            code="enrol.volumes",
            expected="a UUID in lower case, and a mapping name of letters, digits, dots, dashes and underscores",
            found=ascii(f"{uuid}, {name}"[:120]),
        ) from error


def mapped_name(uuid: str, root: Path = ROOT) -> str | None:
    """Give the name of the mapping that a volume has now, or None."""
    prefix = f"CRYPT-LUKS2-{uuid.replace('-', '')}-"
    for directory in sorted((root / "sys/class/block").glob("dm-*/dm")):
        try:
            dm_uuid = (directory / "uuid").read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue  # it went away while we looked
        if dm_uuid.startswith(prefix):
            return dm_uuid.removeprefix(prefix)
    return None
