"""AMD's certificates: read them, check who signed them, read AMD's own extensions.

Every VCEK and VLEK has the serial number 0, which RFC 5280 forbids; `cryptography` warns of it and may refuse
it one day. ``Certificate.parse`` is the one place that knows: signatures are checked over the bytes as they
are, and if the library refuses the serial number, a copy with the number 1 is read for its fields. Source:
AMD 57230 (VCEK certificate and KDS interface), tables "VCEK certificate" and "OIDs".
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kagimori_protocol.errors import Malformed, NotAuthentic
from kagimori_protocol.snp import TcbVersion
from kagimori_verifier.verify import der

if TYPE_CHECKING:
    from datetime import datetime

MAX_CERTIFICATE: Final = 8192
CA_KEY_BITS: Final = 4096
_PSS_SALT: Final = 48

UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""All that `cryptography` raises for certificates and revocation lists that it cannot read."""

_AMD: Final = "1.3.6.1.4.1.3704.1."
_OID_PRODUCT: Final = _AMD + "2"
_OID_HWID: Final = _AMD + "4"
_OID_CSP: Final = _AMD + "5"
_OID_BOOT_LOADER: Final = _AMD + "3.1"
_OID_TEE: Final = _AMD + "3.2"
_OID_SNP: Final = _AMD + "3.3"
_OID_MICROCODE: Final = _AMD + "3.8"
_OID_FMC: Final = _AMD + "3.9"


@dataclass(frozen=True)
class Certificate:
    """One certificate: the bytes that were signed, the signature, and the fields as `cryptography` reads them.

    What is asked of it again and again is read once, since a certificate may be kept (``memory``).
    """

    raw: bytes
    tbs: bytes
    signature: bytes
    fields: x509.Certificate

    @classmethod
    def parse(cls, raw: bytes) -> Certificate:
        """Read one DER certificate and nothing after it. Raises Malformed."""
        if len(raw) > MAX_CERTIFICATE:
            raise _broken(f"at most {MAX_CERTIFICATE} bytes", f"{len(raw)} bytes")
        tbs, signature = der.split_certificate(raw)
        try:
            fields = _load(raw)
        except UNREADABLE as error:
            raise _broken("an X.509 certificate", str(error)) from None
        return cls(raw=raw, tbs=tbs, signature=signature, fields=fields)

    @cached_property
    def common_name(self) -> str:
        """The subject's common name, e.g. ``SEV-VCEK``; empty where there is not exactly one."""
        names = self.fields.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return str(names[0].value) if len(names) == 1 else ""

    @cached_property
    def spki_sha256(self) -> bytes:
        """SHA-256 of the SubjectPublicKeyInfo: what roots are pinned by, since certificates are re-issued."""
        spki = self.fields.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return hashlib.sha256(spki).digest()

    @cached_property
    def valid_from(self) -> datetime:
        """Start of validity, UTC."""
        return self.fields.not_valid_before_utc

    @cached_property
    def valid_until(self) -> datetime:
        """End of validity, UTC."""
        return self.fields.not_valid_after_utc

    def require_signed_by(self, issuer: Certificate) -> Certificate:
        """Return this certificate if ``issuer``, a CA of AMD's form, signed it.

        AMD's CAs sign with RSA-4096, RSASSA-PSS, SHA-384, MGF1 with SHA-384 and a salt of 48 bytes. Raises
        NotAuthentic.
        """
        key = issuer.require_ca()
        if self.fields.issuer != issuer.fields.subject:
            raise _unsigned(f"issuer {issuer.common_name}", self.fields.issuer.rfc4514_string())
        _require_pss(self.fields.signature_algorithm_parameters, self.fields.signature_hash_algorithm)
        verify_pss(key, self.signature, self.tbs, f"a signature by {issuer.common_name}")
        return self

    def require_ca(self) -> rsa.RSAPublicKey:
        """Return the key if this is a CA certificate of AMD's form; raise NotAuthentic if not."""
        key = self.fields.public_key()
        if not isinstance(key, rsa.RSAPublicKey) or key.key_size != CA_KEY_BITS:
            raise _unsigned(
                f"a CA with an RSA key of {CA_KEY_BITS} bits", f"another key in {self.common_name!r}"
            )
        try:
            constraints = self.fields.extensions.get_extension_for_class(x509.BasicConstraints).value
            usage = self.fields.extensions.get_extension_for_class(x509.KeyUsage).value
        except x509.ExtensionNotFound as error:
            raise _unsigned("a CA certificate", str(error)) from None
        if not constraints.ca or not usage.key_cert_sign:
            raise _unsigned("a CA certificate that may sign certificates", f"{self.common_name!r} may not")
        return key

    def vek_key(self) -> ec.EllipticCurvePublicKey:
        """Return the P-384 key of a VCEK or VLEK; raise NotAuthentic for any other."""
        key = self.fields.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
            raise _unsigned("an EC key on P-384", f"another key in {self.common_name!r}")
        return key

    def product_line(self) -> str:
        """AMD's productName without its stepping: ``Milan-B0`` is ``Milan``. Raises Malformed."""
        return der.ia5_string(self._extension(_OID_PRODUCT)).partition("-")[0]

    def hwid(self) -> bytes | None:
        """The chip's id: 64 bytes, 8 on Turin; None in a VLEK. It stands bare, without an OCTET STRING around it."""
        return self._extension(_OID_HWID) if self._has(_OID_HWID) else None

    def csp_id(self) -> str | None:
        """The cloud provider that a VLEK was lent to; None in a VCEK. Raises Malformed."""
        return der.ia5_string(self._extension(_OID_CSP)) if self._has(_OID_CSP) else None

    def tcb(self) -> TcbVersion:
        """The TCB version that a VCEK or VLEK was derived for; FMC where the certificate has it. Raises Malformed."""
        return TcbVersion(
            fmc=self._spl(_OID_FMC) if self._has(_OID_FMC) else None,
            boot_loader=self._spl(_OID_BOOT_LOADER),
            tee=self._spl(_OID_TEE),
            snp=self._spl(_OID_SNP),
            microcode=self._spl(_OID_MICROCODE),
        )

    def _spl(self, oid: str) -> int:
        value = der.small_integer(self._extension(oid))
        if value > 0xFF:  # noqa: PLR2004 - a security version number is one byte
            raise _broken("a security version number of one byte", str(value))
        return value

    @cached_property
    def _extensions(self) -> dict[str, x509.ExtensionType]:
        return {extension.oid.dotted_string: extension.value for extension in self.fields.extensions}

    def _has(self, oid: str) -> bool:
        return oid in self._extensions

    def _extension(self, oid: str) -> bytes:
        value = self._extensions.get(oid)
        if isinstance(value, x509.UnrecognizedExtension):
            return value.value
        raise _broken(f"AMD's extension {oid}", "none")


@dataclass(frozen=True, slots=True)
class RevocationList:
    """One revocation list: its bytes, and what is asked of it. ``next_update`` is None where it does not say."""

    raw: bytes
    issuer: x509.Name
    last_update: datetime
    next_update: datetime | None
    fields: x509.CertificateRevocationList

    @classmethod
    def parse(cls, raw: bytes) -> RevocationList:
        """Read one list in DER and nothing after it. Raises Malformed."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names that whoever sent it made up
                fields = x509.load_der_x509_crl(raw)
                # The library reads these when they are asked for, each time anew; here, once.
                parsed = cls(raw, fields.issuer, fields.last_update_utc, fields.next_update_utc, fields)
            whole = fields.public_bytes(Encoding.DER) == raw
        except UNREADABLE as error:
            raise _broken("an X.509 revocation list", str(error)) from None
        if not whole:
            raise _broken("one revocation list in DER and nothing after it", "another encoding of the same")
        return parsed

    def require_signed_by(self, ark: Certificate) -> RevocationList:
        """Return this list if ``ark`` issued and signed it, as AMD's ARKs do. Raises PeerError."""
        key = ark.require_ca()
        if self.issuer != ark.fields.subject:
            raise _unsigned(f"issuer {ark.common_name}", self.issuer.rfc4514_string())
        _, signature = der.split_certificate(self.raw)
        verify_pss(key, signature, self.fields.tbs_certlist_bytes, f"a signature by {ark.common_name}")
        return self

    def revokes(self, serial_number: int) -> bool:
        """Tell whether the list names a certificate of its issuer by this serial number."""
        return self.fields.get_revoked_certificate_by_serial_number(serial_number) is not None


def verify_pss(key: rsa.RSAPublicKey, signature: bytes, message: bytes, expected: str) -> None:
    """Check an RSASSA-PSS signature in AMD's parameters; raise NotAuthentic if it does not verify."""
    scheme = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=_PSS_SALT)
    try:
        key.verify(signature, message, scheme, hashes.SHA384())
    except InvalidSignature:
        raise _unsigned(expected, "one that does not verify") from None


def _require_pss(parameters: object, hash_algorithm: object) -> None:
    if not isinstance(parameters, padding.PSS) or not isinstance(hash_algorithm, hashes.SHA384):
        raise _unsigned("RSASSA-PSS with SHA-384", "another signature algorithm")


def _load(raw: bytes) -> x509.Certificate:
    """Load a certificate although its serial number may be 0, and read all of it that is read later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the serial number, and of names that whoever sent it made up
        try:
            fields = x509.load_der_x509_certificate(raw)
        except ValueError:
            renumbered = der.with_serial_number_one(raw)
            if renumbered is None:
                raise
            fields = x509.load_der_x509_certificate(renumbered)
        # Read lazily by the library, and refused here rather than in the middle of a check.
        _ = (fields.issuer, fields.subject, fields.extensions, fields.not_valid_before_utc)
        _ = (fields.not_valid_after_utc, fields.public_key())
        _ = (fields.signature_hash_algorithm, fields.signature_algorithm_parameters)
    return fields


def _broken(expected: str, found: str) -> Malformed:
    return Malformed(
        "A certificate cannot be read.", code="certificate.layout", expected=expected, found=found
    )


def _unsigned(expected: str, found: str) -> NotAuthentic:
    return NotAuthentic(
        "A certificate does not chain.", code="certificate.chain", expected=expected, found=found
    )
