"""What dpkg runs of our packages, run below another root: a removal takes what is the package's, and nobody's keys."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parent.parent.parent / "package"


def _run(root: Path, package: str, script: str, *words: str) -> str:
    """Run a maintainer script with each path of the system below ``root``, and every program that it may call a stub.

    The stubs write down how they were called; gives those lines, and what the script printed, each on a line of its own.
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
        stub.write_text(f'#!/bin/sh\necho "{name} $*" >>{root}/called\n', encoding="utf-8")
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
