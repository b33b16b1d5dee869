"""SEV-SNP reports: parsed as they are, and signed by a simulated chip so that chance gets past the signature.

The first byte chooses: bit 0, whether a chip signs; bit 1, whether it puts in its own TCB, chip and product first, so
that its certificate fits; bits 2 and 3, which chip. The rest is the report.
"""

from __future__ import annotations

import datetime as dt
import functools
import random
from collections.abc import Iterator
from typing import NamedTuple

from tests.fuzz import workshop
from tests.fuzz.bounds import BOUNDS
from tests.fuzz.mutators import parts
from tests.fuzz.target import Mutate, Target

from kagimori_protocol import messages
from kagimori_protocol.errors import Malformed, NotAuthentic
from kagimori_protocol.messages import Verdict
from kagimori_protocol.snp import FIELDS, REPORT_SIZE, SIGNED_SIZE, VERSIONS, Report, TcbVersion
from kagimori_simulator.amd import Vek
from kagimori_simulator.machine import SnpMachine
from kagimori_verifier.appraise.endorsement import appraise_endorsement
from kagimori_verifier.appraise.policy import Policy, TcbFloor
from kagimori_verifier.appraise.reference import References
from kagimori_verifier.appraise.snp import appraise_snp
from kagimori_verifier.claims import Root
from kagimori_verifier.roots import TrustedRoots
from kagimori_verifier.trail import Trail
from kagimori_verifier.verify.certificate import Certificate
from kagimori_verifier.verify.snp import Endorsements, verify_report

SIGN, FIT = 1, 2
CHIPS = {"Milan": bytes(range(1, 65)), "Turin": bytes(range(1, 9)).ljust(64, b"\0")}
KINDS = (("Milan", "vcek"), ("Milan", "vlek"), ("Turin", "vcek"), ("Turin", "vlek"))
FITTED = ("reported_tcb", "chip_id", "signature_algo", "key_info")
WITH_CPUID = ("cpuid_fam_id", "cpuid_mod_id", "cpuid_step")
NOW = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)


class Chip(NamedTuple):
    """One machine, its key, a report of its own, and who vouches for it."""

    product: str
    vek: Vek
    own: bytes
    endorsements: Endorsements


@functools.cache
def chip(product: str, signer: str) -> Chip:
    """Give the chip of a product line, which signs by its VCEK or by a VLEK."""
    root = workshop.amd_root(product)
    machine = SnpMachine(root, chip_id=CHIPS[product], signer=signer)
    vek = machine.vek()
    assert vek is not None
    chain = Endorsements(list(machine.chain().values()), [root.crl()])
    return Chip(product, vek, machine.report(bytes(range(64)), 0), chain)


@functools.cache
def trusted() -> TrustedRoots:
    """Trust the simulated roots."""
    pins = {p: Certificate.parse(workshop.amd_root(p).ark_der).spki_sha256 for p in ("Milan", "Turin")}
    return TrustedRoots([Root(pin, product, "simulated") for product, pin in pins.items()])


@functools.cache
def references() -> References:
    """Give an owner's policy that judges every part of a report."""
    floors = {
        "Milan": TcbFloor(boot_loader=4, tee=0, snp=24, microcode=219),
        "Turin": TcbFloor(boot_loader=1, tee=1, snp=4, microcode=71, fmc=1),
    }
    policy = Policy(boot_way="grub", tcb_floors=floors, signers=["vcek", "vlek"], csp_ids=["CN=x"])
    return References(policy, frozenset(CHIPS.values()), (), ())


def run(data: bytes) -> None:
    """Parse a report; have it signed, verify it and judge it."""
    choice, raw = workshop.head(data)
    if not choice & SIGN:
        check_report(Report.parse(raw))
        return
    one = chip(*KINDS[choice >> 2 & 3])
    body = raw[:SIGNED_SIZE].ljust(SIGNED_SIZE, b"\0")
    if choice & FIT:
        body = fitted(body, one.own)
    r, s = one.vek.sign(body)
    signed = (body + r.to_bytes(72, "little") + s.to_bytes(72, "little")).ljust(REPORT_SIZE, b"\0")
    trail = Trail()
    try:
        claims = verify_report(trail, signed, one.endorsements, trusted())
    except NotAuthentic as error:
        if [check.id for check in trail.failed] != [error.code]:
            raise AssertionError(f"refused by {error.code}, noted as {trail.failed}") from error
        raise
    assert not trail.failed
    assert claims.report.raw == signed
    assert claims.product == one.product
    assert claims.reported_tcb.pack() == claims.report.reported_tcb == field(one.own, "reported_tcb")
    assert claims.signer == "vlek" or claims.report.chip_id == CHIPS[one.product]
    check_report(claims.report)
    appraise_endorsement(trail, claims, references().policy, NOW)
    appraise_snp(trail, claims, references())
    # Whatever a report says, the verdict about it can be sent, and read.
    verdict = Verdict(confirm_key=bytes(32), allowed=not trail.failed, checks=list(trail.checks))
    assert messages.decode_payload(messages.encode(verdict)) == verdict


def check_report(report: Report) -> None:
    """Every field gives back its bytes, and every property has a value."""
    for name, (_, size) in FIELDS.items():
        value = getattr(report, name)
        packed = value if isinstance(value, bytes) else value.to_bytes(size, "little")
        assert packed == field(report.raw, name)
    assert report.version in VERSIONS
    assert report.product_line() in {None, "Milan", "Genoa", "Turin"}
    assert report.signing_key
    assert all(report.policy_flags + report.platform_flags)
    assert (report.author_key_en, report.mask_chip_key) == (report.key_info & 1 > 0, report.key_info & 2 > 0)
    for turin in (False, True):
        try:
            tcb = TcbVersion.parse(report.reported_tcb, turin=turin)
        except Malformed:
            continue
        assert tcb.pack() == report.reported_tcb
        assert str(tcb)


def fitted(body: bytes, own: bytes) -> bytes:
    """Put a chip's own words into a body where its certificate must agree with them."""
    version = int.from_bytes(body[:4], "little")
    names = FITTED if version < 3 else FITTED + WITH_CPUID
    for name in names:
        offset, size = FIELDS[name]
        body = parts.spliced(body, offset, offset + size, field(own, name))
    return body


def field(raw: bytes, name: str) -> bytes:
    """Cut a field out of a report."""
    offset, size = FIELDS[name]
    return raw[offset : offset + size]


def seeds() -> Iterator[bytes]:
    """Give reports of every kind, version and product, as they are and to be signed."""
    for index, (product, signer) in enumerate(KINDS):
        own = chip(product, signer).own
        yield bytes([0]) + own
        yield bytes([SIGN | FIT | index << 2]) + own[:SIGNED_SIZE]
        yield bytes([SIGN | index << 2]) + own[:SIGNED_SIZE]
    for version in sorted(VERSIONS - {5}):
        machine = SnpMachine(workshop.amd_root("Milan"), chip_id=CHIPS["Milan"], report_version=version)
        yield bytes([0]) + machine.report(bytes(64), 0)
        yield bytes([SIGN | FIT]) + machine.report(bytes(64), 0)[:SIGNED_SIZE]
    for raw in workshop.recorded("snp/*/report.bin"):
        yield bytes([0]) + raw


def worst() -> Iterator[tuple[str, bytes]]:
    """Give a report with all bits set that may be, signed, and one too long."""
    own = bytearray(chip("Turin", "vcek").own)
    for name in ("policy", "platform_info", "launch_mit_vector", "current_mit_vector", "report_data"):
        offset, size = FIELDS[name]
        own[offset : offset + size] = b"\xff" * size
    yield "every flag set, verified and judged", bytes([SIGN | FIT | 2 << 2]) + bytes(own[:SIGNED_SIZE])
    yield "longer than a report", bytes([0]) + bytes(own).ljust(4096, b"\0")


def mutate_report(data: bytes, limit: int, chance: random.Random, mutate: Mutate) -> bytes:
    """Change fields and leave the rest where it lies; now and then, change any bytes."""
    if len(data) < SIGNED_SIZE or chance.random() < 0.15:
        return mutate(data, limit)
    for _ in range(chance.randint(1, 3)):
        offset, size = FIELDS[chance.choice(tuple(FIELDS))]
        if offset + size <= len(data):
            new = parts.part(data[offset : offset + size], size, chance, mutate)
            data = parts.spliced(data, offset, offset + size, new[:size].ljust(size, b"\0"))
    if chance.random() < 0.5:
        data = bytes([chance.choice((2, 3, 4, 5)), 0, 0, 0]) + data[4:]
    return data[:limit]


TARGET = Target(
    name="report",
    about="SEV-SNP reports: parsed, signed by a simulated chip, verified and judged",
    bound=BOUNDS["report"],
    refusals=(Malformed, NotAuthentic),
    run=run,
    seeds=seeds,
    worst=worst,
    mutate=parts.behind_choice(mutate_report),
    covers=(
        "kagimori_protocol.snp",
        "kagimori_verifier.verify.snp",
        "kagimori_verifier.appraise.snp",
        "kagimori_verifier.appraise.endorsement",
    ),
)
