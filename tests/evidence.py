"""Recorded evidence and the commands that check it, for the tests of both."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.desks import Done, run

_NAMED = os.environ.get("KAGIMORI_VECTORS")
DIRECTORY: Final = Path(_NAMED) if _NAMED else Path(__file__).parents[2] / "shared" / "vectors"
INDEX: Final = DIRECTORY / "INDEX.json"
ENTRIES: Final[list[dict[str, Any]]] = json.loads(INDEX.read_text()) if INDEX.exists() else []


AZURE_VARIABLES: Final = 0x4D4


@dataclass
class Case:
    """One entry of the index, and the command line to try it with."""

    entry: dict[str, Any]
    tmp: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def path(self) -> Path:
        """Give the artefact."""
        return DIRECTORY / str(self.entry["file"])

    def run(self, *words: str | Path) -> Done:
        """Run a verb as a program would."""
        done = run(self.capsys, *words, "--json")
        assert "Traceback" not in done.err
        return done

    def holds(self, *words: str | Path) -> Any:  # noqa: ANN401 - whatever JSON can hold
        """Run a verb whose artefact must hold, and give its JSON."""
        done = self.run(*words)
        assert (done.code, done.json["verified"], done.json["reasons"]) == (0, True, []), done.out
        return done.json

    def fails(self, reason: str, *words: str | Path, code: int = 1) -> Any:  # noqa: ANN401 - as above
        """Run a verb whose artefact must be refused, for a reason that begins like this."""
        done = self.run(*words)
        assert (done.code, done.json["verified"]) == (code, False), done.out
        assert any(told.startswith(reason) for told in done.json["reasons"]), done.json["reasons"]
        return done.json

    def written(self, name: str, content: bytes) -> Path:
        """Write a file."""
        path = self.tmp / name
        path.write_bytes(content)
        return path


def azure_ak(hcl: bytes) -> bytes:
    """Give the AK that an HCL report vouches for, as PEM; it stands there as a JWK."""
    size = int.from_bytes(hcl[AZURE_VARIABLES - 4 : AZURE_VARIABLES], "little")
    variables = json.loads(hcl[AZURE_VARIABLES : AZURE_VARIABLES + size])
    (key,) = (key for key in variables["keys"] if key["kid"] == "HCLAkPub")
    n, e = (
        int.from_bytes(base64.urlsafe_b64decode(key[part] + "=" * (-len(key[part]) % 4)), "big")
        for part in ("n", "e")
    )
    return (
        rsa.RSAPublicNumbers(e, n).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
