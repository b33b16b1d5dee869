"""Debian 13's own configfs-tsm serves the agent, behind a provider of reports that is a kernel module of ours."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from tests.boot import kernel_module
from tests.boot.cache import Cache
from tests.boot.doors import World, site_with
from tests.boot.estate import BOOT_S, Estate, session_in
from tests.boot.images import SECRET
from tests.boot.uki import TRIXIE
from tests.boot.variants import ROOT

pytestmark = [
    pytest.mark.boot,
    pytest.mark.slow,
    pytest.mark.parametrize("variant", [TRIXIE], ids=["trixie"], indirect=True, scope="session"),
]


@pytest.fixture(scope="session")
def provider(estate: Estate) -> Path:
    """Give the provider of reports, compiled for that kernel."""
    return kernel_module.build(Cache(ROOT / ".dev" / "boot"), estate.images)


def test_the_kernels_own_configfs_serves_the_agent(estate: Estate, provider: Path, tmp_path: Path) -> None:
    """Attributes, generation and blobs are Linux's, behind a provider of ours: refused, accepted, and released then."""
    world = World("module", module=provider, arguments="vmpl=2")
    site = site_with(estate, tmp_path, world)
    with site.serving() as served, site.booted(served.url) as machine:
        machine.wait_off(BOOT_S)
    lines = machine.said("")
    failed = {check["id"] for check in site.explained(session_in(lines)) if not check["ok"]}
    assert {"pcr.4", "pcr.9"} <= failed
    assert all(check.startswith("pcr.") for check in failed), failed  # the evidence itself is beyond doubt
    site.verifier("reference", "accept", session_in(lines), "--yes", "--label", "first boot")
    shutil.rmtree(tmp_path / "vm")
    with site.serving() as served, site.booted(served.url) as machine:
        machine.wait_for("guest: done", BOOT_S)
        machine.wait_off(BOOT_S)
    assert machine.said(r"the report door is there \(module\)")
    assert machine.said("kagimori_tsm: loading out-of-tree module taints kernel")
    assert machine.said(f"guest: root reached: {SECRET}")
    assert site.events()[:2] == ["confirmed-opened", "released"]


@pytest.mark.parametrize(
    ("settings", "arguments", "told"),
    [
        ({"errno": errno.EBADMSG}, "vmpl=2", "EBADMSG"),
        ({"daemon": "dies"}, "vmpl=2", "ENXIO"),
        ({"daemon": "hangs"}, "vmpl=2 timeout_s=5", "ETIMEDOUT"),
    ],
    ids=["fails", "dies", "hangs"],
)
def test_a_provider_that_fails_dies_or_hangs_is_told_and_ends_the_boot(
    estate: Estate,
    provider: Path,
    tmp_path: Path,
    settings: dict[str, object],
    arguments: str,
    told: str,
) -> None:
    """By the errno that Linux hands on; nothing waits for ever, no shell, no root."""
    world = World("module", settings, provider, arguments)
    site = site_with(estate, tmp_path, world)
    with site.serving() as served, site.booted(served.url) as machine:
        machine.wait_off(BOOT_S)
    assert machine.said(f"found: {told} .*/outblob")
    assert not machine.said("guest: root reached|: mapped|initramfs\\)|blocked for more than")
