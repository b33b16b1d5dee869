"""The .rpm of the agent holds what its .deb holds, but for what is Debian's; nobody has run it yet, and it says so."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from package import agent, deb, rpm

IN_CI = os.environ.get("CI") == "true"
SPEC = Path(__file__).parent.parent.parent / "package/kagimori-agent.spec"
MACROS = {
    "_bindir": "/usr/bin",
    "_datadir": "/usr/share",
    "_mandir": "/usr/share/man",
    "_prefix": "/usr",
    "_unitdir": "/usr/lib/systemd/system",
    "room": "/usr/lib/kagimori",
}


def _section(name: str) -> list[str]:
    """Give the lines of a section of the spec, up to the next."""
    text = SPEC.read_text(encoding="utf-8")
    found = re.search(
        rf"^%{name}\n(.*?)(?=^%(?:prep|build|install|post|preun|posttrans|postun|files)$|\Z)",
        text,
        re.MULTILINE | re.DOTALL,
    )
    assert found is not None, name
    return [line for line in found[1].splitlines() if line and not line.startswith("#")]


def _listed() -> dict[str, str]:
    """Give what %files lists, expanded, by what it is: a file (perhaps with a pattern), a directory with all in it."""
    found = {}
    for line in _section("files"):
        words = line.split()
        if words[0] not in {"%license", "%doc"}:
            path = re.sub(r"%\{(\w+)\}", lambda macro: MACROS[macro[1]], words[-1])
            found[path] = words[0] if len(words) > 1 else ""
    return found


def _files(root: Path) -> set[str]:
    return {f"/{path.relative_to(root).as_posix()}" for path in root.rglob("*") if path.is_file()}


def _holds(entry: str, name: str) -> bool:
    return name.startswith(entry) if entry.endswith("/") else fnmatch.fnmatch(name, entry)


@pytest.fixture
def payload(tmp_path: Path) -> set[str]:
    """Give the files of the .deb but for Python's modules and what dpkg wants of documents."""
    agent.place(tmp_path / "deb")
    return _files(tmp_path / "deb")


def test_the_rpm_lists_each_file_of_the_deb_that_is_not_debians_alone(payload: set[str]) -> None:
    """And lists nothing that is not there, so that a build would fail."""
    wanted = {
        name.replace("/usr/share/zsh/vendor-completions/", "/usr/share/zsh/site-functions/")
        for name in payload
        if not name.startswith(("/usr/share/initramfs-tools/", "/usr/share/doc/"))
    }
    entries = [entry for entry, kind in _listed().items() if kind != "%dir"]
    for name in wanted:
        assert [entry for entry in entries if _holds(entry, name)], f"{name} is in no line of %files"
    for entry in entries:
        if entry != f"/{agent.PROGRAM.python}/":
            assert [name for name in wanted if _holds(entry, name)], f"{entry} is in no .deb"
    assert f"/{agent.PROGRAM.python}/" in entries


def test_what_the_rpm_is_built_of_is_what_it_lists(payload: set[str], tmp_path: Path) -> None:
    """A build refuses files that no line lists; what is left out is named."""
    rpm.place(tmp_path / "rpm")
    placed = _files(tmp_path / "rpm")
    entries = [entry for entry, kind in _listed().items() if kind != "%dir"]
    assert [name for name in placed if not [entry for entry in entries if _holds(entry, name)]] == []
    left_out = {name for name in payload if name.startswith(tuple(f"/{one}/" for one in rpm.DEBIANS))}
    assert len(placed) == len(payload) - len(left_out)
    assert left_out


def test_the_rpm_is_of_this_version_and_its_room_is_the_packages() -> None:
    """Both are written down twice."""
    text = SPEC.read_text(encoding="utf-8")
    assert re.findall(r"^Version: +(\S+)$", text, re.MULTILINE) == [deb.version()]
    assert re.findall(r"^Name: +(\S+)$", text, re.MULTILINE) == [agent.PROGRAM.name]
    assert f"/{agent.PROGRAM.python}" == f"{MACROS['room']}/python"


def test_the_rpm_takes_the_rooms_of_others_away() -> None:
    """A guest has neither the verifier nor the simulator."""
    rooms = {path.name for path in SPEC.parent.parent.glob("*/kagimori_*") if path.is_dir()}
    assert set(agent.PROGRAM.rooms) < rooms
    for room in rooms - set(agent.PROGRAM.rooms):
        assert [
            line for line in _section("install") if line.startswith("rm -rf ") and f'"$into/{room}"' in line
        ]


def test_the_spec_says_at_its_head_that_it_was_not_run() -> None:
    """Until somebody has: then this test goes with that line."""
    head = SPEC.read_text(encoding="utf-8").partition("%global")[0]
    assert "NOT RUN" in head


def test_rpm_reads_the_spec() -> None:
    """Where rpm is installed, as `./dev test all` has it done."""
    program = shutil.which("rpmspec")
    if program is None:
        if IN_CI:
            pytest.fail("rpmspec is not installed")
        pytest.skip("rpmspec is not installed")
    done = subprocess.run([program, "--parse", str(SPEC)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
