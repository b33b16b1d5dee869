"""The record of what the agent loads: names of Python modules, written by ``kagimori_simulator.footprint_recorder``.

Import budget: the standard library and the error tree.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kagimori_protocol.errors import ImageError

PATH: Final = Path(__file__).with_name("footprint.json")


@dataclass(frozen=True, slots=True)
class Record:
    """Names of modules: Python's own, and those of packages; ``data``: files in packages, as ``package:path``."""

    stdlib: tuple[str, ...]
    packages: tuple[str, ...]
    data: tuple[str, ...]


def this_python() -> str:
    """Name the running Python as the record does: 3.11."""
    return ".".join(map(str, sys.version_info[:2]))


def load(path: Path = PATH, python: str = "") -> Record:
    """Read the record for the running Python. Raises ImageError: no record, or none of this version."""
    python = python or this_python()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stdlib, packages, data = content["stdlib"], content["packages"], content["data"]
        names = stdlib.get(python)
        if names is None:
            raise ImageError(
                "What the agent loads was not recorded with this version of Python.",
                code="footprint.python",
                expected=f"Python {' or '.join(stdlib)}",
                found=python,
                todo="Run kagimori-agent with one of them, or record: python -m kagimori_simulator.footprint_recorder",
            )
        return Record(tuple(names), tuple(packages), tuple(data))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(
            "The record of what the agent loads cannot be read.",
            code="footprint.record",
            expected=f"{path}, as the package has it",
            found=f"{type(error).__name__}: {error}",
            todo="Install Kagimori again.",
        ) from error
