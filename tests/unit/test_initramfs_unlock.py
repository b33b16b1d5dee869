"""What surrounds the agent in the early boot, and what the booted system does with what that left: settings, words, a Confirm."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.test_initramfs_scripts import ROOM, Stage

OWN = "on_failure=poweroff\nnetwork=dhcp\n"


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Give a stage with all that `unlock` calls, and an agent that does its job."""
    one = Stage(tmp_path)
    for name in ("modprobe", "mount", "network", "cap", "kagimori-agent"):
        one.program(name)
    for name in ("network", "cap"):
        (one.root / "boot" / name).symlink_to(one.root / "bin" / name)
    (one.root / "etc/boot.conf").write_text(OWN)
    (one.root / "cmdline").write_text("ro quiet\n")
    yield one
    (one.root / "boot/network").unlink()
    one.run("network", "down")


def _calls(stage: Stage, *programs: str) -> list[str]:
    return [call for call in stage.called() if call.startswith(programs)]


def test_without_a_word_of_ours_the_image_alone_sets_the_network(stage: Stage) -> None:
    """The agent need not be started twice for that, which would cost a second of each boot."""
    assert stage.run("unlock").returncode == 0
    assert _calls(stage, "network", "kagimori-agent") == [
        "network up",
        "kagimori-agent unlock",
        "network down",
    ]
    assert (stage.root / "run/kagimori/boot.conf").read_text() == OWN


@pytest.mark.parametrize("line", ["ro kagimori.ip=10.0.0.2/24", 'ro "KAGIMORI.x"'])
def test_where_the_command_line_has_a_word_of_ours_the_agent_reads_it(stage: Stage, line: str) -> None:
    """Scripts take nothing from there by themselves."""
    (stage.root / "cmdline").write_text(line)
    stage.program("kagimori-agent", '[ "$1" != settings ] || echo "address=10.0.0.2/24"')
    assert stage.run("unlock").returncode == 0
    assert _calls(stage, "kagimori-agent") == ["kagimori-agent settings", "kagimori-agent unlock"]
    assert (stage.root / "run/kagimori/boot.conf").read_text() == "address=10.0.0.2/24\n"


def test_a_word_that_may_not_be_there_ends_the_boot_before_there_is_a_network(stage: Stage) -> None:
    """Capped, and with its reason on the console and in the log; what the image says of failures holds."""
    (stage.root / "cmdline").write_text("ro kagimori.url=http://evil")
    (stage.root / "etc/boot.conf").write_text("on_failure=reboot\n")
    stage.program("kagimori-agent", 'echo "kagimori-agent: why not" >&2; exit 4')
    done = stage.run("unlock")
    assert _calls(stage, "network", "kagimori-agent", "cap") == ["kagimori-agent settings", "cap end"]
    log = (stage.root / "run/kagimori/log").read_text()
    assert log == "kagimori-agent: why not\nkagimori: the volumes are not open (exit code 4 of the agent)\n"
    assert log.splitlines()[0] in done.stderr


@pytest.mark.parametrize("code", [0, 1, 6])
def test_a_dry_run_from_a_shell_ends_nothing(stage: Stage, code: int) -> None:
    """It has what an unlock has around it; the verdict is on the console, and the boot stays as it is."""
    stage.program("kagimori-agent", f"echo verdict; exit {code}")
    done = stage.run("unlock", "dry-run")
    assert done.returncode == code
    assert "verdict\n" in done.stderr
    assert _calls(stage, "network", "kagimori-agent", "cap") == [
        "network up",
        "kagimori-agent dry-run",
        "network down",
    ]


def test_nothing_else_is_asked_of_the_agent_this_way(stage: Stage) -> None:
    """A word that is misspelt unlocks nothing."""
    assert stage.run("unlock", "dryrun").returncode == 2
    assert stage.called() == []


@pytest.mark.parametrize("runs", [True, False])
def test_plymouth_shows_what_a_person_can_act_on_where_it_runs(stage: Stage, runs: bool) -> None:
    """Behind a splash screen nobody sees the console; details are for that."""
    stage.program("plymouth", "exit 0" if runs else "exit 1")
    stage.program("kagimori-agent", "echo 'kagimori-agent: home: away' >&2; echo '   expected: more' >&2")
    assert stage.run("unlock").returncode == 0
    expected = "plymouth display-message --text=kagimori-agent: home: away"
    deadline = time.monotonic() + 10
    while runs and expected not in stage.called():
        assert time.monotonic() < deadline, stage.called()
        time.sleep(0.05)
    assert _calls(stage, "plymouth") == ["plymouth --ping", *([expected] if runs else [])]


def test_a_screen_that_hangs_does_not_hold_the_boot(stage: Stage) -> None:
    """It is for show."""
    stage.program("plymouth", '[ "$1" = --ping ] || exec sleep 30')
    stage.program("kagimori-agent", "echo 'kagimori-agent: home: away' >&2")
    started = time.monotonic()
    assert stage.run("unlock").returncode == 0
    assert time.monotonic() - started < 15


def test_what_stands_between_a_machine_and_its_verifier_is_told_as_it_changes(stage: Stage) -> None:
    """No card, no carrier, no address, an address: each once, on the console and in the log."""
    (stage.root / "boot/network").unlink()
    (stage.root / "etc/boot.conf").write_text("network=dhcp\n")
    (stage.root / "run/kagimori").mkdir()
    stage.program("udhcpc", "exec sleep 60")
    log = stage.root / "run/kagimori/log"

    def told(line: str) -> None:
        deadline = time.monotonic() + 15
        while f"kagimori: network: {line}\n" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline, log.read_text() if log.exists() else "nothing"
            time.sleep(0.05)

    assert stage.run("network", "up").returncode == 0
    told("there is no network card yet")
    card = stage.root / "net/eth0"
    card.mkdir()
    (card / "device").mkdir()
    told("eth0 has no carrier")
    (card / "carrier").write_text("1\n")
    told("eth0 has carrier and no address yet")
    address = "2: eth0    inet 10.0.2.15/24 scope global eth0"
    stage.program(
        "ip",
        f"[ \"$1\" != -o ] || printf '{address}\\n{address.replace('inet 10.0.2.15', 'inet6 fd00::f')}\\n'",
    )
    told("eth0 has carrier and 10.0.2.15/24 fd00::f/24")
    time.sleep(1.5)
    assert log.read_text().count("\n") == 4


def test_the_booted_system_gets_the_early_boots_words_once_and_then_confirms(stage: Stage) -> None:
    """They are in no journal yet where the initramfs has none."""
    (stage.root / "run/kagimori").mkdir()
    (stage.root / "run/kagimori/log").write_text("kagimori-agent: said\n")
    for expected in ("kagimori-agent: said\n", ""):
        done = stage.run("booted")
        assert (done.returncode, done.stdout) == (0, expected)
    assert stage.called() == ["kagimori-agent confirm"] * 2


def test_words_that_systemd_has_heard_are_not_told_twice(stage: Stage) -> None:
    """Its journal goes on from the initramfs."""
    done = stage.script("unlock")
    assert done.exists()
    stage.program("kagimori-agent", "echo said >&2")
    assert stage.run("unlock", JOURNAL_STREAM="8:1").returncode == 0
    assert stage.run("booted").stdout == ""


def test_the_unit_runs_what_is_installed() -> None:
    """A unit that names another path fails at each boot, and nothing else does."""
    unit = (ROOM / "booted/kagimori-confirm.service").read_text()
    assert "ExecStart=/usr/lib/kagimori/booted\n" in unit
    assert "WantedBy=multi-user.target\n" in unit
