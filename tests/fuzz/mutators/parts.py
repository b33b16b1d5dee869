"""Mutations of inputs that are one byte of choice and a body, and what the other mutators share."""

from __future__ import annotations

import random

from tests.fuzz.target import Mutate, Mutator

INTERESTING = (0, 1, 2, 3, 4, 7, 8, 15, 16, 23, 24, 31, 32, 33, 63, 64, 127, 128, 255, 256, 1024, 4096, 65535)


def number(chance: random.Random, size: int) -> bytes:
    """Give ``size`` bytes: all zeros, all ones, a number at an edge, or anything; in either byte order."""
    pick = chance.randrange(4)
    if pick == 0:
        return bytes(size)
    if pick == 1:
        return b"\xff" * size
    if pick == 2:
        value = chance.choice(INTERESTING) & (1 << 8 * size) - 1
        return value.to_bytes(size, chance.choice(("big", "little")))
    return chance.randbytes(size)


def part(data: bytes, limit: int, chance: random.Random, mutate: Mutate) -> bytes:
    """Mutate a part of an input: by the engine, by a number of its size, or by nothing at all."""
    if not data or chance.random() < 0.6:
        return mutate(data, max(1, limit))
    if chance.random() < 0.5:
        return number(chance, min(len(data), 64)) + data[64:]
    return b""


def spliced(data: bytes, at: int, end: int, new: bytes) -> bytes:
    """Replace a stretch of bytes."""
    return data[:at] + new + data[end:]


def behind_choice(body: Mutator) -> Mutator:
    """Mutate the first byte now and then, and the rest by ``body``."""

    def mutated(data: bytes, limit: int, chance: random.Random, mutate: Mutate) -> bytes:
        choice = data[:1] or b"\0"
        if chance.random() < 0.05:
            choice = bytes([chance.randrange(256)])
        return choice + body(data[1:], limit - 1, chance, mutate)

    return mutated
