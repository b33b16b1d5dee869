"""What an initramfs grows by, and how long a boot waits for its key: Kagimori beside clevis, mandos and dropbear.

Emulated machines, so root, QEMU, swtpm, mmdebstrap and half an hour; never KVM, so that the figures of two machines differ
by their processors alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench import boot_images, boot_sizes, boot_times
from bench.boot_times import AGENT, TANG, TPM, Boot
from tests.boot import estate
from tests.boot.cache import Cache
from tests.boot.variants import INITRAMFS_TOOLS, ROOT

COMPARED: Final = (AGENT, TANG, TPM)


def rows(scratch: Path, rounds: int) -> Iterator[str]:
    """Weigh and measure; give the tables' lines."""
    cache = Cache(ROOT / ".dev/boot")
    rivals = boot_images.debian(cache)
    built = estate.build(cache, INITRAMFS_TOOLS)
    for variant in (boot_images.BOOKWORM, boot_images.TRIXIE):
        debian = boot_images.debian(cache, variant)
        yield from boot_sizes.rows(debian, built.agent_toml, scratch / variant.suite, variant.suite)
        yield ""
    yield from _times(boot_times.prepare(rivals, built, scratch / "times"), rounds)


def _times(setting: boot_times.Setting, rounds: int) -> Iterator[str]:
    taken: dict[str, list[Boot]] = {name: [] for name in COMPARED}
    with boot_times.answering(setting) as url:
        for number in range(rounds):
            for name in COMPARED if number % 2 == 0 else reversed(COMPARED):
                taken[name].append(boot_times.measure(setting, name, url))
    yield "| from its start to the mapped device, first thing of a boot | median s | range | processor s | range | boots |"
    yield "|---|---|---|---|---|---|"
    for name, boots in taken.items():
        times, busy = (
            sorted(each) for each in zip(*((one.mapped_s, one.processor_s) for one in boots), strict=True)
        )
        words = [f"{statistics.median(each):.2f} | {each[0]:.2f} to {each[-1]:.2f}" for each in (times, busy)]
        yield f"| {name} | {' | '.join(words)} | {len(boots)} |"
    network = statistics.median(boot.network_s for boots in taken.values() for boot in boots)
    agent = statistics.median(boot.ended_s for boot in taken[AGENT])
    yield ""
    yield f"Before, for all: {network:.1f} s until the network is up. The agent ends, capped and confirmed, after {agent:.2f} s."
