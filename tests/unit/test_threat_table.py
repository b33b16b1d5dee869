"""docs/threat-model.md names tests for each row of the threat list and each step of the protocol; they are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
ROWS = [f"T{number}" for number in range(1, 26)]
STEPS = [str(number) for number in range(1, 12)]
TESTED_LATER = re.compile(r"none(?: yet: issue \d+|: not defended)")


def table(heading: str) -> list[list[str]]:
    """Give the cells of the first table below a heading, without its head."""
    section = TEXT.split(f"{heading}\n", 1)[1].split("\n## ", 1)[0].split("\n### ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def linked() -> list[tuple[str, str]]:
    """Give row and test, for each line of the table of tests."""
    return [(row, test) for row, test in table("### Tests of each row")]


@cache
def defined_in(path: str) -> dict[str, str]:
    """Collect the tests of a file with their docstrings, without running anything."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {
        node.name: ast.get_docstring(node) or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def told_rows(docstring: str) -> set[str]:
    """Read the rows that a docstring begins with: ``T7, T12: what happens``."""
    tagged = re.match(r"((?:T\d+(?:, )?)+): ", docstring)
    return set(tagged[1].split(", ")) if tagged else set()


def test_every_row_is_there_once_and_says_what_is_done_about_it() -> None:
    """Nobody drops a threat by forgetting it."""
    assert [row for row, *_ in table("## The rows of the threat list")] == ROWS
    assert all(threat and here for _, threat, here in table("## The rows of the threat list"))


def test_every_row_names_tests_or_says_that_there_are_none() -> None:
    """A row without a test is one that is not defended, or comes with an issue that is named."""
    rows = list(dict.fromkeys(row for row, _ in linked()))
    assert rows == ROWS, "each row, in order, its tests together"
    here = {row: text for row, _, text in table("## The rows of the threat list")}
    for row in ROWS:
        tests = [test for one, test in linked() if one == row]
        assert len(tests) == len(set(tests)), row
        if TESTED_LATER.fullmatch(tests[0]):
            assert len(tests) == 1, row
            assert "issue" in here[row] or "not defended" in here[row], row
        else:
            assert all(re.fullmatch(r"`tests/[\w/]+\.py::test_\w+`", test) for test in tests), row


def test_every_test_that_is_named_exists() -> None:
    """A test that was renamed is one that this table lost."""
    named = [test.strip("`").split("::") for _, test in linked() if test.startswith("`")]
    missing = [(path, name) for path, name in named if name not in defined_in(path)]
    assert missing == []


def test_every_step_is_there_once_with_files_of_tests() -> None:
    """Step by step, as the verifier goes."""
    steps = table("### Tests of each step")
    assert [step for step, *_ in steps] == STEPS
    for step, _, files in steps:
        paths = re.findall(r"`(tests/[\w/]+\.py)`", files)
        assert any(path.startswith("tests/attacks/") for path in paths), step
        assert all(defined_in(path) for path in paths), step


def test_every_file_of_attacks_is_named_somewhere() -> None:
    """An attack that no row and no step knows of was told for nobody."""
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "attacks").rglob("test_*.py")]
    assert [path for path in files if path not in TEXT] == []


def test_every_attack_that_tells_of_a_row_is_in_a_file_that_the_row_names() -> None:
    """A docstring that begins with a row's number is found from that row."""
    known = {(row, test.strip("`").split("::")[0]) for row, test in linked()}
    strays = []
    for path in sorted((ROOT / "tests" / "attacks").rglob("test_*.py")):
        where = path.relative_to(ROOT).as_posix()
        for name, docstring in defined_in(where).items():
            strays += [(row, f"{where}::{name}") for row in told_rows(docstring) if (row, where) not in known]
    assert strays == []


def test_every_row_that_a_bite_story_tells_of_names_the_bite_tests() -> None:
    """Stories of the bite tests begin with their rows, too."""
    from tests.attacks.bite import agents, reports, sessions, tpms

    where = {
        "tests/attacks/test_bite.py": (*sessions.STORIES, *reports.STORIES, *tpms.STORIES),
        "tests/attacks/test_bite_agent.py": agents.STORIES,
    }
    known = {(row, test.strip("`").split("::")[0]) for row, test in linked()}
    for path, stories in where.items():
        told = {row for story in stories for row in told_rows(story.told)}
        assert told, path
        assert {row for row in told if (row, path) not in known} == set(), path
        assert {row for row, one in known if one == path} - told == set(), path
