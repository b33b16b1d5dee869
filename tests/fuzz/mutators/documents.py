"""JSON as a tree: mutations of values in their places, and of the bytes that a message carries as base64."""

from __future__ import annotations

import base64
import binascii
import json
import random
from typing import Any

from tests.fuzz.mutators import parts
from tests.fuzz.target import Mutate

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 23, 24, 3600, 1 << 63, (1 << 64) - 1, 1 << 64, 0.5, 1e300, "", "0", "1", "a",
    "\0", "\x7f", "\u00e9", "\ud7ff", "AA==", "unlock", "dynamic", [], {}, [[]], [0], ["0"], {"type": "hello"},
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:  # noqa: ANN401 - JSON
    """List every place in a document: what holds it, and under which name or number."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += [(value, name), *places(inner)]
    elif isinstance(value, list):
        for index, inner in enumerate(value[:40]):
            found += [(value, index), *places(inner)]
    return found


def mutate_message(data: bytes, limit: int, chance: random.Random, mutate: Mutate) -> bytes:
    """Change a value of a message, keeping the one form that messages have; now and then, change any bytes."""
    return _mutate(data, limit, chance, mutate, compact=True)


def mutate_document(data: bytes, limit: int, chance: random.Random, mutate: Mutate) -> bytes:
    """Change a value of a JSON document; now and then, any bytes."""
    return _mutate(data, limit, chance, mutate, compact=False)


def _mutate(data: bytes, limit: int, chance: random.Random, mutate: Mutate, *, compact: bool) -> bytes:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate(data, limit)
    found = places(document)
    if not found or chance.random() < 0.15:
        return mutate(data, limit)
    for _ in range(chance.choice((1, 1, 2))):
        holder, name = chance.choice(found)
        _change(holder, name, chance, mutate, limit)
    try:
        text = json.dumps(document, ensure_ascii=not compact, separators=(",", ":") if compact else None)
        return text.encode()[:limit]
    except (ValueError, RecursionError):  # half a surrogate, or a document within itself
        return mutate(data, limit)


def _change(holder: Any, name: Any, chance: random.Random, mutate: Mutate, limit: int) -> None:  # noqa: ANN401 - JSON
    if not _there(holder, name):
        return
    value = holder[name]
    pick = chance.randrange(10)
    if pick == 0:
        del holder[name]
    elif pick == 1:
        holder[name] = chance.choice(VALUES)
    elif pick == 2 and isinstance(holder, dict):
        holder[chance.choice(("type", "version", "0", "1", "x", name + "x"))] = value
    elif pick == 3 and isinstance(value, list):
        # What does not fit is cut off anyway; a list of all there is room for, 25 times 25, would take all memory before.
        fit = limit // len(json.dumps(value)) + 1
        holder[name] = value * min(fit, chance.choice((2, 2, 9, 17, 25)))
    elif isinstance(value, str):
        holder[name] = _text(value, chance, mutate, limit)
    elif isinstance(value, int):
        holder[name] = chance.choice((value + 1, value - 1, int.from_bytes(parts.number(chance, 8), "big")))
    else:
        holder[name] = chance.choice(VALUES)


def _there(holder: Any, name: Any) -> bool:  # noqa: ANN401 - JSON
    return name in holder if isinstance(holder, dict) else name < len(holder)


def _text(value: str, chance: random.Random, mutate: Mutate, limit: int) -> str:
    """Change a text: as what base64 stands for, or as text."""
    if chance.random() < 0.7:
        try:
            raw = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            pass
        else:
            if chance.random() < 0.5:  # of the same size, as most fields must be
                changed = parts.part(raw, max(1, len(raw)), chance, mutate)
                return base64.b64encode(changed.ljust(len(raw), b"\0")[: len(raw)]).decode()
            return base64.b64encode(parts.part(raw, limit // 2, chance, mutate)).decode()
    if chance.random() < 0.3:
        return str(chance.choice(VALUES))
    return mutate(value.encode("utf-8", "surrogatepass"), max(1, min(limit, len(value) + 64))).decode(
        "utf-8", "replace"
    )
