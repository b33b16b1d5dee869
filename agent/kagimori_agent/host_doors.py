"""What lets the host into a booted system, which no PCR shows: agents that take its orders, consoles, names on its disks.

An attested boot ends where the system begins that it opened. What that system then takes from the host is its own
configuration's doing; each such door has a name here, and is closed, or accepted by name with a reason. Whoever enrols
asks ``open_doors``, and ``kagimori-agent doctor --host-doors`` shows the same.

Import budget: the standard library, the error tree, ``config``, ``booted`` and its two rooms of looks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kagimori_agent import config as configuration
from kagimori_agent import host_doors_disks, host_doors_software
from kagimori_agent.booted import System
from kagimori_protocol.errors import KagimoriError, OperatorError

ROOT: Final = Path("/")
ACCEPTED: Final = "etc/kagimori/accepted-doors"
"""One door a line: its id, and then the reason for which it stays open."""
_LOOKS: Final = (*host_doors_software.LOOKS, *host_doors_disks.LOOKS)
_ID: Final = re.compile(r"[a-z0-9-]+(?::\S+)?")


@dataclass(frozen=True, slots=True)
class Door:
    """A door that is open: what was found, why it matters, how to close it; ``accepted`` is the owner's reason, if any."""

    id: str
    found: str
    why: str
    todo: str
    accepted: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """Give it for ``--json``."""
        return {
            "id": self.id,
            "found": self.found,
            "why": self.why,
            "todo": self.todo,
            "accepted": self.accepted,
        }

    def lines(self) -> Iterator[str]:
        """Give it as lines for a person."""
        if self.accepted is not None:
            yield f"accepted  {self.id}: {self.found}"
            yield f"            because: {self.accepted}"
            return
        yield f"OPEN      {self.id}: {self.found}"
        yield f"            why:   {self.why}"
        yield f"            to do: {self.todo}"


def examine(root: Path = ROOT, volumes: Collection[str] | None = None) -> list[Door]:
    """List every door that is open, accepted ones with the reason for it.

    ``volumes`` are UUIDs of the LUKS2 volumes that are the owner's, in place of those of agent.toml below ``root``.
    Raises OperatorError "doors.accepted" for a list of accepted doors that says less than it must.
    """
    accepted = _accepted(root)
    system = System(root, _of_agent_toml(root) if volumes is None else volumes)
    found = [Door(*one, accepted=accepted.get(one.id)) for look in _LOOKS for one in look(system)]
    return sorted(found, key=lambda door: (door.accepted is not None, door.id))


def open_doors(root: Path = ROOT, volumes: Collection[str] | None = None) -> list[Door]:
    """List the doors that are open and not accepted, as ``examine``; empty is what an enrolment wants."""
    return [door for door in examine(root, volumes) if door.accepted is None]


def _of_agent_toml(root: Path) -> list[str]:
    """Name the volumes of agent.toml; without one, there are none whose mappings could be known."""
    try:
        return [volume.uuid for volume in configuration.load(root / "etc/kagimori/agent.toml").volumes]
    except KagimoriError:
        return []


def _accepted(root: Path) -> dict[str, str]:
    path = root / ACCEPTED
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(path, "a file of text that can be read", type(error).__name__) from error
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, reason = line.strip().partition(" ")
        if not _ID.fullmatch(name) or not reason.strip():
            raise _wrong(path, "lines of an id and, after a blank, a reason", f"line {number}: {line[:80]!a}")
        if name in found:
            raise _wrong(path, "each door once", f"line {number}: {name} again")
        found[name] = reason.strip()
    return found


def _wrong(path: Path, expected: str, found: str) -> OperatorError:
    return OperatorError(
        "The list of accepted doors cannot be followed.",
        code="doors.accepted",
        expected=f"{path}: {expected}",
        found=found,
        todo="Correct it; `kagimori-agent doctor --host-doors` names the doors.",
    )
