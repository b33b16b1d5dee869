"""The linters are tests: a machine without one skips it, CI does not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
IN_CI = os.environ.get("CI") == "true"

MOST_LINES = 500
# What a tool writes, what is quoted whole, and what only ever grows.
MAY_BE_LONG = re.compile(r"requirements/.*\.txt|LICENSE|CHANGELOG\.md|.*\.json")

# Registries and places of one machine. Parts are joined here so that this file passes its own test.
NAMES_OF_ELSEWHERE = re.compile(
    "|".join(
        (
            r"py" + r"pi\.org",
            r"python" + r"hosted\.org",
            r"deb\.deb" + r"ian\.org",
            r"snapshot\.deb" + r"ian\.org",
            r"archive\.ubun" + r"tu\.com",
            r"registry\.npm" + r"js\.org",
            r"proxy\.gol" + r"ang\.org",
            r"(?<![\w.])/" + r"work/",
            r"(?<![\w.])/" + r"farm\b",
            r"(?<![\w.])/" + r"tmp/plan",
            r"(?<![\w.])/home/(?!user\b)\w+",
            r"(?<![\w.])/root/\w+",
        )
    )
)
OPEN_WORK = re.compile(r"\b(" + "TO" + "DO|FIX" + "ME|XX" + r"X|HA" + r"CK)\b")
# A silenced rule is named, and the reason follows: "noqa: ABC123 - reason", "type: ignore[rule]  # reason",
# "shellcheck disable=SC1234 # reason".
SILENCED = re.compile(
    r"#\s*(?:noqa\b|type:\s*ignore\b|ruff:\s*noqa\b|mypy:|shellcheck\s+disable\b)", re.IGNORECASE
)
SILENCED_WITH_REASON = re.compile(
    r"#\s*(?:noqa: [A-Z]+[0-9]+(?:, ?[A-Z]+[0-9]+)* [-#] \S"
    r"|type: ignore\[[a-z, -]+\]  # \S"
    r"|shellcheck disable=SC[0-9]+(?:,SC[0-9]+)* # \S)"
)


def _tool(name: str) -> str:
    """Find a tool of the project's environment, else of the machine. Skips without it, but fails in CI."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        explanation = f"{name} is not installed; ./dev setup brings it"
        if IN_CI:
            pytest.fail(explanation)
        pytest.skip(explanation)
    return found


def _passes(*command: str) -> None:
    """Run a linter at the project's root; what it says is the failure."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)


def _none(found: list[str]) -> None:
    """Fail with every line that was found, not only with the first."""
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def _tracked() -> list[str]:
    """Name the files that git tracks and that are there, relative to the root."""
    listed = subprocess.run(
        [_tool("git"), "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        explanation = f"not a git checkout that this user may read: {listed.stderr}"
        if IN_CI:
            pytest.fail(explanation)
        pytest.skip(explanation)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def _lines() -> Iterator[tuple[str, int, str]]:
    """Give every line of every tracked text file, with its file and number."""
    for name in _tracked():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            yield name, number, line


def _shell_files() -> list[str]:
    """Name the tracked files that a shell runs: by their suffix or their first line."""
    first_line = re.compile(rb"#! ?(?:/usr/bin/env |/bin/|/usr/bin/)(?:ba|da)?sh\b")
    return [
        name
        for name in _tracked()
        if name.endswith(".sh") or first_line.match((ROOT / name).read_bytes()[:64])
    ]


def test_ruff_finds_nothing() -> None:
    """Every rule of ruff is on, and each exception in pyproject.toml has its reason."""
    _passes(_tool("ruff"), "check", "--no-fix", "--quiet", "--output-format", "concise")


def test_every_file_is_formatted() -> None:
    """The formatter would change nothing."""
    _passes(_tool("ruff"), "format", "--check", "--quiet")


def test_mypy_finds_nothing() -> None:
    """All four rooms and their tests are strictly typed."""
    _passes(_tool("mypy"), "--no-error-summary")


def test_the_rooms_import_only_what_they_may() -> None:
    """The trust boundaries of docs/architecture.md hold, also through other modules."""
    _passes(_tool("lint-imports"), "--no-logo", "--cache-dir", ".dev/import-linter")


def test_no_judgement_opens_a_file_or_asks_what_time_it_is() -> None:
    """Clock and files are arguments where something is decided; import-linter sees modules, this sees calls."""
    asks = re.compile(r"(?<![\w.])(?<!def )open\(|\.(?:now|utcnow|today|read_bytes|read_text|environ)\b")
    decides = re.compile(
        r"protocol/.*\.py|verifier/kagimori_verifier/(?:claims|decision|trail|verify/.*|appraise/.*|examine/.*)\.py"
    )
    _none(
        [f"{name}:{n}: {line}" for name, n, line in _lines() if decides.fullmatch(name) and asks.search(line)]
    )


def test_shellcheck_finds_nothing() -> None:
    """Every shell file passes every check that .shellcheckrc leaves on."""
    files = _shell_files()
    assert {"dev", ".ci/run"} <= set(files)
    _passes(_tool("shellcheck"), *files)


def test_no_file_is_a_room_without_walls() -> None:
    """No file has more lines than a reader bears."""
    lengths = {name: number for name, number, _ in _lines()}
    too_long = {name: n for name, n in lengths.items() if n > MOST_LINES and not MAY_BE_LONG.fullmatch(name)}
    _none([f"{name}: {n} lines" for name, n in too_long.items()])


def test_no_file_names_a_registry_or_a_place_on_one_machine() -> None:
    """A clone works anywhere: with any mirror, in any directory, under any user."""
    found = [f"{name}:{n}: {line.strip()}" for name, n, line in _lines() if NAMES_OF_ELSEWHERE.search(line)]
    _none(found)


def test_no_file_leaves_open_work_behind() -> None:
    """What is to be done stands in an issue, not in a comment that nobody owns."""
    found = [
        f"{name}:{n}: {line.strip()}"
        for name, n, line in _lines()
        if name != "LICENSE" and OPEN_WORK.search(line)
    ]
    _none(found)


def test_every_silenced_rule_is_named_and_has_its_reason() -> None:
    """A reader of an exception learns which rule it breaks, and why that is right here."""
    code = re.compile(r".*\.(?:py|pyi|sh)|" + "|".join(re.escape(name) for name in _shell_files()))
    here = Path(__file__).relative_to(ROOT).as_posix()
    found = [
        f"{name}:{n}: {line.strip()}"
        for name, n, line in _lines()
        if code.fullmatch(name)
        and name != here
        and SILENCED.search(line)
        and not SILENCED_WITH_REASON.search(line)
    ]
    _none(found)


def _locked() -> Iterator[tuple[str, str]]:
    """Give name and version of each package that requirements/dev.txt asks for on this machine."""
    line = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[^ ]+)(?: ; (?P<marker>.+))? \\")
    for text in (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8").splitlines():
        found = line.fullmatch(text)
        if found and (found["marker"] is None or Marker(found["marker"]).evaluate()):
            yield found["name"], found["version"]


def test_what_the_tests_run_with_is_what_the_lock_says() -> None:
    """Where ./dev made the environment, every locked package is there in its locked version."""
    if not (Path(sys.prefix) / "dev-stamp").exists():
        pytest.skip("this environment was not made by ./dev")
    locked = list(_locked())
    assert locked
    assert [(name, metadata.version(name)) for name, _ in locked] == locked


def test_the_lock_answers_what_pyproject_asks_for() -> None:
    """Who raises a requirement in pyproject.toml also runs ./dev lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [Requirement(text) for text in project["dependencies"]]
    asked += [Requirement(text) for extra in project["optional-dependencies"].values() for text in extra]
    locked = dict(_locked())
    assert [str(need) for need in asked if locked.get(need.name, "0") not in need.specifier] == []


def test_locks_carry_hashes_and_no_address() -> None:
    """A lock says what, never from where: the machine's own pip knows its registry or mirror."""
    for lock in (ROOT / "requirements").glob("*.txt"):
        text = lock.read_text(encoding="utf-8")
        assert "--hash=sha256:" in text
        assert "://" not in text
        assert not re.search(r"^-", text, re.MULTILINE), f"{lock.name} carries an option of pip"


def test_dev_alone_lists_its_verbs() -> None:
    """A newcomer who types ./dev learns what it can do, and nothing is installed."""
    done = subprocess.run([ROOT / "dev"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for verb in ("setup", "demo", "test", "exec", "fmt", "lock"):
        assert re.search(rf"^  {verb}\b", done.stdout, re.MULTILINE)


def test_dev_refuses_a_verb_that_it_does_not_know() -> None:
    """A typing error is named, and fails."""
    done = subprocess.run([ROOT / "dev", "tset"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no verb 'tset'" in done.stderr
