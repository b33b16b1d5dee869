"""Debian with initramfs-tools boots from its encrypted root, or does not, and says why."""

from __future__ import annotations

import pytest
from tests.boot.estate import BOOT_S, Site, session_in
from tests.boot.images import SECRET
from tests.boot.variants import UUID

from kagimori_agent.cap import CAPPED

pytestmark = [pytest.mark.boot, pytest.mark.slow]


def test_a_boot_that_nobody_has_accepted_is_refused_and_powers_off(
    first_boot: tuple[Site, list[str]],
) -> None:
    """Empty means no, also on the first day; the console says how the owner gets on from there."""
    site, lines = first_boot
    text = "\n".join(lines)
    assert "refuses the key" in text
    assert "FAILS  pcr.9" in text
    assert "guest: root reached" not in text
    failed = {check["id"] for check in site.explained(session_in(lines)) if not check["ok"]}
    assert {"pcr.4", "pcr.9"} <= failed


def test_an_accepted_boot_gets_its_key_and_reaches_its_root(site: Site) -> None:
    """The whole job, with a real kernel: measured, attested, released, mapped, capped, handed over."""
    with site.serving() as served, site.booted(served.url) as machine:
        machine.wait_for("guest: done", BOOT_S)
        machine.wait_off(BOOT_S)
    assert machine.said(f"guest: root reached: {SECRET}")
    assert machine.said(f"guest: mapping cryptroot CRYPT-LUKS2-{UUID.replace('-', '')}-cryptroot")
    assert machine.said(f"guest: cap tpm0 {CAPPED.hex().upper()}")
    assert machine.said(r"guest: network en\w+ down")
    assert machine.said("guest: log kagimori-agent: cryptroot: mapped")
    assert not machine.said("Please unlock disk")
    assert site.events()[:2] == ["confirmed-opened", "released"]


def test_a_changed_command_line_is_refused_with_its_reason(site: Site) -> None:
    """A host that adds a word gets a machine that is capped and off, and the owner reads which PCR differs."""
    with site.serving() as served, site.booted(served.url, "init=/bin/sh") as machine:
        machine.wait_off(BOOT_S)
    lines = machine.said("")
    assert not machine.said("root reached|cryptroot: mapped|initramfs\\)")
    assert machine.said("FAILS  pcr.9")
    failed = [check for check in site.explained(session_in(lines)) if not check["ok"]]
    assert [check["id"] for check in failed] == ["pcr.9", "cmdline.doors"]
    assert "Linux load options" in failed[0]["found"]
    assert site.events()[:2] == ["confirmed-received", "refused"]
