"""What one input may cost: the dearest inputs that we know stay far below the table, and cost grows with their size only.

CPU time of this process is counted, not the clock, so a busy machine changes little; the bounds are several times what is
measured, so what little it changes does not matter. Native memory (OpenSSL's, Rust's) is not seen by tracemalloc.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from tests.fuzz.bounds import BOUNDS, as_rows
from tests.fuzz.mutators import events, tlv
from tests.fuzz.target import Target, accepts, cpu_s
from tests.fuzz.targets import certificates, eventlog, luks, report, x509
from tests.fuzz.targets import messages as message_target
from tests.fuzz.targets.names import NAMES, load
from tests.unit.luks import headers

from kagimori_protocol import certificate_table, luks2_layout, messages, snp
from kagimori_verifier.verify import certificate, eventlog_layout

pytestmark = pytest.mark.slow

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "fuzzing.md"
LINEAR: Final = 3.5
"""Twice the input may take so many times as long: 2 if linear, 4 if quadratic; caches and the allocator take their part."""


SLOW: Final = {"eventlog", "luks", "messages"}
"""Targets whose dearest inputs take seconds together, most of them for counting allocations."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NAMES]
)
def test_the_dearest_inputs_stay_within_the_bounds(name: str) -> None:
    """A change of kind shows here: a copy for each entry, an allocation by a number of the sender's."""
    target = load(name)
    for what, data in target.worst():
        assert len(data) <= target.bound.largest, what
        took_ms = min(cpu_s(target, data) for _ in range(2)) * 1000
        assert took_ms <= target.bound.cpu_ms, f"{what}: {took_ms:.0f} ms"
        assert peak_mib(target, data) <= target.bound.memory_mib, what


def peak_mib(target: Target, data: bytes) -> float:
    """Give the most that was allocated at any one time while an input was looked at, in MiB."""
    gc.collect()
    tracemalloc.start()
    try:
        accepts(target, data)
        return tracemalloc.get_traced_memory()[1] / (1 << 20)
    finally:
        tracemalloc.stop()


def test_the_largest_inputs_are_those_that_the_product_lets_through() -> None:
    """One byte of choice comes before some; the limits are the product's own."""
    hidden = 1
    assert BOUNDS["report"].largest == 4096 + hidden  # Evidence.report; Report.parse looks at its size first
    assert snp.REPORT_SIZE < 4096
    assert BOUNDS["certificates"].largest == messages.MAX_CERTIFICATES == certificate_table.MAX_TABLE_SIZE
    assert BOUNDS["x509"].largest == certificate.MAX_CERTIFICATE + hidden
    assert BOUNDS["eventlog"].largest == eventlog_layout.MAX_SIZE >= messages.MAX_EVENT_LOG
    assert BOUNDS["messages"].largest == messages.MAX_BODY + hidden
    assert BOUNDS["luks"].largest == 2 * luks2_layout.SIZES[-1] + hidden
    assert all(0 < bound.fuzzed <= bound.largest for bound in BOUNDS.values())
    assert set(BOUNDS) == set(NAMES)


def test_the_table_in_the_document_is_the_table() -> None:
    """Bounds that are stated are the bounds that are enforced."""
    text = DOCUMENT.read_text()
    for row in as_rows():
        assert row in text


def nested_events(size: int) -> bytes:
    """Write a log of about ``size`` bytes, all of it small events that draw every candidate."""
    one = events.Logged(8, 0xD, {"sha256": bytes(32)}, b"grub_cmd: linux\0")
    return events.written(["sha256"], [one] * (size // 66))


def one_path(size: int) -> bytes:
    """Write a log of one image whose path has as many parts as fit."""
    data = bytes(24) + size.to_bytes(8, "little") + b"\x04\x04\x04\0" * (size // 4)
    return events.written(["sha256"], [events.Logged(4, 0x80000003, {"sha256": bytes(32)}, data)])


def numbers(size: int) -> bytes:
    """Write a message of as many numbers as fit."""
    start = b'{"type":"unsupported-version","version":1,"versions":['
    return bytes([message_target.ANSWER]) + start + b"1," * ((size - 60) // 2) + b"1]}"


def header(size: int) -> bytes:
    """Write a LUKS2 header of which ``size`` bytes are JSON, all of it small objects."""
    return bytes([luks.BYTES]) + headers.header(luks.dear(size)["small objects"], luks2_layout.SIZES[3])


def table(size: int) -> bytes:
    """Write a certificate table whose entries are all of it, and PEM."""
    return certificates.everything(size)


@pytest.mark.parametrize(
    ("target", "make", "size"),
    [
        pytest.param(eventlog.TARGET, nested_events, 1 << 18, marks=pytest.mark.slow),
        (eventlog.TARGET, one_path, 1 << 18),
        (message_target.TARGET, numbers, 1 << 19),
        (luks.TARGET, header, luks2_layout.MAX_JSON // 2),
        (certificates.TARGET, table, 1 << 15),
    ],
    ids=["events", "path", "numbers", "luks", "table"],
)
def test_twice_the_input_takes_about_twice_as_long(
    target: Target, make: Callable[[int], bytes], size: int
) -> None:
    """No input makes it quadratic: a sender must not buy an hour of ours with a megabyte."""
    once, twice = make(size), make(2 * size)
    assert len(twice) >= len(once)
    ratio = min(
        min(cpu_s(target, twice) for _ in range(3)) / min(cpu_s(target, once) for _ in range(3))
        for _ in range(3)
    )
    assert ratio < LINEAR


def test_the_bound_on_a_report_is_of_one_that_is_verified_and_judged() -> None:
    """Otherwise the bounds would be of inputs that are refused at the door."""
    for what, data in report.worst():
        assert accepts(report.TARGET, data) == what.startswith("every flag set"), what


def test_the_dearest_certificates_are_certificates() -> None:
    """As many extensions and names as fit are read to the last one."""
    vcek = report.chip("Milan", "vcek").endorsements.certificates[0]
    for make in (tlv.with_extensions, tlv.with_names):
        full = make(vcek, certificate.MAX_CERTIFICATE)
        assert certificate.MAX_CERTIFICATE - 100 < len(full) <= certificate.MAX_CERTIFICATE
        assert accepts(x509.TARGET, bytes([x509.CERTIFICATE]) + full)
