"""A cache of what is dear to build, keyed by the content of what it is made from.

An entry is a directory ``<layer>-<key>``, complete or not there: it is built beside and renamed at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

MOUNTS: Final = Path("/proc/self/mountinfo")
_MOUNT_POINT: Final = 4
_KEPT: Final = 3
"""Entries that stay of each layer, those that were asked for last: all layers of one state take a gigabyte."""


class Cache:
    """Directories below ``root``; several processes may use it, and one builds at a time."""

    def __init__(self, root: Path, say: Callable[[str], None] = lambda _: None) -> None:
        """Use ``root``, which is made. ``say`` hears what is built, and how long that took."""
        self.root = root
        self._say = say
        root.mkdir(parents=True, exist_ok=True)

    def get(self, layer: str, made_from: Iterable[object], build: Callable[[Path], object]) -> Path:
        """Give the directory of a layer for these inputs; ``build`` fills it where it is not there yet.

        Inputs are texts, bytes, and paths, whose files count with names and content.
        """
        key = digest([layer, *made_from])
        path = self.root / f"{layer}-{key[:16]}"
        with self._locked():
            if not path.is_dir():
                unfinished = self.root / f"unfinished-{layer}"
                remove(unfinished)
                unfinished.mkdir()
                began = time.monotonic()
                self._say(f"building {layer} ...")
                build(unfinished)
                unfinished.rename(path)
                self._say(f"building {layer}: done in {time.monotonic() - began:.0f} s")
            os.utime(path)
            entries = sorted(self.root.glob(f"{layer}-*"), key=lambda entry: entry.stat().st_mtime_ns)
            for entry in entries[:-_KEPT]:
                remove(entry)
        return path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def remove(directory: Path) -> None:
    """Remove a directory, if it is there. Raises AssertionError, and removes nothing, if anything is mounted below it.

    A build that was killed may have left this machine's own /dev there, and removing would go through it.
    """
    below = str(directory.resolve()) + "/"
    points = [line.split(" ")[_MOUNT_POINT] for line in MOUNTS.read_text(encoding="utf-8").splitlines()]
    there = [point for point in (_unescaped(point) for point in points) if point.startswith(below)]
    assert not there, (
        f"{there[0]} is mounted below {directory}, so that is left alone: umount it, and try again"
    )
    if directory.exists():
        shutil.rmtree(directory)


def _unescaped(point: str) -> str:
    """Undo what the kernel does to blanks in paths (proc_pid_mountinfo(5))."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)


def digest(parts: Iterable[object]) -> str:
    """Hash inputs so that no two lists of them give the same bytes."""
    whole = hashlib.sha256()
    for part in parts:
        data = b"".join(_content(part)) if isinstance(part, Path) else str(part).encode()
        whole.update(len(data).to_bytes(8, "big"))
        whole.update(data)
    return whole.hexdigest()


def _content(path: Path) -> Iterator[bytes]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:
            data = file.read_bytes()
            yield f"{file.relative_to(path)} {file.stat().st_mode & 0o111:o} {len(data)}\n".encode()
            yield data
