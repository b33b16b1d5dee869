"""The fuzzers from outside: a fault is found, told with its input and repeated; where there is no engine, that is said."""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fuzz import __main__ as cli
from tests.fuzz import campaign, inputs, workshop
from tests.fuzz.targets import planted
from tests.fuzz.targets.names import NAMES

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed: ./dev fuzz and ./dev test all do that where it comes as a wheel",
)


def test_a_fuzzer_does_not_begin_with_the_memory_of_whoever_starts_it(tmp_path: Path) -> None:
    """A test runner that has grown would have libFuzzer end every run as out of memory."""
    held = bytearray(b"x") * (256 << 20)
    program = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    with (tmp_path / "output").open("w") as output:
        assert campaign.started_small([sys.executable, "-c", program], output).wait(60) == 0
    assert int((tmp_path / "output").read_text()) < len(held) >> 11, "KiB: half of what is held here"


@needs_atheris
@pytest.mark.slow
def test_a_planted_fault_is_found_told_and_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the engine's first input to the line that a person copies out of CI's log."""
    monkeypatch.setattr(campaign, "STATE", tmp_path)
    outcome = campaign.fuzz("planted", 20, 1, lambda _: None, every_s=0.5)
    assert not outcome.good
    [finding] = outcome.findings
    assert finding.parent == tmp_path / "findings" / "planted"
    assert finding.read_bytes()[:1] in {b"b", b"c"}
    told = campaign.told(outcome)
    assert "FAILED" in told
    assert "ValueError: a stray error" in told or "OverBound" in told
    again = re.search(r"^\./dev fuzz planted --input (\S+)$", told, re.MULTILINE)
    assert again is not None
    assert inputs.from_text(again[1]) == finding.read_bytes()
    if finding.read_bytes()[:1] == b"b":
        assert cli.tried(planted.TARGET, finding.read_bytes()) == cli.EXIT_FOUND
        assert "a finding" in capsys.readouterr().out


@needs_atheris
@pytest.mark.slow
def test_a_run_without_a_finding_says_what_it_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inputs and edges are counted, and the corpus is kept for the next run."""
    monkeypatch.setattr(campaign, "STATE", tmp_path)
    outcome = campaign.fuzz("messages", 2, 1, lambda _: None)
    assert outcome.good, campaign.told(outcome)
    assert outcome.executions > 100
    assert outcome.edges > 10
    assert "no finding" in campaign.told(outcome)
    assert list((tmp_path / "corpus" / "messages").iterdir())


@needs_atheris
@pytest.mark.slow
def test_a_corpus_that_grew_large_keeps_what_is_worth_keeping(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A thousand inputs that reach the same lines would take the whole of a leg to load."""
    monkeypatch.setattr(campaign, "STATE", tmp_path)
    monkeypatch.setattr(campaign, "MOST_KEPT", 10)
    corpus = campaign.corpus_of("planted")
    corpus.mkdir(parents=True)
    for number in range(10):
        (corpus / str(number)).write_bytes(b"a" * (number + 1))
    campaign.shrink("planted")
    assert len(list(corpus.iterdir())) == 10
    for number in range(10, 40):
        (corpus / str(number)).write_bytes(b"x" * (number + 1))
    campaign.shrink("planted")
    kept = [path.read_bytes() for path in corpus.iterdir()]
    assert 0 < len(kept) < 10
    assert {data[:1] for data in kept} == {b"a", b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_bounds_reach_the_engine() -> None:
    """As far as libFuzzer has flags for them."""
    flags = campaign.flags("x509", 7, 3)
    assert {"-max_total_time=7", "-seed=3"} < set(flags)
    assert {flag.partition("=")[0] for flag in flags} >= {
        "-max_len",
        "-timeout",
        "-rss_limit_mb",
        "-malloc_limit_mb",
    }


@pytest.mark.parametrize(
    ("ci", "machine", "code"), [("", "x86_64", 0), ("true", "aarch64", 0), ("true", "x86_64", 1)]
)
def test_without_an_engine_the_leg_is_skipped_aloud_but_not_in_ci(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ci: str, machine: str, code: int
) -> None:
    """A leg that vanished in silence would be no leg."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("CI", ci)
    assert cli.main(["--leg"]) == code
    said = capsys.readouterr().out
    assert "skipped: atheris has no wheel for" in said
    assert ("FAILED" in said) == bool(code)


def test_a_person_is_told_which_targets_there_are_and_what_becomes_of_an_input(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without an engine, too."""
    assert cli.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == list(NAMES)
    assert cli.main(["eventlog", "--input", "00"]) == 0
    assert "refused" in capsys.readouterr().out
    assert cli.main(["eventlog", "--input", "no hexadecimal"]) == cli.EXIT_USAGE
    assert cli.main(["--input", "00"]) == cli.EXIT_USAGE
    assert "TARGET" in capsys.readouterr().err


def test_words_that_make_no_sense_are_usage_errors() -> None:
    """By argparse, with exit code 2."""
    for words in (["nothing"], ["tpm", "0"], ["tpm", "soon"]):
        ran = subprocess.run(
            [sys.executable, "-m", "tests.fuzz", *words],
            cwd=workshop.ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == cli.EXIT_USAGE
        assert "usage: ./dev fuzz" in ran.stderr
        assert "Traceback" not in ran.stderr
