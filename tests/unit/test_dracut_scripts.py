"""The boot scripts and units of the dracut module, run with programs that write down how they were called."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODULE = ROOT / "dracut-module/50kagimori"
IN_CI = os.environ.get("CI") == "true"


class Stage:
    """A directory that stands for an initramfs's root: scripts find there what they name by absolute paths."""

    def __init__(self, root: Path) -> None:
        """Make it, with a PATH of our programs before the machine's."""
        self.root = root
        for name in ("bin", "boot", "etc", "run", "net", "mapper", "block"):
            (root / name).mkdir()
        self.calls = root / "calls"
        self.calls.touch()
        for name in ("cap", "unlock", "no-passphrase"):
            self.program(name, directory="boot")
        self.program("links", "exec sleep 60", "boot")

    def program(self, name: str, body: str = "", directory: str = "bin") -> None:
        """Put a program there that writes its call down, and then runs ``body``."""
        path = self.root / directory / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.calls}\n{body}\n')
        path.chmod(0o755)

    def text(self, name: str) -> str:
        """Give a script, with its places moved into this directory."""
        text = (MODULE / name).read_text()
        for before, after in (
            ("PATH=/usr/lib/kagimori/bin:", f"PATH={self.root}/bin:"),
            ("/usr/lib/kagimori/boot", f"{self.root}/boot"),
            ("/etc/kagimori/boot.conf", f"{self.root}/etc/boot.conf"),
            ("/etc/resolv.conf", f"{self.root}/etc/resolv.conf"),
            ("/run/", f"{self.root}/run/"),
            ("/sys/class/net", f"{self.root}/net"),
            ("/sys/class/block", f"{self.root}/block"),
            ("/dev/mapper", f"{self.root}/mapper"),
            ("/sbin/cryptroot-ask.dracut", f"{self.root}/bin/cryptroot-ask.dracut"),
        ):
            text = text.replace(before, after)
        return text

    def run(self, name: str, *arguments: str, before: str = "", **environment: str) -> int:
        """Run a script, ``before`` it other lines as where it is sourced; gives its exit code."""
        script = self.root / "script"
        script.write_text(f"{before}\n{self.text(name)}")
        told = self.root / "told"
        with told.open("w") as out:
            done = subprocess.run(
                ["sh", str(script), *arguments],
                check=False,
                stdout=out,
                stderr=out,
                timeout=20,
                env={"PATH": f"{self.root}/bin:{os.environ['PATH']}", **environment},
            )
        return done.returncode

    def called(self) -> list[str]:
        """Give the calls so far."""
        return [call.rstrip() for call in self.calls.read_text().splitlines()]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Give an empty stage; what a test left running ends with it."""
    one = Stage(tmp_path)
    yield one
    for name in (".keeper", ".teller"):
        left = tmp_path / "run/kagimori/network" / name
        if left.exists():
            os.kill(int(left.read_text()), signal.SIGKILL)


def _resolvers(stage: Stage, state: str) -> str:
    """Tell what the agent gets to see of what networkd writes."""
    (stage.root / "etc/boot.conf").write_text("network=dhcp\n")
    (stage.root / "run/systemd/netif").mkdir(parents=True)
    (stage.root / "run/systemd/netif/state").write_text(state)
    stage.program("systemctl")
    assert stage.run("networkd", "up") == 0
    assert "systemctl --no-ask-password --no-block start systemd-networkd.service" in stage.called()
    deadline = time.monotonic() + 5
    path = stage.root / "etc/resolv.conf"
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return path.read_text() if path.exists() else ""


def test_networkd_s_resolvers_reach_the_agent(stage: Stage) -> None:
    """Of IPv4 and IPv6; nothing but networkd knows them, as there is no resolved in an initramfs."""
    said = _resolvers(stage, "ADMIN_STATE=configured\nDNS=10.0.2.3 fd00::53\nNTP=10.0.0.9\n")
    assert said == "nameserver 10.0.2.3\nnameserver fd00::53\n"


def test_what_is_no_address_is_no_resolver(stage: Stage) -> None:
    """Whoever answers on the host's network chooses what stands there; pathnames do not grow out of a *."""
    state = "DNS=$(touch${IFS}x) `id` * 10.0.2.3 10.0.0.1#name ;reboot\nDOMAINS=evil\nDNS_MORE=10.6.6.6\n"
    assert _resolvers(stage, state) == "nameserver 10.0.2.3\n"


def test_the_network_goes_down_with_networkd_and_its_socket(stage: Stage) -> None:
    """Without the socket, or the next message of the kernel would start networkd again in the middle of leaving."""
    for name in ("lo", "ens3"):
        (stage.root / "net" / name).mkdir()
    (stage.root / "net/ens3/device").mkdir()
    stage.program("ip")
    _resolvers(stage, "DNS=10.0.2.3\n")
    stage.calls.write_text("")
    tellers = [
        int((stage.root / "run/kagimori/network" / name).read_text()) for name in (".keeper", ".teller")
    ]
    assert stage.run("networkd", "down") == 0
    assert stage.called() == [
        "systemctl --no-ask-password stop systemd-networkd.socket systemd-networkd.service",
        "ip address flush dev ens3",
        "ip link set ens3 down",
    ]
    assert not (stage.root / "etc/resolv.conf").exists()
    assert stage.run("networkd", "down") == 0
    assert len(stage.called()) == 3
    deadline = time.monotonic() + 5
    while any(_runs(pid) for pid in tellers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def _network_file(stage: Stage, settings: str, at_boot: str = "") -> str:
    """Give what networkd is told for these settings, or for those that were made at boot."""
    (stage.root / "etc/boot.conf").write_text(settings)
    if at_boot:
        (stage.root / "run/kagimori").mkdir()
        (stage.root / "run/kagimori/boot.conf").write_text(at_boot)
    stage.program("systemctl")
    assert stage.run("networkd", "up") == 0
    path = stage.root / "run/systemd/network/00-kagimori.network"
    return path.read_text() if path.exists() else ""


def test_networkd_takes_addresses_from_dhcp_and_nothing_else(stage: Stage) -> None:
    """Names, domains, clocks and time zones are a server's to say and ours not to hear."""
    text = _network_file(stage, "network=dhcp\n")
    assert text.startswith("[Match]\nType=ether\nKind=!*\n\n[Network]\nDHCP=yes\n")
    for option in ("UseHostname=no", "UseDomains=no", "UseNTP=no", "SendHostname=no"):
        assert option in text


STATIC = "network=static\ninterface=ens3\naddress=10.0.0.2/32\ngateway=10.0.0.1\ndns=10.0.0.3\ndns=fd00::53\n"


@pytest.mark.parametrize("settings", [(STATIC, ""), ("network=dhcp\ninterface=eth9\n", STATIC)])
def test_a_static_network_is_what_the_settings_say(stage: Stage, settings: tuple[str, str]) -> None:
    """Also with a gateway outside of the prefix, on the named card alone; the command line's come before agent.toml's."""
    assert _network_file(stage, *settings) == (
        "[Match]\nName=ens3\n\n[Network]\nAddress=10.0.0.2/32\nDHCP=no\nIPv6AcceptRA=no\n"
        "DNS=10.0.0.3\nDNS=fd00::53\n\n[Route]\nGateway=10.0.0.1\nGatewayOnLink=yes\n"
    )


def test_a_network_that_is_left_to_others_is_left_alone(stage: Stage) -> None:
    """With method "none" networkd is not even started."""
    assert _network_file(stage, "network=none\n") == ""
    assert stage.called() == []


@pytest.mark.parametrize(
    ("result", "status", "calls"),
    [
        ("success", "0", []),
        ("exit-code", "10", ["cap", "cap"]),
        ("exit-code", "1", ["cap end", "cap end"]),
        ("signal", "KILL", ["cap end", "cap end"]),
        ("oom-kill", "KILL", ["cap end", "cap end"]),
        ("", "", ["cap end", "cap end"]),
    ],
)
def test_an_unlock_that_did_not_end_by_itself_ends_the_boot(
    stage: Stage, result: str, status: str, calls: list[str]
) -> None:
    """Only a unit that opened all goes on, and only agent.toml's own "shell" gives one; a killed cap is made again."""
    stage.program("cap", f'[ "$(grep -c cap {stage.calls})" -ge 2 ] || kill -KILL $$', "boot")
    assert stage.run("given-up", SERVICE_RESULT=result, EXIT_STATUS=status) == 0
    assert stage.called() == calls


def test_systemd_finds_a_governed_volume_open_or_fails(stage: Stage) -> None:
    """In place of systemd-cryptsetup, which would ask on the host's console."""
    stage.program("no-passphrase", 'echo "for $CRYPTTAB_NAME" >&2; exit 1', "boot")
    assert stage.run("attached", "crypt root") == 1
    assert (stage.root / "told").read_text() == "for crypt root\n"
    (stage.root / "mapper/crypt root").touch()
    assert stage.run("attached", "crypt root") == 0


def test_a_volume_that_is_named_by_its_uuid_is_open_under_any_name(stage: Stage) -> None:
    """As rd.luks.uuid= of the kernel command line names it; but another volume, or another kind, is not this one."""
    stage.program("no-passphrase", "exit 1", "boot")
    name = "luks-6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"
    assert stage.run("attached", name) == 1
    (stage.root / "block/dm-0/dm").mkdir(parents=True)
    uuid = stage.root / "block/dm-0/dm/uuid"
    for found, code in (
        ("LUKS2-6f1c1a588a524b7e9c8c0d6f3c7f2a11-root", 0),
        ("LUKS2-6f1c1a588a524b7e9c8c0d6f3c7f2a12-root", 1),
        ("PLAIN-6f1c1a588a524b7e9c8c0d6f3c7f2a11-root", 1),
    ):
        uuid.write_text(f"CRYPT-{found}\n")
        assert stage.run("attached", name) == code


@pytest.mark.parametrize("name", ["cryptroot", "luks-6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"])
def test_cryptroot_ask_is_not_run_for_a_governed_volume(stage: Stage, name: str) -> None:
    """By neither of its names; any other volume is dracut's own affair, unless it is open."""
    stage.program("cryptroot-ask.dracut")
    (stage.root / "etc/boot.conf").write_text("volume=cryptroot\nuuid=6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11\n")
    device = stage.root / "vda3"
    device.touch()
    stage.run("cryptroot-ask", str(device), name, "0", "")
    assert stage.called() == ["no-passphrase"]
    stage.run("cryptroot-ask", str(device), "luks-other", "0", "")
    assert stage.called()[1:] == [f"cryptroot-ask.dracut {device} luks-other 0"]
    (stage.root / "block/vda3/holders/dm-0").mkdir(parents=True)
    assert stage.run("cryptroot-ask", str(device), "luks-other") == 0
    assert len(stage.called()) == 2


@pytest.mark.parametrize(
    ("rounds", "state", "after"),
    [(61, "activating", 0), (61, "active", 61), (61, "failed", 61), (60, "activating", 60)],
)
def test_dracut_does_not_give_up_while_the_agent_waits(
    stage: Stage, rounds: int, state: str, after: int
) -> None:
    """Its own patience is three minutes; a verifier may be away for longer."""
    stage.program("systemctl", f"echo ActiveState={state}")
    script = stage.root / "hook"
    script.write_text(f"{stage.text('patience-hook.sh')}\n")
    stage.run(
        "patience-hook.sh", before=f"trap 'echo \"rounds $main_loop\" >>{stage.calls}' 0\nmain_loop={rounds}"
    )
    assert stage.called()[-1] == f"rounds {after}"


def test_a_cap_that_is_killed_is_started_again(stage: Stage) -> None:
    """Dracut's init ignores how its hooks end."""
    stage.program("cap", f'[ "$(grep -c cap {stage.calls})" -ge 3 ] || kill -KILL $$', "boot")
    assert stage.run("cap-hook.sh") == 0
    assert stage.called() == ["cap", "cap", "cap"]


@pytest.mark.parametrize(
    ("code", "calls"),
    [
        (0, ["unlock"]),
        (10, ["unlock", "shell", "cap end"]),
        (1, ["unlock", "cap end"]),
        (137, ["unlock", "cap end"]),
    ],
)
def test_what_follows_a_failed_unlock_is_no_further_boot(stage: Stage, code: int, calls: list[str]) -> None:
    """Init would go on to cryptroot-ask; a `cap end` that is killed is run again."""
    (stage.root / "run/kagimori").mkdir()
    stage.program("unlock", f"[ {code} -lt 128 ] || kill -KILL $$; exit {code}", "boot")
    stage.program("cap", f'[ "$(grep -c "cap end" {stage.calls})" -lt 2 ] || kill -KILL "$PPID"', "boot")
    shell = f"emergency_shell() {{ echo shell >>{stage.calls}; }}"
    ended = stage.run("unlock-hook.sh", before=shell)
    assert ended == (0 if code == 0 else -signal.SIGKILL)
    assert stage.called() == [*calls, *([] if code == 0 else ["cap end"])]
    if code == 0:
        assert stage.run("unlock-hook.sh") == 0
        assert stage.called() == ["unlock"]


def _verify(directory: Path, *units: str) -> str:
    """Let systemd read units below ``directory``; gives what it complains of."""
    if shutil.which("systemd-analyze") is None:
        if IN_CI:
            pytest.fail("systemd-analyze is not installed; it is part of systemd")
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        ["systemd-analyze", "verify", f"--root={directory}", *units],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stderr + ("" if done.returncode == 0 else f"exit code {done.returncode}")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give a directory with the units, their drop-in, and programs where they want them."""
    units, boot = tmp_path / "usr/lib/systemd/system", tmp_path / "usr/lib/kagimori/boot"
    for directory in (units, boot):
        directory.mkdir(parents=True)
    for path in MODULE.glob("*.service"):
        shutil.copy(path, units)
    for name in ("unlock", "given-up", "cap", "attached"):
        (boot / name).write_text("#!/bin/sh\n")
        (boot / name).chmod(0o755)
    for unit, drop_in in (
        ("rescue.service", "shell.conf"),
        ("systemd-cryptsetup@x.service", "cryptsetup.conf"),
    ):
        (units / unit).write_text(
            "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=/usr/lib/kagimori/boot/cap\n"
        )
        (units / f"{unit}.d").mkdir()
        shutil.copy(MODULE / drop_in, units / f"{unit}.d")
    return tmp_path


UNITS = ("kagimori-unlock.service", "kagimori-cap.service", "rescue.service", "systemd-cryptsetup@x.service")


def test_systemd_finds_nothing_wrong_with_the_units(image: Path) -> None:
    """A key that systemd does not know is ignored at boot, where nobody reads the warning."""
    assert _verify(image, *UNITS) == ""
    unit = image / "usr/lib/systemd/system/kagimori-cap.service"
    unit.write_text(unit.read_text().replace("Type=", "Kind="))
    assert "Unknown key" in _verify(image, "kagimori-cap.service")


def test_the_cap_comes_anew_before_each_way_out_of_the_initramfs() -> None:
    """What makes it so are few words, each of which somebody could tidy away."""
    lines = (MODULE / "kagimori-cap.service").read_text().splitlines()
    assert "RequiredBy=initrd-switch-root.target initrd-switch-root.service" in lines
    assert "Before=initrd-switch-root.target initrd-switch-root.service" in lines
    assert "FailureAction=poweroff-immediate" in lines
    assert not [line for line in lines if re.match(r"(RemainAfterExit|Condition|Assert)", line)]


def test_no_unit_waits_for_what_waits_for_it() -> None:
    """sysinit.target comes after cryptsetup.target, and so after us; default dependencies would be a circle."""
    for name in ("kagimori-unlock.service", "kagimori-cap.service"):
        text = (MODULE / name).read_text()
        assert "\nDefaultDependencies=no\n" in text
        assert "network-online" not in text
    after = re.findall(r"^After=(.*)$", (MODULE / "kagimori-unlock.service").read_text(), re.MULTILINE)
    # It extends PCR 11 beside any log; in no order, a boot would match its reference values or not by chance.
    assert "\nBefore=systemd-pcrphase-initrd.service\n" in (MODULE / "kagimori-unlock.service").read_text()
    assert after == ["systemd-modules-load.service systemd-udevd.service systemd-udev-trigger.service"]
