"""What a vector is: a directory with its input and its expectation. Nothing of the project is imported by what makes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FAIL: Final = "_fail"


@dataclass(frozen=True)
class Vector:
    """``path`` names it (area first); ``gives`` is what comes out of ``files``, or ``fails`` names the check that refuses."""

    path: str
    about: str
    files: Mapping[str, bytes]
    gives: Any = None
    fails: str | None = None

    def contents(self) -> dict[str, bytes]:
        """Give every file of the directory, by its path below the tree."""
        directory = self.path + (FAIL if self.fails else "")
        expected = {"about": self.about} | ({"fails": self.fails} if self.fails else {"gives": self.gives})
        files = {**self.files, "expected.json": pretty(expected)}
        return {f"{directory}/{name}": content for name, content in files.items()}


def pretty(value: object) -> bytes:
    """Write JSON for people."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def given(**values: Any) -> dict[str, bytes]:  # noqa: ANN401 - whatever JSON can hold
    """Give an input.json; byte strings are written in hex."""
    return {"input.json": pretty(hexed(values))}


def hexed(value: Any) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """Write every byte string within a value in hex."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: hexed(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [hexed(one) for one in value]
    return value


def tree(vectors: Iterable[Vector]) -> dict[str, bytes]:
    """Give all files of many vectors. Raises ValueError if two have one name."""
    files: dict[str, bytes] = {}
    for vector in vectors:
        contents = vector.contents()
        if taken := set(contents) & set(files):
            raise ValueError(f"two vectors have one name: {min(taken)}")
        files |= contents
    return files


def read(directory: Path) -> dict[str, bytes]:
    """Give all files below a directory, by their path in it."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
