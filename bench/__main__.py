"""Measure Kagimori: ``./dev bench [NAME...]`` prints the tables of docs/performance.md.

Names: ``attestations`` (through HTTP, beside the bare cryptography), ``stages`` (inside one attestation), ``enrolled`` (cost by
number of VMs), ``agent`` (an unlock by part). Without one, all of these. Needs two cores, taskset and a quiet machine.

``boot``, only by name: what an initramfs grows by and how long a boot waits for its key, beside clevis, mandos and dropbear. Half
an hour of emulated machines, as root, with what the boot tests need (tests/boot).
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from bench import agent, attestations, boot, stages, worlds
from bench.attestations import TINY, Scale

from kagimori_protocol.messages import KINDS


def _attestations(scratch: Path, scale: Scale) -> Iterator[str]:
    yield "| kind | what | attestations/s | processor ms each | of the bound, by the clock | by the processor | cores used | generator's cores |"
    yield "|---|---|---|---|---|---|---|---|"
    for kind in KINDS:
        two = kind == "svsm-vtpm"
        yield from attestations.rows(kind, attestations.turns(scratch / kind, kind, scale, two=two))


def _stages(scratch: Path, scale: Scale) -> Iterator[str]:
    for kind in KINDS:
        world = worlds.make(scratch / f"stages-{kind}", kind=kind, enrolled=1_000, asking=20)
        yield f"\n{kind}:\n"
        yield "| stage | ms | processor ms | share |"
        yield "|---|---|---|---|"
        yield from stages.rows(stages.profile(world, rounds=5 if scale is TINY else 150))


def _enrolled(scratch: Path, scale: Scale) -> Iterator[str]:
    taken = attestations.by_size(scratch / "sizes", scale)
    base = taken[scale.sizes[0]]
    yield f"| VMs enrolled | processor ms each | of {scale.sizes[0]} |"
    yield "|---|---|---|"
    for size, times in taken.items():
        ratio = statistics.median(one / first for one, first in zip(times, base, strict=True))
        yield f"| {size:,} | {statistics.median(times):.2f} | {ratio:.2f} |"


def _agent(scratch: Path, scale: Scale) -> Iterator[str]:
    taken = agent.unlock(scratch / "agent", rounds=scale.rounds + 2 if scale is not TINY else 1)
    yield "| part | ms |"
    yield "|---|---|"
    for part, ms in taken.items():
        yield f"| {part} | {ms:.0f} |"
    yield f"| **all** | {sum(taken.values()):.0f} |"


def _boot(scratch: Path, scale: Scale) -> Iterator[str]:
    yield from boot.rows(scratch / "boot", rounds=1 if scale is TINY else 2 * scale.rounds)


BENCHES: Final[dict[str, tuple[str, Callable[[Path, Scale], Iterator[str]]]]] = {
    "attestations": ("Attestations a second, and the bound", _attestations),
    "stages": ("One attestation by stage, without HTTP, one thread", _stages),
    "enrolled": ("Cost by number of VMs", _enrolled),
    "agent": ("An unlock in the guest, by part", _agent),
    "boot": ("An initramfs and its boot, beside others", _boot),
}
ONLY_BY_NAME: Final = frozenset({"boot"})


def main() -> int:
    """Run the benches that were named; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="./dev bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHES))
    parser.add_argument(
        "--tiny", action="store_true", help="as short as can be: shows that it runs, measures nothing"
    )
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHES]
    if unknown:
        parser.error(f"no such bench: {', '.join(unknown)}")
    warnings.simplefilter("ignore")
    scale = TINY if options.tiny else Scale()
    print(
        f"{dt.datetime.now(dt.UTC):%Y-%m-%d}, {_machine()}, load {os.getloadavg()[0]:.1f} before.", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="kagimori-bench-") as scratch:
        for name in options.names or [name for name in BENCHES if name not in ONLY_BY_NAME]:
            title, bench = BENCHES[name]
            print(f"\n### {title}\n", flush=True)
            for line in bench(Path(scratch), scale):
                print(line, flush=True)
    return 0


def _machine() -> str:
    """Name what it ran on, without a host's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    return f"{os.cpu_count()} x {model}, Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
