"""The verifier's units: they start what is there, hold little, and agree with the program and with each other."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from package import verifier as package

from kagimori_verifier.cli.main import parser
from kagimori_verifier.settings import DEFAULT_PATH, KekSettings

SYSTEMD = package.SYSTEMD
SERVICES = sorted(SYSTEMD.glob("*.service"))
MOST_EXPOSED = 2.0
"""Of the ten that `systemd-analyze security` counts, a service has less than this."""


def _settings(unit: Path) -> dict[str, list[str]]:
    """Give what a unit sets; a name may stand several times."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def _lines(name: str) -> list[list[str]]:
    text = (SYSTEMD / name).read_text(encoding="utf-8")
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_package_has_every_unit() -> None:
    """One that is written and not installed helps nobody."""
    units = {path.name for path in SYSTEMD.iterdir() if path.suffix in {".service", ".timer"}}
    assert set(package.UNITS) == units


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_service_is_exposed_to_little(unit: Path) -> None:
    """By systemd's own count, without a running systemd: 1.2 and 0.4 by that of systemd 252."""
    done = subprocess.run(
        [_program("systemd-analyze"), "security", "--offline=true", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    counted = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert counted, done.stdout + done.stderr
    assert float(counted[1]) < MOST_EXPOSED


def test_systemd_has_nothing_to_say_of_the_units(tmp_path: Path) -> None:
    """No unknown setting, no value that is none; the program itself is not on every machine, so another stands for it."""
    for name in package.UNITS:
        text = (SYSTEMD / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("=/usr/bin/kagimori-verifier ", "=/bin/true "))
    done = subprocess.run(
        [
            _program("systemd-analyze"),
            "verify",
            "--man=no",
            *(str(tmp_path / name) for name in package.UNITS),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_service_starts_what_the_program_understands() -> None:
    """With the settings whose presence it waits for, which are in the directory that it may write."""
    for unit, verb in zip(
        SERVICES, (("backup", "/var/backups/kagimori-verifier/verifier-"), ("serve",)), strict=True
    ):
        settings = _settings(unit)
        (command,) = settings["ExecStart"]
        words = shlex.split(command)
        if words[0] == "/bin/sh":
            script = words[2].replace("$$", "$").replace("%%", "%")
            done = subprocess.run(
                ["sh", "-c", script.replace("/usr/bin/kagimori-verifier", "printf '%s\\n' x", 1)],
                capture_output=True,
                text=True,
                check=True,
            )
            words = done.stdout.splitlines()
        options = parser().parse_args(words[1:])
        assert options.config == Path(settings["ConditionPathExists"][0])
        assert options.config.is_relative_to(Path("/var/lib") / settings["StateDirectory"][0])
        assert words[-len(verb)].startswith(verb[0])
        assert words[-1].startswith(verb[-1])
        assert " " not in words[-1]


def test_a_backup_goes_where_its_service_may_write() -> None:
    """And nowhere else but into the state, as SQLite wants it for reading."""
    settings = _settings(SYSTEMD / "kagimori-verifier-backup.service")
    (place,) = settings["ReadWritePaths"]
    assert f'backup "{place}/' in settings["ExecStart"][0]
    assert [place] in [line[1:2] for line in _lines("tmpfiles.conf")]


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_the_key_comes_as_a_credential_and_in_no_other_way(unit: Path) -> None:
    """Under the name that verifier.toml has without being told, and from no environment or argument."""
    settings = _settings(unit)
    assert settings["LoadCredential"] == [f"{KekSettings().name}:/etc/credstore/{KekSettings().name}"]
    assert not [
        name for name in settings if name.startswith(("Environment", "PassEnvironment", "SetCredential"))
    ]
    assert "kek" not in settings["ExecStart"][0]
    example = _settings(SYSTEMD / "encrypted-kek.conf")
    assert example["LoadCredential"] == [""]
    assert example["LoadCredentialEncrypted"][0].partition(":")[0] == KekSettings().name


def test_the_user_and_the_directories_of_the_service_are_made() -> None:
    """Only the user that it runs as may look into what holds wrapped keys; nothing of it is cleaned by age."""
    settings = _settings(SYSTEMD / "kagimori-verifier.service")
    (user,) = settings["User"]
    assert [line[:2] for line in _lines("sysusers.conf")] == [["u", user]]
    made = {line[1]: line for line in _lines("tmpfiles.conf")}
    for place in ("/var/lib/kagimori-verifier", "/var/backups/kagimori-verifier"):
        assert made[place] == ["d", place, "0700", user, user, "-"]
    assert settings["StateDirectoryMode"] == ["0700"]
    assert made[str(DEFAULT_PATH)][0] == "L"
    assert made[str(DEFAULT_PATH)][-1] == settings["ConditionPathExists"][0]


def test_systemd_makes_the_user_and_the_directories(tmp_path: Path) -> None:
    """Below another root; settings that are there already are left alone."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to another user")
    (tmp_path / "etc/kagimori").mkdir(parents=True)
    (tmp_path / "etc/kagimori/verifier.toml").write_text("# an operator's")
    for program, config in (("systemd-sysusers", "sysusers.conf"), ("systemd-tmpfiles", "tmpfiles.conf")):
        words = ["--create"] if program == "systemd-tmpfiles" else []
        done = subprocess.run(
            [_program(program), f"--root={tmp_path}", *words, str(SYSTEMD / config)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    account = (tmp_path / "etc/passwd").read_text(encoding="utf-8").splitlines()[0].split(":")
    assert (account[0], account[-1]) == ("kagimori-verifier", "/usr/sbin/nologin")
    state = (tmp_path / "var/lib/kagimori-verifier").stat()
    assert (state.st_mode & 0o777, state.st_uid) == (0o700, int(account[2]))
    assert (tmp_path / "etc/kagimori/verifier.toml").read_text(encoding="utf-8") == "# an operator's"


def test_the_readme_of_the_package_says_what_the_program_understands() -> None:
    """Each command of it, with the directories of the units."""
    text = (SYSTEMD / "README.Debian").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^    kagimori-verifier (.+)$", text, re.MULTILINE)
    commands += re.findall(r'"kagimori-verifier (.+?)"', text)
    (main,) = _settings(SYSTEMD / "kagimori-verifier.service")["ConditionPathExists"]
    verbs = []
    for command in commands:
        options = parser().parse_args(shlex.split(command))
        verbs.append(command.split()[0])
        if "dir" in options:
            assert options.dir == Path(main).parent
    assert sorted(verbs) == ["init", "restore", "upgrade"]
