"""From a rescue shell a person reads what the verifier thinks of this boot, and gets no key."""

from __future__ import annotations

import pytest
from tests.boot.estate import BOOT_S, Site, session_in
from tests.boot.scene import Scene, played, with_shell

from kagimori_agent.cap import CAPPED

pytestmark = [pytest.mark.boot, pytest.mark.slow]

STATIC_V6 = r"network=static\naddress=fd00::7/128\ngateway=fe80::1\n"
"""Settings of a network with one address and a gateway on the link."""


def test_a_rescue_shell_gets_a_verdict_and_no_key(site: Site) -> None:
    """The shell comes capped; the dry-run has the address of the command line, and says why this boot gets no key.

    Nor does an unlock from there get it, or one after the shell, and a word of ours that may not be there refuses both.
    """
    cmdline = with_shell("break=premount kagimori.ip=10.0.2.77/32,gateway=10.0.2.2 kagimori.debug")
    unlock = "/usr/lib/kagimori/boot/unlock"
    with site.serving() as served, played(site, served.url, Scene(cmdline=cmdline)) as machine:
        machine.wait_for(r"^\(initramfs\) ", BOOT_S, prompt=True)
        machine.type('echo "shell: PCR 15 $(cat /sys/class/tpm/tpm0/pcr-sha256/15)"')
        machine.wait_for(f"shell: PCR 15 {CAPPED.hex().upper()}", BOOT_S)
        machine.type(f"{unlock} dry-run; echo shell: dry-run gave $?")
        machine.wait_for(r"shell: dry-run gave \d", BOOT_S)
        dry_run = machine.said("")
        machine.type(
            "(cat /proc/cmdline; echo kagimori.url=http://evil) >/cmdline; mount --bind /cmdline /proc/cmdline;"
            f" {unlock} dry-run; echo shell: with a word gave $?; umount /proc/cmdline"
        )
        machine.wait_for(r"shell: with a word gave \d", BOOT_S)
        machine.type(
            f"printf '{STATIC_V6}' >/run/kagimori/boot.conf; /usr/lib/kagimori/boot/network up;"
            " ip=/usr/lib/kagimori/bin/ip; until $ip -6 route | grep default; do sleep 1; done;"
            " $ip -6 address | sed 's/^/shell: address /'; /usr/lib/kagimori/boot/network down; echo shell: six is over"
        )
        machine.wait_for("^shell: six is over", BOOT_S)
        machine.type("exit")
        machine.wait_off(BOOT_S)
    text = "\n".join(dry_run)
    assert "network: enp0s2 has carrier and 10.0.2.77/32" in text
    assert "urllib3.connectionpool] http://10.0.2.100:8117" in text, "kagimori.debug says whom it asks"
    assert "home: this boot would get no key" in text
    assert f"holds  cap.off: {CAPPED.hex()}: capped" in text, "reported, and not held against it"
    assert "FAILS  pcr.9" in text
    assert machine.said("shell: dry-run gave 1$")
    checks = {check["id"]: check for check in site.explained(session_in_dry_run(dry_run))}
    failed = [name for name, check in checks.items() if not check["ok"]]
    assert failed == ["pcr.9", "cmdline.doors"], "judged as if uncapped"

    assert machine.said("shell: with a word gave 4$")
    assert machine.said("found: 'kagimori.url=http://evil'")

    assert machine.said("^default via fe80::1 dev enp0s2")
    assert machine.said("shell: address .*inet6 fd00::7/128")

    checks = {check["id"]: check for check in site.explained(session_in(machine.said("")))}
    assert sorted(name for name, check in checks.items() if not check["ok"]) == [
        "cap.off",
        "cmdline.doors",
        "pcr.9",
    ]
    assert machine.said("reboot: Power down")
    assert not machine.said("guest: root reached|: mapped|Please unlock disk")
    assert "released" not in site.events()


def session_in_dry_run(lines: list[str]) -> str:
    """Find the session that a dry-run names."""
    (line,) = [line for line in lines if "this boot would get" in line]
    return line.rpartition("session ")[2].rstrip(")")
