"""The dracut module: what it puts into an initramfs, and its scripts, with dracut's functions stood in for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODULE = ROOT / "dracut-module/50kagimori"
COMMON = ROOT / "initramfs-tools-hook/common"
IN_CI = os.environ.get("CI") == "true"

SETTINGS = "on_failure=poweroff\nnetwork=dhcp\nvolume=crypt-root\nuuid=6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11\n"

# What dracut-init.sh gives a module; each writes down what it was asked for, and copies as dracut does. Options are
# dracut's, too.
DRACUT = r"""
set -o pipefail
dfatal() { echo "fatal: $*" >&2; }
dwarn() { echo "warn: $*" >&2; }
dinfo() { echo "info: $*" >&2; }
inst_simple() {
    [[ -e $initdir/${2:-$1} ]] && return 0
    [[ -e $1 ]] || return 1
    mkdir -p "$(dirname "$initdir/${2:-$1}")" && cp "$1" "$initdir/${2:-$1}"
}
inst_binary() { inst_simple "$@"; }
inst_multiple() { for one; do inst_simple "$one" || return 1; done; }
inst_hook() { inst_simple "$3" "/lib/dracut/hooks/$1/$2-${3##*/}"; }
instmods() { echo "instmods $*" >>"$calls"; [[ $* != *"$lacking"* ]]; }
dracut_module_included() { [[ " $included " == *" $1 "* ]]; }
dracut_module_path() { echo "$place/modules.d/90$1"; }
dracut_need_initqueue() { echo need-initqueue >>"$calls"; }
systemctl() { echo "systemctl $*" >>"$calls"; }
SYSTEMCTL=systemctl kernel=6.1.0 dracutsysrootdir=''
"""


class Machine:
    """A directory that stands for the machine on which dracut runs: our files, programs, and the initramfs."""

    def __init__(self, root: Path) -> None:
        """Make it, with the agent installed."""
        self.root = root
        self.initramfs = root / "initramfs"
        self.calls = root / "calls"
        for name in ("bin", "boot", "initramfs/etc", "units", "util", "links", "modules.d/90crypt"):
            (root / name).mkdir(parents=True)
        self.calls.touch()
        for script in COMMON.iterdir():
            shutil.copy(script, root / "boot" / script.name)
        (root / "modules.d/90crypt/cryptroot-ask.sh").write_text("dracut's own")
        for name in ("systemd-networkd.service", "systemd-networkd.socket"):
            (root / "units" / name).write_text(name)
        # More than a pipe holds, as no reader may stop before its end.
        self.program("busybox", f'printf "%s\\n" {" ".join(self.applets())}; seq 100000')
        self.program("systemd-networkd", "", "util")
        for file in ("passwd", "group"):
            (root / file).write_text("root:x:0:\nsystemd-network:x:998:\n")
        (root / "agent.toml").touch()
        self.agent(SETTINGS)

    @staticmethod
    def applets() -> list[str]:
        """Name what the module wants of busybox."""
        found = re.search(
            r"^kagimori_applets='(.*)'$", (MODULE / "module-setup.sh").read_text(), re.MULTILINE
        )
        assert found is not None
        return found[1].split()

    def program(self, name: str, body: str, directory: str = "bin") -> None:
        """Put a program there."""
        path = self.root / directory / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def agent(self, settings: str, listed: str = "module dm_crypt", code: int = 0) -> None:
        """Let the agent's footprint write these settings into the initramfs, and list this."""
        self.program(
            "kagimori-agent",
            f'echo "kagimori-agent $*" >>{self.calls}\nwhile [ $# -gt 1 ]; do shift; done\n'
            f'[ ! -d "$1" ] || {{ mkdir -p "$1/etc/kagimori"; cat >"$1/etc/kagimori/boot.conf" <<"END"\n'
            f"{settings}END\n}}\ncat <<'END'\n{listed}\nEND\nexit {code}",
        )

    def run(
        self, function: str, included: str = "systemd crypt dm", lacking: str = "nothing"
    ) -> subprocess.CompletedProcess[str]:
        """Call a function of module-setup.sh as dracut does; "went on" is said if dracut would."""
        text = (MODULE / "module-setup.sh").read_text()
        for before, after in (
            ("=/etc/kagimori/agent.toml", f"={self.root}/agent.toml"),
            ('kagimori_copy "$kagimori_common/', f'kagimori_copy "{self.root}/boot/'),
            ("/usr/lib/systemd/network/", f"{self.root}/links/"),
            ('"/etc/$file"', f'"{self.root}/$file"'),
        ):
            assert before in text
            text = text.replace(before, after)
        setup = self.root / "module-setup.sh"
        setup.write_text(text)
        variables = (
            f"initdir={self.initramfs} calls={self.calls} place={self.root} moddir={MODULE} lacking='{lacking}' "
            f"included='{included}' systemdsystemunitdir={self.root}/units systemdutildir={self.root}/util"
        )
        return subprocess.run(
            [
                "bash",
                "-c",
                f"{variables}\n{DRACUT}\n. {setup}\n{function}\ncode=$?\necho went on\nexit $code",
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=20,
            env={"PATH": f"{self.root}/bin:{os.environ['PATH']}"},
        )

    def files(self) -> set[str]:
        """Name what is in the initramfs, but not what lies where this machine's directories do."""
        return {
            f"/{path.relative_to(self.initramfs)}" for path in self.initramfs.rglob("*") if path.is_file()
        }

    def read(self, path: str) -> str:
        """Give a file of the initramfs."""
        return (self.initramfs / path.lstrip("/")).read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Give a machine with everything installed."""
    return Machine(tmp_path)


def test_without_agent_toml_the_module_is_left_out(machine: Machine) -> None:
    """A machine that has the package and no enrolment goes on booting as before."""
    assert machine.run("check").returncode == 0
    (machine.root / "agent.toml").unlink()
    assert machine.run("check").returncode == 1


def test_an_initramfs_with_systemd_gets_units_and_a_cap_before_each_shell(machine: Machine) -> None:
    """Every unit that gives a shell caps first, and governed volumes are nobody else's, by either of their names."""
    done = machine.run("install")
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    files = machine.files()
    for name in ("unlock", "cap", "root-check", "lease", "no-passphrase", "network", "attached", "given-up"):
        assert f"/usr/lib/kagimori/boot/{name}" in files
    breakpoints = [f"breakpoint-pre-{when}" for when in ("udev", "basic", "mount", "switch-root")]
    for unit in ("emergency", "rescue", "dracut-emergency", "debug-shell", *breakpoints):
        drop_in = machine.read(f"/etc/systemd/system/{unit}.service.d/50-kagimori.conf")
        assert "\nExecStartPre=/usr/lib/kagimori/boot/cap\n" in drop_in
    for name in (r"crypt\x2droot", r"luks\x2d6f1c1a58\x2d8a52\x2d4b7e\x2d9c8c\x2d0d6f3c7f2a11"):
        drop_in = machine.read(f"/etc/systemd/system/systemd-cryptsetup@{name}.service.d/50-kagimori.conf")
        assert "\nExecStart=\nExecStart=/usr/lib/kagimori/boot/attached %I\n" in drop_in
        assert "\nRequires=kagimori-unlock.service\nAfter=kagimori-unlock.service\n" in drop_in
    enabled = [call.split()[-1] for call in machine.calls.read_text().splitlines() if " enable " in call]
    assert enabled == ["kagimori-unlock.service", "kagimori-cap.service", "kagimori-root-check.service"]
    assert {
        "/lib/dracut/hooks/initqueue/settled/99-patience-hook.sh",
        "/lib/dracut/hooks/cmdline/00-sysrq-hook.sh",
    } <= files
    assert "\nblacklist qemu_fw_cfg\n" in machine.read("/etc/modprobe.d/kagimori.conf")
    assert not {file for file in files if "cryptroot-ask" in file or "unlock-hook" in file}


def test_an_initramfs_without_systemd_gets_hooks(machine: Machine) -> None:
    """The same order by dracut's own means: before cryptroot-ask, before any shell, before the root becomes /."""
    done = machine.run("install", included="crypt dm")
    assert done.returncode == 0, done.stderr
    files = machine.files()
    for hook in (
        "cmdline/00-sysrq-hook.sh",
        "initqueue/settled/01-unlock-hook.sh",
        "emergency/00-cap-hook.sh",
        "pre-pivot/00-cap-hook.sh",
        "pre-pivot/99-root-check-hook.sh",
    ):
        assert f"/lib/dracut/hooks/{hook}" in files
    assert machine.read("/sbin/cryptroot-ask") == (MODULE / "cryptroot-ask").read_text()
    assert machine.read("/sbin/cryptroot-ask.dracut") == "dracut's own"
    assert machine.read("/usr/lib/kagimori/boot/network") == (COMMON / "network").read_text()
    assert "need-initqueue" in machine.calls.read_text()
    assert not {file for file in files if file.startswith("/etc/systemd")}


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda machine: machine.agent(SETTINGS, code=4), "the agent cannot be put into the initramfs"),
        (lambda machine: (machine.root / "boot/cap").unlink(), "boot/cap cannot be put into the initramfs"),
        (lambda machine: machine.program("busybox", "echo sed"), "this busybox has no cat"),
        (lambda machine: (machine.root / "passwd").write_text(""), "there is no systemd-network in"),
        (
            lambda machine: (machine.root / "units/systemd-networkd.socket").unlink(),
            "systemd-networkd cannot be",
        ),
    ],
)
def test_whatever_is_missing_ends_dracut(machine: Machine, break_it: object, said: str) -> None:
    """Dracut goes on when a module's install fails; an initramfs without the agent would ask the host's console."""
    assert callable(break_it)
    break_it(machine)
    done = machine.run("install")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"fatal: kagimori: {said}" in done.stderr.replace(f"{machine.root}/", "")


def test_kernel_modules_are_those_of_the_footprint_and_one_that_is_not_found_ends_dracut(
    machine: Machine,
) -> None:
    """What a kernel lacks and some boots need is said; what every boot needs stops the footprint itself."""
    machine.agent(
        SETTINGS,
        "file /usr/bin/python3\nmodule dm_crypt\nmodule xts\nbuiltin tpm_crb\nabsent tpm_svsm wanted: the vTPM",
    )
    done = machine.run("installkernel")
    assert done.returncode == 0
    assert [call for call in machine.calls.read_text().splitlines() if call.startswith("instmods")] == [
        "instmods -c dm_crypt",
        "instmods -c xts",
    ]
    assert (
        "warn: kagimori: Linux 6.1.0 comes without tpm_svsm the vTPM; an unlock that needs it" in done.stderr
    )
    done = machine.run("installkernel", lacking="xts")
    assert (done.returncode, done.stdout) == (1, "")
    assert "fatal: kagimori: the kernel module xts cannot be added" in done.stderr


def test_another_root_is_refused(machine: Machine) -> None:
    """The footprint resolves names on the machine that it runs on."""
    done = machine.run("dracutsysrootdir=/elsewhere; install")
    assert (done.returncode, done.stdout) == (1, "")


def test_systemd_brings_the_network_up_where_it_is_there(machine: Machine) -> None:
    """Networkd comes with its user, whom its unit names; no file of this machine says what it does."""
    assert machine.run("install").returncode == 0
    assert machine.read("/usr/lib/kagimori/boot/network") == (MODULE / "networkd").read_text()
    assert machine.read("/usr/lib/kagimori/boot/links") == (COMMON / "network").read_text()
    assert machine.read("/etc/passwd") == machine.read("/etc/group") == "systemd-network:x:998:\n"
    assert not [file for file in machine.files() if file.endswith(".network")]


def test_a_network_that_is_left_to_others_brings_no_networkd(machine: Machine) -> None:
    """With method "none" nothing of ours touches a card."""
    machine.agent(SETTINGS.replace("dhcp", "none"))
    assert machine.run("install").returncode == 0
    assert machine.read("/usr/lib/kagimori/boot/network") == (COMMON / "network").read_text()


def test_a_machine_without_networkd_gets_our_own_client(machine: Machine) -> None:
    """Such as one whose systemd was built without it."""
    (machine.root / "util/systemd-networkd").unlink()
    assert machine.run("install").returncode == 0
    assert machine.read("/usr/lib/kagimori/boot/network") == (COMMON / "network").read_text()


def test_each_file_names_who_runs_it_and_when() -> None:
    """The first lines of a boot script or unit are the only manual that its reader has."""
    for path in MODULE.iterdir():
        head = path.read_text().split("\n\n")[0]
        if path.suffix in {".service", ".conf"}:
            assert re.search(r"\bPart of an initramfs\b|\bDrop-in of\b", path.read_text()), path
        else:
            assert re.match(r"#!/bin/(?:ba)?sh\n# ", head), path
            assert re.search(r"\bRuns? (?:as|by)\b", head), path
            assert os.access(path, os.X_OK), path
