"""What the agent prints for people."""

from __future__ import annotations

import logging

import pytest

from kagimori_agent import console
from kagimori_agent.unlock import KeyRefused
from kagimori_protocol.errors import DiskError
from kagimori_protocol.messages import Check


def test_a_verdict_cannot_move_the_cursor_of_whoever_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Texts from the network are escaped: a terminal obeys none of them."""
    check = Check(id="pcr.4", ok=False, expected="\x1b[2Jgone", found="a\rb\n\u202ec")
    console.show_checks([check], every=True)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert "\\x1b[2Jgone" in printed


def test_checks_that_fail_come_last_and_those_that_hold_only_when_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A console shows its last lines."""
    checks = [
        Check(id="pcr.4", ok=False, expected="x", found="y"),
        Check(id="report.vmpl", ok=True, expected="VMPL 0", found="VMPL 0"),
    ]
    console.show_checks(checks, every=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("holds  report.vmpl")
    assert lines[1] == "FAILS  pcr.4"
    console.show_checks(checks, every=False)
    assert "report.vmpl" not in capsys.readouterr().out


def test_an_error_tells_its_four_parts_on_stderr_and_nothing_on_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stdout carries only what was asked for."""
    console.explain(DiskError("It broke.", expected="whole", found="broken", todo="Mend it."))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "kagimori-agent: It broke.",
        "         expected: whole",
        "         found: broken",
        "         to do: Mend it.",
    ]


def test_a_refused_key_is_told_check_by_check(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten differing PCRs in one line would be read by nobody."""
    checks = [Check(id=f"pcr.{index}", ok=False, expected="x", found="y") for index in (8, 9)]
    console.explain(KeyRefused("home: refuses the key.", checks, "Ask the owner."))
    printed = capsys.readouterr().err
    assert "FAILS  pcr.8" in printed
    assert "FAILS  pcr.9" in printed
    assert "to do: Ask the owner." in printed


def test_who_debugs_sees_what_libraries_log_and_no_terminal_obeys_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header that urllib3 complains of is the host's to write."""
    root = logging.Logger("root")  # noqa: LOG001 - of this test alone
    monkeypatch.setattr(logging, "root", root)
    console.debug()
    root.debug("headers: %s", "\x1b[2J")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kagimori-agent: [")
    assert captured.err.endswith(" s, root] headers: \\x1b[2J\n")
