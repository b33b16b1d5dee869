"""What a newcomer is told to type exists: each command of the README, in both languages, and of docs/deploy.md.

The commands are read out of the text and given to the programs' own parsers; what stands for a value that only the
reader has (a session, a chip) is replaced by one of its kind.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, cast

import pytest
from package.__main__ import _parser as package
from tests.boot.__main__ import _parser as boot
from tests.fuzz.__main__ import parser as fuzz

from kagimori_agent.cli import parser as agent
from kagimori_protocol.errors import KagimoriError
from kagimori_simulator.cli import _parser as simulator
from kagimori_simulator.demo import parser as demo
from kagimori_verifier.cli.main import parser as verifier

ROOT: Final = Path(__file__).resolve().parents[2]
ENGLISH: Final = "README.md"
JAPANESE: Final = "README.ja.md"
DOCUMENTS: Final = (ENGLISH, JAPANESE, "docs/deploy.md")

PARSERS: Final[dict[str, Callable[[], argparse.ArgumentParser]]] = {
    "kagimori-agent": agent,
    "kagimori-verifier": verifier,
    "kagimori-simulator": simulator,
}
OF_DEV: Final[dict[str, Callable[[], argparse.ArgumentParser]]] = {
    "demo": demo,
    "boot": boot,
    "package": package,
    "fuzz": fuzz,
}
"""The verbs of ./dev that hand their words to a program of ours; ``exec`` does so to any."""
TAKES_NOTHING: Final = frozenset({"setup", "fmt", "lock"})
EXAMPLES: Final = {
    "SESSION": "1f2e3d4c5b6a7988",
    "UUID": "0b5a0e3c-7b1d-4c52-9d39-2f6f3a0c9c11",
    "$CHIP_ID": "5a" * 64,
    "$(cat sim/chip-id)": "5a" * 64,
    "$MEASUREMENT": "5a" * 48,
    "$(cat sim/measurement)": "5a" * 48,
}
"""What the texts have in a value's place, and a value of its kind."""

_FENCE: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN: Final = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
_HEADING: Final = re.compile(r"^(#+) (.*)$", re.MULTILINE)
_SEPARATORS: Final = frozenset({";", "&", "&&", "||", "|", "(", ")"})
_REDIRECTIONS: Final = frozenset({">", ">>", "<"})
_OPEN: Final = re.compile(r"[A-Z][A-Z_]*|\.\.\.|\$.*")
"""In running text: a word that stands for another, or for several."""

Command = tuple[str, ...]


def text_of(name: str) -> str:
    """Give a document's text."""
    return (ROOT / name).read_text(encoding="utf-8")


def prose_of(text: str) -> str:
    """Give a text without its blocks."""
    return _FENCE.sub("", text)


def shell_of(text: str) -> list[Command]:
    """Give each simple command of a text's shell blocks, without comments, redirections and continuations."""
    found: list[Command] = []
    for language, block in _FENCE.findall(text):
        if language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                found.extend(_simple(line))
    return found


def _simple(line: str) -> Iterator[Command]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>()")
    lexer.whitespace_split = True
    words: list[str] = []
    to_a_file = False
    for word in lexer:
        if word in _SEPARATORS:
            if words:
                yield tuple(words)
            words = []
        elif word in _REDIRECTIONS:
            to_a_file = True
        elif to_a_file:
            to_a_file = False
        else:
            words.append(word)
    if words:
        yield tuple(words)


def ours(commands: list[Command]) -> list[Command]:
    """Give those that run a program of ours, with the aliases that were made before them resolved."""
    aliases: dict[str, list[str]] = {}
    found: list[Command] = []
    for name, *rest in commands:
        if name == "alias":
            aliases |= {key: shlex.split(value) for key, _, value in (word.partition("=") for word in rest)}
            found.extend(_as_ours(value) for value in aliases.values())
        else:
            found.append(_as_ours([*aliases.get(name, [name]), *rest]))
    return [command for command in found if command[0] in {*PARSERS, "./dev"}]


def _as_ours(words: list[str]) -> Command:
    """Name ./dev so wherever the checkout is."""
    return ("./dev", *words[1:]) if words[0] == "/path/to/dev" else tuple(words)


def spans_of(text: str) -> list[Command]:
    """Give the commands in running text: those by a program's name, and those that begin with one of its verbs."""
    verbs = {verb: name for name in ("kagimori-agent", "kagimori-verifier") for verb in _verbs(name)}
    found: list[Command] = []
    for span in _SPAN.findall(prose_of(text)):
        words = span.split()
        aliased = {"kv": "kagimori-verifier", "ks": "kagimori-simulator"}.get(words[0], words[0])
        if aliased in {*PARSERS, "./dev"}:
            found.append((aliased, *words[1:]))
        elif words[0] in verbs and len(words) > 1:
            found.append((verbs[words[0]], *words))
    return found


def _verbs(program: str) -> list[str]:
    below = _below(PARSERS[program]())
    assert below is not None
    return list(below)


def dev_verbs() -> set[str]:
    """Give the labels of the case by which ./dev chooses."""
    chosen = (ROOT / "dev").read_text(encoding="utf-8").partition("case $verb in\n")[2]
    labels = re.findall(r"^([a-z|\s-]+)\)", chosen, re.MULTILINE)
    return {label.strip() for several in labels for label in several.split("|")}


def complaint(command: Command, *, whole: bool = True) -> str | None:
    """Say what is wrong with a command of ours, if anything; one that is not ``whole`` may leave out what it needs."""
    program, *words = command
    if program == "./dev":
        return _complaint_of_dev(words, whole=whole)
    if program not in PARSERS:
        return f"no program of ours: {program}"
    parser = PARSERS[program]()
    wrong = _unknown(parser, words)
    if wrong is not None or not whole:
        return wrong
    return _parse(parser, words) or _complaint_of_guest(words)


def _complaint_of_dev(words: list[str], *, whole: bool) -> str | None:
    if not words or _OPEN.fullmatch(words[0]):
        return None
    verb, *rest = words
    if verb not in dev_verbs():
        return f"./dev has no verb {verb}"
    if verb == "exec" and rest:
        # By an alias the program stands alone; its words come where the alias is used.
        return complaint(tuple(rest), whole=whole and len(rest) > 1)
    if verb in TAKES_NOTHING and rest:
        return f"./dev {verb} takes nothing"
    if verb not in OF_DEV:
        return None
    parser = OF_DEV[verb]()
    return _unknown(parser, rest) or (_parse(parser, rest) if whole else None)


def _complaint_of_guest(words: list[str]) -> str | None:
    """What a simulated machine runs is the agent."""
    if words[:1] != ["run"]:
        return None
    inside = simulator().parse_args(_valued(words)).agent
    return complaint(("kagimori-agent", *inside))


def _valued(words: list[str]) -> list[str]:
    return [EXAMPLES.get(word, word) for word in words]


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> str | None:
    try:
        parser.parse_args(_valued(words))
    except SystemExit as end:
        return None if end.code in {0, None} else f"{parser.prog} does not take: {' '.join(words)}"
    except KagimoriError as error:
        return str(error)
    return None


def _unknown(parser: argparse.ArgumentParser, words: list[str]) -> str | None:
    """Name the first verb or option that a parser has not: in full, for argparse takes abbreviations."""
    for at, word in enumerate(words):
        below = _below(parser)
        if word.startswith("-") and word != "-":
            if word.partition("=")[0] not in parser._option_string_actions:
                return f"{parser.prog} has no option {word}"
        elif below is not None and not _OPEN.fullmatch(word):
            if word not in below:
                return f"{parser.prog} has no verb {word}"
            parser = below[word]
        elif any(action.nargs == argparse.REMAINDER for action in parser._actions) and word in _verbs(
            "kagimori-agent"
        ):
            return _unknown(agent(), words[at:])
    return None


def _below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser] | None:
    """Give the verbs below a parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return cast("dict[str, argparse.ArgumentParser]", action.choices)
    return None


def _slug(heading: str) -> str:
    """Give a heading's anchor, as the places that show such texts make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_command_in_a_block_parses(name: str) -> None:
    """With every verb, every option in full, and a value of its kind for what only the reader has."""
    commands = ours(shell_of(text_of(name)))
    assert len(commands) > 20
    assert [(command, wrong) for command in commands if (wrong := complaint(command))] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_command_in_running_text_names_verbs_and_options_that_exist(name: str) -> None:
    """It need not be whole: `kagimori-agent dry-run` speaks of a verb."""
    commands = spans_of(text_of(name))
    assert len(commands) > 5
    assert [(command, wrong) for command in commands if (wrong := complaint(command, whole=False))] == []


def test_both_readmes_have_the_same_commands_in_the_same_order() -> None:
    """Whatever language one reads, one types the same; only comments are translated."""
    assert shell_of(text_of(JAPANESE)) == shell_of(text_of(ENGLISH))
    assert sorted(spans_of(text_of(JAPANESE))) == sorted(spans_of(text_of(ENGLISH)))


def test_both_readmes_have_the_same_structure_and_show_the_same_screens() -> None:
    """Headings of the same levels, links to the same documents, tables of as many rows, outputs letter by letter."""
    english, japanese = text_of(ENGLISH), text_of(JAPANESE)
    assert [level for level, _ in _HEADING.findall(prose_of(japanese))] == [
        level for level, _ in _HEADING.findall(prose_of(english))
    ]
    assert [text for language, text in _FENCE.findall(japanese) if language != "sh"] == [
        text for language, text in _FENCE.findall(english) if language != "sh"
    ]
    links = [
        sorted(link for link in _LINK.findall(text) if not link.startswith(("#", "README")))
        for text in (english, japanese)
    ]
    assert links[0] == links[1]
    rows = [re.findall(r"^\|", prose_of(text), re.MULTILINE) for text in (english, japanese)]
    assert len(rows[0]) == len(rows[1])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_link_leads_somewhere(name: str) -> None:
    """To a file that is there, and to a heading that is in it."""
    for link in _LINK.findall(prose_of(text_of(name))):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            headings = _HEADING.findall(prose_of(target.read_text(encoding="utf-8")))
            assert anchor in {_slug(heading) for _, heading in headings}, link


@pytest.mark.parametrize(
    "line",
    [
        "kagimori-verifier vm ad web1",
        "kagimori-verifier vm add web1",
        "kagimori-verifier vm add web1 --profile debian --chips 5a",
        'kagimori-verifier vm add web1 --profile debian --chip "$NOBODY_KNOWS"',
        "kagimori-agent doctor --host",
        "kagimori-agent enroll --device /dev/vda3",
        "kagimori-simulator run --dir sim --config agent.toml --lie white dry-run",
        "kagimori-simulator run --dir sim --config agent.toml unlock --proof",
        "./dev dmeo",
        "./dev demo --jsn",
        "./dev package sarge",
        "./dev exec kagimori-verifier vm ad web1",
        "./dev setup now",
        "true && kagimori-agent unlock --proof > /dev/null",
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str) -> None:
    """Were each of these in a text, a test above would fail."""
    (command,) = ours(shell_of(f"```sh\n{line}\n```\n"))
    assert complaint(command) is not None


@pytest.mark.parametrize("span", ["kagimori-agent explain", "`image enroll`", "vm add --chips", "./dev dmeo"])
def test_a_name_in_running_text_that_does_not_exist_is_found(span: str) -> None:
    """The same for words between backquotes."""
    (command,) = spans_of(f"`{span.strip('`')}`")
    assert complaint(command, whole=False) is not None
