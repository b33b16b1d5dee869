"""Every check that the code makes is explained, and nothing else is: found by reading the code itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kagimori_verifier
from kagimori_verifier.cli import main
from kagimori_verifier.decision import MANDATORY
from kagimori_verifier.explanations import EXPLANATIONS, explanation

ROOM = Path(kagimori_verifier.__file__).parent
MODULES = sorted(
    [
        *(ROOM / "verify").glob("*.py"),
        *(ROOM / "appraise").glob("*.py"),
        *(
            ROOM / name
            for name in ("pipeline.py", "sessions.py", "parts.py", "release.py", "enrolling.py", "token.py")
        ),
    ]
)
TRAIL = {"step", "require", "note"}


def _texts(node: ast.expr, known: dict[str, list[str]]) -> list[str]:
    """Give the texts that an argument may be: a literal, a name that loops over literals, ``pcr.`` and a number."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.IfExp):
        return _texts(node.body, known) + _texts(node.orelse, known)
    if isinstance(node, ast.JoinedStr):
        first, second = node.values[:2]
        if isinstance(first, ast.Constant):  # f"pcr.{index}"
            return [str(first.value).rstrip(".")]
        if isinstance(second, ast.Constant):  # f"{subject}.allowed"
            return [subject + str(second.value) for subject in ("policy", "platform")]
    return []


def _names(function: ast.AST) -> dict[str, list[str]]:
    """Give the texts that a loop's first name stands for: the keys of the table that it walks."""
    tables = {
        target.id: [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return {
        node.target.elts[0].id: tables[table.id]
        for node in ast.walk(function)
        if isinstance(node, ast.For) and isinstance(node.target, ast.Tuple)
        if isinstance(node.target.elts[0], ast.Name)
        for table in ast.walk(node.iter)
        if isinstance(table, ast.Name) and table.id in tables
    }


def _argument(call: ast.Call) -> ast.expr | None:
    """Give the id that a call makes a check by; None for other calls, and for those that pass an id on."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    words = {word.arg: word.value for word in call.keywords}
    if called in TRAIL and isinstance(call.func, ast.Attribute):
        return call.args[0] if getattr(call.func.value, "id", "") == "trail" else None
    if called == "_unconfirmed":
        return call.args[0]
    argument = words.get({"Check": "id", "NotAuthentic": "code"}.get(called, ""))
    return None if isinstance(argument, ast.Name | ast.Attribute) else argument


def _made(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Give each place that makes a check, and the ids that it may have."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            known = _names(function)
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and (argument := _argument(call)) is not None:
                    yield f"{path.name}:{call.lineno}", _texts(argument, known)


PLACES = [place for path in MODULES for place in _made(path)]


def test_the_id_of_every_check_can_be_read_from_the_code() -> None:
    """Ids are literals, so that a person finds by search what a verdict names."""
    assert [where for where, ids in PLACES if not ids] == []
    assert len(PLACES) > 50


def test_every_check_is_explained() -> None:
    """An owner who is refused learns what was guarded and what to do."""
    unexplained = {name: where for where, ids in PLACES for name in ids if name not in EXPLANATIONS}
    assert unexplained == {}


def test_nothing_is_explained_that_no_code_checks() -> None:
    """A check that went away takes its words along."""
    assert set(EXPLANATIONS) - {name for _, ids in PLACES for name in ids} == set()


def test_what_is_mandatory_is_made_somewhere_and_explained() -> None:
    """A misspelt mandatory check would refuse everybody; a missing one nobody."""
    made = {name for _, ids in PLACES for name in ids}
    for kind, checks in MANDATORY.items():
        assert len(set(checks)) == len(checks) > 20, kind
        assert set(checks) <= made & set(EXPLANATIONS), kind


@pytest.mark.parametrize("check", EXPLANATIONS)
def test_an_explanation_is_complete(check: str) -> None:
    """A step of PROTOCOL.md section 6 (12: the Confirm), a sentence, and something to do."""
    known = EXPLANATIONS[check]
    assert 1 <= known.step <= 12
    assert known.about.endswith(".")
    assert known.todo.strip()


def test_a_pcr_is_explained_by_its_number() -> None:
    """One explanation serves all of them; what is no check has none."""
    assert explanation("pcr.9") == EXPLANATIONS["pcr"]
    with pytest.raises(KeyError):
        explanation("no.such-check")


def test_every_verb_that_an_explanation_names_exists() -> None:
    """What to do can be done: the words are put before the real parser."""
    told = " ".join(f"{known.about} {known.todo}" for known in EXPLANATIONS.values())
    verbs = set(re.findall(r"kagimori-verifier ([a-z]+(?: [a-z]+)?)", told))
    assert len(verbs) > 4
    for words in verbs:
        with pytest.raises(SystemExit) as ended:
            main([*words.split(), "--help"])
        assert ended.value.code == 0, words
