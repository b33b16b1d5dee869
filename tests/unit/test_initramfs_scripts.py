"""The scripts of the early boot, run by this machine's sh with programs that write down how they were called."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ROOM = ROOT / "initramfs-tools-hook"
OWN_PATH = re.compile(r"^PATH=/usr/lib/kagimori/bin:.*$", re.MULTILINE)


class Stage:
    """A directory that stands for an initramfs's root: scripts find there what they name by absolute paths."""

    def __init__(self, root: Path) -> None:
        """Make it, with a PATH of our programs before the machine's."""
        self.root = root
        for name in ("bin", "boot", "etc", "run", "net"):
            (root / name).mkdir()
        self.calls = root / "calls"
        self.calls.touch()
        self.program("ip")

    def program(self, name: str, body: str = "") -> None:
        """Put a program there that writes its call down, and then runs ``body``."""
        path = self.root / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.calls}\n{body}\n')
        path.chmod(0o755)

    def script(self, name: str) -> Path:
        """Copy a script, with its places moved into this directory."""
        text = (ROOM / ("booted" if name == "booted" else "common") / name).read_text()
        text = OWN_PATH.sub(f"PATH={self.root}/bin:/usr/sbin:/usr/bin:/sbin:/bin", text)
        for before, after in (
            ("/usr/lib/kagimori/boot", "boot"),
            ("/usr/bin/kagimori-agent", "bin/kagimori-agent"),
            ("/etc/kagimori/boot.conf", "etc/boot.conf"),
            ("/etc/resolv.conf", "etc/resolv.conf"),
            ("/proc/sysrq-trigger", "sysrq"),
            ("/proc/cmdline", "cmdline"),
            ("/run/kagimori", "run/kagimori"),
            ("/sys/class/net", "net"),
        ):
            text = text.replace(before, str(self.root / after))
        path = self.root / "boot" / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script with an environment of its own. What it leaves running keeps its output open, so that is files."""
        command = ["sh", str(self.script(name)), *arguments]
        told = [self.root / "run" / each for each in ("stdout", "stderr")]
        with told[0].open("w") as out, told[1].open("w") as err:
            done = subprocess.run(
                command,
                check=False,
                stdout=out,
                stderr=err,
                timeout=20,
                env={"PATH": os.environ["PATH"], **environment},
            )
        return subprocess.CompletedProcess(command, done.returncode, *(path.read_text() for path in told))

    def called(self) -> list[str]:
        """Give the calls so far, but for looks at what there is."""
        return [call for call in self.calls.read_text().splitlines() if not call.startswith("ip -o ")]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Give an empty stage; what a test left running ends with it."""
    one = Stage(tmp_path)
    yield one
    one.run("network", "down")


LEASE = {
    "interface": "eth0",
    "ip": "10.0.0.7",
    "mask": "24",
    "router": "10.0.0.1",
    "dns": "10.0.0.2 10.0.0.3",
}


def test_a_lease_gives_an_address_a_route_and_resolvers(stage: Stage) -> None:
    """What an ordinary DHCP server says is taken."""
    assert stage.run("lease", "bound", **LEASE).returncode == 0
    assert stage.called() == [
        "ip -4 address flush dev eth0",
        "ip address add 10.0.0.7/24 dev eth0",
        "ip route add 10.0.0.1/32 dev eth0",
        "ip route add default via 10.0.0.1 dev eth0",
    ]
    assert (stage.root / "etc/resolv.conf").read_text() == "nameserver 10.0.0.2\nnameserver 10.0.0.3\n"


def test_classless_routes_come_in_place_of_the_router(stage: Stage) -> None:
    """RFC 3442, as clouds with addresses of /32 send them: first the router's own, on the link, then all by it."""
    routes = "10.0.0.1/32 0.0.0.0 0.0.0.0/0 10.0.0.1"
    assert stage.run("lease", "bound", **LEASE | {"mask": "32", "staticroutes": routes}).returncode == 0
    assert stage.called()[2:] == [
        "ip route add 10.0.0.1/32 dev eth0",
        "ip route add 10.0.0.1/32 dev eth0",
        "ip route add 0.0.0.0/0 via 10.0.0.1 dev eth0",
    ]


NO_ADDRESS = [
    "$(touch x)",
    "`touch x`",
    "10.0.0",
    "10.0.0.1.1",
    "10.0.0.256",
    "10..0.1",
    "-4",
    "; reboot",
    "*",
    "1e1.0.0.1",
    "",
]


@pytest.mark.parametrize("evil", NO_ADDRESS)
def test_what_is_no_address_is_not_used_wherever_it_stands(stage: Stage, evil: str) -> None:
    """Whoever answers DHCP on the host's network chooses every byte of a lease."""
    assert stage.run("lease", "bound", **LEASE | {"ip": evil}).returncode == 1
    assert stage.called() == []
    assert stage.run("lease", "bound", **LEASE | {"router": evil, "dns": evil}).returncode == 0
    routes = {"staticroutes": f"{evil}/0 10.0.0.1 0.0.0.0/0 {evil}"}
    stage.run("lease", "bound", **LEASE | routes | {"router": ""})
    assert {call for call in stage.called() if "route" in call} == set()
    assert (stage.root / "etc/resolv.conf").read_text().strip() in {
        "",
        "nameserver 10.0.0.2\nnameserver 10.0.0.3",
    }
    assert sorted(path.name for path in stage.root.iterdir()) == ["bin", "boot", "calls", "etc", "net", "run"]


@pytest.mark.parametrize("length", ["33", "-1", "2 4", "$(id)", "255.255.255.0"])
def test_a_prefix_length_is_a_number_up_to_32(stage: Stage, length: str) -> None:
    """Nothing else reaches a command, and an address without its network is none."""
    assert stage.run("lease", "bound", **LEASE | {"mask": length}).returncode == 1
    assert stage.called() == []


def test_what_else_a_server_sends_is_nothing_to_us(stage: Stage) -> None:
    """Names, boot files and proxies are in the environment too, and are never looked at."""
    more = {
        "hostname": "$(reboot)",
        "domain": "`reboot`",
        "bootfile": "x",
        "search": ";reboot",
        "wpad": "http://evil",
    }
    stage.run("lease", "bound", **LEASE | more)
    assert "evil" not in stage.calls.read_text() + (stage.root / "etc/resolv.conf").read_text()
    assert "reboot" not in stage.calls.read_text() + (stage.root / "etc/resolv.conf").read_text()


def _interface(stage: Stage, name: str, *, hardware: bool = True) -> None:
    (stage.root / "net" / name).mkdir()
    if hardware:
        (stage.root / "net" / name / "device").mkdir()


def _until(stage: Stage, call: str) -> None:
    deadline = time.monotonic() + 15
    while call not in stage.called():
        assert time.monotonic() < deadline, stage.called()
        time.sleep(0.05)


def test_a_static_network_comes_up_and_goes_down_again(stage: Stage) -> None:
    """A card that comes late gets its address all the same; afterwards everything is as the kernel made it."""
    (stage.root / "etc/boot.conf").write_text(
        "network=static\naddress=10.0.0.2/32\ngateway=10.0.0.1\ndns=10.0.0.3\n"
    )
    _interface(stage, "lo", hardware=False)
    assert stage.run("network", "up").returncode == 0
    time.sleep(0.2)
    assert stage.called() == []
    _interface(stage, "ens3")
    _until(stage, "ip route add default via 10.0.0.1 dev ens3")
    assert stage.called()[:3] == [
        "ip link set ens3 up",
        "ip address add 10.0.0.2/32 dev ens3",
        "ip route add 10.0.0.1 dev ens3",
    ]
    assert stage.run("network", "down").returncode == 0
    assert stage.called()[-2:] == ["ip address flush dev ens3", "ip link set ens3 down"]
    assert not (stage.root / "etc/resolv.conf").exists()
    assert not (stage.root / "run/kagimori/network").exists()


def test_dhcp_is_asked_on_every_card_until_the_network_goes_down(stage: Stage) -> None:
    """Each card has a client of its own, and none of them outlives the unlock."""
    (stage.root / "etc/boot.conf").write_text("network=dhcp\n")
    stage.program("udhcpc", "exec sleep 60")
    _interface(stage, "eth0")
    _interface(stage, "eth1")
    assert stage.run("network", "up").returncode == 0
    for name in ("eth0", "eth1"):
        _until(stage, f"udhcpc -f -i {name} -s {stage.root}/boot/lease -t 3 -T 1 -A 2 -O 121")
    pids = [int((stage.root / f"run/kagimori/network/{name}").read_text()) for name in ("eth0", "eth1")]
    assert stage.run("network", "down").returncode == 0
    deadline = time.monotonic() + 5
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_who_only_watches_the_network_touches_nothing(stage: Stage) -> None:
    """With dracut, systemd-networkd brings it up; what is there and what is not, the console hears all the same."""
    (stage.root / "etc/boot.conf").write_text("network=dhcp\n")
    (stage.root / "run/kagimori").mkdir()
    _interface(stage, "eth0")
    stage.program("sleep", 'kill -KILL "$PPID"')
    done = stage.run("network", "watch")
    assert (done.returncode, done.stderr) == (-9, "kagimori: network: eth0 has no carrier\n")
    assert stage.called() == ["sleep 1"]


def test_only_the_named_interface_is_touched(stage: Stage) -> None:
    """An operator who names an interface keeps the others out of it."""
    (stage.root / "etc/boot.conf").write_text("network=dhcp\ninterface=eth1\n")
    stage.program("udhcpc", "exec sleep 60")
    _interface(stage, "eth0")
    _interface(stage, "eth1")
    stage.run("network", "up")
    _until(stage, f"udhcpc -f -i eth1 -s {stage.root}/boot/lease -t 3 -T 1 -A 2 -O 121")
    stage.run("network", "down")
    assert "eth0" not in stage.calls.read_text()


def _ends(stage: Stage, *arguments: str) -> list[str]:
    """Run ``cap`` where its ways to end the boot fail, as it must not come back; give what it tried."""
    stage.program("sleep", 'kill -KILL "$PPID"')
    for name in ("poweroff", "reboot", "sync"):
        stage.program(name)
    assert stage.run("cap", *arguments).returncode == -9
    return [call for call in stage.called() if not call.startswith("sync")]


def test_a_boot_that_cannot_be_capped_ends(stage: Stage) -> None:
    """And if power off fails, by the kernel's own letter; and if that fails, it waits for ever and comes not back."""
    stage.program("kagimori-agent", "exit 5")
    assert _ends(stage) == ["kagimori-agent cap", "poweroff -f", "sleep 60"]
    assert (stage.root / "sysrq").read_text() == "b\n"


def test_a_boot_that_is_capped_goes_on(stage: Stage) -> None:
    """Before a shell and before the root becomes /, a cap is all that is wanted."""
    stage.program("kagimori-agent")
    assert stage.run("cap").returncode == 0
    assert stage.called() == ["kagimori-agent cap"]


@pytest.mark.parametrize(
    ("setting", "call"),
    [("poweroff", "poweroff -f"), ("reboot", "reboot -f"), ("shell", "poweroff -f"), ("", "poweroff -f")],
)
def test_giving_up_caps_first(stage: Stage, setting: str, call: str) -> None:
    """However a failed boot ends, it ends capped, and as agent.toml says; a shell is not what a killed script leaves."""
    stage.program("kagimori-agent")
    (stage.root / "etc/boot.conf").write_text(f"on_failure={setting}\n" if setting else "")
    assert _ends(stage, "end") == ["kagimori-agent cap", call, "sleep 60"]


@pytest.mark.parametrize(
    ("setting", "code", "calls"),
    [
        ("poweroff", 1, ["cap end"]),
        ("reboot", 6, ["cap end"]),
        ("shell", 137, ["cap ", "cap "]),
        ("", 4, ["cap end"]),
        ("poweroff", 0, []),
    ],
)
def test_however_the_agent_ends_its_log_is_kept_and_the_boot_goes_on_only_if_it_opened_all(
    stage: Stage, setting: str, code: int, calls: list[str]
) -> None:
    """Also one that is killed: then nobody but these scripts caps; a cap that is killed before a shell is made again."""
    for name in ("modprobe", "mount", "network"):
        stage.program(name)
    stage.program("cap", f'[ $# -gt 0 ] || [ "$(grep -c cap {stage.calls})" -ge 2 ] || kill -KILL $$')
    stage.program("kagimori-agent", f"echo said >&2; [ {code} -lt 128 ] || kill -KILL $$; exit {code}")
    path = stage.script("unlock")
    for name in ("network", "cap"):
        (stage.root / "boot" / name).symlink_to(stage.root / "bin" / name)
    (stage.root / "etc/boot.conf").write_text(f"on_failure={setting}\n" if setting else "")
    (stage.root / "cmdline").write_text("ro quiet\n")
    done = subprocess.run(["sh", str(path)], check=False, capture_output=True, text=True, timeout=20)
    assert [call for call in stage.called() if call.startswith("cap")] == calls
    assert done.returncode == (10 if setting == "shell" else 0)
    assert (stage.root / "run/kagimori/log").read_text().startswith("said\n")
    assert "said\n" in done.stderr
    assert (stage.root / "run/kagimori").stat().st_mode & 0o777 == 0o700
    assert [call for call in stage.called() if call.startswith("network")] == ["network up", "network down"]


def test_no_passphrase_is_asked_for_a_governed_volume(stage: Stage) -> None:
    """Cryptroot's keyscript for it prints nothing that could be taken for a key."""
    done = stage.run("no-passphrase", CRYPTTAB_NAME="cryptroot")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no passphrase is asked for cryptroot" in done.stderr


def test_the_hook_takes_governed_volumes_away_from_every_other_unlocker(tmp_path: Path) -> None:
    """Neither a key file nor a keyscript of crypttab remains, device options do, and other volumes stay as they are."""
    text = (ROOM / "hook").read_text()
    function = re.search(r"^take_over_crypttab\(\) \{\n.*?^\}\n", text, re.MULTILINE | re.DOTALL)
    assert function is not None
    (tmp_path / "etc/kagimori").mkdir(parents=True)
    (tmp_path / "etc/kagimori/boot.conf").write_text("on_failure=poweroff\nvolume=cryptroot\nvolume=data\n")
    (tmp_path / "cryptroot").mkdir()
    (tmp_path / "cryptroot/crypttab").write_text(
        "cryptroot UUID=1 none luks,discard,keyscript=/lib/decrypt_x,tries=9\n"
        "data /dev/sdb /etc/key luks\n"
        "swap /dev/sdc /dev/urandom swap\n"
    )
    program = f"destination={tmp_path} common=/usr/lib/kagimori/boot\n{function[0]}take_over_crypttab"
    subprocess.run(["sh", "-ec", program], check=True)
    own = "keyscript=/usr/lib/kagimori/boot/no-passphrase,tries=1"
    assert (tmp_path / "cryptroot/crypttab").read_text() == (
        f"cryptroot UUID=1 none {own},luks,discard\ndata /dev/sdb none {own},luks\nswap /dev/sdc /dev/urandom swap\n"
    )
    assert [path.name for path in (tmp_path / "cryptroot").iterdir()] == ["crypttab"]


def test_each_script_names_who_runs_it_and_when() -> None:
    """The first lines of a boot script are the only manual that its reader has."""
    rooms = [ROOM / name for name in ("scripts", "common", "booted")]
    scripts = [path for room in rooms for path in room.iterdir() if path.suffix != ".service"]
    for path in [ROOM / "hook", *scripts]:
        head = path.read_text().split("\n\n")[0]
        assert head.startswith("#!/bin/sh\n# "), path
        assert re.search(r"\bRuns? (?:as|by)\b", head), path
        assert os.access(path, os.X_OK), path


@pytest.mark.parametrize(
    ("code", "calls"),
    [
        (0, ["unlock "]),
        (10, ["unlock ", "panic", "cap end", "cap end"]),
        (1, ["unlock ", "cap end", "cap end"]),
        (137, ["unlock ", "cap end", "cap end"]),
    ],
)
def test_what_follows_a_failed_unlock_is_no_further_boot(stage: Stage, code: int, calls: list[str]) -> None:
    """Init would go on to cryptroot's prompt; only for "shell" comes a shell, and the end of the boot when it is left.

    What ends it may be killed, too, and is started again.
    """
    text = (ROOM / "scripts/init-premount").read_text()
    functions = stage.root / "functions"
    functions.write_text(f'panic() {{ echo "panic" >>{stage.calls}; }}\n')
    for before, after in (
        ("/usr/lib/kagimori/boot", "bin"),
        ("/usr/bin/kagimori-agent", "bin/kagimori-agent"),
        ("/scripts/functions", "functions"),
    ):
        text = text.replace(before, str(stage.root / after))
    stage.program("kagimori-agent")
    stage.program("cap", f'[ "$(grep -c cap {stage.calls})" -ge 2 ] || kill -KILL $$')
    stage.program("unlock", f"[ {code} -lt 128 ] || kill -KILL $$; exit {code}")
    done = subprocess.run(["sh", "-c", text], check=False, capture_output=True, timeout=20)
    assert done.returncode == 0
    assert stage.called() == calls
