"""What targets are made of: simulated roots that are made once, recorded evidence where it is, and how inputs are cut."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from kagimori_simulator.amd import AmdRoot

ROOT = Path(__file__).parents[2]
STATE = ROOT / ".dev" / "fuzz"
"""Not in git: corpora, findings, and the roots, which take seconds to make."""


@functools.cache
def amd_root(product: str) -> AmdRoot:
    """Give the simulated root of a product line, the same in every run on this machine."""
    return AmdRoot.cached(STATE / "roots", product)


def recorded(*patterns: str) -> Iterator[bytes]:
    """Give files of recorded evidence as further seeds; none where it is absent. It is never copied into the project."""
    named = os.environ.get("KAGIMORI_VECTORS")
    directory = Path(named) if named else ROOT.parent / "shared" / "vectors"
    for pattern in patterns:
        for path in sorted(directory.glob(pattern)):
            yield path.read_bytes()


def cut(data: bytes, count: int) -> list[bytes]:
    """Cut an input into ``count`` parts: 2 bytes of size before each but the last. Every input can be cut."""
    parts = []
    for _ in range(count - 1):
        size = int.from_bytes(data[:2], "big")
        parts.append(data[2 : 2 + size])
        data = data[2 + size :]
    return [*parts, data]


def joined(*parts: bytes) -> bytes:
    """Put parts together as ``cut`` takes them apart."""
    sized = [len(part).to_bytes(2, "big") + part for part in parts[:-1]]
    return b"".join([*sized, parts[-1]])


def head(data: bytes) -> tuple[int, bytes]:
    """Split the byte off by which an input chooses what it is for; an empty one is for the first."""
    return (data[0], data[1:]) if data else (0, b"")
