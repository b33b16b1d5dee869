"""A directory of endorsements: CAs and revocation lists for all, chip certificates by chip and TCB.

::

    ca/<sha256>.der            ARK, ASK, ASVK
    crl/<sha256>.der           revocation lists
    vcek/<CHIP_ID>/<TCB>.der   by the report's CHIP_ID and REPORTED_TCB, in hex
    vlek/<TCB>-<sha256>.der

One file a certificate, written whole or not at all; re-importing changes nothing.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_protocol import certificate_table
from kagimori_protocol.errors import KagimoriError, Malformed, OperatorError, PeerError
from kagimori_protocol.snp import CHIP_ID_SIZE, FIELDS, REPORT_SIZE
from kagimori_verifier.verify.certificate import Certificate, RevocationList
from kagimori_verifier.verify.snp import Endorsements

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_FILE: Final = 1 << 20
UNFINISHED: Final = ".new-"
"""How directories begin in which files are being written, or were when somebody was killed."""
_WANTED: Final = "certificates or revocation lists (PEM or DER), or a table of them"


class EndorsementDirectory:
    """Endorsements kept in files. Implements the pipeline's EndorsementSource."""

    def __init__(self, root: Path) -> None:
        """Use ``root``; it is made at the first import."""
        self._root = root
        self._read: dict[str, tuple[tuple[int, ...], bytes]] = {}

    def find(self, report: bytes, carried: bytes) -> Endorsements:
        """Give every candidate for this report: those carried (a certificate table) and those kept here.

        A table that cannot be read has no candidates in it: the host made it, and the chain decides.
        Raises OperatorError if a kept file cannot be read.
        """
        certificates: list[bytes] = []
        lists: list[bytes] = []
        for entry in _entries(carried):
            (lists if entry.guid == certificate_table.CRL else certificates).append(entry.payload)
        certificates = [der for payload in certificates if (der := _der(payload)) is not None]
        lists = [der for payload in lists if (der := _der(payload)) is not None]
        certificates += self._read_all("ca")
        certificates += self._read_all("vlek", prefix=_part(report, "reported_tcb").hex())
        certificates += self._read_all(
            f"vcek/{_part(report, 'chip_id').hex()}", prefix=_part(report, "reported_tcb").hex()
        )
        lists += self._read_all("crl")
        return Endorsements(certificates=certificates, revocation_lists=lists)

    def add(self, raw: bytes) -> list[str]:
        """Keep what a file holds: one or more certificates or revocation lists, PEM or DER, or a certificate table.

        Returns a line about each for a person. Raises OperatorError for a file that holds none, or anything else;
        then nothing of it is kept.
        """
        if len(raw) > MAX_FILE:
            raise _nothing_in(f"{len(raw)} bytes", f"at most {MAX_FILE} bytes")
        try:
            placed = [(der, *_place(der)) for der in _ders(raw)]
        except PeerError as error:
            raise _nothing_in(error.found or error.what, error.expected or _WANTED) from error
        if not placed:
            raise _nothing_in(f"{len(raw)} bytes of something else")
        for der, name, _ in placed:
            self._write(name, der)
        return [line for _, _, line in placed]

    def _write(self, name: str, der: bytes) -> None:
        path = self._root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Only what is whole gets its name; whatever happens, nothing unfinished stays.
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as unfinished:
                new = Path(unfinished) / path.name
                with new.open("wb") as file:
                    file.write(der)
                    file.flush()
                    os.fsync(file.fileno())
                new.replace(path)
        except OSError as error:
            raise OperatorError(
                "An endorsement cannot be kept.",
                code="endorsements.write",
                expected=f"a directory that can be written: {path.parent}",
                found=error.strerror,
                todo="Root writes there as the user whose verifier.toml it is: let all beside that belong to this user.",
            ) from error

    def _read_all(self, directory: str, prefix: str = "") -> list[bytes]:
        path = f"{self._root}/{directory}"
        try:
            try:
                entries = os.scandir(path)
            except FileNotFoundError:
                return []  # nothing has been kept there yet
            with entries:
                named = [one for one in entries if one.name.startswith(prefix) and one.name.endswith(".der")]
            return [self._read_one(one) for one in sorted(named, key=lambda one: one.name)]
        except OSError as error:
            raise OperatorError(
                "A kept endorsement cannot be read.",
                code="endorsements.read",
                expected=f"files that can be read in {path}",
                found=error.strerror,
            ) from error

    def _read_one(self, entry: os.DirEntry[str]) -> bytes:
        """Read a file, unless it is the very file that was read before: same inode, size and times of change."""
        facts = entry.stat()
        identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        known = self._read.get(entry.path)
        if known is None or known[0] != identity:
            known = self._read[entry.path] = (identity, Path(entry.path).read_bytes())
        return known[1]


def _part(report: bytes, field: str) -> bytes:
    """Cut a field out of a report that has not been parsed yet; nothing, where it has another size."""
    offset, size = FIELDS[field]
    return report[offset : offset + size] if len(report) == REPORT_SIZE else b""


def _entries(carried: bytes) -> tuple[certificate_table.Entry, ...]:
    try:
        return certificate_table.parse(carried)
    except Malformed:
        return ()


def _der(payload: bytes) -> bytes | None:
    try:
        return certificate_table.to_der(payload)
    except Malformed:
        return None


def _ders(raw: bytes) -> Iterator[bytes]:
    """Give each certificate or list in a file: the entries of a certificate table, PEM blocks, or one DER."""
    if entries := _entries(raw):
        # Asked first: a table's entries may be PEM, so that it looks like PEM with text in front.
        yield from (entry.der() for entry in entries if entry.guid in certificate_table.NAMES)
    elif b"-----BEGIN " in raw:
        for block in raw.split(b"-----BEGIN ")[1:]:
            yield certificate_table.to_der(b"-----BEGIN " + block)
    elif (der := _der(raw)) is not None:
        yield der


def _place(der: bytes) -> tuple[str, str]:
    """Tell where a certificate or list belongs, and describe it for a person. Raises PeerError for anything else."""
    digest = hashlib.sha256(der).hexdigest()
    revocations = _revocation_list(der)
    if revocations is not None:
        issuer, due = revocations.issuer.rfc4514_string(), revocations.next_update
        return f"crl/{digest}.der", f"revocation list of {issuer}, next update {due}"
    certificate = Certificate.parse(der)
    name, until = certificate.common_name, f"valid until {certificate.valid_until:%Y-%m-%d}"
    if name == "SEV-VCEK":
        tcb, hwid = certificate.tcb(), certificate.hwid() or b""
        chip = hwid.ljust(CHIP_ID_SIZE, b"\x00")
        return f"vcek/{chip.hex()}/{tcb.pack().hex()}.der", f"VCEK of chip {hwid.hex()} for {tcb}, {until}"
    if name == "SEV-VLEK":
        tcb = certificate.tcb()
        return f"vlek/{tcb.pack().hex()}-{digest}.der", f"VLEK of {certificate.csp_id()} for {tcb}, {until}"
    certificate.require_ca()
    return f"ca/{digest}.der", f"CA {name}, key SHA-256 {certificate.spki_sha256.hex()}"


def _revocation_list(der: bytes) -> RevocationList | None:
    try:
        return RevocationList.parse(der)
    except Malformed:
        return None


def _nothing_in(found: str, expected: str = _WANTED) -> KagimoriError:
    return OperatorError(
        "A file holds no endorsements.", code="endorsements.none", expected=expected, found=found
    )
