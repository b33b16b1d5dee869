"""A volume's header in memory: read from the device once, judged there, and used from there (THREATS T1).

The host owns the disk and can change it between any two looks. So what ``luks2_guard`` has found authentic is written into a
file in memory that has no name and is sealed against changes, and cryptsetup opens the volume by that file. Of the device it
uses the data and nothing else.

Import budget: ``fcntl`` and that of ``luks2_guard``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kagimori_protocol import luks2_guard
from kagimori_protocol.errors import DiskError, ImageError
from kagimori_protocol.luks2_guard import Guarded
from kagimori_protocol.luks2_layout import probe, refusal

_NOEXEC_SEAL: Final = 0x8
"""MFD_NOEXEC_SEAL (Linux 6.3), which a system may demand."""
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def claimed(device: Path) -> str | None:
    """Give the UUID of the header that a device seems to have, to find devices by. Raises DiskError."""
    with _opened(device) as file:
        return probe(lambda at, most: _read(device, file, at, most))


@contextlib.contextmanager
def guarded(device: Path, uuid: str, key: bytes | memoryview, epoch: int) -> Iterator[tuple[Guarded, int]]:
    """Give the device's authentic header, and the descriptor of a sealed file in memory that cryptsetup opens it by.

    ``epoch`` is the least that is accepted. Raises DiskError, ImageError.
    """
    with _opened(device) as file:
        size = os.lseek(file, 0, os.SEEK_END)
        found = luks2_guard.choose(lambda at, most: _read(device, file, at, most), size, uuid, key, epoch)
        area = _read(device, file, *found.area)
    if len(area) != found.area[1]:
        raise refusal("luks.area", f"{found.area[1]} bytes of keyslot {found.slot}", f"{len(area)} bytes")
    memory = _memory()
    try:
        os.ftruncate(memory, found.memory_size)
        _write(memory, 0, found.memory)
        _write(memory, found.area[0], area)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
        yield found, memory
    finally:
        os.close(memory)


@contextlib.contextmanager
def _opened(device: Path) -> Iterator[int]:
    try:
        file = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(device, error) from error
    try:
        yield file
    finally:
        os.close(file)


def _read(device: Path, file: int, at: int, size: int) -> bytes:
    """Read ``size`` bytes, fewer where the device ends. Raises DiskError."""
    data = bytearray()
    try:
        while len(data) < size and (part := os.pread(file, size - len(data), at + len(data))):
            data += part
    except OSError as error:
        raise _unreadable(device, error) from error
    return bytes(data)


def _memory() -> int:
    try:
        try:
            return os.memfd_create("luks-header", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _NOEXEC_SEAL)
        except OSError:  # EINVAL: an older kernel does not know the flag, and does not demand it
            return os.memfd_create("luks-header", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise ImageError(
            "There is no file in memory for the volume's header.",
            code="luks.memfd",
            expected="memfd_create to work",
            found=str(error.strerror),
            todo="Build the kernel with CONFIG_MEMFD_CREATE, and give the VM memory.",
        ) from error


def _write(file: int, at: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, at)
        rest, at = rest[written:], at + written


def _unreadable(device: Path, error: OSError) -> DiskError:
    return DiskError(
        f"{device} cannot be read.",
        code="luks.read",
        expected=f"a readable block device {device}",
        found=str(error.strerror),
        todo="See that the disk is attached, and that the agent runs as root.",
    )
