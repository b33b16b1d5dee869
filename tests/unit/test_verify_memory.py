"""What a verifier remembers of certificates is how their bytes read and who signed them, never that they are trusted."""

from __future__ import annotations

import datetime as dt
import gc
import hashlib
import struct
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from kagimori_protocol.errors import NotAuthentic
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine
from kagimori_verifier import pipeline
from kagimori_verifier.appraise.endorsement import appraise_endorsement
from kagimori_verifier.appraise.policy import Policy, TcbFloor
from kagimori_verifier.claims import Root, SnpClaims
from kagimori_verifier.roots import TrustedRoots
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify import certificate, eventlog, snp
from kagimori_verifier.verify.certificate import Certificate
from kagimori_verifier.verify.memory import ENTRY_WEIGHT, Memory, key_of
from kagimori_verifier.verify.snp import Endorsements, verify_report

DATA = bytes(range(64))
NOW = dt.datetime.now(dt.UTC)


@pytest.fixture(scope="module")
def root(cache: Path) -> AmdRoot:
    """Give the run's Milan root."""
    return AmdRoot.cached(cache / "amd")


class Bench:
    """A machine, and a verifier that remembers what it saw of it."""

    def __init__(self, root: AmdRoot) -> None:
        self.root = root
        pin = Certificate.parse(root.ark_der).spki_sha256
        self.trusted = TrustedRoots([Root(pin, "Milan", "simulated")])
        self.machine = SnpMachine(root)
        self.memory = Memory(1 << 20)
        vek = self.machine.vek()
        assert vek is not None
        self.chain = [vek.certificate_der, root.ask_der, root.ark_der]

    def verify(
        self, chain: Iterable[bytes] = (), lists: Iterable[bytes] = (), roots: TrustedRoots | None = None
    ) -> SnpClaims:
        """Verify a fresh report, honestly unless told otherwise."""
        return verify_report(
            Trail(),
            self.machine.report(DATA, 0),
            Endorsements(list(chain) or self.chain, list(lists)),
            roots or self.trusted,
            self.memory,
        )

    def refused(self, code: str, **changes: object) -> NotAuthentic:
        """Verify what must be refused for this reason, although an honest report was believed just before."""
        self.verify()
        with pytest.raises(NotAuthentic) as caught:
            self.verify(**changes)  # type: ignore[arg-type]  # arguments of verify, by name
        assert caught.value.code == code
        return caught.value


@pytest.fixture
def bench(root: AmdRoot) -> Bench:
    """Give a machine and a verifier without memories."""
    return Bench(root)


def test_a_chain_is_read_and_checked_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what the memory is for: three signatures of RSA-4096, and that of a revocation list."""
    lists = [bench.root.crl()]
    first = bench.verify(lists=lists)
    monkeypatch.setattr(certificate, "verify_pss", None)
    monkeypatch.setattr(certificate, "_load", None)
    again = bench.verify(lists=lists)
    assert (first.valid_until, first.revocation) == (again.valid_until, again.revocation)


def test_a_list_that_arrives_later_revokes_what_is_remembered(bench: Bench) -> None:
    """The same chain was good a moment ago; AMD has taken back its ASK since."""
    serial = bench.root.ask.certificate.serial_number
    bench.refused("endorsement.revoked", lists=[bench.root.crl([serial])])


def test_a_root_that_is_trusted_no_longer_takes_its_chains_along(bench: Bench) -> None:
    """The operator has removed it since."""
    bench.refused("endorsement.root", roots=TrustedRoots())


def test_a_chain_of_anothers_root_stays_foreign_however_well_it_is_remembered(
    bench: Bench, cache: Path
) -> None:
    """Its signatures hold, and are remembered; who trusts nobody but AMD has no use for them."""
    other = Bench(AmdRoot.cached(cache / "amd-2"))
    other.memory = bench.memory
    other.verify()
    bench.verify()
    with pytest.raises(NotAuthentic) as caught:
        other.verify(roots=bench.trusted)
    assert caught.value.code == "endorsement.root"


def test_a_spoilt_copy_of_a_remembered_certificate_is_no_copy(bench: Bench) -> None:
    """One bit of its signature, or of what is signed: other bytes, that are checked like any others."""
    vek, ask, ark = bench.chain
    for at in (-1, -600):
        spoilt = bytearray(vek)
        spoilt[at] ^= 1
        bench.refused("endorsement.chain", chain=[bytes(spoilt), ask, ark])
    spoilt = bytearray(ask)
    spoilt[-1] ^= 1
    bench.refused("endorsement.chain", chain=[vek, bytes(spoilt), ark])


def test_a_remembered_signature_is_its_issuers_only(bench: Bench, cache: Path) -> None:
    """Another root's ASK has the same name and signed nothing here."""
    other = AmdRoot.cached(cache / "amd-2")
    vek, _, ark = bench.chain
    bench.refused("endorsement.chain", chain=[vek, other.ask_der, ark, other.ark_der])


def test_a_remembered_certificate_is_held_against_each_report(bench: Bench) -> None:
    """The host keeps an old TCB's certificate and runs newer, or other, firmware; or another chip."""
    bench.verify()
    old = bench.chain
    bench.machine.reported_tcb = bytes([3]) + bench.machine.reported_tcb[1:]
    with pytest.raises(NotAuthentic) as caught:
        bench.verify(chain=old)
    assert caught.value.code == "endorsement.tcb"
    bench = Bench(bench.root)
    bench.refused("endorsement.chip", chain=[SnpMachineChain(bench.root).vcek, *bench.chain[1:]])


class SnpMachineChain:
    """Another machine of the same root, for its certificate."""

    def __init__(self, root: AmdRoot) -> None:
        vek = SnpMachine(root).vek()
        assert vek is not None
        self.vcek = vek.certificate_der


def test_what_is_remembered_expires_all_the_same(bench: Bench) -> None:
    """The clock is asked each time, by policy."""
    policy = Policy(
        boot_way="grub",
        tcb_floors={"Milan": TcbFloor(boot_loader=0, tee=0, snp=0, microcode=0)},
        revocation="if-present",
    )
    for now, failed in ((NOW, []), (NOW + dt.timedelta(days=4000), ["endorsement.valid"])):
        trail = Trail()
        appraise_endorsement(trail, bench.verify(), policy, now)
        assert [check.id for check in trail.failed] == failed


def test_a_failure_is_not_remembered(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is explained anew each time, and nobody can fill the memory with what does not hold."""
    vek, ask, ark = bench.chain
    spoilt = bytes([*vek[:-1], vek[-1] ^ 1])
    reasons = {bench.refused("endorsement.chain", chain=[spoilt, ask, ark]).found for _ in range(2)}
    assert len(reasons) == 1
    checked, real = [], certificate.verify_pss

    def count(*arguments: object) -> None:
        checked.append(arguments)
        real(*arguments)  # type: ignore[arg-type]  # whatever it was called with

    monkeypatch.setattr(certificate, "verify_pss", count)
    bench.refused("endorsement.chain", chain=[spoilt, ask, ark])
    assert len(checked) == 1


def test_a_key_tells_functions_and_the_borders_of_bytes_apart() -> None:
    """Otherwise one certificate's end could pass for the next one's start."""
    keys = {
        key_of("a", b"bc", b"d"),
        key_of("a", b"b", b"cd"),
        key_of("a", b"bcd"),
        key_of("b", b"bc", b"d"),
        key_of("a", b"bc", b"d", b""),
    }
    assert len(keys) == 5


def test_a_memory_is_bounded_and_forgets_what_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of certificates that nobody signed costs other guests some speed, and no memory."""
    memory = Memory(3 * (ENTRY_WEIGHT + 100))
    made: list[bytes] = []

    def make(part: bytes) -> bytes:
        made.append(part)
        return part

    def recall(part: bytes, weight: int = 100) -> None:
        assert memory.recall("made", part, weight=weight, make=lambda: make(part)) == part

    for part in (b"1", b"2", b"3", b"1", b"4", b"1"):
        recall(part)
    assert made == [b"1", b"2", b"3", b"4"]
    recall(b"2")
    assert made[4:] == [b"2"]
    for _ in range(2):
        recall(b"larger than all of it", 1 << 20)
    assert len(made) == 7
    recall(b"1")
    assert len(made) == 7
    assert memory._weight <= memory._most


GREEDY = {
    "names of directories": ("2.5.29.17", "a4023000", 1900),
    "registered ids": ("2.5.29.17", "880129", 2500),
    "names of hosts": ("2.5.29.17", "8200", 3750),
    "policies": ("2.5.29.32", "3003060129", 1500),
}


@pytest.mark.parametrize("what", GREEDY)
def test_a_certificate_takes_no_more_memory_than_it_is_charged_for(what: str) -> None:
    """Whoever asks may send certificates of their own making, whose few bytes become thousands of objects."""
    oid, one, count = GREEDY[what]
    body = bytes.fromhex(one) * count
    extension = x509.UnrecognizedExtension(
        x509.ObjectIdentifier(oid), b"\x30\x82" + len(body).to_bytes(2, "big") + body
    )
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), None, NOW, NOW + dt.timedelta(days=1))
        .add_extension(extension, critical=False)
    )  # fmt: skip
    made = [
        builder.serial_number(number).sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
        for number in range(1, 9)
    ]
    memory = Memory(1 << 30)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        assert len(snp._readable(made, memory)) == len(made)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 1 << 20 < taken <= memory._weight


def test_a_remembered_signature_keeps_no_certificate(bench: Bench) -> None:
    """It is charged for nothing but itself, so it holds nothing else."""
    bench.verify()
    kept = {what: value for (what, _), (_, value) in bench.memory._entries.items()}
    assert kept["signed"] is True


def test_a_log_takes_no_more_memory_than_it_is_charged_for() -> None:
    """As above, for a guest that is enrolled and measures thousands of things of no size."""
    header = b"Spec ID Event03\0" + struct.pack("<IBBBBIHHB", 0, 0, 2, 0, 2, 1, 0xB, 32, 0)
    raw = struct.pack("<II20sI", 0, 3, bytes(20), len(header)) + header
    raw += b"".join(
        struct.pack("<IIIH", 4, 0xD, 1, 0xB) + hashlib.sha256(b"%d" % number).digest() + bytes(4)
        for number in range(8000)
    )
    quoted = eventlog.replay(eventlog.parse(raw)).values
    memory = Memory(1 << 30)
    tracemalloc.start()
    try:
        logged = pipeline._verify_log(Trail(), raw, quoted, memory)
        assert len(logged.described(4, 10_000)) == 8000
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 1 << 20 < taken <= memory._weight


def test_who_remembers_nothing_makes_everything(bench: Bench) -> None:
    """The default: a command that looks at one report has no use for a memory."""
    made: list[int] = []
    memory = Memory(0)
    for number in range(2):
        memory.recall("made", b"", weight=0, make=lambda number=number: made.append(number))  # type: ignore[misc]  # bound now
    assert made == [0, 1]
