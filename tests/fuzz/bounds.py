"""What one input may cost: the one table. docs/fuzzing.md shows it, and a test holds that it shows this.

The bounds are for the largest input that the product lets through to a parser, on one core of an ordinary machine, a
few times over what the dearest input known takes there, so that only a change of kind exceeds them: work that grows
with the square of the input, or an allocation that the sender's numbers ask for.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Bound(NamedTuple):
    """What one input may cost.

    ``largest``: bytes of the largest input that the product lets through. ``cpu_ms``: milliseconds of CPU time.
    ``memory_mib``: MiB allocated at any one time, the input not counted. ``fuzzed``: bytes of the largest input that a
    fuzzer makes, less than ``largest`` where large inputs would only make it slow.
    """

    largest: int
    cpu_ms: int
    memory_mib: int
    fuzzed: int


BOUNDS: Final = {
    "report": Bound(largest=4096 + 1, cpu_ms=100, memory_mib=4, fuzzed=1400),
    "certificates": Bound(largest=1 << 16, cpu_ms=400, memory_mib=16, fuzzed=1 << 14),
    "x509": Bound(largest=8192 + 1, cpu_ms=200, memory_mib=4, fuzzed=8192 + 1),
    "tpm": Bound(largest=4096 + 64, cpu_ms=100, memory_mib=4, fuzzed=2048),
    "eventlog": Bound(largest=1 << 20, cpu_ms=2500, memory_mib=64, fuzzed=1 << 13),
    "messages": Bound(largest=(1 << 20) + 1, cpu_ms=1000, memory_mib=32, fuzzed=1 << 14),
    "luks": Bound(largest=2 * (4 << 20) + 1, cpu_ms=1000, memory_mib=64, fuzzed=1 << 15),
}


def as_rows() -> list[str]:
    """Give the table as docs/fuzzing.md shows it."""
    return [
        f"| {name} | {bound.largest} | {bound.cpu_ms} ms | {bound.memory_mib} MiB | {bound.fuzzed} |"
        for name, bound in BOUNDS.items()
    ]
