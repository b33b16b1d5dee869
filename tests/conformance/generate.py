"""Write every vector of our own again: ``python -m tests.conformance.generate`` from the project's root.

Nothing of the project's packages is imported, and nothing is left to chance: what is written follows from the words of
docs/protocol.md and from the published vector in ``published/``. A test holds that writing it again changes nothing.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final

from tests.conformance.making import (
    certificates,
    enrol,
    exchange,
    header,
    messages,
    replies,
    sealing,
    tie,
    tpm,
    vector,
)

VECTORS: Final = Path(__file__).parent / "vectors"
AREAS: Final = (tie, replies, sealing, messages, tpm, certificates, enrol, exchange, header)


def made() -> dict[str, bytes]:
    """Give every file of the tree, by its path in it."""
    return vector.tree(one for area in AREAS for one in area.vectors())


def write(directory: Path) -> int:
    """Write the tree into a directory, in place of what is there; gives the number of files."""
    files = made()
    if directory.exists():
        shutil.rmtree(directory)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return len(files)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if sys.argv[1:] else VECTORS
    sys.stdout.write(f"{write(target)} files in {target}\n")
