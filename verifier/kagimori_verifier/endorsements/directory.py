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
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from kagimori_protocol import certificate_table
from kagimori_protocol.errors import KagimoriError, Malformed, OperatorError
from kagimori_protocol.snp import CHIP_ID_SIZE, FIELDS, REPORT_SIZE
from kagimori_verifier.verify.certificate import Certificate
from kagimori_verifier.verify.snp import Endorsements

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_FILE: Final = 1 << 20


class EndorsementDirectory:
    """Endorsements kept in files. Implements the pipeline's EndorsementSource."""

    def __init__(self, root: Path) -> None:
        """Use ``root``; it is made at the first import."""
        self._root = root

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

        Returns a line about each for a person. Raises OperatorError for a file that holds none.
        """
        if len(raw) > MAX_FILE:
            raise _nothing_in(f"{len(raw)} bytes", f"at most {MAX_FILE} bytes")
        lines = [self._keep(der) for der in _ders(raw)]
        if not lines:
            raise _nothing_in(f"{len(raw)} bytes of something else")
        return lines

    def _keep(self, der: bytes) -> str:
        digest = hashlib.sha256(der).hexdigest()
        revocations = _revocation_list(der)
        if revocations is not None:
            self._write(f"crl/{digest}.der", der)
            return f"revocation list of {revocations.issuer.rfc4514_string()}, next update {revocations.next_update_utc}"
        certificate = Certificate.parse(der)
        name = certificate.common_name
        if name == "SEV-VCEK":
            tcb, hwid = certificate.tcb(), certificate.hwid() or b""
            chip = hwid + bytes(CHIP_ID_SIZE - len(hwid))
            self._write(f"vcek/{chip.hex()}/{tcb.pack().hex()}.der", der)
            return f"VCEK of chip {hwid.hex()} for {tcb}, valid until {certificate.valid_until:%Y-%m-%d}"
        if name == "SEV-VLEK":
            tcb = certificate.tcb()
            self._write(f"vlek/{tcb.pack().hex()}-{digest}.der", der)
            return f"VLEK of {certificate.csp_id()} for {tcb}, valid until {certificate.valid_until:%Y-%m-%d}"
        certificate.require_ca()
        self._write(f"ca/{digest}.der", der)
        return f"CA {name}, key SHA-256 {certificate.spki_sha256.hex()}"

    def _write(self, name: str, der: bytes) -> None:
        path = self._root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
                file.write(der)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, path)  # noqa: PTH105 - the name is a string, and the replacement atomic
        except OSError as error:
            raise OperatorError(
                "An endorsement cannot be kept.",
                code="endorsements.write",
                expected=f"a directory that can be written: {path.parent}",
                found=error.strerror,
            ) from error

    def _read_all(self, directory: str, prefix: str = "") -> list[bytes]:
        try:
            paths = sorted((self._root / directory).glob(f"{prefix}*.der"))
            return [path.read_bytes() for path in paths]
        except OSError as error:
            raise OperatorError(
                "A kept endorsement cannot be read.",
                code="endorsements.read",
                expected=f"files that can be read in {self._root / directory}",
                found=error.strerror,
            ) from error


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
    """Give each certificate or list in a file: PEM blocks, one DER, or the entries of a certificate table."""
    if b"-----BEGIN " in raw and not any(_entries(raw)):
        for block in raw.split(b"-----BEGIN ")[1:]:
            yield certificate_table.to_der(b"-----BEGIN " + block)
        return
    if _der(raw) is not None:
        yield certificate_table.to_der(raw)
        return
    for entry in _entries(raw):
        yield entry.der()


def _revocation_list(der: bytes) -> x509.CertificateRevocationList | None:
    try:
        parsed = x509.load_der_x509_crl(der)
    except ValueError:
        return None
    return parsed if parsed.public_bytes(Encoding.DER) == der else None


def _nothing_in(
    found: str, expected: str = "certificates or revocation lists (PEM or DER), or a table of them"
) -> KagimoriError:
    return OperatorError(
        "A file holds no endorsements.", code="endorsements.none", expected=expected, found=found
    )
