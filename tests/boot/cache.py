"""A cache of what is dear to build, keyed by the content of what it is made from.

An entry is a directory ``<layer>-<key>``, complete or not there: it is built beside and renamed at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

_KEPT: Final = 3
"""Entries that stay of each layer, those that were asked for last: all layers of one state take a gigabyte."""


class Cache:
    """Directories below ``root``; several processes may use it, and one builds at a time."""

    def __init__(self, root: Path, say: Callable[[str], None] = lambda _: None) -> None:
        """Use ``root``, which is made. ``say`` hears what is built, and how long that took."""
        self.root = root
        self._say = say
        root.mkdir(parents=True, exist_ok=True)

    def get(self, layer: str, made_from: Iterable[object], build: Callable[[Path], None]) -> Path:
        """Give the directory of a layer for these inputs; ``build`` fills it where it is not there yet.

        Inputs are texts, bytes, and paths, whose files count with names and content.
        """
        key = digest([layer, *made_from])
        path = self.root / f"{layer}-{key[:16]}"
        with self._locked():
            if not path.is_dir():
                unfinished = self.root / f"unfinished-{layer}"
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                began = time.monotonic()
                self._say(f"building {layer} ...")
                build(unfinished)
                unfinished.rename(path)
                self._say(f"building {layer}: done in {time.monotonic() - began:.0f} s")
            os.utime(path)
            entries = sorted(self.root.glob(f"{layer}-*"), key=lambda entry: entry.stat().st_mtime_ns)
            for entry in entries[:-_KEPT]:
                shutil.rmtree(entry)
        return path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


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
