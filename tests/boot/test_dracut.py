"""Debian with dracut boots from its encrypted root, with systemd in the initramfs or without, or does not, and says why."""

from __future__ import annotations

import pytest
from tests.boot.estate import BOOT_S, Site, session_in
from tests.boot.images import SECRET
from tests.boot.variants import DRACUT, DRACUT_TRIXIE, DRACUT_WITHOUT_SYSTEMD, UUID, Variant

from kagimori_agent.cap import CAPPED

pytestmark = [pytest.mark.boot, pytest.mark.slow]


def on(**variants: Variant) -> pytest.MarkDecorator:
    """Run a test with these Debians, whose names its own gets."""
    return pytest.mark.parametrize("variant", variants.values(), ids=variants, indirect=True, scope="session")


@on(systemd=DRACUT, plain=DRACUT_WITHOUT_SYSTEMD, trixie=DRACUT_TRIXIE)
def test_an_accepted_boot_gets_its_key_and_reaches_its_root(site: Site) -> None:
    """Measured, attested, released, mapped before others look at the volume, capped, handed over; nobody was asked."""
    with site.serving() as served, site.booted(served.url) as machine:
        machine.wait_for("guest: done", BOOT_S)
        machine.wait_off(BOOT_S)
    assert machine.said(f"guest: root reached: {SECRET}")
    assert machine.said(f"guest: mapping cryptroot CRYPT-LUKS2-{UUID.replace('-', '')}-cryptroot")
    assert machine.said(f"guest: cap tpm0 {CAPPED.hex().upper()}")
    assert machine.said(r"guest: network en\w+ down")
    assert machine.said("guest: log kagimori-agent: cryptroot: mapped")
    assert not machine.said("(?i)passphrase")
    assert site.events()[:2] == ["confirmed-opened", "released"]


@on(systemd=DRACUT)
def test_a_changed_command_line_is_refused_with_its_reason(site: Site) -> None:
    """A host that asks for a shell before the root becomes / gets a machine that is capped and off."""
    with site.serving() as served, site.booted(served.url, "rd.break=pre-pivot") as machine:
        machine.wait_off(BOOT_S)
    lines = machine.said("")
    assert not machine.said("root reached|cryptroot: mapped|emergency mode")
    assert machine.said("tpm0: PCR 15 was capped")
    failed = [check for check in site.explained(session_in(lines)) if not check["ok"]]
    assert [check["id"] for check in failed] == ["pcr.9", "cmdline.doors"]
    assert "Linux load options" in failed[0]["found"]
    assert site.events()[:2] == ["confirmed-received", "refused"]


@on(systemd=DRACUT)
def test_a_verifier_that_is_away_is_waited_for(site: Site) -> None:
    """A verifier that restarts while a machine boots costs seconds, not the boot."""
    with site.booted(None) as machine:
        machine.wait_for("no verifier answers, try 3", BOOT_S)
        with site.serving() as served:
            machine.connect_verifier(served.url)
            machine.wait_for("guest: root reached", BOOT_S)
            machine.wait_off(BOOT_S)
