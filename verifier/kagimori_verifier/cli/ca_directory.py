"""AMD's certificates in a directory, under any names: ARK, ASK and ASVK, and revocation lists.

What else lies there is passed over, and named: a directory that somebody fills by hand holds all sorts of things.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kagimori_protocol import certificate_table
from kagimori_protocol.errors import KagimoriError, Malformed, UsageError
from kagimori_verifier.cli.files import read_file
from kagimori_verifier.cli.verdict import read_artefact, readable
from kagimori_verifier.verify.certificate import Certificate, RevocationList

MAX_FILE: Final = 1 << 20
MAX_FILES: Final = 1000
"""Files that are looked at; whoever has more has named another directory than was meant."""
_BEGIN: Final = b"-----BEGIN "
_VEKS: Final = ("SEV-VCEK", "SEV-VLEK")


@dataclass(slots=True)
class Found:
    """Candidates as DER, and what a person should know of the rest."""

    certificates: list[bytes] = field(default_factory=list)
    revocation_lists: list[bytes] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_vek(path: Path) -> Found:
    """Read the certificate of a VCEK or VLEK, or the first such in a file of several. Raises UsageError."""
    what = "a certificate of a VCEK or VLEK, PEM or DER"
    raw = read_artefact(path, MAX_FILE, what)
    with readable(path, what):
        certificates = [Certificate.parse(certificate_table.to_der(block)) for block in _blocks(raw)]
    veks = [certificate for certificate in certificates if certificate.common_name in _VEKS]
    # Without any, the first is given all the same: the check says what was found in its place.
    chosen = (veks or certificates)[:1]
    found = Found([certificate.raw for certificate in chosen])
    if len(certificates) > 1:
        found.notes.append(
            f"{path}: of {len(certificates)} certificates, only one {chosen[0].common_name} counts"
        )
    return found


def read(directory: Path) -> Found:
    """Read what files of a directory, and of those below it, hold. Raises UsageError if it is none that can be read."""
    found = Found()
    for path in _files(directory, found):
        _add(found, path)
    return found


def _files(directory: Path, found: Found) -> list[Path]:
    def refuse(error: OSError) -> None:
        found.notes.append(f"{error.filename} is passed over: {error.strerror}")
        if error.filename is None or Path(error.filename) == directory:
            raise UsageError(
                f"{directory} cannot be read.",
                code="file.read",
                expected="a directory with certificates",
                found=error.strerror or str(error),
                todo="Name the directory that holds AMD's certificates.",
            ) from error

    paths: list[Path] = []
    try:
        for place, directories, names in os.walk(directory, onerror=refuse):
            directories.sort()
            paths += [Path(place, name) for name in sorted(names)]
            if len(paths) > MAX_FILES:
                raise UsageError(
                    f"{directory} holds too many files.",
                    code="file.count",
                    expected=f"at most {MAX_FILES}",
                    found="more",
                    todo="Name the directory that holds AMD's certificates, and nothing else.",
                )
    except ValueError as error:  # a zero byte in a path
        refuse(OSError(22, str(error), str(directory)))
    return paths


def _add(found: Found, path: Path) -> None:
    """Sort what one file holds; a file, or a part of one, that does not belong here is passed over."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would keep us waiting
            found.notes.append(f"{path} is passed over: it is no regular file")
            return
        raw = read_file(path, MAX_FILE)
    except OSError as error:
        found.notes.append(f"{path} is passed over: {error.strerror}")
        return
    except UsageError as error:
        found.notes.append(f"{path} is passed over: {error.what} Found: {error.found}.")
        return
    for block in _blocks(raw):
        try:
            _sort(found, path, certificate_table.to_der(block))
        except KagimoriError as error:
            found.notes.append(f"{path} is passed over: expected {error.expected}, found {error.found}")


def _sort(found: Found, path: Path, der: bytes) -> None:
    """Sort one certificate or revocation list. Raises Malformed or NotAuthentic for what is neither, or no CA's."""
    with contextlib.suppress(Malformed):
        RevocationList.parse(der)
        found.revocation_lists.append(der)
        return
    certificate = Certificate.parse(der)
    if certificate.common_name in _VEKS:
        found.notes.append(f"{path} is passed over: a {certificate.common_name} counts only as --vek")
        return
    certificate.require_ca()
    found.certificates.append(certificate.raw)


def _blocks(raw: bytes) -> list[bytes]:
    """Cut a file into its PEM blocks; what has none is one block, of DER perhaps."""
    return [_BEGIN + block for block in raw.split(_BEGIN)[1:]] or [raw]
