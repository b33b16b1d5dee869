"""Search for an unlock key in whatever a boot has left behind."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.boot.variants import UUID
from tests.exchange.test_secrets import sightings

from kagimori_verifier.keystore.kek import FileKek
from kagimori_verifier.keystore.unlock_keys import UnlockKeys


def unlock_key(verifier: Path, vm_id: str) -> bytes:
    """Unwrap the key of a site's volume, as only its verifier can."""
    with closing(sqlite3.connect(f"file:{verifier / 'verifier.db'}?mode=ro", uri=True)) as database:
        ((wrapped, version),) = database.execute(
            "SELECT wrapped, version FROM volume WHERE uuid = ?", (UUID,)
        )
    return UnlockKeys(FileKek(verifier / "kek").read()).unwrap(wrapped, vm_id, UUID, version)


def sightings_in(key: bytes, path: Path) -> list[str]:
    """Tell in which forms a key stands in a file."""
    return sightings(key, path.name, path.read_bytes())


def verifiers_key_in(agent_toml: Path) -> bytes:
    """Give what agent.toml, and so every image, does hold: the verifier's public key as text."""
    match = re.search(r'keys = \["([^"]+)"', agent_toml.read_text(encoding="utf-8"))
    assert match is not None
    return match[1].encode()
