"""What is in an initramfs: its files, out of the archives that it is made of.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst. Archives follow each other with zeros between; of
what initramfs-tools makes, the last one is compressed.
"""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

_MAGIC: Final = b"070701"
_HEADER_SIZE: Final = 110
_ALIGNED: Final = 4
_FIELDS: Final = {"mode": 14, "size": 54, "name_size": 94}
"""Where in a header each of them begins: eight hexadecimal digits."""
_TRAILER: Final = "TRAILER!!!"
_TIMEOUT_S: Final = 300


def unpacked(image: bytes) -> bytes:
    """Give the archives of an initramfs without compression."""
    start = 0
    while image[start : start + len(_MAGIC)] == _MAGIC:
        *_, start = _entries(image, start)[-1]
        while start < len(image) and not image[start]:
            start += 1
    return image[:start] + (_zstd("-d", image[start:]) if start < len(image) else b"")


def files(image: bytes) -> dict[str, bytes]:
    """Give the regular files of an initramfs, by their paths."""
    archives = unpacked(image)
    found: dict[str, bytes] = {}
    start = 0
    while archives[start : start + len(_MAGIC)] == _MAGIC:
        for name, mode, content, end in _entries(archives, start):
            start = end
            if stat.S_ISREG(mode) and name != _TRAILER:
                found[name.removeprefix("./")] = content
        while start < len(archives) and not archives[start]:
            start += 1
    return found


def packed_size(content: Mapping[str, bytes]) -> int:
    """Give the bytes that these files take compressed as initramfs-tools does, without the archive's own headers."""
    return len(_zstd("-9", b"".join(content[name] for name in sorted(content))))


def of(path: Path) -> dict[str, bytes]:
    """Give the regular files of the initramfs at ``path``."""
    return files(path.read_bytes())


def _entries(data: bytes, start: int) -> list[tuple[str, int, bytes, int]]:
    """Give name, mode, content and end of each entry of the archive at ``start``, with its trailer."""
    return list(_walk(data, start))


def _walk(data: bytes, start: int) -> Iterator[tuple[str, int, bytes, int]]:
    while True:
        assert data[start : start + len(_MAGIC)] == _MAGIC, f"no archive's entry at {start}"
        mode, size, name_size = (
            int(data[start + at : start + at + 8], 16)
            for at in (_FIELDS["mode"], _FIELDS["size"], _FIELDS["name_size"])
        )
        name_at = start + _HEADER_SIZE
        name = data[name_at : name_at + name_size - 1].decode(errors="surrogateescape")
        content_at = _aligned(name_at + name_size)
        end = _aligned(content_at + size)
        yield name, mode, data[content_at : content_at + size], end
        if name == _TRAILER:
            return
        start = end


def _aligned(offset: int) -> int:
    return (offset + _ALIGNED - 1) // _ALIGNED * _ALIGNED


def _zstd(option: str, data: bytes) -> bytes:
    done = subprocess.run(
        ["zstd", "--quiet", "--stdout", option],
        input=data,
        capture_output=True,
        check=False,
        timeout=_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout
