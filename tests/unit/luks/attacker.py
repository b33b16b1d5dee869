"""A host's tool for headers: it has an honest volume's device, knows the format, and has no key.

``Host`` writes what a host could: either copy, with whatever JSON, made right in all checksums; older headers that it kept;
other volumes' headers. That a header is sealed needs the unlock key, and so the owner.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.conformance.making.header import Json
from tests.unit.luks.headers import SIZE, one_copy, summed

from kagimori_protocol.luks2_layout import BINARY_SIZE, LuksHeader, parse


class Host:
    """Who owns the disk."""

    def __init__(self, device: Path) -> None:
        self.device = device

    def copy(self, offset: int) -> LuksHeader:
        """Read one copy."""
        raw = self.device.read_bytes()
        return parse(raw[offset : offset + SIZE], offset)

    def document(self) -> Json:
        """Give the JSON that the volume has, to be changed."""
        raw = self.device.read_bytes()[BINARY_SIZE:SIZE]
        document: Json = json.loads(raw.split(b"\0")[0])
        return document

    def kept(self) -> bytes:
        """Keep header and keyslots as they are, for later."""
        return self.device.read_bytes()[: 16 << 20]

    def write(self, offset: int, data: bytes) -> None:
        """Write anywhere."""
        with self.device.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def forge(
        self, edit: Callable[[Json], object], *, copies: tuple[int, ...] = (0, SIZE), newer: int = 0
    ) -> None:
        """Change the JSON in these copies, with right checksums, and count them ``newer``."""
        document = self.document()
        edit(document)
        self.put(json.dumps(document).encode(), copies=copies, newer=newer)

    def put(self, text: bytes, *, copies: tuple[int, ...] = (0, SIZE), newer: int = 0) -> None:
        """Write a JSON area into these copies, with right checksums."""
        honest = self.copy(0)
        for offset in copies:
            made = one_copy(
                text, secondary=offset != 0, seqid=honest.seqid + newer, uuid=honest.uuid.encode()
            )
            self.write(offset, summed(made))
