"""Four programs read a command line, each its own way: what any of them takes for an open door, we must, too (THREATS T5).

The readers are written here from what theirs do: next_arg of Linux (lib/cmdline.c), which dracut-getarg is made from;
extract_first_word of systemd with UNQUOTE, RELAX and RETAIN_ESCAPE; ``for x in $(cat /proc/cmdline)`` of initramfs-tools.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from hypothesis import example, given, settings
from hypothesis import strategies as st

from kagimori_verifier.appraise.command_line import LONGEST, REQUIRED, doors

CLOSING: Final = list(REQUIRED.values())
OPENING: Final = [
    *("init=/bin/sh", "systemd.unit=rescue.target", "systemd.debug_shell", "rd.break", "break=top", "-b"),
    *("panic=never", "rd.shell=1", "systemd.gpt-auto=1", "rd.emergency=", "systemd.import_credentials"),
]
NOISE: Final = [
    *"\"'\\\t\n\v\f\r\x00\xa0\x85= x-",
    " ",
    '"',
    "'",
    " -- ",
    ' "a b" ',
    " x='",
    '\\" ',
    "quiet ",
]


def kernel(
    line: str, blanks: str = "\t\n\v\f\r \xa0", ends: str = "\n\0"
) -> Iterator[tuple[str, str | None]]:
    """Read as parse_args does, behind an EFI stub that ends the line at a newline; None: a word without a value."""
    line = re.split(f"[{ends}]", line[:LONGEST])[0]
    at = 0
    while at < len(line):
        if line[at] in blanks:
            at += 1
            continue
        first = at
        quoted = line[at] == '"'
        inside = quoted
        equals = 0
        at += quoted
        while at < len(line) and (inside or line[at] not in blanks):
            if not equals and line[at] == "=":
                equals = at
            if line[at] == '"':
                inside = not inside
            at += 1
        word = line[first + quoted : at]
        if quoted and word.endswith('"'):
            word = word[:-1]
        if not equals:
            yield word, None
            continue
        key, _, value = word.partition("=")
        if value.startswith('"'):
            value = value[1:].removesuffix('"')
        yield key, value


def dracut(line: str) -> Iterator[tuple[str, str | None]]:
    """Read as dracut-getarg does, of which isspace is the C library's."""
    return kernel(line, "\t\n\v\f\r ", "\0")


def systemd(line: str) -> Iterator[tuple[str, str | None]]:
    """Read as systemd does: both kinds of quotes are taken off wherever they stand, and a last one may be missing."""
    word: str | None = None
    quote = ""
    for character in line.partition("\0")[0].partition("\n")[0] + " ":
        if quote:
            word, quote = ((word or ""), "") if character == quote else ((word or "") + character, quote)
        elif character in "\"'":
            word, quote = word or "", character
        elif character in " \t\n\r":
            if word is not None:
                yield split(word)
            word = None
        else:
            word = (word or "") + character
    if word is not None:
        yield split(word.removesuffix(" "))


def shell(line: str) -> Iterator[tuple[str, str | None]]:
    """Read as the shell of initramfs-tools does: quotes are part of the words."""
    for word in re.split(r"[ \t\n]+", line.partition("\0")[0]):
        yield split(word)


def split(word: str) -> tuple[str, str | None]:
    """Give the key of a word, and its value."""
    key, sign, value = word.partition("=")
    return key, value if sign else None


def last(words: Iterator[tuple[str, str | None]], *keys: str) -> str | None:
    """Give what the last word of this key says: an empty text where it says nothing, None if there is none."""
    said = None
    for key, value in words:
        if key.replace("-", "_") in keys:
            said = value or ""
    return said


def bare(words: Iterator[tuple[str, str | None]], *keys: str) -> bool:
    """Tell whether one of these words is there."""
    return any(key in keys for key, _ in words)


FALSE: Final = {"0", "no", "n", "false", "f", "off"}
OPEN: Final[Mapping[str, Callable[[str], bool]]] = {
    "the kernel resumes": lambda line: not bare(before_dashes(line), "noresume"),
    "the initramfs resumes": lambda line: not bare(shell(line), "noresume"),
    "systemd imports credentials": lambda line: (
        (last(systemd(line), "systemd.import_credentials") or "yes").lower() not in FALSE
    ),
    "systemd mounts by type": lambda line: (
        (last(systemd(line), "systemd.gpt_auto") or "yes").lower() not in FALSE
    ),
    "systemd starts another target": lambda line: (
        last(systemd(line), "systemd.unit") not in {None, "", "multi-user.target", "graphical.target"}
        or bare(systemd(line), "-b", "systemd.debug_shell")
    ),
    "a dracut that fails gives a shell": lambda line: (
        last(dracut(line), "rd.shell") not in {"0", "no", "off"}
    ),
    "a dracut that fails waits": lambda line: (
        last(dracut(line), "rd.emergency") not in {"poweroff", "reboot", "halt"}
    ),
    "dracut stops": lambda line: bare(dracut(line), "rd.break"),
    "initramfs-tools stops": lambda line: bare(shell(line), "break"),
    "an initramfs-tools that fails gives a shell": lambda line: (
        not re.fullmatch("-1|[0-9]+", last(shell(line), "panic") or "")
    ),
    "the kernel's init is another": lambda line: last(before_dashes(line), "init") not in {None, ""},
    "the initramfs' init is another": lambda line: last(shell(line), "init") not in {None, ""},
}
"""What one reader takes for an open door."""


def before_dashes(line: str) -> Iterator[tuple[str, str | None]]:
    """Read what is for the kernel itself."""
    for key, value in kernel(line):
        if (key, value) == ("--", None):
            return
        yield key, value


@st.composite
def lines(draw: st.DrawFn) -> str:
    """Draw the words that close all doors, in any order, and between them whatever may break them."""
    words = list(draw(st.permutations(CLOSING)))
    # Little of it, so that many lines pass.
    for noise in draw(st.lists(st.sampled_from(2 * NOISE + OPENING + CLOSING), max_size=4)):
        at = draw(st.integers(0, len(words)))
        words[at:at] = [noise, " "][: draw(st.integers(1, 2))]
    line = ""
    for word in words:
        line += draw(st.sampled_from(["", " "])) if word in NOISE else " "
        line += word
    return line


CLOSED: Final = " ".join(CLOSING)


@settings(max_examples=600, deadline=None)
@given(lines())
@example(CLOSED)
@example(f"quiet\xa0init=/bin/sh {CLOSED}")
@example(CLOSED.replace("noresume", """x='"' noresume y='"'"""))
@example(f'{CLOSED} panic="-1"')
@example(f"{CLOSED} rd.emergency='poweroff'")
@example(f"\n{CLOSED}")
def test_whoever_reads_a_line_that_passes_finds_no_door_open(line: str) -> None:
    """In quotes, at a no-break space, at a newline: where they differ, the line is refused, not believed."""
    if not doors(line):
        assert [what for what, is_open in OPEN.items() if is_open(line)] == []


def test_the_readers_differ_where_theirs_do() -> None:
    """What the property is worth: each reads the ordinary line, and each has a line that it alone reads so."""
    for reader in (kernel, dracut, systemd, shell):
        assert list(reader("a=1  b"))[:2] == [("a", "1"), ("b", None)]
    assert list(kernel("a\xa0b=2")) == [("a", None), ("b", "2")]
    assert list(dracut("a\xa0b=2")) == [("a\xa0b", "2")]
    assert list(kernel("""a='x "y' b" c""")) == [("a", "'x"), ("y' b", None), ("c", None)]
    assert list(systemd("""a='x "y' b" c""")) == [("a", 'x "y'), ("b c", None)]
    assert list(shell('a="1 2"')) == [("a", '"1'), ('2"', None)]
    assert all(not is_open(CLOSED) for is_open in OPEN.values())
