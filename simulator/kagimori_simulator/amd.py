"""A key hierarchy of its own that looks like AMD's: ARK -> ASK -> VCEK and ARK -> ASVK -> VLEK.

Names, extensions, algorithms and lifetimes are those of the real certificates (FORMATS section 5, AMD 57230); only the
keys differ. As at AMD's key service, a certificate may be made again and again, with new dates, over the same key: the
key depends on root, chip and TCB alone.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import os
import secrets
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID, ObjectIdentifier

from kagimori_protocol.errors import OperatorError, UsageError
from kagimori_protocol.snp import CHIP_ID_SIZE, TURIN_HWID_SIZE, TcbVersion

if TYPE_CHECKING:
    from collections.abc import Iterable

PRODUCTS: Final = ("Milan", "Genoa", "Turin")
"""Product lines with a root of their own; Bergamo and Siena use Genoa's."""

DEFAULT_CSP_ID: Final = "CN=cc-simulated.example.com"

_SERIAL_BASE: Final = {"Milan": 0x10000, "Genoa": 0x20000, "Turin": 0x30000}
_ASK_SERIAL: Final = {"Milan": 1, "Genoa": 2, "Turin": 1}
_ASVK_SERIAL: Final = 0x101
_VCEK_PRODUCT_NAME: Final = {"Milan": "Milan-B0", "Genoa": "Genoa", "Turin": "Turin"}

_CA_YEARS: Final = 25
_VCEK_YEARS: Final = 7
_VLEK_DAYS: Final = 365
_CRL_DAYS: Final = 365
_CLOCK_SKEW: Final = dt.timedelta(days=1)
"""Certificates start a day early, so that a fresh root is valid on every machine of a test."""

_AMD_OID: Final = "1.3.6.1.4.1.3704.1"
_IA5_STRING: Final = 0x16
_INTEGER: Final = 0x02
_DER_SHORT_FORM: Final = 0x80

_P384_ORDER: Final = int(
    "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16
)
_PSS: Final = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=hashes.SHA384.digest_size)
_KEY_LABEL: Final = b"kagimori-simulator/1/vek"
_SEED_SIZE: Final = 32


@dataclass(frozen=True)
class Vek:
    """A versioned endorsement key (VCEK or VLEK) with its certificate; it signs reports."""

    certificate_der: bytes
    private_key: ec.EllipticCurvePrivateKey = field(repr=False)

    def sign(self, message: bytes) -> tuple[int, int]:
        """Sign with ECDSA P-384 over SHA-384; returns (r, s)."""
        return decode_dss_signature(self.private_key.sign(message, ec.ECDSA(hashes.SHA384())))


@dataclass(frozen=True)
class _Authority:
    """One of the three RSA keys with its certificate."""

    certificate: x509.Certificate
    key: rsa.RSAPrivateKey = field(repr=False)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)


@dataclass(frozen=True)
class AmdRoot:
    """The whole hierarchy of one product line: ``Milan``, ``Genoa`` or ``Turin``."""

    product: str
    ark: _Authority
    ask: _Authority
    asvk: _Authority
    seed: bytes = field(repr=False)

    @classmethod
    def create(cls, product: str = "Milan") -> AmdRoot:
        """Make three new RSA-4096 keys and their certificates; takes seconds. Raises UsageError."""
        if product not in PRODUCTS:
            raise UsageError("No such product line.", expected=" or ".join(PRODUCTS), found=product)
        with ThreadPoolExecutor() as threads:  # making a key releases the interpreter's lock
            ark_key, ask_key, asvk_key = threads.map(lambda _: _rsa_key(), range(3))
        ark = _authority(product, "ARK", ark_key, None)
        return cls(
            product=product,
            ark=ark,
            ask=_authority(product, "SEV", ask_key, ark),
            asvk=_authority(product, "SEV-VLEK", asvk_key, ark),
            seed=secrets.token_bytes(_SEED_SIZE),
        )

    @classmethod
    def cached(cls, directory: Path, product: str = "Milan") -> AmdRoot:
        """Load the product's root from ``directory``, or make it there first; many processes may call this at once."""
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / product.lower()
        with (directory / f"{product.lower()}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=directory) as unfinished:
                    made = Path(unfinished) / "root"
                    cls.create(product).save(made)
                    made.rename(target)
        return cls.load(target)

    def save(self, directory: Path) -> None:
        """Write certificates (DER) and private keys (PEM, mode 0600) into ``directory``, which is made."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "product").write_text(self.product + "\n")
        for name, authority in (("ark", self.ark), ("ask", self.ask), ("asvk", self.asvk)):
            (directory / f"{name}.der").write_bytes(authority.der)
            _write_private(directory / f"{name}.key.pem", _pem(authority.key))
        _write_private(directory / "vek.seed", self.seed)

    @classmethod
    def load(cls, directory: Path) -> AmdRoot:
        """Read back what ``save`` wrote. Raises OperatorError if it is not whole."""
        try:
            return cls(
                product=(directory / "product").read_text().strip(),
                ark=_load_authority(directory, "ark"),
                ask=_load_authority(directory, "ask"),
                asvk=_load_authority(directory, "asvk"),
                seed=(directory / "vek.seed").read_bytes(),
            )
        except (OSError, ValueError) as error:
            raise OperatorError(
                "A simulated root cannot be read.",
                code="simulator.root",
                expected=f"product, ark, ask, asvk (.der and .key.pem) and vek.seed in {directory}",
                found=str(error),
                todo="Delete the directory, and it is made again.",
            ) from error

    @property
    def ark_der(self) -> bytes:
        """The root's certificate."""
        return self.ark.der

    @property
    def ask_der(self) -> bytes:
        """The certificate that signs VCEKs."""
        return self.ask.der

    @property
    def asvk_der(self) -> bytes:
        """The certificate that signs VLEKs."""
        return self.asvk.der

    def vcek(self, chip_id: bytes, tcb: bytes, *, not_before: dt.datetime | None = None) -> Vek:
        """Issue a VCEK certificate for one chip (64 bytes) at one REPORTED_TCB (8 bytes). Raises UsageError.

        AMD's service has a clock of its own, whatever that of the machine says which asks: the certificate is as old as
        the key that signs it, unless told otherwise.
        """
        hwid_size = TURIN_HWID_SIZE if self.product == "Turin" else CHIP_ID_SIZE
        if len(chip_id) != CHIP_ID_SIZE or any(chip_id[hwid_size:]):
            raise UsageError(
                "That is no CHIP_ID of this product line.",
                expected=f"{CHIP_ID_SIZE} bytes, zero after the first {hwid_size}",
                found=chip_id.hex(),
            )
        hwid = chip_id[:hwid_size]
        key = self._vek_key(b"vcek", hwid, tcb)
        name = _VCEK_PRODUCT_NAME[self.product]
        extensions = [*self._tcb_extensions(name, tcb), (f"{_AMD_OID}.4", hwid)]
        start = not_before or self.ask.certificate.not_valid_before_utc
        certificate = self._issue_vek("SEV-VCEK", self.ask, key, extensions, start)
        return Vek(certificate, key)

    def vlek(self, tcb: bytes, csp_id: str = DEFAULT_CSP_ID, *, not_before: dt.datetime | None = None) -> Vek:
        """Issue a VLEK certificate for a cloud provider at one REPORTED_TCB (8 bytes). Raises UsageError."""
        key = self._vek_key(b"vlek", csp_id.encode(), tcb)
        extensions = [*self._tcb_extensions(self.product, tcb), (f"{_AMD_OID}.5", _ia5(csp_id))]
        return Vek(self._issue_vek("SEV-VLEK", self.asvk, key, extensions, not_before), key)

    def crl(self, revoked: Iterable[int] = (), *, last_update: dt.datetime | None = None) -> bytes:
        """Let the ARK sign a revocation list (DER) that names CA certificates by serial number; it is due in a year.

        AMD lists ASK and ASVK like this; no single VCEK can be listed, as all have serial number 0.
        """
        start = last_update or _now()
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.ark.certificate.subject)
            .last_update(start)
            .next_update(start + dt.timedelta(days=_CRL_DAYS))
        )
        for serial in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(start).build()
            builder = builder.add_revoked_certificate(entry)
        signed = builder.sign(self.ark.key, hashes.SHA384(), rsa_padding=_PSS)
        return signed.public_bytes(serialization.Encoding.DER)

    def _vek_key(self, kind: bytes, owner: bytes, tcb: bytes) -> ec.EllipticCurvePrivateKey:
        """Derive the key that this chip (or provider) has at this TCB. 64 bits more than the order leave no bias."""
        info = b"\x00".join((_KEY_LABEL, kind, owner, tcb))
        wide = HKDF(algorithm=hashes.SHA384(), length=56, salt=None, info=info).derive(self.seed)
        return ec.derive_private_key(int.from_bytes(wide, "big") % (_P384_ORDER - 1) + 1, ec.SECP384R1())

    def _tcb_extensions(self, product_name: str, tcb: bytes) -> list[tuple[str, bytes]]:
        """Give structVersion, productName and the SPLs in AMD's order: Turin has FMC (.9) and no reserved .4."""
        turin = self.product == "Turin"
        parts = TcbVersion.parse(tcb, turin=turin)
        spl = {1: parts.boot_loader, 2: parts.tee, 3: parts.snp, 8: parts.microcode}
        order = (9, 1, 2, 3, 5, 6, 7, 8) if turin else (1, 2, 4, 5, 6, 7, 3, 8)
        if parts.fmc is not None:
            spl[9] = parts.fmc
        return [
            (f"{_AMD_OID}.1", _integer(int(turin))),
            (f"{_AMD_OID}.2", _ia5(product_name)),
            *((f"{_AMD_OID}.3.{number}", _integer(spl.get(number, 0))) for number in order),
        ]

    def _issue_vek(
        self,
        common_name: str,
        issuer: _Authority,
        key: ec.EllipticCurvePrivateKey,
        extensions: list[tuple[str, bytes]],
        not_before: dt.datetime | None,
    ) -> bytes:
        start = not_before or _now()
        end = (
            start + dt.timedelta(days=_VLEK_DAYS)
            if common_name == "SEV-VLEK"
            else _years_after(start, _VCEK_YEARS)
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(common_name))
            .issuer_name(issuer.certificate.subject)
            .public_key(key.public_key())
            .serial_number(_PLACEHOLDER_SERIAL)
            .not_valid_before(start)
            .not_valid_after(end)
        )
        for oid, value in extensions:
            builder = builder.add_extension(
                x509.UnrecognizedExtension(ObjectIdentifier(oid), value), critical=False
            )
        certificate = builder.sign(issuer.key, hashes.SHA384(), rsa_padding=_PSS)
        return _with_serial_zero(certificate, issuer.key)


_PLACEHOLDER_SERIAL: Final = 1
_VERSION_AND_SERIAL: Final = bytes.fromhex("a003020102 020101")
"""DER of [0] { INTEGER 2 } (X.509 version 3) and of the placeholder INTEGER 1."""


def _with_serial_zero(certificate: x509.Certificate, issuer_key: rsa.RSAPrivateKey) -> bytes:
    """Turn the placeholder serial number into AMD's 0 and sign again; returns DER.

    The builder of ``cryptography`` rightly refuses 0 (RFC 5280 forbids it), but every VCEK has it. INTEGER 1 and INTEGER 0
    are one byte each, and an RSA signature always has the modulus's size, so no length changes: one byte of the
    TBSCertificate and the signature at the very end are replaced.
    """
    der = certificate.public_bytes(serialization.Encoding.DER)
    tbs = bytearray(certificate.tbs_certificate_bytes)
    serial_at = tbs.index(_VERSION_AND_SERIAL) + len(_VERSION_AND_SERIAL) - 1
    tbs[serial_at] = 0
    signature = issuer_key.sign(bytes(tbs), _PSS, hashes.SHA384())
    head, tail = der.split(certificate.tbs_certificate_bytes, 1)
    return head + bytes(tbs) + tail[: -len(signature)] + signature


def _rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=4096)


def _authority(product: str, kind: str, key: rsa.RSAPrivateKey, parent: _Authority | None) -> _Authority:
    """Make a key's certificate; without a parent it signs itself. Extensions in AMD's order."""
    subject = _name(f"{kind}-{product}")
    start = _now()
    serial = {"ARK": 0, "SEV": _ASK_SERIAL[product], "SEV-VLEK": _ASVK_SERIAL}[kind]
    skid = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    line = "vlek" if kind == "SEV-VLEK" else "vcek"
    crl_url = x509.UniformResourceIdentifier(f"https://kdsintf.amd.com/{line}/v1/{product}/crl")
    crl = x509.CRLDistributionPoints([x509.DistributionPoint([crl_url], None, None, None)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(parent.certificate.subject if parent else subject)
        .public_key(key.public_key())
        .serial_number(_SERIAL_BASE[product] + serial)
        .not_valid_before(start)
        .not_valid_after(_years_after(start, _CA_YEARS))
    )
    if parent is None:
        builder = (
            builder.add_extension(_key_usage(crl_sign=True), critical=True)
            .add_extension(skid, critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        )
    else:
        parent_skid = parent.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        akid = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(parent_skid)
        builder = (
            builder.add_extension(skid, critical=False)
            .add_extension(akid, critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(crl_sign=False), critical=True)
        )
    signer = parent.key if parent else key
    certificate = builder.add_extension(crl, critical=False).sign(signer, hashes.SHA384(), rsa_padding=_PSS)
    return _Authority(certificate, key)


def _name(common_name: str) -> x509.Name:
    """Give AMD's distinguished name, in the order of the real certificates."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Engineering"),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
            x509.NameAttribute(NameOID.LOCALITY_NAME, "Santa Clara"),
            x509.NameAttribute(NameOID.STATE_OR_PROVINCE_NAME, "CA"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Advanced Micro Devices"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _key_usage(*, crl_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC).replace(microsecond=0) - _CLOCK_SKEW


def _years_after(start: dt.datetime, years: int) -> dt.datetime:
    """Give the same date years later, as AMD does; 29 February ends on 28 February."""
    day = 28 if (start.month, start.day) == (2, 29) else start.day
    return start.replace(year=start.year + years, day=day)


def _integer(value: int) -> bytes:
    """Encode a small number as DER INTEGER: above 127 it takes a leading zero byte."""
    body = value.to_bytes(value.bit_length() // 8 + 1, "big")
    return bytes([_INTEGER, len(body)]) + body


def _ia5(text: str) -> bytes:
    """Encode a short text as DER IA5String. Raises UsageError if it is not ASCII or too long for the short form."""
    body = text.encode("ascii", errors="replace")
    if len(body) >= _DER_SHORT_FORM or not text.isascii():
        raise UsageError(
            "That text cannot stand in a certificate.", expected="ASCII, under 128 bytes", found=repr(text)
        )
    return bytes([_IA5_STRING, len(body)]) + body


def _pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can ever read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _load_authority(directory: Path, name: str) -> _Authority:
    pem = (directory / f"{name}.key.pem").read_bytes()
    # Proving again that the primes are prime takes a second, and we made them ourselves.
    key = serialization.load_pem_private_key(pem, password=None, unsafe_skip_rsa_key_validation=True)
    if not isinstance(key, rsa.RSAPrivateKey):
        message = f"{name}.key.pem holds no RSA key"
        raise ValueError(message)  # noqa: TRY004 - the caller names one failure for every file that is not what it should be
    return _Authority(x509.load_der_x509_certificate((directory / f"{name}.der").read_bytes()), key)
