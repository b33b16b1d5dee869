"""The symbolic model speaks of this code: labels, messages and the order of checks are the same on both sides.

docs/model/correspondence.toml says what is what; every line of it is held here, and so is that it leaves nothing out.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pytest
from docs.model import gen

from kagimori_agent.unlock import unlock
from kagimori_protocol import messages
from kagimori_protocol.signature import LABEL_REPLY
from kagimori_verifier.decision import MANDATORY

if TYPE_CHECKING:
    from tests.worlds import Enrolled

    from kagimori_protocol.messages import Kind

ROOT: Final = Path(__file__).parent.parent.parent
MODEL: Final = ROOT / "docs" / "model"
CORRESPONDENCE: Final[dict[str, Any]] = tomllib.loads(
    (MODEL / "correspondence.toml").read_text(encoding="utf-8")
)
DESIGN: Final = (MODEL / "kagimori.pv").read_text(encoding="utf-8")
VERIFIER: Final = DESIGN[DESIGN.index("let Verifier =") : DESIGN.index("(* ---------- what is asked")]
PARTS: Final = (
    messages.Credential,
    messages.PcrValue,
    messages.Quote,
    messages.SignedChallenge,
    messages.Check,
    messages.VolumeKey,
)
"""Structs that are a field of a message; the model has them as terms."""
SOMETIMES: Final = {"endorsement.revoked", "signer.provider"}
"""Checks that are made only where there is a revocation list, or a provider's key that signs."""


# ---- the model itself ----


def test_the_design_is_what_the_generator_writes() -> None:
    """Nobody edits kagimori.pv by hand: what was proved is what the variants vary."""
    assert gen.model(gen.VARIANTS[gen.DESIGN]) == DESIGN


def test_the_model_is_the_one_that_was_run() -> None:
    """Whoever changes more than a comment runs ProVerif again, and brings table and fingerprint up to date."""
    assert gen.fingerprint() == CORRESPONDENCE["run"]["sha256"]


def test_every_variant_is_another_model() -> None:
    """A switch that changed nothing would show a check to be harmless that was never dropped."""
    assert len({gen.bare(gen.model(switches)) for switches in gen.VARIANTS.values()}) == len(gen.VARIANTS)


# ---- labels ----


def labels_of_the_code() -> set[str]:
    """Find every string of the three rooms that starts as our labels do; docstrings start otherwise."""
    found = set()
    for room in ("protocol", "agent", "verifier"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                value = node.value if isinstance(node, ast.Constant) else None
                text = value.decode("latin-1") if isinstance(value, bytes) else value
                if isinstance(text, str) and text.startswith("kagimori/"):
                    found.add(text)
    assert LABEL_REPLY in found
    return found - {LABEL_REPLY} | {LABEL_REPLY + reply for reply in messages.REPLY_TYPES}


def test_every_label_of_the_code_is_modelled_or_has_its_reason() -> None:
    """A new label changes what is proved, or somebody says why not."""
    modelled, apart = CORRESPONDENCE["labels"].values(), CORRESPONDENCE["labels_of_the_code_only"]
    assert sorted([*modelled, *apart]) == sorted(labels_of_the_code())


def test_every_label_of_the_model_is_one_of_the_code_or_has_its_reason() -> None:
    """The model keeps no use apart that the code does not."""
    line = re.search(r"^const (.*): bitstring\.\s*\(\* domain labels \*\)$", DESIGN, re.MULTILINE)
    assert line
    declared = [name.strip() for name in line[1].split(",")]
    assert sorted([*CORRESPONDENCE["labels"], *CORRESPONDENCE["labels_of_the_model_only"]]) == sorted(
        declared
    )


@pytest.mark.parametrize("term", CORRESPONDENCE["terms"], ids=lambda term: term["label"])
def test_a_label_has_one_role_on_both_sides(term: dict[str, Any]) -> None:
    """What the model puts under a label is what the code's function is given, and whatever else has its reason."""
    module, _, name = term["function"].rpartition(".")
    of_model, of_code = zip(*term["inputs"], strict=True)
    assert term["model"] in DESIGN
    assert all(part in term["model"] for part in [term["label"], *of_model])
    asked = set(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    assert asked == {*of_code, *term.get("code_only", {})}


def test_every_label_has_its_role() -> None:
    """Naming a label is not enough."""
    assert {term["label"] for term in CORRESPONDENCE["terms"]} == set(CORRESPONDENCE["labels"])


# ---- messages ----


def elements(text: str) -> list[str]:
    """Give the elements of the first tuple in a line of the model."""
    parts, depth = [""], 0
    for character in text[text.index("(") :]:
        depth += (character == "(") - (character == ")")
        if depth == 0:
            break
        if character == "," and depth == 1:
            parts.append("")
        elif depth > 1 or character != "(":
            parts[-1] += character
    return [part.strip() for part in parts]


def tuple_of(message: dict[str, Any]) -> list[str]:
    """Give the elements that a message has in the model; what goes over the channel is one message there."""
    return elements(message["model"].removeprefix("out(c, "))


@pytest.mark.parametrize("message", CORRESPONDENCE["messages"], ids=lambda message: message["name"])
def test_a_message_has_the_fields_of_the_model(message: dict[str, Any]) -> None:
    """Every field of the struct is an element of the model's tuple, or has its reason."""
    struct = getattr(messages, message["name"])
    fields = list(msgspec.structs.fields(struct))
    names = [field.name for field in fields]
    modelled = [name for name in message["fields"] if name != "type"]
    assert message["model"] in DESIGN
    assert len(tuple_of(message)) == len(message["fields"])
    assert sorted([*modelled, *message.get("code_only", {})]) == sorted(names)
    if message["name"] != "Keys":  # whose tuple starts with its type, and names the key first
        assert modelled == [name for name in names if name in modelled]


def test_every_message_is_modelled_or_has_its_reason() -> None:
    """A new message changes what is proved, or somebody says why not."""
    structs = {
        kind.__name__
        for kind in vars(messages).values()
        if isinstance(kind, type)
        and issubclass(kind, msgspec.Struct)
        and kind.__module__ == messages.__name__
    }
    parts = {kind.__name__ for kind in (*PARTS, messages.Message, messages._Versioned)}
    named = [message["name"] for message in CORRESPONDENCE["messages"]]
    assert sorted([*named, *CORRESPONDENCE["messages_of_the_code_only"]]) == sorted(structs - parts)


# ---- the order of checks ----


def steps(kind: Kind) -> list[dict[str, Any]]:
    """Give the steps of one kind, as they stand in the table."""
    return [step for step in CORRESPONDENCE["steps"] if step.get("kind", kind) == kind]


KINDS = pytest.mark.parametrize("kind", messages.KINDS)


@KINDS
def test_the_model_has_the_steps_in_the_order_of_the_protocol(kind: Kind) -> None:
    """Each line of the table follows the one before it in the verifier's process."""
    numbers = [step["step"] for step in steps(kind)]
    assert numbers == sorted(numbers)
    at = 0
    for step in steps(kind):
        for line in step["model"]:
            found = VERIFIER.find(line, at)
            assert found >= 0, f"step {step['step']}: {line}"
            at = found + len(line)


def test_every_test_that_the_models_verifier_makes_is_in_the_table() -> None:
    """A line of the model that no check of the code stands behind would prove too much."""
    known = [line for step in CORRESPONDENCE["steps"] for line in step["model"]]
    tests = [line.strip() for line in VERIFIER.splitlines() if re.search(r"\bif |\(=|, =", line)]
    left = [line for line in tests if not any(part in line for part in known)]
    # The shape of a Confirm: its session is the key by which the code finds the answer (confirm.session).
    assert set(left) == {"in(c, (=tok, =OK, cm: bitstring));"}


def test_every_check_without_a_line_in_the_model_has_its_reason() -> None:
    """And no reason is left of a check that is gone."""
    reasons = set(CORRESPONDENCE["checks_of_the_code_only"])
    made = {check for step in CORRESPONDENCE["steps"] for check in step["checks"]}
    assert reasons <= made
    for step in CORRESPONDENCE["steps"]:
        modelled = set(step["checks"]) - reasons
        # Steps 2, 10 and 11 have lines that choose a branch or name an event; the checks there are the code's own.
        assert bool(modelled) == (bool(step["model"]) and step["step"] not in {2, 10, 11}), step


@KINDS
def test_the_table_names_every_mandatory_check(kind: Kind) -> None:
    """A check that is added to the pipeline finds its place in the table, or this fails."""
    made = {check for step in steps(kind) for check in step["checks"]}
    of_the_boot = {"pcr.*"} if kind == "svsm-vtpm" else {"boot.ungranted"}
    assert made - set(MANDATORY[kind]) == SOMETIMES | {"boot.unopened"} | of_the_boot
    assert set(MANDATORY[kind]) <= made


@KINDS
def test_the_pipeline_makes_the_checks_in_the_order_of_the_table(
    kind: Kind, request: pytest.FixtureRequest
) -> None:
    """An honest unlock leaves exactly these names on its trail, one after the other."""
    vm: Enrolled = request.getfixturevalue("enrolled" if kind == "svsm-vtpm" else "enrolled_direct")
    with vm.booted() as (_, config):
        session = unlock(config, lambda _: None, prove=True).session
    released = next(entry for entry in vm.owner.ledger(session) if entry.event == "released")
    names = [re.sub(r"^pcr\.\d+$", "pcr.*", check["id"]) for check in released.body["checks"]]
    trail = [name for name, _ in itertools.groupby(names)]
    table = [check for step in steps(kind) for check in step["checks"]]
    assert trail == [check for check in table if check in trail or check not in SOMETIMES]


# ---- results ----


def rows() -> dict[str, dict[str, str]]:
    """Read README.md's table: for each row the verdict of each query that it shows."""
    lines = (MODEL / "README.md").read_text(encoding="utf-8").splitlines()
    head = next(line for line in lines if line.startswith("| | S "))
    queries = [cell.split()[0] for cell in head.strip("| ").split(" | ")]
    cells = [
        line.strip("| ").split(" | ") for line in lines[lines.index(head) + 2 :] if line.startswith("| ")
    ]
    table = [row for row in cells if len(row) == len(queries) + 1]
    return {name: dict(zip(queries, (cell.strip("*") for cell in row), strict=True)) for name, *row in table}


def test_every_row_of_the_table_is_a_variant() -> None:
    """What README.md shows can be run again."""
    assert list(rows()) == list(CORRESPONDENCE["results"])
    assert set(CORRESPONDENCE["results"].values()) <= set(gen.VARIANTS)
    assert all(set(row.values()) <= {"true", "false"} for row in rows().values())
    assert set(rows()["**version 1**"].values()) == {"true"}


def test_what_proverif_says_is_read_to_the_end() -> None:
    """A run that broke off, or one whose queries are others, gives no results."""
    said = "RESULT (but a remark)\n" + "".join(f"RESULT query {n} is true.\n" for n in gen.QUERIES)
    assert gen.results(said) == dict.fromkeys(gen.QUERIES, "true")
    mixed = said.replace("query S is true", "query S is false").replace(
        "query D is true", "D cannot be proved"
    )
    assert (gen.results(mixed)["S"], gen.results(mixed)["D"], gen.results(mixed)["X"]) == (
        "false",
        "cannot",
        "true",
    )
    with pytest.raises(ValueError, match="results for"):
        gen.results(said[: said.rindex("RESULT")])


def test_each_variant_is_run_as_itself_and_its_results_keep_its_name(tmp_path: Path) -> None:
    """With a program in ProVerif's place, which says "false" of everything where VMPL is not looked at."""
    proverif = tmp_path / "proverif"
    lines = "".join(f"echo RESULT query {query} is $verdict.\n" for query in gen.QUERIES)
    proverif.write_text(f'#!/bin/sh\ngrep -q "DROPPED: VMPL" "$1" && verdict=false || verdict=true\n{lines}')
    proverif.chmod(0o755)
    given = gen.run(["no_vmpl", gen.DESIGN, "no_cap"], str(proverif))
    assert {name: set(one.values()) for name, one in given.items()} == {
        "no_vmpl": {"false"},
        gen.DESIGN: {"true"},
        "no_cap": {"true"},
    }
    assert gen.table(given).splitlines()[2].startswith("| no_vmpl | false | ")


@pytest.mark.slow
def test_proverif_says_what_the_table_says() -> None:
    """Where ProVerif is installed, every row is run; the design's reachability queries must be false, too."""
    proverif = shutil.which("proverif")
    if proverif is None:
        pytest.skip("proverif is not on PATH (neither Debian nor PyPI has it): the table was not run again")
    given = gen.run(CORRESPONDENCE["results"].values(), proverif)
    for row, variant in CORRESPONDENCE["results"].items():
        assert {query: given[variant][query] for query in rows()[row]} == rows()[row], row
    assert {given[gen.DESIGN][query] for query in ("R1", "R2", "R3")} == {"false"}
