"""A VM that waits for its verifier as long as it takes, and starts anew when it gets no key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.boot import estate as estates
from tests.boot import images
from tests.boot.cache import Cache
from tests.boot.estate import BOOT_S, LIMITS, Estate, Site
from tests.boot.variants import INITRAMFS_TOOLS, ROOT

pytestmark = [pytest.mark.boot, pytest.mark.slow]

BUDGET_S = 20


@pytest.fixture(scope="session")
def patient(_can_boot: None) -> Estate:
    """Give an image whose agent.toml says so."""
    cache = Cache(ROOT / ".dev" / "boot")
    built = images.build(cache, INITRAMFS_TOOLS)
    more = '[boot]\nwait = "forever"\non_failure = "reboot"\n'
    return estates.of(cache, built, limits=LIMITS.replace("600", str(BUDGET_S)) + more)


def test_it_outlasts_its_budget_and_then_a_refusal_makes_it_start_anew(
    patient: Estate, tmp_path: Path
) -> None:
    """`wait = "forever"` is about a verifier that is away; a refusal ends the boot at once, and on_failure says how."""
    shutil.copytree(patient.verifier, tmp_path / "verifier")
    site = Site(patient, tmp_path)
    with site.booted(None) as machine:
        first = last = machine.wait_for("no verifier answers", BOOT_S)
        while last.at_s - first.at_s < 2 * BUDGET_S:
            last = machine.wait_for(r"no verifier answers.*\(without end\)", BOOT_S, since=len(machine.lines))
        with site.serving() as served:
            machine.connect_verifier(served.url)
            machine.wait_for("refuses the key", BOOT_S)
            machine.wait_off(BOOT_S)
    assert machine.said("reboot: Restarting system")
    assert not machine.said("root reached|initramfs\\)")
