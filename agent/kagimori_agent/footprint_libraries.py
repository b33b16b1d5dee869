"""Shared libraries as the dynamic linker of this machine finds them.

What a file is linked against tells ``ldd``; what a program opens by itself is looked up by name in the linker's cache.
Import budget: ``subprocess``, ``re``, the error tree.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from kagimori_protocol.errors import ImageError

ELF_MAGIC: Final = b"\x7fELF"
_HEADER_SIZE: Final = 20
"""Bytes of an ELF header up to and with e_machine (System V ABI, ELF header)."""
_IDENTITY: Final = (4, 5, 18, 19)
"""Offsets of EI_CLASS, EI_DATA and the two bytes of e_machine: one process loads libraries that agree in them."""
_LINKED: Final = re.compile(r"\t(?P<name>\S+) => (?P<path>/.*) \(0x[0-9a-f]+\)")
_LOADER: Final = re.compile(r"\t(?P<path>/\S+) \(0x[0-9a-f]+\)")
_CACHED: Final = re.compile(r"\t(?P<name>\S+) \(.*\) => (?P<path>/.*)")
_ENVIRONMENT: Final = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
_TIMEOUT_S: Final = 600
"""Seconds: an emulated machine that did other things as well once took more than sixty for the libraries of a whole Python."""


def identity(path: Path) -> bytes | None:
    """Give class, byte order and machine of an ELF file, None for any other. Raises ImageError if it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_SIZE)
    except OSError as error:
        raise ImageError(
            "A file that the initramfs needs cannot be read.",
            code="footprint.read",
            expected=str(path),
            found=str(error.strerror),
        ) from error
    if not head.startswith(ELF_MAGIC) or len(head) < _HEADER_SIZE:
        return None
    return bytes(head[at] for at in _IDENTITY)


def linked(paths: Sequence[Path]) -> set[Path]:
    """Give every library that the ELF files among ``paths`` need, with the dynamic linker itself. Raises ImageError."""
    elf = [path for path in paths if identity(path) is not None]
    needed: set[Path] = set()
    missing: list[str] = []
    subject = str(elf[0]) if len(elf) == 1 else ""
    for line in _lines("ldd", *map(str, elf)) if elf else ():
        if line.startswith("/") and line.endswith(":"):
            subject = line.removesuffix(":")
        elif line.rstrip().endswith("=> not found"):
            missing.append(f"{line.split()[0]} of {subject}")
        elif found := _LINKED.fullmatch(line) or _LOADER.fullmatch(line):
            needed.add(Path(found["path"]))
    if missing:
        raise ImageError(
            "Shared libraries that the agent needs are not on this machine.",
            code="footprint.library",
            expected="each where the dynamic linker looks",
            found=f"not {', '.join(missing)}",
            todo="Install the packages that they come from (`apt-file search`, `dnf provides`).",
        )
    return needed


def opened(names: Mapping[str, str], like: Path) -> list[Path]:
    """Find libraries that programs open by name, of the machine that the program ``like`` is for.

    ``names`` maps each to its purpose. Raises ImageError, naming all that the dynamic linker does not know.
    """
    wanted = identity(like)
    cached: dict[str, Path] = {}
    for line in _lines("ldconfig", "-p"):
        entry = _CACHED.fullmatch(line)
        if entry and entry["name"] in names and entry["name"] not in cached:
            path = Path(entry["path"])
            if path.exists() and identity(path) == wanted:
                cached[entry["name"]] = path
    missing = [f"{name} ({purpose})" for name, purpose in names.items() if name not in cached]
    if missing:
        raise ImageError(
            "Shared libraries that are opened by name are not on this machine.",
            code="footprint.library",
            expected="each in the dynamic linker's cache (`ldconfig -p`)",
            found=f"not {', '.join(missing)}",
            todo="Install the packages that they come from (on Debian libtss2-tcti-device0 and libgcc-s1).",
        )
    return [cached[name] for name in names]


def chain(paths: Iterable[Path]) -> set[Path]:
    """Give each path with its directory's links resolved, and with every file that it leads to by links of its own."""
    found: set[Path] = set()
    for path in paths:
        step = path.parent.resolve() / path.name
        while step not in found:
            found.add(step)
            if step.is_symlink():
                target = step.parent / step.readlink()
                step = target.parent.resolve() / target.name
    return found


def _lines(*command: str) -> list[str]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, env=_ENVIRONMENT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        late = isinstance(error, subprocess.TimeoutExpired)
        raise ImageError(
            f"{command[0]} cannot be run, so nobody knows which libraries the agent needs.",
            code="footprint.linker",
            expected=f"the program {command[0]}, of glibc",
            found=f"no end of it within {_TIMEOUT_S} s" if late else str(error),
        ) from error
    if done.returncode != 0:
        raise ImageError(
            f"{command[0]} failed, so nobody knows which libraries the agent needs.",
            code="footprint.linker",
            expected="exit code 0",
            found=f"{done.returncode}: {done.stderr.strip()[-500:]}",
        )
    return done.stdout.splitlines()
