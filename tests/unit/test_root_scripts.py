"""The scripts around the root check: when it runs, what becomes of a boot that fails it, and what no initramfs has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from tests.unit.test_dracut_module import Machine
from tests.unit.test_initramfs_scripts import ROOM, ROOT, Stage

from kagimori_agent import opened

MODULE = ROOT / "dracut-module/50kagimori"


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Give an empty stage, whose agent and cap write down how they were called."""
    one = Stage(tmp_path)
    one.program("cap")
    one.program("kagimori-agent")
    (tmp_path / "boot/cap").symlink_to(tmp_path / "bin/cap")
    return one


def test_a_root_that_rests_on_the_agents_volumes_is_taken(stage: Stage) -> None:
    """What rests on what is kept for the booted system's journal."""
    stage.program("kagimori-agent", "echo '/root (ext4 of /dev/dm-0): on cryptroot'")
    (stage.root / "etc/boot.conf").write_text("on_failure=poweroff\n")
    assert stage.run("root-check", "/root").returncode == 0
    assert stage.called() == ["kagimori-agent root-check --root /root"]
    log = (stage.root / "run/kagimori/log").read_text()
    assert log == "kagimori: root check: /root (ext4 of /dev/dm-0): on cryptroot\n"


def test_a_root_that_rests_elsewhere_ends_the_boot(stage: Stage) -> None:
    """With its reasons on the console; never in a shell, which would be the host's, with the volumes open."""
    stage.program("kagimori-agent", "echo 'vdb: a disk' >&2; exit 8")
    done = stage.run("root-check", "/root")
    assert stage.called() == ["kagimori-agent root-check --root /root", "cap end"]
    assert "vdb: a disk\n" in done.stderr
    assert "this root is not taken, and the boot ends here (exit code 8 of the agent)" in done.stderr


def test_without_settings_and_without_an_agent_the_boot_ends(stage: Stage) -> None:
    """Unknown means no."""
    (stage.root / "bin/kagimori-agent").unlink()
    stage.run("root-check", "/root")
    assert stage.called() == ["cap end"]


def _moved(stage: Stage, source: Path) -> str:
    text = source.read_text()
    for before, after in (
        ("/usr/lib/kagimori/boot", "bin"),
        ("/usr/bin/kagimori-agent", "bin/kagimori-agent"),
    ):
        text = text.replace(before, str(stage.root / after))
    return text


@pytest.mark.parametrize(
    ("source", "calls"),
    [
        (ROOM / "scripts/init-bottom", ["cap ", "root-check /root", "root-check /root"]),
        (MODULE / "root-check-hook.sh", ["root-check /root", "root-check /root"]),
    ],
)
def test_a_check_that_is_killed_is_made_again(stage: Stage, source: Path, calls: list[str]) -> None:
    """What runs these scripts ignores how they end."""
    stage.program("root-check", f"[ $(grep -c root-check {stage.calls}) -gt 1 ] || kill -KILL $$")
    environment = {"rootmnt": "/root", "NEWROOT": "/root", "PATH": "/usr/bin:/bin"}
    subprocess.run(["sh", "-c", _moved(stage, source)], check=True, env=environment, timeout=20)
    assert stage.called() == calls


def test_the_check_is_the_last_of_its_stage(tmp_path: Path) -> None:
    """Whatever else runs there could mount something over the root: mkinitramfs is told to order it before."""
    script = tmp_path / "kagimori"
    script.write_text((ROOM / "scripts/init-bottom").read_text())
    for name in ("udev", "overlayroot", "ORDER"):
        (tmp_path / name).touch()
    done = subprocess.run(["sh", str(script), "prereqs"], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["overlayroot", "udev"]


def test_switch_root_waits_for_the_check_and_fails_with_it() -> None:
    """The unit comes after all that mounts, and nobody goes on without it."""
    unit = (MODULE / "kagimori-root-check.service").read_text()
    assert "\nBefore=initrd-switch-root.target initrd-switch-root.service\n" in unit
    assert "\nRequiredBy=initrd-switch-root.target initrd-switch-root.service\n" in unit
    assert "\nFailureAction=poweroff-immediate\n" in unit
    after = " ".join(re.findall(r"^After=(.*)$", unit, re.MULTILINE)).split()
    assert {"kagimori-cap.service", "initrd-fs.target", "dracut-pre-pivot.service"} <= set(after)
    assert "RemainAfterExit" not in unit


def _function(name: str) -> str:
    """Give a function of the hook for initramfs-tools."""
    text = (ROOM / "hook").read_text()
    found = re.search(rf"^{name}\(\) \{{\n.*?^\}}\n", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[0]


def test_no_initramfs_of_initramfs_tools_resumes_or_dumps(tmp_path: Path) -> None:
    """Neither by its own script and program, nor by a configuration that names a device."""
    gone = ["scripts/local-premount/resume", "scripts/init-top/kdump-tools", "bin/resume"]
    gone += ["conf/conf.d/resume", "conf/conf.d/zz-resume-auto"]
    for name in [*gone, "scripts/local-premount/other"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("RESUME=/dev/vdb\n")
    subprocess.run(
        ["sh", "-ec", f"destination={tmp_path}\n{_function('leave_out_resume')}leave_out_resume"], check=True
    )
    assert [name for name in gone if (tmp_path / name).exists()] == []
    assert (tmp_path / "scripts/local-premount/other").exists()
    # /init reads conf.d in this order, and the last one counts.
    last = max((tmp_path / "conf/conf.d").iterdir())
    assert last.read_text() == "RESUME=none\n"


@pytest.mark.parametrize("there", [True, False])
def test_the_host_s_keyboard_kills_nothing_of_a_boot(tmp_path: Path, there: bool) -> None:
    """One of the kernel's emergency keys kills what runs on the console, such as the root check.

    Both initramfs systems read this by themselves, first of all; a kernel without such keys has nothing to switch off.
    """
    (tmp_path / "conf/conf.d").mkdir(parents=True)
    subprocess.run(
        ["sh", "-ec", f"destination={tmp_path}\n{_function('take_keys_away')}take_keys_away"], check=True
    )
    keys = tmp_path / "sysrq"
    if there:
        keys.write_text("438\n")
    for source in (tmp_path / "conf/conf.d/zzz-kagimori", MODULE / "sysrq-hook.sh"):
        text = source.read_text().replace("/proc/sys/kernel/sysrq", str(keys))
        subprocess.run(["sh", "-ec", text], check=True)
        assert (keys.read_text() if there else keys.exists()) == ("0\n" if there else False)
        if there:
            keys.write_text("438\n")


def test_the_hook_tells_of_a_shell_that_comes_before_the_cap(tmp_path: Path) -> None:
    """Who has a key to dropbear is in a boot that could still ask for its keys."""
    program = f'destination={tmp_path}\nsay() {{ echo "$*"; }}\n{_function("tell_of_other_shells")}tell_of_other_shells'
    quiet = subprocess.run(["sh", "-ec", program], check=True, capture_output=True, text=True)
    assert quiet.stdout == ""
    (tmp_path / "usr/sbin").mkdir(parents=True)
    (tmp_path / "usr/sbin/dropbear").touch()
    told = subprocess.run(["sh", "-ec", program], check=True, capture_output=True, text=True)
    assert told.stdout.startswith("dropbear is in this initramfs")


@pytest.mark.parametrize("module", ["resume", "kdump", "kdumpbase"])
def test_dracut_makes_no_initramfs_that_resumes_or_dumps(tmp_path: Path, module: str) -> None:
    """It would do so before, or in place of, what is attested."""
    done = Machine(tmp_path).run("install", included=f"systemd crypt dm {module}")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"fatal: kagimori: the dracut module {module} is in this initramfs" in done.stderr


def test_generators_that_take_planted_disks_are_switched_off(tmp_path: Path) -> None:
    """A file of this name in /etc takes the place of systemd's own, and /dev/null is none (systemd.generator(7))."""
    machine = Machine(tmp_path)
    assert machine.run("install").returncode == 0
    for name in ("gpt-auto", "hibernate-resume"):
        link = machine.initramfs / f"etc/systemd/system-generators/systemd-{name}-generator"
        assert str(link.readlink()) == "/dev/null"


@pytest.mark.parametrize(("governed", "omitted"), [(True, " resume kdump kdumpbase "), (False, "")])
def test_dracut_is_told_to_leave_both_out_on_a_governed_machine(
    tmp_path: Path, governed: bool, omitted: str
) -> None:
    """And to do as before on one that has only the package."""
    toml = tmp_path / "agent.toml"
    if governed:
        toml.touch()
    text = (MODULE.parent / "kagimori.conf").read_text().replace("/etc/kagimori/agent.toml", str(toml))
    done = subprocess.run(
        ["bash", "-c", f'{text}\nprintf %s "$omit_dracutmodules"'], check=True, capture_output=True, text=True
    )
    assert done.stdout == omitted


def test_no_script_writes_where_the_record_of_mappings_is() -> None:
    """A script that noted something there would take the record's place, and every boot would be refused."""
    scripts = [*ROOM.rglob("*"), *MODULE.rglob("*")]
    assert [path.name for path in scripts if path.is_file() and f"/{opened.RECORD}" in path.read_text()] == []
