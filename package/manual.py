"""A manual page and the completions of two shells, from a program's own argparse tree: they cannot say another thing.

Source: man-pages(7) for the sections; bash(1), Programmable Completion; zshcompsys(1).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import NamedTuple


class Verb(NamedTuple):
    """One command: the words that name it, its summary, its parser."""

    words: tuple[str, ...]
    summary: str
    parser: argparse.ArgumentParser


def verbs(parser: argparse.ArgumentParser, above: tuple[str, ...] = ()) -> Iterator[Verb]:
    """Walk all commands of a program that have none below them."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001 - argparse has no other way to its tree
    for group in groups:
        told = {choice.dest: choice.help or "" for choice in group._choices_actions}  # noqa: SLF001 - as above
        for name, one in group.choices.items():
            words = (*above, name)
            below = list(verbs(one, words))
            yield from below or [Verb(words, told.get(name, ""), one)]


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Give a command's own arguments, without those that name other commands."""
    return [
        action
        for action in parser._actions  # noqa: SLF001 - as above
        if not isinstance(action, argparse._SubParsersAction) and action.help != argparse.SUPPRESS  # noqa: SLF001 - as above
    ]


def page(parser: argparse.ArgumentParser, section: int, project: str) -> str:
    """Write the manual page in roff."""
    name = parser.prog
    lines = [f'.TH {name.upper()} {section} "" "{project}" ""', ".SH NAME"]
    lines.append(_roff(f"{name} - {_sentence(parser.description or '')}"))
    lines += [".SH SYNOPSIS", f".B {_roff(name)}", ".I VERB", "[options]", ".SH DESCRIPTION"]
    lines += _paragraphs(parser.description or "")
    lines.append(".SH COMMANDS")
    for verb in verbs(parser):
        lines += [f".SS {_roff(' '.join((name, *verb.words)))}"]
        lines += _paragraphs(verb.parser.description or verb.summary)
        for action in options(verb.parser):
            lines += [".TP", f".B {_roff(_spelt(action))}"]
            lines += _paragraphs(_help(verb.parser, action))
    lines.append(".SH EXIT STATUS AND EXAMPLES")
    lines += [".nf", *(_roff(line) for line in (parser.epilog or "").splitlines()), ".fi"]
    return "\n".join(line for line in lines if line) + "\n"


def bash(parser: argparse.ArgumentParser) -> str:
    """Write the completion for bash: verbs, then the options of the verb, then files."""
    name = parser.prog
    function = "_" + name.replace("-", "_")
    cases = []
    for path, words in _levels(parser).items():
        cases.append(f"    {_quoted(' '.join(path))}) words={_quoted(' '.join(words))} ;;")
    return "\n".join(
        [
            f"# bash completion for {name}, made from its --help",
            f"{function}() {{",
            "    local at='' words='' word previous=${COMP_WORDS[COMP_CWORD-1]} current=${COMP_WORDS[COMP_CWORD]}",
            '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
            '        [[ $word == -* ]] || at="${at:+$at }$word"',
            "    done",
            "    # Values of options are no verbs: what is not known loses its last word.",
            "    while :; do",
            "        case $at in",
            *(f"    {line}" for line in cases),
            "        *) words='' ;;",
            "        esac",
            '        [[ -z $words && $at == *" "* ]] || break',
            "        at=${at% *}",
            "    done",
            '    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")',
            '    [[ $previous != -* && ${#COMPREPLY[@]} -gt 0 ]] || mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -f -- "$current")',
            "}",
            f"complete -o filenames -F {function} {name}",
            "",
        ]
    )


def zsh(parser: argparse.ArgumentParser) -> str:
    """Write the completion for zsh: as for bash, with the verbs' summaries."""
    name = parser.prog
    lines = [
        f"#compdef {name}",
        f"# made from the --help of {name}",
        "local at='' word",
        "local -a words_here",
    ]
    lines += [
        "for word in ${words[2,CURRENT-1]}; do",
        '    [[ $word == -* ]] || at="${at:+$at }$word"',
        "done",
    ]
    lines += ["while :; do", "    words_here=()", "    case $at in"]
    told = {verb.words: verb.summary for verb in verbs(parser)}
    for path, words in _levels(parser).items():
        shown = [_quoted(_described(word, told.get((*path, word), ""))) for word in words]
        lines.append(f"        {_quoted(' '.join(path))}) words_here=({' '.join(shown)}) ;;")
    lines += [
        "    esac",
        "    (( $#words_here )) || [[ $at == *' '* ]] || break",
        "    (( $#words_here )) && break",
    ]
    lines += ["    at=${at% *}", "done", f"_describe '{name}' words_here", "_files", ""]
    return "\n".join(lines)


def _levels(parser: argparse.ArgumentParser) -> dict[tuple[str, ...], list[str]]:
    """Give what may follow each sequence of verbs: more verbs, or a command's options."""
    found: dict[tuple[str, ...], list[str]] = {}
    for verb in verbs(parser):
        for depth, word in enumerate(verb.words):
            following = found.setdefault(verb.words[:depth], [])
            if word not in following:
                following.append(word)
        found[verb.words] = [option for action in options(verb.parser) for option in action.option_strings]
    found[()] += [option for action in options(parser) for option in action.option_strings]
    return found


def _described(word: str, summary: str) -> str:
    return word.replace(":", "\\:") + (f":{summary}" if summary else "")


def _spelt(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else (action.metavar or action.dest.upper())
    if isinstance(value, tuple):
        value = " ".join(value)
    return f"{', '.join(action.option_strings)} {value}".strip()


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""  # noqa: SLF001 - as above


def _sentence(text: str) -> str:
    first = re.split(r"(?<=\.)\s", text.strip(), maxsplit=1)[0].rstrip(".")
    return first[:1].lower() + first[1:].replace("\n", " ")


def _paragraphs(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        lines += [".PP"] if lines else []
        lines += [_roff(line.strip()) for line in paragraph.splitlines()]
    return lines


def _roff(text: str) -> str:
    """Escape what roff would read as its own."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
