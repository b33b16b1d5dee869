"""The simulated root: certificates that differ from AMD's in their keys only."""

from __future__ import annotations

import datetime as dt
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol.errors import OperatorError, UsageError
from kagimori_simulator import amd
from kagimori_simulator.amd import PRODUCTS, AmdRoot

if TYPE_CHECKING:
    from pathlib import Path

# cryptography warns of every serial number 0; that is just what AMD's certificates have.
pytestmark = pytest.mark.filterwarnings("ignore:.*serial number.*")

MILAN_TCB = bytes([4, 0, 0, 0, 0, 0, 24, 219])
TURIN_TCB = bytes([1, 2, 3, 4, 0, 0, 0, 71])
CHIP = bytes(range(1, 65))
TURIN_CHIP = bytes(range(1, 9)) + bytes(56)


@pytest.fixture(scope="module")
def root(cache: Path) -> AmdRoot:
    """Give the run's Milan root."""
    return AmdRoot.cached(cache / "amd")


@pytest.fixture(scope="module")
def turin(cache: Path) -> AmdRoot:
    """Give the run's Turin root."""
    return AmdRoot.cached(cache / "amd", "Turin")


def load(der: bytes) -> x509.Certificate:
    """Load a certificate."""
    return x509.load_der_x509_certificate(der)


def verify_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    """Check names and RSA-PSS signature by hand."""
    assert certificate.issuer == issuer.subject
    key = issuer.public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    pss = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
    key.verify(certificate.signature, certificate.tbs_certificate_bytes, pss, hashes.SHA384())


def structure(certificate: x509.Certificate) -> dict[str, object]:
    """Describe a certificate without its keys, dates and chip."""
    parameters = certificate.signature_algorithm_parameters
    assert isinstance(parameters, padding.PSS)
    key = certificate.public_key()
    extensions = []
    for extension in certificate.extensions:
        value = extension.value
        if isinstance(value, x509.UnrecognizedExtension):
            extensions.append(
                (extension.oid, extension.critical, value.value[:1] if len(value.value) < 8 else b"")
            )
        elif isinstance(value, x509.SubjectKeyIdentifier | x509.AuthorityKeyIdentifier):
            extensions.append((extension.oid, extension.critical, b""))
        else:
            extensions.append((extension.oid, extension.critical, value.public_bytes()))
    return {
        "version": certificate.version,
        "serial": certificate.serial_number,
        "subject": certificate.subject.public_bytes(),
        "issuer": certificate.issuer.public_bytes(),
        "hash": certificate.signature_hash_algorithm and certificate.signature_hash_algorithm.name,
        "salt": parameters._salt_length,
        "key": (type(key).__name__, getattr(key, "key_size", 0)),
        "years": certificate.not_valid_after_utc.year - certificate.not_valid_before_utc.year,
        "extensions": extensions,
    }


@pytest.mark.parametrize("product", ["Milan", "Turin"])
@pytest.mark.parametrize("name", ["ark", "ask", "asvk"])
def test_a_simulated_ca_certificate_has_the_structure_of_the_real_one(
    cache: Path, vectors: Path, product: str, name: str
) -> None:
    """Names, serial number, algorithms, lifetime and extensions, in order, are AMD's."""
    made = AmdRoot.cached(cache / "amd", product)
    real = load((vectors / f"amd-ca/{product.lower()}/{name}.der").read_bytes())
    assert structure(load(getattr(made, f"{name}_der"))) == structure(real)


@pytest.mark.parametrize(
    ("product", "real"), [("Milan", "milan-v2-vcek-120d77b2"), ("Turin", "turin-v5-vcek-3f44a09b")]
)
def test_a_simulated_vcek_has_the_structure_of_the_real_one(
    cache: Path, vectors: Path, product: str, real: str
) -> None:
    """The same extensions in the same order, non-critical, with the same tags; serial number 0; seven years."""
    made = AmdRoot.cached(cache / "amd", product)
    chip, tcb = (TURIN_CHIP, TURIN_TCB) if product == "Turin" else (CHIP, MILAN_TCB)
    vcek = load(made.vcek(chip, tcb).certificate_der)
    assert structure(vcek) == structure(load((vectors / f"snp/{real}/vcek.der").read_bytes()))
    assert vcek.serial_number == 0


def test_a_simulated_vlek_has_the_structure_of_the_real_one(root: AmdRoot, vectors: Path) -> None:
    """A provider instead of a chip, issued by the ASVK."""
    vlek = load(root.vlek(MILAN_TCB).certificate_der)
    assert structure(vlek) == structure(load((vectors / "snp/milan-v2-vlek-affb92f9/vlek.der").read_bytes()))


def values(certificate: x509.Certificate) -> dict[str, bytes]:
    """Give AMD's extensions by the end of their OID."""
    prefix = "1.3.6.1.4.1.3704.1."
    return {
        extension.oid.dotted_string.removeprefix(prefix): extension.value.public_bytes()
        for extension in certificate.extensions
    }


def test_a_vcek_states_chip_and_tcb_in_amds_encodings(root: AmdRoot, turin: AmdRoot) -> None:
    """HWID is raw, a part above 127 takes a zero byte in front, Turin has a short HWID, FMC, and no .3.4."""
    milan_values = values(load(root.vcek(CHIP, MILAN_TCB).certificate_der))
    assert milan_values["4"] == CHIP
    assert milan_values["2"] == b"\x16\x08Milan-B0"
    assert (milan_values["3.1"], milan_values["3.3"], milan_values["3.8"]) == (
        bytes.fromhex("020104"),
        bytes.fromhex("020118"),
        bytes.fromhex("020200db"),
    )
    turin_values = values(load(turin.vcek(TURIN_CHIP, TURIN_TCB).certificate_der))
    assert turin_values["4"] == TURIN_CHIP[:8]
    assert turin_values["1"] == bytes.fromhex("020101")
    assert [turin_values[f"3.{n}"][2] for n in (9, 1, 2, 3, 8)] == [1, 2, 3, 4, 71]
    assert "3.4" not in turin_values


def test_every_certificate_is_signed_by_the_one_above(root: AmdRoot) -> None:
    """ARK -> ASK -> VCEK and ARK -> ASVK -> VLEK, the ARK by itself."""
    ark, ask, asvk = load(root.ark_der), load(root.ask_der), load(root.asvk_der)
    verify_issued_by(ark, ark)
    verify_issued_by(ask, ark)
    verify_issued_by(asvk, ark)
    verify_issued_by(load(root.vcek(CHIP, MILAN_TCB).certificate_der), ask)
    verify_issued_by(load(root.vlek(MILAN_TCB, "CN=somewhere").certificate_der), asvk)


def test_a_certificate_is_issued_anew_over_the_same_key(root: AmdRoot) -> None:
    """As at AMD's key service, dates change and the key does not; another chip or TCB has another key."""
    early = dt.datetime(2024, 2, 29, tzinfo=dt.UTC)
    first, second = root.vcek(CHIP, MILAN_TCB), root.vcek(CHIP, MILAN_TCB, not_before=early)
    assert first.certificate_der != second.certificate_der
    assert load(second.certificate_der).not_valid_after_utc == dt.datetime(2031, 2, 28, tzinfo=dt.UTC)
    numbers = [
        vek.private_key.private_numbers().private_value
        for vek in (
            first,
            second,
            root.vcek(CHIP[::-1], MILAN_TCB),
            root.vcek(CHIP, bytes(8)),
            root.vlek(MILAN_TCB),
            root.vlek(MILAN_TCB, "CN=somewhere"),
        )
    ]
    assert numbers[0] == numbers[1]
    assert len(set(numbers)) == 5


def test_a_chips_certificate_does_not_follow_the_clock_of_whoever_asks_for_it(
    root: AmdRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest's clock is its host's to bend, and a guest that simulates its hardware would bend AMD's with it."""
    monkeypatch.setattr(amd, "_now", lambda: dt.datetime(2009, 1, 1, tzinfo=dt.UTC))
    certificate = load(root.vcek(bytes(64), bytes(8)).certificate_der)
    assert certificate.not_valid_before_utc == load(root.ask_der).not_valid_before_utc


def test_a_vek_signs_what_its_certificate_verifies(root: AmdRoot) -> None:
    """The signature is ECDSA P-384 over SHA-384."""
    vek = root.vcek(CHIP, MILAN_TCB)
    key = load(vek.certificate_der).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(encode_dss_signature(*vek.sign(b"a report")), b"a report", ec.ECDSA(hashes.SHA384()))


def test_a_revocation_list_is_signed_by_the_ark(root: AmdRoot) -> None:
    """It names CA certificates, and without names it is an empty list that is valid now."""
    ark, ask = load(root.ark_der), load(root.ask_der)
    key = ark.public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    for serials in ((), (ask.serial_number,)):
        crl = x509.load_der_x509_crl(root.crl(serials))
        assert crl.issuer == ark.subject
        assert crl.is_signature_valid(key)
        assert [entry.serial_number for entry in crl] == list(serials)
        assert crl.next_update_utc is not None
        assert crl.last_update_utc < dt.datetime.now(dt.UTC) < crl.next_update_utc


@pytest.mark.parametrize(
    ("chip", "tcb"), [(CHIP[:8], MILAN_TCB), (b"", MILAN_TCB), (CHIP + b"\x00", MILAN_TCB)]
)
def test_a_chip_id_of_the_wrong_size_is_refused(root: AmdRoot, chip: bytes, tcb: bytes) -> None:
    """Nothing is padded or cut."""
    with pytest.raises(UsageError):
        root.vcek(chip, tcb)


def test_a_turin_chip_id_must_be_short(turin: AmdRoot) -> None:
    """Turin has 8 bytes, and zeros after them."""
    with pytest.raises(UsageError):
        turin.vcek(CHIP, TURIN_TCB)


@pytest.mark.parametrize("csp_id", ["CN=\N{LATIN SMALL LETTER E WITH ACUTE}", "x" * 128])
def test_a_provider_that_no_certificate_can_name_is_refused(root: AmdRoot, csp_id: str) -> None:
    """IA5String in its short form holds 127 ASCII characters."""
    with pytest.raises(UsageError):
        root.vlek(MILAN_TCB, csp_id)


def test_an_unknown_product_is_refused() -> None:
    """Three product lines have a root."""
    with pytest.raises(UsageError, match="Naples"):
        AmdRoot.create("Naples")
    assert set(PRODUCTS) == {"Milan", "Genoa", "Turin"}


def test_the_serial_number_is_all_that_the_surgery_changes(root: AmdRoot) -> None:
    """One byte of the signed part differs from what the builder made, and it is the serial number."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(amd._name("SEV-VCEK"))
        .issuer_name(root.ask.certificate.subject)
        .public_key(root.vcek(CHIP, MILAN_TCB).private_key.public_key())
        .serial_number(1)
        .not_valid_before(dt.datetime(2026, 1, 1, tzinfo=dt.UTC))
        .not_valid_after(dt.datetime(2033, 1, 1, tzinfo=dt.UTC))
    )
    before = builder.sign(root.ask.key, hashes.SHA384(), rsa_padding=amd._PSS)
    after = load(amd._with_serial_zero(before, root.ask.key))
    pairs = zip(before.tbs_certificate_bytes, after.tbs_certificate_bytes, strict=True)
    assert [(old, new) for old, new in pairs if old != new] == [(1, 0)]
    assert after.serial_number == 0
    assert after.signature != before.signature
    verify_issued_by(after, root.ask.certificate)


@given(value=st.integers(0, 255))
def test_a_tcb_part_is_encoded_as_a_positive_integer(value: int) -> None:
    """DER INTEGER is signed, and has no byte too many."""
    encoded = amd._integer(value)
    assert encoded[0] == 2
    assert encoded[1] == len(encoded) - 2
    assert int.from_bytes(encoded[2:], "big", signed=True) == value
    assert len(encoded) == (4 if value > 127 else 3)


def test_a_root_is_saved_for_its_owner_only_and_loads_back(root: AmdRoot, tmp_path: Path) -> None:
    """Private keys get mode 0600 when they are made, and the loaded root issues over the same keys."""
    root.save(tmp_path / "root")
    private = [path for path in (tmp_path / "root").iterdir() if path.suffix in {".pem", ".seed"}]
    assert len(private) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    loaded = AmdRoot.load(tmp_path / "root")
    assert loaded.ark_der == root.ark_der
    vek, again = root.vcek(CHIP, MILAN_TCB), loaded.vcek(CHIP, MILAN_TCB)
    assert vek.private_key.private_numbers() == again.private_key.private_numbers()


def test_a_broken_root_is_a_named_error(root: AmdRoot, tmp_path: Path) -> None:
    """A missing or strange file says what to do."""
    with pytest.raises(OperatorError, match="made again"):
        AmdRoot.load(tmp_path)
    root.save(tmp_path / "root")
    (tmp_path / "root" / "ask.der").write_bytes(b"no certificate")
    with pytest.raises(OperatorError):
        AmdRoot.load(tmp_path / "root")


def test_many_workers_make_one_cached_root(
    root: AmdRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes first makes it, the others wait and load it."""
    made: list[str] = []

    def create(product: str) -> AmdRoot:
        made.append(product)
        return root

    monkeypatch.setattr(AmdRoot, "create", create)
    with ThreadPoolExecutor(8) as threads:
        roots = list(threads.map(lambda _: AmdRoot.cached(tmp_path / "cache"), range(8)))
    assert made == ["Milan"]
    assert {each.ark_der for each in roots} == {root.ark_der}


def test_no_secret_shows_in_a_repr(root: AmdRoot) -> None:
    """Logs and tracebacks print reprs."""
    shown = repr(root) + repr(root.vcek(CHIP, MILAN_TCB))
    assert "seed" not in shown
    assert "private_key" not in shown
    assert root.seed.hex() not in shown
