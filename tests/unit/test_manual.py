"""A manual page and the completions come from the program's own argparse tree, and hold all of it."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest
from package import manual

from kagimori_agent import cli as agent
from kagimori_verifier.cli.main import parser as verifier

PROGRAMS = {"kagimori-agent": agent.parser, "kagimori-verifier": verifier}


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> argparse.ArgumentParser:
    """Give a program's tree."""
    made: argparse.ArgumentParser = PROGRAMS[request.param]()
    return made


def test_every_verb_and_every_option_is_in_the_manual_page(program: argparse.ArgumentParser) -> None:
    """With the words of --help."""
    page = manual.page(program, 8, "kagimori").replace("\\-", "-")
    found = list(manual.verbs(program))
    assert found
    for verb in found:
        assert f".SS {program.prog} {' '.join(verb.words)}" in page
        for action in manual.options(verb.parser):
            for option in action.option_strings:
                assert option in page, (verb.words, option)


def test_no_text_of_a_help_becomes_a_request_of_roff(
    program: argparse.ArgumentParser, tmp_path: Path
) -> None:
    """Only the macros that are meant begin a line; where groff is installed, it has nothing to say either."""
    text = manual.page(program, 8, "kagimori")
    requests = {line.split()[0] for line in text.splitlines() if line.startswith((".", "'"))}
    assert requests <= {".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".I", ".nf", ".fi"}
    if shutil.which("groff") is not None:
        page = tmp_path / "page.8"
        page.write_text(text, encoding="utf-8")
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", str(page)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


def _completed(program: argparse.ArgumentParser, tmp_path: Path, line: str) -> set[str]:
    script = tmp_path / "completion"
    script.write_text(manual.bash(program), encoding="utf-8")
    words = line.split(" ")
    array = " ".join(f"'{word}'" for word in words)
    asked = (
        f"source {script}; COMP_WORDS=({array}); COMP_CWORD={len(words) - 1};"
        f" _{program.prog.replace('-', '_')}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True, cwd=tmp_path)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("kagimori-agent en", {"enrol"}),
        ("kagimori-agent dry-run --s", {"--save"}),
        ("kagimori-agent unlock --config /etc/x --pro", {"--prove"}),
    ],
)
def test_bash_completes_the_agents_verbs_and_options(line: str, wanted: set[str], tmp_path: Path) -> None:
    """Also behind an option's value."""
    assert wanted <= _completed(agent.parser(), tmp_path, line)


def test_bash_completes_verbs_below_verbs(tmp_path: Path) -> None:
    """And gives no verb where none belongs."""
    assert {"accept"} <= _completed(verifier(), tmp_path, "kagimori-verifier reference acc")
    assert "accept" not in _completed(verifier(), tmp_path, "kagimori-verifier acc")


def test_zsh_is_offered_every_verb(program: argparse.ArgumentParser, tmp_path: Path) -> None:
    """With its summary; where zsh is installed, it parses."""
    text = manual.zsh(program)
    for verb in manual.verbs(program):
        assert f"'{' '.join(verb.words)}') words_here=(" in text
    script = tmp_path / "completion"
    script.write_text(text, encoding="utf-8")
    if shutil.which("zsh") is not None:
        assert subprocess.run(["zsh", "-n", str(script)], check=False).returncode == 0
