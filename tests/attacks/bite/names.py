"""Every name that the verifier's code can give a check, found by reading the code, so that none is forgotten."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import kagimori_agent
import kagimori_protocol
import kagimori_verifier
from kagimori_verifier.appraise.policy import GOVERNED_PCRS
from kagimori_verifier.decision import MANDATORY

VERIFIER = Path(kagimori_verifier.__file__).parent
AGENT = Path(kagimori_agent.__file__).parent
PROTOCOL = Path(kagimori_protocol.__file__).parent

SEAMS = frozenset({"require", "note", "step"})
"""The three ways onto a trail."""
BUILT = {
    "appraise/boot.py": {f"pcr.{index}" for pcrs in GOVERNED_PCRS.values() for index in pcrs},
    "appraise/snp.py": {
        *(f"{subject}.{rule}" for subject in ("policy", "platform") for rule in ("allowed", "required")),
        *(f"tcb.{which}" for which in ("reported", "committed", "current", "launch")),
        *(f"mitigation.{which}" for which in ("launch", "current")),
    },
}
"""Names that are put together, by the file that does: to be resolved here by hand, and only there."""
PASSED_ON = {
    "tpm.py": {"quote.magic", "quote.type"},
    "learning.py": set[str](),  # a VM or profile that its owner names, and that is not there
    "attempt.py": set[str](),  # what a verifier denies, in its words
    "exchange.py": set[str](),  # the code of what has failed at each URL, which had one already
}
"""Codes of errors that stand in a variable where the error is made, by the file that does: resolved by hand as above."""
MAKERS = {"_unconfirmed": 0, "_exactly": 2, "_malformed": 0, "_not_for_us": 0}
"""Functions that make errors, and which of their arguments is the code."""
FOR_PEOPLE = ("cli/", "examine/")
"""Rooms that show a person what they were given; nothing that they say decides on a key (a test holds that)."""
ROOMS = (
    "pipeline.py",
    "sessions.py",
    "release.py",
    "learning.py",
    "token.py",
    "wrapping.py",
    "ledger.py",
    "store/redemptions.py",
)
"""Where an error's code is the name of a check that stands outside the trail."""


def on_a_trail() -> set[str]:
    """Collect the names of ``require``, ``note`` and ``step``, of Checks made by hand, and of MANDATORY."""
    found = {check for checks in MANDATORY.values() for check in checks}
    for path in sorted(VERIFIER.rglob("*.py")):
        where = path.relative_to(VERIFIER).as_posix()
        if where == "trail.py" or where.startswith(FOR_PEOPLE):
            continue
        for call in _calls(path):
            found |= _names_of(call, where)
    return found


def in_errors() -> set[str]:
    """Collect the codes of errors that the rooms around the trail raise."""
    return {code for room in ROOMS for code in _codes(VERIFIER / room)}


def of_the_agent() -> set[str]:
    """Collect the codes by which the agent's exchange, its cap, and what both ends share refuse."""
    rooms = [AGENT / f"{room}.py" for room in ("attempt", "cap", "collect", "exchange", "unlock")]
    rooms += [PROTOCOL / name for name in ("sealing.py", "signature.py")]
    return {code for path in rooms for code in _codes(path)}


def within_steps() -> set[str]:
    """Collect the codes that parsers and verifiers raise: they are told within a check that has a name of its own."""
    rooms = [*sorted((VERIFIER / "verify").glob("*.py"))]
    rooms += [PROTOCOL / name for name in ("messages.py", "snp.py", "tpm.py", "transcript.py")]
    return {code for path in rooms for code in _codes(path)}


def importers_of_rooms_for_people() -> set[str]:
    """Name the other rooms that use those that only show."""
    forbidden = tuple(f"kagimori_verifier.{room.rstrip('/')}" for room in FOR_PEOPLE)
    found = set()
    for path in VERIFIER.rglob("*.py"):
        where = path.relative_to(VERIFIER).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            entrance = (*FOR_PEOPLE, "__main__.py")
            if any(module.startswith(forbidden) for module in modules) and not where.startswith(entrance):
                found.add(where)
    return found


def _calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node


def _names_of(call: ast.Call, where: str) -> set[str]:
    """Give the names that one call puts on a trail."""
    name: ast.expr | None = None
    if isinstance(call.func, ast.Attribute) and call.func.attr in SEAMS and _is_trail(call.func.value):
        name = call.args[0]
    elif isinstance(call.func, ast.Name) and call.func.id == "Check" and where != "decision.py":
        # decision.py makes the checks of MANDATORY that nobody has made
        name = next((keyword.value for keyword in call.keywords if keyword.arg == "id"), None)
    if name is None:
        return set()
    if isinstance(name, ast.Constant):
        return {str(name.value)}
    assert where in BUILT, f"{where} puts a name together in line {call.lineno}; resolve it in BUILT"
    return BUILT[where]


def _is_trail(value: ast.expr) -> bool:
    """Tell a trail by its name: ``trail``, ``self._trail``."""
    name = value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else ""
    return name.endswith("trail")


def _codes(path: Path) -> Iterator[str]:
    """Give ``code=`` arguments, ``default_code`` of classes, and the codes handed to makers of errors."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    makers = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in MAKERS]
    in_makers = {id(node) for maker in makers for node in ast.walk(maker)}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "code":
            if isinstance(node.value, ast.Constant):
                yield str(node.value.value)
            elif id(node) not in in_makers:
                where = f"{path.name}, line {node.value.lineno}"
                assert path.name in PASSED_ON, f"{where}: a code that is no constant; resolve it in PASSED_ON"
                yield from PASSED_ON[path.name]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MAKERS:
            code = node.args[MAKERS[node.func.id]]
            if isinstance(code, ast.Constant):
                yield str(code.value)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "default_code":
            yield str(ast.literal_eval(node.value))
