"""No way out of a boot leaves its cap PCR open: not the good one, not a killed agent, not a shell, not a second TPM."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.boot import images
from tests.boot.cache import Cache
from tests.boot.estate import BOOT_S, VM, Site, session_in
from tests.boot.images import SECRET
from tests.boot.monitor import monitor
from tests.boot.scene import ROOT_TOOLS, Scene, played, with_shell
from tests.boot.sightings import sightings_in, unlock_key, verifiers_key_in
from tests.boot.variants import ROOT

from kagimori_agent.cap import CAPPED

pytestmark = [pytest.mark.boot, pytest.mark.slow]

SECOND_TPM = r"""
modprobe tpm_vtpm_proxy
mkdir -p /snp/run/tpm2
d=/simulated/swtpm
chroot /snp $d/ld-linux-x86-64.so.2 --library-path $d $d/swtpm chardev --tpm2 --vtpm-proxy \
    --tpmstate dir=/run/tpm2 --seccomp action=none &
until [ -e /sys/class/tpm/tpm1/pcr-sha256/15 ]; do sleep 0.1; done
echo "scene: a second TPM is there"
"""
DUMP = r"""
cat >/dump <<'END'
cd /
/usr/lib/kagimori/bin/busybox tar -cf /dev/disk/by-id/virtio-dump $(ls / | grep -vxE 'dev|proc|sys|root|snp')
echo "scene: dumped"
END
echo 'sh /dump' >>/scripts/init-bottom/ORDER
"""
KILL = r"""
(
    until grep -qs 'no verifier answers' /run/kagimori/log; do sleep 0.2; done
    kill -KILL $(/usr/lib/kagimori/bin/busybox pidof kagimori-agent)
    echo 'scene: the agent is killed'
) &
"""
KEYS_BACK = r"""
echo "scene: sysrq $(cat /proc/sys/kernel/sysrq)"
(
    until grep -qs 'no verifier answers' /run/kagimori/log; do sleep 0.2; done
    sleep 8
    echo 438 >/proc/sys/kernel/sysrq
    echo 'scene: the keys are back'
) &
"""


def test_after_a_good_boot_not_even_root_gets_the_key(site: Site) -> None:
    """Two TPMs, both capped, before the root is /; root asks again by the same agent and gets a verdict.

    Nor has the boot left the key anywhere: not in a file of the initramfs or of /run, not on the console, not in what
    the verifier wrote. In 2040, as far as the machine's clock knows.
    """
    dump = site.directory / "dump.img"
    with dump.open("wb") as file:
        file.truncate(256 << 20)
    scene = Scene(
        meanwhile=SECOND_TPM + DUMP,
        booted=f"{ROOT_TOOLS}\nagent dry-run\nagent unlock --prove",
        dump=dump,
        words=["-rtc", "base=2040-01-01T00:00:00"],
    )
    with site.serving() as served, played(site, served.url, scene) as machine:
        machine.wait_for("guest: done", BOOT_S)
        machine.wait_off(BOOT_S)
    assert machine.said(r"setting system clock to 2040-")
    assert machine.said("scene: a second TPM is there")
    assert machine.said(f"guest: root reached: {SECRET}")
    assert machine.said("guest: discards [1-9]"), "crypttab wants them"
    for tpm in ("tpm0", "tpm1"):
        assert machine.said(f"guest: cap {tpm} {CAPPED.hex().upper()}"), tpm
        assert machine.said(f"{tpm}: PCR 15 was capped"), "and again, by what stands before every root"
    assert machine.said("root: unlock: .*refuses the key")
    assert machine.said("root: unlock: FAILS  cap.off")
    assert machine.said("root: unlock: code 1")
    assert machine.said(f"root: dry-run: holds  cap.off: {CAPPED.hex()}: capped")
    assert machine.said("root: dry-run: home: this boot would get its keys"), "a verdict, and no key with it"
    events = site.events()
    assert events.count("released") == 1
    assert events.index("refused") < events.index("released")
    assert machine.said("scene: dumped")
    key = unlock_key(site.directory / "verifier", VM)
    places = [dump, machine.directory / "serial.log", site.directory / "verifier.log", *_written(site)]
    for place in places:
        assert sightings_in(key, place) == []
    assert verifiers_key_in(site.estate.verifier.parent / "agent.toml") in dump.read_bytes(), (
        "the search can find"
    )


def _written(site: Site) -> list[Path]:
    return [path for path in (site.directory / "verifier").rglob("*") if path.is_file()]


def test_a_killed_agent_leaves_a_capped_machine_that_powers_off(site: Site) -> None:
    """SIGKILL gives the agent no chance: the script around it caps, and no prompt and no shell follows."""
    with played(site, None, Scene(meanwhile=KILL)) as machine:
        machine.wait_off(BOOT_S)
    assert machine.said("scene: the agent is killed")
    assert machine.said(r"the volumes are not open \(exit code 137 of the agent\)")
    assert machine.said("tpm0: PCR 15 capped")
    assert machine.said("reboot: Power down")
    assert not machine.said("guest: root reached|: mapped|built-in commands|Please unlock disk")


def test_the_host_s_emergency_keys_do_nothing(site: Site) -> None:
    """One of them kills whatever runs on the console, and /init goes on after a root check that was killed.

    A guest that has them answers "h" with a list of them, as this one does once they are given back to it.
    """
    with monitor() as host, played(site, None, Scene(meanwhile=KEYS_BACK, words=host.words)) as machine:
        machine.wait_for("no verifier answers", BOOT_S)
        host.send_break()
        machine.type_raw(b"h")
        machine.wait_for("scene: the keys are back", BOOT_S)
        assert not machine.said("sysrq: ")
        host.send_break()
        machine.type_raw(b"h")
        machine.wait_for("sysrq: HELP", BOOT_S)
    assert machine.said("scene: sysrq 0")


def test_a_machine_without_its_tpm_ends(site: Site) -> None:
    """Its driver may load later, and then there would be a TPM that nobody has capped."""
    with site.serving() as served, played(site, served.url, Scene(tpm=False)) as machine:
        machine.wait_off(BOOT_S)
    assert machine.said("exit code 5 of the agent|exit code 4 of the agent")
    assert machine.said("kagimori: this boot cannot be capped, so it ends here")
    assert machine.said("reboot: Power down")
    assert not machine.said("guest: root reached|: mapped|built-in commands")
    assert "released" not in site.events()


@pytest.fixture
def with_a_shell(site: Site) -> Site:
    """Give the site of an owner whose agent.toml wants a shell on failure, after little patience."""
    toml = (
        re.sub(r"boot_budget_s = \d+", "boot_budget_s = 45", site.estate.agent_toml)
        + '\n[boot]\non_failure = "shell"\n'
    )
    initramfs = images.build_initramfs(Cache(ROOT / ".dev" / "boot"), site.estate.images, toml)
    return Site(replace(site.estate, initramfs=initramfs), site.directory)


def test_a_shell_on_giving_up_gets_no_key(with_a_shell: Site) -> None:
    """Without a network the budget ends; who debugs the image then gets a shell, in a boot that is capped.

    The console is the host's: it asks for the key from that shell, with the cable back in, and reads why not. Then the
    report door is gone, which is told as what it is. Leaving the shell powers off.
    """
    site = with_a_shell
    unlock = "/usr/lib/kagimori/boot/unlock"
    with (
        monitor() as cable,
        site.serving() as served,
        played(site, served.url, Scene(cmdline=with_shell(""), words=cable.words)) as machine,
    ):
        cable.set_cable(plugged=False)
        machine.wait_for("The time that a boot may wait for an answer is over", BOOT_S)
        machine.wait_for(r"^\(initramfs\) ", BOOT_S, prompt=True)
        machine.type('echo "shell: PCR 15 $(cat /sys/class/tpm/tpm0/pcr-sha256/15)"')
        machine.wait_for(f"shell: PCR 15 {CAPPED.hex().upper()}", BOOT_S)
        cable.set_cable(plugged=True)
        machine.type("/usr/lib/kagimori/boot/network up; kagimori-agent unlock; echo shell: unlock gave $?")
        machine.wait_for(r"shell: unlock gave \d", BOOT_S)
        machine.type(f"umount /sys/kernel/config/tsm; {unlock} dry-run; echo shell: dry-run gave $?")
        machine.wait_for(r"shell: dry-run gave \d", BOOT_S)
        machine.type("ls /dev/mapper; exit")
        machine.wait_off(BOOT_S)
    assert machine.said("expected: an answer within 45 s")
    assert machine.said("tpm0: PCR 15 (was )?capped")
    assert machine.said("shell: unlock gave 1$")
    assert machine.said("FAILS  cap.off")
    assert machine.said("shell: dry-run gave 4$")
    assert not machine.said("guest: root reached|: mapped|Please unlock disk|cryptroot$")
    checks = {check["id"]: check for check in site.explained(session_in(machine.said("")))}
    assert not checks["cap.off"]["ok"]
    assert "released" not in site.events()
    assert site.events()[:2] == ["confirmed-received", "refused"]
