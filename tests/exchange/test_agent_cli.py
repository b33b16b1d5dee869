"""The agent's command line against a real verifier: what a person or a program reads."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from kagimori_protocol import messages
from kagimori_simulator import measured_boot

if TYPE_CHECKING:
    from pathlib import Path

    from tests.worlds import Enrolled

    from kagimori_simulator.world import World

TIMEOUT_S = 60
OTHER_BOOT = measured_boot.grub(cmdline="root=/dev/mapper/cryptroot init=/bin/sh")


def agent(world: World, verb: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the agent as a process of its own: it forbids core dumps, locks memory and takes signals."""
    config = str(world.directory / "agent.toml")
    command = [sys.executable, "-m", "kagimori_agent", verb, "--config", config, *options]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)


def test_a_dry_run_for_programs_is_one_object_and_keeps_what_was_sent(
    enrolled: Enrolled, tmp_path: Path
) -> None:
    """Stdout is JSON and nothing else; the directory has the evidence as it was sent, and no secret."""
    saved = tmp_path / "saved"
    with enrolled.booted() as (world, _):
        done = agent(world, "dry-run", "--json", "--save", str(saved))
        assert done.returncode == 0
        told = json.loads(done.stdout)
        assert told["allowed"]
        assert all(check["ok"] for check in told["checks"])
        evidence = messages.decode(messages.Evidence, (saved / "evidence.json").read_bytes())
        assert (saved / "report.bin").read_bytes() == evidence.report
        assert evidence.hello == (saved / "hello.json").read_bytes()
        assert json.loads((saved / "verdict.json").read_bytes())["allowed"]
        assert agent(world, "dry-run", "--save", str(saved)).returncode == 2


def test_a_dry_run_that_would_get_no_key_ends_with_1_and_says_which_checks_fail(enrolled: Enrolled) -> None:
    """A rescue shell shows the failing checks and the session to ask the owner about."""
    with enrolled.booted(OTHER_BOOT) as (world, _):
        done = agent(world, "dry-run")
    assert done.returncode == 1
    assert "FAILS  pcr.8" in done.stdout
    assert "would get no key (session " in done.stdout


def test_an_unlock_for_programs_says_how_each_volume_was_opened(enrolled: Enrolled) -> None:
    """Proved, not mapped, because that was asked for; the boot is capped and the verifier knows."""
    with enrolled.booted() as (world, _):
        done = agent(world, "unlock", "--prove", "--json")
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert [volume["how"] for volume in told["volumes"]] == ["proved"]
    assert told["confirmed"]
    assert len(told["capped"]) == 1


def test_a_refused_unlock_names_the_session_in_words_and_in_json(enrolled: Enrolled) -> None:
    """The owner has to find the refusal that the console shows."""
    with enrolled.booted(OTHER_BOOT) as (world, _):
        done = agent(world, "unlock", "--prove", "--json")
    assert done.returncode == 1
    assert "kagimori-verifier explain " in json.loads(done.stdout)["error"]["todo"]
    assert "FAILS  pcr.8" in done.stderr


def test_a_capped_boot_says_so_the_second_time(enrolled: Enrolled) -> None:
    """The cap is its own verb, for the unit that comes after the agent whatever became of it."""
    with enrolled.booted() as (world, _):
        told = [agent(world, "cap").stdout for _ in range(2)]
    assert [line.rpartition(": ")[2] for line in told] == ["PCR 15 capped\n", "PCR 15 was capped\n"]
