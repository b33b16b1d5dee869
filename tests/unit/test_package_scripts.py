"""What dpkg runs of our packages, run below another root: a removal takes what is the package's, and nobody's keys."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parent.parent.parent / "package"


def _run(root: Path, package: str, script: str, *words: str, helper: str = "", invoke: str = "") -> str:
    """Run a maintainer script with each path of the system below ``root``, and every program that it may call a stub.

    The stubs write down how they were called; gives those lines, and what the script printed. ``helper`` is what
    deb-systemd-helper does besides, ``invoke`` what deb-systemd-invoke and systemctl do.
    """
    text = (PACKAGES / package / script).read_text(encoding="utf-8")
    below = re.sub(r"(?<![\w./$])/(?=(?:etc|var|usr/lib|usr/share|run)/)", f"{root}/", text)
    programs = root / "stubs"
    programs.mkdir(exist_ok=True)
    for name in (
        *("py3compile", "py3clean", "deb-systemd-helper", "deb-systemd-invoke"),
        *("systemctl", "systemd-sysusers", "systemd-tmpfiles"),
    ):
        stub = programs / name
        does = {"deb-systemd-helper": helper, "deb-systemd-invoke": invoke, "systemctl": invoke}.get(name, "")
        stub.write_text(f'#!/bin/sh\necho "{name} $*" >>{root}/called\n{does}\n', encoding="utf-8")
        stub.chmod(0o755)
    (root / "called").write_text("")
    done = subprocess.run(
        ["sh", "-c", below, script, *words],
        env={"PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return (root / "called").read_text() + done.stdout


def _put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(32))


def _left(root: Path) -> set[str]:
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
    return {name for name in found if not name.startswith("stubs/") and name != "called"}


AGENTS = ("etc/kagimori/agent.toml", "etc/kagimori/accepted-doors", "var/lib/kagimori/headers/a")


def test_a_purge_of_the_agent_leaves_nothing_of_it(tmp_path: Path) -> None:
    """Neither the directories that it shares with nobody."""
    _put(tmp_path, *AGENTS, "usr/lib/kagimori/python/__pycache__/a.pyc")
    _run(tmp_path, "agent", "postrm", "purge")
    assert _left(tmp_path) == set()
    assert not (tmp_path / "etc/kagimori").exists()
    _run(tmp_path, "agent", "postrm", "purge")


def test_a_purge_of_the_agent_spares_a_verifier_on_the_same_machine(tmp_path: Path) -> None:
    """`init --dir /etc/kagimori` puts the key there that wraps all disks' keys; with it gone, they are lost."""
    verifiers = {
        f"etc/kagimori/{name}" for name in ("verifier.toml", "kek", "verifier.db", "endorsements/ca/a.der")
    }
    _put(tmp_path, *AGENTS, *verifiers)
    _run(tmp_path, "agent", "postrm", "purge")
    assert _left(tmp_path) == verifiers


@pytest.mark.parametrize("words", [("remove",), ("upgrade", "1"), ("abort-install",)])
def test_only_a_purge_of_the_agent_takes_settings(words: tuple[str, ...], tmp_path: Path) -> None:
    """A package that is removed may come back."""
    _put(tmp_path, *AGENTS)
    _run(tmp_path, "agent", "postrm", *words)
    assert _left(tmp_path) == set(AGENTS)


STATE = "var/lib/kagimori-verifier/main/verifier.db"
KEYS = (STATE, "etc/credstore/kagimori-kek", "var/backups/kagimori-verifier/verifier-1")


def test_an_installation_of_the_verifier_makes_no_key_starts_nothing_and_says_what_to_do(
    tmp_path: Path,
) -> None:
    """Its service would be skipped, too; but an operator shall not have to find out why."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    said = _run(tmp_path, "verifier", "postinst", "configure", "")
    assert "no verifier yet" in said
    assert "README.Debian" in said
    assert "deb-systemd-invoke" not in said
    assert _left(tmp_path) == set()


def test_an_upgrade_of_the_verifier_stops_it_and_starts_it_again(tmp_path: Path) -> None:
    """No process imports modules of two releases; also where the upgrade is broken off."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    _put(tmp_path, "var/lib/kagimori-verifier/main/verifier.toml")
    stopped = "deb-systemd-invoke stop kagimori-verifier.service"
    assert stopped in _run(tmp_path, "verifier", "prerm", "upgrade", "2")
    for words in (("configure", "1"), ("abort-upgrade", "2")):
        said = _run(tmp_path, "verifier", "postinst", *words)
        assert "deb-systemd-invoke start kagimori-verifier.service" in said
        assert "no verifier yet" not in said
    assert f"{stopped}\ndeb-systemd-invoke stop kagimori-verifier-backup.timer" in _run(
        tmp_path, "verifier", "prerm", "remove"
    )


def test_a_systemd_that_answers_nothing_keeps_no_package_from_going(tmp_path: Path) -> None:
    """As in a rescue system; a package that cannot be removed is worse than a unit that was not stopped."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    _put(tmp_path, "var/lib/kagimori-verifier/main/verifier.toml")
    for script, word in (("prerm", "remove"), ("postrm", "remove"), ("postrm", "purge")):
        _run(tmp_path, "verifier", script, word, invoke="exit 1")
    assert "journalctl" in _run(tmp_path, "verifier", "postinst", "configure", "1", invoke="exit 1")


@pytest.mark.parametrize("package", ["agent", "verifier"])
def test_a_unit_that_an_operator_has_switched_off_stays_off(package: str, tmp_path: Path) -> None:
    """An upgrade is no reason to start what was stopped for good."""
    off = 'for word; do [ "$word" != was-enabled ] || exit 1; done'
    said = _run(tmp_path, package, "postinst", "configure", "1", helper=off)
    assert "update-state" in said
    assert "helper enable" not in said
    assert "helper enable" in _run(tmp_path, package, "postinst", "configure", "")


def test_no_script_of_the_verifier_takes_a_key(tmp_path: Path) -> None:
    """Not even a purge: disks that cannot be opened are lost. It says what it kept, and why."""
    _put(tmp_path, *KEYS)
    for script, word in (("prerm", "remove"), ("postrm", "remove"), ("postrm", "upgrade")):
        _run(tmp_path, "verifier", script, word)
    said = _run(tmp_path, "verifier", "postrm", "purge")
    assert _left(tmp_path) == set(KEYS)
    assert "cannot be opened without them" in said
    for name in ("var/lib/kagimori-verifier", "var/backups/kagimori-verifier", "etc/credstore/kagimori-kek"):
        assert f" {tmp_path / name}" in said


def test_a_purge_of_a_verifier_that_was_never_made_leaves_nothing(tmp_path: Path) -> None:
    """No directory, no link to nothing; and no word about keys that there are not."""
    for name in ("var/lib/kagimori-verifier", "var/backups/kagimori-verifier", "etc/kagimori"):
        (tmp_path / name).mkdir(parents=True)
    link = tmp_path / "etc/kagimori/verifier.toml"
    link.symlink_to(tmp_path / "var/lib/kagimori-verifier/main/verifier.toml")
    _put(tmp_path, "usr/lib/kagimori-verifier/python/__pycache__/a.pyc")
    assert "kept" not in _run(tmp_path, "verifier", "postrm", "purge")
    assert _left(tmp_path) == set()
    assert not list((tmp_path / "var/lib").iterdir())
    assert not (tmp_path / "etc/kagimori").exists()


def test_a_purge_of_the_verifier_spares_settings_that_are_not_its_own(tmp_path: Path) -> None:
    """As `init --dir /etc/kagimori` made them, and those of an agent."""
    others = {"etc/kagimori/verifier.toml", "etc/kagimori/kek", "etc/kagimori/agent.toml"}
    _put(tmp_path, *others)
    _run(tmp_path, "verifier", "postrm", "purge")
    assert _left(tmp_path) == others
