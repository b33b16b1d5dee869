"""TPM structures are fields with their sizes in front (TPM2B): mutations that change a field and keep its size true."""

from __future__ import annotations

import random

from tests.fuzz.mutators import parts
from tests.fuzz.target import Mutate

LONGEST = 1024


def field(content: bytes) -> bytes:
    """Write a TPM2B."""
    return len(content).to_bytes(2, "big") + content


def places(data: bytes) -> list[tuple[int, int]]:
    """Guess where fields lie: every place whose two bytes are the size of something that fits behind them."""
    found = []
    for at in range(len(data) - 2):
        size = int.from_bytes(data[at : at + 2], "big")
        if 0 < size <= LONGEST and at + 2 + size <= len(data):
            found.append((at, at + 2 + size))
    return found


def mutate(data: bytes, limit: int, chance: random.Random, engine: Mutate) -> bytes:
    """Change a field and its size, or a number of 2 bytes, or any bytes."""
    if len(data) < 4 or chance.random() < 0.3:
        return engine(data, limit)
    found = places(data)
    if found and chance.random() < 0.6:
        at, end = chance.choice(found)
        return parts.spliced(data, at, end, field(parts.part(data[at + 2 : end], LONGEST, chance, engine)))[
            :limit
        ]
    at = chance.randrange(len(data) - 1)
    return parts.spliced(data, at, at + 2, parts.number(chance, 2))[:limit]
